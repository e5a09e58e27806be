"""Floating-point operations per token, counted by torch's `FlopCounterMode`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer.models.classification import MemformerForSequenceClassification
from memformer.models.recurrence import reading, unwrapped
from memformer.rollout import Rollout


def flops_per_token(model: nn.Module) -> float:
    """Return the floating-point operations needed to read and predict one token, without training.

    Counted while one full segment is read and the next full segment is predicted (by a classifier: one label). As in
    `FlopCounterMode`, each multiplication in a matrix product counts as two operations (attention scores included,
    masked or not), and all other operations count as none. The model's mode is left unchanged. For models whose segment
    is the whole document, this is the mean over the document's tokens. With `adaptive_cutoffs` the predicted tokens are
    frequent ones, below the first cutoff; rarer tokens need the second softmax of their cluster as well.
    """
    model = unwrapped(model)
    length = model.segment_length
    zeros = torch.zeros(1, 1, length, dtype=torch.int64, device=model.device)
    is_classifier = isinstance(model, MemformerForSequenceClassification)
    rollout = model.align_inputs(Rollout(inputs=zeros, targets=zeros[..., :1] if is_classifier else zeros))
    memory = model.initial_memory(1)
    counter = FlopCounterMode(display=False)
    # The counter does not support fused attention, fused LSTM layers and oneDNN's matrix products.
    with reading(model), counter, sdpa_kernel(SDPBackend.MATH), _without_onednn(), cudnn.flags(enabled=False):
        hidden, _ = model.encode(rollout.inputs[0], memory=memory)
        model.token_nll(rollout.targets[0], hidden=hidden)
    return counter.get_total_flops() / length


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        # Torch also sets these flags for Intel GPUs, and warns if it was built without support for them.
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
        with torch.backends.mkldnn.flags(enabled=False):
            yield
