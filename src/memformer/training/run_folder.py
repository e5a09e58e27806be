"""Run folders: writing the config, finding checkpoints, and loading a trained run."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memformer.data import ByteTokenizer, Tokenizer, load_tokenizer
from memformer.data.document_end import stop_tokens_of
from memformer.data.tokenizer_training import has_tokenizer
from memformer.errors import CheckpointError, InputError
from memformer.generation.session import Session
from memformer.models import LanguageModel, load_model
from memformer.models.hugging_face import find_model_folder
from memformer.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from memformer.training.checkpoint import check_checkpoint, checkpoints_newest_first, is_checkpoint_name
from memformer.training.processes import Processes
from memformer.training.trackers import TRACKERS_FILE
from memformer.utils.checks import Integer, check_choice
from memformer.utils.files import saving, write_json, write_text
from memformer.utils.machine import versions
from memformer.utils.ownership import owned_folder
from memformer.utils.renames import old_names_sentence, run_config_with_first_defaults, update_run_config
from memformer.utils.yaml_files import parse_yaml, to_yaml

RUN_CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
SAMPLES = "samples"
TRAIN_LOG = "train.log"
LOG_FILE = "log.jsonl"
RESULT_FILE = "evaluation.json"

_CHECKSUM = "# sha256 of the lines below; to change them by hand, delete this line: "


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with its tokenizer and config.

    Attributes:
        folder: The folder passed to `load_run`.
        model: The model with its weights, in evaluation mode.
        tokenizer: The run's tokenizer.
        weights: The folder from which the weights were loaded.
        run_config: The run's resolved config as plain values. None: the folder was written by `save_pretrained`.
    """

    folder: Path
    model: LanguageModel
    tokenizer: Tokenizer
    weights: Path
    run_config: dict[str, Any] | None

    def session(self, *, batch_size: Integer = 1, compiled: bool = False) -> Session:
        """Return a new session of the model, which stops by itself at the end-of-document token, if any.

        Raises:
            InputError: As `Session`.
        """
        return Session(self.model, batch_size=batch_size, compiled=compiled, stop_token_ids=self.stop_token_ids)

    def load_session(self, path: str | Path, *, compiled: bool = False) -> Session:
        """Return a saved session, which stops by itself like one from `session`.

        Raises:
            CheckpointError: As `Session.load`.
        """
        return Session.load(path, model=self.model, compiled=compiled, stop_token_ids=self.stop_token_ids)

    @property
    def stop_token_ids(self) -> list[int]:
        """The end-of-document token of the tokenizer, or nothing."""
        return stop_tokens_of(self.tokenizer)


def remove_remains(folder: Path) -> None:
    """Delete what a run without checkpoints has left in its folder, so that the new run there does not inherit it.

    Raises:
        SaveError: It cannot be deleted.
    """
    with saving(folder):
        if (folder / BEST).exists():
            shutil.rmtree(folder / BEST)
        for file in [folder / TRACKERS_FILE, *(folder / SAMPLES).glob("*")]:
            if file.name == TRACKERS_FILE or is_checkpoint_name(file.stem):
                file.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Delete the unfinished checkpoints and weights of a run that was killed while it wrote them.

    Raises:
        SaveError: They cannot be deleted.
    """
    checkpoints, best = folder / CHECKPOINTS, folder / BEST
    with saving(folder):
        for unfinished in (
            *checkpoints.glob(".update-*.partial"),
            *checkpoints.glob(".update-*.optimizer_state"),
            *best.glob(".*.partial"),
        ):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink()


def use_float32_on_cpu(model: LanguageModel) -> None:
    """Convert a model that is on a CPU from half precision, in which a CPU computes many times as slowly."""
    if model.device.type == "cpu" and model.memory_dtype != next(model.parameters()).dtype:
        model.float()


def load_run(
    folder: str | Path,
    *,
    which: str = "best",
    device: torch.device | str = "cpu",
    num_slots: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> LoadedRun:
    """Load a run folder, a folder from `save_pretrained`, or a model of the Hugging Face hub.

    `memformer.data.save_tokenizer` adds a tokenizer to a folder from `save_pretrained`. Without a tokenizer, a
    vocabulary of 256 tokens is assumed to be bytes.

    Args:
        folder: The folder, or the name of a model on the hub, `owner/name` or `owner/name@revision`.
        which: Weights of a run: "best" on the held-out data, or "last". Ignored for a folder from `save_pretrained`.
        device: Device to load the model onto.
        num_slots: Number of memory slots to use; for models with `exchangeable_slots` only. None: as trained.
        warn: Called with a message for each damaged checkpoint that is skipped, for a missing tokenizer, and for names
            from version 0.1.

    Raises:
        InputError: The folder does not exist or is of neither kind, the model cannot be downloaded or does not
            support `num_slots`, the tokenizer is missing and the vocabulary is not bytes, or the device is unknown or
            not available.
        CheckpointError: A file in the folder is damaged or missing.
    """
    folder = find_model_folder(folder)
    weights, run_config = find_weights(folder, which=which, warn=warn)
    model = load_model(weights, device=device, num_slots=num_slots)
    is_bare = run_config is None and not has_tokenizer(folder)
    tokenizer = _bytes_for(folder, model, warn) if is_bare else load_tokenizer(folder)
    if tokenizer.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, but a model with a vocabulary of "
            f"{model.vocab_size}"
        )
    return LoadedRun(folder, model, tokenizer, weights, run_config)


def find_weights(
    folder: Path, *, which: str = "best", warn: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder of the weights of a run or saved model, and the config of the run, if it is one.

    Raises:
        InputError: The folder does not exist or is of neither kind, or `which` is neither "best" nor "last".
        CheckpointError: The run has no such weights, or its config is damaged.
    """
    check_choice("which", which, ("best", "last"))
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a run folder or a folder from save_pretrained is needed")
    run_config = None
    weights = folder
    if (folder / RUN_CONFIG_FILE).is_file():
        run_config = read_run_config(folder, warn=warn)
        weights = folder / BEST if which == "best" else newest_checkpoint(folder, warn=warn)
        if not (weights / CONFIG_FILE).is_file():
            has_checkpoint = any(checkpoints_newest_first(folder / CHECKPOINTS))
            now = "; try the last checkpoint instead of the best" if has_checkpoint else ", and no checkpoint"
            raise CheckpointError(f"{folder} has no evaluated weights yet{now}")
    elif not (folder / CONFIG_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{folder} contains neither {RUN_CONFIG_FILE} nor {CONFIG_FILE}: it is not a run folder or a saved model"
        )
    return weights, run_config


