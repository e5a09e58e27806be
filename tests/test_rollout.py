import dataclasses

import numpy as np
import pytest
import torch

from memformer import InputError, InputTypeError, Rollout, Session, backpropagate
from tests.helpers import SEGMENT_LENGTH, VOCAB_SIZE, assert_close, tiny_model
from tests.models.baselines import BASELINES, tiny_baseline

TOKENS = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_part_of_a_rollout_is_consecutive(step):
    with pytest.raises(InputError, match=rf"the step of timesteps \({step}\) must be 1"):
        Rollout(inputs=TOKENS, targets=TOKENS)[::step]


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_baseline("lstm"), lambda: tiny_baseline("transformer-xl")])
@pytest.mark.parametrize("counts", [True, False])
def test_targets_of_a_timestep_without_a_token_are_refused(make, counts):
    """Its state is meaningless: the loss would depend on the token ids under the padding."""
    empty = torch.zeros(2, 3, SEGMENT_LENGTH, dtype=torch.bool)
    empty[1, 2] = True
    tokens = torch.zeros_like(empty, dtype=torch.int64)
    rollout = Rollout(inputs=tokens, targets=tokens, input_padding=empty, target_padding=None if counts else empty)
    if counts:
        with pytest.raises(InputError, match=r"timestep 1 of row 2 has targets but no input token; mask"):
            backpropagate(make(), rollout)
    else:
        assert backpropagate(make(), rollout).loss.isfinite()


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0], np.uint8), np.array([2, 0], ">i8"), torch.tensor([2, 0])])
def test_rows_are_chosen_by_integers_of_any_kind(rows):
    """PyTorch takes an array of uint8 for a mask."""
    tokens = torch.arange(24).view(2, 3, 4)
    chosen = Rollout(inputs=tokens, targets=tokens).select_rows(rows)
    assert torch.equal(chosen.inputs, tokens[:, [2, 0]])
    assert torch.equal(Rollout(inputs=tokens, targets=tokens).select_rows(1).inputs, tokens[:, [1]])
    with pytest.raises(InputError, match=r"row \(3\) must be .*1"):
        chosen.select_rows([3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": TOKENS.float()}, InputTypeError, "rollout inputs have dtype torch.float32"),
        ({"targets": TOKENS[0]}, InputError, r"rollout targets have shape \(3, 4\)"),
        ({"targets": TOKENS[:1]}, InputError, "must agree in timesteps and rows"),
        ({"inputs": TOKENS[:, :, :0]}, InputError, "with no dimension equal to zero"),
        ({"targets": TOKENS[:, :, :1], "is_shifted": True}, InputError, r"\(2, 3, 1\) must have the same shape"),
        ({"reset": torch.zeros(2, 3)}, InputTypeError, "rollout reset has dtype torch.float32"),
        ({"reset": torch.zeros(3, 2, dtype=torch.bool)}, InputError, r"reset has shape \(3, 2\); it must be \(2, 3\)"),
        ({"input_padding": torch.zeros(2, 3, dtype=torch.bool)}, InputError, "input_padding has shape"),
        ({"target_padding": torch.zeros(2, 3, 5, dtype=torch.bool)}, InputError, "target_padding has shape"),
    ],
)
def test_wrong_tensors_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Rollout(**{"inputs": TOKENS, "targets": TOKENS, **changes})


@pytest.mark.parametrize("axis", [0, 1], ids=["timesteps", "rows"])
def test_every_field_is_cut(axis):
    flags = torch.arange(12).view(4, 3) % 5 < 2
    padding = torch.zeros(4, 3, 6, dtype=torch.bool)
    padding[1, 2, 3:] = True
    whole = Rollout(
        inputs=torch.arange(72).view(4, 3, 6),
        targets=torch.arange(72).view(4, 3, 6) + 1,
        reset=flags,
        input_padding=padding,
        target_padding=~padding,
        decoder_start_ids=torch.arange(12).view(4, 3),
        targets_are_answers=True,
        is_filler=~flags,
    )
    part = whole.select_rows([1, 2]) if axis else whole[1:3]
    for field in dataclasses.fields(Rollout):
        old, new = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(old, torch.Tensor):
            old = old.narrow(axis, 1, 2)
            assert torch.equal(new, old), field.name
        else:
            assert new == old, field.name
    assert not whole.is_shifted  # the only field that has its default here


def test_counts():
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    padding[0, 0] = True
    rollout = Rollout(inputs=TOKENS, targets=TOKENS, target_padding=padding)
    assert (rollout.num_timesteps, rollout.batch_size, rollout.count_target_tokens()) == (2, 3, 20)
    assert Rollout(inputs=TOKENS, targets=TOKENS).count_target_tokens() == 24
    assert rollout.to("cpu").target_padding is not None


