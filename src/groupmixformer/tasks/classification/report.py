"""The report of a run: curves, confusion matrix, calibration, examples right and wrong, and what the model attends to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor, nn

from ...files import short, write_file
from ...models.attention_maps import attention_maps, by_group_size, has_attention_maps, suited_stage
from ...models.groupmixformer import GroupMixFormer
from ...run_folder import EXAMPLES
from ...visual.figures import BLUE, ORANGE, Row, overlay_figure
from ...visual.page import curves, write_page
from ..predictor import to_png
from .data import eval_transform
from .metrics import Evaluation, reliability


def _confusion(true: Tensor, predicted: Tensor, class_names: Sequence[str]) -> Figure:
    names = [short(name) for name in class_names]
    side = min(14, 3 + 0.35 * len(names) + 0.08 * max(map(len, names)))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        true,
        predicted,
        labels=range(len(class_names)),
        display_labels=names,
        include_values=len(class_names) <= 20,
        cmap="Blues",
        xticks_rotation="vertical",
        colorbar=False,
        ax=axes,
    )
    return figure


def reliability_diagram(evaluation: Evaluation) -> Figure:
    """Draw the share of right answers over the confidence, by bin, and how many images each bin holds."""
    bins = reliability(evaluation)
    left, width = [row["from"] for row in bins], bins[0]["below"]
    used = [row for row in bins if row["images"]]
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    accuracy, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    accuracy.bar(
        left, [row["top1"] or 0 for row in bins], width, align="edge", color=BLUE, edgecolor="white", label="share right"
    )
    accuracy.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
    accuracy.plot(
        [row["confidence"] for row in used],
        [row["top1"] for row in used],
        color=ORANGE,
        marker="o",
        linestyle="none",
        label="mean confidence of the bin",
    )
    accuracy.set(ylabel="share of images right", xlim=(0, 1), ylim=(0, 1.02))
    metrics = evaluation.metrics
    accuracy.set_title(f"Expected calibration error {metrics['calibration_error']:.2%} on {metrics['images']:,} images")
    accuracy.legend(loc="upper left")
    bars = counts.bar(left, [row["images"] for row in bins], width, align="edge", color="0.6", edgecolor="white")
    counts.bar_label(bars, [f"{row['images']:,}" if row["images"] else "" for row in bins], fontsize=7)
    counts.margins(y=0.2)
    counts.set(xlabel=f"confidence, in {len(bins)} bins", ylabel="images")
    return figure


def _examples(images: Sequence[Image.Image], titles: Sequence[str], colors: Sequence[str]) -> Figure:
    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.6 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title, color in zip(figure.axes, images, titles, colors, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=7, color=color)
    return figure


def _attention(model: GroupMixFormer, images: Sequence[Image.Image], config: dict[str, Any]) -> Figure:
    """Draw, for the centre of each image, where the last block of stage 2 looks, by group size."""
    transform = eval_transform(config)
    inputs = torch.stack([transform(image) for image in images])
    height, width = inputs.shape[-2:]
    stage = suited_stage((height, width), range(min(3, len(model.stages))))
    with torch.inference_mode():
        maps = by_group_size(attention_maps(model, inputs, (height // 2, width // 2), stage), (height, width))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    seen = (inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    rows = [
        Row(image, point=(height // 2, width // 2), strengths=strengths)
        for image, strengths in zip(seen, maps.numpy(), strict=True)
    ]
    return overlay_figure(rows, "query marked")


def write_report(
    folder: Path,
    model: nn.Module,
    images: Any,
    class_names: Sequence[str],
    evaluation: Evaluation,
    config: dict[str, Any],
) -> Path:
    """Write report.html, one file with its images inside, and the images beside it in report/.

    Args:
        folder: Folder of the run.
        model: The trained model, in eval mode.
        images: The held-out set.
        class_names: Names of the classes, in order.
        evaluation: What `evaluate_classifier` found on the held-out set.
        config: Input of the model, by timm's names.

    Returns:
        The path of report.html.
    """
    metrics, predicted, confidence, true = evaluation.metrics, evaluation.predicted, evaluation.confidence, evaluation.true
    wrong = sorted((predicted != true).nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))[:16]
    right = (predicted == true).nonzero().flatten().tolist()
    right = right[:: max(1, len(right) // 16)][:16]
    if not hasattr(images, "read"):  # a stream, which does not give an image by its number
        wrong, right = [], []
    chosen = {i: images.read(int(evaluation.positions[i]))[0] for i in {*wrong, *right}}

    def shown(indices: Sequence[int]) -> Figure:
        titles = [f"{short(class_names[int(predicted[i])])} ({confidence[i]:.0%})" for i in indices]
        titles = [
            title if predicted[i] == true[i] else f"{title}\nis {short(class_names[int(true[i])])}"
            for i, title in zip(indices, titles, strict=True)
        ]
        colors = [BLUE if predicted[i] == true[i] else ORANGE for i in indices]
        return _examples([chosen[i] for i in indices], titles, colors)

    sections = {
        "Curves": ("curves", lambda: curves(folder, "val_top1", "top-1")),
        "Confusion": ("confusion", lambda: _confusion(true, predicted, class_names)),
        "Calibration": ("calibration", lambda: reliability_diagram(evaluation)),
    }
    if wrong:
        sections["Held-out images it gets wrong, the most confident first"] = ("wrong", lambda: shown(wrong))
    if right:
        sections["Held-out images it gets right"] = ("right", lambda: shown(right))
    if has_attention_maps(model) and right:
        caption = "What the centre of an image attends to, by group size (magnitude of the implied attention)"
        sections[caption] = ("attention", lambda: _attention(model, [chosen[i] for i in right[:4]], config))

    rows = {
        "top-1": f"{metrics['top1']:.2%}",
        "top-5": f"{metrics['top5']:.2%}",
        "loss": f"{metrics['loss']:.4f}",
        "calibration error": f"{metrics['calibration_error']:.2%}",
        "held-out images": f"{metrics['images']:,}; the epoch shown is the best of the run on these same images",
        **({"held-out images left out": f"{metrics['skipped']:,} that cannot be read"} if metrics["skipped"] else {}),
    }
    return write_page(folder, f"{metrics['top1']:.2%} of {metrics['images']:,} held-out images right", rows, sections)


def save_examples(folder: Path, images: Any, class_names: Sequence[str], number: int = 3) -> list[Path]:
    """Write a few held-out images of different classes to examples/, to try `gmf predict` on."""
    paths: dict[int, Path] = {}
    for index in np.random.default_rng(0).permutation(len(images)) if hasattr(images, "read") else ():
        try:
            image, label = images.read(int(index))
        except ValueError:  # unreadable
            continue
        if label not in paths:
            name = "".join(c if c.isalnum() else "_" for c in class_names[label])[:40]
            path = folder / EXAMPLES / f"{name}.png"
            paths[label] = path.with_stem(f"{name}-{label}") if path in paths.values() else path
            write_file(paths[label], to_png(image))
        if len(paths) == min(number, len(class_names)):
            break
    return list(paths.values())


mpl.use("agg")  # images go to files
