"""Session: a token stream with a memory, to feed, score, predict, generate, save and continue."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from memformer.errors import InputError, InputTypeError
from memformer.generation.sampling import check_sampling, sample
from memformer.generation.session_files import check_state, check_weights, read_state, write_state
from memformer.generation.streams import Streams
from memformer.generation.token_ids import TokenIds, check_token_rows, in_chunks
from memformer.models import LanguageModel
from memformer.models.recurrence import reading, unwrapped
from memformer.shapes import Memory
from memformer.utils.checks import (
    Integer,
    Integers,
    Number,
    check_integer,
    check_integers,
    check_likelihood,
    check_seed,
)
from memformer.utils.files import user_path
from memformer.utils.words import with_article

AllowedTokens = Callable[[int, int], Integers]


class Session:
    """One stream of tokens, or several in a batch; the size of the state does not depend on the number of tokens.

    The state of a row is its memory, the hidden states of its last full segment with the tokens that the decoder reads
    again (for a baseline, which has one stack of layers: the last token of that segment), and the tokens fed after it.
    A segment is read into the memory as soon as it is full. The state depends only on the tokens, not on how they were
    split into calls. Rows may have different numbers of tokens. The model always reads in evaluation mode; its own mode
    does not change.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
        compiled: Compile reading and decoding of a Memformer. With few rows, models of 0.1 to 4 M parameters then read
            two to six times and decode more than twice as fast (the latter from the second segment on). The weights are
            stored twice. Compiling takes up to a minute, once per model and number of rows, and again if the weights
            have changed. Needs a C++ compiler. On CUDA, sessions launch CUDA graphs, compiled or not.
        stop_token_ids: Token ids at which `generate` and `stream` stop, unless they are given others: usually the
            end-of-document token of the model's tokenizer, as `LoadedRun.session` sets it.

    Raises:
        InputError: `batch_size` is below 1, a stop token is outside the vocabulary, or the model cannot be compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: Integer = 1,
        compiled: bool = False,
        stop_token_ids: Integers | None = None,
    ) -> None:
        batch_size = check_integer("batch_size", batch_size, 1)
        self.model = _language_model(model)
        self.compiled = compiled
        self.stop_token_ids: frozenset[int] = frozenset()
        self.stop_token_ids = self._check_stop(stop_token_ids)
        self._streams = Streams(self.model, batch_size, compiled=compiled)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self._streams.batch_size

    @property
    def memory(self) -> Memory:
        """Copy of the memory after the last full segment."""
        return self._streams.state()["memory"].clone()

    @property
    def num_tokens(self) -> list[int]:
        """Number of tokens fed or generated so far, for each row."""
        return list(self._streams.num_fed)

    @property
    def state_bytes(self) -> int:
        """Size in bytes of the state that `save` writes: memory, context and pending tokens. It never grows."""
        return sum(tensor.nbytes for tensor in self._streams.state().values())

    def feed(self, token_ids: TokenIds) -> None:
        """Read tokens.

        Args:
            token_ids: Token ids of one stream, or a list with the token ids of each row; rows may differ in length.

        Raises:
            InputError: A token id is outside the vocabulary, or the number of rows is not `batch_size`.
            InputTypeError: The token ids are not integers.
        """
        for chunk in in_chunks(self._check(token_ids)):
            self._streams.feed(chunk)

    def score(self, token_ids: TokenIds) -> Tensor | list[Tensor]:
        """Read tokens; return the negative log-likelihood of each in nats, given all tokens before it.

        The first token of a stream is predicted from `[BOS]`. Segments are read one by one as in `feed`, and decoded
        together, up to some hundred tokens at once. Apart from the result, memory does not depend on the number of
        tokens.

        Args:
            token_ids: As in `feed`.

        Returns:
            (tokens,) on the CPU, in at least float32; a list with the values of each row if there are several.

        Raises:
            InputError: A token id is outside the vocabulary, the number of rows is not `batch_size`, or a value is not
                finite, because the model's weights or its memory are broken.
            InputTypeError: The token ids are not integers.
        """
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        rows = self._read_out(token_ids, self.model.token_nll, empty=torch.empty(0, dtype=dtype, device="cpu"))
        check_likelihood(*(row.numpy() for row in rows))
        return rows[0] if self.batch_size == 1 else rows

    def token_logits(self, token_ids: TokenIds) -> Tensor | list[Tensor]:
        """Read tokens; return the logits that predicted each of them, given all tokens before it.

        It costs as much as `score`, but the result is V times as large.

        Args:
            token_ids: As in `feed`.

        Returns:
            (tokens, V) on the CPU; a list with the logits of each row if there are several.

        Raises:
            InputError: A token id is outside the vocabulary, or the number of rows is not `batch_size`.
            InputTypeError: The token ids are not integers.
        """
        weight = next(self.model.parameters())
        empty = torch.empty(0, self.model.vocab_size, dtype=weight.dtype, device="cpu")
        rows = self._read_out(token_ids, self.model.decode, empty=empty)
        return rows[0] if self.batch_size == 1 else rows

    def next_token_logits(self) -> Float[Tensor, "B V"]:
        """Return the next-token logits of each row, given all tokens so far."""
        return self._streams.next_token_logits().clone()  # generation goes on from the original

    def generate(
        self,
        max_new_tokens: Integer,
        *,
        temperature: Number = 1.0,
        top_k: Integer | None = None,
        top_p: Number | None = None,
        seed: Integer | None = None,
        stop_token_ids: Integers | None = None,
        allowed_token_ids: AllowedTokens | None = None,
    ) -> list[int] | list[list[int]]:
        """Generate tokens; return their ids (a list for each row if there are several) and add them to the stream.

        Args:
            max_new_tokens: Number of tokens to generate per row, unless a stop token ends the row earlier.
            temperature: Sampling temperature: 1 samples from the model's distribution, lower values sharpen it, 0 is
                greedy.
            top_k: Sample only from the k most likely tokens. None: from all.
            top_p: Sample only from the most likely tokens whose total probability reaches this value. None: from all.
            seed: Random seed, which makes the result reproducible. None: use PyTorch's global generator.
            stop_token_ids: One token id or several. A row ends with the first of them that it generates; its state
                does not change while other rows continue. An empty list: no row stops. None: those of the session.
            allowed_token_ids: Called before each token with the number of the row and the number of its tokens so far;
                returns the token ids of which one may follow. None: all.

        Raises:
            InputError: An option is out of range, or no token is allowed.
            InputTypeError: `max_new_tokens` is not an integer.
        """
        stop = self._check_stop(stop_token_ids)
        steps = list(
            self.stream(
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_token_ids=stop,
                allowed_token_ids=allowed_token_ids,
            )
        )
        rows = [_until_stop([step[row] for step in steps], stop) for row in range(self.batch_size)]
        return rows[0] if self.batch_size == 1 else rows

    def stream(
        self,
        max_new_tokens: Integer,
        *,
        temperature: Number = 1.0,
        top_k: Integer | None = None,
        top_p: Number | None = None,
        seed: Integer | None = None,
        stop_token_ids: Integers | None = None,
        allowed_token_ids: AllowedTokens | None = None,
    ) -> Iterator[list[int]]:
        """Generate tokens one step at a time and yield one token id for each row; arguments as in `generate`.

        A row that has stopped yields its stop token, without reading it again, until all rows have stopped.

        Raises:
            InputError: An option is out of range, no token is allowed, or rows were selected since the last step.
            InputTypeError: `max_new_tokens` is not an integer.
        """
        num_tokens = check_integer("max_new_tokens", max_new_tokens, 0)
        if allowed_token_ids is not None and not callable(allowed_token_ids):
            raise InputTypeError("allowed_token_ids must be a function of a row and its number of tokens")
        sampling = check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        stop = self._check_stop(stop_token_ids)
        generator = None
        if seed is not None:
            generator = torch.Generator(self.model.device).manual_seed(check_seed("seed", seed))

        def steps() -> Iterator[list[int]]:
            stopped: dict[int, int] = {}  # row to its stop token
            num_selections = self._streams.num_selections
            for _ in range(num_tokens):
                if self._streams.num_selections != num_selections:
                    raise InputError("the rows were selected during generation; call stream again")
                allowed = None if allowed_token_ids is None else self._allowed(allowed_token_ids, stopped)
                drawn = sample(self.next_token_logits(), **sampling, generator=generator, allowed=allowed)
                self._streams.feed([row[:0] if number in stopped else row for number, row in enumerate(drawn[:, None])])
                tokens = [stopped.get(row, token) for row, token in enumerate(drawn.tolist())]
                yield tokens
                stopped = {row: token for row, token in enumerate(tokens) if token in stop}
                if len(stopped) == self.batch_size:
                    return

        # A separate function, so that errors are raised by this call and not at the first token.
        return steps()

    def select_rows(self, rows: Integers) -> None:
        """Replace the rows by the given ones, in this order; `batch_size` becomes their number.

        A row given twice becomes two rows, which continue independently (beams); a row that is not given ends.

        Args:
            rows: Numbers of the rows, from 0; one number or several.

        Raises:
            InputError: No row is given, or there is no row with this number.
            InputTypeError: A number is not an integer.
        """
        chosen = check_integers("row", rows, 0, self.batch_size - 1)
        if not chosen:
            raise InputError("no rows are given; a session needs at least 1")
        self._streams.select_rows(chosen)

    def reorder(self, rows: Integers) -> None:
        """Do the same as `select_rows` with as many rows as there are, as a step of beam search does.

        Raises:
            InputError: There is no row with this number, or the number of rows would change.
            InputTypeError: A number is not an integer.
        """
        chosen = check_integers("row", rows, 0, self.batch_size - 1)
        if len(chosen) != self.batch_size:
            raise InputError(
                f"a session of {self.batch_size} rows cannot be reordered to {len(chosen)}; use select_rows"
            )
        self.select_rows(chosen)

    def _check_stop(self, token_ids: Integers | None) -> frozenset[int]:
        """Return the stop token ids as a set; None: those of the session.

        Raises:
            InputError: A token id is outside the vocabulary.
            InputTypeError: A token id is not an integer.
        """
        if token_ids is None:
            return self.stop_token_ids
        return frozenset(check_integers("stop token id", token_ids, 0, self.model.vocab_size - 1))

    def _allowed(self, allowed_token_ids: AllowedTokens, stopped: Collection[int]) -> Bool[Tensor, "B V"]:
        """Return True at the tokens that may follow in each row, and everywhere in rows that have stopped.

        Raises:
            InputError: There is none, or a token id is outside the vocabulary.
            InputTypeError: A token id is not an integer.
        """
        allowed = torch.zeros(self.batch_size, self.model.vocab_size, dtype=torch.bool, device="cpu")
        for row, num_tokens in enumerate(self.num_tokens):
            if row in stopped:
                allowed[row] = True
                continue
            ids = check_integers("allowed token id", allowed_token_ids(row, num_tokens), 0, self.model.vocab_size - 1)
            if not ids:
                raise InputError(f"allowed_token_ids lets no token follow the {num_tokens:,} tokens of row {row}")
            allowed[row, ids] = True
        return allowed.to(self.model.device)

    def __deepcopy__(self, memo: dict[int, object]) -> "Session":
        """Return a session with the same state, which continues on its own; both use the same model."""
        session = Session(
            self.model, batch_size=self.batch_size, compiled=self.compiled, stop_token_ids=self.stop_token_ids
        )
        with reading(self.model):
            session._streams.set_state({name: tensor.clone() for name, tensor in self._streams.state().items()})
        memo[id(self)] = session
        return session

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the state and a fingerprint of the model's weights as one safetensors file, completely or not at all.

        Args:
            path: The file.
            metadata: Additional metadata of the file, names and values as strings, which `load` ignores.

        Raises:
            InputError: The state is not finite, because the model's weights or its memory are broken; or the metadata
                have a lone surrogate.
            InputTypeError: A name or a value of the metadata is not a string.
            SaveError: Writing failed; an earlier file is intact.
        """
        write_state(user_path(path), self._streams.state(), model=self.model, metadata=metadata)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: nn.Module,
        compiled: bool = False,
        any_weights: bool = False,
        stop_token_ids: Integers | None = None,
    ) -> "Session":
        """Return the session saved by `save`.

        Args:
            path: The file.
            model: The model that has read the stream so far.
            compiled: Compile reading and decoding, as for a new session.
            any_weights: Allow other weights of the same shapes than those that have read the stream so far. It is not
                checked whether the memory is meaningful to them.
            stop_token_ids: As for a new session.

        Raises:
            CheckpointError: The file is missing, damaged, of another version, or of another model.
            InputError: As for a new session.
        """
        path, inner = user_path(path), _language_model(model)
        with reading(inner):
            state, metadata = read_state(path)
        batch_size = state["memory"].shape[0]
        session = cls(inner, batch_size=batch_size, compiled=compiled, stop_token_ids=stop_token_ids)
        check_state(path, state, expected=session._streams.state(), model=inner)
        if not any_weights:
            check_weights(path, metadata, model=inner)
        with reading(inner):
            session._streams.set_state(state)
        return session

    def _read_out(self, token_ids: TokenIds, readout: Callable[..., Tensor], *, empty: Tensor) -> list[Tensor]:
        """Read tokens; return for each row the values of `readout` for its tokens."""
        found = [[empty] for _ in range(self.batch_size)]
        for chunk in in_chunks(self._check(token_ids)):
            for row, pieces in enumerate(self._streams.read_out(chunk, readout)):
                found[row] += pieces
        with reading(self.model):
            return [torch.cat(pieces) for pieces in found]

    def _check(self, token_ids: TokenIds) -> list[NDArray[np.integer]]:
        return check_token_rows(token_ids, batch_size=self.batch_size, vocab_size=self.model.vocab_size)


def _language_model(model: nn.Module) -> LanguageModel:
    inner = unwrapped(model)
    if not isinstance(inner, LanguageModel):
        # A RecurrentModel of the user's own may lack what a session needs.
        raise InputTypeError(f"model is {with_article(type(inner).__name__)}; a session needs a LanguageModel")
    return inner


def _until_stop(ids: list[int], stop: Collection[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids, start=1) if token in stop), len(ids))
    return ids[:end]
