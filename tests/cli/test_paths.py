"""`~` at the start of a path is the home folder, in every option, config key and function that takes a path."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from memformer import InputError, Memformer, Session, load_model
from memformer.data import ByteTokenizer, SourceConfig, build_corpus, iterate_documents, load_tokenizer, save_tokenizer
from memformer.data.corpus import Corpus
from memformer.reproduction import command
from memformer.training.report import write_report
from memformer.training.run_folder import load_run
from tests.cli.calls import call, call_json, make_text, refused
from tests.helpers import tiny_model


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder; the working folder is another, empty one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.usefixtures("without_report")
def test_train_and_resume_expand_paths(home, base):
    """`~` is expanded in the config file's path, its keys, and the options of train."""
    shutil.copytree(base / "texts", home / "texts")
    (home / "other.txt").write_text(make_text(5) * 3)
    config = yaml.safe_load((base / "config.yaml").read_text())
    config["folder"] = "~/run"
    config["data"] |= {"train": {"kind": "text", "path": "~/texts"}, "cache": "~/cache"}
    config["training"] |= {"num_updates": 1, "sample_tokens": 0}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    result = call_json("train", "~/config.yaml", "--data.validation.path", "~/other.txt")
    assert result["run"] == str(home / "run")
    assert any((home / "cache").iterdir())
    options = ["--resume", "--data.cache", "~/cache-2", "--folder", "~/run", "--training.num_updates", "2"]
    assert call_json("train", "~/run", *options)["run"] == str(home / "run")
    assert any((home / "cache-2").iterdir())
    assert (home / "run" / "checkpoints" / "update-000000002").is_dir()


def test_the_default_cache_is_in_the_home_folder(home, monkeypatch):
    """`~` is expanded in the variable that names the cache."""
    from memformer.training.run_data import default_cache

    assert default_cache() == home / ".cache" / "memformer"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert default_cache() == home / "caches" / "memformer"


def test_the_commands_expand_paths(home, run_folder, digits):
    """`~` is expanded in the arguments and options of the commands that use a run."""
    shutil.copytree(run_folder, home / "run")
    shutil.copytree(digits[0], home / "digits")
    (home / "text").write_text(make_text(3))
    assert call("report", "~/run")[0] == 0
    assert call_json("evaluate", "~/run", "--data.kind", "text", "--data.path", "~/text")["num_tokens"] > 0
    prompt = ["--prompt_file", "~/text", "--max_new_tokens", "0"]
    call_json("generate", "~/run", *prompt, "--save_session", "~/state")
    call_json("generate", "~/run", "--load_session", "~/state", "--max_new_tokens", "0")
    assert (home / "state").is_file()
    compared = call_json("compare", "~/run", "~/run", "--output", "~/compared.png")
    assert compared["runs"][0]["run"] == str(home / "run")
    assert (home / "compared.png").is_file()
    drawn = call_json("generate", "~/digits", "--num_images", "1", "--output", "~/grid.png")
    assert drawn["output"] == str(home / "grid.png")
    assert (home / "grid.png").is_file()
    call_json("retention", "~/run", "--delays", "0", "--max_tokens", "10", "--output", "~/kept")
    assert sorted(file.name for file in (home / "kept").iterdir()) == ["retention.json", "retention.png"]


def test_reproduce_expands_paths(home, monkeypatch):
    """`~` is expanded in the folders of reproduce."""
    planned = []
    monkeypatch.setattr(command, "finish_runs", lambda runs, **options: planned.extend(runs))
    arguments = ["reproduce", "table1", "--rows", "01-lstm", "--folder", "~/out", "--data", "~/data"]
    assert f"not exist: {home / 'data'}/" in refused(*arguments)
    monkeypatch.setattr(command, "check_data", lambda *_, **__: None)
    message = refused(*arguments)
    assert f"no run in {home / 'out'} is finished" in message
    assert planned[0].folder == home / "out" / "01-lstm-seed-0"
    assert planned[0].config["data"]["train"]["path"].startswith(f"{home / 'data'}/")


