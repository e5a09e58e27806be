"""A run that is stopped anywhere and goes on is the run that was never stopped, bit for bit, on one thread."""

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from memformer import InputError, Memformer, MemformerConfig, load_model
from memformer.cli.main import main
from memformer.data import NUM_TASK_TOKENS, MultitaskConfig, SourceConfig, corpus_from_arrays
from memformer.training import loop
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.logs import read_log
from memformer.training.loop import check_same_run, train
from memformer.training.optimizer import learning_rate_at
from memformer.training.replay import backpropagate
from memformer.training.run_data import DocumentData, first_documents, prepare_data

NUM_UPDATES = 10
GOLDEN_CURVE = Path(__file__).with_name("golden_curve.json")
REPEATED = ("bits_per_token", "gradient_norm", "learning_rate", "num_tokens")
CHILD = """
import os, signal, sys
from memformer.cli.main import main
from memformer.training import checkpoint

write = checkpoint.write_tensors

def write_and_die(file, tensors):
    write(file, tensors)
    if "update-000000006" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.write_tensors = write_and_die
main(sys.argv[1:])
"""


def write_documents(folder, *, num_documents=7):
    words = random.Random(0)
    folder.mkdir()
    for index in range(num_documents):
        text = " ".join(words.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(13 + 3 * index))
        (folder / f"{index}.txt").write_text(text)


def run_config(base, folder="run", **training):
    """A run whose rollouts cut documents, whose updates have two rollouts, and which crosses the edge of an epoch."""
    return RunConfig(
        folder=str(base / folder),
        threads=1,
        device="cpu",
        model=MemformerConfig(
            d_model=16,
            num_heads=2,
            d_ff=32,
            num_encoder_layers=1,
            num_decoder_layers=1,
            segment_length=8,
            num_slots=3,
            dropout=0.2,
        ),
        data=DataConfig(
            train=SourceConfig(kind="text", path=str(base / "texts")),
            validation_fraction=0.15,
            cache=str(base / "cache"),
        ),
        training=TrainingConfig(
            **{
                "num_updates": NUM_UPDATES,
                "num_lanes": 2,
                "rollout_length": 2,
                "rollouts_per_update": 2,
                "learning_rate": 0.01,
                "warmup_updates": 3,
                "log_every": 1,
                "evaluate_every": 5,
                "sample_tokens": 4,
                "save_every": 3,
                "keep_checkpoints": 4,
                **training,
            }
        ),
    )


def config_file(config):
    file = Path(config.folder).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    return str(file)


@pytest.fixture(scope="module", autouse=True)
def _without_report():
    # Drawing a page at the end of each of these many runs takes longer than training them; it has its own tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformer.training.report.write_report", lambda folder: folder / "summary.html")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Documents, and a run on them that was never stopped; never written to."""
    base = tmp_path_factory.mktemp("loop")
    write_documents(base / "texts")
    assert main(["train", config_file(run_config(base, "unbroken"))]) == 0
    return base


@pytest.fixture(scope="module")
def unbroken(base):
    return base / "unbroken"


@pytest.fixture
def copied(unbroken, tmp_path):
    """The unbroken run, to go on from where a test likes."""
    return shutil.copytree(unbroken, tmp_path / "copied")


def checkpoint_of(folder, update):
    return folder / "checkpoints" / f"update-{update:09d}"


def forget_after(folder, update):
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"update-{update:09d}":
            shutil.rmtree(checkpoint)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    training = [
        (*(line[key] for key in ("update", *REPEATED)), *line["memory_gradient_norms"])
        for line in lines
        if line["kind"] == "training"
    ]
    evaluation = [(line["update"], line["bits_per_byte"]) for line in lines if line["kind"] == "evaluation"]
    return training, evaluation


def model_of(folder, update):
    return load_file(checkpoint_of(folder, update) / "model.safetensors")


def saved_tensors(checkpoint):
    return {
        f"{file}: {name}": tensor
        for file in ("model", "optimizer", "state")
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }


