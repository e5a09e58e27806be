"""The command `memformer`: parse, build, call, report.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 2 a mistake that the one line on stderr
explains, 128 + the signal's number if a run was interrupted (it saved a checkpoint first).

What a command alone needs and is slow to import (sharding, plots: a second and a half) it imports itself, so that the
others, help and refusals begin sooner.
"""

import sys
from collections.abc import Callable, Sequence

from memformer.cli.evaluate import run_evaluate
from memformer.cli.generate import run_generate
from memformer.cli.parsing import version
from memformer.cli.report import run_report
from memformer.cli.reproduce import run_reproduce
from memformer.cli.retention import run_retention
from memformer.cli.train import run_train
from memformer.errors import InputError
from memformer.training.processes import exit_process
from memformer.utils.signals import Interrupted

USAGE = """usage: memformer COMMAND ...

Sequence models that read arbitrarily long input with a memory of fixed size (arXiv 2010.06891).

  memformer train CONFIG.yaml [--key value ...]   train a model, or go on with --resume
  memformer evaluate RUN                          perplexity and bits, with the memory and with it erased
  memformer retention RUN                         how long the memory holds, and what old memory is worth
  memformer generate RUN                          continue a text of any length, or draw images
  memformer report RUN                            write a page about a run
  memformer reproduce TABLE                       train and write one of the paper's tables

`memformer COMMAND --help` explains each with examples.
"""


def entry_point() -> None:
    """Run the command with the process's arguments, and exit with its status."""
    exit_process(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"memformer {version()}")
        return 0
    try:
        _handler(argv[0])(list(argv[1:]))
    except InputError as error:
        return _refuse(str(error))
    except Interrupted as interrupted:
        print(f"memformer: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nothing more can be said.
        sys.stderr.close()
        return 141
    except OSError as error:
        # Not a file of ours, those raise SaveError: the log on a full disk, say.
        return _refuse(str(error))
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _handler(command: str) -> Callable[[list[str]], None]:
    handlers = {
        "train": run_train,
        "evaluate": run_evaluate,
        "retention": run_retention,
        "generate": run_generate,
        "report": run_report,
        "reproduce": run_reproduce,
    }
    if command not in handlers:
        raise InputError(f"unknown command {command!r}; the commands are {', '.join(handlers)}")
    return handlers[command]


def _refuse(message: str) -> int:
    # Messages of libraries may have several lines; a mistake is one.
    print(f"memformer: error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return 2
