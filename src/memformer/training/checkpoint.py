"""Checkpoints: folders that appear whole or not at all, are checked when read, and hold all a run needs to go on."""

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
from memformer.training.randomness import RandomState, capture_randomness, restore_randomness
from memformer.utils.files import read_json, read_tensors, sync_folder, write_json, write_tensors

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
STATE_FILE = "state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# In place of the optimizer's file: what several processes wrote of it, each its share.
MOMENTS = "moments"

_LISTED_FILES = {CONFIG_FILE, WEIGHTS_FILE, STATE_FILE, PROGRESS_FILE}
_SHARE = re.compile(MOMENTS + r"/[\w.-]{1,100}\.safetensors")


@dataclass
class TrainingState:
    """Everything that changes while a run goes on.

    Attributes:
        model: The weights.
        optimizer: Its moments; what its groups say comes from the config.
        memory: (B, K, D), the memory each lane carries into the next rollout.
        progress: JSON values: counters, the data cursor, the best result so far.
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
    moments: Path | None = None,
) -> None:
    """Write a checkpoint folder: aside, made durable, then renamed into place.

    Args:
        folder: Where it will stand.
        state: What is saved, with the memory of all lanes.
        randomness: The random generators' state of every process; this one's if not given.
        moments: A folder that `save_moments` has written beside, which is moved in; None saves the optimizer's own.

    Raises:
        SaveError: Writing failed; no folder appears, and what was there before is intact.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        state.model.save_pretrained(partial)
        if moments is None:
            write_tensors(partial / OPTIMIZER_FILE, _optimizer_tensors(state.optimizer))
        else:
            moments.rename(partial / MOMENTS)
            sync_folder(partial / MOMENTS)
        tensors = {"memory": state.memory}
        for rank, (cpu_state, cuda_state) in enumerate(randomness or [capture_randomness(state.memory.device)]):
            tensors[_of_process("cpu_randomness", rank)] = cpu_state
            if cuda_state is not None:
                tensors[_of_process("cuda_randomness", rank)] = cuda_state
        write_tensors(partial / STATE_FILE, tensors)
        write_json(partial / PROGRESS_FILE, {"progress": state.progress})
        written = sorted(file for file in partial.rglob("*") if file.is_file())
        files = {file.relative_to(partial).as_posix(): _description(file) for file in written}
        write_json(partial / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": files})
        sync_folder(partial)
        if folder.exists():
            # Only a run that was resumed from before this checkpoint comes here again.
            shutil.rmtree(folder)
        partial.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are intact") from error
    except SaveError as error:
        raise SaveError(f"cannot write checkpoint {folder}: {error}; earlier checkpoints are intact") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_checkpoint(folder: Path) -> None:
    """Check that every file of a checkpoint is there and has not changed.

    Raises:
        CheckpointError: A file is missing, has another size or checksum, or the format is another version.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format_version')!r}; this memformer reads {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not _are_of_a_checkpoint(files.keys()):
        raise CheckpointError(f"{folder / MANIFEST_FILE} does not list the files of a checkpoint")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is damaged")
        if expected != _description(file):
            raise CheckpointError(f"{file} has changed since it was written; the checkpoint is damaged")


def _are_of_a_checkpoint(names: Iterable[str]) -> bool:
    """Whether these are a checkpoint's files and no other: a damaged name must not be looked for."""
    optimizer = set(names) - _LISTED_FILES
    are_shares = bool(optimizer) and all(_SHARE.fullmatch(name) for name in optimizer)
    return set(names) >= _LISTED_FILES and (optimizer == {OPTIMIZER_FILE} or are_shares)


def _of_process(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def load_checkpoint(folder: Path, state: TrainingState, *, rank: int = 0) -> None:
    """Put a training state back to where the checkpoint was made, the random generators included.

    Args:
        folder: The checkpoint.
        state: What is put back; its memory is that of all lanes.
        rank: Which process's random generators to put back; as they are where the checkpoint has none of it.

    Raises:
        CheckpointError: The checkpoint is damaged, or belongs to another model.
    """
    # Here, for it is slow to import, and reading the checkpoints of a run needs none of it.
    from memformer.training.sharding import is_sharded, load_moments, scatter_weights

    check_checkpoint(folder)
    if is_sharded(state.model):
        scatter_weights(state.model, read_weights(state.model, folder / WEIGHTS_FILE))
    else:
        load_weights(state.model, folder / WEIGHTS_FILE)
    saved = read_json(folder / PROGRESS_FILE)
    if (folder / MOMENTS).is_dir():
        load_moments(folder / MOMENTS, state.model, state.optimizer)
    else:
        _load_optimizer(state.optimizer, read_tensors(folder / OPTIMIZER_FILE))
    tensors = read_tensors(folder / STATE_FILE)
    if tensors["memory"].shape != state.memory.shape:
        raise CheckpointError(
            f"{folder} carries memory of shape {tuple(tensors['memory'].shape)}; "
            f"this run's is {tuple(state.memory.shape)}"
        )
    device = state.memory.device
    state.memory = tensors["memory"].to(device)
    state.progress = saved["progress"]
    cpu_state = tensors.get(_of_process("cpu_randomness", rank))
    cuda_state = tensors.get(_of_process("cuda_randomness", rank))
    if cpu_state is not None:
        restore_randomness((cpu_state, cuda_state if device.type == "cuda" else None), device=device)


def checkpoints_newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders of a run, whole or damaged, the newest first."""
    found = [path for path in folder.glob("update-*") if path.is_dir()]
    yield from sorted(found, key=lambda path: path.name, reverse=True)


def checkpoint_name(num_updates: int) -> str:
    """Return the folder name of a checkpoint made after so many updates; names sort by age."""
    return f"update-{num_updates:09d}"


def prune_checkpoints(newest: Path, *, keep: int) -> None:
    """Delete the checkpoints before `newest`, except the last `keep` including it.

    Later ones can only be damaged: a run that went on from before them will write them anew.
    """
    until_now = [path for path in checkpoints_newest_first(newest.parent) if path.name <= newest.name]
    for path in until_now[keep:]:
        shutil.rmtree(path)


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
    # The groups are the config's: what it says now about decay and betas holds from here on.
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _description(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def canonical(value: Any) -> Any:
    """Return a value as JSON would give it back, so that what was saved and what is asked for can be compared."""
    return json.loads(json.dumps(value))
