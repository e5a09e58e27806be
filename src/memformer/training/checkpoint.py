"""Checkpoints: folders with the full training state, written atomically and verified by checksums when loaded."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from memformer.errors import CheckpointError, SaveError
from memformer.models import LanguageModel
from memformer.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_weights
from memformer.training.distributed_tensors import is_sharded
from memformer.training.randomness import RandomState, capture_randomness, restore_randomness
from memformer.utils.files import read_json, read_tensors, sync_file, sync_folder, write_json, write_tensors
from memformer.utils.progress import print_warning

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
STATE_FILE = "state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Replaces OPTIMIZER_FILE if the optimizer state is sharded: a folder with one file per process. Version 0.1 used the
# name "moments".
OPTIMIZER_FOLDER = "optimizer_state"
_OPTIMIZER_FOLDERS = (OPTIMIZER_FOLDER, "moments")

_LISTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, STATE_FILE, PROGRESS_FILE}
# The user may keep other files and folders, such as copies of checkpoints, beside those with these names.
_UPDATE_NAME = re.compile("update-[0-9]{9}")
_SHARD = re.compile(rf"({'|'.join(_OPTIMIZER_FOLDERS)})/[\w.-]{{1,100}}\.safetensors")


@dataclass
class TrainingState:
    """Everything that changes during a run.

    Attributes:
        model: The model with its weights.
        optimizer: The optimizer. Its state is saved; the options of its parameter groups come from the config.
        memory: (B, K, W), the memory that each lane carries into the next rollout.
        progress: JSON values: counters, the position in the data, the best score so far.
    """

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    memory: Tensor
    progress: dict[str, Any]


def save_checkpoint(
    folder: Path,
    state: TrainingState,
    *,
    randomness: Sequence[RandomState] | None = None,
    optimizer_state: Path | None = None,
) -> None:
    """Write a checkpoint atomically: into a temporary folder, synced to disk, then renamed to `folder`.

    Args:
        folder: The checkpoint folder.
        state: The training state, with the memory of all lanes.
        randomness: Random generator states of all processes. None: those of this process.
        optimizer_state: Folder written by `save_optimizer_state`, which is moved into the checkpoint. None: save the
            state of `state.optimizer`.

    Raises:
        SaveError: Writing failed; `folder` is not created, and earlier checkpoints are intact.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        state.model.save_pretrained(partial)
        if optimizer_state is None:
            write_tensors(partial / OPTIMIZER_FILE, _optimizer_tensors(state.optimizer))
        else:
            optimizer_state.rename(partial / OPTIMIZER_FOLDER)
            for file in (partial / OPTIMIZER_FOLDER).iterdir():
                sync_file(file)
            sync_folder(partial / OPTIMIZER_FOLDER)
        tensors = {"memory": state.memory}
        for rank, (cpu_state, cuda_state) in enumerate(randomness or [capture_randomness(state.memory.device)]):
            tensors[_name_for_rank("cpu_randomness", rank)] = cpu_state
            if cuda_state is not None:
                tensors[_name_for_rank("cuda_randomness", rank)] = cuda_state
        write_tensors(partial / STATE_FILE, tensors)
        write_json(partial / PROGRESS_FILE, {"progress": state.progress})
        written = sorted(file for file in partial.rglob("*") if file.is_file())
        files = {file.relative_to(partial).as_posix(): _description(file) for file in written}
        write_json(partial / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": files})
        sync_folder(partial)
        if folder.exists():
            # Reached only if the run was resumed from an earlier checkpoint.
            shutil.rmtree(folder)
        partial.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError, SaveError) as error:
        raise SaveError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are intact") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_checkpoint(folder: Path) -> None:
    """Check that all files of a checkpoint exist and match the manifest.

    Raises:
        CheckpointError: A file is missing or has a wrong size or checksum, or the format version is not supported.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format_version')!r}; this memformer reads {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not _are_checkpoint_files(files.keys()):
        raise CheckpointError(f"{folder / MANIFEST_FILE} does not list the files of a checkpoint")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is damaged")
        try:
            found = _description(file)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        if expected != found:
            raise CheckpointError(f"{file} has changed since it was written; the checkpoint is damaged")


def _are_checkpoint_files(names: Iterable[str]) -> bool:
    """Whether the names are exactly those of a checkpoint's files; a damaged name must not be used as a path."""
    optimizer = set(names) - _LISTED_FILES
    are_shards = bool(optimizer) and all(_SHARD.fullmatch(name) for name in optimizer)
    return set(names) >= _LISTED_FILES and (optimizer == {OPTIMIZER_FILE} or are_shards)


