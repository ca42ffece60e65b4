"""The report of a run of any task: how it went over the epochs, its metrics and classes, and held-out images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from ..files import duration, read_text, short
from ..run_folder import RECIPE, read_metrics
from ..visual.charts import bar_chart, line_chart, matrix_chart
from ..visual.page import Block, Chart, Gallery, Shown, Table, write_page
from .predictor import EvalResult, percent

if TYPE_CHECKING:
    from .predictor import Predictor


def run_charts(folder: Path, column: str = "", name: str = "") -> list[Block]:
    """Chart the losses, one held-out metric (a share of 1 that metrics.csv has), if any, and the rate over the epochs."""
    rows = read_metrics(folder)
    epochs = [row["epoch"] + 1 for row in rows]
    losses = {"training (augmented)": [row["loss"] for row in rows]}
    if "val_loss" in rows[0]:
        losses["held out"] = [row["val_loss"] for row in rows]
    charts: list[Block] = [Chart("loss", "Loss", lambda: line_chart(epochs, losses, xlabel="epoch", ylabel="loss"))]
    saved = f"The saved model is that of the last epoch, {epochs[-1]:g}."
    if column:
        best = epochs[int(np.argmax([row[column] for row in rows]))]
        metric = {f"held-out {name}": [100 * row[column] for row in rows]}
        labels = {"xlabel": "epoch", "ylabel": f"{name} (%)"}
        chart = lambda: line_chart(epochs, metric, form="{:.2f} %", mark=best, **labels)  # noqa: E731
        charts.append(Chart("metric", f"Held-out {name}", chart))
        saved = f"The saved model is that of epoch {best:g} of {len(rows)}, the best on these same held-out images."
    if "lr" in rows[0]:
        rates = {"learning rate": [row["lr"] for row in rows]}
        draw = lambda: line_chart(epochs, rates, form="{:.3g}", xlabel="epoch", ylabel="learning rate")  # noqa: E731
        charts.append(Chart("rate", "Learning rate", draw))
    return [*charts, saved]


def run_remarks(folder: Path) -> list[str]:
    """Say it where a run never left its warm-up."""
    schedule, done = yaml.safe_load(read_text(folder / RECIPE)).get("schedule") or {}, len(read_metrics(folder))
    if done > schedule.get("warmup_epochs", 0):
        return []
    return [
        f"the run never left its warm-up: it was trained for {done} of {schedule['warmup_epochs']:g} epochs of warm-up, so the "
        "learning rate was still rising at the end: train for more epochs, or lower schedule.warmup_epochs"
    ]


def sentence(text: str) -> str:
    """Return a remark as it stands on a page."""
    return f"{text[:1].upper()}{text[1:]}."


def finish(
    folder: Path, heading: str, tiles: Mapping[str, Any], sections: Mapping[str, Sequence[Block]], measured: EvalResult
) -> Path:
    """Write the page, with what must not be overlooked and what is said of the data."""
    remarks = [*measured.remarks, *run_remarks(folder)]
    seconds = read_metrics(folder)[-1].get("seconds")
    tiles = {
        **tiles,
        "held-out images": f"{measured.result['images']:,}",
        **({"left out, unreadable": f"{len(measured.skipped):,}"} if measured.skipped else {}),
        **({"training took": duration(seconds)} if seconds else {}),
    }
    return write_page(folder, heading, tiles, sections, [sentence(text) for text in remarks])


def pairs_shown(pairs: Sequence[tuple[Image.Image, Image.Image]], annotated: str, found: str) -> list[Shown]:
    """Show images as they are annotated and as they are found, beside each other."""
    return [item for pair in pairs for item in (Shown(pair[0], annotated), Shown(pair[1], found))]


def confusion_blocks(counts: NDArray[Any], class_names: Sequence[str], unit: str) -> list[Block]:
    """Show a confusion matrix (K, K), of true classes (rows) and predicted ones: in percent, in counts, and the worst pairs."""
    wide = len(class_names) > 12
    blocks: list[Block] = [
        Chart("confusion", "In percent of the true class", lambda: matrix_chart(counts, class_names, True, unit), wide),
        Chart("confusion-counts", f"In {unit}", lambda: matrix_chart(counts, class_names, False, unit), wide),
    ]
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    worst = [np.unravel_index(i, wrong.shape) for i in wrong.ravel().argsort()[::-1][:5] if wrong.ravel()[i]]
    if worst:
        rows = [
            [short(class_names[i]), short(class_names[j]), f"{wrong[i, j]:,.0f}", f"{wrong[i, j] / counts[i].sum():.1%}"]
            for i, j in worst
        ]
        blocks.append(Table(["true class", "most often taken for", unit, "share"], rows))
    return blocks


def class_chart(rows: Sequence[Mapping[str, Any]], key: str) -> Chart:
    """Chart a metric of the classes, the worst last."""
    ordered = sorted(rows, key=lambda row: -(row[key] or 0))
    title = f"{key.replace('_', ' ')} of each class"

    def draw() -> Any:
        told = [f"{row['class']}: {percent(row[key])}" for row in ordered]
        names, values = [row["class"] for row in ordered], [row[key] for row in ordered]
        return bar_chart(names, values, told, xlabel=f"{key.replace('_', ' ')} (%)")

    return Chart("classes", title, draw)


def write_report(predictor: "Predictor", folder: Path, images: Any, measured: EvalResult) -> Path:
    """Write the report of a task that has none of its own: metrics, classes, and images annotated and found."""
    column, metric = predictor.metric
    name, rows = column.removeprefix("val_"), measured.result.get("per_class") or []
    tiles = {
        key.replace("_", " "): percent(value)
        for key, value in measured.result.items()
        if isinstance(value, float) and "per_second" not in key
    }
    chosen = np.random.default_rng(0).permutation(len(images))[:6].tolist()
    pairs = predictor.examples(images, sorted(chosen))
    picture: list[Block] = [Gallery("predictions", lambda: pairs_shown(pairs, "annotated", "found"), large=True)]
    sections: dict[str, Sequence[Block]] = {"": picture if pairs else []}
    sections["How the training went"] = run_charts(folder, column, metric)
    if rows:
        key = next(key for key in (name, *reversed(rows[0])) if key in rows[0])
        sections["Classes"] = [class_chart(rows, key)]
    heading = f"{metric} {percent(measured.result[name])} on {measured.result['images']:,} held-out images"
    return finish(folder, heading, tiles, sections, measured)
