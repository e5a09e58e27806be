"""The best weights of a run are those of its log, also after it was resumed from an earlier checkpoint."""

import json
import shutil

import pytest

from memformer import CheckpointError
from memformer.cli.main import main
from memformer.training.best_weights import read_best_evaluation
from memformer.training.logs import read_log
from tests.training.runs import checkpoint_of

pytestmark = pytest.mark.usefixtures("without_report")


def evaluations(folder):
    return {line["update"]: line["bits_per_token"] for line in read_log(folder) if line["kind"] == "evaluation"}


def test_the_best_weights_come_with_their_evaluation(unbroken):
    logged = evaluations(unbroken)
    best = read_best_evaluation(unbroken)
    assert best["bits_per_token"] == logged[best["update"]] == min(logged.values())


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
