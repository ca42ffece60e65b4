"""The Triton kernels against plain PyTorch in float64. `test_kernels.py` runs this file in a process of its own.

TRITON_INTERPRET=1 pytest -n 0 tests/run_kernels.py   # on the CPU; it must be set before Triton is imported
pytest -n 4 -m "" tests/run_kernels.py                # on a GPU
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from groupmixformer import GroupMixAttention, GroupMixFormer, fuse
from groupmixformer.ops import attention, dispatch, reference

DEVICE = "cpu" if dispatch.INTERPRETED or not torch.cuda.is_available() else "cuda"
slow = pytest.mark.slow
OPERATIONS = ["aggregate_groups", "attend_segments"]


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not dispatch.INTERPRETED:
        return
    from triton.runtime import interpreter

    # The interpreter checks every sum of integers for overflow, which takes half of the time.
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def draw(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def inputs_of(name, B, H, W, C, dtype):
    """The tensors that an operation reads, the maps as views such as the fused form makes."""
    exact = torch.promote_types(dtype, torch.float32)  # of parameters under autocast
    sizes = reference.GROUP_SIZES if name == "aggregate_groups" else reference.POSITION_SIZES
    weights = attention.join_kernels([draw(C, 1, k, k, dtype=exact) for k in sizes])
    if name == "aggregate_groups":
        return [draw(B, H, W, 5, 3, C, dtype=dtype).permute(3, 4, 0, 1, 2, 5)[1:4], weights]
    proxies = [draw(3, B, H, W, C, dtype=dtype) for _ in range(4)]
    return [*proxies, draw(B, H, W, C, dtype=dtype), weights, draw(4, C, dtype=exact)]


def operate(name, tensors, module=attention):
    """Call an operation of a module: the door, the definition or the kernels."""
    function = getattr(module, name)
    with torch.no_grad():
        if name == "aggregate_groups":
            return function(*tensors)
        *proxies, local, weights, bias = tensors
        return function(proxies, local, weights, bias, 0.3)


def exact(name, tensors):
    return operate(name, [tensor.double() for tensor in tensors], reference)


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert got.isfinite().all()
    assert (got.double() - expected).norm() / expected.norm().clamp_min(1e-30) < tolerance


@pytest.fixture
def calls(monkeypatch):
    """The operators of the kernels, as often as the door calls them."""
    found = []
    for name in OPERATIONS:
        operator = getattr(attention, f"_{name}")
        monkeypatch.setattr(attention, f"_{name}", lambda *x, name=name, operator=operator: found.append(name) or operator(*x))
    return found


def test_when_the_kernels_are_available(monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    assert not dispatch.kernels_available(x)  # its gradient may be asked for
    with torch.no_grad():
        assert dispatch.kernels_available(x)
        assert not dispatch.kernels_available(x.double())
        assert not dispatch.kernels_available(x.to("meta"))
        with forward_ad.dual_level():
            assert not dispatch.kernels_available(x)
        assert torch.func.vmap(lambda y: y + dispatch.kernels_available(y))(x) == 0
        monkeypatch.setattr(dispatch, "ENABLED", False)
        assert not dispatch.kernels_available(x)


# One pixel and several blocks of channels; several runs of tiles, and sides and a width that fill none.
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 2, 3, 4), id="small"),
        pytest.param((1, 1, 1, 20), marks=slow),
        (2, 3, 9, 6),
        pytest.param((2, 17, 13, 40), marks=slow),
        pytest.param((1, 5, 6, 66), marks=slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_float32(calls, name, shape):
    tensors = inputs_of(name, *shape, torch.float32)
    assert_near(operate(name, tensors), exact(name, tensors), 1e-5)
    assert calls == [name]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), pytest.param(torch.bfloat16, 8e-3, marks=slow)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_low_precision(calls, name, dtype, tolerance):
    tensors = inputs_of(name, 1, 3, 4, 16, dtype)
    got = operate(name, tensors)
    assert got.dtype == operate(name, tensors, reference).dtype == dtype
    assert_near(got, exact(name, tensors), tolerance)
    assert calls == [name]


def context(k, v):
    """softmax(K)^T V of four segments (4, B, N, C) as the kernels have it, and in float64."""
    from groupmixformer.ops import triton_kernels

    B, C = k.shape[1], k.shape[3]
    got = triton_kernels._context([torch.stack([x, x, y])[:, :, None] for x, y in zip(k, v, strict=True)])
    keys, values = (x.double().unflatten(3, (2, C // 2)).transpose(2, 3) for x in (k, v))  # (4, B, 2, N, E)
    assert got.shape == (4, B, 2, C // 2, C // 2)
    return got, keys.softmax(3).transpose(3, 4) @ values


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 60000), (torch.bfloat16, 10000)])
@pytest.mark.parametrize("tokens", [1, pytest.param(1000, marks=slow)])
def test_large_keys(dtype, largest, tokens):
    k = torch.where(torch.rand(4, 1, tokens, 8) < 0.5, -largest, largest).to(DEVICE, dtype)
    assert_near(*context(k, 100 * draw(4, 1, tokens, 8, dtype=dtype)), 1e-5)


@slow
def test_many_equal_keys():
    """Weights of the softmax of 1 / 20000, which float16 does not hold; they come in several runs."""
    k, v = torch.zeros(4, 1, 20000, 8), torch.randn(4, 1, 20000, 8) + 1
    assert_near(*context(k.to(DEVICE, torch.float16), v.to(DEVICE, torch.float16)), 1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 5), pytest.param((1, 5, 1), marks=slow)], ids=str)
def test_maps_that_lie_differently(shape):
    """A width that divides no stride, channels that are not together, maps that lie each in their own way."""
    tensors = inputs_of("attend_segments", *shape, 4, torch.float32)
    padded = F.pad(tensors[0], (0, 1))[..., :4]
    first = tensors[1].movedim(4, 0).contiguous().movedim(0, 4)
    across = tensors[2].transpose(2, 3).contiguous().transpose(2, 3)
    got = operate("attend_segments", [padded, first, across, *tensors[3:]])
    assert_near(got, exact("attend_segments", tensors), 1e-5)
    segments, weights = inputs_of("aggregate_groups", *shape, 4, torch.float32)
    expected = exact("aggregate_groups", [segments, weights])
    assert_near(operate("aggregate_groups", [F.pad(segments, (0, 1))[..., :4], weights]), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=slow)])
def test_operators_are_registered_in_full(dtype):
    segments, kernel_weights = inputs_of("aggregate_groups", 1, 2, 3, 4, dtype)
    *proxies, local, position_weights, position_bias = inputs_of("attend_segments", 1, 2, 3, 4, dtype)
    # The gradient is not registered, as there is none.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention._aggregate_groups, (segments, kernel_weights), test_utils=checks)
    attend_inputs = (proxies, local, position_weights, position_bias, 0.3)
    torch.library.opcheck(attention._attend_segments, attend_inputs, test_utils=checks)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_image_and_a_wide_segment(monkeypatch, calls, name):
    nothing = inputs_of(name, 0, 2, 3, 4, torch.float32)
    assert operate(name, nothing).shape == exact(name, nothing).shape
    assert calls == [name]
    wide = inputs_of(name, 1, 1, 2, dispatch.MAX_SEGMENT_DIM + 2, torch.float32)
    assert_near(operate(name, wide), exact(name, wide), 1e-5)
    assert calls == [name]  # the definition


# The fused form


@pytest.fixture
def plainly(monkeypatch):
    """Run a function without kernels."""

    def run(function):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(dispatch, "ENABLED", False)
            return function()

    return run


def test_the_fused_form_takes_the_kernels(randomise, plainly, calls):
    model = randomise(GroupMixFormer(embed_dims=(40, 40), depths=(1, 1), mlp_ratios=(2, 2), num_classes=5)).to(DEVICE).eval()
    images = torch.randn(1, 3, 37, 45).to(DEVICE)
    with torch.no_grad():
        expected = model(images)
    assert not calls  # the network does without
    fused = fuse(model)
    torch.testing.assert_close(plainly(lambda: fused(images)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plainly(lambda: fuse(model))(images), expected, rtol=1e-4, atol=1e-5)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)
        assert fused(images[:0]).shape == (0, 5)
    assert calls == 4 * OPERATIONS


@slow
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_graphs_keep_the_operators_of_pytorch(randomise, plainly):
    attention = fuse(randomise(GroupMixAttention(20)).to(DEVICE).eval())
    x = torch.randn(1, 20, 3, 2).to(DEVICE)
    expected = plainly(lambda: attention(x))
    with torch.no_grad():
        exported = torch.export.export(attention, (x,))
        assert "groupmixformer" not in str(exported.graph)
        for form in (exported.module(), torch.jit.trace(attention, x)):
            torch.testing.assert_close(form(x), expected)


class Recorder:
    """A compiler that keeps the graphs it is given."""

    def __init__(self):
        self.code = ""

    def __call__(self, graph, inputs):
        self.code += graph.code
        return graph.forward


def test_compiled_graphs_take_the_kernels(randomise, plainly):
    model = randomise(GroupMixFormer(embed_dims=(40,), depths=(1,), mlp_ratios=(2,), num_classes=5)).to(DEVICE).eval()
    images = torch.randn(1, 3, 33, 40).to(DEVICE)
    expected = plainly(lambda: model(images))
    fused, recorder = fuse(model), Recorder()
    with torch.no_grad():
        got = torch.compile(fused, fullgraph=True, dynamic=False, backend=recorder)(images)
    for name in OPERATIONS:
        assert recorder.code.count(f"groupmixformer.{name}") == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@slow
def test_autocast(randomise, plainly, calls):
    attention = fuse(randomise(GroupMixAttention(20)).to(DEVICE).eval())
    x = torch.randn(1, 20, 3, 2).to(DEVICE)

    def output():
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            return attention(x)

    got, expected = output(), plainly(output)
    assert calls == OPERATIONS
    assert got.dtype == expected.dtype
    assert (got - expected).float().norm() < 0.05 * expected.float().norm()


@pytest.mark.parametrize("size", [(1, 1), pytest.param((3, 2), marks=slow)], ids=str)
def test_derivatives_of_the_fused_form_are_those_of_pytorch(randomise, calls, size):
    model = randomise(GroupMixAttention(20)).to(DEVICE).eval()
    fused, x = fuse(model), torch.randn(1, 20, *size).to(DEVICE)

    def derivatives(form):
        usual = x.clone().requires_grad_()
        form(usual).square().sum().backward()
        with forward_ad.dual_level(), torch.no_grad():
            tangent = forward_ad.unpack_dual(form(forward_ad.make_dual(x, x))).tangent
        return usual.grad, torch.func.grad(lambda y: form(y).square().sum())(x), tangent

    for got, expected in zip(derivatives(fused), derivatives(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not calls


def test_a_wide_attention_is_fused_without_kernels():
    with torch.device(DEVICE):
        assert not fuse(GroupMixAttention(5 * dispatch.MAX_SEGMENT_DIM + 10).eval()).attn.with_kernels
        assert fuse(GroupMixAttention(10).eval()).attn.with_kernels
