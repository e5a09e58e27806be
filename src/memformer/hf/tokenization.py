"""Text tokenizers of this library as tokenizers of transformers."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from memformer.data.document_end import document_end_of
from memformer.data.tokenizer_json import BEGIN_TOKEN, END_TOKEN, as_tokenizer_json
from memformer.data.tokenizer_training import load_tokenizer
from memformer.data.tokenizers import Tokenizer
from memformer.models.hugging_face import find_model_folder


def as_hf_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return a `PreTrainedTokenizerFast` with the same ids for any text.

    It adds no token to a text. Its token for begin and padding has the id of the model's `[BOS]`, which is never read.
    As in all tokenizers of transformers, a text that contains the name of a special token is read as that token; the
    tokenizer's argument `split_special_tokens=True` reads the characters instead.

    Raises:
        InputError: The tokenizer reads images.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=as_tokenizer_json(tokenizer, has_begin_token=True),
        bos_token=BEGIN_TOKEN,
        pad_token=BEGIN_TOKEN,
        eos_token=None if document_end_of(tokenizer) is None else END_TOKEN,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class MemformerTokenizer(PreTrainedTokenizerFast):
    """Reader of the tokenizers that `memformer.data.save_tokenizer` wrote, for `AutoTokenizer`."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: object, **kwargs: object) -> Any:
        """Return the tokenizer in a folder, or of a model on the hub, as a `PreTrainedTokenizerFast`.

        Args:
            folder: The folder, or a name on the hub (see `find_model_folder`).
            args: Not read.
            kwargs: `revision`, `padding_side`, `truncation_side`, `model_max_length`, `chat_template` and special
                tokens such as `pad_token` are those of transformers; others, which `AutoTokenizer` adds, are not read.

        Raises:
            CheckpointError: A file is missing or damaged.
            InputError: The tokenizer reads images, or cannot be downloaded.
        """
        revision = kwargs.get("revision")
        is_named = revision is not None and isinstance(folder, str) and not Path(folder).exists()
        found = find_model_folder(f"{folder}@{revision}" if is_named else folder)
        tokenizer = as_hf_tokenizer(load_tokenizer(found))
        for name in ("padding_side", "truncation_side", "model_max_length", "chat_template"):
            if name in kwargs:
                setattr(tokenizer, name, kwargs[name])
        tokens = {name: kwargs.get(name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
        tokenizer.add_special_tokens({name: token for name, token in tokens.items() if token is not None})
        return tokenizer
