"""What compiled code takes for a constant."""

import torch

from memformer.nn import positions


def test_the_generation_of_the_card_is_a_constant_of_compiled_code(monkeypatch):
    """Asking for it breaks the graph, and compiled decoding must be one graph."""

    def capability():
        torch._dynamo.graph_break()
        return 7, 5

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)

    def scaled(x):
        return x * 2 if positions._has_bfloat16_kernel() else x * 3

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3]
