"""The Triton kernels against plain PyTorch in float64. `test_kernels.py` runs this file in a process of its own.

TRITON_INTERPRET=1 pytest -n 0 tests/run_kernels.py   # on the CPU; it must be set before Triton is imported
pytest -n 4 -m "" tests/run_kernels.py                # on a GPU
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from groupmixformer import GroupMixAttention, GroupMixFormer, fuse
from groupmixformer.ops import triton_kernels as kernels

DEVICE = "cpu" if kernels.INTERPRETED or not torch.cuda.is_available() else "cuda"
slow = pytest.mark.slow
OPERATIONS = ["aggregate_groups", "attend"]


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not kernels.INTERPRETED:
        return
    from triton.runtime import interpreter

    # The interpreter checks every sum of integers for overflow, which takes half of the time.
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def draw(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def leaves(name, B, H, W, C, dtype):
    """The tensors that an operation reads, before the network cuts them up."""
    exact = torch.promote_types(dtype, torch.float32)  # of parameters under autocast
    if name == "aggregate_groups":
        return [draw(B, H, W, 3, 5, C, dtype=dtype), *(draw(C, 1, k, k, dtype=exact) for k in (3, 5, 7))]
    proxies = [draw(3 * B, H, W, C, dtype=dtype) for _ in range(4)]
    weights = [draw(C, 1, k, k, dtype=exact) for k in (3, 5, 7, 7)]
    return [*proxies, draw(B, H, W, C, dtype=dtype), *weights, *(draw(C, dtype=exact) for _ in range(4))]


def operate(name, tensors, plain=False):
    """Call an operation on views as the network makes them."""
    function = getattr(kernels, f"plain_{name}" if plain else name)
    if name == "aggregate_groups":
        return function(tensors[0][..., 1:4, :].permute(4, 3, 0, 1, 2, 5), kernels.join_taps(tensors[1:]))
    proxies = [tensor.unflatten(0, (3, -1)) for tensor in tensors[:4]]  # 4 x (3, B, H, W, C)
    return function(proxies, tensors[4], kernels.join_taps(tensors[5:9]), torch.stack(tensors[9:]), 0.3)


def results(name, tensors, plain=False):
    """The result and the gradients of all inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = operate(name, tensors, plain)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).to(output)
    return [output, *torch.autograd.grad(output, tensors, weights)]


def assert_near(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-30)
        assert error < tolerance, error


def test_the_kernels_serve():
    assert kernels.served(torch.zeros(1, device=DEVICE))
    assert not kernels.served(torch.zeros(1, device=DEVICE, dtype=torch.float64))
    assert not kernels.served(torch.zeros(1, device="meta"))


# One pixel and several blocks of channels; several runs of tiles, and sides and a width that fill none.
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 2, 3, 4), id="small"),
        pytest.param((1, 1, 1, 20), marks=slow),
        (2, 3, 9, 6),
        pytest.param((2, 17, 13, 40), marks=slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_float32(name, shape):
    tensors = leaves(name, *shape, torch.float32)
    assert_near(results(name, tensors), results(name, [tensor.double() for tensor in tensors], plain=True), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), pytest.param(torch.bfloat16, 8e-3, marks=slow)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_low_precision(name, dtype, tolerance):
    tensors = leaves(name, 1, 3, 4, 16, dtype)
    got = results(name, tensors)
    assert got[1].dtype == dtype
    assert_near(got, results(name, [tensor.double() for tensor in tensors], plain=True), tolerance)


def context(q, k, v, plain=False):
    """softmax(K)^T V of four segments (4, B, N, C), with the gradients of K and V when Q attends with it alone."""
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    _, B, N, C = k.shape
    proxies = [torch.stack(parts).view(3, B, 1, N, C) for parts in zip(q, k, v, strict=True)]
    local, taps, bias = torch.zeros_like(proxies[0][0]), k.new_zeros(132, C), k.new_zeros(4, C)
    if plain:
        result = kernels.plain_attend(proxies, local, taps, bias, 1.0)
        found = kernels._plain_context(k, v)
    else:
        result, found, *_ = kernels._attend(*proxies, local, taps, bias, 1.0)
    return [found.detach()], list(torch.autograd.grad(result.sum(), (k, v)))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 60000), (torch.bfloat16, 10000)])
@pytest.mark.parametrize("tokens", [1, pytest.param(1000, marks=slow)])
def test_large_keys(dtype, largest, tokens):
    q, v = draw(4, 1, tokens, 8, dtype=dtype), 100 * draw(4, 1, tokens, 8, dtype=dtype)
    k = torch.where(torch.rand(4, 1, tokens, 8) < 0.5, -largest, largest).to(DEVICE, dtype)
    got, gradients = context(q, k, v)
    expected, exact = context(q.double(), k.double(), v.double(), plain=True)
    assert_near(got, expected, 1e-5)
    assert_near([torch.stack(gradients)], [torch.stack(exact)], 1e-2)  # of a single key it is zero


@slow
def test_many_equal_keys():
    """Weights of the softmax of 1 / 20000, which float16 does not hold; they come in several runs."""
    k, v = torch.zeros(4, 1, 20000, 8).to(DEVICE, torch.float16), torch.randn(4, 1, 20000, 8).to(DEVICE, torch.float16) + 1
    (got,), _ = context(k, k, v)
    expected = v.double().mean(2).unflatten(2, (2, 1, 4)).expand(4, 1, 2, 4, 4)
    assert_near([got], [expected], 1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 5), pytest.param((1, 5, 1), marks=slow)], ids=str)
