"""Export of trained models to folders that transformers and the Hugging Face hub read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memformer.data.document_end import document_end_of, plain
from memformer.data.tokenizer_training import has_tokenizer
from memformer.data.tokenizers import Tokenizer
from memformer.errors import InputError, first_line
from memformer.hf.model_card import write_card_text
from memformer.hf.registration import as_causal_lm
from memformer.hf.remote_code import auto_map_of
from memformer.hf.tokenization import as_hf_tokenizer
from memformer.models import LanguageModel, load_model
from memformer.models.hugging_face import find_model_folder
from memformer.training.run_folder import BEST, RUN_CONFIG_FILE, load_run
from memformer.utils.files import new_folder, user_path

CARD_FILE = "README.md"
# The core reads weights in one file.
_ONE_FILE = "100TB"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ExportSource:
    """A trained model, and what the model card says about it.

    Attributes:
        model: The model.
        tokenizer: Its text tokenizer. None: it has none.
        no_tokenizer: Sentence on why there is none.
        run_folder: Folder of the training run. None: the folder was written by `save_pretrained`.
        run_config: Config of the training run as plain values.
        is_best: Whether these are the weights that the run's final evaluation is about.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    no_tokenizer: str | None
    run_folder: Path | None = None
    run_config: dict[str, Any] | None = None
    is_best: bool = False


def read_export_source(name: str | Path, *, which: str = "best", num_slots: int | None = None) -> ExportSource:
    """Return the model in a run folder or a folder from `save_pretrained`, with its tokenizer, if any.

    Args:
        name: The folder.
        which: Weights of a run: "best" or "last".
        num_slots: Number of memory slots, for models with `exchangeable_slots`. None: as trained.

    Raises:
        InputError: The folder holds no model, its weights are not finite, or the model does not support `num_slots`.
        CheckpointError: A file is missing or damaged.
    """
    folder = find_model_folder(name)
    is_run = (folder / RUN_CONFIG_FILE).is_file()
    if is_run or has_tokenizer(folder) or not folder.is_dir():
        run = load_run(folder, which=which, num_slots=num_slots)
        values = {"pixels": "the grey levels of images", "bins": "bins of the values of series"}.get(run.tokenizer.kind)
        source = ExportSource(
            model=run.model,
            tokenizer=run.tokenizer if values is None else None,
            no_tokenizer=None if values is None else f"The token ids are {values}, so there is no tokenizer.",
            run_folder=folder if is_run else None,
            run_config=run.run_config,
            is_best=run.weights == folder / BEST and num_slots is None,
        )
    else:
        model = load_model(folder, num_slots=num_slots)
        source = ExportSource(model=model, tokenizer=None, no_tokenizer="The model was saved without a tokenizer.")
    if not all(bool(parameter.isfinite().all()) for parameter in source.model.parameters()):
        raise InputError(f"the weights in {folder} are not finite, so the model is of no use")
    return source


def export(
    source: ExportSource,
    folder: str | Path,
    *,
    hub_name: str | None = None,
    license_name: str | None = None,
    auto_map: bool = False,
) -> Path:
    """Write a folder that transformers reads, with a model card, completely or not at all; return its path.

    Args:
        source: What to export.
        folder: The folder; it must be new or empty.
        hub_name: Name on the hub (owner/name) that the card's examples load. None: the folder's name.
        license_name: License in the card, as the hub names it. None: left to the user.
        auto_map: Also write the code that transformers loads with `trust_remote_code=True`, so that
            `import memformer.hf` is not needed. The package is needed all the same.

    Raises:
        InputError: The folder is a file, or contains files.
        SaveError: Writing failed; nothing is left behind.
    """
    folder = user_path(folder).absolute()
    with new_folder(folder) as partial:
        _write(source, partial, name=folder.name, hub_name=hub_name, license_name=license_name, auto_map=auto_map)
    return folder


def _write(
    source: ExportSource,
    folder: Path,
    *,
    name: str,
    hub_name: str | None,
    license_name: str | None,
    auto_map: bool,
) -> None:
    model = as_causal_lm(source.model)
    end = None if source.tokenizer is None else document_end_of(source.tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    if auto_map:
        causal = type(model).__name__
        model.config.auto_map = auto_map_of(
            config=type(model.config).__name__,
            model=causal.replace("ForCausalLM", "Model"),
            causal_model=causal,
        )
    model.save_pretrained(folder, max_shard_size=_ONE_FILE)
    if source.tokenizer is not None:
        as_hf_tokenizer(source.tokenizer).save_pretrained(folder)
    card = write_card_text(
        source.model,
        name=name if hub_name is None else hub_name.partition("/")[2],
        source=hub_name or name,
        run_folder=source.run_folder,
        run_config=source.run_config,
        has_result=source.is_best,
        no_tokenizer=source.no_tokenizer,
        is_of_words=source.tokenizer is not None and plain(source.tokenizer).kind == "word",
        license_name=license_name,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def check_hub_name(name: str) -> None:
    """Check the name of a model on the hub.

    Raises:
        InputError: It is not of the form owner/name.
    """
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"push ({name!r}) must be the name of a model on the hub, owner/name")


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face hub as a model, which is created if missing; return its address.

    Raises:
        InputError: The upload failed; the message is that of `huggingface_hub`.
    """
    check_hub_name(name)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, repo_type="model", exist_ok=True))
        api.upload_folder(repo_id=name, repo_type="model", folder_path=folder)
    # The package's own message best explains a failure (no network, no login, no permission).
    except Exception as error:
        raise InputError(f"{folder} was written, but could not be uploaded as {name}: {first_line(error)}") from error
    return address
