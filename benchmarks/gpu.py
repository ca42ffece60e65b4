"""Inference and training in bfloat16 on a GPU, beside birder, which computes as the release does, and beside peers, in turns.

python benchmarks/gpu.py [--minutes 8] [--jobs 4]   # needs birder; writes benchmarks/results/gpu-DATE.json
python benchmarks/gpu.py --device cpu --only "mobile, inference, 224, batch 1, eager"   # tries the script itself

A comparison is of one variant, task, size and batch, such as "small, training, 224, batch 128"; its forms take turns. A GPU may
be at hand for minutes, so comparisons come by importance, each is written when it is done, those that are in the file are not
run again, and none starts when the minutes are over: run it again to go on.

birder runs under autocast, as the release trains; speed-ups are over it. Inference has bfloat16 weights and comes with its
error: the relative difference of the logits from the same weights in float64. "plain" does without the kernels, which the fused
form alone has; "reduce-overhead" has CUDA graphs; "by block" compiles each block by itself, of which those of a stage share the
result.

Compiling takes minutes: with --jobs several comparisons compile at a time.
"""

import argparse
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import birder
import torch
from forms import PEERS, Builds, Checked, ours, released, run
from torch import nn

import groupmixformer
from groupmixformer.bench.side_by_side import conditions, create_network
from groupmixformer.bench.timing import Runner, Settings, matrix_speed
from groupmixformer.files import write_file
from groupmixformer.ops import dispatch

BLOCKS = "by block"


class Autocast(Runner):
    """Keeps float32 weights in inference too."""

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__(network, replace(settings, dtype="fp32"))
        self.settings, self.autocast = settings, True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    before, dispatch.ENABLED = dispatch.ENABLED, False
    try:
        yield
    finally:
        dispatch.ENABLED = before


class Plain(Checked):
    """Is fused, compiled and run without the kernels."""

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        with without_kernels():
            super().__init__(network, settings)

    def forward(self, inputs: Any) -> Any:
        with without_kernels():
            return super().forward(inputs)


class ByBlock(Checked):
    """Compiles the blocks, which make up the network but for stem, patch embeddings and head."""

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__(network, settings)
        for block in (block for stage in self.network.stages for block in stage.blocks):
            block.compile(dynamic=False)


def release(variant: str, settings: Settings) -> Runner:
    return Autocast(released(variant, settings), replace(settings, channels_last=False))


def peer(name: str, settings: Settings) -> Runner:
    return Runner(create_network(name, settings), settings)


def forms_of(variant: str, settings: Settings, modes: tuple[str, ...], plain: bool, peers: list[str]) -> Builds:
    """The rows of a comparison: birder, eager forms, compiled forms by mode, peers eager and compiled."""
    builds: Builds = {f"birder_{variant}, eager": partial(release, variant, settings)}
    name = f"groupmixformer_{variant}"
    best = settings if settings.train else replace(settings, fuse=True)
    forms = {"eager": settings}
    if not settings.train:
        forms["fused"] = best
    for mode in modes:
        forms[mode if settings.train else f"fused, {mode}"] = best if mode == BLOCKS else replace(best, compile=mode)
    for form, its in forms.items():
        builds[f"{name}, {form}"] = partial(ours, variant, its, kind=ByBlock if BLOCKS in form else Checked)
        if plain and its.fuse:
            builds[f"{name}, {form}, plain"] = partial(ours, variant, its, kind=Plain)
    for other in peers:
        builds[f"{other}, eager"] = partial(peer, other, settings)
        for mode in (mode for mode in modes if mode != BLOCKS):
            builds[f"{other}, {mode}"] = partial(peer, other, replace(settings, compile=mode))
    return builds


