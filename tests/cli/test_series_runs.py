"""Runs on series: trained, resumed, evaluated, scored and continued like those on texts, with bins of their own."""

import json
import math
import shutil

import numpy as np
import pytest
import yaml

from memformer.cli import generate as generate_module
from memformer.cli.positions import Position
from memformer.cli.prompts import open_prompt
from memformer.cli.reading import Reading
from memformer.data import BinTokenizer
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused
from tests.cli.test_score import records

KIND = ("--data.train.kind", "array", "--data.tokenizer.kind", "bins", "--data.tokenizer.num_bins", "5")


def arguments(base, file, folder):
    """Arguments of a run that trains on the first 200 rows of a file."""
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["data"] |= {
        "train": {"kind": "array", "path": str(file), "rows": ":200", "columns": ["b", "a"]},
        "validation": {"kind": "array", "path": str(file), "rows": "200:"},
        "tokenizer": {"kind": "bins", "num_bins": 5},
        "max_document_tokens": 60,
    }
    file.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    return ["train", file.with_suffix(".yaml"), "--folder", folder]


def write_csv(file, values):
    rows = "".join(f"{row},{first!r},{second!r}\n" for row, (first, second) in enumerate(values.tolist()))
    file.write_text("time,a,b\n" + rows)
    return file


@pytest.fixture(scope="session")
def values():
    time = np.arange(300)
    return np.stack([np.sin(time / 5), np.cos(time / 3) * 100], axis=1)


@pytest.fixture(scope="session")
def series(base, values):
    file = write_csv(base / "series.csv", values)
    return base / "series-run", call_json(*arguments(base, file, base / "series-run")), file


def test_a_run_is_evaluated_scored_and_continued(series, base, values, tmp_path):
    folder, trained, file = series
    assert (trained["unit"], trained["num_bytes"], trained["num_tokens"]) == ("value", 200, 200)
    assert call_json("evaluate", folder)["with_memory"] == trained["with_memory"]
    # Another file with one document; its columns are found by name.
    evaluated = call_json("evaluate", folder, "--data.kind", "array", "--data.path", file, "--data.rows", "200:")
    (tmp_path / "rows.csv").write_text("b,a\n" + "".join(f"{b!r},{a!r}\n" for a, b in values[200:].tolist()))
    (total,) = records(folder, tmp_path / "rows.csv", "--per", "document")
    assert total["bits_per_value"] == pytest.approx(evaluated["with_memory"]["bits_per_byte"], rel=1e-6)
    assert (total["values"], total["lines"]) == (200, 101)
    lines = records(folder, tmp_path / "rows.csv")
    assert lines[0]["tokens"] == lines[0]["bits_per_value"] == 0
    assert all((line["tokens"], line["values"]) == (2, 2) for line in lines[1:])
    assert sum(line["nats"] for line in lines) / math.log(2) == pytest.approx(total["bits_per_value"] * 200)
    generated = call_json("generate", folder, "--prompt", "1.0,0.5\n", "--max_new_tokens", "6", "--seed", "1")
    bins = load_run(folder).tokenizer
    assert set(generated["text"].replace("\n", ",").strip(",").split(",")) <= set(bins._texts)
    assert (folder / "summary.html").is_file()


def test_the_bins_are_those_of_the_training_rows_alone(series, base, values, tmp_path):
    """Other validation data change no bin; other training data do."""
    bins = load_run(series[0]).tokenizer
    assert isinstance(bins, BinTokenizer)
    assert bins.columns == ["b", "a"]
    assert max(bins.edges[0]) <= values[:200, 1].max()
    later, earlier = values.copy(), values.copy()
    later[200:] *= 1e6
    earlier[:200] *= 1e6
    fingerprints = []
    for name, changed in (("later", later), ("earlier", earlier)):
        file = write_csv(tmp_path / f"{name}.csv", changed)
        call_json(*arguments(base, file, tmp_path / name), "--training.num_updates", "1")
        fingerprints.append(load_run(tmp_path / name).tokenizer.fingerprint)
    assert (fingerprints[0] == bins.fingerprint, fingerprints[1] == bins.fingerprint) == (True, False)


