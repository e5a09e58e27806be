"""The engine's pieces, run operation by operation, give the gradients of back-propagation through time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from memformer import InputError, Rollout, backpropagate
from memformer.models.presets import preset_fields
from memformer.nn.attention import SelfAttention
from memformer.training import engine as engine_module
from memformer.training.engine import MOST_CHANGES_IN_A_ROW, MOST_SHAPES, ReplayEngine
from memformer.training.pieces import RolloutHooks
from memformer.utils.cuda_graphs import CannotRecord, GraphPool, RecordingFailed
from tests.helpers import StandInPool, assert_close, random_rollout, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline
from tests.training.gradients import assert_same_gradients, by_engine, gradients, penalty


@pytest.mark.parametrize(("num_timesteps", "readout_timesteps"), [(1, 1), (5, 1), (5, 3)])
def test_the_engine_equals_bptt(variant, num_timesteps, readout_timesteps):
    model = tiny_model(dropout=0.2, **variant)
    memory = model.initial_memory(3).detach() + 0.1 * torch.randn_like(model.initial_memory(3))
    rollout = random_rollout(num_timesteps, 3, resets=True, padding=True)
    expected = gradients(model, rollout, memory, "bptt", readout_timesteps=readout_timesteps)
    actual = by_engine(model, rollout, memory, readout_timesteps=readout_timesteps)
    assert_same_gradients(actual, expected)
    assert actual[2] == expected[2], "the random generator must be left where the forward pass left it"


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("padding", [False, True])
def test_the_engine_equals_bptt_for_every_baseline(name, padding):
    model = tiny_baseline(name, dropout=0.2)
    rollout = random_rollout(4, 3, resets=True)
    if padding:
        target_padding = torch.zeros(rollout.targets.shape, dtype=torch.bool)
        target_padding[1, 0, 2:] = True
        target_padding[2, 1] = True
        rollout = Rollout(
            inputs=rollout.inputs, targets=rollout.targets, reset=rollout.reset, target_padding=target_padding
        )
    expected = gradients(model, rollout, None, "bptt", readout_timesteps=2)
    assert_same_gradients(by_engine(model, rollout, None, readout_timesteps=2), expected)


@pytest.mark.parametrize("name", BASELINES)
def test_answers_and_a_text_of_equal_shapes_share_one_engine(name):
    model = tiny_baseline(name)
    engine, text = ReplayEngine(model, records=False), random_rollout(3, 2)
    text = replace(text, targets=text.targets[..., :1])
    for is_answer in (True, False, True):
        rollout = replace(text, targets_are_answers=is_answer)
        expected = gradients(model, rollout, None, "bptt")
        assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)


def test_graphs_are_for_cuda():
    with pytest.raises(InputError, match="records is True, but the model is on cpu; CUDA graphs need a CUDA device"):
        ReplayEngine(tiny_model(), records=True)


def test_the_engine_refuses_hooks_on_gradients_as_replay_does():
    model, rollout = tiny_model(), random_rollout(2, 2)
    handle = model.embedding.weight.register_hook(lambda grad: grad)
    with pytest.raises(InputError, match=r"embedding.weight has a hook on its gradient"):
        ReplayEngine(model, records=False).backpropagate(rollout)
    handle.remove()
    ReplayEngine(model, records=False).backpropagate(rollout)


def test_pieces_are_recorded_anew_for_another_precision_of_products():
    """Also if it is set by the newer of PyTorch's two interfaces, after which the older one raises."""
    model, rollout = tiny_model(), random_rollout(2, 2)
    engine = ReplayEngine(model, records=False)
    engine.backpropagate(rollout)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        engine.backpropagate(rollout)
        engine.backpropagate(rollout)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(engine._shapes) == 2


@pytest.mark.parametrize("records", [False, True])
def test_a_parameter_that_the_loss_does_not_depend_on_has_no_gradient(records, monkeypatch):
    model = tiny_model()
    engine = ReplayEngine(model, records=False)

    class Pool(StandInPool):
        def record(self, work, *, before):
            """Return a function that does what the work does on the device, and nothing else."""
            super().record(work, before=before)

            def launch():
                reached = set(engine._gradients.reached)
                work()
                engine._gradients.reached = reached

            return launch

    monkeypatch.setattr(engine, "_new_pool", lambda: Pool() if records else None)
    memory = model.initial_memory(3).detach()
    for num_timesteps in (1, 3, 1):
        rollout = random_rollout(num_timesteps, 3)
        _, expected, _ = gradients(model, rollout, memory, "bptt")
        _, actual, _ = by_engine(model, rollout, memory, engine=engine)
        assert actual.keys() == expected.keys()
        # With one timestep, nothing that was written is read.
        assert any("memory_writer" in name for name in actual) == (num_timesteps > 1)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_after_a_failed_recording_such_a_parameter_has_no_gradient(at, monkeypatch):
    model = tiny_model()
    engine = ReplayEngine(model, records=False)
    monkeypatch.setattr(engine, "_new_pool", lambda: StandInPool(RecordingFailed, at=at))
    rollout = random_rollout(1, 3)
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)


