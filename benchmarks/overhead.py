"""What a model costs before any number is computed: its operations, and the processor time of calling them on the meta device.

python benchmarks/overhead.py [--model small] [--repeats 5]   # writes benchmarks/results/overhead-MODEL-DATE.json

Operations are what reaches PyTorch's dispatcher in a forward pass in inference and in a training step without the optimiser
(images of 64 x 64, batch 1 and 2), and how many of them are kernels, that is, no views. On the meta device tensors have shapes
and no values, so only Python and dispatch take time: milliseconds of the process (median), models in turns in one run.
birder's GroupMixFormer, which computes as the release does, is the measure; it needs `pip install birder`.
"""

import argparse
import collections
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from birder.model_registry import registry
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import groupmixformer  # noqa: F401 (registers the variants)
from groupmixformer.bench.side_by_side import conditions
from groupmixformer.bench.timing import Settings
from groupmixformer.files import write_file
from groupmixformer.models.checkpoint import model_name

PEERS = ("coat_lite_small", "pvt_v2_b2", "swin_tiny_patch4_window7_224", "convnext_tiny", "davit_tiny")
VIEWS = {
    *("view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select", "slice", "split", "unbind", "detach"),
    *("alias", "as_strided", "_unsafe_view", "unfold", "_reshape_alias", "split_with_sizes", "chunk"),
}


class Count(TorchDispatchMode):
    """Counts operations by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def result(self) -> dict[str, int]:
        kernels = sum(number for name, number in self.names.items() if name not in VIEWS)
        return {"operations": self.names.total(), "kernels": kernels}


def build(name: str, device: str, size: int) -> nn.Module:
    with torch.device(device):
        if name.startswith("birder:"):
            options = {"drop_path_rate": 0.0}  # as ours and the peers here
            return registry.net_factory(name.removeprefix("birder:"), 1000, 3, size=(size, size), config=options)
        return timm.create_model(name, **({"img_size": size} if name.startswith(("swin", "coat")) else {}))


def forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        model.eval()(images)


def step(model: nn.Module, images: torch.Tensor) -> None:
    model.train()(images).sum().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = model_name(args.model)
    names = [f"birder:groupmixformer_{args.model[0]}", ours, *PEERS]
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        model = build(name, "cpu", 64)
        with Count() as counted:
            forward(model, torch.randn(1, 3, 64, 64))
        with Count() as counted_step:
            step(model, torch.randn(2, 3, 64, 64))
        rows[name] = {"forward": counted.result(), "step": counted_step.result()}
    meta = {name: build(name, "meta", 224) for name in names}
    images = torch.empty(2, 3, 224, 224, device="meta")
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for turn in range(args.repeats + 1):
        for name, model in meta.items():
            for what, run in (("forward", forward), ("step", step)):
                start = time.process_time()
                run(model, images)
                if turn:  # the first one warms up
                    times[name, what].append(1e3 * (time.process_time() - start))
    base = names[0]
    for name in names:
        for what in ("forward", "step"):
            rows[name][what]["meta_ms"] = statistics.median(times[name, what])
            rows[name][what]["of_birder"] = rows[name][what]["meta_ms"] / statistics.median(times[base, what])
    head = f"{'operations':>16}{'kernels':>9}{'meta ms':>9}{'ratio':>9}"
    print(f"{'':32}{'in a forward pass':>43}{'in a training step':>43}\n{'':32}{head}{head}")
    for name, row in rows.items():
        parts = (
            f"{r['operations']:>16,}{r['kernels']:>9,}{r['meta_ms']:>9.0f}{r['of_birder']:>9.2f}"
            for r in (row["forward"], row["step"])
        )
        print(f"{name:32}" + "".join(parts))
    result = {
        "command": f"python benchmarks/overhead.py --model {args.model}",
        **conditions(Settings(device="meta", threads=1)),
        "rows": rows,
    }
    out = args.out or Path(__file__).parent / "results" / f"overhead-{args.model}-{time.strftime('%Y-%m-%d')}.json"
    write_file(out, json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
