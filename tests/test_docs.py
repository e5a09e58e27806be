"""The documentation: its links hold, every page and public name has its place, and the code of its tutorials runs."""

import re
import shlex
import subprocess
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
from markdown_it import MarkdownIt

import memformer
from memformer import data
from memformer.reproduction import child_processes, runs
from tests.cli.calls import call, make_text
from tests.training.jobs import forked

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("experiments/*.md")])
TUTORIALS = [page for page in sorted((DOCS / "tutorials").glob("*.md")) if page.name != "index.md"]
# The commands of the first page train for minutes; the sizes are no part of what they show.
SMALL = """--threads 1 --data.cache cache --training.num_updates 2 --training.num_lanes 2 --training.rollout_length 2
--training.sample_tokens 5 --model.d_model 16 --model.num_heads 2 --model.d_ff 16 --model.num_encoder_layers 1
--model.num_decoder_layers 1"""
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


@cache
def tokens_of(page):
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


def anchors_of(page):
    """The anchors of a page's headings on git hosts: lower case, hyphens for spaces, other signs left out."""
    tokens = tokens_of(page)
    titles = [inline.content for opening, inline in pairwise(tokens) if opening.type == "heading_open"]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def links_of(page):
    children = [child for token in tokens_of(page) for child in token.children or []]
    found = [child.attrs.get("href") or child.attrs.get("src") for child in children if child.type != "text"]
    return [link for link in found if link and not re.match(r"https?:|mailto:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_an_anchor(page):
    broken = []
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        if not file.is_file() or (anchor and anchor not in anchors_of(file)):
            broken.append(link)
    assert broken == []


def navigation(entries):
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from navigation(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    inside = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    listed = list(navigation(CONFIG["nav"]))
    outside = [name for name in listed if name not in inside]
    assert sorted(listed) == sorted({*inside, *outside})
    assert all((ROOT / name).is_file() for name in outside)


def test_a_page_of_the_site_links_to_pages_of_the_site():
    listed = [DOCS / name if (DOCS / name).is_file() else ROOT / name for name in navigation(CONFIG["nav"])]
    links = {(page, (page.parent / link.partition("#")[0]).resolve()) for page in listed for link in links_of(page)}
    assert [(page, file) for page, file in sorted(links) if file.suffix == ".md" and file not in listed] == []


def test_every_public_name_has_its_place_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
    documented = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    public = [f"memformer.{name}" for name in memformer.__all__] + [f"memformer.data.{name}" for name in data.__all__]
    assert sorted(set(documented)) == sorted(documented)
    assert set(public) <= set(documented)


def test_every_figure_of_the_tutorials_is_shown_and_drawn():
    text = "".join(page.read_text(encoding="utf-8") for page in TUTORIALS)
    figures = sorted(file.name for file in (DOCS / "tutorials" / "figures").iterdir())
    assert sorted(re.findall(r"\]\(figures/(.*?)\)", text)) == figures
    assert sorted(re.findall(r'savefig\("(.*?)"', text)) == figures


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the code of a page in a temporary folder, with smaller sizes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    (tmp_path / "my_book.txt").write_text("".join(make_text(seed) for seed in range(200)))

    def run(page, sizes):
        text = (DOCS / page).read_text(encoding="utf-8")
        for written, small in sizes.items():
            assert written in text
            text = text.replace(written, small)
        names = {}
        for language, code in re.findall(r"^```(python|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            if language == "python":
                exec(compile(code, page, "exec"), names)
            else:
                run_commands(code)
        return names

    yield run
    plt.close("all")


def run_commands(code):
    for line in code.replace("\\\n", " ").splitlines():
        program, *argv = shlex.split(line, comments=True)
        assert program == "memformer"
        status, _, error = call(*argv)
        assert status == 0, f"{line}: {error}"


def test_tutorial_own_text(run):
    sizes = {"num_updates = 500": "num_updates = 2", "max_document_tokens=4096": "max_document_tokens=256"}
    names = run("tutorials/own-text.md", sizes)
    assert len(names["measured"]) == 1


def test_tutorial_endless_stream(run):
    sizes = {"num_updates = 300": "num_updates = 2", "num_lines = 600": "num_lines = 9", "odd = 60": "odd = 3"}
    names = run("tutorials/endless-stream.md", sizes)
    assert len(names["surprise"]) == 33


def test_tutorial_look_inside(run):
    names = run("tutorials/look-inside.md", {})
    # The text describes the figure: from timestep 7 on, one head of every slot holds, and the others do not.
    held = names["keeps"][7:13] > 0.9  # (timesteps, heads, slots)
    assert sorted(held.float().mean((0, 2)).round(decimals=1).tolist()) == [0.0, 0.0, 0.0, 1.0]


def test_tutorial_replay(run):
    names = run("tutorials/replay.md", {})
    assert max(names["curves"]["replay"]) < max(names["curves"]["BPTT"]) / 10


def test_tutorial_table1(run, monkeypatch):
    pytest.importorskip("sklearn", reason="needs the extra `digits`")
    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=forked, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    names = run("tutorials/table1.md", {"num_updates 300": "num_updates 2", "1500:1797": "1500:1510"})
    assert list(names["rows"]) == ["07-slots-64", "12-no-memory"]


def test_the_page_about_python(run):
    names = run("python.md", {"max_document_tokens=4096": "max_document_tokens=256"})
    assert names["rows"].batch_size == 3
    assert names["result"].num_tokens > 0


def test_own_model_is_trained_by_exact_replay(run):
    names = run("own-model.md", {"num_updates = 300": "num_updates = 2"})
    assert set(names["gradients"]) == {"bptt", "checkpoint", "replay"}


def test_the_commands_of_the_first_page_run(run, tmp_path):
    (tmp_path / "my_book.txt").write_text("".join(make_text(seed) for seed in range(40)))
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    text = re.sub(
        r"head -n \d+ (\S+) \| (.*) --prompt_file - ", r"\2 --prompt_file \1 ", text
    )  # no pipe in this process
    lines = re.findall(r"^ {4}(memformer (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    assert len(lines) == 6
    lines[0] = lines[0].replace("8192", "128") + " " + " ".join(SMALL.split())
    lines = [line.replace("num_updates 1000", "num_updates 3") for line in lines]
    run_commands("\n".join(re.sub(r"max_new_tokens [1-9]\d*", "max_new_tokens 3", line) for line in lines))
    assert (tmp_path / "runs" / "first" / "summary.html").is_file()
    assert (tmp_path / "book.state").is_file()
