"""The recipes: the commands of their pages run, and the scripts make the data and measurements that they describe."""

import ast
import contextlib
import importlib.util
import io
import json
import lzma
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from memformer.training.run_folder import load_run
from tests.cli.calls import call

ROOT = Path(__file__).parents[1]
# The commands of the pages train for minutes; the sizes are no part of what they show.
SMALL = """--threads 1 --device cpu --data.cache cache --training.num_updates 2 --training.num_lanes 2
--training.rollout_length 2 --training.sample_tokens 0 --training.warmup_updates 0 --model.d_model 16
--model.num_heads 2 --model.d_ff 16 --model.num_encoder_layers 1 --model.num_decoder_layers 1 --model.num_slots 3"""
SMALL_TEXT = f"{SMALL} --data.tokenizer.vocab_size 300"
MODULE = '''"""A made module."""

def measure(values, threshold):
    total = 0
    for value in values:
        if value > threshold and value != {number}:
            total += value
    return max(total, threshold)


def compare(values, threshold):
    print("übung", measure(values, threshold))
    return measure(threshold, values) == measure(values, threshold)
'''
SPEECHES = [("ROMEO", "Good morrow."), ("JULIET", "Is it so late?"), ("ROMEO", "The clock\nstruck nine."),
            ("NURSE", "Madam!"), ("JULIET", "Then go.")]  # fmt: skip


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "experiments" / "recipes" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


