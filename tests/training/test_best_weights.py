"""The best weights of a run are those of its log, also after it was resumed from an earlier checkpoint."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import yaml

from memformer import CheckpointError, load_model
from memformer.cli.main import main
from memformer.data import ByteTokenizer, load_tokenizer
from memformer.training import best_weights
from memformer.training.best_weights import read_best_evaluation
from memformer.training.comparison import summarize_run
from memformer.training.config import TrainingConfig
from memformer.training.logs import read_log
from memformer.training.loop import _Trainer as Trainer
from tests.helpers import tiny_model
from tests.training.runs import checkpoint_of, config_file, run_config

pytestmark = pytest.mark.usefixtures("without_report")


def evaluations(folder):
    return {line["update"]: line["bits_per_token"] for line in read_log(folder) if line["kind"] == "evaluation"}


def test_the_best_weights_come_with_their_evaluation(unbroken):
    logged = evaluations(unbroken)
    best = read_best_evaluation(unbroken)
    assert best["bits_per_token"] == logged[best["update"]] == min(logged.values())


def test_after_a_broken_score_any_other_is_better(tmp_path):
    progress = {"best_score": None, "num_updates": 1}
    for score, expected in ((math.nan, 1), (2.0, 2), (3.0, 2), (2.0, 4), (math.nan, 4)):
        best_weights.save_if_best(
            tmp_path,
            tiny_model(),
            ByteTokenizer(),
            SimpleNamespace(score=score, to_log=dict),
            progress=progress,
        )
        assert read_best_evaluation(tmp_path)["update"] == expected
        progress["num_updates"] += 1


def test_weights_of_updates_that_were_given_up_are_not_the_best(copied):
    """Training goes on from update 6 with a learning rate that spoils the weights, after update 10 was the best."""
    assert read_best_evaluation(copied)["update"] == 10
    before = evaluations(copied)[10]
    for update in (9, 10):
        shutil.rmtree(checkpoint_of(copied, update))
    argv = ["train", str(copied), "--folder", str(copied), "--resume", "--training.learning_rate", "10.0"]
    assert main(argv) == 0
    best = read_best_evaluation(copied)
    assert (best["update"], best["bits_per_token"]) == (10, evaluations(copied)[10])
    assert best["bits_per_token"] > before
    result = json.loads((copied / "evaluation.json").read_text())
    assert result["with_memory"]["bits_per_token"] == pytest.approx(best["bits_per_token"])


def test_a_run_that_goes_on_keeps_its_best_weights(copied):
    """Later updates spoil the weights."""
    before = read_best_evaluation(copied)
    argv = ["train", str(copied), "--folder", str(copied), "--resume", "--training.num_updates", "15"]
    assert main([*argv, "--training.learning_rate", "10.0"]) == 0
    assert evaluations(copied)[15] > before["bits_per_token"]
    assert read_best_evaluation(copied) == before


def test_a_damaged_evaluation_is_refused(copied):
    file = copied / "best" / "update.json"
    for text in ("{", "{}"):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=r"update\.json"):
            read_best_evaluation(copied)


def test_weights_saved_by_a_killed_process_are_not_taken_for_earlier_ones(copied, monkeypatch):
    """The process is killed between the weights and the tokenizer of `best`, and the run goes on otherwise."""
    monkeypatch.setattr(best_weights, "save_tokenizer", stop)
    model, tokenizer = load_model(copied / "best"), load_tokenizer(copied)
    (copied / "best" / "update.json").write_text('{"update": 3}')
    progress = {"best_score": None, "num_updates": 10}
    result = SimpleNamespace(score=0.0, to_log=lambda: {"bits_per_token": 0.0})
    with pytest.raises(KeyboardInterrupt):
        best_weights.save_if_best(copied, model, tokenizer, result, progress=progress)
    progress = {"best_score": 1.0, "num_updates": 8}
    config = TrainingConfig(evaluation_tokens=1_000)
    best_weights.forget_best(copied, progress, config, lambda training: training.evaluation_tokens)
    assert progress["best_score"] is None


def stop(*args):
    raise KeyboardInterrupt


def test_a_new_run_has_nothing_of_an_aborted_one(base, tmp_path, monkeypatch):
    """The aborted run had an evaluation and no checkpoint; the new one stops before its own first evaluation."""
    monkeypatch.setattr(Trainer, "_save", stop)
    config = config_file(run_config(base, num_updates=4, evaluate_every=2, warmup_updates=0))
    folder = tmp_path / "run"
    assert main(["train", config, "--folder", str(folder)]) == 130
    (folder / "samples" / "mine.txt").write_text("a file of the user")
    (folder / "trackers.json").write_text("{}")
    assert (folder / "best" / "model.safetensors").exists()
    monkeypatch.setattr(Trainer, "_evaluate", stop)
    assert main(["train", config, "--folder", str(folder), "--seed", "7"]) == 130
    assert not (folder / "best").exists()
    assert not (folder / "trackers.json").exists()
    assert [file.name for file in (folder / "samples").iterdir()] == ["mine.txt"]
    assert summarize_run(folder).best is None


def test_options_that_nothing_is_trained_with_are_not_written_down(copied):
    before = yaml.safe_load((copied / "config.yaml").read_text())["training"]
    argv = ["train", str(copied), "--folder", str(copied), "--resume", "--training.learning_rate", "5.0"]
    assert main(argv) == 0
    assert yaml.safe_load((copied / "config.yaml").read_text())["training"] == before
    assert main([*argv, "--training.num_updates", "11"]) == 0
    after = yaml.safe_load((copied / "config.yaml").read_text())["training"]
    assert (after["learning_rate"], after["num_updates"]) == (5.0, 11)


def test_deleted_weights_of_a_finished_run_are_named_with_the_remedy(copied, capsys):
    shutil.rmtree(copied / "best")
    argv = ["train", str(copied), "--folder", str(copied), "--resume"]
    assert main(argv) == 2
    assert "best is missing, so there are no best weights to evaluate; with a higher" in capsys.readouterr().err
    assert main([*argv, "--training.num_updates", "12"]) == 0
    assert (copied / "best" / "model.safetensors").exists()
