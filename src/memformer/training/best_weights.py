"""The weights of the best evaluation of a run: when they are saved, and when a resumed run may keep them."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memformer.data import Tokenizer, save_tokenizer
from memformer.errors import CheckpointError
from memformer.evaluation.likelihood import Result
from memformer.models import LanguageModel
from memformer.training.config import TrainingConfig
from memformer.training.run_folder import BEST
from memformer.utils.files import read_json, write_json

UPDATE_FILE = "update.json"


def save_if_best(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, result: Result, *, progress: dict[str, Any]
) -> None:
    """Save the weights of an evaluation, with the tokenizer and the update, if none before was better.

    Args:
        folder: The run folder.
        model: The model that was evaluated.
        tokenizer: Its tokenizer: with it, the folder is a complete model.
        result: The evaluation.
        progress: Progress of the run; its `best_score` is updated.
    """
    best = progress["best_score"]
    # Of equal scores keep the later: when all recall answers are right, the weights can still improve.
    if best is None or not math.isfinite(best) or result.score <= best:
        progress["best_score"] = result.score
        # First: if the process is killed before the end, a resumed run finds a later update, and chooses anew.
        write_json(folder / BEST / UPDATE_FILE, {"update": progress["num_updates"], **result.to_log()})
        model.save_pretrained(folder / BEST)
        save_tokenizer(tokenizer, folder / BEST)


def read_best_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the update and the metrics of the best evaluation of a run; None if it has none, or is an older run.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / BEST / UPDATE_FILE
    if not file.is_file():
        return None
    evaluation = read_json(file)
    if type(evaluation.get("update")) is not int:
        raise CheckpointError(f"{file} has no number of an update")
    return evaluation


def forget_best(
    folder: Path, progress: dict[str, Any], training: TrainingConfig, num_read: Callable[[TrainingConfig], int]
) -> str | None:
    """Forget the best score of a resumed run, in place, if it is not that of weights of this run on these documents.

    Args:
        folder: The run folder.
        progress: Progress of the run.
        training: Training config of the run.
        num_read: Returns the number of tokens that an evaluation reads. It reads the first documents, so other ones
            have another number.

    Returns:
        A warning that gives the reason. None: the score is kept, or a run that goes on as before makes the same
        weights again.
    """
    now = training.evaluation_tokens
    before = progress.get("evaluation_tokens", now)
    progress["evaluation_tokens"] = now
    old, new = (dataclasses.replace(training, evaluation_tokens=tokens) for tokens in (before, now))
    warning = None
    if num_read(old) != num_read(new):
        warning = (
            f"training.evaluation_tokens was {before} and is {now}: scores on other documents cannot be compared, so "
            "the weights of the next evaluation become the best"
        )
    elif not (folder / BEST).exists():
        if progress["best_score"] is not None:
            warning = f"{folder / BEST} is missing; the best weights are chosen from here on"
    else:
        evaluation = read_best_evaluation(folder)
        if evaluation is None or evaluation["update"] <= progress["num_updates"]:
            return None
        # They are of updates after the checkpoint, which are made again, perhaps with other options.
    progress["best_score"] = None
    return warning
