"""Documents, and slices of a stream of documents."""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from numpy.typing import NDArray

from memformer.errors import InputError


class Document(NamedTuple):
    """One document of a source, not yet tokenized.

    Attributes:
        name: Origin of the document, for messages: the file, followed by `:line` or `:index` if a file holds several.
        content: The undecoded bytes of a text, the grey levels of an image in raster order, or the values of a series
            with the shape (rows, columns).
    """

    name: str
    content: bytes | NDArray[Any]

    @property
    def size(self) -> int:
        """Number of bytes, pixels or values."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.size


class DocumentBlocks(NamedTuple):
    """One document of a source, to be read block by block, because it can be larger than the machine's memory.

    Attributes:
        name: As of a `Document`.
        blocks: The content in blocks, at least one; they must be read before the next document of the source.
    """

    name: str
    blocks: Iterator[Any]


def parse_slice(text: str, *, name: str = "documents") -> tuple[int | None, int | None]:
    """Return the two ends of a `start:stop` slice, None for an omitted end.

    Args:
        text: For example `:1000`, `1000:` or `-10000:`.
        name: Name of the slice in messages.

    Raises:
        InputError: `text` is not two optional integers around one colon, or an integer has more than 18 digits.
    """
    match = re.fullmatch(r"\s*(-?\d{1,18})?\s*:\s*(-?\d{1,18})?\s*", text)
    if match is None:
        raise InputError(
            f"{name} ({text!r}) must be 'start:stop' with integers (18 digits at most) or nothing on either side"
        )
    start, stop = (None if side is None else int(side) for side in match.groups())
    return start, stop


def slice_documents(documents: Iterable[Document], *, start: int | None, stop: int | None) -> Iterator[Document]:
    """Yield `documents[start:stop]` of a stream.

    A negative `start` or `stop` holds that many documents in memory; otherwise no document is held.
    """
    first = start or 0
    if first < 0:
        last: deque[tuple[int, Document]] = deque(maxlen=-first)
        num_documents = 0
        for document in documents:
            last.append((num_documents, document))
            num_documents += 1
        chosen = range(*slice(start, stop).indices(num_documents))
        yield from (document for index, document in last if index in chosen)
    elif stop is not None and stop < 0:
        held: deque[Document] = deque()
        for document in islice(documents, first, None):
            held.append(document)
            if len(held) > -stop:
                yield held.popleft()
    else:
        yield from islice(documents, first, stop)
