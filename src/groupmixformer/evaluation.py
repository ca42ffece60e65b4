"""Logits and accuracy of a classifier. No Lightning here, so that a prediction starts fast."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield logits (B, classes), in float32 on the CPU, of batches of images (B, 3, H, W)."""
    device = next(model.parameters()).device
    for images in batches:
        yield model(images.to(device)).float().cpu()


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], Tensor, Tensor]:
    """Evaluate on every image once.

    Returns:
        Metrics (top1 and top5 as shares of 1, loss as mean cross entropy, images as their number), logits (N, classes) and
        true classes (N).
    """
    true: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for batch, classes in loader:
            true.append(classes)
            yield batch

    logits = torch.cat(list(predict(model, images())))
    classes = torch.cat(true)
    right = logits.argsort(dim=1, descending=True) == classes[:, None]
    metrics = {
        "top1": right[:, :1].any(dim=1).double().mean().item(),
        "top5": right[:, :5].any(dim=1).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), classes).item(),
        "images": len(classes),
    }
    return metrics, logits, classes
