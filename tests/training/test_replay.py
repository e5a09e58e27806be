"""Replay equals back-propagation through time; the gradient stops at the start of a rollout and nowhere else."""

import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from memformer import InputError, InputTypeError, Memformer, RecurrentModel, Rollout, backpropagate
from memformer.training.engine import ReplayEngine
from memformer.training.replay import RolloutHooks
from tests.helpers import VARIANTS, VOCAB_SIZE, assert_close, random_rollout, tiny_model
from tests.models.baselines import tiny_baseline
from tests.training.gradients import assert_gradients, assert_same_gradients, by_hand, gradients, gradients_of


@pytest.mark.parametrize(("num_timesteps", "readout_timesteps"), [(1, 1), (2, 1), (7, 3)])
def test_replay_and_checkpoint_equal_bptt(variant, num_timesteps, readout_timesteps):
    model = tiny_model(dropout=0.2, **variant)
    memory = model.initial_memory(3).detach() + 0.1 * torch.randn_like(model.initial_memory(3))
    rollout = random_rollout(num_timesteps, 3, resets=True, padding=True)
    runs = [
        gradients(model, rollout, memory, method, readout_timesteps=readout_timesteps)
        for method in ("bptt", "checkpoint", "replay")
    ]
    for run in runs[1:]:
        assert_same_gradients(run, runs[0])
        assert run[2] == runs[0][2], "the random generator must be left where the forward pass left it"


@pytest.mark.parametrize(
    ("name", "method", "padding"),
    [
        *((name, "replay", True) for name in VARIANTS),
        *((name, "bptt", False) for name in VARIANTS),
        ("default", "checkpoint", False),
    ],
)
def test_every_method_equals_a_loop_written_by_hand(name, method, padding):
    model = tiny_model(**VARIANTS[name])
    memory = model.initial_memory(3).detach()
    rollout = random_rollout(4, 3, resets=True, padding=padding)
    loss, count, last, memory_grad, expected = by_hand(model, rollout, memory)
    result, grads, _ = gradients(model, rollout, memory, method, readout_timesteps=2)
    assert result.num_tokens == count
    assert_close(result.loss, loss)
    assert_close(result.memory, last)
    if memory.numel():
        assert_close(result.memory_grad, memory_grad)
    assert_gradients(grads, expected)


@pytest.mark.parametrize("method", ["bptt", "replay"])
def test_without_a_memory_documents_still_begin_within_a_rollout(method):
    model, rollout = tiny_model(), random_rollout(4, 3, resets=True)
    assert rollout.reset[1:].any()
    _, grads, _ = gradients(model, rollout, None, method)
    reset = rollout.reset.clone()
    reset[0] = True
    *_, expected = by_hand(model, replace(rollout, reset=reset), torch.randn_like(model.initial_memory(3)))
    assert_gradients(grads, expected)


class StateIsHidden(RecurrentModel):
    """A model of a user that returns one tensor as hidden states and as the next memory."""

    vocab_size, bos_token_id, segment_length, memory_shape = VOCAB_SIZE, VOCAB_SIZE, 6, (1, 8)

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE + 1, 8)
        self.readout = torch.nn.Linear(8, VOCAB_SIZE)

    def initial_memory(self, batch_size):
        return torch.zeros(batch_size, 1, 8, dtype=self.memory_dtype)

    def encode(self, segment, *, memory=None, padding_mask=None, auxiliary=None):
        state = torch.tanh(memory + self.embedding(segment).mean(1, keepdim=True))
        return state, state

    def decode(self, targets, *, hidden, hidden_padding_mask=None):
        return self.readout(hidden).expand(-1, targets.shape[1], -1)


@pytest.mark.parametrize("readout_timesteps", [1, 2])
def test_replay_equals_bptt_if_hidden_states_and_memory_are_one_tensor(readout_timesteps):
    model = StateIsHidden().double()
    memory, rollout = torch.randn(3, 1, 8).double(), random_rollout(5, 3, resets=True)
    bptt, replay = (
        gradients(model, rollout, memory, method, readout_timesteps=readout_timesteps) for method in ("bptt", "replay")
    )
    assert_same_gradients(replay, bptt)