@pytest.mark.parametrize("fields", [{"forgetting": False}, preset_fields("recall")])
def test_resets_that_are_all_false_and_no_resets_differ_as_in_bptt(fields):
    model = tiny_model(**fields)
    engine = ReplayEngine(model, records=False)
    memory = model.initial_memory(3).detach()
    with_reset = random_rollout(3, 3, resets=True)
    for reset in (with_reset.reset, torch.zeros(3, 3, dtype=torch.bool), None, with_reset.reset):
        rollout = replace(with_reset, reset=reset)
        expected = gradients(model, rollout, memory, "bptt")
        assert_same_gradients(by_engine(model, rollout, memory, engine=engine), expected)


def test_with_a_write_penalty_the_engine_equals_bptt_with_known_filler_and_without():
    model = tiny_model(dropout=0.2, write_normalizer="entmax15", write_competition=True)
    memory = model.initial_memory(3).detach()
    rollout = random_rollout(5, 3, resets=True, padding=True)
    options = {"readout_timesteps": 2, "hooks": penalty(0.5, 1.5), "gradient_scale": 0.3}
    engine = ReplayEngine(model, records=False)
    for is_filler in (None, torch.arange(15).view(5, 3) % 2 == 0, torch.arange(15).view(5, 3) % 3 == 0, None):
        known = replace(rollout, is_filler=is_filler)
        expected = gradients(model, known, memory, "bptt", **options)
        assert_same_gradients(by_engine(model, known, memory, engine=engine, **options), expected)


def test_the_engine_decodes_from_given_start_tokens():
    model = tiny_model()
    rollout = random_rollout(3, 2)
    starts = torch.tensor([[1, 2], [3, 11], [0, 4]])
    rollout = Rollout(inputs=rollout.inputs, targets=rollout.targets, decoder_start_ids=starts)
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(by_engine(model, rollout, None), expected)


def test_rollouts_of_any_length_and_with_any_masks_share_one_engine():
    model = tiny_model(dropout=0.2)
    engine = ReplayEngine(model, records=False)
    for length, masks in ((2, False), (5, True), (3, True), (1, False), (4, False)):
        rollout = random_rollout(length, 3, resets=masks, padding=masks, seed=length)
        expected = gradients(model, rollout, None, "bptt", readout_timesteps=2)
        assert_same_gradients(by_engine(model, rollout, None, engine=engine, readout_timesteps=2), expected)


def test_ever_longer_rollouts_are_recorded_a_few_times():
    model = tiny_model()
    engine, capacities = ReplayEngine(model, records=False), set()
    for length in (1, 2, 3, 5):
        rollout = random_rollout(length, 2)
        actual = by_engine(model, rollout, None, engine=engine)
        (replay,) = engine._shapes.values()
        capacities.add(replay.capacity)
    assert capacities == {1, 2, 4, 8}
    assert_same_gradients(actual, gradients(model, rollout, None, "replay"))


def test_gradients_are_added_in_the_same_tensors():
    model = tiny_model()
    engine, rollout = ReplayEngine(model, records=False), random_rollout(2, 2)
    _, once, _ = by_engine(model, rollout, None, engine=engine)
    tensors = [parameter.grad for parameter in model.parameters()]
    if any(tensor is None for tensor in tensors):
        pytest.fail("every parameter has a gradient tensor")
    engine.backpropagate(rollout)
    for (name, parameter), tensor in zip(model.named_parameters(), tensors, strict=True):
        assert parameter.grad is tensor
        assert_close(tensor, 2 * once[name])
    # A gradient computed elsewhere is taken over.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.backpropagate(rollout)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, once[name] + 1)


def test_a_changed_model_is_noticed():
    model = tiny_model(dropout=0.2)
    engine, rollout = ReplayEngine(model, records=False), random_rollout(2, 2)
    by_engine(model, rollout, None, engine=engine)
    model.eval()
    model.embedding.weight.requires_grad_(False)
    expected = gradients(model, rollout, None, "bptt")
    actual = by_engine(model, rollout, None, engine=engine)
    assert_same_gradients(actual, expected)
    assert "embedding.weight" not in actual[1]


def test_pieces_are_recorded_anew_for_what_a_graph_has_in_it():
    """A graph keeps the probability of dropout, for example, and the hooks with which it was recorded."""
    model = tiny_model(dropout=0.2)
    engine, rollout = ReplayEngine(model, records=False), random_rollout(2, 2)
    recorded = []

    def run():
        by_engine(model, rollout, None, engine=engine)
        recorded.extend(engine._shapes.values())

    run()
    run()
    assert recorded[0] is recorded[1]
    dropout = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    attention = next(module for module in model.modules() if isinstance(module, SelfAttention))
    for change in (
        lambda: setattr(dropout, "p", 0.3),
        lambda: setattr(attention, "dropout", 0.3),
        lambda: attention.register_forward_hook(lambda *_: None),
        lambda: attention.register_forward_pre_hook(lambda *_: None),
    ):
        change()
        run()
        assert recorded[-1] is not recorded[-2]
    run()
    assert recorded[-1] is recorded[-2]


