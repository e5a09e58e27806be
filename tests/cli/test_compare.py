"""`memformer compare`: runs of different models, in progress, on other data, and folders that are no runs."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from memformer.training.comparison import same_data
from tests.cli.calls import call, call_json, refused


@pytest.fixture(scope="session")
def pair(base):
    """Run folders of a Memformer and a Transformer-XL, trained by two commands that differ in one word."""
    folders = []
    for model_type in ("memformer", "transformer_xl"):
        command = f"train {base}/config.yaml --model_type {model_type} --folder {base}/{model_type}"
        status, _, err = call(*command.split())
        assert status == 0, err
        folders.append(base / model_type)
    return folders


@pytest.fixture
def copies(pair, tmp_path):
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in pair]


def rows_of(out, num_runs=2):
    """Return the rows of the table as a dict from label to cells."""
    lines = out.splitlines()
    columns = [lines[0].index(part) + len(part) for part in lines[0].split()]
    rows = {}
    for line in lines[1:]:
        cells = []
        for end in reversed(columns):
            cells.append(line[:end].rstrip().rsplit("   ", 1)[-1].strip())
            line = line[: line[:end].rstrip().rfind(cells[-1])]
        rows[line.strip()] = cells[::-1]
    return rows


def test_two_models_trained_by_commands_that_differ_in_one_word(pair, tmp_path):
    """One table with results, sizes, speed and differences, and one plot."""
    file = tmp_path / "curves.png"
    status, out, err = call("compare", *pair, "--output", file)
    assert (status, err) == (0, "")
    assert file.read_bytes().startswith(b"\x89PNG")
    rows = rows_of(out)
    assert rows["model_type"] == ["memformer", "transformer_xl"]
    assert rows["model.num_layers"] == ["-", "8"]
    assert rows["model.num_slots"] == ["3", "-"]
    assert not {"folder", "model.write_normalizer", "model.d_model", "training.num_updates"} & rows.keys()
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in pair]
    finals = [f"{evaluation['with_memory']['bits_per_byte']:.4f}" for evaluation in evaluations]
    assert rows["all held-out data: bits per byte"] == finals
    assert "differs" not in out


def test_the_figures_are_those_of_the_runs(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = call_json("compare", *pair)
    assert found["figure"] == "compare.png"
    assert found["same_data"] is True
    assert found["differences"]["model.memory_length"] == [None, 128]
    for folder, run in zip(pair, found["runs"], strict=True):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        measured = {line["update"]: line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"}
        assert (run["run"], run["metric"]) == (str(folder), "bits per byte")
        assert run["last"] == {"value": measured[4], "update": 4}
        assert run["best"]["value"] == min(measured.values()) == measured[run["best"]["update"]]
        newest = [line for line in lines if line["kind"] == "training"][-1]
        assert (run["tokens_trained"], run["tokens_per_second"]) == (newest["num_tokens"], newest["tokens_per_second"])
        state = call_json("generate", folder, "--max_new_tokens", "0")["state_bytes"]
        assert run["state_bytes"] == state
    assert found["runs"][0]["parameters"] != found["runs"][1]["parameters"]


def test_a_run_in_progress_and_one_on_other_data(copies, digits, tmp_path):
    memformer, other = copies
    (memformer / "evaluation.json").unlink()
    shutil.rmtree(memformer / "best")
    log = memformer / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "evaluation" not in line))
    status, out, err = call("compare", memformer, other, digits[0], "--output", tmp_path / "x.png")
    assert status == 0, err
    rows = rows_of(out)
    assert rows["held out, best: bits per byte"][0] == rows["parameters"][0] == "-"
    assert rows["held out, best: bits per byte"][2] == rows["held out, last: bits per pixel"][1] == "-"
    assert rows["all held-out data: bits per pixel"][2] != "-"
    assert rows["data.train.kind"] == ["text", "text", "digits"]
    assert out.splitlines()[-2] == (
        "the held-out data of the runs differs, so their held-out results cannot be compared"
    )


def test_files_of_another_content_are_other_data(copies, tmp_path):
    file = copies[0] / "evaluation.json"
    file.write_text(file.read_text().replace('"num_bytes": ', '"num_bytes": 1'))
    assert call_json("compare", *copies, "--output", tmp_path / "x.png")["same_data"] is False


def test_the_content_of_files_decides_and_not_their_place(copies, tmp_path):
    """Runs on moved files are comparable; runs on other files at the same place are not."""
    output = ("--output", tmp_path / "x.png")
    config = yaml.safe_load((copies[0] / "config.yaml").read_text())
    config["data"]["train"]["path"] = "/moved"
    (copies[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert call_json("compare", *copies, *output)["same_data"] is True
    file = copies[0] / "data.json"
    inputs = json.loads(file.read_text())
    inputs["files"]["data.train"][0]["sha256"] = "0" * 64
    file.write_text(json.dumps(inputs))
    assert call_json("compare", *copies, *output)["same_data"] is False
    file.unlink()
    assert call_json("compare", *copies, *output)["same_data"] is False  # of a run of version 0.1, the path decides


def test_a_run_from_before_a_setting_had_its_default(copies, tmp_path):
    for optimizer, found in (("adamw", None), ("muon", ["-", "muon"])):
        for folder, value in zip(copies, (None, optimizer), strict=True):
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config["training"].pop("optimizer", None)
            config["training"] |= {} if value is None else {"optimizer": value}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        _, out, _ = call("compare", *copies, "--output", tmp_path / "x.png")
        assert rows_of(out).get("training.optimizer") == found


def test_other_training_documents_beside_the_same_validation_documents(copies, tmp_path):
    for number, run in enumerate(copies):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["validation"] = config["data"]["train"]
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        inputs = json.loads((run / "data.json").read_text())
        inputs["files"]["data.validation"] = inputs["files"]["data.train"]
        inputs["files"]["data.train"] = [{"path": "t.txt", "bytes": 1, "sha256": str(number) * 64}]
        (run / "data.json").write_text(json.dumps(inputs))
    assert call_json("compare", *copies, "--output", tmp_path / "x.png")["same_data"] is True


def test_folders_that_are_no_runs_are_refused_in_one_sentence(copies, tmp_path):
    run, other = copies
    end = "is not the folder of a trained run: it has no config.yaml"
    assert refused("compare", run, tmp_path) == f"{tmp_path} {end}"
    assert refused("compare", run, run / "best") == f"{run}/best {end}"
    assert refused("compare", run, "/no/such") == f"/no/such {end}"
    assert refused("compare", run) == f"memformer compare needs at least two runs, not only {run}"
    assert "are required: runs" in refused("compare")
    assert "could not be written" in refused("compare", run, other, "--output", run)
    assert (
        refused("compare", run, other, "--output", tmp_path / "c.pdf")
        == f"output ({tmp_path / 'c.pdf'}) must end in .png"
    )
    (other / "log.jsonl").unlink()
    assert refused("compare", run, other) == f"{other} is not the folder of a trained run: it has no log.jsonl"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", b'{"kind": "training", "update": 1}\n'),
        ("log.jsonl", b'{"kind": "evaluation", "update": 1, "bits_per_byte": "low"}\n'),
        ("evaluation.json", b'{"num_tokens": 1}'),
    ],
)
def test_damaged_files_are_named(copies, tmp_path, name, content):
    (copies[1] / name).write_bytes(content)
    message = refused("compare", *copies, "--output", tmp_path / "x.png")
    assert message.startswith(f"log.jsonl or evaluation.json in {copies[1]} lacks a value")


def test_accuracies_of_recall_runs(copies, tmp_path):
    """A recall run is compared by its accuracy, of which the highest is the best."""
    for run in copies:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["recall"] = {"task": "fact"}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [{"kind": "evaluation", "update": update, "accuracy": 1 / update} for update in (1, 2)]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "evaluation.json").write_text('{"mean_accuracy": 0.75, "mean_accuracy_memory_erased": 0.25}')
        (run / "best" / "update.json").unlink()  # as in a run of an earlier version
    for run in call_json("compare", *copies, "--output", tmp_path / "x.png")["runs"]:
        assert (run["best"], run["last"]["update"]) == ({"value": 1.0, "update": 1}, 2)
        assert (run["final"], run["final_memory_erased"]) == (0.75, 0.25)
        assert run["metric"] == "accuracy (mean over distances)"


def test_the_best_evaluation_is_that_of_the_best_weights(copies, tmp_path):
    """The log also holds those on other documents, from before training.evaluation_tokens was changed."""
    for run in copies:
        log = (run / "log.jsonl").read_text()
        (run / "log.jsonl").write_text('{"kind": "evaluation", "update": 1, "bits_per_byte": 0.1}\n' + log)
    for run, entry in zip(copies, call_json("compare", *copies, "--output", tmp_path / "x.png")["runs"], strict=True):
        best = json.loads((run / "best" / "update.json").read_text())
        assert entry["best"] == {"value": best["bits_per_byte"], "update": best["update"]}


@pytest.mark.parametrize("change", ["evaluation_tokens", "tokenizer"])
def test_other_documents_of_the_same_files_are_other_data(copies, tmp_path, change):
    """How many documents are evaluated, and how a tokenizer cuts them into pieces of which some are held out."""
    output = ("--output", tmp_path / "x.png")
    for number, run in enumerate(copies):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["max_document_tokens"] = 20
        config["data"]["validation"] = None
        if change == "evaluation_tokens":
            config["training"]["evaluation_tokens"] = 100 + number
        else:
            inputs = json.loads((run / "data.json").read_text())
            (run / "data.json").write_text(json.dumps({**inputs, "tokenizer": str(number)}))
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert call_json("compare", *copies, *output)["same_data"] is False


@pytest.mark.parametrize(("limit", "is_same"), [(100, False), (None, True)])
def test_other_tokenizers_read_other_documents_in_evaluations_during_training(copies, tmp_path, limit, is_same):
    """The first documents that have so many tokens; the evaluation at the end is of all documents."""
    for number, run in enumerate(copies):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["training"]["evaluation_tokens"] = limit
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        inputs = json.loads((run / "data.json").read_text())
        (run / "data.json").write_text(json.dumps({**inputs, "tokenizer": str(number)}))
    found = call_json("compare", *copies, "--output", tmp_path / "x.png")
    assert (found["same_data"], found["same_evaluations"]) == (True, is_same)
    _, out, _ = call("compare", *copies, "--output", tmp_path / "x.png")
    assert ("the tokenizers differ, so training.evaluation_tokens are other documents" in out) is not is_same


def test_options_of_recall_training_do_not_make_other_held_out_data():
    def run(**options):
        recall = {"task": "copy", "num_facts": [1, 4], "question_probability": 1.0, **options}
        return SimpleNamespace(config={"data": {"recall": recall}}, inputs=None, num_bytes=None)

    assert same_data([run(), run(question_probability=0.5, curriculum={"window": 3})])
    assert not same_data([run(), run(num_facts=[1, 5])])
