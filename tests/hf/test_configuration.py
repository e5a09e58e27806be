"""Configs of transformers are generated from those of the library; supported versions; registration."""

import dataclasses
import importlib.metadata
import json
import logging

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memformer import InputError, hf
from memformer.data import ByteTokenizer, DocumentEndTokenizer
from memformer.errors import InputTypeError
from memformer.hf.models import HF_MODELS
from memformer.hf.versions import check_transformers
from memformer.models.loading import MODELS
from tests.helpers import tiny_config

CONFIGS = [causal.config_class for _, causal in HF_MODELS]


def test_every_model_type_has_a_config_and_two_models():
    assert [config.model_type for config in CONFIGS] == list(MODELS)
    for hidden, causal in HF_MODELS:
        assert causal.config_class is hidden.config_class
        assert AutoConfig.for_model(causal.config_class.model_type).__class__ is causal.config_class
        for name in (causal.__name__, hidden.__name__, causal.config_class.__name__):
            assert name in hf.__all__
            assert getattr(hf, name).__name__ == name


@pytest.mark.parametrize("config_class", CONFIGS)
def test_configs_have_the_fields_and_defaults_of_the_library(config_class):
    core = config_class.core_class()
    config = config_class()
    assert config.core() == core
    own = {field.name for field in dataclasses.fields(config_class)}
    inherited = {field.name for field in dataclasses.fields(hf.RecurrentHFConfig)}
    assert own - inherited == {field.name for field in dataclasses.fields(core)}
    for name, value in core.to_dict().items():
        assert getattr(config, name) == value
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (256, 256, None)
    assert config.hidden_size == core.d_model
    written = json.loads(config.to_json_string())
    assert written["model_type"] == core.model_type
    assert {name: written[name] for name in core.to_dict()} == core.to_dict()
    assert config_class.from_dict(written).to_dict() == config.to_dict()


def test_a_config_is_checked_as_the_library_checks_it():
    with pytest.raises(InputError, match="d_model .20. must be a multiple of num_heads"):
        hf.MemformerHFConfig(d_model=20, num_heads=3)
    with pytest.raises(InputTypeError, match="num_slots"):
        hf.MemformerHFConfig(num_slots="many")
    config = hf.MemformerHFConfig(num_slots=torch.tensor(7))
    assert type(config.num_slots) is int
    config.num_slots = -1
    with pytest.raises(InputError, match="num_slots .-1."):
        config.validate()


def test_names_from_version_0_1_are_read():
    config = hf.MemformerHFConfig(free_slot_eagerness=2.0, embedding_dropout=None)
    assert config.free_slot_bias == 2.0
    assert not hasattr(config, "free_slot_eagerness")
    assert hf.MemformerHFConfig(decoder_starts_from_last_token=True, num_slots=3).decoder_start_tokens == 1
    with pytest.raises(InputError, match="decoder_reads_memory"):
        hf.MemformerHFConfig(decoder_reads_memory=True)
    with pytest.raises(InputError, match="decoder_starts_from_last_token is the old name of decoder_start_tokens"):
        hf.MemformerHFConfig(decoder_starts_from_last_token=True, decoder_start_tokens=3)


def test_special_tokens_outside_the_predicted_ones_give_no_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        config = hf.MemformerHFConfig(vocab_size=10, num_special_tokens=2, eos_token_id=3)
    assert caplog.records == []
    assert config.num_token_ids == 13


def test_given_special_tokens_are_kept():
    config = hf.MemformerHFConfig(pad_token_id=300, bos_token_id=256, eos_token_id=[1, 2])
    again = hf.MemformerHFConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (300, 256, [1, 2])
    model = AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**tiny_config().to_dict(), pad_token_id=12))
    assert model.generation_config.pad_token_id == 12
    ids = torch.tensor([[12, 1, 2, 12]])
    assert torch.equal(model(ids).logits[0, 2], model(ids[:, 1:3]).logits[0, 1])