def test_shifting_by_one_token_gives_each_target_the_preceding_token_as_input():
    bos = 9
    inputs = torch.tensor([[[bos, 0, 0], [0, 0, bos]], [[1, 2, 3], [4, 5, 6]]])
    targets = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[4, 5, 0], [7, 8, 9]]])
    input_padding = torch.tensor([[[False, True, True], [True, True, False]], [[False] * 3] * 2])
    target_padding = torch.tensor([[[False] * 3] * 2, [[False, False, True], [False] * 3]])
    reset = torch.tensor([[True, True], [False, False]])
    rollout = Rollout(
        inputs=inputs, targets=targets, reset=reset, input_padding=input_padding, target_padding=target_padding
    )
    shifted = rollout.shifted_by_one_token()
    assert shifted.inputs.tolist() == [[[bos, 1, 2], [bos, 4, 5]], [[3, 4, 5], [6, 7, 8]]]
    assert shifted.input_padding is not None
    assert shifted.input_padding.equal(target_padding)
    assert shifted.targets is targets
    assert shifted.reset is reset
    whole = Rollout(inputs=inputs[1:], targets=targets[1:])
    assert whole.shifted_by_one_token().input_padding is None
    assert whole.shifted_by_one_token().inputs.tolist() == [[[3, 4, 5], [6, 7, 8]]]


@pytest.mark.parametrize("name", [None, *BASELINES])
@pytest.mark.parametrize("excluded", [[*range(9)], [1, 2, 8], [0, 5, 6, 11, 12]])
def test_targets_that_are_excluded_from_the_loss_are_read_by_every_model(name, excluded):
    """A prompt whose tokens do not count, or tokens in between: the others are scored as in a stream of all tokens."""
    model = tiny_model() if name is None else tiny_baseline(name)
    model.eval()
    tokens = torch.randint(0, VOCAB_SIZE, (2, 3 * SEGMENT_LENGTH), generator=torch.Generator().manual_seed(5))
    targets = tokens.view(2, 3, SEGMENT_LENGTH).transpose(0, 1)
    first = torch.full_like(targets[:1], model.bos_token_id)
    is_excluded = torch.zeros(2, 3 * SEGMENT_LENGTH, dtype=torch.bool)
    is_excluded[:, excluded] = True
    padding = torch.zeros_like(targets, dtype=torch.bool)
    padding[0, :, 1:] = True
    rollout = Rollout(
        inputs=torch.cat([first, targets[:-1]]),
        targets=targets,
        input_padding=padding,
        target_padding=is_excluded.view(2, 3, SEGMENT_LENGTH).transpose(0, 1),
    )
    result = backpropagate(model, rollout)
    scores = torch.stack(Session(model, batch_size=2).score(tokens.tolist()))
    assert result.num_tokens == 2 * (3 * SEGMENT_LENGTH - len(excluded))
    assert_close(result.loss, scores[~is_excluded].mean())
    # A row that begins anew does not follow, so its excluded end is padding.
    reset = torch.tensor([[False, False], [False, True], [False, False]])
    ends = torch.zeros_like(padding)
    ends[0, :, 4:] = True
    cut = dataclasses.replace(rollout, reset=reset, target_padding=ends).shifted_by_one_token()
    assert cut.input_padding[:, :, 4:].tolist() == [[[False] * 2, [True] * 2], [[False] * 2] * 2, [[False] * 2] * 2]


def test_padding_between_tokens_is_refused():
    inputs = torch.zeros(2, 2, 4, dtype=torch.int64)
    padding = torch.zeros(2, 2, 4, dtype=torch.bool)
    padding[0, 1, 2:] = padding[1, 1, :3] = padding[1, 0] = True
    Rollout(inputs=inputs, targets=inputs, input_padding=padding)
    padding[0, 0, 1] = True
    with pytest.raises(InputError, match="rollout input_padding is True between tokens of a row"):
        Rollout(inputs=inputs, targets=inputs, input_padding=padding)
    empty = torch.zeros(0, 4, dtype=torch.int64)
    tiny_model().encode(empty, padding_mask=empty.bool())


def test_rollouts_are_compared_by_identity():
    """Their tensors have no one truth value."""
    rollout = Rollout(inputs=torch.zeros(1, 1, 4, dtype=torch.int64), targets=torch.zeros(1, 1, 4, dtype=torch.int64))
    assert rollout == rollout  # the comparison itself is tested
    assert rollout != dataclasses.replace(rollout)
    model = tiny_model()
    assert backpropagate(model, rollout) != backpropagate(model, rollout)
