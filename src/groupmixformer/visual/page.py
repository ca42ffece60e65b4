"""The page of a run: its result, pictures, charts and tables in one file, which loads nothing."""

import base64
import hashlib
import html
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ..files import printable, read_json, read_text, write_file
from ..run_folder import RECIPE, REPORT, VERSIONS, RunFolder, one_line
from .figures import drawn, inline_svg

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --card: #f6f8fa;
  --blue: #0072b2; --orange: #d55e00; --green: #009e73; --pink: #b8578f; --sky: #2b8fc7; --gold: #a66f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --paper: #0d1117;
  --card: #161b22; --blue: #2b87c8; --orange: #ff8c42; --green: #2fc79b; --pink: #e08cbd; --sky: #8cd0f5; --gold: #e69f00; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; background: var(--paper); color: var(--ink); }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.25rem); line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
.run, .note, figcaption { color: var(--soft); overflow-wrap: anywhere; }
.run { margin: 0 0 .25rem; }
.note { margin: 0 0 .75rem; max-width: 45rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .5rem; margin: 0 0 1rem; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.tiles dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
.remarks { list-style: none; padding: 0; margin: 1rem 0; }
.remarks li { border-left: .25rem solid var(--orange); background: var(--card); padding: .5rem .75rem; margin: .5rem 0;
  overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.3; margin-top: .25rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; margin: .75rem 0; }
.chart { flex: 1 1 20rem; max-width: min(25rem, 100%); }
.wide { flex: 0 1 auto; max-width: 100%; overflow-x: auto; }
.chart figcaption { color: var(--ink); font-weight: 600; margin: 0 0 .25rem; }
svg { display: block; max-width: 100%; height: auto; fill: var(--ink); }
.wide svg { min-width: 40rem; }
svg * { stroke-linejoin: round; font-family: system-ui, sans-serif !important; }
.tip > * { pointer-events: all; }
.tip:hover > * { filter: brightness(1.15); }
.tip:hover > .column { fill: currentColor !important; opacity: .12 !important; }
#tip { position: fixed; z-index: 1; pointer-events: none; max-width: 18rem; padding: .25rem .5rem; border-radius: .375rem;
  background: var(--ink); color: var(--paper); font-size: .85rem; white-space: pre-line; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(8, 1fr); gap: .75rem; margin: .75rem 0; }
.gallery.large { grid-template-columns: 1fr 1fr; }
@media (max-width: 40rem) { .gallery { grid-template-columns: repeat(4, 1fr); gap: .5rem; }
  .gallery.large { grid-template-columns: 1fr; } }
.gallery img { display: block; width: 100%; border-radius: .375rem; border: .1875rem solid transparent; }
.gallery img.small { image-rendering: pixelated; }
.gallery .right img { border-color: var(--blue); }
.gallery .wrong img { border-color: var(--orange); }
.gallery figcaption { overflow-wrap: anywhere; }
.gallery .wrong figcaption { color: var(--ink); }
.scroll { overflow: auto; max-height: 32rem; margin-bottom: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .25rem 1rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: normal; min-width: 6rem; max-width: 20rem; overflow-wrap: break-word; }
thead th { color: var(--soft); font-weight: normal; position: sticky; top: 0; background: var(--paper); white-space: nowrap; }
td { white-space: nowrap; }
@media (max-width: 40rem) { .scroll table { font-size: .8rem; } .scroll th, .scroll td { padding-right: .6rem; }
  .scroll th:first-child { min-width: 4rem; } }
.facts td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; font-size: .85rem; }
"""
# Shows at the pointer, or where a finger taps, what a browser would show in a second: the titles of parts of the charts.
SCRIPT = """
const tip = document.getElementById("tip"), texts = new Map();
for (const title of document.querySelectorAll("svg .tip > title")) {
  texts.set(title.parentNode, title.textContent); title.remove();
}
for (const kind of ["pointermove", "pointerdown"]) addEventListener(kind, event => {
  const text = texts.get(event.target.closest(".tip"));
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const {width, height} = tip.getBoundingClientRect(), above = event.clientY - height - 12;
  tip.style.left = Math.max(4, Math.min(event.clientX - width / 2, innerWidth - width - 4)) + "px";
  tip.style.top = (above > 4 ? above : event.clientY + 20) + "px";
});
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"


@dataclass(frozen=True)
class Chart:
    """A figure, inline on the page and as report/NAME.png beside it; `wide` ones are scrolled on a phone."""

    name: str
    title: str
    draw: Callable[[], Figure]
    wide: bool = False


@dataclass(frozen=True)
class Shown:
    """An image with what is said of it; `right` is none where it is neither right nor wrong."""

    image: Image.Image
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Images side by side; few large ones or many small ones."""

    name: str
    images: Callable[[], Sequence[Shown]]
    large: bool = False


@dataclass(frozen=True)
class Table:
    """Rows whose first column is their name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Chart | Gallery | Table | str  # a text is a paragraph


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is the name of the row."""
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = (f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def html_page(title: str, body: str) -> str:
    """Return a page of a body whose texts are escaped already."""
    policy = POLICY.format(base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title)}</title><style>{STYLE}</style></head>
<body><main>
{body}
</main><div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>
"""