def assert_same_run(folder, other, update=NUM_UPDATES):
    assert logged(folder) == logged(other)
    ours, theirs = saved_tensors(checkpoint_of(folder, update)), saved_tensors(checkpoint_of(other, update))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (folder / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


def fingerprint(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_unbroken_run_crosses_an_epoch_and_logs_every_update(base, unbroken):
    training, evaluation = logged(unbroken)
    assert [line[0] for line in training] == list(range(1, NUM_UPDATES + 1))
    assert [line[0] for line in evaluation] == [5, 10]
    num_tokens = prepare_data(run_config(base).data).train.num_tokens
    tokens_at = {line[0]: line[4] for line in training}
    assert tokens_at[6] < num_tokens < tokens_at[NUM_UPDATES]


def test_training_lowers_the_loss(unbroken):
    training, evaluation = logged(unbroken)
    assert training[-1][1] < training[0][1] - 0.5
    assert evaluation[-1][1] < evaluation[0][1]


def test_killed_while_saving_and_resumed_is_the_unbroken_run(base, unbroken, capsys):
    config = run_config(base, "killed")
    folder = Path(config.folder)
    child = subprocess.run([sys.executable, "-c", CHILD, "train", config_file(config)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        ".update-000000006.partial",
        "update-000000003",
    ]
    assert main(["train", config_file(config), "--resume"]) == 0
    assert "going on from" in capsys.readouterr().err
    assert_same_run(folder, unbroken)
    assert not (folder / "checkpoints" / ".update-000000006.partial").exists()


def test_a_run_of_several_tasks_resumes_as_itself(base, tmp_path, capsys):
    config = run_config(base)
    data = dataclasses.replace(config.data, multitask=MultitaskConfig())
    config = dataclasses.replace(config, data=data, folder=str(tmp_path / "unbroken"))
    assert main(["train", config_file(config)]) == 0
    assert load_model(tmp_path / "unbroken" / "best").config.num_special_tokens == NUM_TASK_TOKENS
    _, evaluation = logged(tmp_path / "unbroken")
    assert evaluation[-1][1] < evaluation[0][1]
    folder = shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    forget_after(folder, 3)
    assert main(["train", config_file(config), "--folder", str(folder), "--resume"]) == 0
    assert_same_run(folder, tmp_path / "unbroken")
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "abc", "--max_new_tokens", "30"]) == 0
    other = [
        "--folder",
        str(folder),
        "--resume",
        "--data.multitask.recall",
        "0.2",
        "--data.multitask.continuation",
        "0.5",
    ]
    assert main(["train", config_file(config), *other]) == 2
    assert "data.multitask" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_interrupted_and_resumed_is_the_unbroken_run(base, unbroken, monkeypatch, capsys, number, status):
    config = run_config(base, f"interrupted-{status}")
    folder = Path(config.folder)

    def rate_and_signal(update, training):
        if update == 4:
            os.kill(os.getpid(), number)
        return learning_rate_at(update, training)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("memformer.training.loop.learning_rate_at", rate_and_signal)
        assert main(["train", config_file(config)]) == status
    assert signal.getsignal(number) == before
    # The update that was under way is finished and kept.
    assert checkpoint_of(folder, 5).is_dir()
    assert f"stopped by {number.name}; go on with --resume" in capsys.readouterr().err
    assert main(["train", config_file(config), "--resume"]) == 0
    assert_same_run(folder, unbroken)


def test_the_log_is_on_disk_before_the_checkpoint_that_follows_it(base, tmp_path, monkeypatch):
    # Found by tests/soak/kills.py: killed between the two, a resumed run lacked the lines in between for ever.
    save_checkpoint, ends = loop.save_checkpoint, []

    def noted(folder, state, **options):
        ends.append((state.progress["num_updates"], read_log(tmp_path / "run")[-1]["update"]))
        save_checkpoint(folder, state, **options)

    monkeypatch.setattr(loop, "save_checkpoint", noted)
    assert main(["train", config_file(run_config(base, "logged")), "--folder", str(tmp_path / "run")]) == 0
    assert ends == [(update, update) for update in (3, 6, 9, 10)]


def test_going_on_from_an_older_checkpoint_repeats_what_followed(copied, unbroken):
    forget_after(copied, 6)
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    assert_same_run(copied, unbroken)


def test_the_carried_memory_is_part_of_the_state(copied, unbroken):
    forget_after(copied, 6)
    checkpoint = checkpoint_of(copied, 6)
    file, manifest = checkpoint / "state.safetensors", checkpoint / "manifest.json"
    state = load_file(file)
    assert state["memory"].abs().max() > 0
    save_file({**state, "memory": torch.zeros_like(state["memory"])}, file)
    described = json.loads(manifest.read_text())
    described["files"][file.name] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(described))
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    ours, theirs = logged(copied)[0], logged(unbroken)[0]
    assert ours[:6] == theirs[:6]
    assert ours[6][1] != theirs[6][1]


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning_and_made_again(copied, unbroken, capsys):
    (checkpoint_of(copied, 10) / "optimizer.safetensors").write_bytes(b"damaged")
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    error = capsys.readouterr().err
    assert "memformer: warning: skipped a damaged checkpoint:" in error
    assert "update-000000010/optimizer.safetensors" in error
    assert_same_run(copied, unbroken)


def test_resuming_with_every_checkpoint_damaged(copied, capsys):
    for update in (3, 6, 9, 10):
        (checkpoint_of(copied, update) / "progress.json").unlink()
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("memformer: error:")] == lines[-1:]
    assert "update-000000010/progress.json is missing" in lines[-1]


