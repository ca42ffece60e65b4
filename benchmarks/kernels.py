"""The Triton kernels beside the reference in plain PyTorch, eager and under torch.compile, alternating in one run on a GPU.

python benchmarks/kernels.py [--repeats 30]   # needs an NVIDIA GPU; writes benchmarks/results/kernels-DATE.json
python benchmarks/kernels.py --models small --types bfloat16   # a quarter of it, where the GPU is lent for minutes

Each operation runs, from a CUDA graph, on the feature maps of every stage of small at 224 with batch 128 and of base at 384
with batch 32, in bf16 and fp32. The floor is the time in which the GPU copies what the operation must read and write once. The
difference of each result from the eager reference's is recorded beside the speed.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

import groupmixformer
from groupmixformer.files import write_file
from groupmixformer.ops import attention, dispatch, reference

Tensors = list[Tensor]
SETTINGS = {
    "small at 224, batch 128": (128, 224, (80, 160, 320, 320)),
    "base at 384, batch 32": (32, 384, (200, 240, 320, 480)),
}


def operations(B: int, side: int, D: int, dtype: torch.dtype) -> dict[str, tuple[Tensors, Callable[..., Tensor]]]:
    """Inputs of each operation, and how a function with its signature is called on them."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    C = D // 5
    group_weights, position_weights = (
        attention.join_kernels([draw(C, 1, k, k) for k in sizes]) for sizes in (attention.GROUP_SIZES, attention.POSITION_SIZES)
    )
    proxies = [draw(3, B, side, side, C, dtype=dtype) for _ in range(4)]
    return {
        "aggregate_groups": (
            [draw(B, side, side, 3, 3, C, dtype=dtype), group_weights],
            lambda f, qkv, weights: f(qkv.permute(3, 4, 0, 1, 2, 5), weights),
        ),
        "attend_segments": (
            [*proxies, draw(B, side, side, C, dtype=dtype), position_weights, draw(4, C)],
            lambda f, *inputs: f(inputs[:4], *inputs[4:], (D / 8) ** -0.5),
        ),
    }


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Record a CUDA graph, so that the GPU does not wait for Python."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_speed() -> float:
    """Bytes read and written a millisecond by a large copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.numel() / statistics.median(times)


def difference(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def measure(name: str, inputs: Tensors, call: Callable[..., Tensor], repeats: int, speed: float) -> dict[str, Any]:
    """The row of an operation."""

    def of(module: ModuleType, *tensors: Tensor) -> Tensor:
        return call(getattr(module, name), *tensors)

    torch.compiler.reset()
    variants: dict[str, Callable[[], Tensor]] = {
        "kernel": partial(of, attention, *inputs),
        "reference": partial(of, reference, *inputs),
        "compiled reference": partial(torch.compile(partial(of, reference)), *inputs),
    }
    expected = variants["reference"]()
    errors = {variant: difference(run(), expected) for variant, run in variants.items()}
    graphs = {variant: recorded(run) for variant, run in variants.items()}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 3):  # the first three warm up
        for variant, graph in graphs.items():
            elapsed = milliseconds(graph)
            if repeat >= 3:
                times[variant].append(elapsed)
    return {
        "operation": name,
        "floor_ms": (sum(tensor.nbytes for tensor in inputs) + expected.nbytes) / speed,
        "ms": {variant: statistics.median(values) for variant, values in times.items()},
        "ms_spread": {variant: (min(values), max(values)) for variant, values in times.items()},
        "difference": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each variant")
    parser.add_argument("--models", nargs="+", choices=["small", "base"], default=["small", "base"])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=list(range(4)))
    parser.add_argument("--types", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    with torch.no_grad():
        available = torch.cuda.is_available() and dispatch.kernels_available(torch.empty(0, device="cuda"))
    if not available:
        sys.exit("benchmarks/kernels.py needs an NVIDIA GPU and Triton; there is none here")
    torch.manual_seed(0)
    speed = copy_speed()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "groupmixformer": groupmixformer.__version__}
    machine = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    result = {"date": today, "machine": machine, "copy_GB_per_s": speed / 1e6, "versions": versions, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    for setting, (batch, size, dims) in SETTINGS.items():
        if setting.split()[0] not in args.models:
            continue
        for i, D in ((i, dims[i]) for i in args.stages):
            for dtype in (getattr(torch, name) for name in args.types):
                for name, (inputs, call) in operations(batch, size // 4 // 2**i, D, dtype).items():
                    row = measure(name, inputs, call, args.repeats, speed)
                    rows.append({"setting": setting, "stage": i, "dtype": str(dtype).removeprefix("torch."), **row})
                    ms = "  ".join(f"{variant} {value:8.3f}" for variant, value in row["ms"].items())
                    print(f"{setting}  stage {i}  {dtype}  {name}: {ms}  floor {row['floor_ms']:8.3f} ms")
                    write_file(args.out / f"kernels-{today}.json", (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
