"""`memformer reproduce headline`: Memformers beside Transformer-XL at equal quality, on the tables' own runs."""

import dataclasses
import json

import pytest
import yaml
from matplotlib.figure import Figure

from memformer import Session, build_model
from memformer.evaluation.flops import flops_per_token
from memformer.models import load_model
from memformer.models.loading import MODELS
from memformer.reproduction import command, inference, measure, runs
from memformer.reproduction.headline import Measured, headline_names, read_headline
from memformer.reproduction.headline_results import compare, draw_headline, headline_markdown
from memformer.reproduction.inference import Times, Workload, measure_inference_growth
from memformer.reproduction.results import RowFigures, collect, draw
from memformer.reproduction.runs import plan_runs
from memformer.reproduction.tables import Row, read_table, tables_folder
from memformer.reproduction.trade_off import Crossing, Point, find_crossing
from memformer.utils.ownership import owned_folder
from tests.cli.calls import call, call_json, refused

ATTENTION = {"d_model": 8, "num_heads": 2, "d_ff": 8, "segment_length": 4}
TABLE = {
    "title": "A small table",
    "scales": {
        "small": {
            "metric": "bits_per_byte",
            "flops_tokens": 100,
            "note": "Ours is small.",
            "run": {
                "threads": 1,
                "device": "cpu",
                "data": {"train": {"kind": "text", "path": "{data}/texts"}},
                "training": {"num_updates": 2},
            },
            "models": {
                "transformer_xl": {**ATTENTION, "num_layers": 1},
                "memformer": {**ATTENTION, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_slots": 2},
                "lstm": {"d_model": 8, "segment_length": 4, "num_layers": 1},
            },
        }
    },
}
ROWS = {
    "1-short": ("transformer_xl", {"memory_length": 4}),
    "2-long": ("transformer_xl", {"memory_length": 64}),
    "3-slots": ("memformer", {}),
    "4-lstm": ("lstm", {}),
}
PART = {
    "title": "Texts",
    "table": "tiny",
    "scale": "small",
    "streams": 2,
    "tokens": 8,
    "transformer_xl": {"2-long": "XL 64", "1-short": "XL 4"},
    "memformer": {"3-slots": "Slots"},
    "others": {"4-lstm": "LSTM"},
}
HEADLINE = {
    "title": "The claim",
    "paper": {"text": "much better", "ratios": {"state_bytes": 8.1, "evaluation_seconds": 3.2}},
    "scales": {"small": {"note": "Measured here.", "rounds": 2, "parts": [PART]}},
}
# Bits per byte by row and seed. The means are 2.0, 1.0 and 1.5: the Memformer lies midway between the two others.
BITS = {"1-short": (2.0, 2.0), "2-long": (1.2, 0.8), "3-slots": (1.1, 1.9), "4-lstm": (3.0, 3.0)}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options for a headline over a table of four rows; models are measured in the process of the tests."""
    for name, file, content in (("tiny", "table", TABLE), ("claim", "headline", HEADLINE)):
        (tmp_path / "configs" / name).mkdir(parents=True)
        (tmp_path / "configs" / name / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for key, (model_type, changes) in ROWS.items():
        row = {"name": key, "model_type": model_type, "scales": {"small": {"model": changes}}}
        (tmp_path / "configs" / "tiny" / f"{key}.yaml").write_text(yaml.safe_dump(row))
    (tmp_path / "data" / "texts").mkdir(parents=True)
    (tmp_path / "data" / "texts" / "1.txt").write_text("a text")
    monkeypatch.setattr(command, "tables_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr(inference, "_run_child", lambda task: inference.perform(json.loads(json.dumps(task))))
    return ["claim", "--data", tmp_path / "data", "--folder", tmp_path / "out" / "claim"]


def make_model(model_type, **config):
    return build_model(MODELS[model_type].config_class.from_dict(config))


def finish(run):
    """Write what is read of a finished run: weights, evaluation and log."""
    config = run.config["model"]
    make_model(run.row.model_type, vocab_size=16, **config).save_pretrained(run.folder / "best")
    bits = {"bits_per_byte": BITS[run.row.key][run.seed], "perplexity": 2.0}
    result = {"unit": "pixel", "with_memory": bits, "memory_erased": bits}
    (run.folder / "evaluation.json").write_text(json.dumps(result))
    (run.folder / "log.jsonl").write_text('{"kind": "training", "update": 1, "num_tokens": 5, "seconds": 2.0}\n')


@pytest.fixture
def trained(monkeypatch):
    """Keys of the rows that `reproduce` trains; training writes a finished run at once."""
    found = []

    def train(run, options, processes, say):
        found.append(f"{run.row.key}-{run.seed}")
        finish(run)

    monkeypatch.setattr(runs, "_train", train)
    monkeypatch.setattr(command, "check_runs", lambda runs, **_: None)  # reads configs, which are not written here
    return found


def measured(key="row", *, group="transformer_xl", bits, state=1.0, seconds=1.0, growth=1):
    results = {seed: {"unit": "byte", "with_memory": {"bits_per_byte": each}} for seed, each in enumerate(bits)}
    row = Row(key=key, name=key, model_type="lstm", scales={})
    return Measured(
        group=group,
        label=key,
        figures=RowFigures(row=row, parameters=1, flops=1.0, results=results),
        state_bytes=state,
        memory_growth_bytes=growth,
        times=Times([seconds, 9 * seconds, seconds], [seconds]),
        flops=1.0,
    )


def test_quality_between_two_points_is_linear_in_the_logarithm_of_the_cost():
    curve = [Point(400, 1.0), Point(100, 2.0)]
    for quality, cost in ((2.0, 100), (1.5, 200), (1.25, 100 * 4**0.75), (1.0, 400)):
        assert find_crossing(quality, curve) == Crossing(place="on the curve", cost=pytest.approx(cost))
    # The costs 100 and 400 take turns in being better: the first crossing counts.
    assert find_crossing(1.5, [*curve, Point(900, 1.6), Point(1600, 0.5)]).cost == pytest.approx(200)
    assert find_crossing(0.75, [*curve, Point(900, 1.6), Point(1600, 1.2), Point(6400, 0.3)]).cost == pytest.approx(
        3200
    )


def test_nothing_is_extrapolated():
    curve = [Point(100, 2.0), Point(400, 1.0), Point(900, 2.5)]
    assert find_crossing(0.9, curve) == Crossing(place="better than every point")
    assert find_crossing(2.6, curve) == Crossing(place="worse than every point")
    assert find_crossing(2.2, curve) == Crossing(place="the cheapest point is better")


def test_ratios_of_means_and_of_every_seed():
    curve = [measured(bits=(2.0, 2.0), state=100, seconds=8), measured(bits=(1.2, 0.8), state=400, seconds=2)]
    row = measured(group="memformer", bits=(1.1, 1.9), state=50, seconds=1)
    found = compare(row, curve, "state_bytes").to_dict()
    assert (found["place"], found["transformer_xl"], found["ratio"]) == ("on the curve", *map(pytest.approx, (200, 4)))
    assert found["by_seed"]["0"] == {"place": "better than every point", "transformer_xl": None, "ratio": None}
    # A twelfth of the way from 2.0 to 0.8 bits is that of the way from 100 to 400 bytes, in logarithms.
    assert found["by_seed"]["1"]["ratio"] == pytest.approx(2 * 4 ** (1 / 12))
    assert [each.cost("evaluation_seconds") for each in curve] == [8, 2]  # the median, not the mean of 8, 72 and 8
    # By time, the other Transformer-XL is the cheaper one, and better than the Memformer.
    assert compare(row, curve, "evaluation_seconds").crossing.place == "the cheapest point is better"
    assert compare(row, curve[:1], "evaluation_seconds").crossing.place == "better than every point"
    assert compare(row, curve, "evaluation_seconds").to_dict()["ratio_of_the_cheapest"] == 2
    assert compare(row, [], "state_bytes") is None
    assert compare(measured(bits=(1.1,), growth=0), curve, "memory_growth_bytes") is None
    # Seeds that only some of the models have do not count.
    one = compare(measured(bits=(1.5,)), curve, "state_bytes")
    assert list(one.by_seed) == [0]
    assert one.crossing == one.by_seed[0]
    assert compare(measured(bits=()), curve, "state_bytes") is None


def test_the_tables_show_finished_runs_and_pairs_at_equal_quality(options, tmp_path, trained, monkeypatch):
    figures = call_json("reproduce", *options, "--seeds", "2")
    assert sorted(trained) == sorted(f"{key}-{seed}" for key in ROWS for seed in (0, 1))
    (part,) = figures["parts"]
    assert [row["row"] for row in part["rows"]] == ["2-long", "1-short", "3-slots", "4-lstm"]
    rows = {row["row"]: row for row in part["rows"]}
    for key, row in rows.items():
        model = load_model(tmp_path / "out" / "tiny-small" / f"{key}-seed-0" / "best")
        assert row["state_bytes"] == Session(model).state_bytes
        assert row["flops"] == pytest.approx(flops_per_token(model))
        assert row["parameters"] == model.num_parameters
        assert [len(times) for times in row["rounds"].values()] == [2, 2]
        assert row["evaluation_seconds"] == pytest.approx(sum(row["rounds"]["evaluation"]) / 2)
        assert min(row["evaluation_seconds"], row["generation_seconds"]) > 0 <= row["memory_growth_bytes"]
    assert rows["2-long"]["bits"]["mean"] == pytest.approx(1.0)
    assert rows["2-long"]["bits"]["deviation"] == pytest.approx(0.2 * 2**0.5)
    (pair,) = part["pairs"]
    by_state = [rows[key]["state_bytes"] for key in ("1-short", "2-long", "3-slots")]
    ratio = (by_state[0] * by_state[1]) ** 0.5 / by_state[2]
    assert pair["state_bytes"]["ratio"] == pytest.approx(ratio)
    assert json.loads((tmp_path / "out" / "claim" / "table.json").read_text()) == figures
    assert (tmp_path / "out" / "claim" / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "claim" / "table.md").read_text()
    assert "| XL 64 | 1.0000 ± 0.2828 | 2 |" in text
    assert "bits per pixel" in text
    shown = f"{ratio:.2f} times less" if ratio > 1 else f"{1 / ratio:.2f} times more"
    assert f"| Slots | {shown} (by seed: better than every Transformer-XL; " in text
    assert "| the paper's claim | 8.10 times less |  | 3.20 times faster |" in text

    workload = Workload(streams=part["streams"], tokens=part["tokens"], device="cpu", threads=2)
    read = []
    monkeypatch.setattr(inference, "_run_child", lambda task: read.append(task) or inference.perform(task))
    call("reproduce", *options, "--only_write", "--", "--device", "cpu", "--threads", "2")
    (again,) = json.loads((tmp_path / "out" / "claim" / "table.json").read_text())["parts"]
    assert (again["device"], again["threads"]) == ("cpu", 2)
    assert all(task["workload"] == dataclasses.asdict(workload) for task in read)

    (tmp_path / "out" / "tiny-small" / "3-slots-seed-0" / "evaluation.json").unlink()
    (part,) = call_json("reproduce", *options, "--only_write", "--seeds", "1")["parts"]
    assert [row["row"] for row in part["rows"]] == ["2-long", "1-short", "4-lstm"]
    assert part["pairs"] == []
    # Without --seeds all that were trained are written, and models are compared by the seeds that all of them have.
    (part,) = call_json("reproduce", *options, "--only_write")["parts"]
    assert {row["row"]: list(row["bits"]["by_seed"]) for row in part["rows"]} == {
        "2-long": ["0", "1"],
        "1-short": ["0", "1"],
        "3-slots": ["1"],
        "4-lstm": ["0", "1"],
    }
    (pair,) = part["pairs"]
    assert list(pair["state_bytes"]["by_seed"]) == ["1"]
    assert pair["state_bytes"]["ratio"] == pair["state_bytes"]["by_seed"]["1"]["ratio"]


def test_runs_are_those_of_the_tables_and_finished_ones_are_reused(options, tmp_path, trained, monkeypatch):
    (part,) = read_headline(tmp_path / "configs" / "claim", "small").parts
    planned = part.plan(seeds=[0, 1], folder=tmp_path / "out", data=str(tmp_path / "data"))
    tiny = read_table(tmp_path / "configs" / "tiny")
    own = {"folder": tmp_path / "out" / "tiny-small", "data": str(tmp_path / "data")}
    assert sorted(planned, key=str) == sorted(plan_runs(tiny, tiny.rows, scale="small", seeds=[0, 1], **own), key=str)
    for run in planned[1:]:
        finish(run)
    # Rows stand in the order of their keys, whichever run is finished first.
    found = collect([run for run in planned if run.is_finished], tiny.scale("small"))
    assert [figures.row.key for figures in found] == sorted(ROWS)
    checked = []
    monkeypatch.setattr(command, "check_runs", lambda runs, *, options, parse: checked.extend([runs, options]))
    monkeypatch.setattr(command, "_headline_results", lambda *_: ({}, "written", Figure()))
    message = call("reproduce", *options, "--seeds", "2", "--", "--training.num_lanes=3")[2]
    assert "7 of 8 runs are finished" in message
    assert trained == ["2-long-0"]
    assert checked == [planned, ["--training.num_lanes=3"]]
    with owned_folder(own["folder"], option="--folder"):  # the table's own command trains
        assert f"{own['folder']} is in use by process " in refused("reproduce", *options)


def test_the_plots_have_the_curve_in_the_order_of_the_cost(options, tmp_path):
    headline = read_headline(tmp_path / "configs" / "claim", "small")
    rows = [
        measured("long", bits=(1.0,), state=4096, seconds=1e-6),
        measured("short", bits=(2.0,), state=1024, seconds=2e-6),
        measured("own", group="memformer", bits=(1.5,), state=2048),
    ]
    state, evaluation, _ = draw_headline(headline, [rows]).subfigs[0].axes
    assert [axes.get_xlabel() for axes in (state, evaluation)] == ["state of a stream, KiB", "evaluation, µs a token"]
    assert [list(line.get_data()[0]) for line in state.lines if line.get_linestyle() == "-"] == [[1, 4]]
    assert [list(line.get_data()[1]) for line in evaluation.lines if line.get_linestyle() == "-"] == [[1, 2]]
    # A row far above the others would hide their differences.
    far = measured("far", group="others", bits=(9.0,), state=512)
    state, *_ = draw_headline(headline, [[*rows, far]]).subfigs[0].axes
    assert state.get_ylim()[1] == 5.5  # the best is 1, the median 1.75
    assert [list(line.get_data()[1]) for line in state.lines if line.get_marker() == "^"] == [[5.5]]
    assert state.get_ylim()[0] < 1
    worse = measured("worse", group="memformer", bits=(3.0,), state=512)
    text = headline_markdown(headline, [[*rows[:2], worse]])
    assert "worse than every Transformer-XL, 2.00 times less than the cheapest" in text
    empty = dataclasses.replace(headline, parts=[*headline.parts, *headline.parts])
    assert headline_markdown(empty, [rows, []]).count("### Texts") == 1


def test_a_far_worse_row_of_a_table_stands_at_the_upper_edge_of_its_picture(options, tmp_path):
    table = read_table(tmp_path / "configs" / "tiny")
    rows = [measured(f"0{number}-near", bits=(bits,)).figures for number, bits in ((1, 1.0), (3, 1.25), (4, 1.5))]
    far = measured("12-far", bits=(9.0,)).figures
    axes = draw(table, rows, "small").axes[0]
    assert axes.get_ylim()[1] < 2
    figure = draw(table, [*rows, far], "small")
    low, high = figure.axes[0].get_ylim()
    assert low < 1
    assert high == 1 + 6 * 0.375
    assert [list(line.get_data()[1]) for line in figure.axes[0].lines if line.get_marker() == "^"] == [[high]]
    # The numbers are those of the keys, whichever rows are drawn.
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["1 01-near", "3 03-near", "4 04-near", "12 12-far: 9.0000, above the axis"]


def test_models_take_turns(monkeypatch, tmp_path):
    turns = []

    class Recorded:
        def __init__(self, model, batch_size=1):
            self.own = model.config.d_model, batch_size

        def score(self, token_ids):
            turns.append(("score", *self.own, len(token_ids), len(token_ids[0])))

        def generate(self, max_new_tokens, *, seed):
            turns.append(("generate", *self.own, max_new_tokens))

    monkeypatch.setattr(inference, "Session", Recorded)
    models = [make_model("lstm", d_model=width) for width in (4, 8)]
    inference._times(models, Workload(streams=3, tokens=5), 1)
    turn = [part for width in (4, 8) for part in (("score", width, 3, 3, 5), ("generate", width, 1, 5))]
    assert turns == 2 * turn


def test_memory_growth_includes_the_state_of_every_stream(tmp_path):
    model = make_model("transformer_xl", d_model=32, num_layers=2, segment_length=4, memory_length=512)
    model.save_pretrained(tmp_path / "model")
    workload = Workload(streams=64, tokens=4, device="cpu")
    assert measure_inference_growth(tmp_path / "model", workload) >= 64 * Session(model).state_bytes


def test_invalid_input_is_refused(options, tmp_path, monkeypatch):
    assert "claim has no scale 'paper'; it has small" in refused("reproduce", *options, "--scale", "paper")
    assert "seeds (0) must be at least 1" in refused("reproduce", *options, "--seeds", "0")
    with monkeypatch.context() as patches:  # as on macOS, before anything is trained
        patches.setattr(measure, "_RESET_PEAK", tmp_path / "none")
        assert "memory on a CPU is measured on Linux only" in refused("reproduce", *options)
    (tmp_path / "claim" / "table.json").mkdir(parents=True)
    assert "table.json could not be written: Is a directory" in refused(
        "reproduce", "claim", "--folder", tmp_path / "claim"
    )
    own = refused("reproduce", *options[:-1], tmp_path / "out" / "tiny-small")
    assert own == f"--folder ({tmp_path / 'out' / 'tiny-small'}) is the folder of a table's runs; claim needs its own"
    message = refused("reproduce", *options, "--rows", "3-slots")
    assert message == "--rows (3-slots) is not an option of claim, which has fixed rows"
    found = refused("reproduce", *options, "--only_write")
    assert found == f"no run in {tmp_path / 'out' / 'tiny-small'} is finished; there is nothing to write"
    assert "tiny needs a file that does not exist" in refused("reproduce", "claim", "--data", tmp_path / "none")
    file = tmp_path / "configs" / "claim" / "headline.yaml"
    for change, words in {
        '{"others": {"5": "x"}}': "tiny has no row '5'; it has 1-short, 2-long",
        '{"others": {"2-long": "x"}}': "part 1: a row is in more than one of transformer_xl, memformer and others",
        '{"tokens": 0}': "part 1 (0) must be at least 1",
        '{"scale": "big"}': "tiny has no scale 'big'; it has small",
        '{"table": "none"}': "none/table.yaml cannot be read",
        '{"memformers": {}}': "part 1; did you mean 'memformer'?",
    }.items():
        changed = {"note": "", "rounds": 1, "parts": [{**PART, **json.loads(change)}]}
        file.write_text(yaml.safe_dump({**HEADLINE, "scales": {"small": changed}}))
        assert words in refused("reproduce", *options, "--only_write")
    file.write_text(yaml.safe_dump({**HEADLINE, "paper": {"text": "", "ratios": {"state": 8}}}))
    assert "unknown key 'state' in" in refused("reproduce", *options)
    file.write_text(yaml.safe_dump({"title": "", "paper": HEADLINE["paper"]}))
    assert "lacks 'scales'" in refused("reproduce", *options)


@pytest.mark.parametrize("name", headline_names(tables_folder()))
def test_the_committed_comparison_has_every_memory_length_of_its_tables(name, tmp_path):
    scales = yaml.safe_load((tables_folder() / name / "headline.yaml").read_text())["scales"]
    for scale in scales:
        for part in read_headline(tables_folder() / name, scale).parts:
            planned = part.plan(seeds=[0], folder=tmp_path, data="data")
            assert len(planned) == len(part.labels)
            types = {run.row.key: run.config["model_type"] for run in planned}
            assert {types[key] for key in part.memformer} == {"memformer"}
            every = [row for row in part.table.rows_at(part.scale) if row.model_type == "transformer_xl"]
            configs = {row.key: part.table.config_of(row, part.scale, data="data")["model"] for row in every}
            assert set(part.transformer_xl) == {key for key, config in configs.items() if config["memory_length"]}
            assert {*types.values()} == {*part.table.scale(part.scale).models}
