"""`memformer reproduce`: missing runs are trained, finished runs are reused, and the results are written."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import yaml

from memformer import LSTMConfig, MemformerConfig, TransformerXLConfig, build_model
from memformer.cli import run_config
from memformer.errors import InputError
from memformer.evaluation.flops import flops_per_token
from memformer.reproduction import child_processes, command, runs
from memformer.reproduction.results import collect, draw
from memformer.reproduction.runs import check_data, plan_runs
from memformer.reproduction.tables import read_table, table_names, tables_folder
from memformer.utils import progress
from memformer.utils.ownership import owned_folder
from tests.cli.calls import call, call_json, make_text, refused
from tests.models.classifiers import tiny_classifier
from tests.training.jobs import forked

TABLE = {
    "title": "A small table",
    "data_sets": {"texts": "some texts, from the library"},
    "scales": {
        "small": {
            "metric": "bits_per_byte",
            "flops_tokens": 100,
            "note": "Ours is small.",
            "run": {
                "threads": 1,
                "device": "cpu",
                "data": {"train": {"kind": "text", "path": "{data}/texts"}, "cache": "{data}/cache"},
                "training": {"num_updates": 2, "num_lanes": 2, "rollout_length": 2, "sample_tokens": 0},
            },
            "models": {"lstm": {"d_model": 8, "segment_length": 8}, "memformer": {"d_model": 8, "num_heads": 2}},
        }
    },
}
ROWS = {
    "1-lstm": {"name": "LSTM", "model_type": "lstm", "paper": {"perplexity": 1.5}, "scales": {"small": {}}},
    "2-memory": {
        "name": "Memformer",
        "curves": {"slots": 2},
        "model_type": "memformer",
        "scales": {"small": {"model": {"num_slots": 2, "segment_length": 8}, "training": {"learning_rate": 0.01}}},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("reproduction")
    (base / "texts").mkdir()
    for seed in range(8):
        (base / "texts" / f"{seed}.txt").write_text(make_text(seed))
    return base


@pytest.fixture
def table(base, tmp_path, monkeypatch):
    """Options for a table of two rows."""
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "table.yaml").write_text(yaml.safe_dump(TABLE))
    for key, row in ROWS.items():
        (folder / f"{key}.yaml").write_text(yaml.safe_dump(row))
    monkeypatch.setattr(command, "tables_folder", lambda: tmp_path / "experiments")
    return ["tiny", "--data", base, "--folder", tmp_path / "out"]


def test_missing_runs_are_trained_and_finished_runs_are_reused(table, tmp_path, monkeypatch):
    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=forked, STDOUT=subprocess.STDOUT))
    out = tmp_path / "out"
    figures = call_json("reproduce", *table, "--seeds", "2", "--jobs", "2")
    assert [row["row"] for row in figures["rows"]] == ["1-lstm", "2-memory"]
    for row in figures["rows"]:
        values = [result["with_memory"]["bits_per_byte"] for result in row["results"].values()]
        assert len(values) == 2
        assert row["bits_per_byte"]["mean"] == pytest.approx(sum(values) / 2)
        assert row["parameters"] > 0
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((out / "2-memory-seed-1" / "config.yaml").read_text())
    assert (config["seed"], config["model"]["num_slots"], config["training"]["learning_rate"]) == (1, 2, 0.01)

    tiny = read_table(tmp_path / "experiments" / "tiny")
    planned = plan_runs(tiny, tiny.rows, scale="small", seeds=[0, 1], folder=out, data=str(tmp_path))
    assert tiny.choose(["2-memory", "1-lstm", "2-memory"]) == tiny.choose(["2-memory", "1-lstm"])
    costs, slots = draw(tiny, collect(planned, tiny.scale("small")), "small").axes
    assert costs.get_xlabel() == "GFLOPs for 100 tokens"
    ((places, means),) = (line.get_data() for line in slots.lines[:1])
    assert (slots.get_xlabel(), list(places)) == ("slots", [2])
    assert list(means) == [figures["rows"][1]["bits_per_byte"]["mean"]]

    before = (out / "2-memory-seed-0" / "log.jsonl").read_bytes()
    shutil.rmtree(out / "1-lstm-seed-0")
    (out / "1-lstm-seed-1" / "evaluation.json").unlink()  # an interrupted run, which is resumed
    changed = refused("reproduce", *table, "--seeds", "2", "--rows", "1-lstm", "--", "--training.learning_rate", "1")
    assert "1-lstm-seed-1 cannot be reused: the run began with training.learning_rate: 0.001, now it is 1.0" in changed
    status, printed, error = call("reproduce", *table, "--seeds", "2")
    assert status == 0, error
    assert "2 of 4 runs are finished" in error
    assert "resuming from" in (out / "1-lstm-seed-1" / "train.log").read_text()
    assert (out / "2-memory-seed-0" / "log.jsonl").read_bytes() == before
    header, _, lstm, memory = (out / "table.md").read_text().splitlines()[4:]
    assert "paper: perplexity" in header
    assert lstm.startswith("| LSTM | ")
    assert lstm.endswith("| 1.5 |")
    assert memory.endswith("|  |")
    assert "Ours is small." in printed

    result = json.loads(call("reproduce", *table, "--only_write", "--rows", "2-memory", "--json")[1])
    assert result["rows"][0]["row"] == "2-memory"
    changed = refused("reproduce", *table, "--only_write", "--", "--training.weight_decay", "0")
    assert "cannot be reused: the run began with training.weight_decay: 0.1, now it is 0.0" in changed
    assert "--nonsense" in refused("reproduce", *table, "--only_write", "--", "--nonsense", "5")
    check_damaged_results(table, run=out / "2-memory-seed-0")
    check_what_is_reused(table, tmp_path, run=out / "2-memory-seed-0")


def check_damaged_results(table, *, run):
    """Results that lack a value are named; nothing is written from them."""
    for name, content in (
        ("log.jsonl", b'{"kind": "evaluation", "update": 2}\n'),
        ("evaluation.json", b'{"num_tokens": 1}'),
        ("evaluation.json", b'{"with_memory": {"bits_per_byte": NaN}, "memory_erased": {"bits_per_byte": 1}}'),
    ):
        intact = (run / name).read_bytes()
        (run / name).write_bytes(content)
        assert f"in {run} lacks a value" in refused("reproduce", *table, "--only_write")
        (run / name).write_bytes(intact)


def check_what_is_reused(table, tmp_path, *, run):
    """A finished run is reused only if options, table and data are those that it was trained with."""
    one = [*table, "--rows", "2-memory"]
    advice = "; train it again in another --folder, or delete it"
    speed_only = ("--", "--training.method", "bptt", "--training.save_every=1", "--device", "cpu")
    assert "1 of 1 runs are finished" in call("reproduce", *one, *speed_only)[2]
    assert json.loads((run.parent / "table.json").read_text())["options"] == list(speed_only[1:])
    assert f"for all runs: `{' '.join(speed_only[1:])}`." in (run.parent / "table.md").read_text()
    for options, change in {
        ("--training.num_updates", "3"): "training.num_updates: 2, now it is 3",
        ("--training.weight_decay=0",): "training.weight_decay: 0.1, now it is 0.0",
        ("--model.num_slots", "4"): "model.num_slots: 2, now it is 4",
        ("--data.train.kind=jsonl",): "data.train.kind: text, now it is jsonl",
    }.items():
        found = refused("reproduce", *one, "--", *options)
        assert found == f"{run} cannot be reused: the run began with {change}{advice}"
    data = shutil.copytree(table[2], tmp_path / "data")
    elsewhere = [*one[:2], data, *one[3:]]
    assert "1 of 1 runs are finished" in call("reproduce", *elsewhere)[2]
    (data / "texts" / "3.txt").write_text(make_text(99))
    found = refused("reproduce", *elsewhere)
    assert found.startswith(f"{run} cannot be reused: data.train has changed since the run began: ")
    shutil.rmtree(data)
    assert "1 of 1 runs are finished" in call("reproduce", *elsewhere)[2]  # it needs no data any more
    row = tmp_path / "experiments" / "tiny" / "2-memory.yaml"
    row.write_text(row.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert "training.learning_rate: 0.01, now it is 0.02" in refused("reproduce", *one)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["model"]  # by hand, as its first line allows if it is deleted
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"{run} cannot be reused: the run began with model." in refused("reproduce", *one)


def test_a_folder_in_use_is_refused(table, tmp_path):
    """Two processes cannot reproduce into one folder; the results of finished runs can still be written."""
    with owned_folder(tmp_path / "out", option="--folder"):
        assert f"out is in use by process {os.getpid()} on " in refused("reproduce", *table)
        assert "no run in" in refused("reproduce", *table, "--only_write")
    # A run of an earlier `reproduce` that was killed may still train.
    with owned_folder(tmp_path / "out" / "1-lstm-seed-0", option="--folder"):
        assert "1 of 1 runs failed" in refused("reproduce", *table, "--rows", "1-lstm")
    assert f"in use by process {os.getpid()} on " in (tmp_path / "out" / "1-lstm-seed-0" / "train.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_in_training_and_begins_no_other(table, tmp_path, monkeypatch, number):
    begun, terminated = [], []

    class Process:
        """A run that saves and ends when it gets the signal: of the parent, or as a part of a terminal's group."""

        def __init__(self, command, stdout, stderr):
            begun.append(command)
            stdout.write("memformer: error: an error\nstopped\n")
            stdout.flush()
            self.is_ended = threading.Event()
            # Only the main thread handles signals, while it waits for the runs.
            os.kill(os.getpid(), number)
            if number == signal.SIGINT:
                threading.Timer(0.2, self.is_ended.set).start()

        def wait(self):
            assert self.is_ended.wait(60)
            return 128 + number

        def terminate(self):
            terminated.append(self)
            self.is_ended.set()

    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=Process, STDOUT=subprocess.STDOUT))
    if number == signal.SIGTERM:  # which is passed on at the next look
        monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    status, _, error = call("reproduce", *table)
    assert status == 128 + number
    assert "LSTM, seed 0: stopped after" in error
    assert f"memformer: stopped by {number.name}; the same command continues the runs" in error
    assert (len(begun), len(terminated)) == (1, number == signal.SIGTERM)
    assert not (tmp_path / "out" / "table.md").exists()