def test_maps_that_lie_differently(shape):
    """A width that divides no stride, channels that are not together, maps that lie each in their own way."""
    tensors = leaves("attend", *shape, 4, torch.float32)
    exact = operate("attend", [tensor.double() for tensor in tensors], plain=True)
    padded = F.pad(tensors[0], (0, 1))[..., :4]
    first = tensors[1].movedim(3, 0).contiguous().movedim(0, 3)
    across = tensors[2].transpose(1, 2).contiguous().transpose(1, 2)
    assert_near([operate("attend", [padded, first, across, *tensors[3:]])], [exact], 1e-5)


@pytest.fixture
def plainly(monkeypatch):
    """Run a function without kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "WANTED", False)
            return function()

    return run


@pytest.mark.parametrize("training", [pytest.param(True, marks=slow), False])
def test_network(randomise, plainly, monkeypatch, training):
    model = randomise(GroupMixFormer(embed_dims=(40, 40), depths=(1, 1), mlp_ratios=(2, 2), num_classes=5))
    model = model.to(DEVICE).train(training)
    images, labels = torch.randn(1, 3, 37, 45).to(DEVICE), torch.tensor([2], device=DEVICE)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def step():
        model.load_state_dict(buffers, strict=False)
        logits = model(images)
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters())) if training else []
        return [logits.detach(), *gradients], [buffer.clone() for buffer in model.buffers()]

    expected, expected_buffers = plainly(step)
    used = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *inputs: used.append(1) or attend(*inputs))
    got, got_buffers = step()
    assert len(used) == 2
    largest = max(tensor.norm() for tensor in expected)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6 * largest  # biases before a BN have no gradient but rounding
    torch.testing.assert_close(got_buffers, expected_buffers)


@slow
def test_graphs_keep_the_operators_of_pytorch(randomise, plainly):
    attention = randomise(GroupMixAttention(20)).to(DEVICE).eval()
    x = torch.randn(1, 20, 3, 2).to(DEVICE)
    expected = plainly(lambda: attention(x))
    exported = torch.export.export(attention, (x,))
    assert "groupmixformer" not in str(exported.graph)
    forms = [
        exported.module(),
        torch.fx.symbolic_trace(attention),
        torch.jit.script(attention),
        torch.jit.trace(attention, x),
        torch.compile(attention, fullgraph=True, backend="aot_eager"),
    ]
    for form in forms:
        torch.testing.assert_close(form(x), expected)


class Recorder:
    """A compiler that keeps the graphs it is given."""

    def __init__(self):
        self.code = ""

    def __call__(self, graph, inputs):
        self.code += graph.code
        return graph.forward


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_graphs_take_the_kernels(randomise, plainly, fused):
    model = randomise(GroupMixFormer(embed_dims=(40,), depths=(1,), mlp_ratios=(2,), num_classes=5)).to(DEVICE).eval()
    images = torch.randn(1, 3, 33, 40).to(DEVICE)
    expected = plainly(lambda: model(images))
    recorder = Recorder()
    model = fuse(model) if fused else model
    got = torch.compile(model, fullgraph=True, dynamic=False, backend=recorder)(images)
    assert recorder.code.count("groupmixformer.attend") == recorder.code.count("groupmixformer.aggregate_groups") == 1
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(plainly(lambda: model(images)), expected)


@slow
def test_autocast(randomise, plainly):
    attention = randomise(GroupMixAttention(20)).to(DEVICE).train()
    x = torch.randn(1, 20, 3, 2).to(DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            output = attention(x)
        return [
            output,
            *torch.autograd.grad(output.float().square().sum(), [attention.qkv.weight, attention.position.conv7.bias]),
        ]

    for one, other in zip(step(), plainly(step), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() < 0.05 * other.float().norm()


@pytest.mark.parametrize("touch", ["hook", "adapter", "forward"])
def test_what_a_user_puts_in_the_way_is_run(randomise, plainly, touch):
    attention = randomise(GroupMixAttention(20)).to(DEVICE).eval()
    if touch == "forward":
        aggregator, forward = attention.aggregators[3], attention.aggregators[3].forward
        aggregator.forward = lambda x: 2 * forward(x)
    elif touch == "hook":
        attention.aggregators[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        attention.aggregators[1].depthwise = nn.Sequential(attention.aggregators[1].depthwise, nn.Hardtanh()).to(DEVICE)
    x = torch.randn(1, 20, 3, 2).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), plainly(lambda: attention(x)))


def test_a_fused_one_is_differentiable_at_one_pixel(randomise, plainly):
    attention = fuse(randomise(GroupMixAttention(20)).to(DEVICE).eval())
    x = torch.randn(1, 20, 1, 1).to(DEVICE).requires_grad_()

    def gradient():
        return torch.autograd.grad(attention(x).square().sum(), x)[0]

    torch.testing.assert_close(gradient(), plainly(gradient))


def test_other_inputs_take_plain_pytorch(randomise):
    attention = randomise(GroupMixAttention(20)).to(DEVICE).eval()
    assert attention(torch.zeros(0, 20, 3, 2, device=DEVICE)).shape == (0, 20, 3, 2)
    x = torch.randn(1, 20, 3, 2).to(DEVICE)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(attention(forward_ad.make_dual(x, x))).tangent.isfinite().all()
    assert torch.func.grad(lambda y: attention(y).sum())(x).isfinite().all()
    assert not GroupMixAttention(5 * kernels.WIDEST + 10)._suits_kernels()


def test_proxies_of_different_types():
    tensors = leaves("attend", 1, 3, 4, 16, torch.bfloat16)
    exact = operate("attend", [tensor.double() for tensor in tensors], plain=True)
    tensors[1] = tensors[1].float()
    assert_near([operate("attend", tensors)], [exact], 1e-5)
