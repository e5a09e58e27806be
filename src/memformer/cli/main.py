"""Entry point of the `memformer` command: dispatch to a subcommand and map errors to exit statuses.

Results go to stdout, progress and warnings to stderr. Exit statuses: 0 for success; 1 if `memformer score` found lines
above its threshold; 2 for an invalid input, explained in one line on stderr; 128 + the signal's number for an
interrupted run, which saves a checkpoint first.

A module that is slow to import (sharding and plots take 1.5 seconds) and needed by one command only is imported inside
that command. The other commands, the help and the error messages then start sooner.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from memformer.cli.compare import run_compare
from memformer.cli.evaluate import run_evaluate
from memformer.cli.export import run_export
from memformer.cli.generate import run_generate
from memformer.cli.inspection import run_inspect
from memformer.cli.report import run_report
from memformer.cli.reproduce import run_reproduce
from memformer.cli.retention import run_retention
from memformer.cli.score import run_score
from memformer.cli.train import run_train
from memformer.errors import InputError
from memformer.training.processes import exit_process
from memformer.utils.machine import device_memory_explained, version_of
from memformer.utils.signals import Interrupted

_MORE_MEMORY = {"evaluate": "Lower --num_lanes, or use --device cpu"}
USAGE = """usage: memformer COMMAND ...

Train and use sequence models that read arbitrarily long input with a memory of fixed size (arXiv 2010.06891).

  memformer train CONFIG.yaml [--key value ...]   train a model, or continue training with --resume
  memformer evaluate RUN                          perplexity and bits per byte, with the memory intact and erased
  memformer retention RUN                         accuracy or memory gain against the age of the information
  memformer inspect RUN                           a page that shows what the memory holds and where it helps
  memformer generate RUN                          continue a prompt of any length, or sample images
  memformer score RUN FILE                        how surprising is each line of a text or a log?
  memformer export RUN --hf|--onnx FOLDER         write a folder for Hugging Face transformers, or ONNX graphs
  memformer report RUN                            write an HTML summary of a run
  memformer compare RUN RUN ...                   a table and a plot of several runs
  memformer reproduce TABLE                       train and write one of the paper's tables

RUN is a run folder, written by `memformer train`. `memformer COMMAND --help` explains a command, with examples.
"""


def entry_point() -> None:
    """Run the command with the process's arguments and exit with its status.

    SIGTERM unwinds the stack, as Ctrl-C does, so that unfinished files are deleted.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    exit_process(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    prepare_streams()
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is still reported as such
    except InputError as error:
        return _refuse(str(error))
    except Interrupted as interrupted:
        print(f"memformer: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of stdout closed the pipe (`| head`). This is no error, and nothing more can be printed.
        sys.stderr.close()
        return 141
    except OSError as error:
        # Files written by `memformer.utils.files` raise SaveError. Others do not, for example the log on a full disk.
        return _refuse(str(error))
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    return status


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"memformer {version_of('memformer-lm')}")
        return 0
    with device_memory_explained(_MORE_MEMORY.get(argv[0], "Use --device cpu")):
        return _handler(argv[0])(list(argv[1:])) or 0


def prepare_streams() -> None:
    """Make stdout and stderr accept every text: what their encoding lacks is printed as a question mark.

    Streams that were closed before the start are opened on the null device. Otherwise the next file that is opened
    would take their place, and output of libraries would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _handler(command: str) -> Callable[[list[str]], int | None]:
    handlers: dict[str, Callable[[list[str]], int | None]] = {
        "train": run_train,
        "evaluate": run_evaluate,
        "retention": run_retention,
        "inspect": run_inspect,
        "generate": run_generate,
        "score": run_score,
        "export": run_export,
        "report": run_report,
        "compare": run_compare,
        "reproduce": run_reproduce,
    }
    if command not in handlers:
        raise InputError(f"unknown command {command!r}; the commands are {', '.join(handlers)}")
    return handlers[command]


def _refuse(message: str) -> int:
    # Messages from libraries may have several lines; an error is printed as one line.
    print(f"memformer: error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return 2