def test_a_failed_run_is_reported_with_its_own_error(table, tmp_path, monkeypatch):
    """Another process may still write to the same log."""

    class Process:
        def __init__(self, command, stdout, stderr):
            stdout.write("memformer: error: the reason\nupdate 48: held out\n")

        def wait(self):
            return 2

    log = tmp_path / "out" / "1-lstm-seed-0" / "train.log"
    log.parent.mkdir(parents=True)
    log.write_text("memformer: error: of before\n")
    monkeypatch.setattr(child_processes, "subprocess", SimpleNamespace(Popen=Process, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    found = refused("reproduce", *table, "--rows", "1-lstm")
    assert found == f"1 of 1 runs failed; {log} says: memformer: error: the reason"


def test_missing_data_is_named_before_anything_is_trained(table, tmp_path):
    """The files, where to get them and where to put them are named at once."""
    empty = tmp_path / "empty"
    message = refused("reproduce", *table, "--data", f"{empty}//")
    assert message == (
        f"tiny needs a file that does not exist: {empty}/texts. Where to get them: texts: some texts, from the "
        "library. Put the files there, or name the folder that holds texts/ with --data FOLDER"
    )
    assert not (tmp_path / "out").exists()
    tiny = read_table(tmp_path / "experiments" / "tiny")
    planned = plan_runs(tiny, tiny.rows, scale="small", seeds=[0], folder=tmp_path / "out", data=str(empty))
    check_data(planned, tiny, data=str(empty), options=["--data.train.kind=digits"])  # reads other data


def test_every_table_says_where_to_get_its_data(tmp_path):
    for name in table_names(tables_folder()):
        table = read_table(tables_folder() / name)
        for scale in table.scales:
            planned = plan_runs(table, table.rows_at(scale), scale=scale, seeds=[0], folder=tmp_path, data="none")
            local = [run for run in planned if "huggingface" not in str(run.config["data"])]
            if local:
                with pytest.raises(InputError, match=r"none/.* Where to get them: .*\. Put the files there"):
                    check_data(local, table, data="none", options=[])


def test_the_progress_of_all_runs_is_shown(table, tmp_path, monkeypatch):
    """`reproduce` shows the updates of its runs and the time left."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    monkeypatch.setattr(progress, "FIRST_PLAIN_LINE_AFTER", 0.0)
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)

    def train(run, options, processes, say):
        run.folder.mkdir(parents=True)
        for update in (1, 2):
            with (run.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"kind": "training", "update": update}) + "\n")
            time.sleep(0.1)
        return "a reason"

    monkeypatch.setattr(runs, "_train", train)
    err = call("reproduce", *table, "--", "--training.num_updates=2e0")[2]
    lines = [line for line in err.splitlines() if line.startswith("training: update ")]
    shown = [re.match(r"training: update ([0-4])/4  ([01]) of 2 runs done", line).groups() for line in lines]
    assert shown == sorted(shown)
    assert {"1", "3"} <= {updates for updates, _ in shown}
    assert re.search(r"about \d+ s left$", lines[-1])


def test_the_time_before_the_first_update_does_not_count_towards_the_speed(table, monkeypatch):
    """The first run tokenizes the data: with that, a table of an hour seemed to take four."""
    calls = []

    class Bar(runs.ProgressBar):
        def begin_at(self, completed):
            calls.append(("begin", completed))

        def advance_to(self, completed, status):
            calls.append(("advance", completed))

    def train(run, options, processes, say):
        time.sleep(0.1)
        run.folder.mkdir(parents=True)
        (run.folder / "log.jsonl").write_text(json.dumps({"kind": "training", "update": 1}) + "\n")
        time.sleep(0.1)
        return "a reason"

    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(runs, "ProgressBar", Bar)
    monkeypatch.setattr(runs, "_train", train)
    call("reproduce", *table)
    begins = [index for index, call in enumerate(calls) if call[0] == "begin"]
    assert len(begins) == 1
    assert {completed for _, completed in calls[: begins[0]]} == {0}
    assert calls[begins[0]][1] == calls[begins[0] + 1][1] == 1


def test_invalid_input_is_refused(table, tmp_path):
    assert "unknown table 'tabel1'; the tables are tiny" in refused("reproduce", "tabel1")
    assert "tiny has no row 'x'; it has 1-lstm, 2-memory" in refused("reproduce", *table, "--rows", "x")
    assert "a path is empty" in refused("reproduce", "tiny", "--folder", "")
    assert "tiny has no scale 'paper'; it has small" in refused("reproduce", *table, "--scale", "paper")
    assert "seeds (0) must be at least 1" in refused("reproduce", *table, "--seeds", "0")
    assert "there is nothing to write" in refused("reproduce", *table, "--only_write")
    # Options are refused before anything is trained or written.
    message = refused("reproduce", *table, "--", "--training.num_lanes", "0")
    assert message == "training.num_lanes (0) must be at least 1"
    assert "unknown option --nokey" in refused("reproduce", *table, "--", "--nokey", "3")
    assert not [*(tmp_path / "out").glob("*lstm*")]
    message = refused("reproduce", *table, "--rows", "1-lstm", "--", "--data.train.path", "nowhere")
    assert "1 of 1 runs failed; " in message
    assert "train.log says: memformer: error: data.train.path (nowhere)" in message
    row = tmp_path / "experiments" / "tiny" / "1-lstm.yaml"
    row.write_text(row.read_text().replace("paper:", "papre:"))
    assert "unknown key 'papre'" in refused("reproduce", *table)
    shared = tmp_path / "experiments" / "tiny" / "table.yaml"
    shared.write_text(shared.read_text().replace("metric: bits_per_byte", "metric: bits"))
    assert "metric ('bits') must be one of perplexity" in refused("reproduce", *table)
    shared.write_text(shared.read_text().replace("metric: bits", "# "))
    assert "scale small lacks 'metric'" in refused("reproduce", *table)


@pytest.mark.parametrize("name", table_names(tables_folder()))
def test_every_row_at_every_scale_is_a_run(name, tmp_path):
    table = read_table(tables_folder() / name)
    for scale in table.scales:
        assert table.rows_at(scale) == table.rows
        for row in table.rows:
            file = tmp_path / f"{row.key}-{scale}.yaml"
            file.write_text(yaml.safe_dump(table.config_of(row, scale, data="data")))
            config, _ = run_config.parse_run_config([str(file)])
            assert config.model_type == row.model_type


def test_a_classifier_predicts_one_label_for_a_segment():
    classifier, labels = tiny_classifier(), tiny_classifier().config.num_labels
    more = tiny_classifier(num_labels=labels + 5)
    width = classifier.config.d_model
    difference = flops_per_token(more) - flops_per_token(classifier)
    assert difference == pytest.approx(2 * width * 5 / classifier.segment_length)


def test_operations_are_counted_as_by_hand():
    width, d_ff, length, vocabulary = 8, 16, 6, 10
    sizes = {"vocab_size": vocabulary, "d_model": width, "segment_length": length}
    output = 2 * width * vocabulary
    lstm = build_model(LSTMConfig(**sizes, num_layers=3))
    assert flops_per_token(lstm) == 3 * 2 * 2 * width * 4 * width + output
    memory = 4
    keys = memory + length
    transformer = build_model(TransformerXLConfig(**sizes, num_heads=2, d_ff=d_ff, num_layers=3, memory_length=memory))
    # Projections of the tokens, keys and values of the cached tokens, distances; scores twice, and weighted values.
    layer = 2 * length * (4 * width * width + 2 * width * d_ff) + 2 * memory * 2 * width * width
    layer += 2 * keys * width * width + 3 * 2 * length * keys * width
    assert flops_per_token(transformer) == pytest.approx(3 * layer / length + output)
    sizes |= {"num_heads": 2, "d_ff": d_ff, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_slots": 0}
    attention = 2 * 2 * length * width
    encoder = 2 * (4 * width * width + 2 * width * d_ff) + attention
    # The decoder attends to as many tokens in both designs, but one attention has no queries and output of its own.
    for preset, projections in (("default", 6), ("paper", 8)):
        model = build_model(MemformerConfig.from_preset(preset, **sizes))
        decoder = 2 * (projections * width * width + 2 * width * d_ff) + 2 * attention
        # Tokens before the start are keys and values more, projected once for the segment.
        read_again = max(model.config.decoder_start_tokens - 1, 0)
        decoder += 2 * 2 * read_again * width + read_again * 2 * 2 * width * width / length
        assert flops_per_token(model) == encoder + decoder + output
        assert model.training
