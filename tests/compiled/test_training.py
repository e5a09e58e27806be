"""A compiled model gives the results of the eager one, with the same dropout, and is compiled once per shape."""

import copy
import json
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

from memformer import Memformer, backpropagate
from memformer.cli.main import main
from tests.helpers import assert_close, random_rollout, tiny_model
from tests.models.classifiers import documents_of, tiny_classifier
from tests.training.gradients import assert_same_gradients, gradients
from tests.training.runs import config_file, run_config, write_documents

pytestmark = pytest.mark.filterwarnings("default")


def test_compiled_replay_and_bptt_give_the_eager_gradients_with_dropout():
    # This backend makes the graphs, but no code, which takes minutes: tests/soak/compiled_training.py does.
    check_compiled_gradients(backend="aot_eager")


def check_compiled_gradients(**options):
    """Check that both methods have the gradients of eager replay, with the same dropout."""
    model, compiled = (tiny_model(num_encoder_layers=1, num_decoder_layers=2, dropout=0.2) for _ in range(2))
    compiled.compile(**options)
    rollout = random_rollout(3, batch_size=2, resets=True)
    expected = gradients(model, rollout, None, "replay", readout_timesteps=2)
    for method in ("replay", "bptt"):
        assert_same_gradients(gradients(compiled, rollout, None, method, readout_timesteps=2), expected)


def test_a_compiled_classifier_has_the_eager_gradients():
    model, compiled = (tiny_classifier(num_encoder_layers=1) for _ in range(2))
    compiled.compile(backend="eager")
    counters.clear()
    rollout = model.make_rollout(*documents_of(model))
    expected = gradients(model, rollout, None, "replay", readout_timesteps=2)
    found = gradients(compiled, rollout, None, "replay", readout_timesteps=2)
    assert counters["stats"]["unique_graphs"] > 0
    assert_same_gradients(found, expected)


def test_further_updates_need_no_recompilation():
    model = tiny_model()
    model.compile(backend="aot_eager")
    counters.clear()
    rollouts = [random_rollout(3, batch_size=2, seed=seed) for seed in range(3)]
    backpropagate(model, rollouts[0], readout_timesteps=2)
    num_graphs = counters["stats"]["unique_graphs"]
    for rollout in rollouts:
        backpropagate(model, rollout, readout_timesteps=2)
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


@pytest.mark.usefixtures("without_report")
def test_a_compiled_run_equals_the_eager_one_up_to_rounding(tmp_path, monkeypatch):
    compile_modules = Memformer.compile
    # This backend only traces: code generation by torch is not tested here.
    monkeypatch.setattr(Memformer, "compile", lambda model: compile_modules(model, backend="eager"))
    write_documents(tmp_path / "texts")
    curves = []
    for name, is_compiled in (("eager", False), ("compiled", True)):
        counters.clear()
        config = run_config(tmp_path, name, compiled=is_compiled, num_updates=4, evaluate_every=4)
        assert main(["train", config_file(config)]) == 0
        assert (counters["stats"]["unique_graphs"] > 0) == is_compiled
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        curves.append([line["bits_per_token"] for line in lines if line["kind"] == "training"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_weights_are_saved_under_the_same_names():
    model, compiled = tiny_model(), tiny_model()
    compiled.compile(backend="aot_eager")
    assert model.state_dict().keys() == compiled.state_dict().keys()


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = tiny_model()
    model.compile(backend="eager")
    assert pickle.dumps(model)
    other, fresh = copy.deepcopy(model), tiny_model()
    with torch.no_grad():
        for changed in (other, fresh):
            changed.embedding.weight.mul_(0.5)
    rollout = random_rollout(2, 2)
    loss = backpropagate(other, rollout).loss
    assert_close(loss, backpropagate(fresh, rollout).loss)
    assert all(weight.grad is None for weight in model.parameters())