@pytest.mark.parametrize("num_timesteps", [1, 2, 5])
def test_replay_encodes_the_last_timestep_once_and_the_others_twice(num_timesteps):
    model, rollout = tiny_model(), random_rollout(num_timesteps, batch_size=2)
    encode, segments = model.encode, []

    def encode_and_record(segment, **options):
        segments.append(segment)
        return encode(segment, **options)

    model.encode = encode_and_record
    backpropagate(model, rollout, method="replay")
    read = [[timestep for timestep, inputs in enumerate(rollout.inputs) if torch.equal(inputs, s)] for s in segments]
    assert read == [[timestep] for timestep in [*range(num_timesteps), *reversed(range(num_timesteps - 1))]]


@pytest.mark.parametrize(
    ("readout_timesteps", "together"), [(1, [1] * 7), (2, [2, 2, 2, 1]), (4, [4, 2, 1]), (7, [7]), (9, [7])]
)
def test_the_last_timestep_is_read_out_separately_unless_all_are_read_out_together(
    monkeypatch, readout_timesteps, together
):
    model = tiny_model()
    rows = []
    token_nll = Memformer.token_nll

    def token_nll_and_record(self, targets, **past):
        rows.append(len(targets))
        return token_nll(self, targets, **past)

    monkeypatch.setattr(Memformer, "token_nll", token_nll_and_record)
    backpropagate(model, random_rollout(7, batch_size=2), readout_timesteps=readout_timesteps)
    assert rows == [2 * timesteps for timesteps in together]


def test_loss_and_gradient_do_not_depend_on_the_chunk_without_dropout():
    model = tiny_model()
    rollout = random_rollout(5, 2, resets=True, padding=True)
    memory = model.initial_memory(2)
    expected = gradients(model, rollout, memory, "bptt")
    for chunk in (2, 3, 5, 99):
        assert_same_gradients(gradients(model, rollout, memory, "replay", readout_timesteps=chunk), expected)


def test_without_memory_every_row_starts_from_the_initial_memory_which_gets_gradient():
    model = tiny_model()
    rollout = random_rollout(3, 2)
    reset = torch.zeros(3, 2, dtype=torch.bool)
    reset[0] = True
    explicit = Rollout(inputs=rollout.inputs, targets=rollout.targets, reset=reset)
    with_none = gradients(model, rollout, None, "replay")
    with_reset = gradients(model, explicit, torch.randn(2, 5, 16, dtype=torch.float64), "replay")
    assert_close(with_none[0].loss, with_reset[0].loss)
    assert with_none[1]["memory_normalization.slot_bias"].norm() > 0
    assert with_none[1].keys() == with_reset[1].keys()
    for name, grad in with_reset[1].items():
        assert_close(with_none[1][name], grad)


def test_gradient_reaches_every_timestep_of_the_rollout_and_stops_at_its_start():
    model = tiny_model()
    memory = model.initial_memory(2).detach()
    length = 4
    for last in range(1, length + 1):
        # The gradient of a loss on the last timestep only must reach the memory at the start of the first.
        rollout = random_rollout(last, 2)
        target_padding = torch.ones(rollout.targets.shape, dtype=torch.bool)
        target_padding[-1] = False
        only_last = Rollout(inputs=rollout.inputs, targets=rollout.targets, target_padding=target_padding)
        result = backpropagate(model, only_last, memory=memory)
        assert (result.memory_grad.flatten(1).norm(dim=1) > 0).all()
    # The gradient of a second rollout does not reach the first, because the memory between them is detached.
    first = backpropagate(model, random_rollout(2, 2), memory=memory)
    assert not first.memory.requires_grad
    entering = first.memory.clone().requires_grad_()
    backpropagate(model, random_rollout(2, 2, seed=3), memory=entering)
    assert entering.grad is None


def test_two_rollouts_end_with_the_memory_of_one():
    model = tiny_model()
    whole = random_rollout(6, 2, resets=True, padding=True)
    memory = model.initial_memory(2)
    expected = backpropagate(model, whole, memory=memory)
    state, nll, tokens = memory, 0.0, 0
    for part in (slice(0, 2), slice(2, 6)):
        piece = Rollout(
            inputs=whole.inputs[part],
            targets=whole.targets[part],
            reset=whole.reset[part],
            input_padding=whole.input_padding[part],
            target_padding=whole.target_padding[part],
        )
        result = backpropagate(model, piece, memory=state)
        state = result.memory
        nll, tokens = nll + result.loss * result.num_tokens, tokens + result.num_tokens
    assert_close(state, expected.memory)
    assert_close(nll / tokens, expected.loss)


