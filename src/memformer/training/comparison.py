"""Comparison of runs: what differs in their configs, their results on held-out data, sizes and speed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memformer.errors import CheckpointError, InputError
from memformer.generation.session import Session
from memformer.models import load_model
from memformer.models.loading import MODELS
from memformer.models.pretrained import WEIGHTS_FILE
from memformer.training.best_weights import read_best_evaluation
from memformer.training.config import TrainingConfig
from memformer.training.curves import Metric, metric_of
from memformer.training.logs import missing_value_sentence, read_log
from memformer.training.run_folder import BEST, LOG_FILE, RESULT_FILE, RUN_CONFIG_FILE, read_run_config
from memformer.training.run_inputs import LOCATION_KEYS, file_contents, read_inputs
from memformer.utils.files import read_json
from memformer.utils.tables import format_table

# Keys that change neither the results nor the speed of a run.
_IGNORED = ("folder", "data.cache")
_NONE = "-"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of one run; None where the run has not got so far.

    Attributes:
        folder: The run folder.
        config: The config as plain values.
        inputs: What the run was made from (`run_inputs`); None for a run of version 0.1.
        lines: The entries of the log.
        metric: The held-out metric.
        best: Best value of the metric in training, and its update.
        last: Last value of the metric in training, and its update.
        final: Value of the metric on all held-out data at the end of the run, with the best weights.
        final_memory_erased: The same with the memory erased.
        num_bytes: Size of this held-out data in bytes (pixels, for images); None for a recall task.
        num_parameters: Number of parameters.
        state_bytes: Size in bytes of the state of one stream (`Session.state_bytes`).
        num_tokens: Number of training tokens.
        tokens_per_second: Training tokens per second.
    """

    folder: str
    config: dict[str, Any]
    inputs: dict[str, Any] | None
    lines: list[dict[str, Any]]
    metric: Metric
    best: tuple[float, int] | None
    last: tuple[float, int] | None
    final: float | None
    final_memory_erased: float | None
    num_bytes: int | None
    num_parameters: int | None
    state_bytes: int | None
    num_tokens: int | None
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "run": self.folder,
            "model_type": self.config.get("model_type"),
            "metric": self.metric.label,
            "best": self.best and {"value": self.best[0], "update": self.best[1]},
            "last": self.last and {"value": self.last[0], "update": self.last[1]},
            "final": self.final,
            "final_memory_erased": self.final_memory_erased,
            "parameters": self.num_parameters,
            "state_bytes": self.state_bytes,
            "tokens_trained": self.num_tokens,
            "tokens_per_second": self.tokens_per_second,
        }


