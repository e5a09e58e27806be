"""Jobs of several processes as `torchrun` starts them, but forked from a server that has already imported torch."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch._dynamo  # this import and those below are for the server: a process of a job imports nothing any more
import torch.distributed as dist

import memformer.cli.train  # noqa: F401
import memformer.training.loop  # noqa: F401
import memformer.training.report  # noqa: F401
import memformer.training.sharding  # noqa: F401
from memformer.cli.main import entry_point
from memformer.cli.run_config import train_parser

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])
train_parser()  # which takes a second, and is kept
_SECONDS_AT_MOST = 240.0


class Done(NamedTuple):
    """A job that has ended.

    Attributes:
        status: Exit status of the process that failed first; 0 if none did.
        output: What its processes printed.
    """

    status: int
    output: str


def train(*arguments: object, restarts: int = 0) -> Done:
    """Run `memformer train` in two processes, which must not fail; `restarts` times they have died before."""
    done = run_job(run_command, "train", *map(str, arguments), restarts=restarts)
    assert done.status == 0, done.output
    return done


def run_command(*arguments: str) -> None:
    """Run the command in a process of a job."""
    sys.argv = ["memformer", *arguments]
    entry_point()


def forked(command, *, stdout, stderr):
    """Run `python -m memformer ...` as `subprocess.Popen` does, without the time that Python takes to start."""

    def wait():
        done = run_job(run_command, *command[3:], count=1)
        stdout.write(done.output)
        stdout.flush()
        return done.status

    return SimpleNamespace(wait=wait)


def run_job(target: Callable[..., Any], *arguments: Any, count: int = 2, restarts: int = 0) -> Done:
    """Call `target(*arguments)` in all processes of a job; if one fails, end the others, as `torchrun` does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        processes = [
            _FORKS.Process(target=_run, args=({**environment, "RANK": str(rank)}, output, target, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            status = _wait(processes, output)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return Done(status, output.read_text(encoding="utf-8"))


def _wait(processes: list[Any], output: Path) -> int:
    deadline = time.monotonic() + _SECONDS_AT_MOST
    while time.monotonic() < deadline:
        statuses = [process.exitcode for process in processes]
        if failed := [status for status in statuses if status]:
            return failed[0]
        if None not in statuses:
            return 0
        time.sleep(0.01)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1.0)
    raise TimeoutError(f"the processes of a job did not end:\n{output.read_text(encoding='utf-8')}")


def _run(environment: dict[str, str], output: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR1)  # prints where all threads are
    try:
        target(*arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
