"""The page of a data set: what is wrong with it, what it holds, and how it looks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..files import short
from .charts import bar_chart
from .page import Block, Chart, Gallery, Shown, Table, html_head, html_page, html_section

MOST_GROUPS = 24  # of duplicates that are shown
MOST_FILES = 8  # of a group
MOST_BARS = 60  # classes of a chart
MOST_LINES = 200  # of what was left out


def _span(spread: Mapping[str, float] | None, form: str) -> str:
    return " / ".join(format(spread[name], form) for name in ("min", "median", "max")) if spread else ""


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _facts(parts: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "images": lambda part: f"{part['images']:,}",
        "left out": lambda part: f"{len(part['left_out']):,}",
        "damaged": lambda part: f"{len(part['damaged']):,}",
        "megabytes": lambda part: f"{part['bytes'] / 1e6:,.1f}",
        "width, least / median / greatest": lambda part: _span(part.get("width"), ".0f"),
        "height": lambda part: _span(part.get("height"), ".0f"),
        "width : height": lambda part: _span(part.get("aspect_ratio"), ".2f"),
        "channels": lambda part: _counted(part["channels"]),
        "formats": lambda part: _counted(part["formats"]),
    }
    return Table(["", *parts], [[name, *map(tell, parts.values())] for name, tell in rows.items()])


def _sizes(parts: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Draw how the sizes are spread, where there are several."""
    blocks: list[Block] = []
    for name, part in parts.items():
        for what, found in part.get("histograms", {}).items():
            counts, edges, total = found["counts"], found["edges"], sum(found["counts"])
            form = ".2f" if what == "width : height" else ".0f"
            bins = [f"{low:{form}} to {high:{form}}" for low, high in pairwise(edges)]
            told = [f"{bin}: {count:,} images ({count / total:.1%})" for bin, count in zip(bins, counts, strict=True)]
            if len(counts) > 1:
                draw = partial(bar_chart, bins, [count / total for count in counts], told, xlabel="share (%)")
                blocks.append(Chart(f"sizes-{len(blocks)}", f"{name}: {what}", draw))
    return blocks


def _classes(parts: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    for name, part in parts.items():
        rows, total = part["classes"], max(1, sum(row["count"] for row in part["classes"]))
        told = [f"{short(row['class'])}: {row['count']:,} ({row['count'] / total:.1%})" for row in rows]
        if 1 < len(rows) <= MOST_BARS:
            shares = [row["count"] / total for row in rows]
            most = max(shares) or 1
            draw: Callable[[], Figure] = partial(
                bar_chart, [row["class"] for row in rows], shares, told, most, xlabel="share (%)"
            )
            blocks.append(Chart(f"classes-{len(blocks)}", f"{name}: {part['counted']}", draw))
    names = list(dict.fromkeys(row["class"] for part in parts.values() for row in part["classes"]))
    counts = [{row["class"]: f"{row['count']:,}" for row in part["classes"]} for part in parts.values()]
    table = Table(["class", *parts], [[short(name), *(found.get(name, "") for found in counts)] for name in names])
    return [*blocks, table]


def _groups(groups: Sequence[Mapping[str, Any]], read: Callable[[str], Image.Image]) -> list[Block]:
    blocks: list[Block] = []
    for group in groups[:MOST_GROUPS]:
        members = [(part, file) for part, names in group["files"].items() for file in names]
        classes = f", of the classes {', '.join(map(short, group['classes']))}" if len(group["classes"]) > 1 else ""
        blocks.append(f"{len(members)} {'equal files' if group['equal'] else 'near duplicates'}{classes}")
        blocks.append(Gallery("duplicates", partial(_shown, members[:MOST_FILES], read)))
    return [*blocks, *([f"and {len(groups) - MOST_GROUPS:,} more groups"] if len(groups) > MOST_GROUPS else [])]


def _shown(members: Sequence[tuple[str, str]], read: Callable[[str], Image.Image]) -> list[Shown]:
    return [Shown(read(file), f"{part}: {short(file, 80)}") for part, file in members]


def render(
    result: Mapping[str, Any],
    heading: str,
    read: Callable[[str], Image.Image],
    galleries: Mapping[str, Gallery],
) -> str:
    """Return the page.

    Args:
        result: What a look through the data gave, as `gmf data --json` prints it.
        heading: What the data is, in a sentence.
        read: Reads an image of the duplicates by the name of its file.
        galleries: Images of the data by the title of their section.
    """
    parts = {name: part for name, part in result["parts"].items() if "problem" not in part}
    remarks = [f"{name} cannot be used: {part['problem']}" for name, part in result["parts"].items() if name not in parts]
    leaks, others = ([group for group in result["duplicates"] if (len(group["parts"]) > 1) == leak] for leak in (True, False))
    if leaks:
        remarks.append("Images of one part are in another too, or near duplicates: what is measured there is too good.")
    sections: dict[str, Sequence[Block]] = {}
    if leaks:
        sections["Leaks: duplicates in several parts"] = _groups(leaks, read)
    sections |= {"Parts": [_facts(parts), *_sizes(parts)], "Classes": _classes(parts)}
    for name, part in parts.items():
        damaged = [f"{entry['file']}: {entry['reason']}" for entry in part["damaged"]]
        doubts = [f"{count:,} images: {text}" for text, count in part["doubts"].items()]
        lines = [*part["notes"], *doubts, *part["left_out"], *damaged]
        if lines:
            more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
            sections[f"Left out and to be seen to: {name}"] = [Table([""], [[line] for line in [*lines[:MOST_LINES], *more]])]
    sections |= {title: [gallery] for title, gallery in galleries.items()}
    if others:
        sections["Duplicates within a part"] = _groups(others, read)
    tiles = {f"{name}: images": f"{part['images']:,}" for name, part in parts.items()}
    tiles |= {"groups of duplicates in several parts": f"{len(leaks):,}"} if len(parts) > 1 else {}
    tiles |= {"damaged or left out": f"{sum(len(part['damaged']) + len(part['left_out']) for part in parts.values()):,}"}
    body = "".join(html_section(title, blocks) for title, blocks in sections.items())
    return html_page(heading, html_head(result["data"], heading, tiles, remarks) + body)