def test_a_finished_run_can_be_extended_and_its_cache_moved(copied, tmp_path):
    argv = ["train", str(copied), "--folder", str(copied), "--data.cache", str(tmp_path / "elsewhere"), "--resume"]
    assert main([*argv, "--training.num_updates", "11"]) == 0
    assert [line[0] for line in logged(copied)[0]] == list(range(1, 12))
    assert yaml.safe_load((copied / "config.yaml").read_text())["training"]["num_updates"] == 11


def test_a_changed_weight_decay_holds_from_the_resumed_update_on(copied, unbroken):
    forget_after(copied, 9)
    assert main(["train", str(copied), "--folder", str(copied), "--resume", "--training.weight_decay", "0.9"]) == 0
    # The 10th update starts from the same weights, so its loss is the same; what it makes of them is not.
    assert logged(copied)[0][-1][:3] == logged(unbroken)[0][-1][:3]
    ours, theirs = (saved_tensors(checkpoint_of(folder, 10)) for folder in (copied, unbroken))
    name = next(key for key in ours if key.startswith("model: ") and ours[key].ndim == 2 and "embedding" not in key)
    assert ours[name].norm() < theirs[name].norm()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_slots", "4"),
        ("data.max_document_tokens", "50"),
        ("data.train.documents", ":4"),
        ("seed", "1"),
        ("training.num_lanes", "3"),
    ],
)
def test_resume_refuses_another_run(copied, capsys, key, value):
    before = fingerprint(copied)
    assert main(["train", str(copied), "--folder", str(copied), "--resume", f"--{key}", value]) == 2
    assert f"memformer: error: the run began with {key}: " in capsys.readouterr().err
    assert fingerprint(copied) == before


def test_resume_refuses_keys_that_no_run_writes(tmp_path):
    config = run_config(tmp_path)
    saved = config.to_dict()
    saved["model"] |= {7: "x"}
    with pytest.raises(InputError, match=r"^the run began with model\.7: x, now it is None"):
        check_same_run(saved, config)


def test_resume_refuses_documents_that_have_changed(base, copied, tmp_path, capsys):
    shutil.copytree(base / "texts", tmp_path / "texts")
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"]["train"]["path"] = str(tmp_path / "texts")
    config["folder"] = str(copied)
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "texts" / "3.txt").write_text("another text altogether")
    assert main(["train", str(copied), "--resume"]) == 2
    assert "memformer: error: the data cursor has " in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(copied, capsys):
    before = fingerprint(copied)
    assert main(["train", str(copied), "--folder", str(copied)]) == 2
    assert capsys.readouterr().err == (
        f"memformer: error: {copied} already holds a run; go on with --resume, or choose another --folder\n"
    )
    assert fingerprint(copied) == before


