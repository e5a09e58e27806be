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
from tests.training.runs import config_file, run_config, write_documents

pytestmark = pytest.mark.filterwarnings("default")


def gradients_of(model, rollout, method):
    model.zero_grad()
    torch.manual_seed(3)
    result = backpropagate(model, rollout, method=method, readout_timesteps=2)
    return result, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_replay_and_bptt_give_the_eager_gradients_with_dropout():
    # This backend makes the graphs, but no code, which takes minutes: tests/soak/compiled_training.py does.
    check_compiled_gradients(backend="aot_eager")


def check_compiled_gradients(**options):
    """Check that both methods have the gradients of eager replay, with the same dropout."""
    model, compiled = (tiny_model(num_encoder_layers=1, num_decoder_layers=2, dropout=0.2) for _ in range(2))
    compiled.compile(**options)
    rollout = random_rollout(3, batch_size=2, resets=True)
    expected, expected_gradients = gradients_of(model, rollout, "replay")
    for method in ("replay", "bptt"):
        result, gradients = gradients_of(compiled, rollout, method)
        assert_close(result.loss, expected.loss)
        assert_close(result.memory, expected.memory)
        assert_close(result.memory_grad, expected.memory_grad)
        for name, gradient in gradients.items():
            assert_close(gradient, expected_gradients[name])


def test_a_compiled_classifier_has_the_eager_gradients():
    model, compiled = (tiny_classifier(num_encoder_layers=1) for _ in range(2))
    compiled.compile(backend="eager")
    counters.clear()
    rollout = model.make_rollout(*documents_of(model))
    expected, expected_gradients = gradients_of(model, rollout, "replay")
    result, gradients = gradients_of(compiled, rollout, "replay")
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(result.loss, expected.loss)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name])


def test_further_updates_need_no_recompilation():
    model = tiny_model()
    model.compile(backend="aot_eager")
    counters.clear()
    rollouts = [random_rollout(3, batch_size=2, seed=seed) for seed in range(3)]
    gradients_of(model, rollouts[0], "replay")
    num_graphs = counters["stats"]["unique_graphs"]
    for rollout in rollouts:
        gradients_of(model, rollout, "replay")
    assert counters["stats"]["unique_graphs"] == num_graphs > 0


def test_a_compiled_run_equals_the_eager_one_up_to_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr("memformer.training.report.write_report", lambda folder, **_: folder / "summary.html")
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
