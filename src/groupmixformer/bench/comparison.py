"""What the runs of a comparison say: table, significance, curves, Pareto front; as a page, CSV, JSON, Markdown and LaTeX."""

import html
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from timm.utils.misc import natural_key

from ..files import printable, read_json, read_text, short, to_json, write_file, write_rows
from ..run_folder import RECIPE, read_metrics
from ..visual.charts import new_axes
from ..visual.figures import BLUE, COLORS, tip
from ..visual.page import Block, Chart, Table, html_head, html_page, html_section
from .beyond import read_beyond
from .compare import OUTCOME, SPEED, Candidate, Plan, is_done, read_predictions

RESAMPLES = 9999
LEVEL = 0.05
MEANS = ("top5", "loss", "calibration_error")


# What a model costs: title and label of the figure, and what one of its units is.
COSTS = {
    "macs": ("MACs", "MACs of an image, in millions", 1e6),
    "parameters": ("parameters", "parameters, in millions", 1e6),
    "milliseconds": ("measured time", "milliseconds an image, inference", 1),
}


def paired_bootstrap(first: NDArray[Any], other: NDArray[Any], seed: int = 0) -> tuple[float, float, float]:
    """Resample images to see how far the difference of two models depends on which images were held out.

    Args:
        first: Whether each image was classified rightly, by seed (S, N).
        other: The same images by the other model, with the same seeds.
        seed: Of the resampling.

    Returns:
        Limits of the 95 % interval of other - first, as shares of 1, and the two-sided p of no difference.
    """
    # Images of equal difference are interchangeable: drawing images is drawing how many there are of each.
    values, counts = np.unique(other.mean(0, dtype=float) - first.mean(0, dtype=float), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    means = draws @ values / counts.sum()
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    rarer = min((means <= 0).sum(), (means >= 0).sum())
    return float(low), float(high), min(1.0, 2 * float(rarer + 1) / (RESAMPLES + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Return the p of several tests, corrected by Holm: any of them is wrongly below a level as rarely as one."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p)[order]).clip(max=1)
    return [float(value) for value in corrected]


def pareto(costs: Sequence[float | None], values: Sequence[float | None]) -> list[bool]:
    """Return for each model whether none that costs as little or less is better."""
    known = [(c, v) for c, v in zip(costs, values, strict=True) if c is not None and v is not None]
    return [
        c is not None and v is not None and not any(c2 <= c and v2 >= v and (c2, v2) != (c, v) for c2, v2 in known)
        for c, v in zip(costs, values, strict=True)
    ]


def _right(plan: Plan, model: Candidate) -> dict[int, dict[int, bool]]:
    """Return by the seed of each run that is done, and the position of the image, whether it was classified rightly."""
    return {
        run.seed: {i: true == found for i, true, found in read_predictions(run)} for run in plan.runs(model) if is_done(run)
    }


def _difference(first: dict[int, dict[int, bool]], other: dict[int, dict[int, bool]], name: str) -> dict[str, Any]:
    seeds = sorted(first.keys() & other.keys())
    result: dict[str, Any] = {"model": name, "n": len(seeds), "by_seed": []}
    if not seeds:
        return result | dict.fromkeys(("difference", "low", "high", "p", "images"))
    positions = sorted(set.intersection(*(set(runs[seed]) for runs in (first, other) for seed in seeds)))
    a, b = (np.array([[runs[seed][i] for i in positions] for seed in seeds]) for runs in (first, other))
    low, high, p = paired_bootstrap(a, b)
    by_seed = (b.mean(1) - a.mean(1)).tolist()
    return result | {
        "difference": float(np.mean(by_seed)), "low": low, "high": high, "p": p, "images": len(positions), "by_seed": by_seed,
    }  # fmt: skip


def _row(plan: Plan, model: Candidate, speed: dict[str, Any]) -> dict[str, Any]:
    done = [run for run in plan.runs(model) if is_done(run)]
    outcomes = [read_json(Path(run.out) / OUTCOME) for run in done]
    top1 = [outcome["top1"] for outcome in outcomes]
    row: dict[str, Any] = {
        "model": model.name, "text": model.text, "matched": model.matched, "options": model.options, "n": len(done),
        "top1": float(np.mean(top1)) if top1 else None,
        "top1_sd": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
        "by_seed": {str(run.seed): value for run, value in zip(done, top1, strict=True)},
        "parameters": model.parameters, "macs": model.macs,
    }  # fmt: skip
    for name in MEANS:
        row[name] = float(np.mean([outcome[name] for outcome in outcomes])) if outcomes else None
    further = [{k: v for part in read_beyond(run).values() for k, v in part.items()} for run in done]
    for name in further[0] if further else ():
        values = [found[name] for found in further if found.get(name) is not None]
        row[name] = float(np.mean(values)) if values else None  # type: ignore[arg-type]
    seconds = [read_metrics(Path(run.out))[-1]["seconds"] for run in done]
    row["training_seconds"] = float(np.mean(seconds)) if seconds else None
    for kind in ("inference", "training"):
        measured: dict[str, Any] = next((found for found in speed.get(kind, ()) if found["model"] == model.name), {})
        row[f"{kind}_images_per_second"] = measured.get("images_per_second")
        row[f"{kind}_memory_mib"] = measured.get("peak_memory")
    return row


def compare(plan: Plan) -> dict[str, Any]:
    """Put the runs of a comparison that are done together.

    Returns:
        settings (recipe, epochs, image_size, match, seeds, conditions of the measurement of speed); models, a row for each;
        pairs, each model against the first; curves, the held-out top-1 of the epochs of each run by model.

    Raises:
        ValueError: If a file of a run cannot be read.
    """
    speed = read_json(plan.folder / SPEED) if (plan.folder / SPEED).is_file() else {}
    rows = [_row(plan, model, speed) for model in plan.models]
    for row in rows:
        row["milliseconds"] = 1000 / found if (found := row["inference_images_per_second"]) else None
    for name in COSTS:
        for row, best in zip(rows, pareto([row[name] for row in rows], [row["top1"] for row in rows]), strict=True):
            row[f"pareto_{name}"] = best and name != plan.match
    right = [_right(plan, model) for model in plan.models]
    pairs = [_difference(right[0], other, model.name) for other, model in zip(right[1:], plan.models[1:], strict=True)]
    tested = [pair for pair in pairs if pair["p"] is not None]
    for pair, p in zip(tested, holm([pair["p"] for pair in tested]), strict=True):
        pair["p_holm"] = p
    curves = {
        model.name: [[row["val_top1"] for row in read_metrics(Path(run.out))] for run in plan.runs(model) if is_done(run)]
        for model in plan.models
    }
    recipe = plan.recipe
    settings: dict[str, Any] = {
        "data": recipe.data,
        "image_size": recipe.image_size,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
    }
    settings |= {"match": plan.match, "seeds": plan.seeds}
    if done := next((run for run in plan.all_runs if is_done(run)), None):
        classes = Counter(true for _, true, _ in read_predictions(done))
        settings["largest_class"] = max(classes.values()) / classes.total()
    settings |= {name: speed[name] for name in ("machine", "clock", "versions", "date") if name in speed}
    return {"settings": settings, "models": rows, "pairs": pairs, "curves": curves}


def headline(result: dict[str, Any]) -> str:
    """Say in a line what was compared."""
    settings = result["settings"]
    matched = {"none": "not matched", "macs": "equal MACs", "parameters": "equal parameters"}[settings["match"]]

    def counted(name: str) -> str:
        return f"{settings[name]} {name if settings[name] != 1 else name.removesuffix('s')}"

    measured = f"; speed: {settings['machine']}, {settings['clock']}, {settings['date']}" if "machine" in settings else ""
    return (
        f"{Path(settings['data']).name}, {settings['image_size']} px, {counted('epochs')}, {counted('seeds')}, "
        f"{matched}; top-1 of the last epoch{measured}"
    )


def _cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:{form}}"


def cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table, the best top-1 first."""
    pairs = {pair["model"]: pair for pair in result["pairs"]}
    first = result["models"][0]["model"]
    head = ["model", "top-1 %", "sd", "n", f"against {first}", "95 % interval", "p (Holm)", "parameters M", "MACs M"]
    head += ["inference images/s", "training images/s", "training MiB"]
    shares = ["calibration_error", "corrupted_top1", "shift_consistency", "head_similarity"]
    shares += sorted({key for row in result["models"] for key in row if key.startswith("top1_at_")}, key=natural_key)
    shares = [name for name in shares if any(name in row for row in result["models"])]
    head += [f"{name.replace('top1', 'top-1').replace('_', ' ')} %" for name in shares]
    rows = []
    for row in sorted(result["models"], key=lambda row: -(row["top1"] or 0)):
        pair = pairs.get(row["model"], {})
        known = pair.get("p") is not None
        rows.append(
            [
                row["model"],
                _cell(row["top1"], ".2f", 100),
                _cell(row["top1_sd"], ".2f", 100),
                str(row["n"]),
                _cell(pair.get("difference"), "+.2f", 100),
                f"{100 * pair['low']:+.2f} to {100 * pair['high']:+.2f}" if known else "-",
                _cell(pair.get("p_holm"), ".4f"),
                _cell(row["parameters"], ".3g" if row["parameters"] < 1e5 else ".2f", 1e-6),
                _cell(row["macs"], ".3g" if row["macs"] < 1e6 else ".1f", 1e-6),
                _cell(row["inference_images_per_second"], ".0f"),
                _cell(row["training_images_per_second"], ".0f"),
                _cell(row["training_memory_mib"], ".0f"),
                *(_cell(row.get(name), ".1f", 100) for name in shares),
            ]
        )
    return head, rows


def text_table(result: dict[str, Any]) -> str:
    """Format the table for a terminal."""
    head, rows = cells(result)
    lines = [[printable(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _markdown(text: str) -> str:
    return re.sub(r"([!-*+./:-@[-`{-~])", r"\\\1", printable(text)) if re.search(r"[^\w .,%()/+-]|\b_|_\b", text) else text


def markdown_table(result: dict[str, Any]) -> str:
    """Format the table in Markdown."""
    head, rows = cells(result)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(c if line is lines[1] else _markdown(c) for c in line)} |\n" for line in lines)


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda found: special.get(found[0], "\\" + found[0]), printable(text))


def latex_table(result: dict[str, Any]) -> str:
    r"""Format the table in LaTeX, for ``\usepackage{booktabs}``."""
    head, rows = cells(result)
    lines = [" & ".join(map(_latex, line)) + r" \\" for line in (head, *rows)]
    begin, end = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\end{tabular}"
    comment = f"% {printable(headline(result))}"
    return "\n".join([comment, begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end, ""])


def _curves(result: dict[str, Any]) -> Figure:
    figure, axes = new_axes(4, 8, xlabel="epoch", ylabel="held-out top-1 (%)")
    for i, (name, runs) in enumerate(result["curves"].items()):
        if runs:
            values = 100 * np.array([run[: min(map(len, runs))] for run in runs])
            epochs, color = range(1, values.shape[1] + 1), COLORS[i % len(COLORS)]
            style, marker = ("-", "--", ":", "-.")[i // len(COLORS) % 4], "o" if len(epochs) == 1 else None
            (line,) = axes.plot(epochs, values.mean(0), color=color, linestyle=style, marker=marker, label=short(name))
            tip(line, f"{short(name)}: {values.mean(0)[-1]:.2f} %")
            axes.fill_between(epochs, values.min(0), values.max(0), alpha=0.1, color=color, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside right upper", fontsize=8, framealpha=0)
    return figure


def _scatter(result: dict[str, Any], label: str, name: str, unit: float) -> Figure:
    figure, axes = new_axes(xlabel=label, ylabel="held-out top-1 (%)")
    shown = [(row[name] / unit, row) for row in result["models"] if row[name] and row["top1"] is not None]
    middle = (min(cost for cost, _ in shown) + max(cost for cost, _ in shown)) / 2
    for cost, row in shown:
        top1, sd = 100 * row["top1"], 100 * (row["top1_sd"] or 0)
        color = BLUE if row[f"pareto_{name}"] else "grey"
        tip(axes.errorbar(cost, top1, sd or None, fmt="o", capsize=3, color=color)[0], f"{short(row['model'])}: {top1:.2f} %")
        inwards = {"xytext": (-6, 3), "ha": "right"} if cost > middle else {"xytext": (6, 3)}
        axes.annotate(short(row["model"], 24), (cost, top1), textcoords="offset points", fontsize=8, **inwards)
    best = sorted((cost, 100 * row["top1"]) for cost, row in shown if row[f"pareto_{name}"])
    axes.plot(*zip(*best, strict=True), color=BLUE, linewidth=1)
    return figure


def _charts(result: dict[str, Any]) -> dict[str, list[Block]]:
    if not any(row["n"] for row in result["models"]):
        return {}
    charts: list[Block] = [
        Chart(name, f"Top-1 against {title}", partial(_scatter, result, label, name, unit))
        for name, (title, label, unit) in COSTS.items()
        if name != result["settings"]["match"] and any(row[name] and row["n"] for row in result["models"])
    ]
    curves = Chart("curves", "Mean of the seeds; band: least to greatest", partial(_curves, result), wide=True)
    front = "Blue: no other model is both cheaper and better. Bars: standard deviation over the seeds."
    return {"Learning curves": [curves], "Accuracy and cost": [front, *charts]}


def remarks(result: dict[str, Any]) -> list[str]:
    """Say which models have learnt nothing that could be compared."""
    share = result["settings"].get("largest_class", 0)
    names = [row["model"] for row in result["models"] if row["top1"] is not None and row["top1"] <= share]
    which = "no model is" if len(names) == len(result["models"]) > 0 else f"{', '.join(names)}: not"
    return [f"{which} better than always answering the largest class, which is right for {share:.2%}"] if names else []


NOTES = """Each model is compared with the first by the same seeds, data and order of samples. The interval and p are of a
paired bootstrap of {resamples:,} draws of the held-out images, on the difference averaged over the seeds; p is corrected by
Holm for {tests} tests. They tell how far the result depends on which images were held out, for these trained networks. How far
it depends on the seed is told by the standard deviation (sd, of n seeds) and by the differences by seed below. Speed and memory
were measured for all models in one run, in turns, batch {batch}."""


def write_comparison(plan: Plan, result: dict[str, Any]) -> list[Path]:
    """Write what `compare` found into the folder of the comparison.

    Returns:
        index.html, one file with its figures inside; models.csv and pairs.csv; result.json; table.md; table.tex.
    """
    tests = sum(pair["p"] is not None for pair in result["pairs"])
    notes = NOTES.format(resamples=RESAMPLES, tests=tests, batch=result["settings"]["batch_size"])
    seeds = [
        [pair["model"], *(f"{100 * value:+.2f}" for value in pair["by_seed"]), *["-"] * (plan.seeds - len(pair["by_seed"]))]
        for pair in result["pairs"]
    ]
    models = [[row["model"], row["text"], row["matched"] or "-"] for row in result["models"]]
    title = f"Comparison: {printable(plan.folder.resolve().name)}"
    sections: dict[str, list[Block]] = {
        "": [Table(*cells(result)), " ".join(notes.split())],
        **_charts(result),
        "Differences by seed, in points of top-1": [
            Table(["model", *(f"seed {plan.recipe.seed + i}" for i in range(plan.seeds))], seeds)
        ],
        "Models": [Table(["model", "asked for", "scaled to match"], models)],
    }
    body = [
        html_head(headline(result), title, {}, remarks(result)),
        *(html_section(name, blocks) for name, blocks in sections.items()),
        f"<details><summary>Recipe</summary><pre>{html.escape(read_text(plan.folder / RECIPE))}</pre></details>",
    ]
    flat = [{name: value for name, value in row.items() if not isinstance(value, dict)} for row in result["models"]]
    pairs = [{**pair, "by_seed": " ".join(map(str, pair["by_seed"]))} for pair in result["pairs"]]
    contents = {
        "index.html": html_page(title, "\n".join(body)),
        "result.json": to_json(result, indent=2),
        "table.md": f"{_markdown(headline(result))}\n\n{markdown_table(result)}",
        "table.tex": latex_table(result),
    }
    for name, content in contents.items():
        write_file(plan.folder / name, content)
    write_rows(plan.folder / "models.csv", flat)
    write_rows(plan.folder / "pairs.csv", pairs)
    return [plan.folder / name for name in (*contents, "models.csv", "pairs.csv")]
