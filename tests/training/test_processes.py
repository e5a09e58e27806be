"""Training with several processes: equal updates, resuming with another number of processes, and stopping."""

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from memformer import CheckpointError, InputError, Memformer
from memformer.cli import train as cli_train
from memformer.cli.main import main
from memformer.cli.run_config import parse_run_config
from memformer.data import RecallConfig
from memformer.models.baseline_configs import CompressiveTransformerConfig
from memformer.training import loop, run_data
from memformer.training.checkpoint import TrainingState, load_checkpoint
from memformer.training.config import DataConfig, RunConfig
from memformer.training.optimizer import make_optimizer
from memformer.training.processes import Processes, check_processes, processes_started
from tests.helpers import assert_close
from tests.training import jobs, process_worker
from tests.training.jobs import run_job, train
from tests.training.runs import (
    checkpoint_of,
    config_file,
    drop_checkpoints_after,
    logged,
    run_config,
    saved_tensors,
    write_documents,
)

ROOT = Path(__file__).parents[2]
# A process whose interpreter shuts down while gloo releases a tensor.
ENDING = """
import time
import torch
import torch.distributed as dist
from memformer.training.processes import exit_process, processes_started

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2)

with processes_started("cpu") as processes:
    group = dist.group.WORLD  # torch keeps such a reference for a sharded model
    tensor, parts = torch.ones(2), [torch.empty(2), torch.empty(2)]
    time.sleep(processes.rank)
    dist.all_gather(parts, tensor, async_op=True)
_slow = Slow()  # the underscore makes Python delete it before the tensors
exit_process(0)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Documents, and a run with one process and without dropout."""
    base = tmp_path_factory.mktemp("processes")
    write_documents(base / "texts", num_documents=9)
    assert main(["train", config_of(base, "one")]) == 0
    return base


def config_of(base, folder, **training):
    config = run_config(base, folder, num_lanes=4, **training)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    return config_file(config)


