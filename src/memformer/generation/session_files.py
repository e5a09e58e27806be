"""Files of sessions: the state as safetensors, with a fingerprint of the weights that have read the stream."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from memformer.errors import CheckpointError, InputError
from memformer.models import LanguageModel
from memformer.utils.checks import check_type, utf_8_of
from memformer.utils.files import CHECKSUM, read_tensors_and_metadata, write_tensors

FORMAT = "memformer-session"
FORMAT_VERSION = "3"
WEIGHTS = "weights"

State = dict[str, Tensor]


def write_state(path: Path, state: State, *, model: LanguageModel, metadata: Mapping[str, str] | None) -> None:
    """Write the state of a session, completely or not at all.

    Raises:
        InputError: The state is not finite, or a name or a value of the metadata has a lone surrogate.
        InputTypeError: A name or a value of the metadata is not a string.
        SaveError: Writing failed; an earlier file is intact.
    """
    for name, tensor in state.items():
        if not _is_finite(tensor):
            raise InputError(f"the session's {name} is not finite: the model's weights or its memory are broken")
    for name, value in (metadata or {}).items():
        for part, string in ((f"metadata name {name!r}", name), (f"metadata[{name!r}]", value)):
            check_type(part, string, str)
            utf_8_of(string, part)
    own = {"format": FORMAT, "version": FORMAT_VERSION, WEIGHTS: model.fingerprint()}
    write_tensors(path, state, metadata={**(metadata or {}), **own})


def read_state(path: Path) -> tuple[State, dict[str, str]]:
    """Return the state in a session file, which has at least one row, and the file's metadata.

    Raises:
        CheckpointError: The file is missing, damaged, of another version, or not a session.
    """
    state, metadata = read_tensors_and_metadata(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a saved session; its format is {metadata.get('format')!r}")
    if metadata.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has session format version {metadata.get('version')!r}; this memformer reads {FORMAT_VERSION!r}"
        )
    if CHECKSUM not in metadata:
        raise CheckpointError(f"{path} is damaged: it has no checksum")
    if "memory" not in state or not state["memory"].ndim or not len(state["memory"]):
        raise CheckpointError(f"{path} holds no memory; it is not a session")
    return state, metadata


def check_state(path: Path, state: State, *, expected: State, model: LanguageModel) -> None:
    """Check that a state is possible for a model.

    Args:
        path: The file that the state was read from.
        state: The state.
        expected: State of a new session of the same model with as many rows.
        model: The model.

    Floating-point tensors may have another dtype: the model may have been converted since.

    Raises:
        CheckpointError: A tensor is missing, of another shape or dtype, not finite, or has impossible values.
    """
    for name, own in expected.items():
        found = state.get(name)
        if found is None:
            raise CheckpointError(f"{path} lacks {name!r}; it is not a complete session")
        is_converted = found.is_floating_point() and own.is_floating_point()
        if found.shape != own.shape or not (is_converted or found.dtype == own.dtype):
            raise CheckpointError(
                f"{path}: {name} is {tuple(found.shape)} {found.dtype}; this model's is {tuple(own.shape)} "
                f"{own.dtype}: the session belongs to another model"
            )
        if not _is_finite(found):
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    pending, fed = state["counts"].unbind()
    if not ((pending >= 0) & (pending < model.segment_length) & (pending <= fed)).all():
        raise CheckpointError(f"{path}: counts {state['counts'].tolist()} are impossible; the file is damaged")
    if state["tokens"].min() < 0 or state["tokens"].max() >= model.vocab_size:
        raise CheckpointError(f"{path}: pending tokens are outside the vocabulary of {model.vocab_size}")
    if "previous" in expected and (state["previous"].min() < 0 or state["previous"].max() > model.bos_token_id):
        raise CheckpointError(
            f"{path}: the token before the pending tokens is outside the vocabulary of {model.vocab_size}"
        )


def check_weights(path: Path, metadata: Mapping[str, str], *, model: LanguageModel) -> None:
    """Check that a session was saved with the weights of this model.

    Raises:
        CheckpointError: It was saved with other weights.
    """
    if metadata.get(WEIGHTS) != model.fingerprint():
        raise CheckpointError(
            f"{path} was saved with other weights than this model's, so its memory is meaningless to this model"
        )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
