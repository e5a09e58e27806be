"""`memformer evaluate` on a run's own documents and on other documents, and its error messages."""

import gzip
import shutil
import struct

import numpy as np
import pytest

from memformer import Memformer
from memformer.data import load_tokenizer, save_tokenizer
from tests.cli.calls import call, call_json, make_text, refused


def test_evaluate_prints_a_table(run_folder):
    status, out, _ = call("evaluate", run_folder)
    assert status == 0
    assert "bits/byte" in out
    assert str(run_folder / "best") in out


def test_evaluate_on_other_data_and_on_a_saved_model(run_folder, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(make_text(99) * 3)
    options = ["--data.kind", "text", "--data.path", other]
    of_run = call_json("evaluate", run_folder, *options)
    assert of_run["num_tokens"] == other.stat().st_size
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "saved"
    Memformer.from_pretrained(run_folder / "best").save_pretrained(folder)
    save_tokenizer(load_tokenizer(run_folder), folder)
    of_saved = call_json("evaluate", folder, *options)
    assert of_saved["with_memory"] == of_run["with_memory"]
    assert of_saved["weights"] == str(folder)
    assert "has no held-out documents of its own; give --data.kind and --data.path" in refused("evaluate", folder)


def test_evaluate_decides_by_content(run_folder, tmp_path):
    """Documents to evaluate on are decompressed whatever they are called, and refused if they are not text."""
    other = tmp_path / "other.txt"
    options = ["--data.kind", "text", "--data.path", other]
    other.write_bytes(gzip.compress(make_text(99).encode()))
    assert call_json("evaluate", run_folder, *options)["num_tokens"] == len(make_text(99))
    other.write_text(make_text(99), encoding="utf-16")
    assert f"{other} is not UTF-8 text at byte offset 0 (0xff): it is UTF-16" in refused(
        "evaluate", run_folder, *options
    )


def test_evaluate_and_retention_warn_of_changed_documents(base, copied, tmp_path):
    """Evaluating a run on its own documents warns if these have changed since the run began."""
    shutil.copytree(base / "texts", tmp_path / "texts")
    file = tmp_path / "texts" / "3.txt"
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.partition("\n")[2].replace(str(base / "texts"), str(tmp_path / "texts")))
    assert call("evaluate", copied)[2] == ""
    file.write_text(make_text(3)[::-1])
    for command in (["evaluate", copied], ["retention", copied, "--output", tmp_path / "out"]):
        error = call(*command)[2]
        assert "memformer: warning: data.train has changed since the run began: " in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_lanes", "0"], "num_lanes (0) must be at least 1"),
        (["--nmu_lanes", "1"], "unknown option --nmu_lanes; did you mean --num_lanes?"),
        (["--data.knd", "text"], "unknown option --data.knd; did you mean --data.kind?"),
        (["--data.kind", "text"], "path (None) must be given for kind 'text'"),
        (["--data.kind", "digits"], "data of kind 'digits' does not fit the run's tokenizer of kind 'bytes'"),
        (["--data.kind", "text", "--data.path", "/no/such"], "data.path (/no/such) does not exist"),
        (["--checkpoint", "worst"], "argument --checkpoint: invalid choice: 'worst'"),
        (["--threads", "0"], "threads (0) must be from 1 to 65536"),
    ],
)
def test_refused_evaluation(run_folder, options, message):
    assert message in refused("evaluate", run_folder, *options)


def test_images_of_other_levels_are_refused(digits, tmp_path):
    """Fewer levels are valid token ids too, but they mean other grey levels."""
    folder = digits[0]
    images = np.zeros((3, 8, 8), np.uint8)
    (tmp_path / "images").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    options = ["--data.kind", "idx", "--data.path", tmp_path / "images", "--data.levels"]
    message = "images of shape (8, 8) with 8 levels do not fit the run's (8, 8) and 17"
    assert message in refused("evaluate", folder, *options, "8")
    assert call("evaluate", folder, *options, "17")[0] == 0
