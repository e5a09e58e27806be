"""The measurements for a GPU run from end to end on a CPU with tiny sizes, and go on where they were interrupted."""

import gzip
import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.floor import encoding, floor_of_update, readout
from benchmarks.gpu.sizes import SIZES, sizes
from memformer.evaluation.flops import flops_per_token
from memformer.training import loop
from memformer.training.logs import read_log
from tests.data.test_images import idx_bytes


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command and returns what it prints and all rows."""

    statuses = []

    def run(*options):
        arguments = ["gpu", "--smoke", "--output", str(tmp_path / "out"), "--data", str(tmp_path / "data"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        statuses.append(command.main())
        files = (tmp_path / "out").glob("gpu-*.json")
        results = {
            file.stem.removeprefix("gpu-").removesuffix("-smoke"): json.loads(file.read_text())["rows"]
            for file in files
        }
        return capsys.readouterr().out, results

    run.statuses, run.output = statuses, tmp_path / "out"
    return run


def test_every_part_runs_and_is_not_run_twice(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # slow to import, and not always installed
    _, results = run()
    assert all(row["holds"] for row in results["laws"].values())
    rows = {name: row for part in results.values() for name, row in part.items()}
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    for model in ("replay, engine", "Transformer-XL, 1 layers, memory 4: replay, engine"):
        assert rows[f"MNIST, segments of 14: {model}"]["tokens_per_second"] > 0
    operations = results["figure5"]["operations, 64 tokens"]
    assert operations["transformer (full attention)"] > operations["transformer_xl"] > 0
    assert results["figure5"]["memformer, num_slots 8"]["ms"] > 0
    assert "transformers" in rows["MNIST, segments of 14: GPT-2, 1 layers, 3 segments at once"]["missing"]
    assert "mnist/train-images-idx3-ubyte.gz" in rows["data"]["missing"]
    again, _ = run()
    assert all('{"missing": ' in line for line in again.splitlines())


def test_table_1_goes_on_from_its_checkpoint(run, tmp_path, monkeypatch):
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    images = idx_bytes(np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8))
    for part in ("train", "t10k"):
        (tmp_path / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    out, _ = run("--parts", "table1", "--minutes", "0.4")
    assert "no time is left for 06-memformer" in out
    with monkeypatch.context() as patches:
        patches.setattr(loop._Trainer, "_update", interrupted(loop._Trainer._update))
        _, results = run("--parts", "table1")
    row = results["table1"]["06-memformer"]
    assert row["unfinished"] == "of 20,000 updates"
    assert row["training"]["update"] == 1
    _, results = run("--parts", "table1")
    row = results["table1"]["06-memformer"]
    assert row["paper"]["perplexity"] == 1.555
    assert row["with_memory"]["perplexity"] > 1
    lines = read_log(tmp_path / "out" / "table1-smoke" / "06-memformer-seed-0")
    assert [line["update"] for line in lines if line["kind"] == "training"] == [1, 2, 3]
    assert run("--parts", "table1")[0] == ""


def interrupted(update):
    """Return an update during which the time is up."""

    def update_then_interrupt(self, *arguments):
        result = update(self, *arguments)
        signal.raise_signal(signal.SIGALRM)
        return result

    return update_then_interrupt


def test_the_floor_has_the_operations_of_the_model():
    name = "MNIST, segments of 28"
    for size in (sizes(smoke=True)["MNIST, segments of 14"], SIZES[name], SIZES[f"{name}, the default's decoder"]):
        one_row = replace(size, batch_size=1)
        forward = [
            sum(work.operations for work in part) for part in (encoding(one_row), readout(one_row, num_timesteps=1))
        ]
        tokens = size.model["segment_length"]
        assert sum(forward) == flops_per_token(one_row.build(torch.device("cpu"))) * tokens
        # Every timestep is encoded twice, once with gradient, and read out once with gradient.
        segments = size.batch_size * size.num_timesteps
        assert floor_of_update(size).operations == pytest.approx(
            segments * (4 * forward[0] + 3 * forward[1]), rel=1e-12
        )


def test_a_failed_measurement_costs_only_itself(run, monkeypatch):
    rows = iter([{"holds": False}, {"holds": True}])

    def part(options):
        yield "broken", lambda: 1 / 0
        yield "sound", lambda: {"holds": True}
        yield "fails once", lambda: next(rows)

    monkeypatch.setattr(command, "PARTS", {"laws": part})
    _, results = run("--parts", "laws")
    assert "ZeroDivisionError" in results["laws"]["broken"]["failed"]
    assert results["laws"]["sound"]["holds"]
    out, results = run("--parts", "laws")
    assert out == ""
    assert results["laws"]["fails once"]["holds"] is False
    out, results = run("--parts", "laws", "--again")
    assert "sound" not in out
    assert results["laws"]["fails once"]["holds"]
    assert run.statuses == [1, 1, 1]
    monkeypatch.setattr(command, "PARTS", {"laws": lambda options: [("sound", lambda: {"holds": True})]})
    file = run.output / "gpu-laws-smoke.json"
    file.unlink()
    run("--parts", "laws")
    assert run.statuses[-1] == 0
    # Figures of one card are not taken for those of another.
    file.write_text(file.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(SystemExit, match=r"was measured with .*'another .* give another --output"):
        run("--parts", "laws")


def test_without_the_command_line_parser_only_table_1_is_missing(run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jsonargparse" else find_spec(name))
    _, results = run("--parts", "table1")
    assert "jsonargparse" in results["table1"]["data"]["missing"]


def test_the_measurements_can_be_imported_with_few_packages():
    program = """
import sys
sys.modules.update(dict.fromkeys(("beartype", "datasets", "jsonargparse", "lm_eval", "transformers")))
import benchmarks.gpu.__main__
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
