"""Every form of GroupMixFormer beside the way that the authors' release computes, and beside its peers, in turns.

python benchmarks/forms.py [--sections forms variants training]   # needs birder; writes benchmarks/results/forms-DATE.json

python benchmarks/forms.py --show benchmarks/results/forms-DATE.json      # prints its tables as docs/speed.md has them

With settings of glibc's malloc in the environment, such as MALLOC_TRIM_THRESHOLD_, it writes forms-malloc-DATE.json.

On one CPU thread at 224 x 224. birder's eager float32 stands for the release, which computes in the same way, and is what
speed-ups are over. Each row of ours comes with its error: the relative difference of its logits from those of the same weights,
eager in float64 (norms have random statistics, so that folding them changes something).

- forms: small and its peers, batch 4, eager, fused, compiled, in float32 and bfloat16. Compiling takes about a minute a row.
- single: the same for small alone with one image.
- variants: the others that birder has, batches of 1 and 4, eager and fused.
- training: a step, with what the process grows by, measured in a process of its own three times, and the peak of its tensors.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import birder
import timm
import torch
from birder.model_registry import registry
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import groupmixformer
from groupmixformer.bench.published import published_top1
from groupmixformer.bench.side_by_side import conditions, count_macs
from groupmixformer.bench.timing import Runner, Settings, matrix_speed, measure
from groupmixformer.files import write_file

BIRDER = {"mobile": "mobile", "tiny": "t", "small": "s", "base": "b", "large": "l"}
PEERS = ["coat_lite_small", "swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2", "davit_tiny", "gcvit_tiny"]
FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "fused": {"fuse": True},
    "compiled": {"compile": "default"},
    "fused, compiled": {"fuse": True, "compile": "default"},
    "bf16": {"dtype": "bf16"},
    "bf16, fused": {"dtype": "bf16", "fuse": True},
    "bf16, compiled": {"dtype": "bf16", "compile": "default"},
    "bf16, fused, compiled": {"dtype": "bf16", "fuse": True, "compile": "default"},
}
MILLISECONDS = ("milliseconds_low", "milliseconds", "milliseconds_high")
Builds = dict[str, Callable[[], Runner]]


class Checked(Runner):
    """A form of ours that knows how far its logits are from the plain network's in float64, of the first images."""

    error: float | None = None  # in training there are no logits to compare

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        self.exact = None if settings.train else copy.deepcopy(network).to(settings.device).double().eval()
        super().__init__(network, settings)

    def warm_up(self) -> None:
        super().warm_up()
        if self.exact is not None:
            with torch.no_grad():
                expected = self.exact(self.inputs[:4].double())
                self.error = ((self.forward(self.inputs)[:4].double() - expected).norm() / expected.norm()).item()
        self.exact = None


def ours(variant: str, settings: Settings, checkpointing: bool = False, kind: type[Runner] = Checked) -> Runner:
    torch.manual_seed(0)
    model = timm.create_model(f"groupmixformer_{variant}")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model.set_grad_checkpointing(checkpointing)
    return kind(model, settings)


def released(variant: str, settings: Settings) -> nn.Module:
    """birder's network, in contiguous memory, without stochastic depth, which ours has not by default either."""
    name = f"groupmixformer_{BIRDER[variant.removesuffix('_384')]}"
    network: nn.Module = registry.net_factory(name, 1000, 3, size=settings.size, config={"drop_path_rate": 0.0})
    return network


def release(variant: str, settings: Settings) -> Runner:
    return Runner(released(variant, settings), settings)


def peer(name: str, settings: Settings) -> Runner:
    return Runner(timm.create_model(name), settings)


def on_device(runner: Runner) -> dict[str, float]:
    """Milliseconds that a GPU works in a step, and on how many kernels. What a step takes beyond it waits for Python."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        runner.step()
        torch.accelerator.synchronize()
    found = [e for e in recorded.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return {"device_milliseconds": sum(e.self_device_time_total for e in found) / 1000, "kernels": sum(e.count for e in found)}


def run(builds: Builds, settings: Settings, progress: Callable[..., Any] = lambda items, *_: items) -> list[dict[str, Any]]:
    """Measure, and add errors and accuracies, and what is known of a GPU's own time."""
    runners = {}

    def kept(label: str) -> Runner:
        runners[label] = builds[label]()
        return runners[label]

    rows = measure({label: partial(kept, label) for label in builds}, settings, progress)
    for row in rows:
        name = row["model"].split(",")[0]
        row |= on_device(runners[row["model"]]) if settings.device != "cpu" else {}
        row["error"] = getattr(runners[row["model"]], "error", None)
        row["published_top1"] = published_top1(name)
        error = "" if row["error"] is None else f", error {row['error']:.1e}"
        print(f"  {row['model']:48} {row['milliseconds']:8.1f} ms {row['speed_up']:6.2f}x{error}", flush=True)
    return rows


def forms(settings: Settings, peers: list[str]) -> list[dict[str, Any]]:
    plain = Settings(**{**vars(settings), "channels_last": False})
    builds: Builds = {"birder_small, eager": partial(release, "small", plain)}
    builds["birder_small, bf16"] = partial(release, "small", Settings(**{**vars(plain), "dtype": "bf16"}))
    for form, changes in FORMS.items():
        builds[f"groupmixformer_small, {form}"] = partial(ours, "small", Settings(**{**vars(settings), **changes}))
    for name in peers:
        for form in ("eager", "compiled", "bf16", "bf16, compiled"):
            builds[f"{name}, {form}"] = partial(peer, name, Settings(**{**vars(settings), **FORMS[form]}))
    return run(builds, settings)


