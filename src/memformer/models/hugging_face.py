"""Models saved by transformers, and models of the Hugging Face hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memformer.errors import CheckpointError, InputError, first_line
from memformer.utils.files import user_path

# transformers puts the weights of a model with a head under the name of the model inside (`base_model_prefix`).
WEIGHTS_PREFIX = "memformer."
SHARD_INDEX_FILE = "model.safetensors.index.json"
# Written by transformers into every config.
_VERSION_KEY = "transformers_version"
# Keys that transformers may write into a config, none of which changes what a model computes.
FOREIGN_KEYS = frozenset({
    _VERSION_KEY,
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "max_length",
    "max_position_embeddings",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "prefix",
    "problem_type",
    "pruned_heads",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "use_cache",
})  # fmt: skip
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)
_DOWNLOADED = ["*.json", "*.safetensors"]


def without_foreign_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json without those that transformers added, if transformers wrote it."""
    if _VERSION_KEY not in fields:
        return dict(fields)
    return {name: value for name, value in fields.items() if name not in FOREIGN_KEYS}


def find_model_folder(name: str | Path) -> Path:
    """Return the folder of a saved model: a local one, or a copy of a model of the Hugging Face hub.

    A text `owner/name` or `owner/name@revision` names a model of the hub, unless something has this path or there is a
    folder `owner`. Its configs, tokenizer and safetensors files are downloaded once, into the cache of
    `huggingface_hub`; with the environment variable `HF_HUB_OFFLINE=1` only the cache is read.

    Args:
        name: A folder, or the name of a model of the hub; a `Path` is always a folder, which need not exist.

    Raises:
        InputError: The hub has no such model or revision, or it cannot be reached and the cache has no copy.
    """
    folder = user_path(name)
    match = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or folder.exists() or folder.parent.is_dir():
        return folder
    return _download(match["name"], match["revision"])


def find_saved_model(name: str | Path) -> Path:
    """Return what `find_model_folder` returns, if it is not a run folder.

    Raises:
        CheckpointError: It is a run folder, which holds the saved model in a folder of its own.
        InputError: As `find_model_folder`.
    """
    folder = find_model_folder(name)
    best = folder / "best"
    if not (folder / "config.json").exists() and (best / "config.json").exists():
        raise CheckpointError(
            f"{folder} is a run folder; its model is in {best}, and memformer.training.run_folder.load_run reads it "
            "with its tokenizer"
        )
    return folder


def _download(name: str, revision: str | None) -> Path:
    shown = f"there is no folder {name}, and the model {name!r} of the Hugging Face hub"
    try:
        from huggingface_hub import constants, errors, snapshot_download  # slow to import
    except ImportError as error:
        raise InputError(f"{shown} needs the package: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise InputError(f"{shown} needs a login with access to it (hf auth login)") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{shown} does not exist, or needs a login (hf auth login)") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{shown} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        at = "" if revision is None else f" at revision {revision!r}"
        raise InputError(f"{shown} is not in the cache{at}, and {reason}") from error
    # The package's own message best explains any other failure.
    except Exception as error:
        raise InputError(f"{shown} cannot be loaded: {first_line(error)}") from error