def torchrun(*arguments):
    """Run two processes by the real command, which takes seconds to start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_nearly_same_run(folder, other):
    (ours, our_evaluation), (theirs, their_evaluation) = logged(folder), logged(other)
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    for our_line, their_line in zip([*ours, *our_evaluation], [*theirs, *their_evaluation], strict=True):
        assert our_line == pytest.approx(their_line, rel=1e-3)
    ours, theirs = (load_file(checkpoint_of(each, 10) / "state.safetensors") for each in (folder, other))
    assert_close(ours["memory"], theirs["memory"], relative=1e-2)


def test_processes_exit_without_error_while_gloo_still_holds_a_tensor(tmp_path):
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    done = torchrun(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("method", "sharding"), [("replay", "none"), ("bptt", "none"), ("replay", "optimizer_state"), ("replay", "weights")]
)
def test_two_processes_have_the_gradients_of_one_in_float64_with_one_reduction_per_update(
    base, tmp_path, method, sharding
):
    files = [tmp_path / f"{count}.safetensors" for count in (1, 2)]
    process_worker.main(base, files[0], method, "none")
    done = run_job(process_worker.main, base, files[1], method, sharding)
    assert done.status == 0, done.output
    one, two = (load_file(file) for file in files)
    assert two["memory"].shape[0] == 4
    by_engine = {name for name in one if name.startswith("engine: ")}
    assert bool(by_engine) == (method == "replay")
    assert two.keys() == one.keys() - (by_engine if sharding != "none" else set())
    for name, value in two.items():
        assert_close(value, one[name])
    for name in by_engine:
        assert_close(one[name], one[name.removeprefix("engine: ")])


@pytest.mark.parametrize(("method", "sharding"), [("replay", "optimizer_state"), ("replay", "weights")])
def test_sharding_loses_no_gradient_in_mixed_precision(base, tmp_path, method, sharding):
    """A cast of a weight that several backward passes share would be back-propagated after the sum over processes."""
    files = [tmp_path / f"{count}.safetensors" for count in (1, 2)]
    process_worker.main(base, files[0], method, "none", "bfloat16")
    done = run_job(process_worker.main, base, files[1], method, sharding, "bfloat16")
    assert done.status == 0, done.output
    one, two = (load_file(file) for file in files)
    for name, value in two.items():
        assert (value - one[name]).norm() < 0.05 * one[name].norm(), name


def test_a_run_of_two_processes_equals_that_of_one_and_resumes_in_one(base):
    train(config_of(base, "two"))
    assert_nearly_same_run(base / "two", base / "one")
    drop_checkpoints_after(base / "two", 6)
    assert main(["train", config_of(base, "two"), "--resume"]) == 0
    assert_nearly_same_run(base / "two", base / "one")


def test_a_run_with_dropout_resumed_with_the_same_number_of_processes_is_identical(base):
    config = config_file(run_config(base, "dropout", num_lanes=4))
    train(config)
    expected = saved_tensors(checkpoint_of(base / "dropout", 10))
    assert {"state: cpu_randomness", "state: cpu_randomness.1"} <= expected.keys()
    # Rows with the same text have other dropout masks in each process.
    assert not torch.equal(expected["state: cpu_randomness"], expected["state: cpu_randomness.1"])
    drop_checkpoints_after(base / "dropout", 9)
    done = train(config, "--resume")
    assert "resuming from" in done.output
    ours = saved_tensors(checkpoint_of(base / "dropout", 10))
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_a_sharded_run_equals_that_of_one_process_and_resumes_in_one_and_back_in_two(base):
    config = config_of(base, "shared", sharding="optimizer_state")
    train(config)
    assert_nearly_same_run(base / "shared", base / "one")
    expected = whole_state(base / "shared", 10)
    # One process resumes from two sharded ones, and two with more sharding from its checkpoint.
    for update, command in (
        (6, lambda: main(["train", config, "--resume"])),
        (9, lambda: train(config, "--resume", "--training.sharding=weights").status),
    ):
        drop_checkpoints_after(base / "shared", update)
        assert command() == 0
        assert_nearly_same_run(base / "shared", base / "one")
        ours = whole_state(base / "shared", 10)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(ours[name], value, relative=1e-5)


def test_a_sharded_run_with_dropout_resumed_with_the_same_number_of_processes_is_identical(base):
    folder = base / "dropout-sharded"
    config = config_file(run_config(base, folder.name, num_lanes=4, sharding="weights"))
    train(config)
    expected = whole_state(folder, 10)
    drop_checkpoints_after(folder, 9)
    done = train(config, "--resume")
    assert "resuming from" in done.output
    ours = whole_state(folder, 10)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def whole_state(folder, update):
    """Return the weights, optimizer state and lane memory of any checkpoint, as one process loads them."""
    run = yaml.safe_load((folder / "config.yaml").read_text())
    config = parse_run_config([str(folder / "config.yaml")])[0]
    model = Memformer(config.model)
    optimizer = make_optimizer(model, config.training)
    memory = model.initial_memory(run["training"]["num_lanes"]).detach().clone()
    state = TrainingState(model, optimizer, memory, {})
    with torch.random.fork_rng():
        load_checkpoint(checkpoint_of(folder, update), state)
    optimizer_state = {
        f"{name}: {key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    assert optimizer_state
    return {**model.state_dict(), **optimizer_state, "memory": state.memory}


def send_signal(number, *, call):
    """Let the second process send itself a signal in this call of `backpropagate`; two calls are one update."""
    backpropagate, calls = loop.backpropagate, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return backpropagate(*args, **kwargs)

    loop.backpropagate = signalled


def train_with_signal(number, call, *arguments):
    send_signal(number, call=call)
    jobs.run_command("train", *arguments)


def test_a_dying_process_ends_the_job_and_a_restart_resumes(base):
    config = config_of(base, "down", sharding="weights")
    done = run_job(train_with_signal, signal.SIGKILL, 13, config)
    assert done.status == -signal.SIGKILL
    assert "Traceback" not in done.output
    checkpoints = (base / "down" / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoints) == ["update-000000003", "update-000000006"]
    done = train(config, restarts=1)
    assert "resuming from" in done.output
    assert_nearly_same_run(base / "down", base / "one")


def test_what_does_not_fit_the_processes_is_refused_once_and_leaves_no_folder(base):
    done = run_job(jobs.run_command, "train", config_of(base, "odd"), "--training.num_lanes", "3")
    assert done.status == 2
    assert done.output.count("error: training.num_lanes (3) must be a multiple of the 2 processes") == 1, done.output
    assert not (base / "odd").exists()
    for options, message in (
        ([], "already contains a run"),
        (["--resume", "--model.num_slots", "5"], "a run cannot be resumed with this change"),
    ):
        done = run_job(jobs.run_command, "train", config_of(base, "one"), *options)
        assert (done.status, done.output.count("error: "), message in done.output) == (2, 1, True), done.output


@pytest.mark.parametrize(("compression", "is_refused"), [("convolution", True), ("mean", False)])
def test_a_reconstruction_loss_on_a_recall_task_needs_a_single_process(compression, is_refused):
    model = CompressiveTransformerConfig(compression=compression)
    config = RunConfig(
        folder="x", model_type="compressive_transformer", model=model, data=DataConfig(recall=RecallConfig(task="fact"))
    )
    processes = Processes()
    check_processes(config, processes)
    processes.count = 2
    expected = pytest.raises(InputError, match=r"model\.reconstruction_weight \(1\.0\) needs a single process")
    with expected if is_refused else contextlib.nullcontext():
        check_processes(config, processes)


def train_and_tell(*arguments):
    for module, name in ((run_data, "make_tokenizer"), (cli_train, "pin_revisions")):
        setattr(module, name, telling(getattr(module, name)))
    jobs.run_command("train", *arguments)


def telling(function):
    def told(*arguments, **options):
        print(f"{function.__name__} is called")
        return function(*arguments, **options)

    return told


def test_one_process_asks_for_the_commit_and_trains_the_tokenizer_and_the_others_receive_them(base):
    options = ["--data.tokenizer.kind", "bpe", "--data.tokenizer.vocab_size", "270", "--training.num_updates", "1"]
    done = run_job(train_and_tell, config_of(base, "bpe"), *options)
    assert done.status == 0, done.output
    assert [done.output.count(f"{name} is called") for name in ("pin_revisions", "make_tokenizer")] == [1, 1]


def test_a_recall_task_with_several_processes_is_warned_that_a_writer_may_stop(base, tmp_path):
    config = run_config(base, "recall", num_lanes=4, num_updates=1)
    model = dataclasses.replace(config.model, dropout=0.0, write_normalizer="entmax15")
    config = dataclasses.replace(config, model=model, data=DataConfig(recall=RecallConfig(task="fact")))
    done = run_job(jobs.run_command, "train", config_file(config))
    assert done.status == 0, done.output
    assert done.output.count("with 2 processes, nothing helps a writer that stops writing") == 1


@pytest.mark.parametrize(
    ("other", "is_refused"), [(1.0, False), (1.5, True), (float("nan"), True)], ids=["equal", "other", "broken"]
)
def test_processes_must_have_the_same_weights(monkeypatch, other, is_refused):
    processes = Processes()
    monkeypatch.setattr(processes, "count", 2)
    monkeypatch.setattr(processes, "_gather", lambda own: [own, own * other])
    expected = pytest.raises(CheckpointError, match="the weights of process 1 differ from those of process 0")
    with expected if is_refused else contextlib.nullcontext():
        processes.check_agreement(torch.nn.Linear(2, 2))


def test_weights_that_are_broken_in_all_processes_agree(monkeypatch):
    """So that the reason is said by what broke them."""
    processes, model = Processes(), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, math.nan)
    monkeypatch.setattr(processes, "count", 2)
    monkeypatch.setattr(processes, "_gather", lambda own: [own, own])
    processes.check_agreement(model)


def test_a_number_of_lanes_that_is_no_multiple_of_the_processes_is_refused():
    processes = Processes()
    processes.count, processes.rank = 3, 1
    assert processes.lanes_of(6) == [2, 3]
    with pytest.raises(InputError, match=r"training\.num_lanes \(4\) must be a multiple of the 3 processes"):
        processes.lanes_of(4)


def test_after_a_signal_to_one_process_all_save_and_stop(base):
    done = run_job(train_with_signal, signal.SIGINT, 9, config_of(base, "stopped"))
    assert done.status != 0
    assert "stopped by SIGINT" in done.output
    assert checkpoint_of(base / "stopped", 5).is_dir()
    assert "stopped by SIGTERM" in done.output  # the other process, which received no signal itself


def test_a_parameter_without_gradient_in_all_processes_has_none_afterwards(tmp_path):
    """As in one process, where the optimizer leaves it alone: with a gradient of zero it would decay."""
    done = run_job(sum_up_gradients, tmp_path)
    assert done.status == 0, done.output


def sum_up_gradients(folder):
    del folder
    model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(3), torch.zeros(1)])
    with processes_started("cpu") as processes:
        model[0].grad = torch.ones(2)
        if not processes.is_first:
            model[2].grad = torch.full((1,), 5.0)
        assert processes.sum_up(model, [1.5, 2.0]) == [3.0, 4.0]
        assert model[0].grad.tolist() == [2, 2]
        assert model[1].grad is None
        assert model[2].grad.tolist() == [5]
