"""Documents or token ids of a stream as rollouts of one row, and token ids as texts."""

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from memformer.data import Corpus, LaneStream, PixelTokenizer, Tokenizer
from memformer.data.lanes import PADDING_TOKEN_ID
from memformer.rollout import Rollout
from memformer.utils.checks import Integer, check_integer
from memformer.utils.token_ids import TokenRow, check_token_ids

_ROLLOUT_TIMESTEPS = 16
_TOKENS_AT_ONCE = 4096
# A UTF-8 character has at most 4 bytes, so at most 3 tokens before it belong to the same character.
_TOKENS_OF_CHARACTER = 3


def read_documents(corpus: Corpus, *, segment_length: Integer, bos_token_id: Integer) -> LaneStream:
    """Return a stream that reads each document once, one after another, as rollouts of one row."""
    return LaneStream(
        corpus,
        num_lanes=1,
        segment_length=segment_length,
        rollout_length=_ROLLOUT_TIMESTEPS,
        bos_token_id=bos_token_id,
        num_epochs=1,
    )


def read_stream(pieces: Iterable[TokenRow], *, segment_length: Integer, bos_token_id: Integer) -> Iterator[Rollout]:
    """Yield one document, whose token ids arrive in pieces of any length, as rollouts of one row.

    The timesteps are those of a `LaneStream`. Memory does not grow with the length of the document.

    Args:
        pieces: Token ids, each piece a list, an array or a tensor of one dimension.
        segment_length: Tokens S of a segment.
        bos_token_id: Token that the first timestep reads; the token ids are below it.

    Raises:
        InputError: A token id is out of range, or a piece is not one-dimensional.
        InputTypeError: A piece does not consist of integers.
    """
    length = check_integer("segment_length", segment_length, 1)
    bos = check_integer("bos_token_id", bos_token_id, 0)
    at_once = length * max(1, _TOKENS_AT_ONCE // length)
    previous = None
    waiting = np.empty(0, np.int64)
    for piece in chain(pieces, [None]):
        if piece is not None:
            waiting = np.concatenate([waiting, check_token_ids(piece, vocab_size=bos).astype(np.int64)])
        while len(waiting) >= at_once or (piece is None and len(waiting)):
            tokens, waiting = waiting[:at_once], waiting[at_once:]
            rollout = _make_rollout(tokens, previous, length=length, bos=bos)
            previous = tokens[-length:]
            yield rollout


def _make_rollout(tokens: NDArray[np.int64], previous: NDArray[np.int64] | None, *, length: int, bos: int) -> Rollout:
    """Return the timesteps that predict these tokens; `previous` is the segment before them, None at the beginning."""
    num_timesteps = -(-len(tokens) // length)
    targets = np.full(num_timesteps * length, PADDING_TOKEN_ID)
    targets[: len(tokens)] = tokens
    first = np.full(length, PADDING_TOKEN_ID)
    first[: 1 if previous is None else length] = bos if previous is None else previous
    inputs = np.concatenate([first, targets[:-length]])
    target_padding = np.arange(len(targets)) >= len(tokens)
    input_padding = (np.arange(len(targets)) >= 1) & (np.arange(len(targets)) < length) & (previous is None)
    reset = (np.arange(num_timesteps) == 0) & (previous is None)
    shape = num_timesteps, 1, length
    return Rollout(
        inputs=torch.from_numpy(inputs.reshape(shape)),
        targets=torch.from_numpy(targets.reshape(shape)),
        reset=torch.from_numpy(reset[:, None]),
        input_padding=torch.from_numpy(input_padding.reshape(shape)) if input_padding.any() else None,
        target_padding=torch.from_numpy(target_padding.reshape(shape)) if target_padding.any() else None,
    )


class TokenTexts:
    """Texts of token ids.

    Args:
        tokenizer: The tokenizer. None: all texts are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def of(self, ids: list[int], *, before: list[int] | None = None) -> list[str]:
        """Return the text of each token; a character that takes several tokens is the text of the last of them.

        Args:
            ids: Token ids; an id beyond the tokenizer's vocabulary is a special token of the model, and comes first.
            before: The tokens before them, which may hold the beginning of a character.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        if ids and ids[0] >= tokenizer.vocab_size:
            return ["[BOS]" if ids[0] == tokenizer.vocab_size else f"[{ids[0]}]", *self.of(ids[1:])]
        if isinstance(tokenizer, PixelTokenizer):
            return [str(token) for token in ids]
        context = [token for token in before or [] if token < tokenizer.vocab_size][-_TOKENS_OF_CHARACTER:]
        texts = [""] * (len(context) + len(ids) + 1)
        taken = 0

        def counted() -> Iterator[int]:
            nonlocal taken
            for token in [*context, *ids]:
                taken += 1
                yield token
            # Text after the last token is an incomplete character, which belongs to the tokens that follow.
            taken += 1

        for text in tokenizer.decode_stream(counted()):
            texts[taken - 1] += text
        return texts[len(context) : -1]

    def joined(self, ids: list[int], *, before: list[int] | None = None) -> str:
        """Return the text of the tokens as one string."""
        separator = " " if isinstance(self._tokenizer, PixelTokenizer) else ""
        return separator.join(self.of(ids, before=before))

    @property
    def image_width(self) -> int | None:
        """Pixels of a row, if the tokens are pixels; otherwise None."""
        return self._tokenizer.width if isinstance(self._tokenizer, PixelTokenizer) else None
