"""`memformer reproduce` for tables that are measured without training: results and error messages."""

import json

import pytest
import yaml

from memformer.errors import InputError
from memformer.reproduction import command, measure
from memformer.reproduction.costs import CostsScale, costs_names
from memformer.reproduction.measure import MethodSpec, Setting, measure_growth
from memformer.reproduction.tables import tables_folder
from tests.cli.calls import call_json, refused

MEMFORMER = {"d_model": 16, "num_heads": 2, "d_ff": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
TRANSFORMER = {"d_model": 16, "num_heads": 2, "d_ff": 32, "num_layers": 2}
PAPER = {method: {"speed": 1.0, "memory_mb": 9.0} for method in ("bptt", "checkpoint", "replay")}


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure in the process of the tests: a new one imports torch for seconds, and memory is not compared."""
    monkeypatch.setattr(measure, "_run_child", lambda task: measure.perform(json.loads(json.dumps(task))))


def write_costs(tmp_path, monkeypatch, *, paper, **scale):
    folder = tmp_path / "experiments" / "costs"
    folder.mkdir(parents=True)
    shared = {"note": "Measured here.", "batch_size": 2, **scale}
    (folder / "costs.yaml").write_text(yaml.safe_dump({"title": "Costs", "paper": paper, "scales": {"small": shared}}))
    monkeypatch.setattr(command, "tables_folder", lambda: tmp_path / "experiments")
    return ["costs", "--folder", tmp_path / "out"]


@pytest.mark.usefixtures("in_this_process")
def test_methods_are_timed_in_turn_and_their_memory_measured(tmp_path, monkeypatch):
    models = {"memformer": {**MEMFORMER, "segment_length": 16, "num_slots": 4}}
    options = write_costs(tmp_path, monkeypatch, paper=PAPER, models=models, horizons=[2], rounds=2)
    rows = call_json("reproduce", *options)["methods"]
    assert [row["method"] for row in rows] == ["bptt", "checkpoint", "replay"]
    assert rows[0]["speed_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(row["seconds"] > 0 and row["memory_growth_bytes"] >= 0 for row in rows)
    assert "| 2 | replay | " in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.usefixtures("in_this_process")
def test_operations_and_memory_of_every_model(tmp_path, monkeypatch):
    models = {
        "transformer_xl": {**TRANSFORMER, "segment_length": 16, "memory_length": 16},
        "memformer": {**MEMFORMER, "segment_length": 16, "num_slots": 16},
    }
    options = write_costs(
        tmp_path, monkeypatch, paper="some", models=models, lengths=[16, 32, 64], memory_sizes=[8, 32]
    )
    figures = call_json("reproduce", *options)
    operations = figures["operations"]
    full = operations["transformer (full attention)"]
    assert full[2] / full[1] > full[1] / full[0] > 2
    for model in models:
        first, second, third = operations[model]
        assert (second, third) == (2 * first, 4 * first)
        assert len(figures["memory"][model]) == 2
    assert (tmp_path / "out" / "table.png").stat().st_size > 0
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == figures


def test_memory_growth_is_larger_for_bptt_than_for_replay():
    model = {**MEMFORMER, "segment_length": 64, "num_slots": 4, "d_model": 64}
    setting = Setting(model_type="memformer", model=model, batch_size=8, num_timesteps=16, device="cpu")
    growth = {method: measure_growth(setting, MethodSpec(method)) for method in ("bptt", "replay")}
    assert growth["bptt"] > 2 * growth["replay"] > 0


@pytest.mark.usefixtures("in_this_process")
def test_invalid_input_gives_one_error_line(tmp_path, monkeypatch):
    models = {"memformer": {**MEMFORMER, "segment_length": 0}}
    options = write_costs(tmp_path, monkeypatch, paper=PAPER, models=models, horizons=[2])
    assert "segment_length (0) must be at least 1" in refused("reproduce", *options)
    assert "costs has no scale 'paper'; it has small" in refused("reproduce", *options, "--scale", "paper")
    values = (["--seeds", "2"], ["--rows", "x"], ["--jobs", "0"], ["--data", "x"], ["--", "--seed", "3"])
    for given in (["--only_write"], *values):
        name = next(option for option in given if option != "--")
        message = refused("reproduce", *options, *given)
        assert message == f"{name} cannot be given: costs trains nothing, it measures costs"


def test_a_measurement_that_fails_in_its_process_is_an_input_error():
    with pytest.raises(InputError, match="measuring lstm failed"):
        measure_growth(
            Setting(model_type="lstm", model={"d_modle": 3}, batch_size=1, num_timesteps=1), MethodSpec("replay")
        )


@pytest.mark.parametrize("name", costs_names(tables_folder()))
def test_every_committed_file_is_well_formed(name):
    given = yaml.safe_load((tables_folder() / name / "costs.yaml").read_text())
    for scale in given["scales"].values():
        assert CostsScale(**scale).horizons or CostsScale(**scale).memory_sizes
