"""Whether maps are faithful: what a prediction loses as the places that they point at go, and gains as they are shown."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from torchvision.transforms.v2 import functional as images

from ..models.attention_maps import attend, class_relevance, has_attention_maps, stages_of, suited_stage

STEPS = 10  # parts in which all places of an image are taken away
SIZES = (1, 3, 5, 7)  # of the groups
FINEST = 8  # tokens along a side from which a stage is looked at; suited_stage is content with 4

Probabilities = Callable[[Tensor], Tensor]


def taken_from(model: nn.Module, pixels: Tensor, stage: int) -> Tensor:
    """Return how much all places of images take from each, by group size: the mean magnitude of the implied attention.

    Args:
        model: A `GroupMixFormer` with Group-Mix Attention, in eval mode.
        pixels: Normalised images (B, C, H, W).
        stage: As in `attention_maps`.

    Returns:
        (B, 4, h, w): of single tokens, groups of 3 x 3, 5 x 5 and 7 x 7.
    """
    stride = 4 * 2**stage
    queries = [(y, x) for y in range(0, pixels.shape[-2], stride) for x in range(0, pixels.shape[-1], stride)]
    maps = attend(model, pixels, queries, (stage,))[stage].maps  # (B, queries, 8, h, w)
    return maps.abs().mean(dim=1).unflatten(1, (4, 2)).mean(dim=2)


def curve(probabilities: Probabilities, pixels: Tensor, importance: Tensor, classes: Tensor, remove: bool) -> Tensor:
    """Return the area under the probability of a class while places go, or come back, the most important first.

    Deletion and insertion (Petsiuk et al., 2018, arXiv 1806.07421): what is not there is blurred.

    Args:
        probabilities: From normalised images (B, C, H, W) to (B, classes).
        pixels: Normalised images (B, C, H, W).
        importance: Of their places (B, h, w).
        classes: Of each image (B).
        remove: Delete, from the whole image on; otherwise insert, from a blurred one on.

    Returns:
        (B), 0 to 1. A faithful map has a low area of deletion and a high one of insertion.
    """
    places = importance[0].numel()
    rank = importance.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view_as(importance)
    sigma = min(pixels.shape[-2:]) / 8
    blurred = images.gaussian_blur(pixels, [2 * math.ceil(2 * sigma) + 1] * 2, [sigma] * 2)
    found = []
    for step in range(STEPS + 1):
        first = (rank < places * step / STEPS)[:, None].float()
        first = F.interpolate(first, pixels.shape[-2:], mode="nearest").bool()
        shown = torch.where(first, blurred, pixels) if remove else torch.where(first, pixels, blurred)
        found.append(probabilities(shown).gather(1, classes[:, None])[:, 0])
    return torch.trapezoid(torch.stack(found), dim=0) / STEPS


def with_random_weights(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are as before training (the check of Adebayo et al., 2018, arXiv 1810.03292)."""
    fresh = copy.deepcopy(model)
    module: Any
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return fresh


def faithfulness(model: Any, probabilities: Probabilities, pixels: Tensor) -> dict[str, float]:
    """Measure the maps of a classifier by what they do to its predictions.

    Args:
        model: In eval mode.
        probabilities: From normalised images (B, C, H, W) to (B, classes), on the CPU.
        pixels: Normalised images (B, C, H, W).

    Returns:
        deletion and insertion of the likeliest class, by map: ``_1``, ``_3``, ``_5`` and ``_7`` for the group sizes (none of
        other networks), ``_relevance`` for `class_relevance`, ``_random`` for any order, the level to beat. And
        ``randomised_1`` and so on: the rank correlation of a map with that of random weights, near 0 for one that tells of
        what was learnt.
    """
    device = next(model.parameters()).device
    size, places = pixels.shape[-2:], stages_of(model)
    stage = max((stage for stage in places if min(size) // (4 * 2**stage) >= FINEST), default=suited_stage(size, places))
    classes = probabilities(pixels).argmax(dim=1)
    relevance, _ = class_relevance(model, pixels.to(device), classes.tolist(), stage)
    side = tuple(math.ceil(length / (4 * 2**stage)) for length in size)
    maps: dict[str, Tensor] = {
        "relevance": F.adaptive_avg_pool2d(relevance[:, None].cpu(), side)[:, 0],
        "random": torch.rand(len(pixels), *side, generator=torch.Generator().manual_seed(0)),
    }
    found: dict[str, float] = {}
    if has_attention_maps(model):
        with torch.inference_mode():
            ours = taken_from(model, pixels.to(device), stage).cpu()
            others = taken_from(with_random_weights(model), pixels.to(device), stage).cpu()
        for place, k in enumerate(SIZES):
            maps[str(k)] = ours[:, place]
            found[f"randomised_{k}"] = float(spearman_corrcoef(*(x[:, place].flatten(1).T for x in (ours, others))).mean())
    for name, importance in maps.items():
        for kind, remove in (("deletion", True), ("insertion", False)):
            found[f"{kind}_{name}"] = curve(probabilities, pixels, importance, classes, remove).mean().item()
    return found
