"""What a model computes for a token, counted by torch as it computes it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer.models.recurrence import RecurrentModel, in_evaluation_mode
from memformer.rollout import Rollout


@torch.no_grad()
def flops_per_token(model: RecurrentModel) -> float:
    """Return the floating-point operations that reading and predicting one token takes, without training.

    Counted over one full segment after another full one, as `FlopCounterMode` does: two for each multiplication in a
    matrix product (attention scores included, whether masked or not), nothing for the rest. The model's mode is left
    as it was. For models whose segment is the whole document this is the mean over its tokens.
    """
    length = model.segment_length
    zeros = torch.zeros(1, 1, length, dtype=torch.int64, device=model.device)
    rollout = model.arrange(Rollout(inputs=zeros, targets=zeros))
    memory = model.initial_memory(1)
    counter = FlopCounterMode(display=False)
    # Fused attention, fused LSTM layers and oneDNN's products are not among what the counter knows on a CPU.
    with in_evaluation_mode(model), counter, sdpa_kernel(SDPBackend.MATH), _without_onednn():
        hidden, _ = model.encode(rollout.inputs[0], memory=memory)
        model.token_nats(rollout.targets[0], hidden=hidden)
    return counter.get_total_flops() / length


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        # Torch sets its flags for Intel's GPUs too, and warns that it was built without them.
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False):
            yield