def test_reset_rows_send_no_gradient_back():
    model = tiny_model()
    rollout = random_rollout(2, 2)
    reset = torch.tensor([[False, False], [True, False]])
    target_padding = torch.ones(rollout.targets.shape, dtype=torch.bool)
    target_padding[1] = False
    result = backpropagate(
        model,
        Rollout(inputs=rollout.inputs, targets=rollout.targets, reset=reset, target_padding=target_padding),
        memory=model.initial_memory(2),
    )
    assert result.memory_grad[0].norm() == 0
    assert result.memory_grad[1].norm() > 0


def test_gradient_scale_scales_the_gradients_but_not_the_loss():
    model = tiny_model()
    rollout = random_rollout(3, 2)
    plain = gradients(model, rollout, model.initial_memory(2), "replay")
    scaled = gradients(model, rollout, model.initial_memory(2), "replay", gradient_scale=0.25)
    assert_close(scaled[0].loss, plain[0].loss)
    assert_close(scaled[0].memory_grad, 0.25 * plain[0].memory_grad)
    assert scaled[1].keys() == plain[1].keys()
    for name, grad in plain[1].items():
        assert_close(scaled[1][name], 0.25 * grad)


def test_gradients_are_added_to_existing_ones():
    model = tiny_model()
    rollout = random_rollout(2, 2)
    _, once, _ = gradients(model, rollout, None, "replay")
    backpropagate(model, rollout)
    twice = gradients_of(model)
    assert twice.keys() == once.keys()
    for name, grad in once.items():
        assert_close(twice[name], 2 * grad)


def test_a_rollout_of_padding_only_has_no_loss_and_no_gradient_and_keeps_the_memory():
    model = tiny_model()
    rollout = random_rollout(2, 2)
    everything = torch.ones(rollout.inputs.shape, dtype=torch.bool)
    memory = torch.randn_like(model.initial_memory(2))
    result = backpropagate(
        model,
        Rollout(inputs=rollout.inputs, targets=rollout.targets, input_padding=everything, target_padding=everything),
        memory=memory,
    )
    assert result.loss == 0
    assert result.num_tokens == 0
    assert torch.equal(result.memory, memory)
    assert all(p.grad is None or p.grad.norm() == 0 for p in model.parameters())


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_under_autocast_the_memory_stays_float32_and_gradients_agree_with_float32(method):
    # With seed 0 a gradient nearly cancels out.
    model = tiny_model(1).float()
    rollout = random_rollout(3, 2)
    memory = model.initial_memory(2)
    _, expected, _ = gradients(model, rollout, memory, "bptt")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, grads, _ = gradients(model, rollout, memory, method)
        hidden, next_memory = model.encode(rollout.inputs[0], memory=memory)
        assert model.decode(rollout.targets[0], hidden=hidden).dtype == torch.bfloat16
    assert result.memory.dtype == result.memory_grad.dtype == next_memory.dtype == torch.float32
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert_close(grads[name], grad, relative=0.1)  # bfloat16 keeps 8 bits


def test_the_given_memory_is_not_changed():
    model = tiny_model()
    memory = model.initial_memory(2).detach().clone()
    before = memory.clone()
    backpropagate(model, random_rollout(3, 2), memory=memory)
    assert torch.equal(memory, before)
    assert not memory.requires_grad
    assert memory.grad is None


def test_the_loss_of_an_untrained_model_is_near_that_of_uniform_predictions():
    result = backpropagate(tiny_model(), random_rollout(3, 4))
    assert abs(float(result.loss) - math.log(VOCAB_SIZE)) < 1.5


def test_invalid_arguments_are_refused():
    model = tiny_model()
    rollout = random_rollout(2, 2)
    memory = model.initial_memory(2)
    with pytest.raises(InputError, match=r"method \('relay'\) must be one of replay, bptt, checkpoint"):
        backpropagate(model, rollout, memory=memory, method="relay")
    with pytest.raises(InputError, match=r"readout_timesteps \(0\) must be at least 1"):
        backpropagate(model, rollout, memory=memory, readout_timesteps=0)
    with pytest.raises(InputError, match=r"memory has shape \(2, 4, 16\); this model's is \(2, 5, 16\)"):
        backpropagate(model, rollout, memory=memory[:, :4])
    with pytest.raises(InputTypeError, match=r"memory has dtype torch.float32; this model's is torch.float64"):
        backpropagate(model, rollout, memory=memory.float())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_refused_by_replay_which_makes_them_in_parts(register):
    model, rollout, seen = tiny_model(), random_rollout(2, 2), []
    handle = getattr(model.embedding.weight, register)(lambda given: seen.append(given))
    with pytest.raises(InputError, match=r"embedding.weight has a hook on its gradient.*or use method 'bptt'"):
        backpropagate(model, rollout)
    backpropagate(model, rollout, method="bptt")
    assert len(seen) == 1
    handle.remove()
    backpropagate(model, rollout)