def html_figure(item: Shown, side: int) -> str:
    """Return an image, no side longer than `side` pixels, with its caption below."""
    picture, buffer = item.image.convert("RGB"), io.BytesIO()
    picture.thumbnail((side, side))
    small = max(picture.size) <= 64
    form = "PNG" if small else "JPEG"
    picture.save(buffer, form, **({} if small else {"quality": 88}))
    kind = "" if item.right is None else ' class="right"' if item.right else ' class="wrong"'
    data = f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    # Told by a sign too, for those who cannot tell the colours apart.
    caption = _text(item.caption if item.right is None else f"{'✓' if item.right else '✗'} {item.caption}")
    pixels = ' class="small"' if small else ""
    return f'<figure{kind}><img{pixels} alt="{caption}" src="{data}"><figcaption>{caption}</figcaption></figure>'


def _render(block: Block, folder: Path | None) -> str:
    if isinstance(block, Chart):
        figure = block.draw()
        svg = inline_svg(figure, block.name)
        if folder:
            write_file(folder / "report" / f"{block.name}.png", drawn(figure))
        title = _text(block.title)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
        return f'<figure class="chart{" wide" if block.wide else ""}"><figcaption>{title}</figcaption>{svg}</figure>'
    if isinstance(block, Gallery):
        images = "".join(html_figure(item, 720 if block.large else 224) for item in block.images())
        return f'<div class="gallery{" large" if block.large else ""}">{images}</div>'
    if isinstance(block, Table):
        return html_table(block.head, block.rows)
    return f'<p class="note">{_text(block)}</p>'


def html_section(title: str, blocks: Sequence[Block], folder: Path | None = None) -> str:
    """Return a part of a page, whose charts are written to a run's report/ too; what cannot be drawn is named instead."""
    parts, charts = [f"<h2>{_text(title)}</h2>"] if title else [], list[str]()
    for block in [*blocks, ""]:
        if charts and not isinstance(block, Chart):
            parts.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        try:
            made = _render(block, folder) if block else ""
        except Exception as error:  # whatever a library makes of unusual data, the rest of the page is worth having
            name = block.name if isinstance(block, Chart | Gallery) else title
            missing = f"{name} could not be drawn: {type(error).__name__}: {one_line(error)}"
            logging.getLogger(__name__).warning(f"{folder / REPORT}: {missing}" if folder else missing)
            made = f"<p>{_text(missing)}</p>"
        (charts if isinstance(block, Chart) else parts).append(made)
    return f"<section>{''.join(parts)}</section>"


def html_head(about: str, heading: str, tiles: Mapping[str, Any], remarks: Sequence[str]) -> str:
    """Return the beginning of a page: what it is about, what came out, numbers by name, and what must not be overlooked."""
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles.items())
    told = f'<ul class="remarks">{"".join(f"<li>{_text(line)}</li>" for line in remarks)}</ul>' if remarks else ""
    return f'<p class="run">{_text(about)}</p>\n<h1>{_text(heading)}</h1>\n<dl class="tiles">{cells}</dl>\n{told}'


def write_page(
    folder: Path,
    heading: str,
    tiles: Mapping[str, Any],
    sections: Mapping[str, Sequence[Block]],
    remarks: Sequence[str] = (),
) -> Path:
    """Write report.html, one file with everything inside, and its charts as images in report/.

    Args:
        folder: Of the run.
        heading: What came out, in a few words.
        tiles: Metrics as they are shown, by name.
        sections: Their blocks by title; the first, without a title, is the picture of the result. A block that cannot be drawn
            is left out and named. Versions and recipe follow.
        remarks: What must not be overlooked, in sentences.

    Returns:
        The path of report.html.
    """
    (folder / "report").mkdir(exist_ok=True)
    changes = RunFolder(folder).changes
    told = [*remarks, *([f"The recipe was changed while it was trained: {changes}."] if changes else [])]
    parts = [html_section(title, blocks, folder) for title, blocks in sections.items()]
    facts = "".join(f"<tr><th>{_text(n)}</th><td>{_text(v)}</td></tr>" for n, v in read_json(folder / VERSIONS).items())
    body = f"""{html_head(f"GroupMixFormer run {folder.name}", heading, tiles, told)}
{"".join(parts)}
<section><h2>How it was made</h2>
<details><summary>Versions and machine</summary><table class="facts">{facts}</table></details>
<details><summary>Recipe</summary><pre>{html.escape(read_text(folder / RECIPE))}</pre></details></section>"""
    path = folder / REPORT
    write_file(path, html_page(f"{folder.name}: {heading}", body))
    return path
