"""Session: a token stream with a memory, to feed, predict, generate, save and continue."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from memformer.errors import CheckpointError, InputError, InputTypeError
from memformer.generation.contexts import make_context
from memformer.generation.sampling import check_sampling, sample
from memformer.models import LanguageModel
from memformer.models.recurrence import reading, unwrapped
from memformer.shapes import AnyMemory
from memformer.utils.checks import Integer, Integers, Number, check_integer, check_integers, check_seed
from memformer.utils.files import CHECKSUM, read_tensors_and_metadata, user_path, write_tensors

TokenIds = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.integer] | Tensor

FORMAT = "memformer-session"
FORMAT_VERSION = "3"
WEIGHTS = "weights"
FEED_CHUNK_TOKENS = 1 << 20


class Session:
    """One stream of tokens, or several in a batch; the size of the state does not depend on the number of tokens.

    The state of a row is its memory, the hidden states of its last full segment (for a baseline, which has one stack of
    layers: the last token of that segment), and the tokens fed after it. A segment is read into the memory as soon as
    it is full. The state depends only on the tokens, not on how they were split into calls. Rows may have different
    numbers of tokens. The model always reads in evaluation mode; its own mode does not change.

    Args:
        model: The model that reads.
        batch_size: Number of rows.
        compiled: Compile reading and decoding of a Memformer. With few rows, small models then read about five times
            and decode more than twice as fast (the latter from the second segment on). The weights are stored twice.
            Compiling takes up to a minute, once per model and number of rows, and again if the weights have changed.
            Needs a C++ compiler. On CUDA, sessions launch CUDA graphs, compiled or not.
    """

    def __init__(self, model: nn.Module, *, batch_size: Integer = 1, compiled: bool = False) -> None:
        batch_size = check_integer("batch_size", batch_size, 1)
        self.model = model = _language_model(model)
        self.compiled = compiled
        self.batch_size = batch_size
        self._num_pending = [0] * batch_size
        self._num_fed = [0] * batch_size
        with reading(model):
            # On the CPU, because tokens are accessed one by one.
            self._tokens = torch.zeros((batch_size, model.segment_length), dtype=torch.int64, device="cpu")
            self._context = make_context(model, batch_size, compiled=compiled)
            self._memory = self._context.first_memory.detach().clone()

    @property
    def memory(self) -> AnyMemory:
        """Copy of the memory after the last full segment."""
        return self._memory.clone()

    @property
    def num_tokens(self) -> list[int]:
        """Number of tokens fed or generated so far, for each row."""
        return list(self._num_fed)

    @property
    def state_bytes(self) -> int:
        """Size in bytes of the state that `save` writes: memory, context and pending tokens. It never grows."""
        return sum(tensor.nbytes for tensor in self._state().values())

    def feed(self, token_ids: TokenIds) -> None:
        """Read tokens.

        Args:
            token_ids: Token ids of one stream, or a list with the token ids of each row; rows may differ in length.

        Raises:
            InputError: A token id is outside the vocabulary, or the number of rows is not `batch_size`.
            InputTypeError: The token ids are not integers.
        """
        rows = [self._check_ids(row) for row in self._split_rows(token_ids)]
        for start in range(0, max(len(row) for row in rows), FEED_CHUNK_TOKENS):
            self._feed([torch.from_numpy(row[start : start + FEED_CHUNK_TOKENS].astype(np.int64)) for row in rows])

    def next_token_logits(self) -> Float[Tensor, "B V"]:
        """Return the next-token logits of each row, given all tokens so far."""
        with reading(self.model):
            return self._context.next_token_logits(self._tokens, self._num_pending, memory=self._memory)

    def generate(
        self,
        max_new_tokens: Integer,
        *,
        temperature: Number = 1.0,
        top_k: Integer | None = None,
        top_p: Number | None = None,
        seed: Integer | None = None,
        stop_token_ids: Integers | None = None,
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
                does not change while other rows continue.

        Raises:
            InputError: An option is out of range.
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
    ) -> Iterator[list[int]]:
        """Generate tokens one step at a time and yield one token id for each row; arguments as in `generate`.

        A row that has stopped yields its stop token, without reading it again, until all rows have stopped.

        Raises:
            InputError: An option is out of range.
            InputTypeError: `max_new_tokens` is not an integer.
        """
        num_tokens = check_integer("max_new_tokens", max_new_tokens, 0)
        sampling = check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        stop = self._check_stop(stop_token_ids)
        generator = None
        if seed is not None:
            generator = torch.Generator(self.model.device).manual_seed(check_seed("seed", seed))

        def steps() -> Iterator[list[int]]:
            stopped: dict[int, int] = {}  # row to its stop token
            for _ in range(num_tokens):
                drawn = sample(self.next_token_logits(), **sampling, generator=generator)
                self._feed([row[:0] if number in stopped else row for number, row in enumerate(drawn[:, None])])
                tokens = [stopped.get(row, token) for row, token in enumerate(drawn.tolist())]
                yield tokens
                stopped = {row: token for row, token in enumerate(tokens) if token in stop}
                if len(stopped) == self.batch_size:
                    return

        # A separate function, so that errors are raised by this call and not at the first token.
        return steps()

    def _check_stop(self, token_ids: Integers | None) -> frozenset[int]:
        """Return the stop token ids as a set.

        Raises:
            InputError: A token id is outside the vocabulary.
            InputTypeError: A token id is not an integer.
        """
        given = () if token_ids is None else token_ids
        return frozenset(check_integers("stop token id", given, 0, self.model.vocab_size - 1))

    def __deepcopy__(self, memo: dict[int, object]) -> "Session":
        """Return a session with the same state, which continues on its own; both use the same model."""
        session = Session(self.model, batch_size=self.batch_size, compiled=self.compiled)
        with reading(self.model):
            session._set_state({name: tensor.clone() for name, tensor in self._state().items()})
        memo[id(self)] = session
        return session

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the state and a fingerprint of the model's weights as one safetensors file, completely or not at all.

        Args:
            path: The file.
            metadata: Additional metadata of the file, which `load` ignores.

        Raises:
            InputError: The state is not finite, because the model's weights are broken.
            SaveError: Writing failed; an earlier file is intact.
        """
        state = self._state()
        for name, tensor in state.items():
            if not _is_finite(tensor):
                raise InputError(
                    f"the session's {name} is not finite; the model's weights are probably not finite either"
                )
        own = {"format": FORMAT, "version": FORMAT_VERSION, WEIGHTS: self.model.fingerprint()}
        write_tensors(user_path(path), state, metadata={**(metadata or {}), **own})

    @classmethod
    def load(
        cls, path: str | Path, *, model: nn.Module, compiled: bool = False, any_weights: bool = False
    ) -> "Session":
        """Return the session saved by `save`.

        Args:
            path: The file.
            model: The model that has read the stream so far.
            compiled: Compile the decoding step, as for a new session.
            any_weights: Allow other weights of the same shapes than those that have read the stream so far. It is not
                checked whether the memory is meaningful to them.

        Raises:
            CheckpointError: The file is missing, damaged, of another version, or of another model.
        """
        path, inner = user_path(path), _language_model(model)
        with reading(inner):
            state, metadata = read_tensors_and_metadata(path)
        _check_format(path, metadata)
        batch_size = state["memory"].shape[0] if "memory" in state and state["memory"].ndim else 0
        if batch_size < 1:
            raise CheckpointError(f"{path} holds no memory; it is not a session")
        session = cls(inner, batch_size=batch_size, compiled=compiled)
        for name, expected in session._state().items():
            found = state.get(name)
            if found is None:
                raise CheckpointError(f"{path} lacks {name!r}; it is not a complete session")
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise CheckpointError(
                    f"{path}: {name} is {tuple(found.shape)} {found.dtype}; this model's is {tuple(expected.shape)} "
                    f"{expected.dtype}: the session belongs to another model"
                )
            if not _is_finite(found):
                raise CheckpointError(f"{path}: {name} holds values that are not finite")
        if not any_weights and metadata.get(WEIGHTS) != inner.fingerprint():
            raise CheckpointError(
                f"{path} was saved with other weights than this model's, so its memory is meaningless to this model"
            )
        pending, fed = state["counts"].unbind()
        if not ((pending >= 0) & (pending < inner.segment_length) & (pending <= fed)).all():
            raise CheckpointError(f"{path}: counts {state['counts'].tolist()} are impossible; the file is damaged")
        if state["tokens"].min() < 0 or state["tokens"].max() >= inner.vocab_size:
            raise CheckpointError(f"{path}: pending tokens are outside the vocabulary of {inner.vocab_size}")
        with reading(inner):
            session._set_state(state)
        if not session._context.is_possible():
            raise CheckpointError(
                f"{path}: the token before the pending tokens is outside the vocabulary of {inner.vocab_size}"
            )
        return session

    def _set_state(self, state: dict[str, Tensor]) -> None:
        self._memory = state["memory"].to(self.model.device)
        self._context.load(state)
        self._tokens = state["tokens"]
        pending, fed = state["counts"].unbind()
        self._num_pending, self._num_fed = pending.tolist(), fed.tolist()

    def _state(self) -> dict[str, Tensor]:
        return {
            "memory": self._memory,
            **self._context.tensors,
            "tokens": self._tokens,
            "counts": torch.tensor([self._num_pending, self._num_fed], device="cpu"),
        }

    def _split_rows(self, token_ids: TokenIds) -> list[object]:
        if isinstance(token_ids, str | bytes | Mapping) or not _has_length(token_ids):
            raise InputTypeError(f"token ids are a {type(token_ids).__name__}; they must be a list, array or tensor")
        if self.batch_size == 1:
            nested = token_ids.ndim == 2 if isinstance(token_ids, Tensor | np.ndarray) else _is_nested(token_ids)
            if not nested:
                return [token_ids]
        rows = list(token_ids)
        if len(rows) != self.batch_size or (self.batch_size > 1 and not all(_has_length(row) for row in rows)):
            raise InputError(
                f"a session of {self.batch_size} rows was fed {len(rows)} items; "
                "it needs a list with the token ids of each row"
            )
        return list(rows)

    def _check_ids(self, row: object) -> NDArray[np.integer]:
        ids = np.asarray(row.cpu() if isinstance(row, Tensor) else row)
        if ids.size == 0:
            return np.zeros(0, dtype=np.int64)
        if ids.dtype.kind not in "iu":
            raise InputTypeError(f"token ids have dtype {ids.dtype}; they must be integers")
        if ids.ndim != 1:
            raise InputError(f"token ids have shape {ids.shape}; a row's ids must be one-dimensional")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.model.vocab_size)][0]
            raise InputError(
                f"token id {wrong} is outside the vocabulary; valid ids are 0 to {self.model.vocab_size - 1}"
            )
        return ids

    def _feed(self, rows: list[Tensor]) -> None:
        rest = self._take(rows)
        full = self._full_rows()
        if not full:
            return
        self._context.reader.begin()
        with reading(self.model):
            while full:
                self._read_segment(full)
                rest = self._take(rest)
                full = self._full_rows()

    def _take(self, rows: list[Tensor]) -> list[Tensor]:
        """Take tokens up to the end of each row's current segment; return the tokens after it."""
        length, rest = self.model.segment_length, []
        for row, ids in enumerate(rows):
            start = self._num_pending[row]
            count = min(length - start, len(ids))
            self._tokens[row, start : start + count] = ids[:count]
            self._num_pending[row] += count
            self._num_fed[row] += count
            rest.append(ids[count:])
        return rest

    def _full_rows(self) -> list[int]:
        return [row for row, pending in enumerate(self._num_pending) if pending == self.model.segment_length]

    def _read_segment(self, rows: list[int]) -> None:
        """Read the full segments of these rows into their memory."""
        if len(rows) == self.batch_size:
            chosen: slice | Tensor = slice(None)
            segment = self._tokens.to(self.model.device, copy=True)
        else:
            chosen = torch.tensor(rows, device=self.model.device)
            segment = self._tokens[rows].to(self.model.device)
        self._memory[chosen] = self._context.read(segment, rows=chosen, memory=self._memory[chosen])
        for row in rows:
            self._tokens[row] = 0  # so that the state depends only on the tokens after the last segment
            self._num_pending[row] = 0


def _language_model(model: nn.Module) -> LanguageModel:
    inner = unwrapped(model)
    if not isinstance(inner, LanguageModel):
        # A RecurrentModel of the user's own may lack what a session needs.
        raise InputTypeError(f"model is a {type(inner).__name__}; a session needs a LanguageModel")
    return inner


def _until_stop(ids: list[int], stop: Collection[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids, start=1) if token in stop), len(ids))
    return ids[:end]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _has_length(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def _is_nested(token_ids: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    return len(token_ids) > 0 and _has_length(token_ids[0])


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a saved session; its format is {metadata.get('format')!r}")
    if metadata.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has session format version {metadata.get('version')!r}; this memformer reads {FORMAT_VERSION!r}"
        )
    if CHECKSUM not in metadata:
        raise CheckpointError(f"{path} is damaged: it has no checksum")
