"""A run folder: where everything about one run lands, and where it is found again."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from memformer.data import ByteTokenizer, Tokenizer, load_tokenizer
from memformer.data.tokenizer_training import has_tokenizer
from memformer.errors import CheckpointError, InputError
from memformer.models import LanguageModel, load_model
from memformer.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from memformer.training.checkpoint import check_checkpoint, checkpoints_newest_first
from memformer.utils.files import write_json, write_text
from memformer.utils.machine import versions
from memformer.utils.yaml_files import parse_yaml

RUN_CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
SAMPLES = "samples"
RESULT_FILE = "evaluation.json"

_CHECKSUM = "# sha256 of the lines below; to change them by hand, delete this line: "


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what is needed to use it.

    Attributes:
        folder: The folder that was asked for.
        model: The weights, in evaluation mode.
        tokenizer: The run's tokenizer.
        weights: The folder the weights came from.
        run_config: The run's resolved config as plain values; None for a folder from `save_pretrained`.
    """

    folder: Path
    model: LanguageModel
    tokenizer: Tokenizer
    weights: Path
    run_config: dict[str, Any] | None


def load_run(
    folder: Path,
    *,
    which: str = "best",
    device: torch.device | str = "cpu",
    num_slots: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> LoadedRun:
    """Load a run folder, or a folder from `save_pretrained`.

    The latter has a tokenizer beside the weights where `memformer.data.save_tokenizer` put one; without it, 256 token
    ids are taken for bytes.

    Args:
        folder: The folder.
        which: "best" on held-out documents, or "last"; a folder from `save_pretrained` has only itself.
        device: Where the model goes.
        num_slots: Memory slots to run with, in place of those trained with; for a model of `exchangeable_slots`.
        warn: Told of damaged checkpoints that are skipped, and of a tokenizer that is not there.

    Raises:
        InputError: The folder does not exist or is neither kind, the model cannot have so many slots, or it has no
            tokenizer and other ids than bytes.
        CheckpointError: What it holds is damaged or incomplete.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a run folder or a folder from save_pretrained is needed")
    run_config = None
    weights = folder
    if (folder / RUN_CONFIG_FILE).is_file():
        run_config = read_run_config(folder)
        weights = folder / BEST if which == "best" else newest_checkpoint(folder, warn=warn)
        if not weights.is_dir():
            raise CheckpointError(f"{folder} holds no evaluated model yet; try the last checkpoint instead of the best")
    elif not (folder / CONFIG_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{folder} holds neither {RUN_CONFIG_FILE} nor {CONFIG_FILE}: it is not a run or a saved model"
        )
    model = load_model(weights, device=device, num_slots=num_slots)
    is_bare = run_config is None and not has_tokenizer(folder)
    tokenizer = _bytes_for(folder, model, warn) if is_bare else load_tokenizer(folder)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, its model a vocabulary of {model.vocab_size}"
        )
    return LoadedRun(folder, model, tokenizer, weights, run_config)


def _bytes_for(folder: Path, model: LanguageModel, warn: Callable[[str], None] | None) -> Tokenizer:
    tokenizer = ByteTokenizer()
    if model.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{folder} has no tokenizer for its vocabulary of {model.vocab_size} tokens; "
            "memformer.data.save_tokenizer writes one beside the weights"
        )
    if warn is not None:
        warn(f"{folder} has no tokenizer: its {model.vocab_size} token ids are taken for bytes")
    return tokenizer


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return a run's resolved config as plain values, checked where its first line is a checksum.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    file = folder / RUN_CONFIG_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    first, _, rest = text.partition("\n")
    if first.startswith(_CHECKSUM) and first != _checksum_line(rest):
        raise CheckpointError(
            f"{file} is damaged or was changed: its lines do not have the checksum that the first one says; "
            "if they were changed by hand, delete the first line"
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a config")
    return value


def write_run_config(folder: Path, fields: dict[str, Any]) -> None:
    """Write the resolved config, with a checksum as a comment, and the versions it runs with.

    Raises:
        SaveError: Writing failed.
    """
    text = yaml.safe_dump(fields, sort_keys=False)
    write_text(folder / RUN_CONFIG_FILE, f"{_checksum_line(text)}\n{text}")
    write_json(folder / VERSIONS_FILE, versions())


def _checksum_line(text: str) -> str:
    return _CHECKSUM + hashlib.sha256(text.encode()).hexdigest()


def newest_checkpoint(folder: Path, *, warn: Callable[[str], None] | None = None) -> Path:
    """Return the newest checkpoint that is whole; damaged ones are named to `warn` and skipped.

    Raises:
        CheckpointError: There is none; the damage of the newest one is named.
    """
    first_error: CheckpointError | None = None
    for checkpoint in checkpoints_newest_first(folder / CHECKPOINTS):
        try:
            check_checkpoint(checkpoint)
        except CheckpointError as error:
            first_error = first_error or error
            if warn is not None:
                warn(f"skipped a damaged checkpoint: {error}")
        else:
            return checkpoint
    if first_error is not None:
        raise CheckpointError(f"{folder} has no whole checkpoint: {first_error}") from first_error
    raise CheckpointError(f"{folder} has no checkpoint yet; there is nothing to go on from")


def check_run_folder(folder: Path) -> None:
    """Check, before anything is prepared, that a run may have a folder: it is new, empty, or one of a run.

    Raises:
        InputError: It is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a run needs a folder")
    if not folder.exists() or (folder / RUN_CONFIG_FILE).exists():
        return
    # What a run left that stopped while it began, and hidden files, do no harm.
    foreign = sorted(
        file.name for file in folder.iterdir() if not file.name.startswith((".", "tokenizer", "train.log"))
    )
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]!r} and no run; choose an empty folder or a new name for the run")
