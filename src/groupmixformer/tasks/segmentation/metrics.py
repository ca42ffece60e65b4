"""Metrics of semantic segmentation, all from one confusion matrix of a whole set."""

from typing import Any

from torch import Tensor

from .data import IGNORE


def confusion_matrix(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns), (K, K), without those of `IGNORE`."""
    counted = true != IGNORE
    pairs = true[counted].long() * classes + predicted[counted].long()
    return pairs.bincount(minlength=classes**2).reshape(classes, classes)


def segmentation_metrics(confusion: Tensor) -> dict[str, Any]:
    """Compute what is usual from the confusion matrix of a whole set.

    Args:
        confusion: Pixels by true class (rows) and predicted class (columns), (K, K).

    Returns:
        mIoU, the mean over classes of intersection over union, without classes that are neither there nor predicted; accuracy,
        the share of pixels that are right; mean_accuracy, its mean over the classes that are there; iou, for each class, none
        where it is neither there nor predicted. All are shares of 1.
    """
    confusion = confusion.double().cpu()
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, recall = right / (true + predicted - right), right / true  # NaN where there is nothing
    return {
        "mIoU": iou.nanmean().item(),
        "accuracy": (right.sum() / confusion.sum()).item(),
        "mean_accuracy": recall.nanmean().item(),
        "iou": [None if value != value else value for value in iou.tolist()],
    }
