"""Draw the idea of Group-Mix Attention as idea.svg, next to this file: ``python docs/figures/draw_idea.py``.

Coordinates are the units of the SVG, y down: a font size of 11 is 11 pixels where the figure is 900 pixels wide. Text
is drawn as paths and ids are salted by a constant, so the file looks the same everywhere and comes out the same each
time.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 900, 452
INK, MUTED, RULE, GRID = "#1a1a1a", "#555555", "#c8c8c8", "#d9d9d9"
# Okabe-Ito: blue, bluish green, orange, reddish purple; grey for what does not attend.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#8C8C8C")
SIZES = (1, 3, 5, 7)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "groupmixformer",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "mathtext.fontset": "dejavusans",
    "path.simplify": False,
}


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """Return `colour` mixed with white; strength 1 is the colour itself."""
    r, g, b = mpl.colors.to_rgb(colour)
    return 1 - strength * (1 - r), 1 - strength * (1 - g), 1 - strength * (1 - b)


def text(ax: Axes, x: float, y: float, s: str, size: float = 11, colour: str = INK, **kwargs: Any) -> None:
    """Write `s`, centred at (x, y) unless told otherwise."""
    ax.text(x, y, s, fontsize=size, color=colour, **{"ha": "center", "va": "center", **kwargs})


def box(
    ax: Axes,
    x: float,
    y: float,
    w: float,
    h: float,
    face: Any = "white",
    edge: Any = INK,
    lw: float = 1.2,
    r: float = 5,
) -> None:
    """Draw a rounded box with its upper left corner at (x, y)."""
    style = f"round,pad=0,rounding_size={r}"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=lw))


def arrow(ax: Axes, x0: float, x1: float, y: float, colour: str = INK) -> None:
    """Draw a horizontal arrow."""
    style = "-|>,head_length=4,head_width=2.4"
    ax.add_patch(
        FancyArrowPatch((x0, y), (x1, y), arrowstyle=style, mutation_scale=1, shrinkA=0, shrinkB=0, lw=1.5, color=colour)
    )


def feature_map(
    ax: Axes, x: float, y: float, columns: int, rows: int, cell: float, colour: str = GRID, lw: float = 0.8
) -> None:
    """Draw the grid of tokens, all lines as one path."""
    w, h, gap = columns * cell, rows * cell, float("nan")
    xs: list[float] = []
    ys: list[float] = []
    for i in range(columns + 1):
        xs += [x + i * cell, x + i * cell, gap]
        ys += [y, y + h, gap]
    for j in range(rows + 1):
        xs += [x, x + w, gap]
        ys += [y + j * cell, y + j * cell, gap]
    ax.plot(xs, ys, color=colour, lw=lw, solid_capstyle="projecting")


def draw_comparisons(ax: Axes, left: float) -> None:
    """Left: what self-attention and what Group-Mix Attention compare."""
    columns, rows, cell = 19, 9, 15.0
    query, key = (4, 4), (14, 4)

    def centre(column: float, row: float, top: float) -> tuple[float, float]:
        return left + (column + 0.5) * cell, top + (row + 0.5) * cell

    def token(column: int, row: int, top: float, face: Any) -> None:
        corner = (left + column * cell, top + row * cell)
        ax.add_patch(Rectangle(corner, cell, cell, facecolor=face, edgecolor=COLOURS[0], linewidth=1.5, zorder=4))

    # Self-attention: one token with every other.
    top = 68
    text(ax, left, 32, "Self-attention", 14, ha="left", weight="bold")
    text(ax, left, 52, "compares single tokens", 11, MUTED, ha="left")
    feature_map(ax, left, top, columns, rows, cell)
    for column, row in [(1, 1), (2, 7), (6, 7), (7, 1), (11, 1), (10, 7), (17, 1), (16, 7), key]:
        start, end = centre(*query, top), centre(column, row, top)
        ax.plot([start[0], end[0]], [start[1], end[1]], color=COLOURS[0], lw=1.3, alpha=0.75, zorder=3)
        token(column, row, top, tint(COLOURS[0], 0.3))
    token(*query, top, COLOURS[0])
    for token_at, label in ((query, "query"), (key, "keys")):
        text(ax, centre(*token_at, top)[0], top + rows * cell + 13, label, 11)

    # Group-Mix Attention: groups of each size with groups of that size.
    top = 278
    text(ax, left, 242, "Group-Mix Attention", 14, ha="left", weight="bold")
    text(ax, left, 262, "compares tokens, and groups of 3×3, 5×5 and 7×7", 11, MUTED, ha="left")
    feature_map(ax, left, top, columns, rows, cell)
    for size, colour in reversed(list(zip(SIZES, COLOURS, strict=False))):
        half = size // 2
        for column, row in (query, key):
            corner = (left + (column - half) * cell, top + (row - half) * cell)
            face = colour if (size == 1 and column == query[0]) else tint(colour, 0.3)
            ax.add_patch(Rectangle(corner, size * cell, size * cell, facecolor=face, edgecolor=colour, linewidth=2, zorder=3))
    for size, colour in zip(SIZES, COLOURS, strict=False):
        half = size // 2
        y = top + (query[1] - half + 0.5) * cell
        ends = left + (query[0] + half + 1) * cell, left + (key[0] - half) * cell
        ax.plot(ends, [y, y], color=colour, lw=2, zorder=5)
        for x in ends:
            ax.add_patch(Circle((x, y), 2.8, facecolor=colour, edgecolor="white", linewidth=0.7, zorder=6))
    for token_at, label in ((query, "query"), (key, "one of the keys")):
        text(ax, centre(*token_at, top)[0], top + rows * cell + 13, label, 11)


def draw_layer(ax: Axes, left: float) -> None:
    """Right: the data flow of one layer."""
    top, pitch, height = 92, 67, 50
    bottom = top + 4 * pitch + height
    middles = [top + i * pitch + height / 2 for i in range(5)]
    centre = (top + bottom) / 2

    text(ax, left, 32, "One Group-Mix Attention layer", 14, ha="left", weight="bold")
    text(ax, left, 52, "five segments of the channels, each mixed at its own scale", 11, MUTED, ha="left")

    # Linear layer.
    x = left + 18
    arrow(ax, left, x - 2, centre)
    box(ax, x, top, 26, bottom - top, "#f2f2f2")
    text(ax, x + 13, centre, "linear", 11.5, rotation=90)
    x += 26

    # Q, K and V, in five segments.
    arrow(ax, x + 2, x + 16, centre)
    x += 19
    for name in "QKV":
        text(ax, x + 9, top - 12, name, 12, weight="bold")
        for i, colour in enumerate(COLOURS):
            box(ax, x, top + i * pitch, 18, height, tint(colour, 0.75), colour, 1, 3)
        x += 22
    x -= 4

    # Aggregators.
    start, agg = x + 3, 98
    text(ax, start + 18 + agg / 2, top - 12, "aggregators", 11, MUTED)
    for size, colour, y in zip(SIZES, COLOURS, middles, strict=False):
        arrow(ax, start, start + 16, y, colour)
        box(ax, start + 18, y - height / 2, agg, height, tint(colour, 0.14), colour)
        side = 32.0
        cell = side / 7
        corner = start + 18 + 9, y - side / 2
        inset = (7 - size) / 2 * cell
        ax.add_patch(Rectangle(corner, side, side, facecolor="white"))
        ax.add_patch(Rectangle((corner[0] + inset, corner[1] + inset), size * cell, size * cell, facecolor=colour))
        feature_map(ax, *corner, 7, 7, cell, "#bdbdbd", 0.4)
        lines = ("single", "tokens") if size == 1 else (f"{size}×{size}", "groups")
        for baseline, line in zip((y - 3.5, y + 10.5), lines, strict=True):
            text(ax, start + 18 + 47, baseline, line, 11, ha="left", va="baseline")

    # Attention over the first four segments.
    x = start + 18 + agg
    att, wide = x + 20, 166
    for colour, y in zip(COLOURS[:4], middles, strict=False):
        arrow(ax, x + 2, att - 2, y, colour)
    box(ax, att, top, wide, 3 * pitch + height, "#fbfbfb")
    mid = att + wide / 2
    text(ax, mid, top + 34, "factorised attention", 11.5, weight="bold")
    text(ax, mid, top + 53, "two heads per segment", 11, MUTED)
    text(ax, mid, top + 98, r"$\mathrm{scale}\cdot Q\;\,\mathrm{softmax}(K)^{\!\top} V$", 12)
    text(ax, mid, top + 123, r"$+$", 12)
    text(ax, mid, top + 148, r"$Q\,\odot\,\mathrm{conv}(V)$", 12)
    text(ax, mid, top + 201, "global context and\nrelative position,\nat linear cost", 11, MUTED, linespacing=1.3)

    # The branch without attention.
    y = middles[4]
    arrow(ax, start, start + 16, y, COLOURS[4])
    box(ax, start + 18, y - height / 2, att + wide - start - 18, height, tint(COLOURS[4], 0.14), COLOURS[4])
    text(ax, (start + 18 + att + wide) / 2, y - 9, "non-attention branch", 11.5)
    text(ax, (start + 18 + att + wide) / 2, y + 9, "Q, K, V together: 3×3 and 1×1 convolution", 11, MUTED)

    # Concatenation and the last linear layer.
    x = att + wide
    text(ax, x + 20 + 9, top - 12, "concat", 11, MUTED)
    for i, (colour, y) in enumerate(zip(COLOURS, middles, strict=True)):
        arrow(ax, x + 2, x + 18, y, colour)
        box(ax, x + 20, top + i * pitch, 18, height, tint(colour, 0.75), colour, 1, 3)
    x += 38
    arrow(ax, x + 2, x + 16, centre)
    box(ax, x + 18, top, 26, bottom - top, "#f2f2f2")
    text(ax, x + 31, centre, "linear", 11.5, rotation=90)
    arrow(ax, x + 46, x + 62, centre)


def draw(path: Path) -> None:
    """Draw the figure to `path`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        ax.axis("off")
        box(ax, 1, 1, WIDTH - 2, HEIGHT - 2, "white", RULE, 1, 14)
        draw_comparisons(ax, 24)
        ax.plot([332, 332], [24, HEIGHT - 24], color=RULE, lw=1)
        draw_layer(ax, 352)
        metadata = {"Title": "The idea of Group-Mix Attention", "Creator": None, "Date": None}
        figure.savefig(path, transparent=True, metadata=metadata if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(__file__).with_name("idea.svg"))
