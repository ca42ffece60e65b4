"""A classifier cut to a smaller width of its MLPs, with statistics of its own in BatchNorm."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ...data.split import Splitter
from ...data.streaming import Stream
from ...models.elastic import extract
from .data import collate_classification, eval_transform, open_images, training_config

if TYPE_CHECKING:  # which brings jsonargparse
    from ...training.recipe import Recipe

BATCH = 64


def cut(model: Any, width: float, recipe: "Recipe", split: Path, images: int) -> tuple[Any, int]:
    """Cut a width out of a classifier and estimate the statistics of its BatchNorm again, on training images as in evaluation.

    In training all widths share them, and none has quite the statistics of another (Yu and Huang, 2019, arXiv 1903.05134).

    Args:
        model: From a run that was trained with `elastic`; it is not changed.
        width: Share of the hidden units.
        recipe: Of the run, for its data.
        split: File of the run that says which images were trained on, if there is one.
        images: How many, drawn at random, the same for every width; 0 leaves the statistics.

    Returns:
        The smaller classifier in eval mode, and the number of images that were taken.

    Raises:
        ValueError: If the width cannot be cut out, or the training images cannot be read.
    """
    smaller = extract(model, width)
    if not images:
        return smaller, 0
    data = open_images(recipe.data, recipe.root, splitter=Splitter(stored=[split]) if split.is_file() else None)
    samples = data.train(eval_transform(training_config(recipe, smaller)), 0, recipe.channels)
    if isinstance(samples, Stream):
        raise ValueError(
            f"{recipe.data}: is a stream, of which no images are drawn at random: keep the statistics (--images 0)"
        )
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:images].tolist()

    def batches() -> Iterator[Tensor]:
        for begin in range(0, len(drawn), BATCH):
            found, _, problems = collate_classification([samples[index] for index in drawn[begin : begin + BATCH]])
            if problems:
                raise ValueError(f"{problems[0]}: cannot be read: keep the statistics (--images 0), or repair it")
            yield found

    with torch.no_grad():
        update_bn(batches(), smaller)
    return smaller.eval(), len(drawn)
