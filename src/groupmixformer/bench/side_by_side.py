"""Speed and memory of models side by side, by their names.

A model's floor is the time that its multiply-adds would take at the speed of one large matrix product, measured in the same
run with the same type and threads: no implementation is faster, and the ratio of floor to time says how near one is.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..files import read_json, to_json
from ..models.checkpoint import model_name
from ..tasks.registry import find_task
from .published import published_top1
from .timing import ENOUGH_FOR_P99, Runner, Settings, clock_name, machine, matrix_speed, measure, set_threads


def create_network(name: str, settings: Settings) -> nn.Module:
    """Create a network of the task over a model of timm."""
    return find_task(settings.task).bench_network(name, settings.size)


def count_macs(name: str, settings: Settings) -> int | None:
    """Count the multiply-adds of the forward pass for one image; none for a detector, where they depend on what is found."""
    if not find_task(settings.task).counts_macs:
        return None
    with torch.device("meta"):
        network = create_network(name, settings).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, *settings.size))
    return counter.get_total_flops() // 2


def conditions(settings: Settings) -> dict[str, Any]:
    """Return what a result depends on besides models and settings: machine, clock, versions; and the date."""
    return {
        "machine": machine(settings),
        "clock": clock_name(settings),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def read_earlier(path: Path, settings: Settings) -> dict[str, float]:
    """Read the milliseconds of each model from an earlier result, which `gmf bench --json` printed.

    Raises:
        ValueError: If it is none, or was measured with other settings, on another machine or with another torch.
    """
    try:
        earlier = read_json(path)
        versions = {"torch": earlier["versions"]["torch"]}
        then = {**earlier["settings"], "machine": earlier["machine"], "clock": earlier["clock"], **versions}
        milliseconds = {row["model"]: float(row["milliseconds"]) for row in earlier["rows"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a result of gmf bench --json") from error
    here = conditions(settings)
    settings_now = json.loads(to_json(asdict(settings)))  # with lists for tuples, as in the file
    now = {**settings_now, "machine": here["machine"], "clock": here["clock"], "torch": here["versions"]["torch"]}
    differences = [
        f"{key} {then.get(key, 'unknown')} there and {now.get(key, 'unknown')} here"
        for key in {**then, **now}
        if then.get(key, "unknown") != now.get(key, "unknown")
    ]
    if differences:
        raise ValueError(f"{path} cannot be compared with: {'; '.join(differences)}")
    return milliseconds


def bench(
    models: Sequence[str],
    settings: Settings,
    progress: Callable[..., Any] = lambda items, *_: items,
    earlier: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Measure models side by side.

    Args:
        models: Variants or names of timm; the first is what the others are compared with.
        settings: What they share.
        progress: Wraps the iterators over models and rounds, to show a progress bar.
        earlier: Milliseconds of models in an earlier result.

    Returns:
        The settings, machine, clock and versions, and for each model a row: what `measure` returns and macs of a forward pass
        before fusing, floor (its milliseconds) and of_floor (its share of the time; inference alone), published_top1, change
        (how many times as fast as in the earlier result).

    Raises:
        ValueError: If there is no such model, or it cannot be run like this.
    """
    names = [model_name(model) for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"got {', '.join(names)}, expected each model once")
    if settings.fuse and settings.train:
        raise ValueError("the fused form is for inference alone: measure training without it")
    if settings.fuse and not any(name.startswith("groupmixformer_") for name in names):
        raise ValueError(f"got {', '.join(names)}, expected a GroupMixFormer, the only one that can be fused")
    with set_threads(settings.threads):
        product = matrix_speed(settings)

    def build(name: str) -> Runner:
        torch.manual_seed(0)
        return Runner(create_network(name, settings), settings)

    rows = measure({name: partial(build, name) for name in names}, settings, progress)
    for row in rows:
        macs = count_macs(row["model"], settings)
        floor = 1000 * macs * settings.batch_size / product if macs and not settings.train else None
        before = (earlier or {}).get(row["model"])
        row |= {
            "macs": macs,
            "floor": floor,
            "of_floor": floor / row["milliseconds"] if floor else None,
            "published_top1": published_top1(row["model"]) if find_task(settings.task).published else None,
            "change": before / row["milliseconds"] if before else None,
        }
    return {"settings": asdict(settings), **conditions(settings), "matrix_product": product, "rows": rows}


def headline(result: Mapping[str, Any]) -> str:
    """Return a line with what was measured, and on which machine."""
    settings = result["settings"]
    forms = [settings["dtype"]]
    forms += ["GroupMixFormers fused"] if settings["fuse"] else []
    forms += [f"compiled ({settings['compile']})"] if settings["compile"] else []
    return (
        f"{settings['task']}, {'training step' if settings['train'] else 'inference'}, batch {settings['batch_size']} of "
        f"{settings['size'][0]} x {settings['size'][1]}, {', '.join(forms)}; {result['machine']}, {result['clock']}; "
        f"torch {result['versions']['torch']}"
    )


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def table(result: dict[str, Any]) -> str:
    """Format the result of `bench` as a table."""
    rows, settings = result["rows"], result["settings"]
    latencies = [f"{'p50 ms':>10}{'p99 ms':>10}{'n':>5}"] if any(row["latency_steps"] for row in rows) else []
    changes = [f"{'change':>9}"] if any(row["change"] for row in rows) else []
    titles = (
        f"{'model':32}{'images/s':>10}{'ms':>10}{'quartiles':>18}{'speed-up':>10}{'memory':>12}{'MACs':>10}{'of floor':>10}"
    )
    lines = [headline(result), "".join([titles, *latencies, *changes])]
    for row in rows:
        spread = f"{row['milliseconds_low']:.1f} to {row['milliseconds_high']:.1f}"
        line = (
            f"{row['model']:32}{row['images_per_second']:>10.2f}{row['milliseconds']:>10.1f}{spread:>18}"
            f"{row['speed_up']:>9.2f}x{_cell(row['peak_memory'], ',.0f', ' MiB'):>12}"
            f"{_cell(row['macs'] and row['macs'] / 1e9, '.2f', ' G'):>10}{_cell(row['of_floor'], '.0%'):>10}"
        )
        if latencies:
            line += f"{_cell(row['latency_p50'], '.1f'):>10}{_cell(row['latency_p99'], '.1f'):>10}{row['latency_steps']:>5}"
        lines.append(line + (f"{_cell(row['change'], '.2f', 'x'):>9}" if changes else ""))
    if latencies:
        lines.append(f"p50 and p99: latency of a single image in wall-clock time over n steps; p99 from {ENOUGH_FOR_P99} steps")
    if changes:
        lines.append("change: earlier median / median now; above 1 is faster than then")
    plain = [row["model"] for row in rows if not row["fused"]]
    if settings["fuse"] and plain:
        lines.append(f"not fused, as no GroupMixFormer: {', '.join(plain)}")
    return "\n".join(lines)
