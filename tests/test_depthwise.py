"""The fast gradient of depthwise kernels is PyTorch's gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from groupmixformer import depthwise as module
from groupmixformer.depthwise import Depthwise, depthwise


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
    graph = torch.jit.trace(depthwise, (x, weight), check_trace=False).graph
    assert any("conv" in node.kind() for node in graph.nodes())
    assert not taken


def test_module(taken):
    layer = Depthwise(16, 7)
    assert layer.bias is None
    layer(torch.randn(4, 16, 28, 30)).sum().backward()
    assert taken == [(16, 1, 7, 7)]
    strided = Depthwise(16, 5, 2)
    assert strided(torch.randn(4, 16, 45, 30)).shape == (4, 16, 23, 15)
