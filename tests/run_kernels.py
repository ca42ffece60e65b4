"""The Triton kernels against plain PyTorch in float64. `test_kernels.py` runs this file in a process of its own.

TRITON_INTERPRET=1 pytest -n 0 tests/run_kernels.py         # on the CPU; it must be set before Triton is imported
GROUPMIXFORMER_KERNELS=1 pytest -n 0 tests/run_kernels.py   # on a GPU
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from groupmixformer import GroupMixAttention, GroupMixFormer, groupmixformer, kernels

DEVICE = "cpu" if kernels.INTERPRETED or not torch.cuda.is_available() else "cuda"
slow = pytest.mark.slow
OPERATIONS = ["aggregate_groups", "context", "combine"]


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
    if name == "aggregate_groups":
        return [draw(B, H, W, 3, 5, C, dtype=dtype), *(draw(C, 1, k, k, dtype=dtype) for k in (3, 5, 7))]
    proxies = draw(4, 3, B, H, W, C, dtype=dtype)
    if name == "context":
        return [proxies]
    exact = torch.promote_types(dtype, torch.float32)  # parameters under autocast, and the context
    weights = [draw(C, 1, k, k, dtype=exact) for k in (3, 5, 7, 7)]
    return [proxies, draw(4, B, 2, C // 2, C // 2, dtype=exact), *weights, *(draw(C, dtype=exact) for _ in range(4))]


def operate(name, tensors, plain=False):
    """Call an operation on views as the network makes them."""
    function = getattr(kernels, f"plain_{name}" if plain else name)
    if name == "aggregate_groups":
        return function(tensors[0][..., 1:4, :], *tensors[1:])
    q, k, v = tensors[0].unbind(1)  # 3 x (4, B, H, W, C)
    if name == "context":
        return function(k.flatten(2, 3), v.flatten(2, 3))
    return function(q, v, tensors[1], tensors[2:6], tensors[6:], 0.3)


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
    "shape", [pytest.param((1, 1, 1, 20), marks=slow), (2, 3, 9, 6), pytest.param((2, 17, 13, 40), marks=slow)], ids=str
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


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 60000), (torch.bfloat16, 10000)])
@pytest.mark.parametrize("tokens", [1, pytest.param(20000, marks=slow)])
def test_large_keys(dtype, largest, tokens):
    k = torch.where(torch.rand(1, 1, tokens, 8) < 0.5, -largest, largest).to(DEVICE, dtype).requires_grad_()
    v = (100 * torch.randn(1, 1, tokens, 8)).to(DEVICE, dtype).requires_grad_()
    result = kernels.context(k, v)
    gradients = torch.autograd.grad(result.sum(), (k, v))
    exact = [tensor.detach().double().requires_grad_() for tensor in (k, v)]
    expected = kernels.plain_context(*exact)
    assert_near([result], [expected], 1e-5)
    assert_near(gradients, torch.autograd.grad(expected.sum(), exact), 1e-2)


def test_many_equal_keys():
    """Weights of the softmax of 1 / 20000, which float16 does not hold; they come in several runs."""
    k, v = torch.zeros(1, 1, 20000, 8).to(DEVICE, torch.float16), torch.randn(1, 1, 20000, 8).to(DEVICE, torch.float16) + 1
    expected = v.double().mean(2).unflatten(2, (2, 1, 4)).expand(1, 1, 2, 4, 4)
    assert_near([kernels.context(k, v)], [expected], 1e-5)


def test_strides_that_are_no_multiples_of_the_width():
    k, v = torch.randn(4, 2, 2, 9, 5).to(DEVICE).unbind(0)[0][..., :4], torch.randn(2, 4, 2, 9).to(DEVICE).permute(0, 2, 3, 1)
    assert_near([kernels.context(k, v)], [kernels.plain_context(k.double(), v.double())], 1e-5)


@pytest.fixture
def plainly(monkeypatch):
    """Run a function without kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(groupmixformer, "_takes_kernels", lambda x: False)
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
    combine = kernels.combine
    monkeypatch.setattr(kernels, "combine", lambda *inputs: used.append(1) or combine(*inputs))
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