def test_optimizers_that_step_in_the_backward_pass_are_refused_by_replay():
    with warnings.catch_warnings(action="ignore"):  # of torch.jit
        from torch.distributed.optim import _apply_optimizer_in_backward
    model, rollout = tiny_model(), random_rollout(2, 2)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(InputError, match=r"has a hook on its gradient.*or use method 'bptt'"):
        backpropagate(model, rollout)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_disabled_gradients_are_said(mode):
    with mode(), pytest.raises(InputError, match="gradients are disabled by torch.no_grad"):
        backpropagate(tiny_model(), random_rollout(2, 2))


@pytest.mark.parametrize("method", ["replay", "bptt", "engine"])
@pytest.mark.parametrize("name", ["memformer", "start", "input", "transformer-xl", "own"])
def test_a_refused_rollout_changes_no_gradient(name, method):
    models = {"memformer": tiny_model, "start": tiny_model, "input": tiny_model, "own": StateIsHidden}
    model = models[name]() if name in models else tiny_baseline(name)
    rollout = random_rollout(4, 2)
    backpropagate(model, rollout)
    before = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    run = {"engine": ReplayEngine(model, records=False).backpropagate}.get(
        method, partial(backpropagate, model, method=method)
    )
    if name == "start":
        start = torch.full(rollout.inputs.shape[:2], model.bos_token_id)
        start[-1, 1] = -100
        rollout, message = replace(rollout, decoder_start_ids=start), "decoder_start_ids holds token id -100"
    elif name == "input":
        rollout.inputs[-1, 1, -1] = 99
        message = "inputs holds token id 99"
    else:
        rollout.targets[-1, 1, -1] = -100
        message = "targets holds token id -100.*mask targets that are not counted with target_padding"
    with pytest.raises(InputError, match=message):
        run(rollout)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) if expected is None else torch.equal(parameter.grad, expected)


class ForgetsItsLoss(StateIsHidden):
    auxiliary_weight = 0.5


def test_broken_auxiliary_losses_are_named():
    rollout = random_rollout(2, 2)
    with pytest.raises(InputError, match="encode of ForgetsItsLoss has left auxiliary.total empty"):
        backpropagate(ForgetsItsLoss(), rollout)
    model = tiny_model(write_normalizer="entmax15")
    for weight in (None, "0.1", math.nan):
        hooks = RolloutHooks(auxiliary_weight=lambda loss, weight=weight: weight)
        with pytest.raises(InputError, match=r"the result of hooks\.auxiliary_weight \("):
            backpropagate(model, rollout, hooks=hooks)


def test_ignored_targets_of_other_libraries_are_refused_by_own_models_too():
    rollout = random_rollout(2, 2)
    rollout.targets[0, 0, 0] = -100
    model = StateIsHidden()
    with pytest.raises(InputError, match="targets holds token id -100.*mask targets that are not counted"):
        backpropagate(model, rollout)


@pytest.mark.parametrize("method", ["bptt", "checkpoint", "replay"])
def test_the_gradient_norm_at_a_timestep_is_that_of_a_rollout_starting_there(method):
    model = tiny_model()
    memory = model.initial_memory(3).detach()
    rollout = random_rollout(4, 3, resets=True, padding=True)
    result, _, _ = gradients(model, rollout, memory, method)
    assert result.memory_grad_norms.shape == (4,)
    assert_close(result.memory_grad_norms[0], result.memory_grad.norm())
    for timestep in range(4):
        rest = rollout[timestep:]
        # The losses of both rollouts are means over their own tokens.
        share = rest.count_target_tokens() / result.num_tokens
        later, _, _ = gradients(model, rest, memory, method, gradient_scale=share)
        assert_close(result.memory_grad_norms[timestep], later.memory_grad.norm())
        memory = gradients(model, rollout[timestep : timestep + 1], memory, method)[0].memory