def test_a_model_that_changes_at_every_update_is_computed_without_graphs():
    model, said = tiny_model(dropout=0.2), []
    engine, rollout = ReplayEngine(model, records=False, say=said.append), random_rollout(2, 2)
    dropout = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    for number in range(MOST_CHANGES_IN_A_ROW + 2):
        assert bool(said) == (number > MOST_CHANGES_IN_A_ROW)
        dropout.p = 0.1 + 0.01 * number
        expected = gradients(model, rollout, None, "bptt")
        assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)
    assert len(said) == 1
    assert "the model has changed before each of the last updates" in said[0]


def test_pieces_are_recorded_anew_after_a_recording_has_failed_elsewhere(monkeypatch):
    model = tiny_model(dropout=0.2)
    engine, rollout = ReplayEngine(model, records=False), random_rollout(2, 2)
    recorded = []
    for _ in range(2):
        by_engine(model, rollout, None, engine=engine)
        recorded += engine._shapes.values()
    assert recorded[0] is recorded[1]
    monkeypatch.setattr(GraphPool, "num_failures", 1)
    by_engine(model, rollout, None, engine=engine)
    assert recorded[0] not in engine._shapes.values()


def test_too_many_shapes_are_computed_without_graphs_and_this_is_said_once():
    model = tiny_model()
    said = []
    engine = ReplayEngine(model, records=False, say=said.append)
    for rows in range(1, MOST_SHAPES + 3):
        rollout = random_rollout(2, rows)
        expected = gradients(model, rollout, None, "bptt")
        assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)
    assert len(said) == 1
    assert f"more than {MOST_SHAPES} different shapes" in said[0]


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [(CannotRecord, "runs operation by operation: reasons"), (RecordingFailed, "goes on without them: reasons")],
)
def test_what_cannot_be_recorded_is_computed_all_the_same_and_said_once(at, error, sentence):
    model, said = tiny_model(dropout=0.2), []
    engine = ReplayEngine(model, records=False, say=said.append)
    rollout = random_rollout(4, 3, resets=True, padding=True)
    expected = gradients(model, rollout, None, "bptt", readout_timesteps=2)
    engine._has_changed()
    engine._pool = StandInPool(error, at=at)
    for _ in range(2):
        actual = by_engine(model, rollout, None, engine=engine, readout_timesteps=2)
        assert_same_gradients(actual, expected)
        assert actual[2] == expected[2]
    assert len(said) == 1
    assert sentence in said[0]


def test_an_error_while_pieces_run_leaves_none_of_them_behind():
    model, rollout = tiny_model(write_normalizer="entmax15", write_competition=True), random_rollout(2, 2)
    engine = ReplayEngine(model, records=False)
    with pytest.raises(InputError, match="hooks.auxiliary_weight"):
        engine.backpropagate(rollout, hooks=RolloutHooks(auxiliary_weight=lambda loss: float("nan")))
    assert not engine._shapes
    expected = gradients(model, rollout, None, "bptt")
    assert_same_gradients(by_engine(model, rollout, None, engine=engine), expected)


def test_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr(engine_module, "is_sharded", lambda model: True)
    with pytest.raises(InputError, match="the model is sharded"):
        ReplayEngine(tiny_model())


class Unrepeatable(torch.nn.Module):
    """Dropout whose random numbers do not come from PyTorch's generator."""

    def forward(self, x):
        return x * torch.from_numpy(np.random.default_rng().random(x.shape))


def test_a_model_whose_hidden_states_are_zero_repeats_them():
    class Zero(torch.nn.Module):
        def forward(self, x):
            return 0 * x

    model, said = tiny_model(decoder_start_tokens=0), []
    model.encoder.norm = Zero()
    rollout = random_rollout(3, 2)
    assert not model.encode(rollout.inputs[0])[0].any()
    ReplayEngine(model, records=False, say=said.append).backpropagate(rollout)
    assert not said


def test_the_gradient_of_the_memory_needs_no_trained_parameter():
    model, rollout = tiny_model().requires_grad_(False), random_rollout(3, 2)
    memory = model.initial_memory(2).detach()
    found = ReplayEngine(model, records=False).backpropagate(rollout, memory=memory)
    expected = backpropagate(model, rollout, memory=memory, method="bptt")
    assert_close(found.memory_grad, expected.memory_grad)
    assert found.memory_grad.any()


def test_a_model_that_cannot_repeat_its_dropout_is_noticed():
    model, said = tiny_model(), []
    model.encoder.layers[0].dropout = Unrepeatable()
    engine = ReplayEngine(model, records=False, say=said.append)
    engine.backpropagate(random_rollout(3, 2))
    assert len(said) == 1
    assert "draws random numbers that cannot be repeated" in said[0]
