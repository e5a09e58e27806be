"""Saving and loading: a loaded model is unchanged; damaged files and configs that do not fit are refused."""

import json

import pytest
import torch
import torch.nn.utils.prune

from memformer import CheckpointError, InputError, Memformer, load_model
from tests.helpers import tiny_config, tiny_model


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
    with pytest.raises(CheckpointError, match="its content does not match its checksum"):
        Memformer.from_pretrained(folder)


def test_a_loaded_model_can_be_trained(folder):
    model = Memformer.from_pretrained(folder)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    hidden, _ = model.encode(torch.zeros((1, 6), dtype=torch.int64), memory=model.initial_memory(1))
    hidden.sum().backward()
    assert model.encoder.norm.weight.grad is not None


def test_saved_and_loaded_model_is_the_same(tmp_path, variant):
    model = tiny_model(**variant).float().eval()
    model.save_pretrained(tmp_path / "saved")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Memformer.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_model_with_shared_layers_is_saved_as_what_it_computes(tmp_path):
    model = tiny_model(num_encoder_layers=2)
    model.encoder.layers[1] = model.encoder.layers[0]
    model.save_pretrained(tmp_path)
    segment = torch.arange(12).view(2, 6)
    for actual, expected in zip(load_model(tmp_path).encode(segment), model.eval().encode(segment), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_parametrized_weights_are_refused_before_they_are_saved(tmp_path):
    model = tiny_model()
    torch.nn.utils.parametrizations.weight_norm(model.encoder.layers[0].feed_forward.expand)
    with pytest.raises(InputError, match=r"encoder\.layers\.0\.\S+ has parametrized weights.*remove_parametrizations"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_or_foreign_files_are_refused(tmp_path):
    model = tiny_model().float()
    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"nothing.config\.json does not exist"):
        Memformer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Memformer.from_pretrained(tmp_path)
    tiny_model(d_ff=64).float().save_pretrained(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="feed_forward.*has shape .*this model's is"):
        Memformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        Memformer.from_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("num_slots", "num_slot"))
    with pytest.raises(CheckpointError, match="unknown key 'num_slot'.*did you mean 'num_slots'"):
        Memformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("memformer", "bert"))
    with pytest.raises(CheckpointError, match="does not describe a memformer"):
        Memformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["pruned", "weight norm", "added", "missing"])
def test_changed_modules_are_refused_before_they_are_saved(change, tmp_path):
    model = tiny_model()
    if change == "pruned":
        torch.nn.utils.prune.l1_unstructured(model.memory_writer.key, "weight", 0.3)
    elif change == "weight norm":
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(model.memory_writer.key)
    elif change == "added":
        model.encoder.adapter = torch.nn.Linear(2, 2)
    else:
        model.decoder.layers = model.decoder.layers[:1]
    with pytest.raises(InputError, match=r"the model's weights are not those of its config: \S+ is (added|missing)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    if change == "pruned":
        torch.nn.utils.prune.remove(model.memory_writer.key, "weight")
        model.save_pretrained(tmp_path)
        assert_same_weights(Memformer.from_pretrained(tmp_path), model)


def assert_same_weights(model, other):
    assert all(torch.equal(own, given) for own, given in zip(model.parameters(), other.parameters(), strict=True))


class NeedsMore(Memformer):
    def __init__(self, config, more):
        super().__init__(config)
        self.more = more


def test_a_class_that_needs_more_than_a_config_is_saved(tmp_path):
    model = NeedsMore(tiny_config(), 3)
    model.save_pretrained(tmp_path)
    assert_same_weights(Memformer.from_pretrained(tmp_path), model)
