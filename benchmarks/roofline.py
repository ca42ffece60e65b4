"""Where the time goes: multiply-adds, bytes and time of each stage, beside the floors that the machine sets.

python benchmarks/roofline.py [--model small] [--batch-size 4] [--fuse] [--dtype bf16] [--device cuda]

A stage's bytes are what it cannot do without: its weights and, for each block, the map that comes in and the one that goes out.
The floor is the longer of two times: that of its multiply-adds at the speed of one large matrix product, and that of its bytes
at the speed of a large copy, both measured in the same run. Writes benchmarks/results/roofline-MODEL-FORM-DATE.json.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import groupmixformer
from groupmixformer.bench.side_by_side import conditions
from groupmixformer.bench.timing import TYPES, Settings, matrix_speed, seconds_of, set_threads
from groupmixformer.files import write_file
from groupmixformer.models.checkpoint import model_name


def copy_speed(settings: Settings) -> float:
    """Bytes read and written a second by a large copy: the best of several."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=settings.device)
    target = torch.zeros_like(source)
    return max(2 * source.numel() / seconds_of(lambda: target.copy_(source), settings, 0.0) for _ in range(6))


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The network in order."""
    stages = {f"stage {i}": stage for i, stage in enumerate(model.stages)}
    return {"stem": model.stem, **stages, "norm and head": nn.Sequential(model.norm, model.head)}


def count(part: nn.Module, plain: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-adds of the plain part, and bytes that the part must move."""
    with FlopCounterMode(display=False) as counter:
        y = plain(x.float())
    blocks = len(getattr(part, "blocks", ())) + 1  # the patch embedding counts as one
    maps = x.numel() + y.numel() * (2 * blocks - 1)
    weights = sum(p.numel() for p in part.parameters())
    return counter.get_total_flops() // 2, (maps + weights) * x.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default=model_name("small"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=TYPES, default="fp32")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    size = (args.size, args.size)
    settings = Settings(batch_size=args.batch_size, size=size, dtype=args.dtype, device=args.device, fuse=args.fuse)
    plain = timm.create_model(args.model).to(args.device).eval()
    model = groupmixformer.fuse(plain) if args.fuse else copy.deepcopy(plain)
    rows: list[dict[str, Any]] = []
    with set_threads(1), torch.inference_mode():
        model = model.to(TYPES[args.dtype])
        product, copied = matrix_speed(settings), copy_speed(settings)
        x = torch.randn(args.batch_size, 3, *size, device=args.device, dtype=TYPES[args.dtype])
        work = []
        for (name, part), reference in zip(parts(model).items(), parts(plain).values(), strict=True):
            macs, moved = count(part, reference, x)
            work.append((name, part, x, macs, moved))
            x = part(x)
        times: dict[str, list[float]] = {name: [] for name, *_ in work}
        for _ in range(args.rounds):
            for name, part, inputs, *_ in work:
                times[name].append(seconds_of(lambda part=part, inputs=inputs: part(inputs), settings, settings.seconds))
    for name, _, _, macs, moved in work:
        milliseconds, floor = 1000 * statistics.median(times[name]), 1000 * max(macs / product, moved / copied)
        bound = "products" if macs / product > moved / copied else "memory"
        rows.append({"part": name, "macs": macs, "bytes": moved, "milliseconds": milliseconds, "floor": floor, "bound": bound})
        print(
            f"{name:14} {macs / args.batch_size / 1e6:9.1f} M multiply-adds, {moved / args.batch_size / 1e6:7.2f} MB an image"
            f" {milliseconds:9.2f} ms, {milliseconds / floor:5.2f} times the floor, set by {bound}"
        )
    total, floors = sum(row["milliseconds"] for row in rows), sum(row["floor"] for row in rows)
    print(f"{'all':14} {total:.2f} ms, {total / floors:.2f} times the floor")
    found = {**conditions(settings), "model": args.model, "settings": vars(settings), "matrix_product": product}
    args.out.mkdir(parents=True, exist_ok=True)
    result = json.dumps({**found, "bytes_copied_a_second": copied, "rows": rows}, indent=2) + "\n"
    form = "-".join([args.model.removeprefix("groupmixformer_"), *(["fused"] if args.fuse else []), args.dtype])
    write_file(args.out / f"roofline-{form}-{found['date']}.json", result.encode())


if __name__ == "__main__":
    main()