def variants(settings: Settings, chosen: list[str]) -> list[dict[str, Any]]:
    rows = []
    for variant in chosen:
        plain = Settings(**{**vars(settings), "channels_last": False})
        builds: Builds = {f"birder_{variant}, eager": partial(release, variant, plain)}
        for form in ("eager", "fused", "bf16, fused"):
            builds[f"groupmixformer_{variant}, {form}"] = partial(ours, variant, Settings(**{**vars(settings), **FORMS[form]}))
        rows += run(builds, settings)
    return rows


def peak_memory(build: Callable[[], Runner], settings: Settings) -> float | None:
    """MiB of one step, in a process in which nothing else has left its traces."""
    (row,) = measure({"step": build}, Settings(**{**vars(settings), "rounds": 1, "seconds": 0.0}))
    return row["peak_memory"]


def tensor_memory(build: Callable[[], Runner]) -> float:
    """MiB of tensors at the peak of a step, beside those that are always there: what PyTorch counts on an accelerator."""
    runner = build()
    runner.warm_up()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        runner.step()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def training(settings: Settings, chosen: list[str]) -> list[dict[str, Any]]:
    rows = []
    for variant in chosen:
        plain = Settings(**{**vars(settings), "channels_last": False})
        builds: Builds = {
            f"birder_{variant}": partial(release, variant, plain),
            f"groupmixformer_{variant}": partial(ours, variant, settings),
            f"groupmixformer_{variant}, checkpointing": partial(ours, variant, settings, True),
        }
        found = run(builds, settings)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            for row in found:
                peaks = [pool.submit(peak_memory, builds[row["model"]], settings).result() for _ in range(3)]
                row["peak_memory"] = statistics.median(peaks) if None not in peaks else None
                row["memory_ratio"] = row["peak_memory"] / found[0]["peak_memory"] if None not in peaks else None
                row["tensor_memory"] = tensor_memory(builds[row["model"]])
                row["tensor_ratio"] = row["tensor_memory"] / found[0]["tensor_memory"]
                print(f"  {row['model']:48} {row['peak_memory']:8.0f} MiB {row['memory_ratio']:6.2f}", end="")
                print(f", tensors {row['tensor_memory']:8.0f} MiB {row['tensor_ratio']:6.2f}", flush=True)
        rows += found
    return rows


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the tables. The floor is the time of a model's multiply-adds in one large matrix product, as measured last."""
    for section, rows in result["sections"].items():
        batch, memory = int(section.split("batch ")[1]), "memory_ratio" in rows[0]
        yield f"\n{section}:\n"
        columns = (
            ["process", "of birder's", "tensors", "of birder's"]
            if memory
            else ["share of floor", "error", "published top-1 (%)"]
        )
        yield "| | milliseconds (quartiles) | speed-up | " + " | ".join(columns) + " |"
        yield "|---" * (3 + len(columns)) + "|"
        for row in rows:
            label = row["model"]
            low, median, high = (f"{row[key]:.3g}" if row[key] < 100 else f"{row[key]:.0f}" for key in MILLISECONDS)
            if memory:
                cells = [f"{row['peak_memory']:,.0f} MiB", f"{row['memory_ratio']:.2f}"]
                cells += [f"{row['tensor_memory']:,.0f} MiB", f"{row['tensor_ratio']:.2f}"]
            else:
                macs = count_macs(label.split(",")[0].replace("birder", "groupmixformer"), Settings())
                floor = 1000 * macs * batch / result["matrix_product"]["bf16" if "bf16" in label else "fp32"]
                error = f"{row['error']:.0e}".replace("e-0", "e-") if row["error"] is not None else ""
                cells = [f"{floor / row['milliseconds']:.0%}", error, str(row["published_top1"] or "")]
            name = label.replace("groupmixformer_", "").replace("_patch4_window7_224", "")
            yield f"| {name} | {median} ({low} to {high}) | {row['speed_up']:.2f}x | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["forms", "single", "variants", "training"]
    parser.add_argument("--sections", nargs="+", choices=names, default=names, help="default: all, about an hour")
    parser.add_argument("--variants", nargs="+", choices=BIRDER, default=list(BIRDER), help="of variants and training")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a result, and measure nothing")
    args = parser.parse_args()
    if args.show:
        print("\n".join(show(json.loads(args.show.read_text()))))
        return
    torch.set_num_threads(1)
    four = Settings(batch_size=4, rounds=args.rounds)
    one = Settings(batch_size=1, rounds=args.rounds)
    train = Settings(batch_size=4, rounds=args.rounds, train=True)
    work = {
        "forms": [("batch 4", lambda: forms(four, PEERS))],
        "single": [("batch 1", lambda: forms(one, []))],
        "variants": [("batch 1", lambda: variants(one, args.variants)), ("batch 4", lambda: variants(four, args.variants))],
        "training": [("batch 4", lambda: training(train, args.variants))],
    }
    found = conditions(four)
    found["versions"] |= {"groupmixformer": groupmixformer.__version__, "birder": birder.__version__}
    found["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    path = args.out / f"forms{'-malloc' if found['malloc'] else ''}-{found['date']}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = {key: earlier.get(key) for key in found} == found  # sections of one day on one machine share a file
    result = {**found, "sections": earlier["sections"] if same else {}}
    result["matrix_product"] = {dtype: matrix_speed(Settings(dtype=dtype)) for dtype in ("fp32", "bf16")}
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        for conditions_of, function in work[section]:
            print(f"{section}, {conditions_of}", flush=True)
            result["sections"][f"{section}, {conditions_of}"] = function()
            write_file(path, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
