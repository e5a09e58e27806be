"""Saving and loading: folders of transformers and of the library are read by both."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from memformer import CheckpointError, InputError, Memformer, Session, hf, load_model
from memformer.data import ByteTokenizer, save_tokenizer
from memformer.data.document_end import DocumentEndTokenizer
from memformer.hf.registration import as_causal_lm
from tests.helpers import tiny_config
from tests.hf.models import KINDS, MODELS, make_hf, texts

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "experiments" / "models" / "digits-14x14"


def assert_same_weights(model, other):
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert found[name].dtype == weight.dtype


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_either_is_read_by_both(kind, tmp_path):
    core = MODELS[kind]()
    core.save_pretrained(tmp_path / "core")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "core")
    assert model.config.core() == core.config
    assert_same_weights(model.memformer, core)
    model.save_pretrained(tmp_path / "hf")
    assert all(name.startswith("memformer.") for name in load_file(tmp_path / "hf" / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again) is type(model)
    assert_same_weights(again, model)
    # The file says which type of model it holds, and the dtype of its weights.
    read = load_model(tmp_path / "hf")
    assert read.config == core.config
    assert_same_weights(read, core)
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "hf").memformer, core)
    Session(read).feed(texts()[0])


def test_the_shipped_model_is_read_unchanged():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, device_map="cpu")
    assert_same_weights(model.memformer, Memformer.from_pretrained(SHIPPED))
    assert not model.training
    config = type(model.config).from_json_file(SHIPPED / "config.json")
    assert config.decoder_attention == model.config.decoder_attention == "separate"


def test_weights_are_read_in_another_dtype():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.generate(max_new_tokens=20, do_sample=True).shape == (1, 21)


def test_weights_in_several_files_are_read(tmp_path):
    model = make_hf()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_missing_weights_are_refused_instead_of_being_invented(tmp_path):
    make_hf().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["memformer.embedding.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of this model.*'memformer.embedding.weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_library_is_wrapped_without_a_copy(kind):
    core = MODELS[kind]()
    model = as_causal_lm(core)
    assert model.memformer is core
    assert model.dtype == torch.float64
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    with pytest.raises(InputError, match=r"an? \w+ holds an?"):
        (hf.LSTMForCausalLM if "lstm" not in kind else hf.MemformerForCausalLM).from_core(core)


class WithHead(hf.MemformerModel):
    """A model with a layer that the folder does not hold."""

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(config.d_model, 3)
        self.post_init()


def test_layers_of_a_subclass_are_initialized_and_the_model_is_not(tmp_path):
    core = MODELS["default"]()
    core.save_pretrained(tmp_path)
    model = WithHead.from_pretrained(tmp_path)
    assert_same_weights(model.memformer, core)
    assert 0.01 < float(model.score.weight.detach().std()) < 0.04  # as transformers draws them
    assert not model.score.bias.any()


def test_weights_of_another_shape_are_refused(tmp_path):
    MODELS["default"]().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has 2 weights of another shape; .*log_speed', \(5,\) instead of \(7,\)"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_slots=7, ignore_mismatched_sizes=True)


def test_the_end_of_a_document_in_the_librarys_own_folder_ends_generation(tmp_path):
    for folder, tokenizer in (("ends", DocumentEndTokenizer(ByteTokenizer())), ("plain", ByteTokenizer())):
        core = Memformer(tiny_config(vocab_size=tokenizer.vocab_size))
        core.save_pretrained(tmp_path / folder)
        save_tokenizer(tokenizer, tmp_path / folder)
    for folder, expected in (("ends", 256), ("plain", None)):
        for options in ({}, {"subfolder": folder}):
            name = tmp_path if options else tmp_path / folder
            model = AutoModelForCausalLM.from_pretrained(name, **options)
            assert model.generation_config.eos_token_id == expected
            assert AutoTokenizer.from_pretrained(name, **options).eos_token_id == expected
    # A model of the hub, as it lies in the cache.
    model = tmp_path / "hub" / "models--someone--demo"
    shutil.copytree(tmp_path / "ends", model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("someone/demo", **options)
    assert model.generation_config.eos_token_id == 256
    # A tokenizer that this library cannot read does not keep the model from being loaded.
    (tmp_path / "ends" / "tokenizer_config.json").write_text('{"format_version": 99}')
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ends").generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pruned", "the model's weights are not those of its config: .*expand.weight is missing"),
        ("parametrized", "expand has parametrized weights, which a loaded model would lack"),
    ],
)
def test_weights_that_could_not_be_loaded_are_not_saved(change, message, tmp_path):
    model = make_hf()
    layer = model.memformer.encoder.layers[0].feed_forward.expand
    if change == "pruned":
        prune.random_unstructured(layer, "weight", amount=0.5)
    else:
        parametrizations.weight_norm(layer)
    with pytest.raises(InputError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    weights = make_hf().state_dict()
    model.save_pretrained(tmp_path / "new", state_dict=weights)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), make_hf())


def test_wrong_classes_are_refused():
    model = make_hf()
    with pytest.raises(InputError, match="config is an LSTMHFConfig; a MemformerForCausalLM has a MemformerHFConfig"):
        hf.MemformerForCausalLM(hf.LSTMHFConfig(vocab_size=11, d_model=16))
    with pytest.raises(InputError, match="model is of class MemformerForCausalLM; it must be a LanguageModel"):
        hf.as_causal_lm(model)


def test_hidden_states_that_the_config_asks_for_are_refused():
    model, ids = make_hf(), texts((5,))[0][None]
    model.config.output_hidden_states = True
    with pytest.raises(InputError, match=r"config.output_hidden_states must be False"):
        model(ids)
    assert model(ids, output_hidden_states=False).logits is not None


def test_weights_that_are_not_on_one_device_are_refused(tmp_path):
    with pytest.raises(InputError, match="device_map puts weights on .*disk; the model is not called layer by layer"):
        AutoModelForCausalLM.from_pretrained(SHIPPED, device_map={"": "disk"}, offload_folder=tmp_path)
