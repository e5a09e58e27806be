"""Trackers: TensorBoard, Weights & Biases and trackio get the numbers of a run through one interface."""

import contextlib
import importlib
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memformer.errors import CheckpointError, InputError
from memformer.utils.files import read_json, write_json

TRACKERS_FILE = "trackers.json"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker starts with.

    Attributes:
        folder: The run folder.
        name: Name of the run: that of its folder.
        project: Project that the run belongs to.
        config: The resolved config as plain values.
        id: Identifies the run in the tracker; the same when it resumes.
        num_updates: Updates already completed.
    """

    folder: Path
    name: str
    project: str
    config: Mapping[str, Any]
    id: str
    num_updates: int


class Tracker(ABC):
    """Base class of the trackers. Creating one starts it, and continues the tracker's run if `run.id` exists.

    Attributes:
        rewinds: Whether the numbers of updates after `run.num_updates` are replaced when a resumed run repeats them.
            Otherwise they are sent once (`TrackerStates`).

    Args:
        run: The run.
    """

    rewinds: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None: ...

    @abstractmethod
    def log(self, num_updates: int, numbers: dict[str, float]) -> None:
        """Log numbers by name after an update; there may be several calls for one update."""

    @abstractmethod
    def log_text(self, num_updates: int, name: str, text: str) -> None:
        """Log a text after an update."""

    def flush(self) -> None:  # noqa: B027  empty on purpose: only a tracker with files overrides it
        """Write what was logged to disk, if the tracker has files that can be flushed."""

    @abstractmethod
    def finish(self) -> None:
        """End the tracker's run; it can be continued later."""


class TensorBoardTracker(Tracker):
    """Event files in `tensorboard/` in the run folder."""

    rewinds = True

    def __init__(self, run: TrackedRun) -> None:
        import_tracker("tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.num_updates + 1)

    def log(self, num_updates: int, numbers: dict[str, float]) -> None:
        """Write scalars."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, num_updates)

    def log_text(self, num_updates: int, name: str, text: str) -> None:
        """Write a text."""
        self._writer.add_text(name, text, num_updates)

    def flush(self) -> None:
        """Flush the files."""
        self._writer.flush()

    def finish(self) -> None:
        """Close the files."""
        self._writer.close()


class WandbTracker(Tracker):
    """A run of Weights & Biases, whose own environment variables apply: `WANDB_MODE=offline` needs no network."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = import_tracker("wandb").init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
        )

    def log(self, num_updates: int, numbers: dict[str, float]) -> None:
        """Log numbers at the step of this number."""
        self._run.log(numbers, step=num_updates)

    def log_text(self, num_updates: int, name: str, text: str) -> None:
        """Log a text at the step of this number."""
        self._run.log({name: text}, step=num_updates)

    def finish(self) -> None:
        """Finish the run, which waits until everything is sent."""
        self._run.finish()


class TrackioTracker(Tracker):
    """A run of trackio, which knows a run by its name only: it is the name of the run folder and the id."""

    def __init__(self, run: TrackedRun) -> None:
        self._trackio = import_tracker("trackio")
        with _messages_to_stderr():
            self._trackio.init(
                project=run.project, name=f"{run.name}-{run.id}", config=dict(run.config), resume="allow"
            )

    def log(self, num_updates: int, numbers: dict[str, float]) -> None:
        """Log numbers at the step of this number."""
        self._trackio.log(numbers, step=num_updates)

    def log_text(self, num_updates: int, name: str, text: str) -> None:
        """Log a text at the step of this number."""
        self._trackio.log({name: text}, step=num_updates)

    def finish(self) -> None:
        """Finish the run."""
        with _messages_to_stderr():
            self._trackio.finish()


def _messages_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Print what trackio prints to stderr: stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


def import_tracker(name: str) -> Any:
    """Return the package of a tracker.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"the tracker {name!r} of logging.trackers needs the package {name}: pip install {name} ({error})"
        ) from error


def check_trackers(names: Collection[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        InputError: One is not.
    """
    for name in names:
        import_tracker(name)


def numbers_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log event by name, `kind/name`; a list gives one number per timestep, `kind/name/0`."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            numbers |= {f"{kind}/{name}/{timestep}": each for timestep, each in enumerate(value)}
        elif isinstance(value, int | float):
            numbers[f"{kind}/{name}"] = value
    return numbers


class TrackerStates:
    """How much of a run each tracker has received, in `trackers.json` in the run folder; a resumed run goes on there.

    A tracker has the events of a kind up to an update. While it is in use this is not written down for every event: if
    the process is killed, the run's own log tells what the tracker has, because an event is written there first.

    Args:
        folder: The run folder.
        logged: For each kind of event, the last update of which the run's log has one.

    Raises:
        CheckpointError: The file is damaged.
    """

    def __init__(self, folder: Path, *, logged: Mapping[str, int]) -> None:
        self._file = folder / TRACKERS_FILE
        self._logged = logged
        self._entries: dict[str, Any] = read_json(self._file) if self._file.exists() else {}
        for entry in self._entries.values():
            match entry:
                case {"id": str(), "in_use": bool(), "sent": dict(sent)} if all(type(n) is int for n in sent.values()):
                    pass
                case _:
                    raise CheckpointError(f"{self._file} is damaged; without it, the trackers begin new runs")

    def begin(self, name: str) -> tuple[str, dict[str, int]]:
        """Return the id of a tracker's run and, for each kind of event, the last update of which it has one.

        Raises:
            SaveError: Writing failed.
        """
        entry = self._entries.setdefault(name, {"id": secrets.token_hex(4), "sent": {}, "in_use": False})
        sent: dict[str, int] = dict(entry["sent"])
        if entry["in_use"]:
            sent |= {kind: max(update, sent.get(kind, 0)) for kind, update in self._logged.items()}
        self._write(name, sent, in_use=True)
        return entry["id"], sent

    def end(self, name: str, sent: Mapping[str, int]) -> None:
        """Write down what a tracker has that is no longer in use.

        Raises:
            SaveError: Writing failed.
        """
        self._write(name, sent, in_use=False)

    def _write(self, name: str, sent: Mapping[str, int], *, in_use: bool) -> None:
        self._entries[name] = {**self._entries[name], "sent": dict(sent), "in_use": in_use}
        write_json(self._file, self._entries)
