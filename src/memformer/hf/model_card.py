"""Model cards: what a model is, how it was trained, what it scored and how it is used."""

from pathlib import Path
from typing import Any

import jinja2

from memformer.errors import CheckpointError
from memformer.models import LanguageModel
from memformer.training.run_folder import RESULT_FILE, VERSIONS_FILE
from memformer.utils.files import read_json

_KINDS = {
    "memformer": "A [Memformer](https://arxiv.org/abs/2010.06891)",
    "lstm": "An LSTM",
    "transformer_xl": "A [Transformer-XL](https://arxiv.org/abs/1901.02860)",
    "compressive_transformer": "A [Compressive Transformer](https://arxiv.org/abs/1911.05507)",
    "recurrent_memory_transformer": "A [Recurrent Memory Transformer](https://arxiv.org/abs/2207.06881)",
    "associative_recurrent_memory_transformer": (
        "An [Associative Recurrent Memory Transformer](https://arxiv.org/abs/2407.04841)"
    ),
}
# Of a run's config: what a reader of the card can compare. Paths of the machine that trained it are left out.
_TRAINING_KEYS = (
    "num_updates",
    "num_lanes",
    "rollout_length",
    "rollouts_per_update",
    "optimizer",
    "learning_rate",
    "warmup_updates",
    "weight_decay",
    "precision",
)


def write_card_text(
    model: LanguageModel,
    *,
    name: str,
    source: str,
    run_folder: Path | None,
    run_config: dict[str, Any] | None,
    has_result: bool,
    no_tokenizer: str | None,
    is_of_words: bool,
    license_name: str | None,
) -> str:
    """Return the text of a model card in Markdown, with front matter for the Hugging Face hub.

    Args:
        model: The model.
        name: Heading of the card.
        source: Folder or name on the hub, by which the examples load the model.
        run_folder: Folder of the training run. None: there is none.
        run_config: Config of the training run as plain values. None: there is none.
        has_result: Whether the evaluation in the run folder is one of these weights.
        no_tokenizer: Sentence on why there is no tokenizer. None: there is one.
        is_of_words: Whether the tokenizer's tokens are words, between which decoding puts spaces.
        license_name: The license, as the hub names it. None: left to the user.

    Raises:
        CheckpointError: A record of the run lacks a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memformer.hf"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    model_type = model.config.model_type
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        source=source,
        kind=_KINDS[model_type],
        tags=["memformer", *([] if model_type == "memformer" else [model_type]), "recurrent-memory", "long-context"],
        license=license_name,
        has_tokenizer=no_tokenizer is None,
        no_tokenizer=no_tokenizer,
        is_of_words=is_of_words,
        num_parameters=model.num_parameters,
        segment_length=model.segment_length,
        vocab_size=model.vocab_size,
        measured_on=_describe_test(run_config),
        metrics=_read_metrics(run_folder) if has_result and run_folder is not None else [],
        training={} if run_config is None else _describe_training(run_config, run_folder),
        model=model.config.to_dict(),
    )


def _read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run's final evaluation, of the likelihood or of a recall task.

    Raises:
        CheckpointError: The file lacks a metric.
    """
    file = run_folder / RESULT_FILE
    if not file.is_file():
        return []
    result = read_json(file)
    try:
        if "points" in result:
            return [
                _metric("accuracy", "accuracy of answers, mean over distances", result["mean_accuracy"]),
                _metric("accuracy", "the same with the memory erased", result["mean_accuracy_memory_erased"]),
            ]
        unit, likelihood = result["unit"], result["with_memory"]
        return [
            _metric("perplexity", "perplexity per token", likelihood["perplexity"]),
            _metric(f"bits_per_{unit}", f"bits per {unit}", likelihood["bits_per_byte"]),
            _metric(
                f"bits_per_{unit}",
                f"bits per {unit} with the memory erased before every segment",
                result["memory_erased"]["bits_per_byte"],
            ),
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} lacks a value: {error}") from error


def _metric(kind: str, name: str, value: float) -> dict[str, Any]:
    return {"type": kind, "name": name, "value": round(value, 4)}


def _describe_training(run_config: dict[str, Any], run_folder: Path | None) -> dict[str, Any]:
    training, data = run_config.get("training", {}), run_config.get("data", {})
    described = {"data": _describe_data(data)}
    described |= {key: training[key] for key in _TRAINING_KEYS if key in training}
    if "seed" in run_config:
        described["seed"] = run_config["seed"]
    if run_folder is not None and (run_folder / VERSIONS_FILE).is_file():
        versions = read_json(run_folder / VERSIONS_FILE)
        described["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return described


def _describe_test(run_config: dict[str, Any] | None) -> str:
    if isinstance((run_config or {}).get("data", {}).get("recall"), dict):
        return "new episodes of the training run's recall task"
    return "held-out documents of the training run"


def _describe_data(data: dict[str, Any]) -> str:
    if isinstance(data.get("recall"), dict):
        return f"recall task ({data['recall'].get('task')})"
    train = data.get("train") or {}
    kind, paths = train.get("kind"), train.get("path") or []
    # Only the names of files: the folders above them tell about the machine.
    files = [Path(path).name for path in ([paths] if isinstance(paths, str) else paths)]
    names = [str(train["name"])] if kind == "huggingface" and "name" in train else files
    return f"{kind}: {', '.join(names)}" if names else str(kind)
