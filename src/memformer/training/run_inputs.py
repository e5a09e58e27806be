"""Identity of a run: its tokenizer and the files of its data, recorded in the run folder and compared later."""

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from memformer.data import SourceConfig, Tokenizer
from memformer.data.corpus import TOKENS_FILE
from memformer.data.files import SourceFile, check_is_file, file_identities, file_status, is_named_by, locate_files
from memformer.data.sources import locate_source_files, pin_revision
from memformer.errors import CheckpointError, InputError
from memformer.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from memformer.training.checkpoint import MANIFEST_FILE, canonical
from memformer.training.config import SOURCES, DataConfig, RunConfig
from memformer.training.run_folder import BEST, CHECKPOINTS, LOG_FILE, RUN_CONFIG_FILE, SAMPLES, TRAIN_LOG
from memformer.utils.files import read_json, user_path, write_json

INPUTS_FILE = "data.json"
_FORMAT_VERSION = 1
_STORIES = ("path", "validation_path")
# Some of what a run and the cache write, by which patterns for data are tried that might read it.
_WRITTEN = (
    LOG_FILE,
    RUN_CONFIG_FILE,
    "summary.html",
    TRAIN_LOG,
    f"{BEST}/{CONFIG_FILE}",
    f"{BEST}/{WEIGHTS_FILE}",
    f"{SAMPLES}/update-000000001.txt",
    f"{CHECKPOINTS}/update-000000001/{MANIFEST_FILE}",
    f"0123456789abcdef/{TOKENS_FILE}",
)

# Keys of the config that say where the files are. They may change when a run resumes: what the files hold may not.
LOCATION_KEYS = frozenset(
    [f"data.{source}.{key}" for source in SOURCES for key in ("path", "name")]
    + [f"data.recall.{key}" for key in _STORIES]
)


