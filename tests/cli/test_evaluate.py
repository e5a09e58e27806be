"""`memformer evaluate` on a run's own documents and on other documents, and its error messages."""

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_lanes", "0"], "num_lanes (0) must be at least 1"),
        (["--nmu_lanes", "1"], "unknown option --nmu_lanes; did you mean --num_lanes?"),
        (["--data.knd", "text"], "unknown option --data.knd; did you mean --data.kind?"),
        (["--data.kind", "text"], "path (None) must be given for kind 'text'"),
        (["--data.kind", "digits"], "data of kind 'digits' does not fit the run's tokenizer of kind 'bytes'"),
        (["--data.kind", "text", "--data.path", "/no/such"], "path (/no/such) does not exist"),
        (["--checkpoint", "worst"], "worst"),
        (["--threads", "0"], "threads (0) must be from 1 to 65536"),
    ],
)
def test_refused_evaluation(run_folder, options, message):
    assert message in refused("evaluate", run_folder, *options)
