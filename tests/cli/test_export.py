"""The export command: folders that transformers and the library read, with a model card."""

import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, dynamic_module_utils, pipeline

from memformer import Memformer, hf, load_model
from memformer.data import ByteTokenizer, DocumentEndTokenizer, load_tokenizer, save_tokenizer
from memformer.data.tokenizer_training import word_tokenizer
from memformer.hf import export as exporting
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, refused
from tests.helpers import tiny_config

FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def names(folder):
    return {file.name for file in folder.iterdir()}


def card_of(folder):
    """Return the front matter and the text of a model card."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "demo"
    result = call_json("export", run_folder, "--hf", folder)
    assert result == {"folder": str(folder), "has_tokenizer": True, "address": None}
    return folder


def test_the_folder_is_read_by_transformers_and_by_the_library(exported, run_folder):
    assert names(exported) == FILES | TOKENIZER_FILES
    run, again = load_run(run_folder), load_run(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for weights in (model.memformer, again.model):
        assert weights.config == run.model.config
        for found, expected in zip(weights.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(found, expected)
    assert again.tokenizer.fingerprint == run.tokenizer.fingerprint
    text = "the cat\n sat on é"
    assert tokenizer(text).input_ids == run.tokenizer.encode(text.encode(), "text").tolist()
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == model.config.pad_token_id == run.model.bos_token_id
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generate(text, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    status, out, _ = call("generate", exported, "--prompt", text, "--max_new_tokens", 12, "--temperature", 0)
    assert status == 0
    assert found == text + out.removesuffix("\n")


def test_the_card_has_front_matter_metrics_and_the_training(exported, run_folder):
    front, text = card_of(exported)
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["memformer", "recurrent-memory", "long-context"]
    assert "license" not in front
    result = json.loads((run_folder / "evaluation.json").read_text())
    metrics = {metric["name"]: metric["value"] for metric in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["bits per byte"] == round(result["with_memory"]["bits_per_byte"], 4)
    assert metrics["perplexity per token"] == round(result["with_memory"]["perplexity"], 4)
    assert f"| bits per byte | {metrics['bits per byte']} |" in text
    assert "| num_updates | 4 |" in text
    assert "| data | text: texts |" in text
    assert "| num_slots | 2 |" in text
    assert str(run_folder.parent) not in text
    assert 'pipeline("text-generation", model="demo")' in text


def test_the_card_of_a_recall_run_names_the_task_it_was_measured_on(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "recall")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] |= {"recall": {"task": "fact"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = {"points": [], "mean_accuracy": 0.75, "mean_accuracy_memory_erased": 0.25}
    (folder / "evaluation.json").write_text(json.dumps(result))
    call_json("export", folder, "--hf", tmp_path / "exported")
    front, text = card_of(tmp_path / "exported")
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "new episodes of the training run's recall task"
    assert "On new episodes of the training run's recall task:\n\n| metric | value |" in text


def test_the_examples_of_the_card_run(exported, monkeypatch, capsys):
    """Whoever gets the folder begins with them."""
    monkeypatch.chdir(exported.parent)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", card_of(exported)[1], flags=re.DOTALL):
        exec(compile(example, "card", "exec"), names)
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert names["then"].shape == (1, names["first"].sequences.shape[1] + 50)


def test_last_weights_have_no_metrics_and_a_license_is_the_users(run_folder, tmp_path):
    folder = tmp_path / "new" / "last"
    call_json("export", run_folder, "--hf", folder, "--checkpoint", "last", "--license", "apache-2.0")
    front, text = card_of(folder)
    assert front["license"] == "apache-2.0"
    assert "model-index" not in front
    assert "has no evaluation of these weights" in text


def test_the_card_of_words_says_what_the_pipeline_leaves_out(exported, tmp_path):
    tokenizer = DocumentEndTokenizer(word_tokenizer(["the", "cat"]))
    Memformer(tiny_config(vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    call_json("export", tmp_path / "model", "--hf", tmp_path / "out")
    sentence = "so the space before the first of them is missing"
    assert sentence in card_of(tmp_path / "out")[1]
    assert sentence not in card_of(exported)[1]


def test_the_end_of_a_document_ends_generation(tmp_path):
    tokenizer = DocumentEndTokenizer(ByteTokenizer())
    model = Memformer(tiny_config(vocab_size=tokenizer.vocab_size))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    call_json("export", tmp_path / "model", "--hf", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 256
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 256
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == 256
    assert load_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert "has no record of its training" in card_of(tmp_path / "out")[1]


def test_models_without_a_text_tokenizer_are_exported_without_one(digits, tmp_path):
    status, out, err = call("export", digits[0], "--hf", tmp_path / "digits")
    assert status == 0
    assert out == f"{tmp_path / 'digits'}\n"
    assert "exported without a tokenizer: The token ids are the grey levels of images" in err
    assert names(tmp_path / "digits") == FILES
    front, text = card_of(tmp_path / "digits")
    assert "pipeline_tag" not in front
    assert "bits per pixel" in text
    assert "token ids from 0 to" in text
    load_model(tmp_path / "digits")
    Memformer(tiny_config()).save_pretrained(tmp_path / "bare")
    _, _, err = call("export", tmp_path / "bare", "--hf", tmp_path / "arrays")
    assert "The model was saved without a tokenizer." in err
    assert names(tmp_path / "arrays") == FILES


AUTO_MAP_FILES = {"config.json", "generation_config.json", "model.safetensors", "modeling_memformer.py"}


def test_auto_map_names_the_code_that_transformers_loads(run_folder, tmp_path, monkeypatch):
    call_json("export", run_folder, "--hf", tmp_path / "model", "--auto_map")
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for reference in auto_map.values():
        loaded = dynamic_module_utils.get_class_from_dynamic_module(reference, str(tmp_path / "model"))
        assert loaded is getattr(hf, reference.partition(".")[2])
    # Without trust, the registered classes are used.
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is hf.MemformerForCausalLM
    load_model(tmp_path / "model")
    # Loaded with trust and saved again, the folder is as complete, and holds no copy of the library.
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == AUTO_MAP_FILES
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again) is hf.MemformerForCausalLM


class StandIn:
    """Stands in for the hub."""

    calls: ClassVar[list] = []
    error = None

    def create_repo(self, name, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", name, options))
        return f"https://hub.example/{name}"

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", names(Path(options["folder_path"])), options))


def test_a_pushed_model_is_created_and_uploaded(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    monkeypatch.setattr(StandIn, "calls", [])
    result = call_json("export", run_folder, "--hf", tmp_path / "model", "--push", "someone/demo")
    assert result["address"] == "https://hub.example/someone/demo"
    (_, name, options), (_, uploaded, upload) = StandIn.calls
    assert name == upload["repo_id"] == "someone/demo"
    assert options == {"repo_type": "model", "exist_ok": True}
    assert uploaded == FILES | TOKENIZER_FILES
    assert 'model="someone/demo"' in card_of(tmp_path / "model")[1]
    monkeypatch.setattr(StandIn, "error", OSError("no login\nfor you"))
    message = refused("export", run_folder, "--hf", tmp_path / "other", "--push", "someone/demo")
    assert message == f"{tmp_path / 'other'} was written, but could not be uploaded as someone/demo: no login"
    assert "push ('demo') must be the name of a model" in refused(
        "export", run_folder, "--hf", tmp_path / "third", "--push", "demo"
    )
    assert not (tmp_path / "third").exists()


def test_what_cannot_be_exported_is_refused(run_folder, exported, tmp_path):
    assert "exists already; choose an empty or a new folder" in refused("export", run_folder, "--hf", exported)
    (tmp_path / "file").write_text("")
    assert "exists already" in refused("export", run_folder, "--hf", tmp_path / "file")
    for kind in ("--hf", "--onnx"):
        assert "a path is empty; name a file or a folder" in refused("export", run_folder, kind, "")
    assert "is not a folder" in refused("export", tmp_path / "nowhere", "--hf", tmp_path / "out")
    assert refused("export", run_folder) == "give either --hf or --onnx: the folder to write"
    shutil.copytree(exported, tmp_path / "broken")
    model = load_model(tmp_path / "broken")
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    Memformer.save_pretrained(model, tmp_path / "broken")
    assert "are not finite" in refused("export", tmp_path / "broken", "--hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_failed(run_folder, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_card_text", fail)
    message = refused("export", run_folder, "--hf", tmp_path / "out" / "model")
    assert message == f"{tmp_path / 'out' / 'model'} could not be written: No space left on device"
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    call_json("export", run_folder, "--hf", tmp_path / "empty")
    assert names(tmp_path / "empty") == FILES | TOKENIZER_FILES
