"""A skipped update changes only the counters and the memory; training continues and can be resumed."""

import dataclasses

import pytest
import torch

from memformer import Memformer
from memformer.training import loop
from memformer.training.checkpoint import load_checkpoint
from memformer.training.logs import open_log, read_log
from memformer.training.processes import Processes
from memformer.training.run_data import prepare_data
from tests.training.runs import run_config, write_documents

BAD_UPDATE = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("skipping")
    write_documents(base / "texts")
    return base


def make_trainer(base, folder, **training):
    config = run_config(base, rollouts_per_update=1, **training)
    config = dataclasses.replace(config, folder=str(folder), seed=1)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = Memformer(config.model)
    return loop._Trainer(config, prepare_data(config.data), model, resume=False, processes=Processes())


def update(trainer, log):
    values = trainer._update(log, [])
    trainer.state.progress["num_updates"] += 1
    return values


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def optimizer_state_of(trainer):
    return [value.clone() for state in trainer.state.optimizer.state.values() for value in state.values()]


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that selects which results of the next rollouts are made NaN or infinite."""
    selected = {"loss": False, "gradient": False, "row": None}
    backpropagate = loop.backpropagate

    def spoilt(model, rollout, **options):
        result = backpropagate(model, rollout, **options)
        if selected["gradient"]:
            model.encoder.norm.weight.grad[0] = float("inf")
        if selected["row"] is not None:
            result.memory[selected["row"]] = float("nan")
        return dataclasses.replace(result, loss=result.loss * float("nan")) if selected["loss"] else result

    monkeypatch.setattr(loop, "backpropagate", spoilt)
    return selected.update


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_update_changes_no_weights_and_is_counted(base, tmp_path, spoil, what):
    trainer = make_trainer(base, tmp_path / "run")
    with open_log(tmp_path / "run", total_updates=10, num_updates=0) as log:
        for _ in range(BAD_UPDATE - 1):
            assert update(trainer, log) is not None
        before, state, tokens = (
            weights_of(trainer),
            optimizer_state_of(trainer),
            trainer.state.progress["num_tokens"],
        )
        spoil({what: True})
        assert update(trainer, log) is None
        spoil({what: False})
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
        assert all(torch.equal(now, then) for now, then in zip(optimizer_state_of(trainer), state, strict=True))
        assert trainer.state.progress["num_tokens"] == tokens
        assert (trainer.state.progress["num_skipped"], trainer.state.progress["num_skipped_in_a_row"]) == (1, 1)
        assert update(trainer, log) is not None
        assert (trainer.state.progress["num_skipped"], trainer.state.progress["num_skipped_in_a_row"]) == (1, 0)
        assert not torch.equal(weights_of(trainer)["encoder.norm.weight"], before["encoder.norm.weight"])
    lines = read_log(tmp_path / "run")
    assert [line["update"] for line in lines if line["kind"] == "skipped"] == [BAD_UPDATE]
    assert "must be finite" in lines[-1]["reason"]


def test_only_the_lane_whose_memory_is_not_finite_keeps_its_previous_memory(base, tmp_path, spoil):
    trainer, unspoilt = make_trainer(base, tmp_path / "run"), make_trainer(base, tmp_path / "unspoilt")
    # Both make the same updates with the same random numbers.
    for each in (trainer, unspoilt):
        torch.manual_seed(5)
        spoil({"row": None})
        with open_log(tmp_path / "run", total_updates=10, num_updates=0) as log:
            update(each, log)
            before = each.state.memory.clone()
            spoil({"row": 1 if each is trainer else None})
            update(each, log)
    assert torch.equal(trainer.state.memory[0], unspoilt.state.memory[0])
    assert torch.equal(trainer.state.memory[1], before[1])
    assert not torch.equal(unspoilt.state.memory[1], before[1])


def test_counters_are_part_of_a_checkpoint(base, tmp_path, spoil):
    trainer = make_trainer(base, tmp_path / "run")
    with open_log(tmp_path / "run", total_updates=10, num_updates=0) as log:
        spoil({"loss": True})
        update(trainer, log)
        update(trainer, log)
        checkpoint = trainer._save()
    other = make_trainer(base, tmp_path / "other")
    load_checkpoint(checkpoint, other.state)
    assert other.state.progress["num_skipped_in_a_row"] == 2


def test_rollouts_without_targets_change_only_the_memory(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path / "run")
    with open_log(tmp_path / "run", total_updates=20, num_updates=0) as log:
        for _ in range(3):
            assert update(trainer, log) is not None
        before, state, progress = (
            weights_of(trainer),
            optimizer_state_of(trainer),
            dict(trainer.state.progress),
        )
        memory = trainer.state.memory.clone()
        rollout = next(trainer.stream)
        silent = dataclasses.replace(rollout, target_padding=torch.ones_like(rollout.targets, dtype=torch.bool))
        monkeypatch.setattr(trainer, "stream", iter([silent]))
        assert update(trainer, log) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert all(torch.equal(now, then) for now, then in zip(optimizer_state_of(trainer), state, strict=True))
    assert trainer.state.progress == {**progress, "num_updates": progress["num_updates"] + 1}
    assert not torch.equal(trainer.state.memory, memory)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_checkpoint_after_a_skipped_update_does_not_replace_a_good_one(base, tmp_path):
    trainer = make_trainer(base, tmp_path / "run", keep_checkpoints=1)
    trainer._save()
    trainer.state.progress.update(num_updates=1, num_skipped_in_a_row=1)
    trainer._save()
    trainer.state.progress.update(num_updates=2)
    trainer._save()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [int(name[-1]) for name in names] == [0, 1, 2]
    trainer.state.progress.update(num_updates=3, num_skipped_in_a_row=0)
    trainer._save()
    assert [path.name[-1] for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
