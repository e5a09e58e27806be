"""Random generators of devices that this machine lacks are captured by PyTorch's interface."""

from types import SimpleNamespace

import pytest
import torch

from memformer.training.randomness import capture_randomness, restore_randomness


@pytest.mark.parametrize("name", ["mps", "xpu:0"])
def test_the_generator_of_the_device_is_restored(name, monkeypatch):
    device, calls = torch.device(name), []
    given = () if name == "mps" else (device,)
    module = SimpleNamespace(
        get_rng_state=lambda *which: calls.append(which) or torch.tensor([7]),
        set_rng_state=lambda state, *which: calls.append((state.tolist(), *which)),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda asked: {device: module}[asked])
    state = capture_randomness(device)
    drawn = torch.rand(3)
    restore_randomness(state, device=device)
    assert torch.equal(torch.rand(3), drawn)
    assert calls == [given, ([7], *given)]
