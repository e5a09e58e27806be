"""Linear layers give the same results and gradients with oneDNN as with PyTorch's own operator."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import memformer.nn.linear as module
from memformer.nn.linear import Linear, linear
from memformer.utils import machine

onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def _as_if_not_made_by_intel(monkeypatch):
    monkeypatch.setattr(module, "_USES_ONEDNN", True)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def uses_onednn(function):
    with Operators() as operators:
        function()
    return "mkldnn._linear_pointwise.default" in operators.names


def data(*rows, inner=64, columns=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, inner), (columns, inner), (columns,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def derivatives(function, x, weight, bias):
    """Return the result of a map, its gradients, and the gradients of a function of its gradients."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    result = function(x, weight, bias)
    first = torch.autograd.grad((result**3).mean(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((grad**2).sum() for grad in first), inputs[:2])
    return [result, *first, *second]


@onednn
@pytest.mark.parametrize("rows", [(512,), (4, 128), (2, 2, 128)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_map_and_gradients_match_float64(rows, has_bias):
    x, weight, bias = data(*rows)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    bias, exact_bias = (bias, exact[2]) if has_bias else (None, None)
    assert uses_onednn(lambda: linear(x, weight, bias))
    ours = derivatives(linear, x, weight, bias)
    theirs = derivatives(F.linear, exact[0], exact[1], exact_bias)
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).abs().max() <= 1e-5 * other.abs().max()


@onednn
def test_tensors_need_not_be_contiguous():
    x, weight, bias = data(96, 4, 64, inner=64)
    strided = x.transpose(1, 2)[:, ::2], weight[::2], bias[::2]
    assert uses_onednn(lambda: linear(*strided))
    assert torch.allclose(linear(*strided), F.linear(*strided), atol=1e-4)


@onednn
def test_a_tensor_that_requires_no_gradient_gets_none():
    x, weight, bias = data(4, 128)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert torch.allclose(weight.grad, x.sum(dim=(0, 1)).expand_as(weight), atol=1e-3)


@onednn
def test_cases_in_which_onednn_is_not_used():
    x, weight, bias = data(4, 128)
    assert uses_onednn(lambda: linear(x, weight, bias))
    assert not uses_onednn(lambda: linear(x[:1, :1], weight, bias)), "a small product"
    assert not uses_onednn(lambda: linear(x.double(), weight.double(), bias.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert not uses_onednn(lambda: linear(x, weight, bias))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert not uses_onednn(lambda: linear(x, weight, bias))


@onednn
def test_a_compiled_map_leaves_the_choice_of_library_to_the_compiler():
    x, weight, bias = (tensor.detach() for tensor in data(4, 128))
    graphs = []

    def note(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(linear, backend=note, fullgraph=True)
    assert torch.allclose(compiled(x, weight, bias), linear(x, weight, bias), atol=1e-4)
    assert len(graphs) == 1
    assert "_linear_pointwise" not in graphs[0]


@pytest.mark.parametrize("shape", [(3, 1024), (2, 3, 1024)])
def test_several_gradients_at_once(shape):
    module = Linear(1024, 1024)
    x = torch.randn(shape, requires_grad=True)
    output, grads = module(x), torch.randn(2, *shape)
    inputs = [x, module.weight, module.bias]
    found = torch.autograd.grad(output, inputs, grads, retain_graph=True, is_grads_batched=True)
    for grad, *each in zip(grads, *found, strict=True):
        for actual, expected in zip(each, torch.autograd.grad(output, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(1024,), (3, 1024), (2, 3, 1024)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_operations_are_counted(shape, has_bias):
    module, expected = Linear(1024, 1024, bias=has_bias), torch.nn.Linear(1024, 1024, bias=has_bias)
    counts = []
    for each in (module, expected):
        x = torch.randn(shape, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            each(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_module_is_a_torch_linear():
    module = Linear(64, 96)
    assert isinstance(module, torch.nn.Linear)
    x = torch.randn(4, 128, 64)
    assert torch.equal(module(x), linear(x, module.weight, module.bias))


@onednn
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # raised by PyTorch's own code
def test_torch_func_transformations_and_forward_mode_differentiation():
    x, weight, bias = (tensor.detach() for tensor in data(512))
    tangents = torch.randn(512, 64), torch.randn(96, 64), torch.randn(96)

    def loss(map_, row, weight):
        return map_(row.expand(512, -1), weight).pow(2).sum()

    found, expected = (torch.func.jvp(map_, (x, weight, bias), tangents) for map_ in (linear, F.linear))
    torch.testing.assert_close(found, expected)
    found, expected = (
        torch.func.vmap(torch.func.grad(lambda row, weight, map_=map_: loss(map_, row, weight), argnums=1), (0, None))(
            x[:3], weight
        )
        for map_ in (linear, F.linear)
    )
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
        torch.testing.assert_close(tangent, F.linear(tangents[0], weight))
    assert uses_onednn(lambda: linear(x, weight, bias))


@pytest.mark.parametrize(("vendor", "is_intel"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_library_is_chosen_by_the_processor_not_by_habit(vendor, is_intel, monkeypatch):
    """On Intel's processors MKL is faster than oneDNN, on others it is the other way round."""
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.Path, "read_text", lambda *_, **__: f"processor : 0\nvendor_id : {vendor}\n")
    assert machine.has_intel_processor.__wrapped__() is is_intel


def test_without_onednn_torchs_own_operator_is_used(monkeypatch):
    monkeypatch.setattr(module, "_USES_ONEDNN", False)
    x, weight, bias = data(512)
    assert not uses_onednn(lambda: linear(x, weight, bias))