def comparisons(device: str, rounds: int) -> Iterator[tuple[str, Settings, Callable[[Settings], Builds]]]:
    """Name, settings and rows of each, by importance."""

    def one(
        variant: str, train: bool, size: int, batch: int, modes: tuple[str, ...] = (), plain: bool = False,
        peers: list[str] | None = None,
    ) -> tuple[str, Settings, Callable[[Settings], Builds]]:  # fmt: skip
        name = ", ".join([variant, "training" if train else "inference", f"{size}, batch {batch}", *(modes or ["eager"])])
        name += ", peers" if peers else ""
        settings = Settings(
            train=train, size=(size, size), batch_size=batch, dtype="bf16", device=device, rounds=rounds, seconds=0.1
        )
        return name, settings, lambda settings: forms_of(variant, settings, modes, plain, peers or [])

    compiled, graphs, tuned = ("default",), ("reduce-overhead",), ("max-autotune",)
    yield one("small", False, 224, 128, graphs, plain=True)
    yield one("small", True, 224, 128, (BLOCKS,))
    for batch in (128, 1):
        yield one("small", False, 224, batch, plain=True, peers=PEERS)
    yield one("small", True, 224, 128, peers=PEERS)
    yield one("small", False, 224, 1, graphs, plain=True)
    for train in (False, True):
        for variant in ("mobile", "tiny", "base"):
            yield one(variant, train, 224, 128)
    for variant in ("small", "base", "large_384"):
        yield one(variant, False, 384, 128)
        yield one(variant, True, 384, 32)
    for variant in ("mobile", "tiny", "base", "large"):
        yield one(variant, False, 224, 1)
    yield one("large", False, 224, 128)
    yield one("large", True, 224, 128)
    for train in (False, True):
        yield one("mobile", train, 224, 128, graphs if not train else compiled)
        yield one("small", train, 224, 128, graphs if not train else compiled, peers=PEERS[:1])
    yield one("small", False, 224, 128, tuned)
    yield one("small", True, 224, 128, tuned)
    for variant in ("tiny", "base", "large"):
        yield one(variant, False, 224, 128, graphs)
        yield one(variant, False, 224, 1, graphs)
        yield one(variant, True, 224, 128, compiled)
    for variant in ("mobile", "tiny"):
        for train in (False, True):
            yield one(variant, train, 384, 128)
    for variant in ("small", "base", "large_384"):
        yield one(variant, False, 384, 1)


class Turns:
    """Lets comparisons in processes of their own compile together, and be measured one at a time with nothing else running."""

    held = False

    def __init__(self, context: Any, number: int) -> None:
        self.ready, self.turn = context.Barrier(number), context.Lock()

    def __call__(self, items: Any, what: str) -> Any:
        if what == "measuring":
            with contextlib.suppress(threading.BrokenBarrierError):  # another one failed, and no longer waits
                self.ready.wait()
            self.turn.acquire()
            self.held = True
        return items

    def end(self) -> None:
        if self.held:
            self.turn.release()
        else:
            self.ready.abort()
        self.held = False


turns: Turns | None = None  # of a process beside others


def _take_part(of: Turns) -> None:
    global turns
    turns = of


def compare(name: str, device: str, rounds: int) -> Any:
    """Rows of a comparison, or what went wrong."""
    torch.set_float32_matmul_precision("high")  # as anyone would on a GPU; bfloat16 is not touched by it
    torch._dynamo.config.recompile_limit = 64  # blocks of all stages and rows are one function
    torch.compiler.reset()
    settings, builds = next((settings, builds) for its, settings, builds in comparisons(device, rounds) if its == name)
    try:
        result: Any = run(builds(settings), settings, turns or (lambda items, *_: items))
    except ValueError as error:  # it says which row, such as one that needs more memory than there is
        print(f"  {error}", flush=True)
        result = str(error)
    finally:
        if turns:
            turns.end()
    if device != "cpu":
        torch.accelerator.empty_cache()
    return result


def compare_all(names: list[str], device: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Compare, several side by side in processes of their own that compile together and measure in turns."""
    if len(names) == 1:
        yield names[0], compare(names[0], device, rounds)
        return
    context = get_context("spawn")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(names)))
    with ProcessPoolExecutor(len(names), context, _take_part, (Turns(context, len(names)),)) as pool:
        futures = {pool.submit(compare, name, device, rounds): name for name in names}
        for future in as_completed(futures):
            yield futures[future], future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no comparison after so many")
    names = [name for name, *_ in comparisons("cpu", 1)]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help="comparisons, by their full names"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="so many comparisons compile at a time; they are measured in turns")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    start = time.monotonic()
    found = conditions(Settings(dtype="bf16", device=args.device))
    found["versions"] |= {"groupmixformer": groupmixformer.__version__, "birder": birder.__version__}
    path = args.out / f"gpu-{found['date']}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = {key: earlier.get(key) for key in found} == found
    result = earlier if same else {**found, "comparisons": {}}
    result["matrix_product"] = matrix_speed(Settings(dtype="bf16", device=args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if name in args.only and name not in result["comparisons"]]
    while left and time.monotonic() - start <= 60 * args.minutes:
        group, left = left[: args.jobs], left[args.jobs :]
        print(f"{'; '.join(group)} ({time.monotonic() - start:.0f} s)", flush=True)
        for name, rows in compare_all(group, args.device, args.rounds):
            result["comparisons"][name] = rows
            write_file(path, (json.dumps(result, indent=2) + "\n").encode())
    print(f"{len(result['comparisons'])} comparisons in {path}, {len(left)} left for another run")


if __name__ == "__main__":
    main()