def _name_for_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def load_checkpoint(folder: Path, state: TrainingState, *, rank: int = 0) -> None:
    """Load a checkpoint into a training state, and restore the random generators.

    Args:
        folder: The checkpoint folder.
        state: The state to load into; its memory has all lanes.
        rank: Process whose random generators are restored. If the checkpoint has no state for this rank, the
            generators are not changed.

    Raises:
        CheckpointError: The checkpoint is damaged, or belongs to another model.
    """
    # Imported here because it is slow to import and not needed to list or check checkpoints.
    from memformer.training.sharding import load_optimizer_state, scatter_weights

    check_checkpoint(folder)
    if is_sharded(state.model):
        scatter_weights(state.model, read_weights(state.model, folder / WEIGHTS_FILE))
    else:
        load_weights(state.model, folder / WEIGHTS_FILE)
    saved = read_json(folder / PROGRESS_FILE)
    sharded = [folder / name for name in _OPTIMIZER_FOLDERS if (folder / name).is_dir()]
    if sharded:
        load_optimizer_state(sharded[0], state.model, state.optimizer)
    else:
        _load_optimizer(state.optimizer, read_tensors(folder / OPTIMIZER_FILE))
    tensors = read_tensors(folder / STATE_FILE)
    if tensors["memory"].shape != state.memory.shape:
        raise CheckpointError(
            f"{folder} has lane memory of shape {tuple(tensors['memory'].shape)}; "
            f"this run needs {tuple(state.memory.shape)}"
        )
    device = state.memory.device
    # A copy: tensors of a file are not aligned, and matrix products on a CPU may then be rounded differently.
    state.memory = tensors["memory"].to(device, copy=True)
    state.progress = saved["progress"]
    cpu_state = tensors.get(_name_for_rank("cpu_randomness", rank))
    cuda_state = tensors.get(_name_for_rank("cuda_randomness", rank))
    if cpu_state is not None:
        restore_randomness((cpu_state, cuda_state if device.type == "cuda" else None), device=device)


def checkpoints_newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders of a run, newest first, without checking for damage.

    Folders with other names, for example a user's copies of checkpoints, are left out.
    """
    found = [path for path in folder.glob("*") if is_checkpoint_name(path.name) and path.is_dir()]
    yield from sorted(found, key=lambda path: path.name, reverse=True)


def checkpoint_name(num_updates: int) -> str:
    """Return the folder name of the checkpoint after `num_updates` updates; names sort by age."""
    return f"update-{num_updates:09d}"


def updates_of(checkpoint: Path) -> int:
    """Return the number of updates that the name of a checkpoint, or of its sample, states."""
    return int(checkpoint.name.removeprefix("update-"))


def is_checkpoint_name(name: str) -> bool:
    """Whether `checkpoint_name` returns this name for some number of updates."""
    return _UPDATE_NAME.fullmatch(name) is not None


def prune_checkpoints(newest: Path, *, keep: int) -> None:
    """Delete old checkpoints, except the `keep` newest up to and including `newest`.

    Checkpoints later than `newest` must be damaged, because the run was resumed from an earlier one. They are ignored
    here and will be overwritten. Links, which the run does not create, are not deleted. One that cannot be deleted is
    warned of.
    """
    not_later = [path for path in checkpoints_newest_first(newest.parent) if path.name <= newest.name]
    for path in not_later[keep:]:
        if path.is_symlink():
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            print_warning(f"the old checkpoint {path} cannot be deleted: {error.strerror or error}")


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    from memformer.training.sharding import scatter_like

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = scatter_like(parameters[int(index)], value)
    # The parameter groups come from the current config, so changed weight decay and betas take effect.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _description(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def canonical(value: Any) -> Any:
    """Return a value after a round trip through JSON, so that it can be compared with a saved value."""
    return json.loads(json.dumps(value))
