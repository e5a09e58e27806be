"""What a recall task is: its config."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from memformer.errors import InputError

TaskName = Literal["fact", "associative", "rewrite", "copy", "passkey", "babi"]

# Fields that some tasks read and others do not.
_FIELDS_OF_TASK: dict[str, frozenset[str]] = {
    "fact": frozenset({"num_values", "num_fillers"}),
    "associative": frozenset({"num_keys", "num_values", "num_fillers"}),
    "rewrite": frozenset({"num_keys", "num_values", "num_fillers"}),
    "copy": frozenset({"num_values", "num_fillers"}),
    "passkey": frozenset(),
    "babi": frozenset({"path", "validation_path"}),
}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """From easy to hard: the distance doubles and the facts grow by one whenever the loss has become small.

    Until the end is reached half of the rollouts have the most facts of the level, the others any number up to it: what
    is new is learned sooner, and a run of easy episodes does not pass for it.

    Args:
        start_distance: Largest distance at the start, in segments.
        start_facts: Most facts at the start.
        advance_below: Nats per answer token; a mean below it over `window` updates makes the task harder.
        window: Updates that the mean is taken over.

    Raises:
        InputError: A value is out of its range.
    """

    start_distance: int = 1
    start_facts: int = 1
    advance_below: float = 0.1
    window: int = 20

    def __post_init__(self) -> None:
        for name in ("start_distance", "start_facts", "window"):
            if getattr(self, name) < 1:
                raise InputError(f"curriculum.{name} ({getattr(self, name)}) must be at least 1")
        if not 0 < self.advance_below < float("inf"):
            raise InputError(f"curriculum.advance_below ({self.advance_below}) must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """A recall task, made on the fly.

    Args:
        task: fact: one value to remember. associative: keys and values, every key once. rewrite: keys come again, the
            last value wins. copy: all values in order. passkey: a number hidden in the documents of the run's data.
            babi: stories of bAbI, scattered in these documents.
        path: For babi: the stories to train on; a file, a folder, a glob pattern, or a list of these. Files ending in
            .gz or .xz are uncompressed while reading.
        validation_path: For babi: the stories to evaluate on.
        num_facts: Facts of an episode in training, fewest and most. Of babi: an episode has as many as a question
            of the stories has, at most so many.
        facts_per_segment: Facts told in one segment, fewest and most; each rollout draws its own number, log-uniform.
            An evaluation tells the most.
        max_fact_gap: Segments of filler between two segments that tell facts, at most.
        max_distance: Segments from the last fact to the question in training, at most; each rollout draws its own
            horizon, log-uniform from 1.
        question_probability: How often a segment before the horizon ends with a question; the one at the horizon
            always does.
        num_keys: For associative and rewrite: keys there are.
        num_values: For fact, associative, rewrite and copy: values there are.
        num_fillers: For the same: filler words there are.
        curriculum: Starts with easier episodes; null starts with the full range.

    Raises:
        InputError: A value is out of its range, two contradict each other, one that the task needs is missing, or one
            is set that the task does not read.
    """

    task: TaskName = "fact"
    path: str | list[str] | None = None
    validation_path: str | list[str] | None = None
    num_facts: tuple[int, int] = (1, 1)
    facts_per_segment: tuple[int, int] = (1, 1)
    max_fact_gap: int = 0
    max_distance: int = 32
    question_probability: float = 0.25
    num_keys: int = 32
    num_values: int = 32
    num_fillers: int = 16
    curriculum: CurriculumConfig | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(TaskName):
            raise InputError(f"recall.task ({self.task!r}) must be one of {', '.join(get_args(TaskName))}")
        if self.task == "babi":
            for name in ("path", "validation_path"):
                if not getattr(self, name):
                    raise InputError(f"recall.{name} ({getattr(self, name)!r}) must be given for the task 'babi'")
        for field in fields(self):
            readers = [task for task, names in _FIELDS_OF_TASK.items() if field.name in names]
            value = getattr(self, field.name)
            if readers and self.task not in readers and value != field.default:
                raise InputError(
                    f"recall.{field.name} ({value!r}) is not read by the task {self.task!r}, only by "
                    f"{', '.join(readers)}"
                )
        for name in ("max_distance", "num_keys", "num_values", "num_fillers"):
            if getattr(self, name) < 1:
                raise InputError(f"recall.{name} ({getattr(self, name)}) must be at least 1")
        if self.max_fact_gap < 0:
            raise InputError(f"recall.max_fact_gap ({self.max_fact_gap}) must be at least 0")
        if not 0 <= self.question_probability <= 1:
            raise InputError(f"recall.question_probability ({self.question_probability}) must be from 0 to 1")
        for name in ("num_facts", "facts_per_segment"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise InputError(f"recall.{name} ({fewest}, {most}) must be fewest and most, at least 1")
        fewest, most = self.num_facts
        if self.task in {"fact", "passkey"} and most > 1:
            raise InputError(f"recall.num_facts ({fewest}, {most}) must be (1, 1) for the task of one fact")
        if self.task == "associative" and most > self.num_keys:
            raise InputError(f"recall.num_facts ({fewest}, {most}) needs as many different keys; num_keys is less")

    @property
    def is_in_text(self) -> bool:
        """Whether the facts are hidden in documents; the other tasks bring their own words."""
        return self.task in {"passkey", "babi"}
