"""The page of `memformer inspect` in a real browser: it draws, reacts to clicks, logs no error and requests nothing."""

import json
import shutil

import pytest

from tests.cli.calls import call, make_text

pytest.importorskip("plotly", reason="the page needs plotly")
pytest.importorskip("selenium", reason="the browser is driven by selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

# A page that ran or showed this as HTML would log an error or request the picture.
ATTACK = '</script><script>throw "attack"</script><img src="http://192.0.2.1/a.png"><b>&lt; $x$ \u2028 é €'
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def text():
    return make_text(3) + ATTACK + make_text(4)


@pytest.fixture(scope="module")
def page(browser, run_folder, text, tmp_path_factory):
    """The page of a tiny run, with its logs from the beginning on."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    status, _, err = call("inspect", run_folder, "--text", folder / "text.txt", "--output", folder / "page.html")
    assert status == 0, err
    # The browser's own first page is not what is tested.
    browser.get("about:blank")
    for name in ("performance", "browser"):
        browser.get_log(name)
    browser.get((folder / "page.html").as_uri())
    drawing = (By.CSS_SELECTOR, "#reader .heatmaplayer image")
    WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(*drawing))
    return browser


def shown(page, identifier):
    return page.find_element(By.ID, identifier).text


def drawn(page, identifier, trace=0):
    """Return the numbers and labels that Plotly draws."""
    script = "const t = document.getElementById(arguments[0]).data[arguments[1]]; return [t.z, t.text && t.text[0]];"
    return page.execute_script(script, identifier, trace)


def test_it_draws(page, text):
    for identifier in ("kept", "writer", "reader"):
        assert page.find_elements(By.CSS_SELECTOR, f"#{identifier} .heatmaplayer image"), identifier
    assert len(page.find_elements(By.CSS_SELECTOR, "#slots tbody tr")) == 2
    assert len(page.find_elements(By.CSS_SELECTOR, "#text .step span")) == len(text.encode())
    parts = page.execute_script("return [...document.querySelectorAll('#text .step')].map(part => part.textContent)")
    assert "".join(parts) == text
    kept, _ = drawn(page, "kept")
    assert len(kept) == 2
    assert all(0 <= share <= 1 for row in kept for share in row)


def test_a_click_on_a_timestep_changes_the_panels(page, text):
    num_timesteps = len(drawn(page, "kept")[0][0])
    area = page.find_element(By.CSS_SELECTOR, "#kept .nsewdrag")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    seen = []
    for timestep in (2, 5):
        offset = area.size["width"] * ((timestep + 0.5) / num_timesteps - 0.5)
        ActionChains(page).move_to_element_with_offset(area, round(offset), 0).click().perform()
        WebDriverWait(page, 5).until(lambda driver, t=timestep: shown(driver, "selected").startswith(f"timestep {t}:"))
        writer, labels = drawn(page, "writer", 1)
        assert "".join(labels).replace("␣", " ").replace("⏎", "\n") == text[8 * (timestep - 1) : 8 * timestep]
        assert (len(writer), len(writer[0])) == (2, 8)
        seen.append((writer, drawn(page, "writer")[0], drawn(page, "reader")[0]))
        assert page.find_element(By.CSS_SELECTOR, ".step.selected").get_attribute("data-index") == str(timestep)
    assert all(first != second for first, second in zip(*seen, strict=True))


def move_slider(page, timestep):
    script = (
        "const s = document.getElementById('timestep'); s.value = arguments[0]; s.dispatchEvent(new Event('input'));"
    )
    page.execute_script(script, str(timestep))
    assert shown(page, "selected").startswith(f"timestep {timestep}:")


def test_labels_of_plots_are_escaped(page, text):
    """Plotly reads some HTML in labels."""
    move_slider(page, text.index("<") // 8 + 1)
    for identifier, trace in (("writer", 1), ("reader", 0)):
        _, labels = drawn(page, identifier, trace)
        assert "&lt;" in labels
        assert "<" not in labels


def test_the_slider_the_layer_and_the_colours_react(page):
    move_slider(page, 4)
    Select(page.find_element(By.ID, "layer")).select_by_visible_text("1")
    colours = []
    for mode in ("memory", "erased", "difference"):
        page.find_element(By.CSS_SELECTOR, f"input[value={mode}]").click()
        spans = page.find_elements(By.CSS_SELECTOR, "#text .step span")[20:40]
        colours.append([span.value_of_css_property("background-color") for span in spans])
    assert colours[0] != colours[1] != colours[2] != colours[0]
    assert "the memory saves" in shown(page, "scale")


def test_nothing_is_requested_and_no_error_is_logged(page):
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in sent]
    assert [url for url in urls if not url.startswith(("data:", "blob:"))] == [page.current_url]
    assert page.get_log("browser") == []
    assert page.execute_script("return document.querySelectorAll('img[src^=http], #text b').length") == 0
