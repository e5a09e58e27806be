"""Folders that transformers wrote and models of the hub are read like folders from `save_pretrained`."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from memformer import CheckpointError, InputError, Memformer, load_model
from memformer.models.hugging_face import find_model_folder
from memformer.training.run_folder import load_run
from tests.cli.calls import call_json, refused
from tests.helpers import tiny_model
from tests.models.baselines import TYPES, tiny_baseline

# As transformers writes them, beside the fields of the model.
FOREIGN = {
    "architectures": ["MemformerForCausalLM"],
    "auto_map": {"AutoConfig": "memformer.hf--MemformerHFConfig"},
    "bos_token_id": 11,
    "dtype": "float32",
    "eos_token_id": None,
    "pad_token_id": 11,
    "tie_word_embeddings": True,
    "transformers_version": "5.24.0",
    "use_cache": True,
}


@pytest.fixture
def folder(tmp_path):
    return write_as_transformers(tiny_model().float(), tmp_path / "model")


def write_as_transformers(model, folder, **fields):
    model.save_pretrained(folder)
    change_config(folder, **FOREIGN, **fields)
    file = folder / "model.safetensors"
    weights = {f"memformer.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def change_config(folder, **changes):
    file = folder / "config.json"
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def assert_same_model(loaded, model):
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_folder_written_by_transformers_holds_the_same_model(variant, tmp_path):
    model = tiny_model(**variant).float()
    folder = write_as_transformers(model, tmp_path)
    assert_same_model(Memformer.from_pretrained(folder), model)
    assert_same_model(load_model(str(folder)), model)


@pytest.mark.parametrize("name", TYPES)
def test_so_does_a_folder_of_a_baseline(name, tmp_path):
    model = tiny_baseline(name).float()
    assert_same_model(load_model(write_as_transformers(model, tmp_path)), model)


def test_only_keys_of_transformers_are_ignored_and_only_beside_its_version(folder):
    change_config(folder, num_slotz=3)
    with pytest.raises(CheckpointError, match="unknown key 'num_slotz' in model config; did you mean 'num_slots'"):
        Memformer.from_pretrained(folder)
    change_config(folder, num_slotz=..., transformers_version=...)
    with pytest.raises(CheckpointError, match="unknown key 'architectures' in model config"):
        Memformer.from_pretrained(folder)


def test_weights_that_the_model_lacks_are_refused_and_so_are_several_files(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "score.weight": torch.zeros(2, 16)}, file)
    with pytest.raises(CheckpointError, match="has 1 tensors that this model lacks; the first is 'score.weight'"):
        Memformer.from_pretrained(folder)
    file.rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weights in several files; save the model again with a larger max_shard"):
        Memformer.from_pretrained(folder)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Stand in for the hub: record what is asked of it, and answer with a folder or an error."""
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        if isinstance(snapshot_download.answer, Exception):
            raise snapshot_download.answer
        return str(snapshot_download.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    snapshot_download.asked = asked
    return snapshot_download


def test_a_model_of_the_hub_is_downloaded_and_read(downloads, folder):
    downloads.answer = folder
    model = Memformer.from_pretrained(folder)
    files = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
    for name, revision in (("owner/model", None), ("owner/model-1.5@v2", "v2"), ("o/m@refs/pr/1", "refs/pr/1")):
        assert_same_model(Memformer.from_pretrained(name), model)
        assert downloads.asked.pop() == (name.partition("@")[0], {"revision": revision, **files})
        assert_same_model(load_model(name), model)
        assert len(downloads.asked) == 1
        downloads.asked.clear()


def test_the_commands_read_models_of_the_hub(downloads, tmp_path):
    downloads.answer = write_as_transformers(tiny_model(vocab_size=256).float(), tmp_path / "model")
    assert load_run("owner/model").folder == tmp_path / "model"
    options = ("--prompt", "the", "--max_new_tokens", "5", "--seed", "1")
    assert (
        call_json("generate", "owner/model", *options)["token_ids"]
        == (call_json("generate", tmp_path / "model", *options)["token_ids"])
    )


def test_paths_are_never_asked_of_the_hub(downloads, folder, tmp_path):
    (tmp_path / "runs" / "books@v1").mkdir(parents=True)
    for name in ("runs/books@v1", "runs/typo", "model", "./owner/model", "/owner/model", "~/model", "a/b/c", "../x/y"):
        find_model_folder(name)
    find_model_folder(tmp_path / "no" / "folder")
    assert "runs/typo is not a folder" in refused("generate", "runs/typo")
    assert not downloads.asked


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404\n", response=RESPONSE), "does not exist, or needs a login"),
        (errors.GatedRepoError("403", response=RESPONSE), "needs a login with access to it"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("gone"), "is not in the cache at revision 'v9', and the hub cannot be reached"),
        (OSError("the disk is full\nmore"), "cannot be loaded: the disk is full"),
    ],
)
def test_a_failed_download_is_explained_in_one_sentence(downloads, error, message):
    downloads.answer = error
    with pytest.raises(InputError, match=message) as raised:
        load_model("owner/model@v9")
    text = str(raised.value)
    assert text.startswith("there is no folder owner/model, and the model 'owner/model' of the Hugging Face hub ")
    assert "\n" not in text


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Return the cache of `huggingface_hub` itself, which must not use a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_offline_only_the_cache_is_read(offline, folder):
    with pytest.raises(InputError, match="'owner/model' of the Hugging Face hub is not in the cache, and HF_HUB_OFF"):
        load_model("owner/model")
    commit = "0" * 40
    cached = offline / "models--owner--model"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert_same_model(load_model("owner/model"), Memformer.from_pretrained(folder))
    assert_same_model(load_model(f"owner/model@{commit}"), Memformer.from_pretrained(folder))
    with pytest.raises(InputError, match="is not in the cache at revision 'v2', and HF_HUB_OFFLINE is set"):
        load_model("owner/model@v2")


def test_without_the_package_the_sentence_names_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="needs the package: pip install huggingface_hub"):
        load_model("owner/model")