source_code, dialogue, logs, sensors = map(load_script, ["source_code", "dialogue", "logs", "sensors"])
SCRIPTS = {Path("experiments/recipes", Path(script.__file__).name): script
           for script in (source_code, dialogue, logs, sensors)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the commands of the pages, with made data."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "modules").mkdir()
    for number, name in enumerate(["hmac", *(f"module_{number}" for number in range(1, 9))]):
        (folder / "modules" / f"{name}.py").write_text(
            MODULE.format(number=number) * (1 + number % 3), encoding="utf-8"
        )
    (folder / "data" / "tinyshakespeare").mkdir(parents=True)
    (folder / "data" / "tinyshakespeare" / "input.txt").write_text(plays(12), encoding="utf-8")
    (folder / "data" / "logs").mkdir()
    for system in ("BGL", "HDFS", "Spark", "Zookeeper"):
        with lzma.open(folder / "data" / "logs" / f"{system}.log.xz", "wt", encoding="utf-8") as stream:
            stream.writelines(log_lines(system))
    for name in ("old.log", "new.log"):
        (folder / name).write_text("".join(log_lines("HDFS")), encoding="utf-8")
    return folder


def log_lines(system, num_lines=80):
    """Lines of a log. BGL's begin with a label, and every tenth of them is marked as a failure."""
    for number in range(num_lines):
        label = {"BGL": "KERNDTLB " if number % 10 == 9 else "- "}.get(system, "")
        yield f"{label}{number:05d} {system} node {number % 7}: übung {number % 3} done\n"


def plays(num_scenes):
    """Speeches as the plays have them; the speakers of neighbouring scenes differ."""
    scenes = [[(f"{name} {number % 2}", text) for name, text in SPEECHES * 2] for number in range(num_scenes)]
    return "\n\n".join(f"{name}:\n{text}" for scene in scenes for name, text in scene) + "\n"


def run_page(page, more):
    """Run the commands of a page, with more arguments for those that begin like a key of `more`; return outputs."""
    text = without_loops((ROOT / "docs" / "recipes" / page).read_text(encoding="utf-8"))
    lines = re.findall(r"^ {4,8}((?:memformer|python) (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    outputs = {}
    for line in lines:
        line, _, target = line.replace("\\\n", " ").partition(" > ")
        program, *argv = shlex.split(line)
        extra = next((options for start, options in more.items() if line.startswith(start)), "")
        argv += shlex.split(extra)
        if program == "memformer":
            status, out, error = call(*argv)
            # A line above the threshold is a result, too.
            assert status in ({0, 1} if "--threshold" in argv else {0}), f"{line}: {error}"
        else:
            out = run_script(*argv)
        if target:
            Path(target.strip()).write_text(out, encoding="utf-8")
        outputs[line] = out
    return outputs


def without_loops(text):
    """Return a page with the body of each loop of the shell once for every value of its variable."""

    def repeat(loop):
        return "".join(loop["body"].replace(f"${loop['name']}", value) for value in loop["values"].split())

    loop = r"^ {4}for (?P<name>\w+) in (?P<values>[^;]+); do\n(?P<body>.*?)^ {4}done$"
    return re.sub(loop, repeat, text, flags=re.MULTILINE | re.DOTALL)


def run_script(file, *argv):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [file, *argv])
        SCRIPTS[Path(file)].main()
    return out.getvalue()


@pytest.fixture(scope="module")
def source_outputs(folder):
    pytest.importorskip("plotly", reason="needs the extra inspect")
    more = {
        "python experiments/recipes/source_code.py prepare": "--modules modules --num_tested 3 --num_validation 2 "
        "--lines 1 15",
        "memformer train": SMALL_TEXT,
        "memformer generate": "--max_new_tokens 3",
    }
    with contextlib.chdir(folder):
        # hmac.py, which the page scores, is a made module here.
        return run_page("source-code.md", more)


@pytest.fixture(scope="module")
def dialogue_outputs(folder):
    more = {
        "memformer train": SMALL_TEXT,
        "python experiments/recipes/dialogue.py time": "--turns 1 3 50",
        "memformer generate": "--max_new_tokens 3",
    }
    with contextlib.chdir(folder):
        return run_page("dialogue.md", more)


@pytest.fixture(scope="module")
def logs_outputs(folder):
    with contextlib.chdir(folder):
        return run_page("logs.md", {"memformer train": f"{SMALL_TEXT} --data.max_document_tokens 64"})


@pytest.fixture(scope="module")
def sensors_outputs(folder):
    with contextlib.chdir(folder):
        return run_page("sensors.md", {"memformer train": SMALL})


def test_the_commands_of_the_source_code_page_run(source_outputs, folder):
    (report,) = (out for line, out in source_outputs.items() if ".py report" in line)
    (top,) = (out for line, out in source_outputs.items() if line.startswith("memformer score"))
    assert [line for line in report.splitlines() if ": 3 modules of" in line] == [
        f"{kind}: 3 modules of 10 lines (median)" for kind in source_code.KINDS
    ]
    assert report.count("| at random (expected) | 0.3 | 1.5 | 3.0 | 3.0 | 5.5 |  |") == len(source_code.KINDS)
    assert re.search(r"^5\. line ", top, flags=re.MULTILINE)
    assert (folder / "source-code.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "source.html").is_file()


def test_every_fault_changes_one_line_of_a_module_that_still_compiles(source_outputs, folder):
    records = [
        json.loads(line) for line in (folder / "source" / "faults.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {record["kind"] for record in records} == set(source_code.KINDS)
    for record in records:
        before, after = ((folder / "source" / record[key]).read_text(encoding="utf-8") for key in ("original", "file"))
        changed = [
            number
            for number, lines in enumerate(zip(before.split("\n"), after.split("\n"), strict=True), start=1)
            if lines[0] != lines[1]
        ]
        assert changed == [record["line"]]
        assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(after)), record


def test_all_possible_faults_are_of_their_kind():
    content = MODULE.format(number=3).encode()
    found = {
        kind: [
            (content.split(b"\n")[fault.line][fault.start : fault.end].decode(), fault.replacement.decode())
            for fault in source_code.possible_faults(kind, content, random.Random(0))
        ]
        for kind in source_code.KINDS
    }
    assert found["operator"] == [(">", "<"), ("and", "or"), ("!=", "=="), ("+=", "-="), ("==", "!=")]
    assert found["swapped"] == [
        ("total, threshold", "threshold, total"),
        ("values, threshold", "threshold, values"),
        ("threshold, values", "values, threshold"),
        ("values, threshold", "threshold, values"),
    ]
    assert {name for name, _ in found["misspelt"]} == {"value", "total", "threshold", "values", "measure"}
    for name, changed in found["misspelt"]:
        assert sorted(changed) == sorted(name)
        assert changed.encode() not in content


def test_the_ranked_scores_are_those_of_the_command(source_outputs, folder):
    run = load_run(folder / "runs" / "recipes" / "source_code")
    file = next((folder / "source" / "faults" / "swapped").glob("*.py"))
    scores = source_code.scores_of(run, file)
    out = call("score", run.folder, file, "--per", "line", "--json")[1]
    lines = [json.loads(line) for line in out.splitlines()]
    assert np.allclose(scores["bits/byte"][: len(lines)], [line["bits_per_byte"] for line in lines], rtol=1e-4)
    tokens = [json.loads(line) for line in call("score", run.folder, file, "--per", "token", "--json")[1].splitlines()]
    most = {token["line"]: max(other["nats"] for other in tokens if other["line"] == token["line"]) for token in tokens}
    assert np.allclose([scores["token"][line - 1] for line in most], [*most.values()], rtol=1e-4)


def test_ranks_of_equal_scores_are_their_mean():
    scores, is_ranked = np.array([3.0, 1.0, 2.0, 2.0, 9.0]), np.array([True, True, True, True, False])
    assert [source_code.rank(scores, is_ranked, place) for place in range(4)] == [1.0, 4.0, 2.5, 2.5]


def test_the_commands_of_the_dialogue_page_run(dialogue_outputs, folder):
    (report,) = (out for line, out in dialogue_outputs.items() if ".py report" in line)
    (timed,) = (out for line, out in dialogue_outputs.items() if ".py time" in line)
    replies = [out.removesuffix("\n").split("\n") for line, out in dialogue_outputs.items() if ".py reply" in line]
    (turns,) = re.findall(r"^\| all \| (\d+) \| (\d+) \|", report, flags=re.MULTILINE)
    texts = [file.read_text(encoding="utf-8") for file in (folder / "dialogue" / "test").iterdir()]
    assert turns == (str(sum(text.count("\n") for text in texts)), str(sum(len(text.encode()) for text in texts)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in timed.splitlines() if "|" in line][2:]
    assert [row[0] for row in rows] == ["1", "3", "50"]
    assert len({tuple(row[-2:]) for row in rows}) == 1  # the state has the same size after any number of turns
    assert len(replies) == 2
    sizes = [json.loads(lines[-1]) for lines in replies]
    assert all(len(lines) == 2 for lines in replies)  # one turn, and the size of the state
    assert sizes[0]["tokens"] < sizes[1]["tokens"]
    assert sizes[0]["state_bytes"] == sizes[1]["state_bytes"]
    assert (folder / "dialogue.png").read_bytes().startswith(b"\x89PNG")


def test_conversations_hold_all_turns_and_end_where_the_speakers_change(tmp_path):
    file = tmp_path / "plays.txt"
    file.write_text(plays(5) + "\n\nNURSE 0:\n\n\nNURSE 0:\nFaith!\n", encoding="utf-8")
    turns = dialogue.read_speeches(file)
    assert turns[2] == dialogue.Turn("ROMEO 0", "The clock struck nine.")
    assert turns[-1] == dialogue.Turn("NURSE 0", "Faith!")
    found = list(dialogue.conversations(turns))
    assert [turn for conversation in found for turn in conversation] == turns
    assert [len(conversation) for conversation in found] == [10, 10, 10, 10, 11]
    dialogue.prepare(file, tmp_path / "dialogue", seed=1)
    written = [dialogue.read_conversations(tmp_path / "dialogue" / part) for part in ("train", "validation", "test")]
    assert [len(part) for part in written] == [3, 1, 1]
    assert sorted(conversation for part in written for conversation in part) == sorted(found)


def test_turns_are_measured_by_three_readings(dialogue_outputs, folder):
    run = load_run(folder / "runs" / "recipes" / "dialogue")
    turns = dialogue.read_conversations(folder / "dialogue" / "test")[0]
    rows = list(dialogue.measure(run, turns))
    assert [row["turn"] for row in rows] == [*range(1, len(turns) + 1)]
    assert [row["own turn"] for row in rows][:3] == [1, 1, 2]
    session = run.session()
    for row, turn in zip(rows, turns, strict=True):
        ids = dialogue.encode(run, turn.line()).tolist()
        name = dialogue.encode(run, turn.speaker).tolist()
        assert row["nats"][0] == pytest.approx(float(session.score(ids).sum()), rel=1e-4)
        assert row["nats"][2] == pytest.approx(float(run.session().score(ids).sum()), rel=1e-4)
        assert row["name nats"][2] == pytest.approx(float(run.session().score(name).sum()), rel=1e-4)
    assert rows[0]["nats"][0] == pytest.approx(rows[0]["nats"][2], rel=1e-6)


def test_the_commands_of_the_logs_page_run(logs_outputs, folder):
    (report,) = (out for line, out in logs_outputs.items() if ".py report" in line)
    (prepared,) = (out for line, out in logs_outputs.items() if ".py prepare" in line)
    assert [line.startswith("memformer train") for line in logs_outputs].count(True) == len(logs.SYSTEMS) + 1
    (highest,) = (out for line, out in logs_outputs.items() if "--top 20" in line)
    assert len(re.findall("^> ", highest, flags=re.MULTILINE)) == 20
    assert prepared.splitlines() == [
        "logs/bgl: 32 lines, 40 to test, 4 of them anomalous",
        "logs/zookeeper: 32 lines, 90 to test, 50 of them anomalous",
        "logs/hdfs: 32 lines, 90 to test, 50 of them anomalous",
    ]
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]]
            for line in report.splitlines() if line.startswith("|")) if cells[0] in logs.SYSTEMS}  # fmt: skip
    for system in logs.SYSTEMS:
        labels = (folder / "logs" / system / "labels.txt").read_text(encoding="utf-8").splitlines()
        records = read_records(folder / "logs" / system / "test.jsonl", kind="line")
        assert len(records) == len(labels)
        # Labels are no part of the lines that the model reads, and injected lines come from other systems.
        texts = (folder / "logs" / system / "test.log").read_text(encoding="utf-8").splitlines()
        assert all(re.match(r"\d{5} ", text) for text in texts)
        names = {"bgl": "BGL", "zookeeper": "Zookeeper", "hdfs": "HDFS"}
        foreign = [names[system] not in text for text in texts]
        assert foreign == [label == logs.INJECTED for label in labels]
        scores = np.array([record["bits_per_byte"] for record in records])
        expected = average_precision_score([label != logs.NORMAL for label in labels], scores)
        assert rows[system][6] == f"{expected:.3f}"
    assert (folder / "logs.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_of_single_words_is_read_and_too_few_foreign_lines_are_named(tmp_path):
    (tmp_path / "BGL.log").write_text("- a line\n\nAPPREAD\n", encoding="utf-8")
    assert logs.read(tmp_path, "bgl") == (["-", "", "APPREAD"], ["a line", "", ""])
    with pytest.raises(SystemExit, match=f"the other systems have 1 lines; {logs.NUM_INJECTED} are injected"):
        logs.inject([("line", logs.NORMAL)], ["other"], seed=0)


def test_the_commands_of_the_sensors_page_run(sensors_outputs, folder):
    (report,) = (out for line, out in sensors_outputs.items() if ".py report" in line)
    labels = (folder / "sensors" / "labels.txt").read_text(encoding="utf-8").splitlines()
    scores = np.array([record["bits_per_value"]
                       for record in read_records(folder / "sensors" / "test.jsonl", kind="line")
                       if record["values"]])  # fmt: skip
    assert len(scores) == len(labels) == sensors.NUM_TEST
    anomalous = sum(count for places in sensors.ANOMALIES.values() for _, count in places)
    assert f" alerts in 1000 rows, {anomalous} of them anomalous" in report
    spikes = scores[[start for start, _ in sensors.ANOMALIES["spike"]]]
    assert f"of 4 found; mean {spikes.mean():.3f} bits/value" in report
    assert (folder / "sensors.png").read_bytes().startswith(b"\x89PNG")


def read_records(file, *, kind):
    return [
        record for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if record["kind"] == kind
    ]


def test_average_precision_counts_equal_scores_as_one_step():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = generator.integers(0, 5, 30).astype(float), generator.random(30) < 0.3
        labels[0] = True
        assert logs.average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))
