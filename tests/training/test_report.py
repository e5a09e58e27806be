import base64
import html
import io
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import yaml

from memformer import CheckpointError, InputError
from memformer.data import RecallConfig
from memformer.evaluation.kept_shares import KeptShares
from memformer.training.config import DataConfig, RunConfig
from memformer.training.logs import read_log
from memformer.training.report import write_report
from memformer.training.run_folder import write_run_config

TRAINING = {
    "kind": "training",
    "bits_per_token": 4.5,
    "num_tokens": 1234567,
    "seconds": 60.0,
    "tokens_per_second": 20576.0,
    "peak_memory_bytes": 3 * 2**20,
    "memory_gradient_norms": [0.5, 0.25],
}
EVALUATION = {"kind": "evaluation", "bits_per_byte": 3.25, "bits_per_byte_memory_erased": 3.5}
FIGURES = {"perplexity": 9.5137, "bits_per_token": 3.25, "bits_per_byte": 3.25}
RESULT = {
    "num_tokens": 7654,
    "num_bytes": 7654,
    "with_memory": FIGURES,
    "memory_erased": {**FIGURES, "bits_per_byte": 3.5125},
    "memory_gain_bits_per_byte": 0.2625,
}


@pytest.fixture
def run_folder(tmp_path):
    """The files of a run on text that a report reads."""
    folder = tmp_path / "some <run>"
    lines = [{**kind, "update": update} for update in (1, 2) for kind in (TRAINING, EVALUATION)]
    (folder / "samples").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(RESULT), encoding="utf-8")
    (folder / "samples" / "update-000000001.txt").write_text("an old sample", encoding="utf-8")
    (folder / "samples" / "update-000000002.txt").write_text("<script>alert(1)</script>", encoding="utf-8")
    write_run_config(folder, RunConfig(folder=str(folder)).to_dict())
    return folder


def add_evaluation(run_folder, update):
    with (run_folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({**EVALUATION, "update": update}) + "\n")


def test_a_page_shows_results_curve_sample_config_and_versions(run_folder):
    file = write_report(run_folder)
    page = file.read_text(encoding="utf-8")
    assert file == run_folder / "summary.html"
    assert page.count("<svg") == 2
    for shown in ("3.2500", "3.5125", "9.514", "0.2625 bits per byte", "7,654", "1,234,567", "num_slots: 32", "torch"):
        assert shown in page, shown


class _Headings(HTMLParser):
    """The headings of a page and the summaries of its folded parts, in order; "+" before those that are open."""

    def __init__(self):
        super().__init__()
        self.found, self.path, self.is_open = [], [], False

    def handle_starttag(self, tag, attributes):
        self.path.append(tag)
        if tag == "details":
            self.is_open = "open" in dict(attributes)

    def handle_data(self, text):
        if self.path and self.path[-1] in {"h2", "summary"}:
            self.found.append(text if self.path[-1] == "h2" else "+-"[not self.is_open] + text)

    def handle_endtag(self, tag):
        while self.path and self.path.pop() != tag:
            pass


def headings_of(page):
    parser = _Headings()
    parser.feed(page)
    return parser.found


def test_the_parts_are_in_order_with_all_samples_and_the_newest_open(run_folder):
    (run_folder / "samples" / "update-000012000.txt").write_text("the newest sample", encoding="utf-8")
    add_evaluation(run_folder, 12_000)
    (run_folder / "samples" / "notes.txt").write_text("a file of the user", encoding="utf-8")
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert headings_of(page) == [
        "Held-out documents",
        "Learning curves",
        "The memory",
        "Gradient of the memory",
        "Samples",
        *("-update 1", "-update 2", "+update 12,000"),
        "Commands for this run",
        "Settings",
        *("-Config", "-Versions"),
    ]
    assert page.index("an old sample") < page.index("&lt;script") < page.index("the newest sample")
    assert "a file of the user" not in page


def test_the_memory_is_drawn_or_a_sentence_says_why_not(run_folder):
    """An error in drawing costs the picture, never the page."""
    kept = KeptShares(np.full((7, 2), 0.5), [0, 3], "the held-out <documents>")
    page = write_report(run_folder, memory=lambda: kept).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "the first 7 timesteps of the held-out &lt;documents&gt;. White lines" in page

    def fail(error):
        raise error

    for memory, reason in (
        (None, "the page was written without the run's data"),
        (partial(fail, InputError("the data is <gone>")), "the data is <gone>."),
        (partial(fail, RuntimeError("out of memory")), "RuntimeError: out of memory."),
        (lambda: KeptShares(np.zeros(2), [], "nothing"), "ValueError: "),
    ):
        page = write_report(run_folder, memory=memory).read_text(encoding="utf-8")
        assert page.count("<svg") == 2
        assert f"There is no picture of the memory: {reason}" in html.unescape(page)
        assert "3.5125" in page


def copy_of(run_folder, name):
    return shutil.copytree(run_folder, run_folder.parent / name)


def texts_of(page):
    return re.findall(r"<text[^>]*>([^<]*)</text>", page)


