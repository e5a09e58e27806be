"""Kill training with SIGKILL at random times, resume it, and compare the result with an uninterrupted run.

    python -m tests.soak.kills --kills 200

A run is killed and resumed until it finishes, then started again, until the number of kills is reached. Two runs
alternate: one on documents, with dropout, gradient accumulation and several epochs, and one on a recall task with a
curriculum. After every kill, the newest undamaged checkpoint must be at least as new as after the previous kill. At the
end of a run, losses, weights, optimizer state, memory, random states, data cursor and evaluation must equal those of
the uninterrupted run bit for bit. Processes are forked from one that has loaded torch, so a restart takes no import
time. Linux only.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from memformer.cli.main import main as memformer
from memformer.data import CurriculumConfig, RecallConfig
from memformer.errors import CheckpointError
from memformer.training.config import DataConfig, RunConfig, TrainingConfig
from memformer.training.logs import read_log
from memformer.training.run_folder import newest_checkpoint
from memformer.utils.files import read_json
from tests.training.runs import checkpoint_of, run_config, saved_tensors, write_documents

NUM_UPDATES = 40


def main() -> int:
    """Run until the number of kills is reached; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        write_documents(base / "texts")
        runs = {"documents": document_run(base), "curriculum": curriculum_run(base)}
        seconds = {kind: run_unbroken(base, kind, config) for kind, config in runs.items()}
        kills, whole_runs, while_saving, losses = 0, 0, 0, []
        started = time.monotonic()
        while kills < options.kills:
            for kind, config in runs.items():
                killed, saving, lost = run_killed(base, kind, config, seconds[kind], times)
                kills, while_saving, whole_runs = kills + killed, while_saving + saving, whole_runs + 1
                losses += lost
                print(f"{kind}: {killed} kills ({saving} while saving), {len(lost)} losses; {kills} so far", flush=True)
    for loss in losses:
        print(f"LOST: {loss}")
    print(
        f"{kills} kills, {while_saving} of them while a checkpoint was written, in {whole_runs} runs; "
        f"{len(losses)} losses; {time.monotonic() - started:.0f} s"
    )
    return 1 if losses else 0


def document_run(base: Path) -> RunConfig:
    """Return the config of a run on documents with dropout, two rollouts per update and several epochs."""
    return run_config(base, "documents", num_updates=NUM_UPDATES, evaluate_every=10, save_every=2, keep_checkpoints=2)


def curriculum_run(base: Path) -> RunConfig:
    """Return the config of a run on a recall task with a curriculum."""
    # Every loss is below this threshold, so the curriculum advances within the few updates.
    recall = RecallConfig(
        task="fact", num_values=4, max_distance=8, curriculum=CurriculumConfig(advance_below=10.0, window=5)
    )
    training = TrainingConfig(
        num_updates=NUM_UPDATES,
        num_lanes=4,
        rollout_length=6,
        warmup_updates=3,
        log_every=1,
        evaluate_every=20,
        sample_tokens=0,
        save_every=3,
    )
    return RunConfig(
        folder=str(base / "curriculum"),
        threads=1,
        device="cpu",
        model=run_config(base).model,
        data=DataConfig(recall=recall, cache=str(base / "cache")),
        training=training,
    )


def start(arguments: list[str]) -> int:
    """Run the command in a forked process; return the process id."""
    child = os.fork()
    if child:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    status = 70
    try:
        status = memformer(arguments)
    finally:
        os._exit(status)


def run_unbroken(base: Path, kind: str, config: RunConfig) -> float:
    """Make the uninterrupted run; return its duration in seconds."""
    file = base / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    started = time.monotonic()
    _, status = os.waitpid(start(["train", str(file), "--folder", str(base / f"{kind}-unbroken")]), 0)
    if status:
        sys.exit(f"the uninterrupted run ended with status {status}")
    return time.monotonic() - started


def run_killed(
    base: Path, kind: str, config: RunConfig, seconds: float, times: random.Random
) -> tuple[int, int, list[str]]:
    """Kill and resume a run until it finishes; return the kills, the kills while saving, and the losses."""
    folder = Path(config.folder)
    shutil.rmtree(folder, ignore_errors=True)
    kills, while_saving, lost, safe = 0, 0, [], None
    while True:
        resume = ["--resume"] if newest_whole(folder) else []
        started = time.time()
        child = start(["train", str(base / f"{kind}.yaml"), *resume])
        # A third of the kills waits until a checkpoint is being written, because few would hit this time by chance.
        checkpoints = folder / "checkpoints"
        saving = partial(is_saving, checkpoints, started)
        until = saving if times.random() < 1 / 3 else (lambda: True)
        is_over, status = wait(child, until, least=times.uniform(0, 0.7 * seconds))
        if is_over:
            if status:
                lost.append(f"{kind}: resumed after kill {kills}, the run ended with status {status}")
            break
        kills += 1
        while_saving += saving()
        newest = newest_whole(folder)
        if safe is not None and (newest is None or newest < safe):
            lost.append(f"{kind}: kill {kills} lost checkpoint {safe}; the newest undamaged one is {newest}")
        safe = newest
    if not lost:
        lost += differences(folder, base / f"{kind}-unbroken", kind)
    return kills, while_saving, lost


def wait(child: int, until: Callable[[], bool], *, least: float) -> tuple[bool, int]:
    """Wait at least `least` seconds and then until `until()` is true, and kill the process.

    Returns:
        Whether the process had ended by itself, and its status.
    """
    deadline = time.monotonic() + least
    while time.monotonic() < deadline or not until():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return True, status
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status), status


def is_saving(checkpoints: Path, since: float) -> bool:
    """Whether a checkpoint was being written after the time `since`; older partial folders do not count."""
    for leftover in checkpoints.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if leftover.stat().st_mtime >= since:
                return True
    return False


def newest_whole(folder: Path) -> str | None:
    """Return the name of the newest undamaged checkpoint, if any."""
    try:
        return newest_checkpoint(folder).name
    except CheckpointError:
        return None


def differences(folder: Path, unbroken: Path, kind: str) -> list[str]:
    """Return the differences between a run and the uninterrupted run."""
    found = [] if logged_values(folder) == logged_values(unbroken) else [f"{kind}: the log differs"]
    ours, theirs = (saved_tensors(checkpoint_of(each, NUM_UPDATES)) for each in (folder, unbroken))
    if ours.keys() != theirs.keys():
        return [*found, f"{kind}: the names of the saved tensors differ"]
    found += [f"{kind}: {name} differs" for name in ours if not torch.equal(ours[name], theirs[name])]
    if progress_of(folder) != progress_of(unbroken):
        found.append(f"{kind}: the counters or the data cursor differ")
    if evaluation_of(folder) != evaluation_of(unbroken):
        found.append(f"{kind}: the evaluation differs")
    return found


def evaluation_of(folder: Path) -> list[str]:
    """Return the lines of the evaluation, without those about peak memory."""
    lines = (folder / "evaluation.json").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "peak_memory_bytes" not in line]


def logged_values(folder: Path) -> object:
    """Return the entries of the log, without times, speeds and peak memory."""
    timing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    return [{key: value for key, value in line.items() if key not in timing} for line in read_log(folder)]


def progress_of(folder: Path) -> dict[str, object]:
    """Return the counters and the data cursor, without the training time."""
    progress: dict[str, object] = read_json(checkpoint_of(folder, NUM_UPDATES) / "progress.json")["progress"]
    return {key: value for key, value in progress.items() if key != "seconds"}


if __name__ == "__main__":
    sys.exit(main())
