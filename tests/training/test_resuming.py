"""A run that is stopped at any point and resumed equals the uninterrupted run bit for bit, on one thread."""

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from memformer import load_model
from memformer.cli.main import main
from memformer.data import NUM_TASK_TOKENS, ByteTokenizer, MultitaskConfig, PixelTokenizer, SourceConfig
from memformer.training import loop
from memformer.training.config import DataConfig
from memformer.training.logs import read_log
from memformer.training.optimizer import learning_rate_at
from memformer.training.run_data import DocumentData
from memformer.training.run_inputs import describe_inputs, find_changed_input, find_changed_key, pin_revisions
from tests.training.runs import (
    NUM_UPDATES,
    checkpoint_of,
    config_file,
    drop_checkpoints_after,
    logged,
    run_config,
    saved_tensors,
)

pytestmark = pytest.mark.usefixtures("without_report")
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


def assert_same_run(folder, other, update=NUM_UPDATES):
    assert logged(folder) == logged(other)
    ours, theirs = saved_tensors(checkpoint_of(folder, update)), saved_tensors(checkpoint_of(other, update))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (folder / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


def fingerprint(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_killed_while_saving_and_resumed_equals_the_uninterrupted_run(base, unbroken, capsys):
    config = run_config(base, "killed")
    folder = Path(config.folder)
    child = subprocess.run([sys.executable, "-c", CHILD, "train", config_file(config)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        ".update-000000006.partial",
        "update-000000003",
    ]
    for name in (
        "checkpoints/.update-000000002.partial",
        "checkpoints/.update-000000002.optimizer_state",
        "best/.a.partial",
    ):
        (folder / name).mkdir(parents=True)  # of a save that is not repeated
    assert main(["train", config_file(config), "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert_same_run(folder, unbroken)
    assert [*folder.rglob("*.partial"), *folder.rglob(".update*")] == []


def test_a_resumed_run_of_several_tasks_equals_the_uninterrupted_run(base, tmp_path, capsys):
    config = run_config(base)
    data = dataclasses.replace(config.data, multitask=MultitaskConfig())
    config = dataclasses.replace(config, data=data, folder=str(tmp_path / "unbroken"))
    assert main(["train", config_file(config)]) == 0
    assert load_model(tmp_path / "unbroken" / "best").config.num_special_tokens == NUM_TASK_TOKENS
    _, evaluation = logged(tmp_path / "unbroken")
    assert evaluation[-1][1] < evaluation[0][1]
    folder = shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed")
    drop_checkpoints_after(folder, 3)
    assert main(["train", config_file(config), "--folder", str(folder), "--resume"]) == 0
    assert_same_run(folder, tmp_path / "unbroken")
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "abc", "--max_new_tokens", "30"]) == 0
    other = ["--folder", str(folder), "--resume"]
    other += ["--data.multitask.recall", "0.2", "--data.multitask.continuation", "0.5"]
    assert main(["train", config_file(config), *other]) == 2
    assert "data.multitask" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_run_resumes_as_the_uninterrupted_one(base, unbroken, monkeypatch, capsys, number, status):
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
    # The update during which the signal arrived is finished and saved.
    assert checkpoint_of(folder, 5).is_dir()
    assert f"stopped by {number.name}; continue with --resume" in capsys.readouterr().err
    assert main(["train", config_file(config), "--resume"]) == 0
    assert_same_run(folder, unbroken)


def test_the_log_is_on_disk_before_the_following_checkpoint(base, tmp_path, monkeypatch):
    # If the process is killed after a checkpoint but before the log is flushed, the resumed run lacks these lines.
    save_checkpoint, ends = loop.save_checkpoint, []

    def save_and_record(folder, state, **options):
        ends.append((state.progress["num_updates"], read_log(tmp_path / "run")[-1]["update"]))
        save_checkpoint(folder, state, **options)

    monkeypatch.setattr(loop, "save_checkpoint", save_and_record)
    assert main(["train", config_file(run_config(base, "logged")), "--folder", str(tmp_path / "run")]) == 0
    assert ends == [(update, update) for update in (3, 6, 9, 10)]


def test_resuming_from_an_older_checkpoint_repeats_the_later_updates(copied, unbroken):
    drop_checkpoints_after(copied, 6)
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    assert_same_run(copied, unbroken)


def test_the_carried_memory_is_part_of_the_state(copied, unbroken):
    drop_checkpoints_after(copied, 6)
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


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning_and_rewritten(copied, unbroken, capsys):
    (checkpoint_of(copied, 10) / "optimizer.safetensors").write_bytes(b"damaged")
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    error = capsys.readouterr().err
    assert "memformer: warning: skipped a damaged checkpoint:" in error
    assert "update-000000010/optimizer.safetensors" in error
    assert_same_run(copied, unbroken)


def test_resuming_is_refused_if_every_checkpoint_is_damaged(copied, capsys):
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


def test_a_changed_weight_decay_takes_effect_after_resuming(copied, unbroken):
    drop_checkpoints_after(copied, 9)
    assert main(["train", str(copied), "--folder", str(copied), "--resume", "--training.weight_decay", "0.9"]) == 0
    # The 10th update starts from the same weights, so its loss is the same, but the weights after it differ.
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
        ("training.optimizer", "muon"),
    ],
)
def test_resuming_with_another_config_is_refused(copied, capsys, key, value):
    before = fingerprint(copied)
    assert main(["train", str(copied), "--folder", str(copied), "--resume", f"--{key}", value]) == 2
    assert f"memformer: error: the run began with {key}: " in capsys.readouterr().err
    assert fingerprint(copied) == before


def test_unknown_keys_are_a_change(tmp_path):
    config = run_config(tmp_path)
    saved = config.to_dict()
    saved["model"] |= {7: "x"}
    assert find_changed_key(saved, config) == "the run began with model.7: x, now it is None"


@pytest.fixture
def texts(base, tmp_path):
    """A copy of the documents, which a test may change."""
    return shutil.copytree(base / "texts", tmp_path / "texts")


def resume(folder, texts, *options):
    return main(["train", str(folder), "--folder", str(folder), "--data.train.path", str(texts), "--resume", *options])


def test_a_run_resumes_with_documents_that_have_moved(copied, unbroken, texts):
    """Documents that were moved, with their content unchanged, are accepted, and may be moved again."""
    drop_checkpoints_after(copied, 6)
    (texts / "0.txt").touch()
    assert resume(copied, texts) == 0
    assert_same_run(copied, unbroken)
    assert yaml.safe_load((copied / "config.yaml").read_text())["data"]["train"]["path"] == str(texts)
    assert resume(copied, texts.rename(texts.with_name("again"))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda texts: (texts / "3.txt").write_bytes((texts / "3.txt").read_bytes()[::-1]), "3.txt, which has other"),
        (lambda texts: (texts / "3.txt").unlink(), "3.txt is no longer there"),
        (lambda texts: (texts / "7.txt").write_text("new"), "7.txt has been added"),
        (lambda texts: (texts / "0.txt").rename(texts / "9.txt"), "the same files are read in another order"),
    ],
    ids=["changed", "lost", "added", "renamed"],
)
def test_resuming_with_changed_documents_is_refused(copied, texts, capsys, change, message):
    """A run whose documents have changed is not resumed, even if number and lengths of the documents are the same."""
    before = fingerprint(copied)
    change(texts)
    assert resume(copied, texts) == 2
    error = capsys.readouterr().err
    assert "memformer: error: data.train has changed since the run began: " in error
    assert message in error
    assert fingerprint(copied) == before


