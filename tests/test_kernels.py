"""The fused kernels: their plain twins are the network's function, their operators suit compilers, and they build for GPUs.

What the kernels compute is tested in `run_kernels.py`, in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_kernels import OPERATIONS, assert_near, leaves, operate, results
from torch import nn

from groupmixformer import GroupMixAttention
from groupmixformer.models.groupmixformer import factorised_attention, scale_within_heads
from groupmixformer.ops import triton_kernels as kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs Triton, which there is for Linux")


def run_kernels(marked, interpret, processes="0", named=""):
    command = [sys.executable, "-m", "pytest", "-n", processes, "-q", "-p", "no:cacheprovider", "-m", marked, "-k", named]
    file = Path(__file__).with_name("run_kernels.py")
    result = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": interpret}, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-1000:]


@needs_triton
def test_a_small_case_under_the_interpreter():
    """Results and gradients of both operations; the default run has the time for this one."""
    run_kernels("not slow", "1", named="test_float32 and small")


@needs_triton
@pytest.mark.slow
def test_kernels_under_the_interpreter():
    run_kernels("not slow", "1")


@needs_triton
@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_kernels_under_the_interpreter():
    run_kernels("slow", "1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    run_kernels("slow or not slow", "0", processes="4")


class Driver:
    """Stands for Triton's, with or without what it needs to start kernels."""

    def __init__(self, error):
        self.error = error

    def get_current_target(self):
        if self.error:
            raise self.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_no_kernel_is_asked_for():
    assert not kernels._runs_on(torch.device("cuda", 0))


@needs_triton
def test_without_a_c_compiler_plain_pytorch_takes_over(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    error = RuntimeError("Failed to find C compiler")
    monkeypatch.setattr(
        kernels, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=Driver(error))))
    )
    with pytest.warns(UserWarning, match=r"Failed to find C compiler\).*install a C compiler"):
        assert not kernels._runs_on(device)
    assert not kernels._runs_on(device)  # said once
    monkeypatch.setattr(kernels, "_known", {})
    kernels.triton.runtime.driver.active.error = None
    assert kernels._runs_on(device)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels._runs_on(device)


# The twins


def test_twins_are_the_function_of_the_network(randomise):
    B, H, W, C = 2, 5, 7, 8
    attention = randomise(GroupMixAttention(5 * C)).double()
    qkv = torch.randn(B, H, W, 3, 5, C, dtype=torch.float64)
    depthwise = [aggregator.depthwise for aggregator in attention.aggregators[1:]]
    segments = qkv[..., 1:4, :].permute(4, 3, 0, 1, 2, 5)  # (3, 3, B, H, W, C)
    grouped = kernels.plain_aggregate_groups(segments, kernels.join_taps([conv.weight for conv in depthwise]))
    for i, conv in enumerate(depthwise):
        stacked = qkv[..., i + 1, :].permute(3, 0, 4, 1, 2).flatten(0, 1)  # (3B, C, H, W)
        torch.testing.assert_close(grouped[i].flatten(0, 1).permute(0, 3, 1, 2), conv(stacked), rtol=1e-12, atol=1e-12)
    proxies, local = torch.randn(4, 3, B, H, W, C, dtype=torch.float64), torch.randn(B, H, W, C, dtype=torch.float64)
    weights, biases = zip(*attention.position.kernels(), strict=True)
    taps, bias = kernels.join_taps(weights), torch.stack(biases)
    mixed = kernels.plain_attend(proxies.unbind(0), local, taps, bias, attention.scale).flatten(1, 2)  # (B, N, 5C)
    *parts, last = mixed.split(C, dim=2)
    for i, part in enumerate(parts):
        maps = proxies[i].flatten(0, 1).permute(0, 3, 1, 2)  # (3B, C, H, W)
        scale = scale_within_heads(attention.scale, C, maps)
        expected = factorised_attention(maps, weights[i], biases[i], scale)
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, local.flatten(1, 2))


# The operators, which on this device and in float64 take plain PyTorch


