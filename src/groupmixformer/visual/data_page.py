"""The page of a data set: what is wrong with it, what it holds, and how it looks, in one file that loads nothing."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..files import printable, short

SIDE = 320  # of the images in the page, in pixels
MOST_GROUPS = 24  # of duplicates that are shown
MOST_FILES = 6  # of a group
MOST_LINES = 200  # of a list

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; font-weight: normal; }
thead th { border-bottom: 1px solid; }
.scroll { overflow-x: auto; }
.alert { border-left: .3rem solid #d55e00; padding-left: .75rem; }
.images { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-start; }
figure { margin: 0; width: min(13rem, 45%); }
figure img { width: 100%; }
figcaption { font-size: .8rem; line-height: 1.3; }
meter { width: 8rem; }
"""


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    cells = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead>{cells}</table></div>'


def _list(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in [*lines[:MOST_LINES], *more])}</ul>"


def _images(images: Iterable[tuple[str, Image.Image]]) -> str:
    figures = []
    for caption, image in images:
        buffer, small = io.BytesIO(), image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        small.save(buffer, "WEBP", quality=85)
        data = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        text = _text(short(caption, 80))
        figures.append(f'<figure><img alt="{text}" src="{data}"><figcaption>{text}</figcaption></figure>')
    return f'<div class="images">{"".join(figures)}</div>'


def _span(spread: Mapping[str, float] | None, form: str) -> str:
    return " / ".join(format(spread[name], form) for name in ("min", "median", "max")) if spread else ""


def _facts(parts: Mapping[str, Mapping[str, Any]]) -> str:
    def counted(values: Mapping[str, int]) -> str:
        return "<br>".join(f"{count:,} {_text(name)}" for name, count in values.items())

    rows = {
        "images": lambda part: f"{part['images']:,}",
        "left out": lambda part: f"{len(part['left_out']):,}",
        "damaged": lambda part: f"{len(part['damaged']):,}",
        "megabytes": lambda part: f"{part['bytes'] / 1e6:,.1f}",
        "width: least / median / greatest": lambda part: _span(part.get("width"), ".0f"),
        "height": lambda part: _span(part.get("height"), ".0f"),
        "width : height": lambda part: _span(part.get("aspect_ratio"), ".2f"),
        "channels": lambda part: counted(part["channels"]),
        "formats": lambda part: counted(part["formats"]),
    }
    return _table(["", *parts], ([_text(name), *map(tell, parts.values())] for name, tell in rows.items()))


def _classes(parts: Mapping[str, Mapping[str, Any]]) -> str:
    counts = {name: {row["class"]: row["count"] for row in part["classes"]} for name, part in parts.items()}
    names = list(dict.fromkeys(name for found in counts.values() for name in found))

    def cell(part: str, name: str) -> str:
        count, most = counts[part].get(name, 0), max(1, *counts[part].values())
        return f'<meter max="{most}" value="{count}"></meter> {count:,}'

    head = [f"{name} ({part['counted']})" for name, part in parts.items() if part["classes"]]
    chosen = [name for name, part in parts.items() if part["classes"]]
    return _table(["class", *head], ([_text(short(name)), *(cell(part, name) for part in chosen)] for name in names))


def _groups(groups: Sequence[Mapping[str, Any]], read: Callable[[str], Image.Image]) -> str:
    rows = []
    for group in groups[:MOST_GROUPS]:
        members = [(part, file) for part, names in group["files"].items() for file in names]
        classes = f", of the classes {_text(', '.join(map(short, group['classes'])))}" if len(group["classes"]) > 1 else ""
        rows.append(f"<p>{len(members)} {'equal files' if group['equal'] else 'near duplicates'}{classes}</p>")
        rows.append(_images((f"{part}: {file}", read(file)) for part, file in members[:MOST_FILES]))
    more = len(groups) - MOST_GROUPS
    return "".join(rows) + (f"<p>and {more:,} more groups</p>" if more > 0 else "")


def render(
    result: Mapping[str, Any],
    heading: str,
    read: Callable[[str], Image.Image],
    drawn: Mapping[str, Sequence[tuple[str, Image.Image]]],
) -> str:
    """Return the page.

    Args:
        result: What a look through the data gave, as `gmf data --json` prints it.
        heading: What the data is, in a sentence.
        read: Reads an image of the duplicates by the name of its file.
        drawn: Images with captions, by the title of their section.
    """
    parts = {name: part for name, part in result["parts"].items() if "problem" not in part}
    body = [f"<h1>{_text(heading)}</h1>"]
    body += [
        f'<p class="alert">{_text(name)} cannot be used: {_text(part["problem"])}</p>'
        for name, part in result["parts"].items()
        if name not in parts
    ]
    leaks, within = (
        [group for group in result["duplicates"] if (len(group["parts"]) > 1) == several] for several in (True, False)
    )
    if leaks:
        body.append(f'<h2 class="alert">Leaks: duplicates in several parts ({len(leaks):,} groups)</h2>{_groups(leaks, read)}')
    elif len(parts) > 1:
        body.append("<p>No image is in two parts, nor a near duplicate of one.</p>")
    body += [f"<h2>Parts</h2>{_facts(parts)}", f"<h2>Classes</h2>{_classes(parts)}"]
    for name, part in parts.items():
        damaged = [f"{entry['file']}: {entry['reason']}" for entry in part["damaged"]]
        lines = [
            *part["notes"],
            *(f"{count:,} images: {text}" for text, count in part["doubts"].items()),
            *part["left_out"],
            *damaged,
        ]
        if lines:
            body.append(f"<h2>Left out and to be seen to: {_text(name)}</h2>" + _list(lines))
    body += [f"<h2>{_text(title)}</h2>{_images(images)}" for title, images in drawn.items()]
    if within:
        body.append(f"<h2>Duplicates within a part ({len(within):,} groups)</h2>{_groups(within, read)}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(heading)}</title><style>{STYLE}</style></head><body>
{"".join(body)}
</body></html>
"""
