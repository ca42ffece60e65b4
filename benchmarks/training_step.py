"""What each of the means that speed up training on a CPU, or spare memory, is worth: a training step with and without them.

python benchmarks/training_step.py [--model small] [--batch-size 4] [--dtype bf16]
# writes benchmarks/results/training-step-MODEL-DTYPE-DATE.json

First, with --gradients, the gradient of the depthwise kernels, of the sizes that the model has: PyTorch's beside ours, in
float32 and bfloat16, and their relative difference. Then a whole step on one thread: as it is; with all activations kept; with
PyTorch's selective activation checkpointing, which keeps results of convolutions and matrix products alone; with PyTorch's
gradient of depthwise kernels.
"""

import argparse
import contextlib
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from forms import tensor_memory
from torch import nn
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from groupmixformer.bench.side_by_side import conditions
from groupmixformer.bench.timing import TYPES, Runner, Settings, measure, seconds_of
from groupmixformer.files import write_file
from groupmixformer.models import layers
from groupmixformer.models.checkpoint import model_name
from groupmixformer.models.groupmixformer import Stage
from groupmixformer.ops import onednn, recompute
from groupmixformer.ops.onednn import _weight_gradient

KEPT = {torch.ops.aten.convolution.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default}


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective(blocks: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in blocks.children():
        contexts = partial(create_selective_checkpoint_contexts, policy)
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


# What is replaced, by what.
FORMS: dict[str, tuple[Any, ...]] = {
    "as it is": (),
    "all kept": (recompute, "forget", lambda *_: None),
    "selective checkpointing": (layers.Blocks, "forward", selective),
    "PyTorch's gradient": (onednn, "_has_faster_gradient", lambda *_: False),
}


class Step(Runner):
    """A training step with one means replaced."""

    def __init__(self, network: nn.Module, settings: Settings, *replaced: Any) -> None:
        super().__init__(network, settings)
        self.replaced = replaced

    def step(self) -> None:
        with patch.object(*self.replaced) if self.replaced else contextlib.nullcontext():
            super().step()


def build(model: str, settings: Settings, *replaced: Any) -> Runner:
    return Step(timm.create_model(model), settings, *replaced)


def gradients(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Time the gradient of the kernels of 5 x 5 and 7 x 7 of each stage."""
    rows = []
    stages = [stage for stage in model.modules() if isinstance(stage, Stage)]
    for i, stage in enumerate(stages):
        side = settings.size[0] // (4 * 2**i)
        C = stage.blocks[0].attn.dim // 5
        for k in (5, 7):
            for dtype in ("fp32", "bf16"):
                x = torch.randn(3 * settings.batch_size, C, side, side).to(TYPES[dtype], memory_format=torch.channels_last)
                grad, weight = torch.randn_like(x), torch.randn(C, 1, k, k, dtype=TYPES[dtype])
                pytorch = partial(conv2d_weight, x, weight.shape, grad, padding=k // 2, groups=C)
                calls = (pytorch, partial(_weight_gradient, grad, x, weight))
                plain, ours = (call().double() for call in calls)
                times: list[list[float]] = [[], []]
                for _ in range(settings.rounds):
                    for found, call in zip(times, calls, strict=True):
                        found.append(1000 * seconds_of(call, settings, 0.05))
                before, after = map(statistics.median, times)
                difference = ((ours - plain).norm() / plain.norm()).item()
                row = {"map": list(x.shape), "kernel": k, "dtype": dtype, "pytorch": before, "ours": after}
                rows.append({**row, "difference": difference})
                print(f"  {k} x {k} on {tuple(x.shape)} {dtype}: {before:.2f} -> {after:.2f} ms, {difference:.0e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default=model_name("small"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is by autocast")
    parser.add_argument("--gradients", action="store_true", help="the gradients of the depthwise kernels too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(train=True, batch_size=args.batch_size, rounds=args.rounds, dtype=args.dtype)
    found = conditions(settings)
    result: dict[str, Any] = {**found, "model": args.model, "dtype": args.dtype}
    if args.gradients:
        result["gradients"] = gradients(timm.create_model(args.model), settings)
    builds = {form: partial(build, args.model, settings, *replaced) for form, replaced in FORMS.items()}
    result["steps"] = measure(builds, settings)
    for row in result["steps"]:
        row["tensor_memory"] = tensor_memory(builds[row["model"]])
        print(f"  {row['model']:25} {row['milliseconds']:8.0f} ms, tensors {row['tensor_memory']:6.0f} MiB", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"training-step-{args.model.removeprefix('groupmixformer_')}-{args.dtype}-{found['date']}.json"
    write_file(path, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