def test_a_file_that_changes_in_place_is_named_with_its_change(copied, texts, capsys):
    """The message says whether the size or only the content of a file has changed."""
    assert resume(copied, texts) == 0
    content = (texts / "3.txt").read_bytes()
    for other, message in (
        (content[::-1], f"has as many bytes ({len(content)}) but other content"),
        (content * 2, f"had {len(content)} bytes and now has {2 * len(content)}"),
    ):
        (texts / "3.txt").write_bytes(other)
        assert resume(copied, texts) == 2
        assert f"{texts / '3.txt'} {message}" in capsys.readouterr().err


def test_a_changed_validation_file_is_refused(copied, texts):
    """Every source and the tokenizer are part of what a run was made from, not only the training documents."""
    data = DataConfig(train=SourceConfig(path=str(texts / "0.txt")), validation=SourceConfig(path=str(texts / "1.txt")))
    before = describe_inputs(data, ByteTokenizer())
    assert find_changed_input(before, describe_inputs(data, ByteTokenizer(), known=before)) is None
    assert "tokenizer" in find_changed_input(before, describe_inputs(data, PixelTokenizer(2, 2, 2)))
    (texts / "1.txt").write_text("other")
    assert find_changed_input(before, describe_inputs(data, ByteTokenizer())).startswith("data.validation has changed")


