"""Grey-scale images as documents: idx files (the format of MNIST) and scikit-learn's digits."""

import struct
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memformer.data.content import open_source
from memformer.data.documents import Document
from memformer.data.files import SourceFile
from memformer.errors import InputError

# Two zero bytes, type code 8 (unsigned bytes), 3 dimensions (image, row, column).
_IMAGES_MAGIC = 0x00000803
_HEADER = struct.Struct(">4I")
# A larger size means a damaged header; a whole image is read into memory at once.
_MOST_PIXELS = 1 << 24

DIGITS_SHAPE = (8, 8)
DIGITS_LEVELS = 17


class _Header(NamedTuple):
    num_images: int
    height: int
    width: int


def read_idx_files(files: Sequence[SourceFile], *, levels: int, downsample: int) -> Iterator[Document]:
    """Yield every image of idx files as grey levels 0..levels-1 in raster order.

    Pixels are averaged over `downsample` x `downsample` squares, then quantized to `levels` bins of equal width.

    Args:
        files: Image files; all images must have the same size.
        levels: Number of grey levels, 2 to 256.
        downsample: Side of the averaged squares in pixels; must divide the images' height and width.

    Raises:
        InputError: A file is not an idx file of images, is truncated, has data after its last image, or holds images of
            another size than the first file.
    """
    shape = idx_shape(files[0].path, downsample=1)
    for path, _ in files:
        with open_source(path) as stream:
            header = _read_header(stream, path)
            if (header.height, header.width) != shape:
                raise InputError(
                    f"{path} holds images of {header.height}x{header.width}, but {files[0].path} of "
                    f"{shape[0]}x{shape[1]}; all images must have the same size"
                )
            for index in range(header.num_images):
                raw = stream.read(header.height * header.width)
                if len(raw) != header.height * header.width:
                    raise InputError(
                        f"{path} ends inside image {index}; its header declares {header.num_images} images"
                    )
                image = np.frombuffer(raw, np.uint8).reshape(shape)
                yield Document(f"{path}:{index}", _quantize(image, levels=levels, downsample=downsample))
            if stream.read(1):
                raise InputError(f"{path} has data after the {header.num_images} images that its header declares")


def idx_shape(path: Path, *, downsample: int) -> tuple[int, int]:
    """Return the height and width of the images in an idx file after downsampling.

    Raises:
        InputError: The file is not an idx file of images, its images are too large, or `downsample` does not divide
            their height and width.
    """
    with open_source(path) as stream:
        header = _read_header(stream, path)
    if header.height % downsample or header.width % downsample:
        raise InputError(
            f"downsample ({downsample}) must divide both sides of the images in {path} ({header.height}x{header.width})"
        )
    return header.height // downsample, header.width // downsample


def _read_header(stream: BufferedIOBase, path: Path) -> _Header:
    raw = stream.read(_HEADER.size)
    if len(raw) != _HEADER.size:
        raise InputError(f"{path} is too short ({len(raw)} bytes) for the header of an idx file")
    magic, *sizes = _HEADER.unpack(raw)
    if magic != _IMAGES_MAGIC:
        raise InputError(f"{path} starts with {magic:#010x}; an idx file of images starts with {_IMAGES_MAGIC:#010x}")
    header = _Header(*sizes)
    if 0 in header:
        raise InputError(
            f"{path} declares {header.num_images} images of {header.height}x{header.width}; no number may be 0"
        )
    if header.height * header.width > _MOST_PIXELS:
        raise InputError(
            f"{path} declares images of {header.height}x{header.width}; at most {_MOST_PIXELS} pixels are supported"
        )
    return header


def _quantize(image: NDArray[np.uint8], *, levels: int, downsample: int) -> NDArray[np.uint8]:
    height, width = image.shape
    squares = image.reshape(height // downsample, downsample, width // downsample, downsample)
    # One integer division computes both the mean and the bin, so that no value is rounded twice.
    sums = squares.sum(axis=(1, 3), dtype=np.int64)
    return (sums * levels // (256 * downsample**2)).astype(np.uint8).reshape(-1)


def read_digits() -> Iterator[Document]:
    """Yield the 1,797 digit images of scikit-learn: 8x8 pixels with 17 grey levels.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # optional, and slow to import
    except ImportError as error:
        raise InputError("kind 'digits' needs the extra: pip install 'memformer-lm[digits]'") from error
    for index, image in enumerate(load_digits().images):
        yield Document(f"digits:{index}", np.asarray(image, dtype=np.uint8).reshape(-1))