def test_the_functions_of_the_library_expand_paths(home):
    """`~` is expanded in every path of the library."""
    model = tiny_model(vocab_size=256)
    model.save_pretrained("~/model")
    for loaded in (Memformer.from_pretrained("~/model"), load_model(Path("~/model"))):
        assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    Session(model).save("~/state")
    assert Session.load("~/state", model=model).num_tokens == [0]
    save_tokenizer(ByteTokenizer(), "~/model")
    assert load_tokenizer("~/model").kind == "bytes"
    assert load_run("~/model").folder == home / "model"
    (home / "text").write_text(make_text(1))
    corpus = build_corpus(SourceConfig(path="~/text"), ByteTokenizer(), cache="~/cache")
    (folder,) = (home / "cache").iterdir()
    assert Corpus.open(f"~/cache/{folder.name}").num_tokens == corpus.num_tokens
    with pytest.raises(ValueError, match=f"^{home / 'model'} has no log.jsonl"):
        write_report("~/model")


def test_a_local_data_set_of_hugging_face_can_be_in_the_home_folder(home, monkeypatch):
    """`~` is expanded in the name of a data set, which may be a folder; other names do not change."""
    (home / "data").mkdir()
    (home / "data" / "a.parquet").write_bytes(b"PAR1")
    module, names = ModuleType("datasets"), []
    module.load_dataset = lambda name, *_, **__: names.append(name) or [{"text": "a"}]
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name in ("~/data", "data", "user/data"):
        assert len(list(iterate_documents(SourceConfig(kind="huggingface", name=name, split="train")))) == 1
    assert names == [str(home / "data"), "data", "user/data"]
    for name in ("./data", "~/other", "/data", "~/data/*.parquet", "a/b/c"):
        with pytest.raises(InputError, match=r"name \(.*\) is no folder, and no name of a data set on the hub"):
            iterate_documents(SourceConfig(kind="huggingface", name=name, split="train"))
    with pytest.raises(InputError, match=r"name \(~/data/a\.parquet\) is a file; kind 'huggingface' reads a folder"):
        iterate_documents(SourceConfig(kind="huggingface", name="~/data/a.parquet", split="train"))


@pytest.mark.parametrize("inner", ["run", "deep/run"])
def test_a_run_within_its_own_data_is_refused(base, tmp_path, inner):
    """It could be neither resumed nor evaluated, because its files would be new documents."""
    shutil.copytree(base / "texts", tmp_path / "texts")
    train = ("train", base / "config.yaml", "--data.train.path", tmp_path / "texts", "--training.num_updates", "1")
    message = refused(*train, "--folder", tmp_path / "texts" / inner)
    assert f"lies in data.train.path ({tmp_path / 'texts'}), so its files would be read as data" in message
    message = refused(*train, "--folder", tmp_path / "run", "--data.cache", tmp_path / "texts" / inner)
    assert message.startswith(f"data.cache {tmp_path / 'texts' / inner} lies in data.train.path")
    assert not (tmp_path / "run").exists()
    for pattern, start in (("texts/**/*.txt", "texts"), ("**", "."), ("*/deep/run*/samples/*.txt", "texts")):
        named = ("--data.train.path", tmp_path / pattern)
        message = refused(*train, *named, "--folder", tmp_path / start / "deep" / "run")
        assert f"lies in data.train.path ({tmp_path / pattern}), so its files would be read as data" in message
    stories = ("--data.recall.task", "babi", "--data.recall.path", tmp_path / "texts")
    stories += ("--data.recall.validation_path", f"[{base / 'texts'}]")
    message = refused(*train, "--data.train.path", base / "texts", *stories, "--folder", tmp_path / "texts" / inner)
    assert f"lies in data.recall.path ({tmp_path / 'texts'})" in message
    for folder in (tmp_path / "texts" / ".runs" / "a", tmp_path / "texts-run"):
        call_json(*train, "--folder", folder)
        call_json("train", folder, "--resume", "--training.num_updates", "2")


def test_documents_given_to_evaluate_are_of_the_kind_of_the_run(base, tmp_path):
    lines = "".join(json.dumps({"text": make_text(seed)}) + "\n" for seed in range(4))
    (tmp_path / "a.jsonl").write_text(lines)
    train = ("train", base / "config.yaml", "--folder", tmp_path / "run", "--training.num_updates", "1")
    train = (*train, "--training.num_lanes", "2")
    call_json(*train, "--data.train.kind", "jsonl", "--data.train.path", tmp_path / "a.jsonl")
    given = ("evaluate", tmp_path / "run", "--data.path", tmp_path / "a.jsonl")
    found = call_json(*given)
    assert found["num_tokens"] == sum(len(make_text(seed)) for seed in range(4))
    assert call_json(*given, "--data.kind", "text")["num_tokens"] == len(lines)
