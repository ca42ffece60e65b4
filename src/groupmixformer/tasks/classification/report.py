"""The report of a run: confusion, classes, calibration, examples right and wrong, and what the model attends to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

from ...data.channels import AnyImage, ChannelImage, in_colour, stretched, to_npy
from ...files import read_text, short, write_file
from ...models.attention_maps import attention_maps, by_group_size, has_attention_maps, suited_stage
from ...models.groupmixformer import GroupMixFormer
from ...run_folder import EXAMPLES, RECIPE
from ...visual.charts import line_chart, new_axes
from ...visual.figures import BLUE, ORANGE, Row, overlay_figure, tip
from ...visual.page import Block, Chart, Gallery, Shown, Table
from ..predictor import percent, to_png
from ..report import class_chart, confusion_blocks, finish, run_charts
from .data import eval_transform
from .metrics import Evaluation, reliability
from .multi_label import THRESHOLD, THRESHOLDS, LabelEvaluation

if TYPE_CHECKING:
    from .predict import ClassificationResult, LabelResult

MOST_NAMED = 200  # classes whose rows a page lists


def class_blocks(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """List precision, recall and F1 of the classes, the worst F1 first, and their means."""
    ordered = sorted(rows, key=lambda row: (row["f1"] is None, row["f1"]))[:MOST_NAMED]
    listed = [
        [short(row["class"]), f"{row['images']:,}", *(percent(row[key]) for key in ("precision", "top1", "f1"))]
        for row in ordered
    ]
    present = [row for row in rows if row["images"]]
    means = [percent(float(np.mean([row[key] or 0 for row in present]))) for key in ("precision", "top1", "f1")]
    listed.append(["mean", f"{sum(row['images'] for row in rows):,}", *means])
    more = [f"The {MOST_NAMED} worst of {len(rows):,} classes; gmf eval --json has all."] if len(rows) > MOST_NAMED else []
    return [
        "Precision: of the images taken for a class, the share that is of it. Recall: of the images of a class, the share that "
        "is found. F1: their harmonic mean. The worst class first.",
        *more,
        Table(["class", "images", "precision", "recall", "F1"], listed),
    ]


def reliability_diagram(evaluation: Evaluation) -> Figure:
    """Draw the share of right answers over the confidence, by bin, and how many images each bin holds."""
    bins = reliability(evaluation)
    left, width = [row["from"] for row in bins], bins[0]["below"]
    figure, first = new_axes(4.4)
    first.remove()
    accuracy, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    right = [row["top1"] or 0 for row in bins]
    shown = accuracy.bar(left, right, 0.94 * width, align="edge", color=BLUE, label="share right")
    used = [row for row in bins if row["images"]]
    starts, sure = [row["from"] for row in used], [row["confidence"] for row in used]
    accuracy.hlines(sure, starts, [start + width for start in starts], color=ORANGE, linewidth=2, label="mean confidence")
    accuracy.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
    metrics = evaluation.metrics
    accuracy.set_title(f"Calibration error {metrics['calibration_error']:.2%} on {metrics['images']:,} images", fontsize=9)
    accuracy.set(ylabel="share of images right", xlim=(0, 1), ylim=(0, 1.02))
    bars = counts.bar(left, [row["images"] for row in bins], 0.94 * width, align="edge", color="#808080", linewidth=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, framealpha=0)
    counts.set(xlabel=f"confidence, in {len(bins)} bins", ylabel="images")
    for row, *parts in zip(bins, shown, bars, strict=True):
        for part in parts:
            of = f"{row['top1']:.1%} right at a mean confidence of {row['confidence']:.1%}" if row["images"] else "none"
            tip(part, f"confidence {row['from']:.2f} to {row['below']:.2f}: {row['images']:,} images\n{of}")
    return figure


def _attention(model: GroupMixFormer, images: Sequence[AnyImage], config: dict[str, Any]) -> Figure:
    """Draw, for the centre of each image, where the last block of stage 2 looks, by group size."""
    transform = eval_transform(config)
    inputs = torch.stack([transform(image) for image in images])
    height, width = inputs.shape[-2:]
    stage = suited_stage((height, width), range(min(3, len(model.stages))))
    with torch.inference_mode():
        maps = by_group_size(attention_maps(model, inputs, (height // 2, width // 2), stage), (height, width))
    mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
    seen = (inputs.permute(0, 2, 3, 1) * std + mean).numpy()
    if isinstance(images[0], Image.Image):
        seen = seen.clip(0, 1)
    else:
        seen = np.stack([stretched(one, images[0].display) / 255 for one in seen])
    rows = [
        Row(image, point=(height // 2, width // 2), strengths=strengths)
        for image, strengths in zip(seen, maps.numpy(), strict=True)
    ]
    return overlay_figure(rows, "query marked")


def _spread(indices: Sequence[int], number: int) -> list[int]:
    """Return so many of them or all, evenly spaced: data sets have class after class."""
    return [indices[i * len(indices) // number] for i in range(number)] if len(indices) > number else [*indices]


def _learnt_from(folder: Path) -> list[str]:
    """Say what a run learnt from besides the labels, and what of a model it trained."""
    recipe, told = yaml.safe_load(read_text(folder / RECIPE)), []
    distill, adapter = recipe.get("distill") or {}, recipe.get("adapter") or {"kind": "none"}
    if distill.get("teacher"):
        how = f", temperature {distill['temperature']:g}" if distill["kind"] == "logits" else ""
        weights = f"weight {distill['weight']:g} beside {distill['label_weight']:g}"
        told.append(f"Teacher: {distill['teacher']} ({distill['kind']}, {weights} of the labels{how}).")
    if adapter["kind"] != "none":
        layers = (
            "the classifier"
            if adapter["kind"] == "linear_probe"
            else f"{adapter['kind']} of rank {adapter['rank']}, classifier"
        )
        told.append(f"Trained: {layers}; the rest is {recipe['checkpoint']}.")
    return told


def write_report(
    folder: Path,
    model: nn.Module,
    images: Any,
    class_names: Sequence[str],
    measured: "ClassificationResult",
    config: dict[str, Any],
) -> Path:
    """Write report.html, one file with everything inside, and its charts beside it in report/.

    Args:
        folder: Folder of the run.
        model: The trained model, in eval mode.
        images: The held-out set.
        class_names: Names of the classes, in order.
        measured: What the predictor's `evaluate` found on the held-out set.
        config: Input of the model, by timm's names.

    Returns:
        The path of report.html.
    """
    evaluation, rows = measured.evaluation, measured.result["per_class"]
    assert evaluation is not None
    metrics, predicted, confidence, true = evaluation.metrics, evaluation.predicted, evaluation.confidence, evaluation.true
    wrong = sorted((predicted != true).nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))[:16]
    right = (predicted == true).nonzero().flatten().tolist()
    right = _spread(right, 16)
    if not hasattr(images, "read"):  # a stream, which does not give an image by its number
        wrong, right = [], []
    chosen = {i: images.read(int(evaluation.positions[i]))[0] for i in {*wrong, *right}}

    def shown(indices: Sequence[int]) -> list[Shown]:
        items = []
        for i in indices:
            name, is_right = short(class_names[int(predicted[i])]), bool(predicted[i] == true[i])
            other = "" if is_right else f", is {short(class_names[int(true[i])])}"
            items.append(Shown(in_colour(chosen[i]), f"{name} ({confidence[i]:.0%}){other}", is_right))
        return items

    few = np.random.default_rng(0).permutation(len(true))[:8].tolist() if chosen else []  # as they come, right and wrong
    chosen |= {i: images.read(int(evaluation.positions[i]))[0] for i in few if i not in chosen}
    counts = confusion_matrix(true, predicted, labels=range(len(class_names)))
    sections: dict[str, list[Block]] = {
        "": [Gallery("sample", lambda: shown(few))] if few else [],
        "How the training went": [*_learnt_from(folder), *run_charts(folder, "val_top1", "top-1")],
        "Confusion": confusion_blocks(counts, class_names, "images"),
        "Classes": class_blocks(rows),
        "Calibration": [
            "How far the confidence can be believed: where a bar ends at the orange line, it is right as often as it says.",
            Chart("calibration", "Share right by confidence", lambda: reliability_diagram(evaluation)),
        ],
    }
    if wrong:
        sections["Held-out images it gets wrong, the most confident first"] = [Gallery("wrong", lambda: shown(wrong))]
    if right:
        sections["Held-out images it gets right"] = [Gallery("right", lambda: shown(right))]
    if has_attention_maps(model) and right:
        title = "What the centre of an image attends to, by group size (magnitude of the implied attention)"
        looked = [chosen[i] for i in _spread(right, 4)]
        sections["Attention"] = [Chart("attention", title, lambda: _attention(model, looked, config), wide=True)]
    f1 = float(np.mean([row["f1"] for row in rows if row["images"]]))
    tiles = {
        "top-1": percent(metrics["top1"]),
        **({"top-5": percent(metrics["top5"])} if len(class_names) > 5 else {}),
        "mean F1": percent(f1),
        "loss": f"{metrics['loss']:.4f}",
        "calibration error": percent(metrics["calibration_error"]),
    }
    return finish(folder, f"{metrics['top1']:.2%} of {metrics['images']:,} held-out images right", tiles, sections, measured)


def threshold_chart(evaluation: LabelEvaluation) -> Figure:
    """Draw F1 over the least probability of a label, of all labels together and their mean."""
    own, together = evaluation.f1
    lines = {"micro": (100 * together).tolist(), "macro": (100 * own[:, evaluation.true.any(dim=0)].mean(dim=1)).tolist()}
    best = evaluation.metrics["best_threshold"]
    return line_chart(THRESHOLDS.tolist(), lines, form="{:.1f} %", mark=best, xlabel="threshold", ylabel="F1 (%)")


def label_blocks(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """Chart the average precision of the labels, and list what was measured of each, the worst first."""
    present = [row for row in rows if row["images"]]
    ordered = sorted(present, key=lambda row: row["AP"])[:MOST_NAMED]
    keys = ("AP", "precision", "recall", "f1", "best_f1")
    listed = [
        [short(row["class"]), f"{row['images']:,}", *(percent(row[key]) for key in keys), f"{row['best_threshold']:.2f}"]
        for row in ordered
    ]
    absent = len(rows) - len(present)
    more = [f"{absent} labels are of no held-out image, and left out of means."] if absent else []
    more += [f"The {MOST_NAMED} worst of {len(present):,}; gmf eval --json has all."] if len(present) > MOST_NAMED else []
    return [
        class_chart(ordered, "AP"),
        f"Precision, recall and F1 at a threshold of {THRESHOLD}; then the best F1 of each label and the threshold for it.",
        *more,
        Table(["label", "images", "AP", "precision", "recall", "F1", "best F1", "at"], listed),
    ]


def write_label_report(
    folder: Path, model: nn.Module, images: Any, class_names: Sequence[str], measured: "LabelResult", config: dict[str, Any]
) -> Path:
    """Write the report of a run with several labels for an image; takes and returns what `write_report` does."""
    evaluation, rows = measured.evaluation, measured.result["per_class"]
    assert evaluation is not None and measured.positions is not None
    metrics, true, positions = evaluation.metrics, evaluation.true, measured.positions.tolist()
    found = evaluation.probabilities >= THRESHOLD
    mistakes = (found != true).sum(dim=1)
    wrong = mistakes.argsort(descending=True, stable=True)[: min(16, int((mistakes > 0).sum()))].tolist()
    right = (mistakes == 0).nonzero().flatten().tolist()
    right = _spread(right, 16)
    few = np.random.default_rng(0).permutation(len(true))[:8].tolist()  # as they come, right and wrong
    chosen = {i: images.read(positions[i])[0] for i in {*wrong, *right, *few}}

    def names(row: torch.Tensor) -> str:
        return ", ".join(short(class_names[i]) for i in row.nonzero().flatten().tolist()) or "none"

    def shown(indices: Sequence[int]) -> list[Shown]:
        items = []
        for i in indices:
            truth = f"; is {names(true[i])}" if mistakes[i] else ""
            items.append(Shown(in_colour(chosen[i]), short(names(found[i]) + truth, 120), not mistakes[i]))
        return items

    sections: dict[str, list[Block]] = {
        "": [Gallery("sample", lambda: shown(few))],
        "How the training went": [*_learnt_from(folder), *run_charts(folder, "val_mAP", "mAP")],
        "Labels": label_blocks(rows),
        "Threshold": [
            "A label is said to be there if its probability is at least a threshold. Micro: F1 of all labels together, best at "
            f"{metrics['best_threshold']:.2f}: {percent(metrics['best_f1_micro'])}. Macro: the mean of the labels' F1.",
            Chart("threshold", "F1 over the threshold", lambda: threshold_chart(evaluation)),
        ],
    }
    if wrong:
        sections["Held-out images with wrong labels, the most wrong first"] = [Gallery("wrong", lambda: shown(wrong))]
    if right:
        sections["Held-out images with the right labels"] = [Gallery("right", lambda: shown(right))]
    if has_attention_maps(model):
        title = "What the centre of an image attends to, by group size (magnitude of the implied attention)"
        looked = [chosen[i] for i in few[:4]]
        sections["Attention"] = [Chart("attention", title, lambda: _attention(model, looked, config), wide=True)]
    tiles = {
        "mAP": percent(metrics["mAP"]),
        f"macro F1 at {THRESHOLD}": percent(metrics["f1_macro"]),
        f"micro F1 at {THRESHOLD}": percent(metrics["f1_micro"]),
        f"best micro F1, at {metrics['best_threshold']:.2f}": percent(metrics["best_f1_micro"]),
        "loss": f"{metrics['loss']:.4f}",
    }
    return finish(folder, f"mAP {percent(metrics['mAP'])} on {len(true):,} held-out images", tiles, sections, measured)


def save_examples(folder: Path, images: Any, class_names: Sequence[str], number: int = 3) -> list[Path]:
    """Write a few held-out images of different classes to examples/, to try `gmf predict` on."""
    paths: dict[int, Path] = {}
    for index in np.random.default_rng(0).permutation(len(images)) if hasattr(images, "read") else ():
        try:
            image, label = images.read(int(index))
        except ValueError:  # unreadable
            continue
        label = next(iter(label.nonzero()[:, 0].tolist()), -1) if isinstance(label, torch.Tensor) else label  # of several
        if label not in paths and label >= 0:
            name = "".join(c if c.isalnum() else "_" for c in class_names[label])[:40]
            path = folder / EXAMPLES / f"{name}.{'npy' if isinstance(image, ChannelImage) else 'png'}"
            paths[label] = path.with_stem(f"{name}-{label}") if path in paths.values() else path
            write_file(paths[label], to_npy(image) if isinstance(image, ChannelImage) else to_png(image))
        if len(paths) == min(number, len(class_names)):
            break
    return list(paths.values())


mpl.use("agg")  # images go to files