def test_special_tokens_follow_another_number_of_tokens(tmp_path):
    hf.MemformerHFConfig(vocab_size=10, pad_token_id=3).save_pretrained(tmp_path / "given")
    hf.MemformerHFConfig(vocab_size=10).save_pretrained(tmp_path / "default")
    for name, padding in (("given", 3), ("default", 12)):
        config = AutoConfig.from_pretrained(tmp_path / name, vocab_size=12)
        assert (config.vocab_size, config.bos_token_id, config.pad_token_id) == (12, 12, padding)


def test_models_are_made_from_configs_by_the_auto_classes():
    fields = {**tiny_config().to_dict(), "num_slots": 3}
    model = AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**fields))
    assert type(model) is hf.MemformerForCausalLM
    assert model.memformer.config == tiny_config(num_slots=3)
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (11, 11)
    assert type(AutoModel.from_config(hf.MemformerHFConfig(**fields))) is hf.MemformerModel
    half = AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**fields), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("version", ["5.23.1", "6.0.0", "4.57.1"])
def test_other_versions_of_transformers_are_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(InputError, match=f"needs transformers 5.24 or newer and below 6, but {version} is installed"):
        check_transformers()


@pytest.mark.parametrize("version", ["5.24.0", "5.30.2", "5.24.0.dev0"])
def test_supported_versions_are_accepted(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    check_transformers()


def test_missing_transformers_is_named_with_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r"needs the package transformers: pip install 'memformer-lm\[hf\]'"):
        check_transformers()


def test_an_end_token_that_cannot_be_predicted_is_refused():
    """A vocabulary of `tokenizer.vocab_size`, which leaves out added tokens: END has the id of [BOS] and padding."""
    tokenizer = hf.as_hf_tokenizer(DocumentEndTokenizer(ByteTokenizer()))
    message = r"eos_token_id \(256\) must be below vocab_size \(256\).*vocab_size is tokenizer.bos_token_id"
    with pytest.raises(InputError, match=message):
        hf.MemformerHFConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**tiny_config(vocab_size=256).to_dict()))
    model.config.eos_token_id = tokenizer.eos_token_id  # as the Trainer sets it
    with pytest.raises(InputError, match=message):
        model(torch.tensor([tokenizer("hi").input_ids]))
    assert hf.MemformerHFConfig(vocab_size=tokenizer.bos_token_id, eos_token_id=256).num_token_ids == len(tokenizer)


def test_another_number_of_tokens_is_refused_as_soon_as_it_is_used(tmp_path):
    """The logits would be cut, and a saved model could not be loaded."""
    model = AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**tiny_config().to_dict())).eval()
    for number in (5, 300):
        model.config.vocab_size = number
        for use in (lambda: model(torch.tensor([[1, 2, 3]])), lambda: model.save_pretrained(tmp_path / "saved")):
            with pytest.raises(InputError, match=rf"config.vocab_size \({number}\) was changed: .* predicts 11 tokens"):
                use()
    assert not (tmp_path / "saved").exists()


def test_the_config_can_ask_for_tuples():
    for make in (AutoModel, AutoModelForCausalLM):
        model = make.from_config(hf.MemformerHFConfig(**tiny_config().to_dict(), return_dict=False)).eval()
        ids = torch.tensor([[1, 2, 3]])
        assert isinstance(model(ids), tuple)
        assert not isinstance(model(ids, return_dict=True), tuple)


def test_the_config_says_whether_a_state_is_returned(tmp_path):
    AutoModelForCausalLM.from_config(hf.MemformerHFConfig(**tiny_config().to_dict())).save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    for asked, is_returned in ((None, False), (False, False), (True, True)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=asked)
        assert (model(ids).cache is not None) == is_returned
        assert model(ids, use_cache=False).cache is None
        assert model(ids, use_cache=True).cache is not None
        assert model.train()(ids, labels=ids).cache is None
        assert model.eval().generate(ids, max_new_tokens=2, use_cache=False).shape == (1, 5)
