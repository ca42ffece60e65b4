"""Time and peak memory against the side of the image, for a variant beside a plain ViT of about equal multiply-adds at 224.

python benchmarks/scaling.py [--model mobile] [--sides 128 192 ...]   # writes benchmarks/results/scaling-DATE.json and .svg

Batch 1 in fp32 on one CPU thread, inference and a training step; the three networks of a side take turns. The ViT runs twice:
with PyTorch's fused attention, whose memory is linear in the tokens and whose time is quadratic, and with the matrix of all
pairs of tokens written out. A point is left out, with the reason, if by the growth so far it does not fit memory or LIMIT.
"""

import argparse
import itertools
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure

import groupmixformer
from groupmixformer.bench.side_by_side import conditions, count_macs, create_network
from groupmixformer.bench.timing import Runner, Settings, measure
from groupmixformer.files import write_file
from groupmixformer.models.checkpoint import model_name
from groupmixformer.visual.figures import BLUE, ORANGE, write_figure

VIT = "vit_tiny_patch16_224"
SIDES = (128, 192, 256, 384, 512, 768, 1024, 1536)
MODES = ("inference", "training")
LIMIT = 300.0  # seconds for a point
GREEN = "#009E73"  # of Okabe and Ito's palette, as the others


def build(name: str, fused_attention: bool, settings: Settings) -> Runner:
    timm.layers.set_fused_attn(fused_attention)  # read when layers are made
    try:
        return Runner(create_network(name, settings), settings)
    finally:
        timm.layers.set_fused_attn(True)


def available_memory() -> float | None:
    """MiB that programs can still get; none where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable")), None)


def extrapolate(values: dict[int, float], side: int) -> float:
    """Continue what grows with a power of the pixels: as between the last two sides, squared where there is one."""
    *before, last = sorted(values)
    power = 2.0
    if before and values[before[-1]] > 0 and values[last] > 0:
        power = math.log(values[last] / values[before[-1]]) / math.log(last / before[-1]) / 2
    return values[last] * (side / last) ** (2 * min(max(power, 1.0), 2.0))


def too_large(done: list[dict[str, Any]], side: int, rounds: int) -> str | None:
    """Say why a point is left out, judged by the smaller ones of its model; none if it is measured."""
    if not done:
        return None
    peaks = {row["side"]: row["peak_memory"] for row in done if row["peak_memory"] is not None}
    available = available_memory()
    if peaks and available is not None and (needed := 1.2 * extrapolate(peaks, side)) > available:
        return f"needs about {needed:,.0f} MiB, {available:,.0f} are available"
    step = extrapolate({row["side"]: row["milliseconds"] / 1000 for row in done}, side)
    if (seconds := (rounds + 3) * step) > LIMIT:  # two steps warm up and one or more measure latency
        return f"takes about {seconds:,.0f} s, the limit is {LIMIT:,.0f}"
    return None


def exponent(rows: list[dict[str, Any]], key: str) -> float | None:
    """The power of the tokens that the last four sides grow with; none if fewer than two were measured."""
    points = [(math.log(row["side"] ** 2), math.log(row[key])) for row in rows[-4:] if (row[key] or 0) > 0]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


Curves = dict[tuple[str, str], list[dict[str, Any]]]


def draw(curves: Curves, title: str) -> Figure:
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = {"milliseconds": "milliseconds of a step", "peak_memory": "peak memory of a step (MiB)"}
    for axes, (key, name) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        colors = dict(zip(dict.fromkeys(label for label, _ in curves), (BLUE, ORANGE, GREEN), strict=True))
        for (label, mode), rows in curves.items():
            shown, power = [row for row in rows if (row[key] or 0) > 0], exponent(rows, key)
            growth = "" if power is None else f": tokens$^{{{power:.2f}}}$"
            style = {"marker": "o", "linestyle": "-"} if mode == "inference" else {"marker": "^", "linestyle": "--"}
            sides, values = [row["side"] for row in shown], [row[key] for row in shown]
            axes.plot(sides, values, color=colors[label], label=f"{label}, {mode}{growth}", **style)
        axes.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel=name)
        ticks = sorted({row["side"] for rows in curves.values() for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def write(out: Path, settings: Settings, curves: Curves, skipped: list[dict[str, Any]]) -> None:
    found = conditions(settings)
    found["versions"]["groupmixformer"] = groupmixformer.__version__
    growth = [
        {"model": label, "mode": mode, **{key: exponent(rows, key) for key in ("milliseconds", "peak_memory")}}
        for (label, mode), rows in curves.items()
    ]
    result = {**found, "rows": list(itertools.chain(*curves.values())), "exponents_in_tokens": growth, "skipped": skipped}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / f"scaling-{found['date']}.json", (json.dumps(result, indent=2) + "\n").encode())
    title = (
        f"Batch 1, fp32, {found['date']}; {found['machine']}, {found['clock']}; torch {torch.__version__}; "
        "exponents are fitted to the last four sides"
    )
    write_figure(draw(curves, title), out / f"scaling-{found['date']}.svg")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_name, default=model_name("mobile"))
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    networks = {args.model: (args.model, True), f"{VIT}, fused": (VIT, True), f"{VIT}, explicit": (VIT, False)}
    curves: Curves = {(label, mode): [] for label in networks for mode in MODES}
    skipped = []
    for side, mode in itertools.product(sorted(args.sides), MODES):
        settings = Settings(train=mode == "training", size=(side, side), rounds=args.rounds)
        builds = {}
        for label, (name, fused) in networks.items():
            if reason := too_large(curves[label, mode], side, args.rounds):
                skipped.append({"model": label, "mode": mode, "side": side, "reason": reason})
                print(f"{label}, {mode}, {side}: left out, {reason}", flush=True)
            else:
                builds[label] = partial(build, name, fused, settings)
        for row in measure(builds, settings):
            macs = count_macs(networks[row["model"]][0], settings)
            curves[row["model"], mode].append({"mode": mode, "side": side, **row, "macs": macs})
            memory = "unknown" if row["peak_memory"] is None else f"{row['peak_memory']:.0f} MiB"
            print(f"{row['model']}, {mode}, {side}: {row['milliseconds']:.1f} ms, {memory}", flush=True)
        write(args.out, settings, curves, skipped)  # a run that is stopped keeps what it has


if __name__ == "__main__":
    main()