def test_a_resumed_run_is_the_whole_one(series, tmp_path, values):
    folder, trained, _ = series
    copy = shutil.copytree(folder, tmp_path / "copy")
    newest = max((copy / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert call_json("train", copy, "--resume")["with_memory"] == trained["with_memory"]
    weights = f"checkpoints/{newest.name}/model.safetensors"
    assert (copy / weights).read_bytes() == (folder / weights).read_bytes()
    changed = write_csv(tmp_path / "changed.csv", values * 2)
    message = refused("train", copy, "--resume", "--data.train.path", changed, "--data.validation.path", changed)
    assert "data.train has changed since the run began" in message


def test_generated_rows_have_a_value_of_every_column_in_order(series):
    """A model that has hardly learned draws bins of any column."""
    folder, _, _ = series
    generated = call_json("generate", folder, "--prompt", "1.0,0.5\n", "--max_new_tokens", "100", "--seed", "1")
    first = len(load_run(folder).tokenizer.centres[0])  # token id of the second column's first bin
    assert [token >= first for token in generated["token_ids"]] == [False, True] * 50
    samples = list((folder / "samples").glob("*.txt"))
    assert samples
    assert all(line.count(",") == 1 for sample in samples for line in sample.read_text().splitlines())


def test_generation_ends_with_a_row(series, tmp_path, monkeypatch):
    folder, _, _ = series
    assert "--max_new_tokens (5) must end with a row: a row has 2 tokens" in refused(
        "generate", folder, "--max_new_tokens", "5"
    )
    monkeypatch.setattr(generate_module, "NEW_TOKENS", 5)
    done = call_json("generate", folder, "--prompt", "1.0,0.5\n", "--seed", "1")
    assert len(done["token_ids"]) == 6
    # A session that stops within a row, as after Ctrl-C.
    session = load_run(folder).session()
    session.feed([0, 5, 1])
    session.save(tmp_path / "state")
    (tmp_path / "rows.csv").write_text("1.0,0.5\n")
    for argv in (["score", folder, tmp_path / "rows.csv"], ["generate", folder, "--prompt", "1.0,0.5\n"]):
        message = refused(*argv, "--load_session", tmp_path / "state")
        assert "has read 1 of the 2 columns of a row" in message
    assert len(call_json("generate", folder, "--load_session", tmp_path / "state")["token_ids"]) == 5
    assert "and the session has read 1 of one" in refused(
        "generate", folder, "--load_session", tmp_path / "state", "--max_new_tokens", "4"
    )


def test_a_prompt_is_resumed_within_a_row(series, tmp_path):
    """A reading is saved wherever it stops; the rest of the prompt ends the row."""
    folder, _, _ = series
    (tmp_path / "prompt.csv").write_text("1.0,0.5\n2.0,0.5\n3.0,0.5\n")
    argv = ["generate", folder, "--prompt_file", tmp_path / "prompt.csv", "--max_new_tokens", "4", "--seed", "1"]
    run = load_run(folder)
    reading = Reading(run.session(), tmp_path / "state", minutes=1, start=Position())
    with open_prompt(None, str(tmp_path / "prompt.csv")) as prompt:
        reading.feed(next(prompt.pieces(run.tokenizer))[:3])
    reading.save()
    resumed = call_json(*argv, "--save_session", tmp_path / "state", "--resume")
    assert resumed == call_json(*argv)
    assert (resumed["prompt_tokens"], len(resumed["token_ids"])) == (6, 4)


def test_rows_before_a_refused_one_are_scored(series, tmp_path):
    folder, _, _ = series
    (tmp_path / "rows.csv").write_text("1.0,0.5\n2.0,0.5\n3.0,\n4.0,0.5\n")
    status, out, err = call("score", folder, tmp_path / "rows.csv", "--json", "--save_session", tmp_path / "state")
    assert status == 2
    assert "rows.csv, line 3: the line '3.0,' has '', which is not a finite number; the session up to there" in err
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["1.0,0.5", "2.0,0.5"]
    prompt = ("--prompt_file", tmp_path / "rows.csv", "--max_new_tokens", "0", "--save_session", tmp_path / "read")
    status, _, err = call("generate", folder, *prompt)
    assert (status, "rows.csv, line 3: the line '3.0,' has ''" in err) == (2, True)
    run = load_run(folder)
    assert run.load_session(tmp_path / "read").num_tokens == run.load_session(tmp_path / "state").num_tokens == [4]


def test_a_missing_value_of_a_series_of_one_column_is_refused(base, tmp_path, values):
    (tmp_path / "x.csv").write_text("".join(f"{value!r}\n" for value in values[:, 0].tolist()))
    argv = arguments(base, tmp_path / "x.csv", tmp_path / "run")
    call_json(*argv, "--data.train.columns", '["0"]', "--training.num_updates", "1")
    for missing in ('""', "  "):
        (tmp_path / "rows.csv").write_text(f"1.0\n{missing}\n2.0\n")
        status, _, err = call("score", tmp_path / "run", tmp_path / "rows.csv")
        assert (status, "rows.csv, line 2: the line" in err) == (2, True)
    (tmp_path / "rows.csv").write_text("1.0\r\n\r\n2.0\n")
    found = records(tmp_path / "run", tmp_path / "rows.csv")
    assert [each["text"] for each in found if each["tokens"]] == ["1.0", "2.0"]


def test_values_outside_of_the_training_data_are_warned_of(series, base, values, tmp_path):
    """Once for each column of a text that may never end, and by their share in documents."""
    folder, _, file = series
    (tmp_path / "rows.csv").write_text("1.0,0.5\n101,0.5\n-200,0.5\n1.0,2\n")
    lowest, highest = values[:200, 1].min(), values[:200, 1].max()
    for command, *options in (
        ("score", tmp_path / "rows.csv"),
        ("generate", "--prompt_file", tmp_path / "rows.csv", "--max_new_tokens", "0"),
        ("inspect", "--text", tmp_path / "rows.csv", "--json"),
    ):
        _, _, err = call(command, folder, *options)
        assert err.count("outside of those of the training data") == 2
        assert f"has values of column 'b' outside of those of the training data ({lowest:g} to {highest:g})" in err
    later = values.copy()
    later[200:220, 1] = 500
    changed = write_csv(tmp_path / "changed.csv", later)
    source = ("--data.kind", "array", "--data.path", changed, "--data.rows", "200:")
    for err in (
        call("evaluate", folder, *source)[2],
        call(*arguments(base, changed, tmp_path / "x"), "--training.num_updates", "1")[2],
    ):
        assert "has values of column 'b' outside" in err
        assert "outermost bins: 20% of its rows" in err
        assert "column 'a'" not in err
    assert "outside" not in call("evaluate", folder, *source[:3], file, *source[4:])[2]


def test_other_bins_cannot_be_compared(series, base, tmp_path):
    folder, _, file = series
    call_json(*arguments(base, file, tmp_path / "again"))
    call_json(*arguments(base, file, tmp_path / "coarse"), "--data.tokenizer.num_bins", "2")
    for other, is_same in (("again", True), ("coarse", False)):
        found = call_json("compare", folder, tmp_path / other, "--output", tmp_path / "x.png")
        assert found["same_data"] is is_same


def test_refused_runs_on_series(series, base, tmp_path):
    folder, _, file = series
    argv = ["train", base / "config.yaml", "--folder", tmp_path / "x", "--data.train.path", file]
    assert "'array' and 'bins' need each other" in refused(*argv, "--data.train.kind", "array")
    assert "'array' and 'bins' need each other" in refused(*argv, "--data.tokenizer.kind", "bins")
    assert "data.validation must be given for data.train.kind 'array'" in refused(*argv, *KIND)
    full = arguments(base, file, tmp_path / "x")
    assert "data.end_of_document is for texts" in refused(*full, "--data.end_of_document", "true")
    message = refused(*full, "--data.max_document_tokens", "61")
    assert "data.max_document_tokens (61) must be a multiple of the 2 columns, so that no row is cut" in message
    (tmp_path / "constant.csv").write_text("7\n" * 500)
    constant = (*arguments(base, tmp_path / "constant.csv", tmp_path / "x"), "--data.train.columns", "null")
    assert "all values of the training data (data.train) are the same" in refused(*constant)
    text = ("--data.kind", "text", "--data.path", base / "texts")
    assert "does not fit the run's tokenizer of kind 'bins'" in refused("evaluate", folder, *text)
    array = ("--data.kind", "array", "--data.path", file, "--data.columns", '["a","b"]')
    assert "must be those that the bins were fitted on: ['b', 'a']" in refused("evaluate", folder, *array)
    assert "has 1 fields; a row has one number for each of the columns b, a" in refused(
        "generate", folder, "--prompt", "5"
    )
    assert call("evaluate", folder, *array[:4])[0] == 0
