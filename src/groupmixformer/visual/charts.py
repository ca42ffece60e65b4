"""Charts of results: curves, confusion matrices, bars. What a part of them stands for is told where it is pointed at."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from ..files import short
from .figures import BLUE, COLORS, tip

WIDTH = 4.0  # inches: on a page, three beside each other, or one on a phone, with text of the same size
MOST_CELLS = 40  # classes of a matrix whose cells can be pointed at, and that names fit beside
GREY = "#b0b0b0"  # matplotlib's of grids


def new_axes(height: float = 2.7, width: float = WIDTH, **labels: Any) -> tuple[Figure, Axes]:
    """Return a figure and its axes, in the style of all charts; labels are those of `Axes.set`, ``xscale`` for one."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set(**labels)
    if labels.get("xscale") == "log":  # whose numbers are formulas otherwise, and texts of charts never are
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure, axes


def line_chart(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    form: str = "{:.4g}",
    x_form: str = "{:g}",
    strong: str | None = None,
    mark: float | None = None,
    **labels: Any,
) -> Figure:
    """Draw lines over the same places, with a column at each place that tells their values there.

    Args:
        x: The places, in order.
        lines: Values by name; NaN where there is none.
        form: How values are told.
        x_form: How places are told, after the label of x.
        strong: The line that stands out among many.
        mark: A place to mark by a vertical line.
        labels: Those of `Axes.set`.
    """
    figure, axes = new_axes(**labels)
    few = len(lines) <= len(COLORS)
    for index, (name, values) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)] if few else GREY
        width = 2.5 if name == strong else 1.6 if strong is None else 1
        color = "black" if name == strong else color
        marker = "o" if len(x) == 1 else None
        label = short(name) if few or name == strong else None
        axes.plot(x, values, color=color, linewidth=width, marker=marker, markersize=4, label=label)
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=1, linestyle=":")
    if len(lines) > 1:
        axes.legend(fontsize=8, framealpha=0, ncols=2 if len(lines) > 4 else 1)
    chosen = sorted({round(i) for i in np.linspace(0, len(x) - 1, min(len(x), 100))})  # or long runs would make large pages
    places = [x[i] for i in chosen]
    if labels.get("xlabel") == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    limits = [*axes.get_xlim(), *axes.get_ylim()]
    edges = [limits[0], *((a + b) / 2 for a, b in pairwise(places)), limits[1]]
    for index, left, right in zip(chosen, edges, edges[1:], strict=False):
        told = [f"{labels.get('xlabel', '')} {x_form.format(x[index])}".strip()]
        told += [f"{short(name)}: {form.format(values[index])}" for name, values in lines.items() if np.isfinite(values[index])]
        if len(told) > 12:
            told = [*told[:11], f"and {len(told) - 11} more"]
        tip(axes.axvspan(left, right, facecolor="black", alpha=0, linewidth=0), "\n".join(told), column=True)
    axes.set(xlim=limits[:2], ylim=limits[2:])
    return figure


def bar_chart(
    names: Sequence[str], values: Sequence[float | None], told: Sequence[str], most: float = 1, **labels: Any
) -> Figure:
    """Draw a horizontal bar for each name, of a share of `most` in percent; `told` is said of each."""
    figure, axes = new_axes(0.9 + 0.22 * len(names), **labels)
    bars = axes.barh(range(len(names)), [100 * max(0, value or 0) for value in values], color=BLUE, height=0.7)
    for bar, text in zip(bars, told, strict=True):
        tip(bar, text)
    axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
    axes.xaxis.set_major_locator(MaxNLocator(5))  # a number that hangs on the width changes it again: the last was cut off
    axes.grid(False, axis="y")
    axes.set(xlim=(0, 100 * most), ylim=(len(names) - 0.4, -0.6))
    return figure


def matrix_chart(counts: NDArray[Any], names: Sequence[str], normalised: bool, unit: str = "images") -> Figure:
    """Draw a confusion matrix: its counts, or the share that each is of its row.

    Args:
        counts: By true class (rows) and predicted class (columns), (K, K).
        names: Of the classes.
        normalised: Whether shares of the rows are shown.
        unit: What is counted.
    """
    number, totals = len(names), counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    values = shares if normalised else counts / max(1, counts.max())
    width = min(9.0, max(WIDTH, 1.2 + 0.28 * number))
    figure, axes = new_axes(width, width, xlabel="predicted", ylabel="true")
    axes.grid(False)
    # Colour of varying opacity suits a light and a dark page; up to 0.8 the numbers in it can be read on both.
    colors = np.dstack([*(np.full_like(values, part, dtype=float) for part in to_rgb(BLUE)), 0.8 * values**0.7])
    axes.set(xlim=(-0.5, number - 0.5), ylim=(number - 0.5, -0.5), aspect="equal")
    size = min(9.0, 72 * (width - 1) / number * (0.38 if normalised else 0.3))
    if number > MOST_CELLS:
        axes.imshow(colors)
    else:
        for row, column in np.argwhere(counts):
            share, count = shares[row, column], counts[row, column]
            corner = (column - 0.5, row - 0.5)
            cell = axes.add_patch(Rectangle(corner, 1, 1, facecolor=BLUE, alpha=colors[row, column, 3], linewidth=0))
            what = f"{short(names[row])} taken for {short(names[column])}" if row != column else f"{short(names[row])} found"
            tip(cell, f"{what}: {count:,.0f} {unit}, {share:.1%} of the class")
            if size >= 5:
                label = f"{100 * share:.0f}" if normalised else _brief(count)
                axes.text(column, row, label, ha="center", va="center", fontsize=size)
        shown = [short(name, 20) for name in names]
        axes.set_xticks(range(number), shown, rotation=90 if max(map(len, shown)) > 2 else 0, fontsize=min(9, size + 3))
        axes.set_yticks(range(number), shown, fontsize=min(9, size + 3))
    return figure


def _brief(count: float) -> str:
    """Return a count in at most four characters."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2g}{letter}" if count < 10 * factor else f"{count / factor:.0f}{letter}"
    return f"{count:.0f}"