def _bytes_for(folder: Path, model: LanguageModel, warn: Callable[[str], None] | None) -> Tokenizer:
    tokenizer = ByteTokenizer()
    if model.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{folder} has no tokenizer for its vocabulary of {model.vocab_size} tokens; "
            "memformer.data.save_tokenizer writes one beside the weights"
        )
    if warn is not None:
        warn(f"{folder} has no tokenizer: its {model.vocab_size} token ids are read as bytes")
    return tokenizer


def read_run_config(folder: Path, *, warn: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return a run's resolved config as plain values; the checksum in its first line is verified if present.

    Args:
        folder: The run folder.
        warn: Called with a message if the config uses names from version 0.1 and was not written by a run.

    Raises:
        CheckpointError: The config is missing or damaged.
        InputError: A value from version 0.1 is no longer supported.
    """
    file = folder / RUN_CONFIG_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    first, _, rest = text.partition("\n")
    if first.startswith(_CHECKSUM) and first != _checksum_line(rest):
        raise CheckpointError(
            f"{file} is damaged or was changed: its content does not match the checksum in its first line; "
            "if you edited it by hand, delete the first line"
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise CheckpointError(f"{file} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not contain a config: it must be a mapping of keys to values")
    return with_current_names(value, file, warn=warn)


def with_current_names(
    value: Mapping[str, Any], file: Path, *, warn: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Return the config in a file under the current names; `warn` is called with a message about a user's old names.

    Raises:
        InputError: A value from version 0.1 is no longer supported.
    """
    config, notes = update_run_config(value)
    if is_written_by_run(file):
        return run_config_with_first_defaults(config)
    if notes and warn is not None:
        warn(old_names_sentence(str(file), notes))
    return config


def write_run_config(folder: Path, fields: dict[str, Any]) -> None:
    """Write the resolved config, with a checksum as a comment, and the versions of the installed packages.

    Raises:
        SaveError: Writing failed.
    """
    text = to_yaml(fields)
    write_text(folder / RUN_CONFIG_FILE, f"{_checksum_line(text)}\n{text}")
    write_json(folder / VERSIONS_FILE, versions())


def _checksum_line(text: str) -> str:
    return _CHECKSUM + hashlib.sha256(text.encode()).hexdigest()


def newest_checkpoint(folder: Path, *, warn: Callable[[str], None] | None = None) -> Path:
    """Return the newest undamaged checkpoint; `warn` is called with a message for each damaged one.

    Raises:
        CheckpointError: There is no undamaged checkpoint; the message describes the damage of the newest one.
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
        raise CheckpointError(f"{folder} has no undamaged checkpoint: {first_error}") from first_error
    raise CheckpointError(f"{folder} has no checkpoint yet; there is nothing to resume from")


def check_run_folder(folder: Path) -> None:
    """Check that a folder can be used as a run folder: it is new, empty, or already a run folder.

    Raises:
        InputError: It is a file, or contains other files.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder ({folder}) is a file; a run needs a folder")
    if not folder.exists() or is_written_by_run(folder / RUN_CONFIG_FILE):
        return
    # `memformer reproduce` writes train.log.
    foreign = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".") and file.name != TRAIN_LOG)
    if foreign:
        raise InputError(
            f"folder ({folder}) contains {foreign[0]!r} but no run; choose an empty or a new folder for the run"
        )


def is_written_by_run(file: Path) -> bool:
    """Return whether a config was written by a run: a user's config may have the same name."""
    if file.name == RUN_CONFIG_FILE and any((file.parent / name).exists() for name in (VERSIONS_FILE, CHECKPOINTS)):
        return file.exists()
    try:
        with file.open("rb") as opened:
            return opened.read(len(_CHECKSUM)) == _CHECKSUM.encode()
    except OSError:
        return False


@contextlib.contextmanager
def owned_run_folder(folder: Path, *, processes: Processes) -> Iterator[None]:
    """Own a run folder, which is created if missing; of several processes of a run, the first owns it.

    Yields:
        Nothing.

    Raises:
        InputError: The folder is not usable as a run folder, or another process owns it.
        SaveError: The folder cannot be written.
    """
    with contextlib.ExitStack() as ownership:

        def own() -> None:
            check_run_folder(folder)
            ownership.enter_context(owned_folder(folder, option="--folder"))

        processes.do_in_first(own)
        yield
