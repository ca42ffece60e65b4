"""Figures of attention and relevance, overlaid on the images; how figures become files and parts of pages."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..files import printable, write_file
from .drawing import SAFE
from .fonts import set_plain

COLORS = SAFE[:6]  # of lines in a chart; yellow is hard to see on white
BLUE, ORANGE = SAFE[:2]  # orange is visible on grey and on all of viridis
GROUPS = ("single tokens", "3 × 3 groups", "5 × 5 groups", "7 × 7 groups")


@dataclass(frozen=True)
class Row:
    """A row of panels: the image, then the maps overlaid on it.

    Attributes:
        image: (h, w, 3), 0 to 1.
        name: Label on its left.
        point: Row and column of the query to mark.
        box: Of an object to mark: left, top, right, bottom.
        strengths: Attention by group size, (4, h, w), 0 to 1.
        relevance: (h, w), 0 to 1.
    """

    image: NDArray[Any]
    name: str = ""
    point: tuple[float, float] | None = None
    box: Sequence[float] | None = None
    strengths: NDArray[Any] | None = None
    relevance: NDArray[Any] | None = None


def overlay_figure(rows: Sequence[Row], title: str, relevance: str = "relevance") -> Figure:
    """Draw images and, beside each, the attention of a position by group size, and the relevance, where they are given.

    Args:
        rows: The images with their maps.
        title: Title of the column of images.
        relevance: Title of the column of relevance.
    """
    groups = any(row.strengths is not None for row in rows)
    titles = [title, *(GROUPS if groups else ())]
    if any(row.relevance is not None for row in rows):
        titles.append(relevance)
    side = 1.6  # width of a panel in inches
    heights = [side * min(max(row.image.shape[0] / row.image.shape[1], 0.3), 3) for row in rows]
    extra = 0.2 + 0.17 * max(text.count("\n") + 1 for text in titles)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(side * len(titles) + 0.9, sum(heights) + 0.06 * len(rows) + extra), layout=layout)
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row.image)
        line[0].set_ylabel(row.name, fontsize=8)
        panels = [*(row.strengths if row.strengths is not None else [None] * 4 * groups), row.relevance]
        for axis, values in zip(line[1:], panels, strict=False):
            if values is None:
                axis.set_visible(False)
                continue
            axis.imshow(row.image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            axis.imshow(values, cmap="viridis", alpha=0.65, vmin=0, vmax=1)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        if row.point is not None:
            for axis in line[: 1 + 4 * groups]:
                look = {"marker": "x", "color": ORANGE, "markersize": 7, "markeredgewidth": 1.8}
                axis.plot(row.point[1], row.point[0], clip_on=False, zorder=5, **look)  # at an edge, too
        if row.box is not None:
            left, top, right, bottom = row.box
            corner = (left - 0.5, top - 0.5)  # pixel 0 begins at -0.5
            for axis in (line[0], line[-1]):
                axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=ORANGE, linewidth=1.5))
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=8)
    scale = figure.colorbar(
        ScalarMappable(cmap="viridis"), ax=axes.ravel().tolist(), fraction=0.05, aspect=25, ticks=[0, 0.5, 1]
    )
    scale.set_label("share of the panel's largest", fontsize=7)
    scale.ax.tick_params(labelsize=7)
    return figure


def drawn(figure: Figure, form: str = "png", dpi: int = 110) -> bytes:
    """Return a figure encoded as png, svg or pdf: the same bytes for the same figure, and its text as it is, never markup."""
    set_plain(figure)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "groupmixformer"}):
        figure.savefig(buffer, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


TIP = ("tip:", "column:")  # begin the id of what is told where it is pointed at; columns are seen only then
# Colours of a page, which has others for its dark form, by those of figures.
PAGE_COLORS = dict(
    zip(
        (c.lower() for c in (*COLORS, "#000000", "#b0b0b0", "#cccccc")),
        (f"var(--{name})" for name in ("blue", "orange", "green", "pink", "sky", "gold", "ink", "line", "line")),
        strict=True,
    )
)
BREAK = "\u2028"  # of lines in an id, as XML makes a space of a usual one
SVG = "http://www.w3.org/2000/svg"


def tip(artist: Artist, text: str, column: bool = False) -> None:
    """Let a part of a figure tell a text where a page shows the figure."""
    artist.set_gid(TIP[column] + BREAK.join(map(printable, text.split("\n"))))


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as a part of a page, in whose colours and font it is; `name` tells it from the others there."""
    set_plain(figure)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in list(root.iter()):
        if style := element.get("style"):
            element.set("style", re.sub("#[0-9a-f]{6}", lambda color: PAGE_COLORS.get(color[0], color[0]), style))
        gid = element.get("id", "")
        if element.tag == f"{{{SVG}}}g":
            element.attrib.pop("id", None)  # these are the same in every figure
        if gid.startswith(TIP):
            element.set("class", "tip")
            if gid.startswith(TIP[1]):
                element[0].set("class", "column")
            title = ET.Element(f"{{{SVG}}}title")
            title.text = gid.partition(":")[2].replace(BREAK, "\n")
            element.insert(0, title)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.set("style", f"width: {4 / 3 * width:.0f}px")  # 96 pixels an inch
    return ET.tostring(root, encoding="unicode")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its suffix: .png, .svg or .pdf."""
    write_file(path, drawn(figure, path.suffix[1:].lower()))


def shown(pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """Scale 8-bit pixels to 0 to 1, as `Row` takes them."""
    return pixels.astype(np.float32) / 255
