import errno
import json
import os
import shutil

import pytest
import torch

from memformer import CheckpointError, SaveError
from memformer.training import checkpoint as saving
from memformer.training.checkpoint import (
    TrainingState,
    check_checkpoint,
    checkpoint_name,
    checkpoints_newest_first,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from memformer.training.config import TrainingConfig
from memformer.training.optimizer import make_optimizer
from memformer.training.replay import backpropagate
from memformer.training.run_folder import CHECKPOINTS, newest_checkpoint
from tests.helpers import random_rollout, tiny_model

FILES = [
    "config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "state.safetensors",
]


def make_state(seed=0, batch_size=3, optimizer="adamw", **changes):
    model = tiny_model(seed=seed, dropout=0.2, **changes)
    memory = torch.randn(batch_size, model.config.num_slots, model.config.d_model, dtype=torch.float64)
    made = make_optimizer(model, TrainingConfig(learning_rate=0.1, optimizer=optimizer))
    return TrainingState(model=model, optimizer=made, memory=memory, progress={"num_updates": 0})


def advance(state, seed):
    """Make one update with dropout, as the training loop does."""
    result = backpropagate(state.model, random_rollout(2, 3, seed=seed), memory=state.memory)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.memory = result.memory
    state.progress["num_updates"] += 1
    return float(result.loss)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with two checkpoints; read-only."""
    folder = tmp_path_factory.mktemp("whole")
    state = make_state()
    for update in (1, 2):
        advance(state, seed=update)
        save_checkpoint(folder / CHECKPOINTS / checkpoint_name(update), state)
    return folder


@pytest.fixture
def run_folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def newest(run_folder):
    return run_folder / CHECKPOINTS / checkpoint_name(2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_from_a_loaded_state_equals_training_from_the_saved_one(tmp_path, optimizer):
    state = make_state(optimizer=optimizer)
    advance(state, seed=1)
    save_checkpoint(tmp_path / "c", state)
    expected = [advance(state, seed=2), advance(state, seed=3)]
    torch.manual_seed(12345)
    other = make_state(seed=9, optimizer=optimizer)
    load_checkpoint(tmp_path / "c", other)
    assert other.progress == {"num_updates": 1}
    assert [advance(other, seed=2), advance(other, seed=3)] == expected
    assert torch.equal(other.memory, state.memory)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_a_checkpoint_holds_these_files_and_no_other(newest):
    assert sorted(path.name for path in newest.iterdir()) == FILES
    assert [path.name for path in newest.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_flipped_bit_is_detected_and_the_previous_checkpoint_is_used(run_folder, newest, name, where):
    content = bytearray((newest / name).read_bytes())
    content[int(where * len(content))] ^= 1
    (newest / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=newest.name):
        check_checkpoint(newest)
    warnings = []
    assert newest_checkpoint(run_folder, warn=warnings.append).name == checkpoint_name(1)
    assert len(warnings) == 1
    assert newest.name in warnings[0]


def test_a_flipped_bit_of_the_manifest_is_refused_or_changes_nothing(newest):
    file = newest / "manifest.json"
    content = file.read_bytes()
    original = json.loads(content)
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        try:
            check_checkpoint(newest)
        except CheckpointError:
            continue
        assert json.loads(damaged) == original


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut short", "empty", "missing"])
def test_the_error_names_a_truncated_or_missing_file(newest, name, damage):
    content = (newest / name).read_bytes()
    match damage:
        case "cut short":
            (newest / name).write_bytes(content[:-1] if name != "manifest.json" else content[:-3])
        case "empty":
            (newest / name).write_bytes(b"")
        case "missing":
            (newest / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        check_checkpoint(newest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has checkpoint format 2; this memformer reads 1"),
        ({"format_version": None}, "has checkpoint format None"),
        ({"files": []}, "does not list the files"),
        ({"files": {}}, "does not list the files"),
    ],
)
def test_an_invalid_manifest_is_refused(newest, change, message):
    file = newest / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(newest)


def test_a_manifest_with_an_unknown_file_name_is_refused_before_files_are_read(newest):
    file = newest / "manifest.json"
    file.write_text(file.read_text().replace("config.json", f"config.{'7' * 5000}"))
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list the files of a checkpoint"):
        check_checkpoint(newest)


@pytest.mark.parametrize("changes", [{"d_model": 32}, {"num_slots": 4}, {"num_encoder_layers": 1}])
def test_a_checkpoint_of_another_model_is_refused(newest, changes):
    state = make_state(**changes)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(newest, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())


def test_a_checkpoint_of_another_number_of_lanes_is_refused(newest):
    with pytest.raises(CheckpointError, match=r"has lane memory of shape \(3, 5, 16\); this run needs \(2, 5, 16\)"):
        load_checkpoint(newest, make_state(batch_size=2))


def test_the_error_describes_the_newest_checkpoint_if_all_are_damaged(run_folder):
    for checkpoint in checkpoints_newest_first(run_folder / CHECKPOINTS):
        (checkpoint / "manifest.json").unlink()
    warnings = []
    with pytest.raises(CheckpointError, match=f"no undamaged checkpoint: .*{checkpoint_name(2)}.*does not exist"):
        newest_checkpoint(run_folder, warn=warnings.append)
    assert len(warnings) == 2


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint yet; there is nothing to resume from"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "sync_folder"])
def test_a_failed_save_leaves_only_the_earlier_checkpoints(run_folder, monkeypatch, failing):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"memformer.training.checkpoint.{failing}", fail)
    checkpoints = run_folder / CHECKPOINTS
    with pytest.raises(SaveError, match=f"cannot write checkpoint .*{checkpoint_name(3)}.*No space.*intact"):
        save_checkpoint(checkpoints / checkpoint_name(3), make_state())
    assert sorted(path.name for path in checkpoints.iterdir()) == [checkpoint_name(1), checkpoint_name(2)]
    check_checkpoint(checkpoints / checkpoint_name(2))


def test_the_partial_folder_of_a_killed_save_is_ignored_and_replaced(run_folder):
    checkpoints = run_folder / CHECKPOINTS
    leftover = shutil.copytree(checkpoints / checkpoint_name(2), checkpoints / f".{checkpoint_name(3)}.partial")
    (leftover / "stray").write_text("x")
    assert newest_checkpoint(run_folder).name == checkpoint_name(2)
    save_checkpoint(checkpoints / checkpoint_name(3), make_state())
    assert not leftover.exists()
    assert newest_checkpoint(run_folder).name == checkpoint_name(3)


def test_a_damaged_checkpoint_is_replaced_by_a_new_one_with_the_same_name(newest):
    (newest / "state.safetensors").write_bytes(b"")
    state = make_state()
    advance(state, seed=1)
    save_checkpoint(newest, state)
    check_checkpoint(newest)


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_pruning_keeps_the_newest(tmp_path, keep, kept):
    for update in (1, 2, 3, 4):
        (tmp_path / checkpoint_name(update)).mkdir()
    prune_checkpoints(tmp_path / checkpoint_name(4), keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(update) for update in kept]


def test_pruning_does_not_count_later_checkpoints(tmp_path):
    for update in (1, 2, 9):
        (tmp_path / checkpoint_name(update)).mkdir()
    prune_checkpoints(tmp_path / checkpoint_name(2), keep=1)
    assert (tmp_path / checkpoint_name(2)).exists()
    assert not (tmp_path / checkpoint_name(1)).exists()


def test_an_old_checkpoint_that_cannot_be_deleted_is_warned_of(tmp_path, monkeypatch, capsys):
    """The run, whose new checkpoint is complete, goes on."""
    for update in (1, 2):
        (tmp_path / checkpoint_name(update)).mkdir()
    monkeypatch.setattr(shutil, "rmtree", fail)
    prune_checkpoints(tmp_path / checkpoint_name(2), keep=1)
    assert f"the old checkpoint {tmp_path / checkpoint_name(1)} cannot be deleted: busy" in capsys.readouterr().err


def fail(path):
    raise OSError(errno.EBUSY, "busy", str(path))


@pytest.mark.parametrize(
    "name", ["update-best", "update-000000004-good", "update-4", "update-0000000004", "copy of update-000000004"]
)
def test_a_copy_of_a_checkpoint_is_neither_resumed_from_nor_deleted(run_folder, newest, name):
    """A copy of a checkpoint is neither resumed from nor deleted."""
    copy = shutil.copytree(newest, newest.with_name(name))
    assert newest_checkpoint(run_folder) == newest
    prune_checkpoints(newest, keep=1)
    assert sorted(path.name for path in newest.parent.iterdir()) == sorted([newest.name, name])
    check_checkpoint(copy)


def test_a_linked_checkpoint_is_not_deleted(run_folder, newest, tmp_path):
    """A checkpoint that the user has moved elsewhere and linked stays."""
    first = newest.with_name(checkpoint_name(1))
    moved = first.rename(tmp_path / "moved")
    first.symlink_to(moved)
    prune_checkpoints(newest, keep=1)
    assert first.is_symlink()
    check_checkpoint(first)


def test_names_sort_by_age(tmp_path):
    for update in (999, 1000, 20):
        (tmp_path / checkpoint_name(update)).mkdir()
    found = [path.name for path in checkpoints_newest_first(tmp_path)]
    assert found == [checkpoint_name(update) for update in (1000, 999, 20)]


def test_an_unreadable_file_is_damage_and_the_previous_checkpoint_is_used(run_folder, newest, monkeypatch):
    describe = saving._description

    def fail(file):
        if file.parent == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return describe(file)

    monkeypatch.setattr(saving, "_description", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error"):
        check_checkpoint(newest)
    warnings = []
    assert newest_checkpoint(run_folder, warn=warnings.append).name == checkpoint_name(1)
    assert "cannot be read: Input/output error" in warnings[0]
