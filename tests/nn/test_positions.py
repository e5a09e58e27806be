"""The choice of attention kernels that cannot be tried on a CPU."""

import pytest
import torch

from memformer.nn.positions import _suits_efficient_kernel


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "capability", "suits"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (7, 5), False),  # a T4 has no such kernel, and raises an error
        (torch.float16, (7, 5), True),
        (torch.float32, (9, 0), False),
    ],
)
def test_half_precision_takes_the_efficient_kernel_where_the_card_has_it(dtype, capability, suits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    tensor = torch.empty(2, 4, 64, 16, dtype=dtype).as_subclass(OnCuda)
    assert _suits_efficient_kernel(tensor, tensor, tensor) is suits
