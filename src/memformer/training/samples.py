"""Samples of a model, as text or as a grid of images."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memformer.data import PixelTokenizer, Tokenizer
from memformer.generation.session import Session
from memformer.models import LanguageModel
from memformer.utils.files import write_text, write_whole

NUM_IMAGES = 25
PIXEL_SCALE = 4


def write_sample(model: LanguageModel, tokenizer: Tokenizer, path: Path, *, num_tokens: int, seed: int) -> str | None:
    """Write a sample beside `path` (.txt or .png); return the text, if it is text.

    The model's mode and torch's random generator are left as they were.

    Raises:
        SaveError: Writing failed.
    """
    text = None
    if isinstance(tokenizer, PixelTokenizer):
        images = sample_images(model, tokenizer, NUM_IMAGES, seed=seed)
        write_image_grid(path.with_suffix(".png"), images, tokenizer=tokenizer)
    elif num_tokens:
        steps = Session(model).stream(num_tokens, seed=seed)
        text = "".join(tokenizer.decode_stream(step[0] for step in steps))
        write_text(path.with_suffix(".txt"), text)
    return text


def sample_images(
    model: LanguageModel,
    tokenizer: PixelTokenizer,
    num_images: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> NDArray[np.int64]:
    """Return images as grey levels, (images, height, width).

    Raises:
        InputError: An option is out of its range.
    """
    session = Session(model, batch_size=num_images)
    num_pixels = tokenizer.height * tokenizer.width
    steps = session.stream(num_pixels, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    pixels = np.array(list(steps), dtype=np.int64).T
    return pixels.reshape(num_images, tokenizer.height, tokenizer.width)


def write_image_grid(file: Path, images: NDArray[np.int64], *, tokenizer: PixelTokenizer) -> None:
    """Write images side by side as one PNG, as near to a square as their number allows.

    Raises:
        SaveError: Writing failed.
    """
    import matplotlib.image  # slow to import

    grid = image_grid(images, levels=tokenizer.levels)
    write_whole(
        file, lambda partial: matplotlib.image.imsave(partial, grid, cmap="gray", vmin=0, vmax=255, format="png")
    )


def image_grid(images: NDArray[np.int64], *, levels: int) -> NDArray[np.uint8]:
    """Return one picture of all images, each pixel enlarged, with a border between them."""
    count, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), 64, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        grid[top : top + height, left : left + width] = image * 255 // (levels - 1)
    return grid.repeat(PIXEL_SCALE, axis=0).repeat(PIXEL_SCALE, axis=1)
