"""The report of a segmenter: IoU of the classes, what it confuses with what, and the best and the worst images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...visual.page import Block, Gallery
from ..predictor import percent
from ..report import class_chart, confusion_blocks, finish, pairs_shown, run_charts

if TYPE_CHECKING:
    from .predict import SegmentationPredictor, SegmentationResult

SHOWN = 3  # of the best and of the worst images


def write_report(predictor: "SegmentationPredictor", folder: Path, images: Any, measured: "SegmentationResult") -> Path:
    """Write report.html; the arguments are those of `Predictor.report`."""
    result = measured.result
    ranked = sorted(measured.by_image, key=lambda pair: -pair[1])
    worst = ranked[max(SHOWN, len(ranked) - SHOWN) :][::-1]

    def gallery(name: str, chosen: list[tuple[int, float]]) -> list[Block]:
        pairs = predictor.examples(images, [index for index, _ in chosen])
        found = [f"found: mIoU {percent(value)} of this image" for _, value in chosen]
        shown = [item for pair, text in zip(pairs, found, strict=False) for item in pairs_shown([pair], "annotated", text)]
        return [Gallery(name, lambda: shown, large=True)] if shown else []

    middle = ranked[len(ranked) // 2 : len(ranked) // 2 + 1]
    sections: dict[str, list[Block]] = {
        "": gallery("typical", middle),
        "How the training went": run_charts(folder, "val_mIoU", "mIoU"),
        "Classes": [class_chart(result["per_class"], "IoU")],
        "Confusion": confusion_blocks(measured.confusion.cpu().numpy(), predictor.class_names, "pixels"),
        "The best images": gallery("best", ranked[:SHOWN]),
    }
    if worst:
        sections["The worst images"] = gallery("worst", worst)
    tiles = {name.replace("_", " "): percent(result[name]) for name in ("mIoU", "accuracy", "mean_accuracy")}
    heading = f"mIoU {percent(result['mIoU'])} on {result['images']:,} held-out images"
    return finish(folder, heading, tiles, sections, measured)