def test_other_runs_are_drawn_beside_the_run_with_a_table(run_folder):
    others = [copy_of(run_folder, name) for name in ("first", "second")]
    config = RunConfig(folder="x", data=DataConfig(recall=RecallConfig()))
    write_run_config(others[1], config.to_dict())
    line = {"kind": "evaluation", "update": 2, "accuracy": 0.5, "accuracy_memory_erased": 0.25}
    (others[1] / "log.jsonl").write_text(
        json.dumps({**TRAINING, "update": 1}) + "\n" + json.dumps(line) + "\n", encoding="utf-8"
    )
    (others[1] / "evaluation.json").unlink()
    page = write_report(run_folder, others=[*others, run_folder, others[0] / ".." / "first"]).read_text(
        encoding="utf-8"
    )
    folders = [str(folder) for folder in (run_folder, *others)]
    shown = [html.unescape(text) for text in texts_of(page)]
    assert [text for text in shown if text.startswith(str(run_folder.parent)[:20]) or text.startswith("…")] == [
        folder if len(folder) <= 88 else f"…{folder[-87:]}" for folder in folders
    ]
    assert {"held out, bits per byte", "held out, accuracy", "training, bits per token"} <= set(shown)
    assert "data.recall.task" in page
    assert "the held-out data of the runs differs, so their held-out results cannot be compared" in page
    assert "the held-out data of the runs" not in write_report(run_folder, others=[others[0]]).read_text(
        encoding="utf-8"
    )


def test_without_others_there_is_no_table(run_folder):
    for others in ((), [run_folder]):
        page = write_report(run_folder, others=others).read_text(encoding="utf-8")
        assert "Results of these runs" not in page
        assert "held out, memory erased" in texts_of(page)


def test_another_folder_that_is_no_run_is_refused_and_the_page_stays(run_folder):
    before = write_report(run_folder).read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"samples is not the folder of a trained run: it has no config\.yaml"):
        write_report(run_folder, others=[run_folder / "samples"])
    assert (run_folder / "summary.html").read_text(encoding="utf-8") == before


def test_a_run_whose_memory_gets_no_gradient_has_no_gradient_plot(run_folder):
    log = run_folder / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace("[0.5, 0.25]", "[0.0, 0.0]"), encoding="utf-8")
    assert "<h2>Gradient of the memory</h2>" not in write_report(run_folder).read_text(encoding="utf-8")


def test_a_page_loads_no_other_files(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")
    loaded = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)|url\(["']?([^)"']*)|@import""", page)
    targets = [first or second for first, second in loaded]
    assert all(target.startswith(("#", "data:")) for target in targets), targets
    assert "<script" not in page
    assert "<!DOCTYPE svg" not in page


def test_names_and_samples_cannot_inject_markup(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<title>some &lt;run&gt;" in page


def test_images_are_embedded_in_the_page(run_folder):
    """All of them are open: they stand side by side."""
    for number in (3, 4):
        image = run_folder / "samples" / f"update-00000000{number}.png"
        matplotlib.image.imsave(image, np.zeros((number, 5), dtype=np.uint8), cmap="gray")
        add_evaluation(run_folder, number)
    page = write_report(run_folder).read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shapes = [matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png").shape[:2] for data in images]
    assert shapes == [(3, 5), (4, 5)]
    assert [found for found in headings_of(page) if "update" in found][-2:] == ["+update 3", "+update 4"]


def test_samples_of_another_run_in_the_folder_are_not_shown(run_folder):
    (run_folder / "samples" / "update-000000003.txt").write_text("left by an earlier run", encoding="utf-8")
    assert "left by an earlier run" not in write_report(run_folder).read_text(encoding="utf-8")


def test_an_unfinished_run_has_a_page(run_folder):
    (run_folder / "evaluation.json").unlink()
    shutil.rmtree(run_folder / "samples")
    lines = (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run_folder / "log.jsonl").write_text("", encoding="utf-8")
    page = write_report(run_folder).read_text(encoding="utf-8")
    assert "Held-out documents" not in page
    assert "The run has not ended and was not evaluated." in page
    (run_folder / "log.jsonl").write_text(lines[0] + lines[1][:20], encoding="utf-8")
    assert "in 1 updates" in write_report(run_folder).read_text(encoding="utf-8")
    (run_folder / "log.jsonl").write_text(lines[0] + lines[3], encoding="utf-8")
    assert "after update 2, held out: 3.2500 bits per byte." in write_report(run_folder).read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no log\.jsonl; a report needs a trained run"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", b'{"kind": "x"\n{}\n', r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b'\xff\n{"kind": "training", "update": 1}\n', r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b"7\n7\n", r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b'{"kind": "training", "update": "x"}\n{}\n', r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b'{"kind": "training", "update": 1}\n', "lacks a value: .*bits_per_token"),
        ("evaluation.json", b"{", r"evaluation\.json is not readable JSON"),
        ("evaluation.json", b'{"num_tokens": 1}', "lacks a value: .*with_memory"),
        ("versions.json", b"[]", r"versions\.json holds a JSON list"),
        ("config.yaml", b"[", r"config\.yaml is not YAML"),
        ("config.yaml", b"7", r"config\.yaml does not contain a config: it must be a mapping"),
    ],
)
def test_the_error_names_a_damaged_file(run_folder, name, content, message):
    (run_folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        write_report(run_folder)
    assert not (run_folder / "summary.html").exists()


def test_an_incomplete_last_line_of_the_log_is_ignored(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "training", "update": 1}\n{"kind": "trai', encoding="utf-8")
    assert read_log(tmp_path) == [{"kind": "training", "update": 1}]


def test_the_page_contains_the_config_of_the_run(run_folder):
    page = write_report(run_folder).read_text(encoding="utf-8")
    (config,) = re.findall(r"<summary>Config</summary>\s*<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert (
        yaml.safe_load(config.replace("&lt;", "<").replace("&gt;", ">")) == RunConfig(folder=str(run_folder)).to_dict()
    )
