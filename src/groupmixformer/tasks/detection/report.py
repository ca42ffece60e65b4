"""The report of a detector: its curves, what it confuses with what, and held-out images at the best threshold."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...visual.charts import line_chart
from ...visual.page import Block, Chart, Gallery
from ..predictor import percent
from ..report import class_chart, confusion_blocks, finish, pairs_shown, run_charts
from .metrics import Kind, detection_confusion, detection_curves

if TYPE_CHECKING:
    from .predict import DetectionPredictor, DetectionResult


def write_report(predictor: "DetectionPredictor", folder: Path, images: Any, measured: "DetectionResult") -> Path:
    """Write report.html; the arguments are those of `Predictor.report`."""
    column, metric = predictor.metric
    name, result, names = column.removeprefix("val_"), measured.result, predictor.class_names
    kind: Kind = "segm" if "mask" in predictor.kinds else "bbox"
    curves = detection_curves(measured.ground_truth, measured.results, kind)
    at = "Of boxes, at" if predictor.model.keypoints else "At"
    best, f1 = curves.best, float(curves.f1[-1].max())
    predictor.options["score_threshold"] = best
    chosen = sorted(np.random.default_rng(0).permutation(len(images))[:6].tolist())
    pairs = predictor.examples(images, chosen)
    captions = ("annotated", f"found, at scores of at least {best:.2f}")

    def chart(values: Any, x: Any, all_: str, **more: Any) -> Any:
        rows = {c: row for c, row in zip(names, values, strict=False) if not np.isnan(row).any()}
        lines: dict[str, Sequence[float]] = {**(rows if len(names) > 1 else {}), all_: values[-1]}
        return line_chart(x, lines, form="{:.2f}", x_form="{:.2f}", strong=all_, ylim=(0, 1.02), **more)

    sections: dict[str, list[Block]] = {
        "": [Gallery("predictions", lambda: pairs_shown(pairs[:1], *captions), large=True)] if pairs else [],
        "How the training went": run_charts(folder, column, metric),
        "Precision, recall and confidence": [
            f"{at} an IoU of 0.50. F1, the harmonic mean of precision and recall, is best for scores from {best:.2f} on, where "
            f"it is {f1:.2f}: gmf predict --score-threshold {best:.2f} draws these objects.",
            Chart(
                "precision-recall",
                "Precision over recall",
                lambda: chart(curves.precision, curves.recalls, "mean of all classes", xlabel="recall", ylabel="precision"),
            ),
            Chart(
                "f1-confidence",
                "F1 over the least score",
                lambda: chart(curves.f1, curves.thresholds, "all objects", mark=best, xlabel="least score", ylabel="F1"),
            ),
        ],
        f"Confusion, at scores of at least {best:.2f}": [
            "Found in the background: no object is there. Taken for background: an object that is not found.",
            *confusion_blocks(
                detection_confusion(measured.ground_truth, measured.results, kind, best), [*names, "background"], "objects"
            ),
        ],
        "Classes": [class_chart(result["per_class"], name)],
    }
    if pairs[1:]:
        sections["Held-out images"] = [Gallery("more", lambda: pairs_shown(pairs[1:], *captions), large=True)]
    tiles = {f"{part} {key}": percent(result[f"{part}_{key}"]) for part in predictor.kinds for key in ("AP", "AP50", "AP75")}
    tiles |= {"best F1": f"{f1:.2f}", "at scores from": f"{best:.2f}"}
    heading = f"{metric} {percent(result[name])} on {result['images']:,} held-out images"
    return finish(folder, heading, tiles, sections, measured)