def test_a_run_without_a_record_of_its_files_resumes(copied, texts, unbroken, capsys):
    """A run that has no record of its files resumes where they are, is refused elsewhere, and then has a record."""
    drop_checkpoints_after(copied, 9)
    (copied / "data.json").unlink()
    assert resume(copied, texts) == 2
    assert "the run began with data.train.path: " in capsys.readouterr().err
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 0
    assert json.loads((copied / "data.json").read_text()) == json.loads((unbroken / "data.json").read_text())


@pytest.mark.parametrize(
    "damaged", ["{", "{}", '{"format_version": 1, "tokenizer": "x", "files": {"data.train": [{"path": 1}]}}']
)
def test_a_damaged_record_of_files_is_refused(copied, capsys, damaged):
    """A damaged data.json is refused by name, not ignored."""
    (copied / "data.json").write_text(damaged)
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) == 2
    assert "data.json" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_commit_of_its_data_set(monkeypatch):
    """A run on the hub keeps the commit that it began with; only a new run asks for the newest."""
    monkeypatch.setattr("memformer.data.sources.newest_revision", lambda name: "b" * 40)
    data = DataConfig(train=SourceConfig(kind="huggingface", name="some/data", split="train"))
    new, old = pin_revisions(data), dataclasses.asdict(data)
    assert new.train.revision == "b" * 40
    old["train"]["revision"] = "a" * 40
    assert pin_revisions(data, {"data": old}).train.revision == "a" * 40
    assert pin_revisions(data, {"data": {"train": {}}}).train.revision is None


def test_a_folder_with_a_run_is_not_overwritten(copied, capsys):
    before = fingerprint(copied)
    assert main(["train", str(copied), "--folder", str(copied)]) == 2
    assert capsys.readouterr().err == (
        f"memformer: error: {copied} already contains a run; continue it with --resume, or choose another --folder\n"
    )
    assert fingerprint(copied) == before


@pytest.fixture
def limit_file_size():
    """Limit the file size, as on a full disk; Python ignores the SIGXFSZ signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("blocked", ["optimizer.safetensors", "log.jsonl"])
def test_a_full_disk_ends_the_run_and_keeps_the_saved_files(copied, capsys, limit_file_size, blocked):
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


def test_a_finished_run_without_checkpoints_is_not_overwritten(copied, capsys):
    """Checkpoints may be deleted to save space; the results stay."""
    shutil.rmtree(copied / "checkpoints")
    before = fingerprint(copied)
    for options in ([], ["--resume"]):
        assert main(["train", str(copied), "--folder", str(copied), *options]) == 2
        assert "contains a finished run without checkpoints" in capsys.readouterr().err
        assert fingerprint(copied) == before


def test_a_run_that_goes_on_is_not_finished(copied, monkeypatch):
    """Its result would be that of other weights than the best."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Trainer, "_conclude", stop)
    assert main(["train", str(copied), "--folder", str(copied), "--resume"]) != 0
    assert (copied / "evaluation.json").exists()  # nothing was left to train
    assert main(["train", str(copied), "--folder", str(copied), "--resume", "--training.num_updates", "12"]) != 0
    assert not (copied / "evaluation.json").exists()


def test_scores_on_other_documents_are_not_compared(copied, capsys, monkeypatch):
    progress = json.loads((checkpoint_of(copied, 10) / "progress.json").read_text())["progress"]
    assert progress["evaluation_tokens"] == 100_000
    argv = ["train", str(copied), "--folder", str(copied), "--resume", "--training.num_updates", "11"]
    # The only held-out document is read either way.
    assert main([*argv, "--training.evaluation_tokens", "200000"]) == 0
    assert "scores on other documents" not in capsys.readouterr().err
    argv[-1], before = "12", fingerprint(copied / "best")
    # As if every document had one token: the score of the first one alone says nothing of the weights.
    monkeypatch.setattr(DocumentData, "evaluation_tokens", lambda _, model, training, **__: training.evaluation_tokens)
    assert main([*argv, "--training.evaluation_tokens", "1"]) == 0
    assert "training.evaluation_tokens was 200000 and is 1" in capsys.readouterr().err
    assert fingerprint(copied / "best") != before
    progress = json.loads((checkpoint_of(copied, 12) / "progress.json").read_text())["progress"]
    assert progress["evaluation_tokens"] == 1
