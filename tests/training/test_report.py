import base64
import io
import json
import re
import shutil

import matplotlib.image
import numpy as np
import pytest
import yaml

from memformer import CheckpointError, InputError
from memformer.training.config import RunConfig
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
    lines = [{**TRAINING, "update": 1}, {**EVALUATION, "update": 2}, {**TRAINING, "update": 2}]
    (folder / "samples").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps(RESULT))
    (folder / "samples" / "update-000000001.txt").write_text("an old sample")
    (folder / "samples" / "update-000000002.txt").write_text("<script>alert(1)</script>")
    write_run_config(folder, RunConfig(folder=str(folder)).to_dict())
    return folder


def test_a_page_shows_results_curve_sample_config_and_versions(run_folder):
    file = write_report(run_folder)
    page = file.read_text()
    assert file == run_folder / "summary.html"
    assert page.count("<svg") == 2
    assert "<h2>Gradient of the memory</h2>" in page
    for shown in ("3.2500", "3.5125", "9.514", "0.2625 bits per byte", "7,654", "1,234,567", "num_slots: 32", "torch"):
        assert shown in page, shown
    assert "an old sample" not in page


def test_a_run_whose_memory_gets_no_gradient_has_no_gradient_plot(run_folder):
    log = run_folder / "log.jsonl"
    log.write_text(log.read_text().replace("[0.5, 0.25]", "[0.0, 0.0]"))
    assert "<h2>Gradient of the memory</h2>" not in write_report(run_folder).read_text()


def test_a_page_loads_no_other_files(run_folder):
    page = write_report(run_folder).read_text()
    loaded = re.findall(r"""(?:src|href|data|action)\s*=\s*["']([^"']*)|url\(["']?([^)"']*)|@import""", page)
    targets = [first or second for first, second in loaded]
    assert all(target.startswith(("#", "data:")) for target in targets), targets
    assert "<script" not in page
    assert "<!DOCTYPE svg" not in page


def test_names_and_samples_cannot_inject_markup(run_folder):
    page = write_report(run_folder).read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<title>some &lt;run&gt;" in page


def test_images_are_embedded_in_the_page(run_folder):
    image = run_folder / "samples" / "update-000000003.png"
    matplotlib.image.imsave(image, np.zeros((3, 5), dtype=np.uint8), cmap="gray")
    page = write_report(run_folder).read_text()
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)), format="png").shape[:2] == (3, 5)


def test_an_unfinished_run_has_a_page(run_folder):
    (run_folder / "evaluation.json").unlink()
    shutil.rmtree(run_folder / "samples")
    lines = (run_folder / "log.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "log.jsonl").write_text("")
    assert "Held-out documents" not in write_report(run_folder).read_text()
    (run_folder / "log.jsonl").write_text(lines[0] + lines[1][:20])
    assert "in 1 updates" in write_report(run_folder).read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no log\.jsonl; a report needs a trained run"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", b'{"kind": "x"\n{}\n', r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b'\xff\n{"kind": "training", "update": 1}\n', r"log\.jsonl: line 1 is damaged"),
        ("log.jsonl", b"7\n7\n", r"log\.jsonl: line 1 is damaged"),
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
    (tmp_path / "log.jsonl").write_text('{"kind": "training", "update": 1}\n{"kind": "trai')
    assert read_log(tmp_path) == [{"kind": "training", "update": 1}]


def test_the_page_contains_the_config_of_the_run(run_folder):
    page = write_report(run_folder).read_text()
    (config,) = re.findall(r"<h2>Config</h2>\s*<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert (
        yaml.safe_load(config.replace("&lt;", "<").replace("&gt;", ">")) == RunConfig(folder=str(run_folder)).to_dict()
    )
