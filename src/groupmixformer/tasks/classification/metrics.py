"""Accuracy and calibration of a classifier. No Lightning here, so that a prediction starts fast."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.samples import Doubts

BINS = 15  # equal bins of confidence for the calibration error, the usual number since Guo et al. (2017)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_classifier` found on N images.

    Attributes:
        metrics: top1 and top5 as shares of 1; loss, the mean cross entropy in nats; calibration_error, the expected calibration
            error as a share of 1; images, which is N; skipped, the number of images that could not be read; images_per_second
            of the whole evaluation, loading included, and model_images_per_second of the model alone.
        predicted: Most likely class of each image (N).
        confidence: Probability of that class (N), float32.
        true: True class of each image (N).
        positions: Place of each image in the loader's order (N), in which those left out have theirs too.
        problems: A line for each image that could not be read: its file and the reason.
    """

    metrics: dict[str, float]
    predicted: Tensor
    confidence: Tensor
    true: Tensor
    positions: Tensor
    problems: list[str]


def _timed(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, float]:
    """Return logits (B, classes), in float32 on the model's device, and the seconds that the model took."""

    def wait() -> None:
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)

    wait()
    start = time.perf_counter()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    wait()
    return logits.float(), time.perf_counter() - start


class Pass:
    """A classifier looks at every image once.

    Args:
        model: In eval mode; its device is used.
        loader: Batches of (images (B, 3, H, W), classes (B) or labels (B, classes)) or (images, classes, problems). Images of
            class -1 are left out: they could not be read, and `problems` has a line for each; those that only fill up a batch
            have none.
        dtype: bfloat16 or float16 to run the model under autocast; none to run it as it is.

    Attributes:
        positions: Place of each image (N) in the loader's order, in which those left out have theirs too.
        problems: A line for each image that could not be read.
        counts: images, which is N; skipped, the number of images that could not be read; images_per_second, loading included;
            model_images_per_second.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Sequence[Any]], dtype: torch.dtype | None = None) -> None:
        self.model, self.loader, self.dtype = model, loader, dtype

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits (B, classes), in float32 on the model's device, and classes.

        Raises:
            ValueError: If the model is in training mode or gives values that are not finite, or if no image is left.
        """
        if self.model.training:
            raise ValueError("the model is in training mode, which changes its answers: call model.eval() first")
        device = next(self.model.parameters()).device
        places: list[Tensor] = []
        problems: list[str] = []
        seconds: list[float] = []
        seen, skipped, start = 0, 0, time.perf_counter()
        for images, classes, *lines in self.loader:
            counts = (classes >= 0).reshape(len(classes), -1).all(dim=1)
            problems += lines[0] if lines else []
            skipped += 0 if lines else int((~counts).sum())
            positions = seen + counts.nonzero().flatten()
            seen += len(classes)
            if not counts.all():
                images, classes = images[counts], classes[counts]
            if not len(classes):
                continue
            logits, took = _timed(self.model, images.to(device, non_blocking=True), self.dtype)
            finite = logits.isfinite().all(dim=1).cpu()
            if not finite.all():
                raise ValueError(
                    f"the model's output for image {int(positions[~finite][0])} is not finite: its weights are damaged, or the "
                    "precision is too low for them"
                )
            seconds.append(took)
            places.append(positions)
            yield logits, classes
        whole = time.perf_counter() - start
        if not seconds:
            raise ValueError(f"no image to evaluate on: {seen} were given and none could be read")
        self.problems = Doubts().take(problems)
        self.positions = torch.cat(places)
        warm = slice(min(1, len(seconds) - 1), None)  # without the first batch, which also sets things up
        self.counts: dict[str, float] = {
            "images": len(self.positions),
            "skipped": skipped + len(self.problems),
            "images_per_second": len(self.positions) / whole,
            "model_images_per_second": sum(map(len, places[warm])) / sum(seconds[warm]),
        }


@torch.inference_mode()
def evaluate_classifier(model: nn.Module, loader: Iterable[Sequence[Any]], dtype: torch.dtype | None = None) -> Evaluation:
    """Evaluate on every image once, with the numbers that timm's validation gives.

    Args:
        model: As `Pass` takes it.
        loader: As `Pass` takes it.
        dtype: As `Pass` takes it.

    Raises:
        ValueError: As `Pass` does.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    found: dict[str, list[Tensor]] = {name: [] for name in ("top5", "predicted", "confidence", "true")}
    loss, looked = 0.0, Pass(model, loader, dtype)
    for logits, classes in looked:
        # As timm does it, batch by batch on the model's device: that decides which of equal logits comes first.
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        logits = logits.cpu()
        loss += F.cross_entropy(logits.double(), classes, reduction="sum").item()
        found["top5"].append((best == classes[:, None]).any(dim=1))
        found["predicted"].append(best[:, 0])
        found["confidence"].append(logits.softmax(dim=1).gather(1, best[:, :1]).flatten())
        found["true"].append(classes)
    top5, predicted, confidence, true = (torch.cat(parts) for parts in found.values())
    right = predicted == true
    # Calibration of the top label asks of each image whether that label is right: a binary matter. torchmetrics gives a
    # confidence of exactly 1 a bin of its own above the last one, which the clamp undoes.
    error = binary_calibration_error(confidence.clamp(max=1 - 2**-24), right.long(), n_bins=BINS, norm="l1")
    metrics = {
        "top1": right.double().mean().item(),
        "top5": top5.double().mean().item(),
        "loss": loss / len(true),
        "calibration_error": error.item(),
        **looked.counts,
    }
    return Evaluation(metrics, predicted, confidence, true, looked.positions, looked.problems)


def per_class(evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure each class, in order.

    Returns:
        class, index, images, top1 (the share of its images that are right: its recall), precision (the share of right ones
        among the images that are taken for it) and f1, the harmonic mean of both. None where it has no images; precision also
        where no image is taken for it.
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels = range(len(class_names))
    precision, recall, f1, images = precision_recall_fscore_support(
        evaluation.true, evaluation.predicted, labels=labels, zero_division=np.nan
    )
    return [
        {
            "class": name,
            "index": index,
            "images": int(n),
            "top1": float(r) if n else None,
            "precision": None if np.isnan(p) or not n else float(p),
            "f1": float(f) if n else None,
        }
        for index, (name, n, p, r, f) in enumerate(zip(class_names, images, precision, recall, f1, strict=True))
    ]


def reliability(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the bins of confidence that the calibration error is made of.

    Returns:
        For each bin, in order: its limits, from and below (the last one includes 1), the number of images, and their mean
        confidence and top1 (none without images).
    """
    limits = torch.linspace(0, 1, BINS + 1)
    bins = torch.bucketize(evaluation.confidence, limits[1:-1], right=True)
    images = bins.bincount(minlength=BINS)
    right = evaluation.predicted == evaluation.true
    confidence, top1 = (bins.bincount(x.double(), BINS) / images for x in (evaluation.confidence, right))
    return [
        {"from": low, "below": high, "images": n, "confidence": c if n else None, "top1": t if n else None}
        for low, high, n, c, t in zip(
            limits[:-1].tolist(), limits[1:].tolist(), images.tolist(), confidence.tolist(), top1.tolist(), strict=True
        )
    ]
