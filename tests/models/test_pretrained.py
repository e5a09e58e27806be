"""A config that does not fit the weights is one line, before any memory is taken for what it asks."""

import json

import pytest
import torch

from memformer import CheckpointError, Memformer
from tests.helpers import tiny_config


@pytest.fixture
def folder(tmp_path):
    Memformer(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_encoder_layers": 10_000_000}, "has 2 encoder layers; its config says 10000000"),
        ({"num_decoder_layers": 1}, "has 2 decoder layers; its config says 1"),
        ({"d_model": 16_000_000, "d_ff": 16_000_000}, r"has shape .*; this model's is .*16000000"),
        ({"d_model": 2**62}, "must be at most 16777216"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        Memformer.from_pretrained(folder)


def test_weights_that_changed_on_disk_are_refused(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="has not the checksum it was written with"):
        Memformer.from_pretrained(folder)


def test_what_is_loaded_can_be_trained(folder):
    model = Memformer.from_pretrained(folder)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    hidden, _ = model.encode(torch.zeros((1, 6), dtype=torch.int64), memory=model.initial_memory(1))
    hidden.sum().backward()
    assert model.encoder.norm.weight.grad is not None
