"""Mining decoys in a run: the model is asked what it writes, and a resumed run finds the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from memformer import InputError
from memformer.cli.main import main
from memformer.data import RecallConfig, SourceConfig
from memformer.data.recall import stream as stream_module
from memformer.training.config import DataConfig, RunConfig
from memformer.training.mining import is_written
from memformer.training.processes import Processes, check_processes
from tests.cli.calls import refused
from tests.data.recall.texts import write_stories
from tests.evaluation.test_reading_ahead import recall_model
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE
from tests.training.test_recall_runs import write_run

RECALL = {"write_normalizer": "entmax15", "forgetting_when_written": True, "free_slot_bias": 1.0}
RECALL_MODEL = ("--model.preset", "recall", "--model.num_slots", "3")


@pytest.fixture
def run_file(tmp_path):
    path = write_stories(tmp_path)
    recall = {"task": "babi", "path": path, "validation_path": path, "num_facts": [2, 4]}
    recall |= {"decoy_probability": 0.5, "mine_decoys": True}
    # Documents with a place of the stories, as decoys need.
    file = write_run(tmp_path, recall, {"kind": "word", "vocab_size": 40}, segment_length=8)
    (tmp_path / "texts" / "place.txt").write_text("the cat sat on the bathroom and the kitchen mat " * 9)
    return file


def test_of_each_segment_it_is_said_whether_the_memory_of_its_stream_changes():
    model = recall_model(0.1, **RECALL)
    memory = model.initial_memory(3)
    for _ in range(2):
        _, memory = model.encode(torch.randint(VOCAB_SIZE, (3, SEGMENT_LENGTH)), memory=memory)
    segments = torch.randint(VOCAB_SIZE, (200, SEGMENT_LENGTH))
    model.train()
    found = is_written(model, memory.detach(), segments)
    assert model.training
    model.eval()
    changes = []
    for index, segment in enumerate(segments):
        before = memory[index % 3 : index % 3 + 1]
        _, after = model.encode(segment[None], memory=before)
        changes.append(not torch.equal(after, before))
    changed = torch.tensor(changes)
    assert found[changed].all()
    assert 0 < changed.sum() < len(changed)
    assert found[~changed].sum() < 10  # a token may have a weight of almost 0


@pytest.mark.usefixtures("without_report")
def test_a_stopped_and_resumed_run_finds_the_same_decoys(run_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream_module, "_EPISODES_UNTIL_FILLER_IS_KNOWN", 1)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = ["train", run_file, *RECALL_MODEL, "--training.num_updates", "5", "--training.save_every", "3"]
    assert main([*argv, "--folder", str(whole)]) == 0, capsys.readouterr().err
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "update-000000005")
    assert main([*argv, "--folder", str(resumed), "--resume"]) == 0, capsys.readouterr().err
    last, expected = (load_file(each / "checkpoints/update-000000005/model.safetensors") for each in (resumed, whole))
    assert all(torch.equal(last[name], expected[name]) for name in expected)
    streams = [
        json.loads((each / "checkpoints/update-000000005/progress.json").read_text())["progress"]["stream"]
        for each in (resumed, whole)
    ]
    assert streams[0] == streams[1]
    assert streams[0]["mined_decoys"]


def test_models_that_always_write_are_refused(run_file):
    message = refused("train", run_file)
    assert "data.recall.mine_decoys (true) needs a Memformer whose memory changes only when" in message


def test_several_processes_are_refused():
    recall = RecallConfig(task="babi", path="x", validation_path="x", decoy_probability=0.5, mine_decoys=True)
    data = DataConfig(train=SourceConfig(path="x"), validation=SourceConfig(path="y"), recall=recall)
    config = RunConfig(folder="x", data=data)
    processes = Processes()
    check_processes(config, processes)
    processes.count = 2
    with pytest.raises(InputError, match=r"data\.recall\.mine_decoys \(true\) needs a single process.*there are 2"):
        check_processes(config, processes)
