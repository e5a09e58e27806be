import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from memformer.data import SourceConfig, image_shape, iterate_documents, source_levels
from memformer.errors import InputError

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def idx_bytes(images: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.astype(np.uint8).tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_in_raster_order(tmp_path: Path, images: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(images)) if suffix else idx_bytes(images))
    source = SourceConfig(kind="idx", path=str(path))
    documents = list(iterate_documents(source))
    assert [document.name for document in documents] == [f"{path}:{index}" for index in range(5)]
    assert np.array_equal([document.content for document in documents], images.reshape(5, -1))
    assert image_shape(source) == (4, 6)
    assert source_levels(source) == 256


@pytest.mark.parametrize(("levels", "downsample"), [(2, 1), (256, 2), (17, 2), (3, 1)])
def test_mean_then_equal_bins(tmp_path: Path, images: np.ndarray, levels: int, downsample: int) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(images))
    source = SourceConfig(kind="idx", path=str(path), levels=levels, downsample=downsample, documents="1:2")
    (document,) = iterate_documents(source)
    height, width = image_shape(source)
    assert (height, width) == (4 // downsample, 6 // downsample)
    expected = [
        int(
            images[1, r * downsample : (r + 1) * downsample, c * downsample : (c + 1) * downsample].mean()
            / 256
            * levels
        )
        for r in range(height)
        for c in range(width)
    ]
    assert document.content.tolist() == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "images ends inside image 4; its header declares 5 images"),
        (lambda raw: raw + b"x", "images has data after the 5 images that its header declares"),
        (lambda raw: raw[:10], r"images is too short \(10 bytes\)"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "starts with 0x00000801; an idx file of images starts with 0x00000803"),
        (lambda raw: raw[:8] + b"\0\0\0\0" + raw[12:], "declares 5 images of 0x6; no number may be 0"),
        (
            lambda raw: raw[:8] + b"\xff" * 8 + raw[16:],
            "declares images of 4294967295x4294967295; at most 16777216 pix",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, images: np.ndarray, damage, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(damage(idx_bytes(images)))
    with pytest.raises(InputError, match=message):
        list(iterate_documents(SourceConfig(kind="idx", path=str(path))))


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(images))
    (tmp_path / "b").write_bytes(idx_bytes(images[:, :2]))
    with pytest.raises(InputError, match=r"b holds images of 2x6, but .*a of 4x6; all images must have the same size"):
        list(iterate_documents(SourceConfig(kind="idx", path=str(tmp_path))))
    source = SourceConfig(kind="idx", path=str(tmp_path / "a"), downsample=4)
    for use in (image_shape, lambda source: next(iterate_documents(source))):
        with pytest.raises(InputError, match=r"downsample \(4\) must divide both sides of the images in .*4x6"):
            use(source)


def test_digits() -> None:
    source = SourceConfig(kind="digits")
    images = [document.content for document in iterate_documents(source)]
    assert len(images) == 1797
    assert image_shape(source) == (8, 8)
    assert source_levels(source) == 17
    assert {image.size for image in images} == {64}
    assert np.max(images) == 16


def test_text_has_no_image_shape(tmp_path: Path) -> None:
    source = SourceConfig(path=str(tmp_path))
    assert image_shape(source) is None
    assert source_levels(source) is None


@pytest.mark.data
def test_mnist() -> None:
    path = REAL_DATA / "mnist" / "t10k-images-idx3-ubyte.gz"
    if not path.exists():
        pytest.skip("MNIST is not beside the checkout")
    source = SourceConfig(kind="idx", path=str(path))
    images = [document.content for document in iterate_documents(source)]
    assert len(images) == 10_000
    assert image_shape(source) == (28, 28)
    assert np.mean(images) == pytest.approx(33.79, abs=0.01)
    with pytest.raises(InputError, match="starts with 0x00000801"):
        image_shape(SourceConfig(kind="idx", path=str(path.with_name("t10k-labels-idx1-ubyte.gz"))))
