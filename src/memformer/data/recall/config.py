"""Configs of recall tasks and of their curriculum."""

from dataclasses import dataclass, fields
from typing import Literal

from memformer.errors import InputError
from memformer.utils.checks import check_integer, check_number
from memformer.utils.fields import convert_fields

TaskName = Literal["fact", "associative", "rewrite", "copy", "passkey", "babi"]

# Fields that only some of the tasks read.
_FIELDS_OF_TASK: dict[str, frozenset[str]] = {
    "fact": frozenset({"num_values", "num_fillers"}),
    "associative": frozenset({"num_keys", "num_values", "num_fillers"}),
    "rewrite": frozenset({"num_keys", "num_values", "num_fillers"}),
    "copy": frozenset({"num_values", "num_fillers"}),
    "passkey": frozenset(),
    "babi": frozenset({"path", "validation_path", "decoy_probability", "mine_decoys"}),
}


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """A curriculum of recall episodes: a low loss doubles the maximum distance and adds 1 to the number of facts.

    Until the curriculum is complete, half of the rollouts have the current maximum number of facts; the others have any
    number up to it. New episode sizes are thus learned sooner, and a run of easy episodes does not advance the
    curriculum.

    Args:
        start_distance: Maximum distance at the start, in segments; at most `max_distance` is used.
        start_facts: Maximum number of facts at the start; at most that of `num_facts` is used.
        advance_below: Loss in nats per answer token. A mean loss below it over `window` updates advances the
            curriculum.
        window: Number of updates over which the loss is averaged.

    Raises:
        InputError: A value is out of range.
    """

    start_distance: int = 1
    start_facts: int = 1
    advance_below: float = 0.1
    window: int = 20

    def __post_init__(self) -> None:
        convert_fields(self, prefix="data.recall.curriculum.")
        for name in ("start_distance", "start_facts", "window"):
            check_integer(f"data.recall.curriculum.{name}", getattr(self, name), 1)
        check_number("data.recall.curriculum.advance_below", self.advance_below, above=0)


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """A recall task with generated episodes: facts, then filler segments, some of which end with a question.

    Args:
        task: fact: one value to remember. associative: key-value pairs, every key once. rewrite: key-value pairs with
            repeated keys, whose last value counts. copy: all values in order. passkey: a number hidden in the documents
            of the run's data. babi: stories of bAbI, scattered in these documents.
        path: For babi: the training stories; a file, a folder, a glob pattern, or a list of these. Compressed
            files are decompressed while reading.
        validation_path: For babi: the evaluation stories.
        num_facts: Minimum and maximum number of facts of a training episode. For babi: the drawn number is rounded down
            to a number of facts for which the stories have a question.
        facts_per_segment: Minimum and maximum number of facts inserted into one segment; each rollout draws its number
            log-uniformly. Evaluation uses the maximum.
        max_fact_gap: Maximum number of filler segments between two segments with facts.
        max_distance: Maximum number of segments from the last fact to the last question of a training episode (its
            horizon); each rollout draws its horizon log-uniformly from 1 to this.
        question_probability: Probability that a segment before the horizon ends with a question; the segment at the
            horizon always does.
        decoy_probability: For babi: probability that a training segment without a fact is text around an answer or a
            name, such as "garden" or "Mary", or two halves of such texts. Such words are rare in documents, above all
            both at once, and a model that saw few of them takes them for facts.
        mine_decoys: For babi: whether half of the decoys are text that the model itself took for a fact a short time
            ago. Some time after the end of the curriculum the model begins to read 512 segments of the training text
            beside each update; the last 128 of which it wrote something are shown again. Needs the preset recall, or a
            model that like it leaves the memory as it is unless it writes.
        num_keys: For associative and rewrite: number of different keys.
        num_values: For fact, associative, rewrite and copy: number of different values.
        num_fillers: For fact, associative, rewrite and copy: number of different filler words.
        curriculum: Starts with easier episodes; null: the full range from the start.

    Raises:
        InputError: A value is out of range, two values contradict each other, a field that the task needs is missing,
            or a field is set that the task does not read.
    """

    task: TaskName = "fact"
    path: str | list[str] | None = None
    validation_path: str | list[str] | None = None
    num_facts: tuple[int, int] = (1, 1)
    facts_per_segment: tuple[int, int] = (1, 1)
    max_fact_gap: int = 0
    max_distance: int = 32
    question_probability: float = 0.25
    decoy_probability: float = 0.0
    mine_decoys: bool = False
    num_keys: int = 32
    num_values: int = 32
    num_fillers: int = 16
    curriculum: CurriculumConfig | None = None

    def __post_init__(self) -> None:
        convert_fields(self, prefix="data.recall.")
        if self.task == "babi":
            for name in ("path", "validation_path"):
                if not getattr(self, name):
                    raise InputError(f"data.recall.{name} ({getattr(self, name)!r}) must be given for the task 'babi'")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in keys_of_task(self.task) and value != field.default:
                readers = [task for task, names in _FIELDS_OF_TASK.items() if field.name in names]
                raise InputError(
                    f"data.recall.{field.name} ({value!r}) is not read by the task {self.task!r}, only by "
                    f"{', '.join(readers)}"
                )
        for name in ("max_distance", "num_keys", "num_values", "num_fillers"):
            check_integer(f"data.recall.{name}", getattr(self, name), 1)
        check_integer("data.recall.max_fact_gap", self.max_fact_gap, 0)
        for name in ("question_probability", "decoy_probability"):
            check_number(f"data.recall.{name}", getattr(self, name), minimum=0, maximum=1)
        if self.mine_decoys and not self.decoy_probability:
            raise InputError("data.recall.mine_decoys (true) needs a data.recall.decoy_probability above 0")
        for name in ("num_facts", "facts_per_segment"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise InputError(
                    f"data.recall.{name} ({fewest}, {most}) must be a minimum of at least 1 and a maximum not below it"
                )
        fewest, most = self.num_facts
        if self.task in {"fact", "passkey"} and most > 1:
            raise InputError(
                f"data.recall.num_facts ({fewest}, {most}) must be (1, 1) for the task {self.task!r}, "
                "which has one fact"
            )
        if self.task == "associative" and most > self.num_keys:
            raise InputError(
                f"data.recall.num_facts ({fewest}, {most}) must not exceed data.recall.num_keys ({self.num_keys}): "
                "every fact needs a different key"
            )

    @property
    def is_in_text(self) -> bool:
        """Whether the facts are hidden in documents; the other tasks use a vocabulary of their own."""
        return not has_own_vocabulary(self.task)


def has_own_vocabulary(task: str) -> bool:
    """Whether a recall task has a vocabulary of its own; the others are in text, and so is an unknown task."""
    return task in {"fact", "associative", "rewrite", "copy"}


def keys_of_task(task: str) -> frozenset[str]:
    """Return the keys that a recall task reads; all keys for an unknown task, which is refused elsewhere."""
    special = frozenset[str]().union(*_FIELDS_OF_TASK.values())
    return frozenset(field.name for field in fields(RecallConfig)) - (special - _FIELDS_OF_TASK.get(task, special))
