import pytest
import torch

from memformer import InputError, InputTypeError, Rollout

TOKENS = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": TOKENS.float()}, InputTypeError, "rollout inputs have dtype torch.float32"),
        ({"targets": TOKENS[0]}, InputError, r"rollout targets have shape \(3, 4\)"),
        ({"targets": TOKENS[:1]}, InputError, "must agree in timesteps and rows"),
        ({"inputs": TOKENS[:, :, :0]}, InputError, "none zero"),
        ({"reset": torch.zeros(2, 3)}, InputTypeError, "rollout reset has dtype torch.float32"),
        ({"reset": torch.zeros(3, 2, dtype=torch.bool)}, InputError, r"reset has shape \(3, 2\); it must be \(2, 3\)"),
        ({"input_padding": torch.zeros(2, 3, dtype=torch.bool)}, InputError, "input_padding has shape"),
        ({"target_padding": torch.zeros(2, 3, 5, dtype=torch.bool)}, InputError, "target_padding has shape"),
    ],
)
def test_wrong_tensors_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Rollout(**{"inputs": TOKENS, "targets": TOKENS, **changes})


def test_counts():
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    padding[0, 0] = True
    rollout = Rollout(inputs=TOKENS, targets=TOKENS, target_padding=padding)
    assert (rollout.num_timesteps, rollout.batch_size, rollout.count_target_tokens()) == (2, 3, 20)
    assert Rollout(inputs=TOKENS, targets=TOKENS).count_target_tokens() == 24
    assert rollout.to("cpu").target_padding is not None
