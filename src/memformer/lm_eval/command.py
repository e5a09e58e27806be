"""The harness's command line with the model `memformer` and the task pack."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from memformer.errors import InputError
from memformer.lm_eval.tasks import DATA_VARIABLE
from memformer.lm_eval.versions import check_lm_eval
from memformer.utils.files import user_path

PACK = Path(__file__).parent / "pack"


def main(argv: Sequence[str]) -> int:
    """Run `lm_eval` with these arguments, and return the exit status: 2 for an invalid input, otherwise 0.

    `--data FOLDER` names the folder with the data of the task pack. All other arguments are those of `lm_eval`.
    """
    own = argparse.ArgumentParser("python -m memformer.lm_eval", add_help=False, allow_abbrev=False)
    own.add_argument("--data")
    options, rest = own.parse_known_args(argv)
    try:
        check_lm_eval()
        if options.data is not None:
            os.environ[DATA_VARIABLE] = str(_check_data(options.data))
        _run(rest)
    except InputError as error:
        print(f"memformer: error: {error}", file=sys.stderr)
        return 2
    return 0


def _check_data(name: str) -> Path:
    folder = user_path(name).absolute()
    if not folder.is_dir():
        raise InputError(f"--data ({name}) is not a folder")
    return folder


def _run(argv: list[str]) -> None:
    # Imported here because it takes seconds: a wrong --data is reported at once.
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    from memformer.lm_eval import backend  # noqa: F401  importing it registers the model with the harness

    setup_logging()
    sys.argv = ["python -m memformer.lm_eval", *argv]
    command = HarnessCLI()
    arguments = command.parse_args()
    config = getattr(arguments, "config", None)
    given = EvaluatorConfig.load_yaml_config(config) if config else {}
    if hasattr(arguments, "include_path"):
        # The harness reads several folders of tasks, although its option names one.
        own = arguments.include_path or given.get("include_path")
        arguments.include_path = [str(PACK), *([own] if own else [])]
    names_device = given.get("device") or getattr(arguments, "device", None)
    if "memformer" in {given.get("model"), getattr(arguments, "model", None)} and not names_device:
        arguments.device = "auto"  # the harness's default is cuda:0
    try:
        command.execute(arguments)
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise InputError(str(error)) from error
