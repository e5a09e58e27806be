"""Samples of a run: as many tokens as are asked for, and none for 0."""

import pytest

from memformer.data import ByteTokenizer, PixelTokenizer
from memformer.training.samples import write_sample
from tests.helpers import tiny_model


def test_a_text_has_the_number_of_tokens(tmp_path):
    text = write_sample(tiny_model(), ByteTokenizer(), tmp_path / "sample", num_tokens=17, seed=0)
    assert len(text) == 17  # the model's token ids are bytes of one character each
    assert len((tmp_path / "sample.txt").read_bytes()) == 17


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PixelTokenizer(11, 2, 3)], ids=["text", "images"])
def test_no_tokens_are_no_sample(tmp_path, tokenizer):
    assert write_sample(tiny_model(), tokenizer, tmp_path / "sample", num_tokens=0, seed=0) is None
    assert not list(tmp_path.iterdir())


def test_images_are_whole_whatever_the_number_of_tokens(tmp_path):
    assert write_sample(tiny_model(), PixelTokenizer(11, 2, 3), tmp_path / "sample", num_tokens=1, seed=0) is None
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