def describe_inputs(config: DataConfig, tokenizer: Tokenizer, *, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a run with this data is made from, as JSON values: all files with their SHA-256, and the tokenizer.

    Args:
        config: The data config.
        tokenizer: The run's tokenizer.
        known: An earlier description; a file that has not been touched since is not read again.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    known_files = [] if known is None else [file for files in known["files"].values() for file in files]
    return {
        "format_version": _FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "files": {key: file_identities(files, known_files) for key, files in locate_inputs(config).items()},
    }


class UnchangedInputs:
    """Checks that the files of a run's data stay as they are, from its creation on, while they are read.

    A log that a server still writes would otherwise be recorded with other content than what the run was trained on.

    Args:
        config: The data config.

    Raises:
        InputError: As `locate_inputs`.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._before = _states(config)

    def check(self) -> None:
        """Check that no file has changed.

        Raises:
            InputError: One has.
        """
        now = _states(self._config)
        for place in [*self._before, *now]:
            if now.get(place) != self._before.get(place):
                section, path = place
                raise InputError(
                    f"{section}: {path} changed while it was read; train on a copy of it, so that the run can be "
                    "evaluated and resumed with the same data"
                )


def _states(config: DataConfig) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the size and the time of modification of each file; a new link or mode leaves the content as it is."""
    found = {}
    for section, files in locate_inputs(config).items():
        for file in files:
            status = file_status(file.path)
            check_is_file(file.path)
            found[section, str(file.path)] = status["bytes"], status["modified_ns"]
    return found


def locate_inputs(config: DataConfig) -> dict[str, list[SourceFile]]:
    """Return the local files of a run's data, for each section or key of the config that names any.

    Raises:
        InputError: A path does not exist or contains no file; the message names the option that holds it.
    """
    if _generates_all_text(config):
        return {}
    recall = config.recall
    sources = {key: getattr(config, key) for key in SOURCES}
    stories = {} if recall is None else {f"data.recall.{key}": getattr(recall, key) for key in _STORIES}
    return {
        f"data.{key}": locate_source_files(source, section=f"data.{key}")
        for key, source in sources.items()
        if source is not None
    } | {key: locate_files(path, option=key) for key, path in stories.items() if path is not None}


def check_apart(config: DataConfig, folder: Path) -> None:
    """Check that neither the run folder nor the cache lies where the data is read, of which it would become a part.

    Args:
        config: The data config.
        folder: The run folder.

    Raises:
        InputError: One lies in a folder of the data, and is not hidden there, or a pattern matches what is written.
    """
    if _generates_all_text(config):
        return
    written = {"--folder": folder} | ({} if config.cache is None else {"data.cache": user_path(config.cache)})
    for option, name in _named_data(config):
        for writer, path in written.items():
            if any(is_named_by(name, path.resolve() / file) for file in _WRITTEN):
                raise InputError(
                    f"{writer} {path} lies in {option} ({name}), so its files would be read as data; choose a folder "
                    "elsewhere, or name the data more closely"
                )


def _named_data(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the paths and names of the sources, with the options that hold them."""
    for section in SOURCES:
        source: SourceConfig | None = getattr(config, section)
        if source is None:
            continue
        if source.name is not None:
            yield f"data.{section}.name", source.name
        yield from ((f"data.{section}.path", path) for path in _each(source.path))
    for key in () if config.recall is None else _STORIES:
        yield from ((f"data.recall.{key}", path) for path in _each(getattr(config.recall, key)))


def _each(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


def _generates_all_text(config: DataConfig) -> bool:
    return config.recall is not None and not config.recall.is_in_text


def find_shared_file(config: DataConfig, inputs: dict[str, Any]) -> str | None:
    """Return a sentence about a file that is both trained on and held out, or None if there is none.

    Sections with other slices (`rows`, `documents`) divide a file, so they are not compared. Copies count as one file.

    Args:
        config: The data config.
        inputs: Its description by `describe_inputs`.
    """
    trained = {file["sha256"]: file["path"] for file in inputs["files"].get("data.train", [])}
    for section in ("validation", "test"):
        source: SourceConfig | None = getattr(config, section)
        if source is None or (source.rows, source.documents) != (config.train.rows, config.train.documents):
            continue
        for file in inputs["files"].get(f"data.{section}", []):
            if file["sha256"] in trained:
                return (
                    f"data.{section}: {file['path']} has the same content as {trained[file['sha256']]} in data.train, "
                    "so held-out results are about text that was trained on"
                )
    return None


def write_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write a description by `describe_inputs` into a run folder.

    Raises:
        SaveError: Writing failed.
    """
    write_json(folder / INPUTS_FILE, inputs)


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """Return what a run was made from, or None for a run of version 0.1, which did not record it.

    Raises:
        CheckpointError: The description is damaged or of another format version.
    """
    path = folder / INPUTS_FILE
    if not path.exists():
        return None
    inputs = read_json(path)
    if inputs.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {inputs.get('format_version')!r}; this memformer reads {_FORMAT_VERSION}"
        )
    match inputs:
        case {"tokenizer": str(), "files": dict(files)} if all(map(_are_identities, files.values())):
            return inputs
        case _:
            raise CheckpointError(f"{path} is damaged: it does not list a run's tokenizer and files")


def _are_identities(files: Any) -> bool:
    return isinstance(files, list) and all(
        isinstance(file, dict)
        and isinstance(file.get("path"), str)
        and isinstance(file.get("bytes"), int)
        and isinstance(file.get("sha256"), str)
        for file in files
    )


def file_contents(inputs: dict[str, Any]) -> dict[str, list[str]]:
    """Return the SHA-256 of every file of a description, in order, for each section of the config that has files."""
    return {key: [file["sha256"] for file in files] for key, files in inputs["files"].items()}


def find_changed_input(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return what has changed between two descriptions, naming the first difference, or None if nothing has.

    Only contents and their order count: files may have been moved.
    """
    if before["tokenizer"] != now["tokenizer"]:
        return "the tokenizer in the run folder is not the one that the run began with"
    for key in sorted(before["files"].keys() | now["files"].keys()):
        change = _changed_file(before["files"].get(key, []), now["files"].get(key, []))
        if change is not None:
            return f"{key} has changed since the run began: {change}"
    return None


def _changed_file(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    old, new = ([file["sha256"] for file in files] for files in (before, now))
    if old == new:
        return None
    at_path = {file["path"]: file for file in now}
    for file in before:
        other = at_path.get(file["path"], file)
        if other["bytes"] != file["bytes"]:
            return f"{file['path']} had {file['bytes']:,} bytes and now has {other['bytes']:,}"
        if other["sha256"] != file["sha256"]:
            return f"{file['path']} has as many bytes ({file['bytes']:,}) but other content (its SHA-256 differs)"
    lost = [file["path"] for file in before if file["sha256"] not in new]
    added = [file["path"] for file in now if file["sha256"] not in old]
    if lost and added:
        return f"{lost[0]} has been replaced by {added[0]}, which has other content"
    if lost or added:
        return f"{lost[0]} is no longer there" if lost else f"{added[0]} has been added"
    return f"the same files are read in another order or number, now beginning with {now[0]['path']}"


def pin_revisions(config: DataConfig, saved: dict[str, Any] | None = None) -> DataConfig:
    """Return the config with the commit of every data set of the Hugging Face hub that has none.

    Args:
        config: The data config.
        saved: The run config with which the run began, as plain values: its commits are taken. None: the run begins, so
            the newest commits are looked up on the hub.

    Raises:
        InputError: The hub cannot be reached or has no such data set.
    """
    if _generates_all_text(config):
        return config
    sources: dict[str, Any] = {}
    for key in SOURCES:
        source = getattr(config, key)
        if source is not None:
            sources[key] = _pinned(source, key) if saved is None else _with_saved_revision(source, key, saved)
    return dataclasses.replace(config, **sources)


def _pinned(source: SourceConfig, key: str) -> SourceConfig:
    try:
        return pin_revision(source)
    except InputError as error:
        raise InputError(f"data.{key}: {error}") from error


def _with_saved_revision(source: SourceConfig, key: str, saved: dict[str, Any]) -> SourceConfig:
    match saved:
        case {"data": {**sources}} if source.name is not None and source.revision is None:
            saved_source = sources.get(key)
            revision = saved_source.get("revision") if isinstance(saved_source, dict) else None
            return dataclasses.replace(source, revision=revision)
        case _:
            return source


def find_changed_key(
    saved: dict[str, Any],
    config: RunConfig,
    *,
    may_change: Collection[str] = (),
    training: Collection[str] = ("num_lanes", "optimizer"),
) -> str | None:
    """Return what has changed of a run's seed, model, data and training, or None: the first key with both values.

    Args:
        saved: The config with which the run began, as plain values.
        config: The config that is to be the same.
        may_change: Keys that are not compared, besides `data.cache`.
        training: Names of the training settings that are compared. By default, those without which a run cannot resume.
    """
    # `saved` is from `read_run_config`; other keys that are newer than the run had their default value.
    saved = _completed(saved, config)
    fixed = ("seed", "model_type", "model", "data")
    differences = _differences(saved, canonical(config.to_dict()))
    # The kind of a model or a task comes first: other keys differ because of it.
    for key, before, now in sorted(differences, key=lambda each: not each[0].endswith(("_type", ".kind", ".task"))):
        top, _, rest = key.partition(".")
        if (top in fixed and key not in {"data.cache", *may_change}) or (top == "training" and rest in training):
            return f"the run began with {key}: {before}, now it is {now}"
    return None


def _completed(saved: Any, config: Any) -> Any:
    """Return a saved section, completed by the defaults of the keys that it lacks; `config` is today's section."""
    if not isinstance(saved, dict) or not dataclasses.is_dataclass(config):
        return saved
    completed = dict(saved)
    for field in dataclasses.fields(config):
        if field.name in saved:
            completed[field.name] = _completed(saved[field.name], getattr(config, field.name))
        elif field.default_factory is not dataclasses.MISSING:
            completed[field.name] = canonical(dataclasses.asdict(field.default_factory()))
        else:
            completed[field.name] = canonical(field.default)
    return completed


def _differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(saved.keys() | current.keys(), key=str):  # a YAML key may be a number
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, prefix=f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now