@pytest.mark.parametrize("name", OPERATIONS)
def test_operators_are_their_twins(name):
    tensors = leaves(name, 2, 3, 5, 6, torch.float64)
    assert_near(results(name, tensors), results(name, tensors, plain=True), 1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients(name):
    tensors = [tensor.requires_grad_() for tensor in leaves(name, 1, 2, 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *inputs: operate(name, inputs), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_are_registered_in_full(dtype):
    qkv, *weights = leaves("aggregate_groups", 1, 3, 2, 4, dtype)
    *proxies, local = (x.detach() for x in leaves("attend", 1, 3, 2, 4, dtype)[:5])
    taps, bias = (torch.randn(shape, dtype=weights[0].dtype) for shape in [(132, 4), (4, 4)])
    calls = [
        (kernels._aggregate_groups, (qkv[..., 1:4, :].permute(4, 3, 0, 1, 2, 5), kernels.join_taps(weights))),
        (kernels._attend, (*(x.unflatten(0, (3, 1)) for x in proxies), local, taps, bias, 0.3)),
    ]
    for operator, inputs in calls:
        inputs = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
        torch.library.opcheck(operator, inputs)


class Attend(nn.Module):
    """The operations one after the other."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ParameterList(torch.randn(8, 1, k, k) for k in (3, 5, 7))
        self.weights = nn.ParameterList(torch.randn(8, 1, k, k) for k in (3, 5, 7, 7))
        self.biases = nn.ParameterList(torch.randn(8) for _ in range(4))

    def forward(self, qkv):
        single, groups, local = qkv.permute(4, 3, 0, 1, 2, 5).split((1, 3, 1))
        grouped = kernels.aggregate_groups(groups, kernels.join_taps(list(self.groups)))
        taps, bias = kernels.join_taps(list(self.weights)), torch.stack(list(self.biases))
        return kernels.attend(torch.cat([single, grouped]).unbind(0), local[0, 0], taps, bias, 0.3)


def test_compiled_and_exported():
    module, qkv = Attend(), torch.randn(2, 3, 5, 3, 5, 8)
    expected = module(qkv)
    gradients = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), list(module.parameters())), gradients)
    exported = torch.export.export(module, (qkv,))
    assert "groupmixformer.attend" in str(exported.graph)
    torch.testing.assert_close(exported.module()(qkv), expected)


# Building for GPUs that are not here


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *inputs, **constants: self.launches.append((self.kernel, inputs, constants))


def built(kernel, inputs, constants, arch):
    """Compile a launch as Triton would: integers of 1 are constants, aligned addresses and multiples of 16 are known."""
    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature, aligned = {}, {}
    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    for i, (name, value) in enumerate(zip(kernel.arg_names, inputs, strict=False)):
        if isinstance(value, int) and value == 1:
            constants[name] = 1
        elif isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    triton = kernels.triton
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(cubin, path):
    """Bytes a thread spills from its registers."""
    path.write_bytes(cubin)
    tool = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


slow = pytest.mark.slow


@needs_triton
@pytest.mark.parametrize(
    ("arch", "dtype", "C"),
    [
        pytest.param(90, torch.bfloat16, 16, marks=slow),
        pytest.param(80, torch.float32, 64, marks=slow),
        pytest.param(80, torch.float16, 16, marks=slow),
        pytest.param(80, torch.bfloat16, 64, marks=slow),
        pytest.param(90, torch.float16, 64, marks=slow),
        pytest.param(90, torch.float32, 64, marks=slow),
        pytest.param(80, torch.float32, 96, marks=slow),
        pytest.param(90, torch.bfloat16, 96, marks=slow),
    ],
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the compiler's place")
def test_kernels_build_for_gpus(monkeypatch, tmp_path, arch, dtype, C):
    launches = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    monkeypatch.setattr(kernels, "served", lambda x: True)
    for name in OPERATIONS:
        results(name, leaves(name, 2, 12, 14, C, dtype))
    assert len({kernel.__name__ for kernel, _, _ in launches}) == 6
    for kernel, inputs, constants in launches:
        binary = built(kernel, inputs, constants, arch)
        assert binary.metadata.shared < 99 * 1024, kernel.__name__  # what the smallest of these GPUs gives a block
        spilled = stack_bytes(binary.asm["cubin"], tmp_path / "cubin")
        print(kernel.__name__, constants, "shared", binary.metadata.shared, "spilled", spilled)
        assert spilled <= 512, kernel.__name__