@pytest.fixture
def limit_file_size():
    """Files cannot grow beyond a limit, as on a full disk; Python ignores the signal that goes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("blocked", ["optimizer.safetensors", "log.jsonl"])
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(copied, capsys, limit_file_size, blocked):
    last = checkpoint_of(copied, 10)
    sizes = {name: (last / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors")}
    assert 2 * (copied / "log.jsonl").stat().st_size < sizes["model.safetensors"]
    before = fingerprint(last)
    argv = ["train", str(copied), "--folder", str(copied), "--resume", "--training.num_updates", "11"]
    limit_file_size(sizes["model.safetensors"] + 1000 if blocked == "optimizer.safetensors" else 2500)
    assert main(argv) == 2
    limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    error = capsys.readouterr().err
    assert error.count("memformer: error:") == 1
    assert f"{blocked}" in error.splitlines()[-1]
    assert fingerprint(last) == before
    assert list(copied.rglob("*.partial")) == []
    assert main(argv) == 0
    assert [line[0] for line in logged(copied)[0]] == list(range(1, 12))


def test_losses_that_are_not_finite_end_the_run_and_leave_the_weights(base, tmp_path):
    config = run_config(base, max_skipped_in_a_row=3)
    config = dataclasses.replace(config, folder=str(tmp_path))
    model = Memformer(config.model)
    with torch.no_grad():
        model.embedding.weight.mul_(1e30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"update 4: loss .* must be finite\. 4 updates in a row .* changed no weights"
    ):
        train(config, prepare_data(config.data), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [line["update"] for line in read_log(tmp_path) if line["kind"] == "skipped"] == [1, 2, 3]


def test_a_learning_rate_far_too_high_is_one_line(base, tmp_path, capsys):
    argv = ["train", config_file(run_config(base)), "--folder", str(tmp_path), "--training.learning_rate", "1e30"]
    assert main([*argv, "--training.max_skipped_in_a_row", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("memformer: error:")] == lines[-1:]
    assert "Try a lower training.learning_rate" in lines[-1]


@pytest.mark.parametrize(
    "options", [{"method": "bptt"}, {"method": "checkpoint"}, {"precision": "bfloat16"}, {"max_gradient_norm": 0.0}]
)
def test_other_ways_to_train(base, tmp_path, unbroken, options):
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0)
    argv = ["train", config_file(config), "--folder", str(tmp_path)]
    assert main([*argv, *(part for key, value in options.items() for part in (f"--training.{key}", str(value)))]) == 0
    training, _ = logged(tmp_path)
    expected = logged(unbroken)[0]
    relative = 1e-2 if "precision" in options else 1e-5  # bfloat16 has 8 bits of mantissa, float32 has 24
    if "method" not in options:
        assert training[0][1] == pytest.approx(expected[0][1], rel=relative)
        assert training[0][2] == pytest.approx(expected[0][2], rel=3 * relative)


def test_a_price_on_writing_is_paid_in_training_and_not_logged_as_loss(base, tmp_path):
    config = config_file(run_config(base, num_updates=1, warmup_updates=0, sample_tokens=0))
    runs = {}
    for name, price, below in (("free", "0", "null"), ("due", "1", "null"), ("spared", "1", "1e-3")):
        argv = ["train", config, "--folder", str(tmp_path / name), "--model.write_normalizer", "entmax15"]
        assert main([*argv, "--training.write_price", price, "--training.write_price_below", below]) == 0
        runs[name] = logged(tmp_path / name)[0][0]
    assert runs["spared"] == runs["free"]
    assert runs["due"][1] == runs["free"][1], "the loss is that of the predictions alone"
    assert runs["due"][2] != runs["free"][2], "the gradient is that of the price too"


def test_the_price_on_writing_falls_over_the_run(base, tmp_path, monkeypatch):
    prices = []

    def backpropagate_and_note(*args, write_price, **options):
        prices.append(write_price)
        return backpropagate(*args, write_price=write_price, **options)

    monkeypatch.setattr("memformer.training.loop.backpropagate", backpropagate_and_note)
    config = config_file(run_config(base, num_updates=4, rollouts_per_update=1, sample_tokens=0))
    argv = ["train", config, "--folder", str(tmp_path), "--model.write_normalizer", "entmax15"]
    assert main([*argv, "--training.write_price", "2"]) == 0
    assert prices == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


@pytest.mark.parametrize(("scores", "kept"), [([0.5, 0.5], 2), ([0.5, 0.6], 1), ([0.6, 0.5], 2)])
def test_the_best_weights_are_the_later_of_equals(base, tmp_path, monkeypatch, scores, kept):
    results = iter([*scores, 0.0])
    evaluate = DocumentData.evaluate

    def scored(self, model, training, *, is_final):
        result = evaluate(self, model, training, is_final=is_final)
        score = next(results)
        monkeypatch.setattr(type(result), "score", property(lambda self: score))
        return result

    monkeypatch.setattr(DocumentData, "evaluate", scored)
    config = run_config(base, num_updates=2, warmup_updates=0, sample_tokens=0, evaluate_every=1, save_every=1)
    assert main(["train", config_file(config), "--folder", str(tmp_path)]) == 0
    weights = load_file(tmp_path / "best" / "model.safetensors")
    same = [
        update
        for update in (1, 2)
        if all(torch.equal(weights[name], tensor) for name, tensor in model_of(tmp_path, update).items())
    ]
    assert same == [kept]


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (5, 1), (6, 2), (8, 2), (9, 3), (100, 3), (None, 3)])
def test_first_documents_are_whole_and_reach_the_number(num_tokens, expected):
    corpus = corpus_from_arrays([np.zeros(length, dtype=np.int64) for length in (5, 3, 4)], 2)
    assert first_documents(corpus, num_tokens).num_documents == expected


def test_the_golden_curve_is_reproduced(tmp_path):
    """A committed curve of losses; `python -m tests.training.test_loop` makes it anew, after a change that is meant."""
    golden = json.loads(GOLDEN_CURVE.read_text(encoding="utf-8"))
    if golden["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"the curve is of torch {golden['torch']}, this is {torch.__version__}")
    assert golden_curve(tmp_path) == pytest.approx(golden["bits_per_token"], rel=golden["tolerance"])


def golden_curve(base):
    write_documents(base / "texts")
    assert main(["train", config_file(run_config(base, num_updates=40, evaluate_every=40, save_every=40))]) == 0
    return [line[1] for line in logged(base / "run")[0]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        curve = golden_curve(Path(name))
    GOLDEN_CURVE.write_text(
        json.dumps({"torch": torch.__version__.partition("+")[0], "tolerance": 1e-3, "bits_per_token": curve}, indent=2)
        + "\n",
        encoding="utf-8",
    )
