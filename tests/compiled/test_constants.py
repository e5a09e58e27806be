"""Values that compiled code treats as constants."""

import torch

from memformer.nn import positions


def test_the_generation_of_the_card_is_a_constant_of_compiled_code(monkeypatch):
    """It is asked for once, by the compiler, and is no part of what runs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def scaled(x):
        return x * 2 if positions._has_bfloat16_kernel() else x * 3

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert torch.compile(scaled, fullgraph=True, backend=backend)(torch.ones(2)).tolist() == [3, 3]
    (graph,) = graphs
    assert [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"] == ["mul"]
