"""Text tokenizers of this library as tokenizers of transformers."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from memformer.data.document_end import document_end_of
from memformer.data.tokenizer_json import BEGIN_TOKEN, END_TOKEN, as_tokenizer_json
from memformer.data.tokenizer_training import load_tokenizer
from memformer.data.tokenizers import Tokenizer
from memformer.models.hugging_face import find_model_folder

# Arguments of `from_pretrained` that say how a folder is found and loaded.
_LOADING = {
    "cache_dir",
    "config",
    "force_download",
    "from_slow",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "tokenizer_file",
    "tokenizer_type",
    "trust_remote_code",
    "use_fast",
}


def as_hf_tokenizer(tokenizer: Tokenizer, **options: Any) -> Any:
    """Return a `PreTrainedTokenizerFast` with the same ids for any text.

    It adds no token to a text. Its token for begin and padding has the id of the model's `[BOS]`, which is never read.
    As in all tokenizers of transformers, a text that contains the name of a special token is read as that token; the
    tokenizer's argument `split_special_tokens=True` reads the characters instead.

    Args:
        tokenizer: The tokenizer.
        options: Arguments of `PreTrainedTokenizerFast`.

    Raises:
        InputError: The tokenizer reads images.
    """
    own = {
        "bos_token": BEGIN_TOKEN,
        "pad_token": BEGIN_TOKEN,
        "eos_token": None if document_end_of(tokenizer) is None else END_TOKEN,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    tokenizer_json = as_tokenizer_json(tokenizer, has_begin_token=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_json, **(own | options))


class MemformerTokenizer(PreTrainedTokenizerFast):
    """Reader of the tokenizers that `memformer.data.save_tokenizer` wrote, for `AutoTokenizer`."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: object, **kwargs: Any) -> Any:
        """Return the tokenizer in a folder, or of a model on the hub, as a `PreTrainedTokenizerFast`.

        Args:
            folder: The folder, or a name on the hub (see `find_model_folder`).
            args: Not read.
            kwargs: `revision`, `subfolder`, and arguments of `PreTrainedTokenizerFast`. Other arguments of
                transformers on how to find and load a folder are not read.

        Raises:
            CheckpointError: A file is missing or damaged.
            InputError: The tokenizer reads images, or cannot be downloaded.
        """
        revision = kwargs.get("revision")
        is_named = revision is not None and isinstance(folder, str) and not Path(folder).exists()
        found = find_model_folder(f"{folder}@{revision}" if is_named else folder) / (kwargs.get("subfolder") or "")
        options = {name: kwargs[name] for name in kwargs if name not in _LOADING and not name.startswith("_")}
        return as_hf_tokenizer(load_tokenizer(found), **options)
