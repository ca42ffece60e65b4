"""The operations that have kernels: their definitions are the network's function, and the kernels build for GPUs.

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
from run_kernels import OPERATIONS, inputs_of, operate
from test_groupmixformer import STAGES

from groupmixformer import GroupMixAttention, GroupMixFormer, fuse
from groupmixformer.ops import attention as ops
from groupmixformer.ops import dispatch

needs_triton = pytest.mark.skipif(not dispatch.TRITON_INSTALLED, reason="needs Triton, which there is for Linux")


def run_kernels(marked, interpret, processes="0"):
    command = [sys.executable, "-m", "pytest", "-n", processes, "-q", "-p", "no:cacheprovider", "-m", marked]
    file = Path(__file__).with_name("run_kernels.py")
    result = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": interpret}, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-1000:]


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
    assert not dispatch._runs_on(torch.device("cuda", 0))


@needs_triton
def test_without_a_c_compiler_plain_pytorch_takes_over(monkeypatch):
    import triton.runtime

    device, driver = torch.device("cuda", 0), Driver(RuntimeError("Failed to find C compiler"))
    monkeypatch.setattr(dispatch, "_known_devices", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    with pytest.warns(UserWarning, match=r"Failed to find C compiler\).*install a C compiler"):
        assert not dispatch._runs_on(device)
    assert not dispatch._runs_on(device)  # said once
    dispatch._known_devices.clear()
    driver.error = None
    assert dispatch._runs_on(device)
    dispatch._known_devices.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not dispatch._runs_on(device)


@pytest.mark.slow
def test_importing_the_package_does_not_load_the_kernels():
    code = "import sys, groupmixformer; sys.exit('groupmixformer.ops.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The definitions, which the door takes on this device and in float64


def test_the_operations_are_the_function_of_the_network(randomise):
    B, H, W, C = 2, 5, 7, 8
    attention = randomise(GroupMixAttention(5 * C)).double()
    qkv = torch.randn(B, H, W, 3, 5, C, dtype=torch.float64)
    depthwise = attention.aggregators.depthwise
    segments = qkv[..., 1:4, :].permute(4, 3, 0, 1, 2, 5)  # (3, 3, B, H, W, C)
    grouped = ops.aggregate_groups(segments, ops.join_kernels([conv.weight for conv in depthwise]))
    for i, conv in enumerate(depthwise):
        stacked = qkv[..., i + 1, :].permute(3, 0, 4, 1, 2).flatten(0, 1)  # (3B, C, H, W)
        torch.testing.assert_close(grouped[i].flatten(0, 1).permute(0, 3, 1, 2), conv(stacked), rtol=1e-12, atol=1e-12)
    proxies, local = torch.randn(4, 3, B, H, W, C, dtype=torch.float64), torch.randn(B, H, W, C, dtype=torch.float64)
    weights, bias = attention.position.joined()
    parts = zip(weights.split(C), ops.POSITION_SIZES, strict=True)
    inner = [weight[..., 3 - k // 2 : 4 + k // 2, 3 - k // 2 : 4 + k // 2] for weight, k in parts]
    mixed = ops.attend_segments(proxies.unbind(0), local, ops.join_kernels(inner), bias.view(4, C), attention.scale)
    maps = proxies.permute(1, 2, 3, 4, 0, 5).flatten(4)  # (3, B, H, W, 4C)
    position = attention.position(maps[2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, 4C)
    qkv, position = (x.reshape(*x.shape[:-3], H * W, -1, C // 2) for x in (maps, position))
    expected = ops.attend_heads(qkv, position, local.flatten(1, 2), attention.scale).reshape(mixed.shape)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


def test_the_fused_form_for_kernels_is_the_same_function(monkeypatch, randomise):
    """What it computes around the kernels, for which their definitions stand here."""
    network = randomise(GroupMixFormer(**STAGES)).double().eval()
    images = torch.randn(2, 3, 67, 70, dtype=torch.float64)
    monkeypatch.setattr(dispatch, "kernels_available", lambda x: True)
    monkeypatch.setattr(ops, "_takes_kernels", lambda x: False)
    fused, taken = fuse(network), []
    for module in fused.modules():
        if hasattr(module, "with_kernels"):
            assert module.with_kernels
            forward = module._forward_kernels
            module._forward_kernels = lambda x, forward=forward: taken.append(x.shape) or forward(x)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), network(images), rtol=1e-9, atol=1e-9)
    assert len(taken) == sum(STAGES["depths"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("width", "local_heads"), [(8, 2), (6, 0)])
def test_heads_in_pairs_are_heads_at_once(monkeypatch, dtype, tolerance, width, local_heads):
    found, calls = [], []
    monkeypatch.setattr(ops, "attend", lambda *x, attend=ops.attend: calls.append(x[0].shape) or attend(*x))
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((3, 2, 30, 8, 4), (2, 30, 8, 4), (2, 30, width))]
    for tokens in (30, 31):  # from which on heads are taken in pairs
        monkeypatch.setattr(ops, "_LONG", tokens)
        leaves = [x.clone().requires_grad_() for x in inputs]
        mixed = ops.attend_heads(*leaves, 0.3, local_heads)
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), leaves)))
    assert calls == [(2, 30, 8)] * 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# Building for GPUs that are not here


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *inputs, **constants: self.launches.append((self.kernel, inputs, constants))


def built(kernel, inputs, constants, arch):
    """Compile a launch as Triton would: integers of 1 are constants, aligned addresses and multiples of 16 are known."""
    import triton

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
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(cubin, path):
    """Bytes a thread spills from its registers."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
    from groupmixformer.ops import triton_kernels as kernels

    launches = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    for name in OPERATIONS:
        operate(name, inputs_of(name, 2, 12, 14, C, dtype), kernels)
        if arch == 90 and C == 16:
            operate(name, inputs_of(name, 1, 1, 1, C, dtype), kernels)  # strides of 1
    assert len({kernel.__name__ for kernel, _, _ in launches}) == 4
    for kernel, inputs, constants in launches:
        binary = built(kernel, inputs, constants, arch)
        assert binary.metadata.shared < 99 * 1024, kernel.__name__  # what the smallest of these GPUs gives a block
        spilled = stack_bytes(binary.asm["cubin"], tmp_path / "cubin")
        print(kernel.__name__, constants, "shared", binary.metadata.shared, "spilled", spilled)
        assert spilled <= 512, kernel.__name__
