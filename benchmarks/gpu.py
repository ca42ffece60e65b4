"""Inference and training in bfloat16 on a GPU, beside birder, which computes as the release does, and beside peers, in turns.

python benchmarks/gpu.py [--minutes 8]   # needs birder; writes benchmarks/results/gpu-DATE.json
python benchmarks/gpu.py --device cpu --only "mobile, inference, 224, batch 1"   # tries the script itself

A comparison is of one variant, task, size and batch, such as "small, training, 224, batch 128"; its forms take turns. A GPU may
be at hand for minutes, so comparisons come by importance, each is written when it is done, those that are in the file are not
run again, and none starts when the minutes are over: run it again to go on.

birder runs under autocast, as the release trains; speed-ups are over it, or over the first row where birder has no such
variant. Inference has bfloat16 weights and comes with its error: the relative difference of the logits from the same weights in
float64. "kernels" are those of kernels.py, eager; "reduce-overhead" has CUDA graphs.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import birder
import torch
from forms import PEERS, Builds, Checked, ours, released, run
from torch import nn

import groupmixformer
from groupmixformer import kernels
from groupmixformer.bench import conditions, create_network
from groupmixformer.files import write_file
from groupmixformer.speed import Runner, Settings, matrix_speed


class Autocast(Runner):
    """Keeps float32 weights in inference too."""

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__(network, replace(settings, dtype="fp32"))
        self.settings, self.autocast = settings, True


class WithKernels(Checked):
    """Takes the fused kernels, which the network does not by itself."""

    def forward(self, inputs: Any) -> Any:
        kernels.WANTED = True
        try:
            return super().forward(inputs)
        finally:
            kernels.WANTED = False


def release(variant: str, settings: Settings) -> Runner:
    return Autocast(released(variant, settings), replace(settings, channels_last=False))


def peer(name: str, settings: Settings) -> Runner:
    return Runner(create_network(name, settings), settings)


def forms_of(variant: str, settings: Settings, modes: tuple[str, ...], peers: list[str]) -> Builds:
    """The rows of a comparison: birder, eager forms, compiled forms by mode, peers eager and compiled."""
    builds: Builds = {f"birder_{variant}, eager": partial(release, variant, settings)}
    name = f"groupmixformer_{variant}"
    builds[f"{name}, eager"] = partial(ours, variant, settings)
    if kernels.served(torch.empty(0, device=settings.device)):
        builds[f"{name}, kernels"] = partial(ours, variant, settings, kind=WithKernels)
    best = settings if settings.train else replace(settings, fuse=True)
    if not settings.train:
        builds[f"{name}, fused"] = partial(ours, variant, best)
    for mode in modes:
        builds[f"{name}, {'' if settings.train else 'fused, '}{mode}"] = partial(ours, variant, replace(best, compile=mode))
    for other in peers:
        builds[f"{other}, eager"] = partial(peer, other, settings)
        builds[f"{other}, {modes[0]}"] = partial(peer, other, replace(settings, compile=modes[0]))
    return builds


def comparisons(device: str, rounds: int) -> Iterator[tuple[str, Settings, Callable[[Settings], Builds]]]:
    """Name, settings and rows of each, by importance."""

    def one(
        variant: str, train: bool, size: int, batch: int, modes: tuple[str, ...] = ("default",), peers: list[str] | None = None
    ) -> tuple[str, Settings, Callable[[Settings], Builds]]:
        name = f"{variant}, {'training' if train else 'inference'}, {size}, batch {batch}"
        name += f", {modes[0]}" if modes[0] != "default" else ""
        settings = Settings(
            train=train, size=(size, size), batch_size=batch, dtype="bf16", device=device, rounds=rounds, seconds=0.1
        )
        return name, settings, lambda settings: forms_of(variant, settings, modes, peers or [])

    graphs = ("default", "reduce-overhead")
    yield one("small", False, 224, 128, graphs, ["coat_lite_small"])
    yield one("small", True, 224, 128, graphs, ["coat_lite_small"])
    yield one("small", False, 224, 1, graphs, ["coat_lite_small"])
    for train in (False, True):
        for variant in ("mobile", "tiny", "base"):
            yield one(variant, train, 224, 128)
    yield one("small", False, 224, 128, ("max-autotune",))
    for batch in (128, 1):
        yield one("small", False, 224, batch, ("default",), PEERS[1:])
    for variant in ("small", "base", "large_384"):
        yield one(variant, False, 384, 128)
    yield one("small", True, 224, 128, ("max-autotune",))
    for variant in ("small", "base", "large_384"):
        yield one(variant, True, 384, 32)
    for variant in ("mobile", "tiny", "base", "large"):
        yield one(variant, False, 224, 1, graphs)
    yield one("large", False, 224, 128)
    yield one("large", True, 224, 128)
    yield one("small", True, 224, 128, ("default",), PEERS[1:])
    for variant in ("mobile", "tiny"):
        for train in (False, True):
            yield one(variant, train, 384, 128)
    for variant in ("small", "base", "large_384"):
        yield one(variant, False, 384, 1, graphs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no comparison after so many")
    names = [name for name, *_ in comparisons("cpu", 1)]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="comparisons, by their full names"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    start = time.monotonic()
    torch.set_float32_matmul_precision("high")  # as anyone would on a GPU; bfloat16 is not touched by it
    found = conditions(Settings(dtype="bf16", device=args.device))
    found["versions"] |= {"groupmixformer": groupmixformer.__version__, "birder": birder.__version__}
    path = args.out / f"gpu-{found['date']}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = {key: earlier.get(key) for key in found} == found
    result = earlier if same else {**found, "comparisons": {}}
    result["matrix_product"] = matrix_speed(Settings(dtype="bf16", device=args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    left = 0
    for name, settings, builds in comparisons(args.device, args.rounds):
        if name not in args.only or name in result["comparisons"]:
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left += 1
            continue
        print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
        torch.compiler.reset()
        try:
            rows: Any = run(builds(settings), settings)
        except ValueError as error:  # it says which row, such as one that needs more memory than there is
            print(f"  {error}", flush=True)
            rows = str(error)
        result["comparisons"][name] = rows
        write_file(path, (json.dumps(result, indent=2) + "\n").encode())
        if args.device != "cpu":
            torch.accelerator.empty_cache()
    print(f"{len(result['comparisons'])} comparisons in {path}, {left} left for another run")


if __name__ == "__main__":
    main()
