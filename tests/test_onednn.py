"""What oneDNN is asked for is what PyTorch computes, with its gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer.models.groupmixformer import Block
from groupmixformer.models.layers import Depthwise
from groupmixformer.ops import onednn as module
from groupmixformer.ops.onednn import depthwise, linear

needs_onednn = pytest.mark.skipif(not module.AVAILABLE, reason="needs oneDNN and AVX2")


# Depthwise convolutions


@pytest.fixture
def taken(monkeypatch):
    """Which convolutions have had their gradient put together."""
    shapes, whole = [], module._weight_gradient

    def noted(grad, x, weight):
        shapes.append(tuple(weight.shape))
        return whole(grad, x, weight)

    monkeypatch.setattr(module, "_weight_gradient", noted)
    return shapes


def inputs(batch, dim, height, width, k, dtype=torch.float32):
    x = torch.randn(batch, dim, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(dim, 1, k, k, dtype=dtype), torch.randn(dim, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def plain(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


@settings(max_examples=30, deadline=None)
@given(
    k=st.sampled_from([5, 7]),
    batch=st.integers(1, 3),
    dim=st.integers(1, 20),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_gradient_of_any_size(k, batch, dim, height, width):
    x, weight, bias = inputs(batch, dim, height, width, k, torch.float64)
    result = module._Depthwise.apply(x, weight, bias)
    expected = plain(x, weight, bias)
    direction = torch.randn_like(result)
    found = torch.autograd.grad(result, [x, weight, bias], direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, weight, bias], direction))


@pytest.mark.parametrize("k", [5, 7])
def test_derivatives_of_the_gradient(k):
    leaves = inputs(2, 3, 4, 5, k, torch.float64)
    assert torch.autograd.gradcheck(module._Depthwise.apply, leaves)
    assert torch.autograd.gradgradcheck(module._Depthwise.apply, leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("k", [5, 7])
@needs_onednn
def test_large_maps_take_it(taken, k, dtype, tolerance):
    leaves = inputs(4, 16, 28, 30, k, dtype)
    result = depthwise(*leaves)
    torch.testing.assert_close(result, plain(*leaves))
    direction = torch.randn_like(result)
    found = torch.autograd.grad(result, leaves, direction)
    assert taken == [(16, 1, k, k)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(plain(*exact), exact, direction.double())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < tolerance * other.norm()


@needs_onednn
def test_autocast(taken):
    leaves = inputs(4, 16, 28, 30, 7)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = depthwise(*leaves), plain(*leaves)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    found = torch.autograd.grad(result.float().square().sum(), leaves)
    assert len(taken) == 1
    for one, other in zip(found, torch.autograd.grad(expected.float().square().sum(), leaves), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 1e-2 * other.norm()


@needs_onednn
def test_only_what_is_asked_for(taken):
    x, weight, bias = inputs(4, 16, 28, 30, 5)
    depthwise(x.detach(), weight).sum().backward()
    assert x.grad is None and bias.grad is None and len(taken) == 1
    depthwise(x, weight.detach(), bias).sum().backward()
    assert x.grad is not None and bias.grad is not None and len(taken) == 1


def test_otherwise_pytorch_s_own(taken):
    x, weight, _ = inputs(4, 16, 28, 30, 7)
    with torch.no_grad():
        assert not depthwise(x, weight).requires_grad
    for other in (inputs(4, 16, 28, 30, 3), inputs(1, 16, 28, 30, 7), inputs(4, 16, 28, 30, 7, torch.float64)):
        depthwise(*other).sum().backward()
    expected = torch.autograd.grad(plain(x, weight, None).square().sum(), weight)[0]
    found = torch.func.grad(lambda w: depthwise(x, w).square().sum())(weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    torch.func.jvp(lambda w: depthwise(x.detach(), w), (weight.detach(),), (torch.ones_like(weight),))
    graph = torch.jit.trace(Depthwise(16, 7), x.detach(), check_trace=False).inlined_graph
    assert any("conv" in node.kind() for node in graph.nodes())
    assert not taken


@needs_onednn
def test_module(taken):
    layer = Depthwise(16, 7)
    assert layer.bias is None
    layer(torch.randn(4, 16, 28, 30)).sum().backward()
    assert taken == [(16, 1, 7, 7)]
    strided = Depthwise(16, 5, 2)
    assert strided(torch.randn(4, 16, 45, 30)).shape == (4, 16, 23, 15)


# Linear layers


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


class Products(TorchDispatchMode):
    """Counts the products that oneDNN was asked for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*args, **(kwargs or {}))


def operands(rows=(2, 8, 8), dtype=torch.float32):
    """Return what a large product is made of: (B, H, W, 96), (192, 96) and (192)."""
    tensors = torch.randn(*rows, 96), torch.randn(192, 96), torch.randn(192)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@needs_onednn
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(1, 2), lambda x: x.flip(0)[:, ::2].repeat(1, 2, 1, 1)])
@torch.no_grad()
def test_large_products_are_those_of_onednn(layout):
    x, weight, bias = operands()
    with Products() as products:
        result = linear(layout(x), weight, bias)
    assert products.number == 1
    expected = F.linear(layout(x).double(), weight.double(), bias.double())
    assert (result - expected).norm() < 1e-6 * expected.norm()


@needs_onednn
def test_without_a_gradient():
    x, weight, bias = operands()
    with torch.no_grad(), Products() as products:
        for activation, function in (("gelu", F.gelu), ("hardswish", F.hardswish)):
            torch.testing.assert_close(
                linear(x, weight, bias, activation), function(F.linear(x, weight, bias)), rtol=1e-5, atol=1e-4
            )
    assert products.number == 2


def test_products_of_pytorch():
    x, weight, bias = operands()
    with Products() as products:
        linear(x, weight, bias).sum().backward()
        linear(*operands(dtype=torch.bfloat16))
    with torch.no_grad(), products:
        linear(x[:, :1], weight, bias)  # small
        linear(x[:0], weight, bias)
        linear(x.double(), weight.double(), bias.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
        torch.func.vmap(lambda one: linear(one, weight, bias))(x)
        torch.func.jvp(lambda w: linear(x.detach(), w), (weight.detach(),), (torch.ones_like(weight),))
        torch.jit.trace(linear, (x, weight, bias), check_trace=False)
    assert products.number == 0
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.double(), bias.double())


@needs_onednn
def test_its_operations_are_counted():
    x, weight, bias = operands()
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(x, weight, bias)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 128 * 96 * 192] * 2


def test_the_plain_network_leaves_products_to_pytorch():
    with Products() as products, torch.no_grad():
        Block(80, 4).eval()(torch.randn(1, 80, 28, 28))
    assert products.number == 0


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_maps_of_one_pixel_need_no_convolution(k, bias):
    layer = Depthwise(16, k, bias=bias)
    x = torch.randn(8, 16, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves, found = [x, *layer.parameters()], []
    for function in (layer, lambda x: plain(x, layer.weight, layer.bias)):
        with Convolutions() as convolutions:
            result = function(x)
        found.append((result, *torch.autograd.grad(result.square().sum(), leaves), convolutions.number))
    *ours, number = found[0]
    *expected, of_pytorch = found[1]
    assert (number, of_pytorch) == (0, 1)
    torch.testing.assert_close(ours, expected)
