"""Metrics of a classifier that gives an image several labels. No Lightning here, so that a prediction starts fast."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics import Pass

THRESHOLDS = torch.arange(1, 100, dtype=torch.float64) / 100
THRESHOLD = 0.5  # of the probability of a label that an image is said to have


@dataclass(frozen=True)
class LabelEvaluation:
    """What a classifier says of N images.

    Attributes:
        probabilities: Of each label (N, classes), float64.
        true: Whether an image has it (N, classes).
        metrics: mAP, the mean over the labels of the average precision; f1_macro, the mean of their F1, and f1_micro, F1 of all
            labels together, at `THRESHOLD`; best_threshold, at which f1_micro is best, and its value, best_f1_micro; loss, the
            mean binary cross entropy in nats. Labels that no image has are left out of means.
        f1: At each of `THRESHOLDS` (T), of each label (T, classes), and of all together (T).
    """

    probabilities: Tensor
    true: Tensor
    metrics: dict[str, float]
    f1: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "LabelEvaluation":
        """Measure logits and labels (N, classes), which are 0 or 1."""
        logits = logits.double()
        probabilities, true = logits.sigmoid(), labels > 0.5
        own, together = zip(*(_f1(probabilities >= threshold, true) for threshold in THRESHOLDS), strict=True)
        f1 = torch.stack(own), torch.stack(together)
        there = true.any(dim=0)
        best = (f1[1] == f1[1].max()).nonzero()[:, 0]
        place = best[len(best) // 2]  # the middle of those that are as good
        half = int((THRESHOLDS - THRESHOLD).abs().argmin())
        precisions = average_precision(probabilities, true)
        metrics = {
            "mAP": float(np.nanmean(precisions)) if there.any() else 0.0,
            "f1_macro": f1[0][half, there].mean().item() if there.any() else 0.0,
            "f1_micro": f1[1][half].item(),
            "best_threshold": THRESHOLDS[place].item(),
            "best_f1_micro": f1[1][place].item(),
            "loss": F.binary_cross_entropy_with_logits(logits, labels.double()).item(),
        }
        return cls(probabilities, true, metrics, f1)

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Measure each class, in order.

        Returns:
            class, index, images (that have it), AP, and at `THRESHOLD` precision, recall and f1; best_threshold for this label
            alone, and its f1, best_f1. None for a class that no image has; precision also where it is found in none.
        """
        found, rows = self.probabilities >= THRESHOLD, []
        half = int((THRESHOLDS - THRESHOLD).abs().argmin())
        for index, (name, precision) in enumerate(
            zip(class_names, average_precision(self.probabilities, self.true), strict=True)
        ):
            images, taken, right = (int(part[:, index].sum()) for part in (self.true, found, self.true & found))
            place = int(self.f1[0][:, index].argmax())
            measured = {
                "AP": float(precision),
                "precision": right / taken if taken else None,
                "recall": right / max(1, images),
                "f1": self.f1[0][half, index].item(),
                "best_threshold": THRESHOLDS[place].item(),
                "best_f1": self.f1[0][place, index].item(),
            }
            measured = measured if images else dict.fromkeys(measured)
            rows.append({"class": name, "index": index, "images": images, **measured})
        return rows


def _f1(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return F1 of each label (classes) and of all together, of what was found and is true (N, classes)."""
    right, said = (found & true).sum(dim=0), found.sum(dim=0) + true.sum(dim=0)  # twice those found, and all of both
    return 2 * right.double() / said.clamp(min=1), 2 * right.sum().double() / said.sum().clamp(min=1)


def average_precision(probabilities: Tensor, true: Tensor) -> Any:
    """Return scikit-learn's average precision of each label (classes) as an array, NaN for one that no image has."""
    from sklearn.metrics import average_precision_score

    there, values = true.any(dim=0), np.full(true.shape[1], np.nan)
    if there.any():
        values[there.numpy()] = average_precision_score(true[:, there].numpy(), probabilities[:, there].numpy(), average=None)
    return values


@torch.inference_mode()
def evaluate_labels(
    model: nn.Module, loader: Iterable[Sequence[Any]], dtype: torch.dtype | None = None
) -> tuple[LabelEvaluation, Pass]:
    """Evaluate on every image once.

    Args:
        model: As `Pass` takes it.
        loader: As `Pass` takes it, with labels (B, classes).
        dtype: As `Pass` takes it.

    Raises:
        ValueError: As `Pass` does.
    """
    looked = Pass(model, loader, dtype)
    logits, labels = zip(*((logits.cpu(), labels) for logits, labels in looked), strict=True)
    return LabelEvaluation.of(torch.cat(logits), torch.cat(labels)), looked