def summarize_run(folder: Path, *, warn: Callable[[str], None] | None = None) -> RunSummary:
    """Return the figures of a run, which may still be in progress.

    Args:
        folder: The run folder.
        warn: Called with a message if the config uses names from version 0.1.

    Raises:
        InputError: The folder does not contain a trained run.
        CheckpointError: A file of the run is damaged.
    """
    for name in (RUN_CONFIG_FILE, LOG_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not the folder of a trained run: it has no {name}")
    config, lines = read_run_config(folder, warn=warn), read_log(folder)
    result = read_json(folder / RESULT_FILE) if (folder / RESULT_FILE).is_file() else {}
    num_parameters, state_bytes = _sizes(folder / BEST)
    try:
        return _summarize(folder, config, lines, result, num_parameters=num_parameters, state_bytes=state_bytes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(missing_value_sentence(folder, error)) from error


def _summarize(
    folder: Path,
    config: dict[str, Any],
    lines: list[dict[str, Any]],
    result: dict[str, Any],
    *,
    num_parameters: int | None,
    state_bytes: int | None,
) -> RunSummary:
    metric = metric_of(config)
    evaluations = [(float(line[metric.key]), int(line["update"])) for line in lines if metric.key in line]
    training = [line for line in lines if line["kind"] == "training"]
    newest = {"num_tokens": None, "tokens_per_second": None, **(training[-1] if training else {})}
    for line in training:
        float(line["bits_per_token"])  # the plot needs it
    final, erased = _final_values(result, metric)
    return RunSummary(
        folder=str(folder),
        config=config,
        inputs=read_inputs(folder),
        lines=lines,
        metric=metric,
        best=_best(folder, evaluations, metric),
        last=evaluations[-1] if evaluations else None,
        final=final,
        final_memory_erased=erased,
        num_bytes=result.get("num_bytes"),
        num_parameters=num_parameters,
        state_bytes=state_bytes,
        num_tokens=newest["num_tokens"],
        tokens_per_second=newest["tokens_per_second"],
    )


def _best(folder: Path, evaluations: list[tuple[float, int]], metric: Metric) -> tuple[float, int] | None:
    """Return the value and the update of the best weights; the log may hold evaluations on other documents."""
    best = read_best_evaluation(folder)
    if best is not None:
        return float(best[metric.key]), best["update"]
    # An older run: of equal values the latest, as in training.
    choose = max if metric.is_better_if_higher else min
    return choose(reversed(evaluations), key=lambda pair: pair[0]) if evaluations else None


def _final_values(result: Mapping[str, Any], metric: Metric) -> tuple[float | None, float | None]:
    if not result:
        return None, None
    if metric.key == "accuracy":
        return result["mean_accuracy"], result["mean_accuracy_memory_erased"]
    return result["with_memory"][metric.key], result["memory_erased"][metric.key]


def _sizes(weights: Path) -> tuple[int | None, int | None]:
    """Return the number of parameters and the size of a stream's state; None before the first evaluation."""
    if not (weights / WEIGHTS_FILE).is_file():
        return None, None
    model = load_model(weights)
    return model.num_parameters, Session(model).state_bytes


def find_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the config keys whose values differ, with the value in each config; None where a config lacks the key.

    A key that not all models have is listed if it is a size or has another value than its default.
    """
    flat = [dict(_flatten(config)) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each if key not in _IGNORED)
    found = {}
    for key in keys:
        own = [each[key] for each in flat if key in each]
        differs = any(value != own[0] for value in own)
        if len(own) < len(flat):
            differs |= any(_matters(each, key) for each in flat if key in each)
        if differs:
            found[key] = [each.get(key) for each in flat]
    return found


def _matters(config: Mapping[str, Any], key: str) -> bool:
    """Return whether a key that other runs lack is a size of the model or has another value than its default."""
    value, (section, _, name) = config[key], key.partition(".")
    model = MODELS.get(str(config.get("model_type")))
    sections = {"training": TrainingConfig, "model": None if model is None else model.config_class}
    default = getattr(sections.get(section), name, None)
    default = list(default) if isinstance(default, tuple) else default
    return value != default or (section == "model" and type(value) is int and value > 0)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def same_data(runs: Sequence[RunSummary]) -> bool:
    """Return whether the runs were evaluated on the same held-out data, so that their results can be compared.

    The content of the files decides, not where they are; of runs of version 0.1, which did not record it, the paths.
    """
    by_content = all(run.inputs is not None for run in runs)
    chosen = [_held_out_data(run, by_content=by_content) for run in runs]
    sizes = {run.num_bytes for run in runs if run.num_bytes is not None}
    return all(each == chosen[0] for each in chosen) and len(sizes) <= 1


def same_evaluations(runs: Sequence[RunSummary]) -> bool:
    """Return whether the evaluations during training were on the same documents too.

    They read the first documents that have `training.evaluation_tokens`, and another tokenizer counts other tokens.
    """
    tokenizers = [None if run.inputs is None else run.inputs.get("tokenizer") for run in runs]
    limits = [(run.config.get("training") or {}).get("evaluation_tokens", 0) for run in runs]
    are_whole = all(limit is None for limit in limits)
    return same_data(runs) and (are_whole or all(each == tokenizers[0] for each in tokenizers))


_OF_RECALL_TRAINING = tuple(
    f"data.recall.{name}" for name in ("curriculum", "question_probability", "decoy_probability", "mine_decoys")
)


def _held_out_data(run: RunSummary, *, by_content: bool) -> dict[str, Any]:
    """Return what decides which data a run was evaluated on."""
    data = run.config.get("data") or {}
    split = ("train", "validation_fraction", "seed") if data.get("validation") is None else ("validation",)
    names = (*split, "test", "end_of_document", "max_document_tokens", "recall")
    # A run may be older than a key, whose value was then the default.
    chosen = dict(_flatten({"data": {name: data.get(name) or None for name in names}}))
    # Only training reads these.
    chosen = {key: value for key, value in chosen.items() if not key.startswith(_OF_RECALL_TRAINING)}
    if not chosen.get("data.recall.task"):
        default = TrainingConfig.evaluation_tokens
        chosen["evaluation_tokens"] = (run.config.get("training") or {}).get("evaluation_tokens", default)
    if not by_content:
        return chosen
    assert run.inputs is not None
    # Pieces of so many tokens are drawn at random. Bins and words decide what of the data is predicted at all.
    is_drawn = data.get("validation") is None and data.get("max_document_tokens")
    if is_drawn or (data.get("tokenizer") or {}).get("kind") in {"bins", "word"}:
        chosen["tokenizer"] = run.inputs["tokenizer"]
    sections = tuple(f"data.{name}" for name in names)
    contents = {key: value for key, value in file_contents(run.inputs).items() if key.startswith(sections)}
    return {key: value for key, value in chosen.items() if key not in LOCATION_KEYS} | contents


def to_table(runs: Sequence[RunSummary]) -> str:
    """Return the comparison as a table for a terminal, one column for each run."""
    rows: list[tuple[str, ...]] = []
    for metric in dict.fromkeys(run.metric for run in runs):
        has = [run.metric == metric for run in runs]

        def cells(texts: Iterable[str], has: Sequence[bool] = has) -> list[str]:
            return [text if own else _NONE for text, own in zip(texts, has, strict=True)]

        label = metric.label
        rows += [
            (f"held out, best: {label}", *cells(_at_update(run.best) for run in runs)),
            (f"held out, last: {label}", *cells(_at_update(run.last) for run in runs)),
            (f"all held-out data: {label}", *cells(_number(run.final, ".4f") for run in runs)),
            (f"  memory erased: {label}", *cells(_number(run.final_memory_erased, ".4f") for run in runs)),
        ]
    rows += [
        ("parameters", *(_number(run.num_parameters, ",") for run in runs)),
        ("state of a stream, bytes", *(_number(run.state_bytes, ",") for run in runs)),
        ("tokens trained", *(_number(run.num_tokens, ",") for run in runs)),
        ("tokens/s in training", *(_number(run.tokens_per_second, ",.0f") for run in runs)),
    ]
    differences = find_differences([run.config for run in runs])
    rows += [(key, *map(_shown, values)) for key, values in differences.items()]
    table = format_table(("", *(run.folder for run in runs)), rows)
    if same_evaluations(runs):
        return table
    if same_data(runs):
        return (
            f"{table}\nthe tokenizers differ, so training.evaluation_tokens are other documents: compare the rows "
            '"all held-out data", not those of the best and the last evaluation'
        )
    return f"{table}\nthe held-out data of the runs differs, so their held-out results cannot be compared"


def _at_update(pair: tuple[float, int] | None) -> str:
    return _NONE if pair is None else f"{pair[0]:.4f} (update {pair[1]:,})"


def _number(value: float | int | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _shown(value: Any) -> str:
    return _NONE if value is None else str(value)
