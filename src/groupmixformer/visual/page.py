"""The page of a run: its result, curves and figures in one file."""

import base64
import html
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import printable, read_json, read_text, write_file
from ..run_folder import RECIPE, REPORT, VERSIONS, RunFolder, one_line, read_metrics
from .figures import BLUE, ORANGE, drawn


def curves(folder: Path, metric: str, name: str) -> Figure:
    """Draw the losses and one held-out metric, a share of 1 that metrics.csv has, over the epochs of a run."""
    rows = read_metrics(folder)
    epochs = [row["epoch"] + 1 for row in rows]
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["loss"] for row in rows], color=ORANGE, label="training (augmented)")
    if "val_loss" in rows[0]:
        loss.plot(epochs, [row["val_loss"] for row in rows], color=BLUE, label="held out")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    loss.legend()
    accuracy.plot(epochs, [100 * row[metric] for row in rows], color=BLUE, marker="o")
    accuracy.set(xlabel="epoch", ylabel=f"held-out {name} (%)")
    return figure


def _text(value: Any) -> str:
    return html.escape(printable(str(value)))


def image(title: str, png: bytes) -> str:
    """Return a figure under its title, inside the page."""
    encoded = base64.b64encode(png).decode()
    return f'<h2>{_text(title)}</h2>\n<img alt="{_text(title)}" src="data:image/png;base64,{encoded}">'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    titles = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'


def html_page(title: str, body: str) -> str:
    """Return a page of a body whose texts are escaped already."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }}
th {{ text-align: left; padding-right: 2rem; font-weight: normal; }}
td {{ padding-right: 2rem; }}
.wide {{ overflow-x: auto; font-size: 14px; }}
.wide th, .wide td {{ padding-right: 1.2rem; white-space: nowrap; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow: auto; color: #111; }}
</style>
{body}</html>
"""


def write_page(
    folder: Path, heading: str, rows: Mapping[str, Any], sections: Mapping[str, tuple[str, Callable[[], Figure]]]
) -> Path:
    """Write report.html, one file with its images inside, and the images beside it in report/.

    Args:
        folder: Folder of the run.
        heading: What came out, in a few words.
        rows: What the table says first; time, versions and recipe follow.
        sections: For each title the name and what draws the figure. One that cannot be drawn is left out and named.

    Returns:
        The path of report.html.
    """
    (folder / "report").mkdir(exist_ok=True)
    body = []
    for title, (name, draw) in sections.items():
        try:
            png = drawn(draw())
        except Exception as error:  # whatever a library makes of unusual data, the rest of the page is worth having
            missing = f"{name} could not be drawn: {type(error).__name__}: {one_line(error)}"
            logging.getLogger(__name__).warning(f"{folder / REPORT}: {missing}")
            body.append(f"<h2>{_text(title)}</h2>\n<p>{_text(missing)}</p>")
            continue
        write_file(folder / "report" / f"{name}.png", png)
        body.append(image(title, png))
    changes = RunFolder(folder).changes
    table = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
        for name, value in {
            **rows,
            **({"changed while it was trained": changes} if changes else {}),
            "seconds of training": f"{read_metrics(folder)[-1]['seconds']:.0f}",
            **read_json(folder / VERSIONS),
        }.items()
    )
    recipe = html.escape(read_text(folder / RECIPE))
    heading = f"<h1>{_text(folder.name)}: {_text(heading)}</h1>\n<table>{table}</table>"
    page = html_page(f"GroupMixFormer: {folder.name}", f"{heading}\n{''.join(body)}\n<h2>Recipe</h2><pre>{recipe}</pre>")
    path = folder / REPORT
    write_file(path, page)
    return path
