"""The training steps of semantic segmentation."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from ...run_folder import save_network
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from ..backbone import Backbone, colours_left_out, open_backbone, pixel_statistics, shown_channels, start_from
from .data import IGNORE, SemanticImages, collate_segmentation, segmentation_transform
from .metrics import segmentation_metrics
from .model import Segmenter, prepare_image, segment


class SegmentationModule(Task):
    """Trains a segmenter by a recipe.

    Args:
        recipe: The settings.
        train: Training set.
        held_out: Validation set.
        backbone: Of the recipe.
        weights: Of the classifier that it comes from, if there is one.
        colors: Mean and std of the pixels that the backbone is used to, by name.
        world_size: Number of processes.
    """

    monitor = "val_mIoU"

    def __init__(
        self,
        recipe: Recipe,
        train: SemanticImages,
        held_out: SemanticImages,
        backbone: Backbone,
        weights: dict[str, Tensor] | None,
        colors: dict[str, list[float]],
        world_size: int = 1,
    ) -> None:
        settings = recipe.segmenter
        self.colors, self.class_ids = train.colors, train.class_ids
        self.network: dict[str, Any] = {
            "num_classes": len(train.class_names),
            "decoder": settings.decoder,
            "channels": settings.channels,
            "auxiliary": settings.aux_loss_weight > 0,
            **({"queries": settings.queries} if settings.decoder == "mask2former" else {}),
            "image_size": recipe.image_size,
            **colors,
        }
        model = Segmenter(backbone, **self.network, drop_path_rate=recipe.drop_path_rate, weights=weights)
        new = start_from(model, recipe.checkpoint, "segmentation", train.class_names)
        if settings.freeze_bn:
            model.freeze_statistics()
        if recipe.batch_size < 2 and any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.network.modules()):
            raise ValueError(
                f"got batch_size 1, expected 2 or more: {settings.decoder} has BatchNorm after pooling to one pixel"
            )
        loaders = DataModule(train, held_out, recipe.batch_size, recipe.workers, recipe.seed, collate_segmentation)
        super().__init__(recipe, model, loaders, train.class_names, world_size)
        self.note_new(new)
        self.notes += colours_left_out(recipe, train, ["photometric"] if settings.photometric else [])
        self.confusion = MulticlassConfusionMatrix(len(train.class_names), ignore_index=IGNORE)
        self.val_images = SumMetric()

    def training_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, C, H, W), labels (B, H, W) and problems: cross entropy of the pixels.

        Of mask2former it is its own.
        """
        images, labels, problems = batch
        self.note_unreadable(problems)
        if self.recipe.segmenter.decoder == "mask2former":
            loss: Tensor = self.model.loss_by_queries(images, labels, IGNORE)
            self.log_loss(loss, len(images))
            return loss
        outputs = self.model(images)
        main, *second = outputs if isinstance(outputs, tuple) else (outputs,)
        counted = (labels != IGNORE).sum().clamp(min=1)  # a batch may hold nothing to learn from

        def loss_of(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum") / counted

        loss = loss_of(main)
        for logits in second:
            loss = loss + self.recipe.segmenter.aux_loss_weight * loss_of(logits)
        self.log_loss(loss, len(images))
        return loss

    def validation_step(self, batch: tuple[Any, Any, list[str]], batch_idx: int) -> None:
        """Count the pixels of held-out images by true and predicted class; empty labels fill up a batch."""
        images, labels, _ = batch
        for image, true in zip(images, labels, strict=True):
            if true.numel():
                probabilities = segment(self.evaluated, image, (true.shape[0], true.shape[1]))
                self.confusion.update(probabilities.argmax(dim=0)[None], true[None])
                self.val_images.update(1)

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics from the one confusion matrix of all processes."""
        metrics = segmentation_metrics(self.confusion.compute())
        self.log_dict(
            {f"val_{name}": metrics[name] for name in ("mIoU", "accuracy")} | {"val_images": self.val_images.compute()}
        )
        self.confusion.reset()
        self.val_images.reset()

    def save(self, model: Any, folder: Path) -> None:
        """Write a segmenter to a folder that `load_segmenter` reads."""
        network = {"backbone": asdict(model.backbone), **self.network}
        names = {"class_names": self.class_names, "class_ids": self.class_ids, "colors": self.colors}
        save_network(model, folder, {"task": "segmentation", **names, "network": network} | shown_channels(self.recipe))

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> "SegmentationModule":
        """Open the recipe's data and create its segmenter.

        Raises:
            ValueError: If one of them cannot be used.
        """
        settings = recipe.segmenter
        backbone, weights, colors = open_backbone(
            recipe.model, recipe.checkpoint, "segmentation", recipe.model_options, recipe.in_chans
        )
        colors = pixel_statistics(recipe, colors)
        mean, std = colors.get("mean", IMAGENET_DEFAULT_MEAN), colors.get("std", IMAGENET_DEFAULT_STD)
        augment = segmentation_transform(recipe.image_size, settings.scale, settings.hflip, settings.photometric, mean, std)
        prepare = partial(prepare_image, image_size=recipe.image_size, mean=mean, std=std)
        reading: dict[str, Any] = {"splitter": recipe.splitter, "channels": recipe.channels}
        train = SemanticImages(recipe.data, "train", transform=augment, seed=recipe.seed, **reading)
        held_out = SemanticImages(recipe.data, "val", prepare=prepare, **reading)
        return cls(recipe, train, held_out, backbone, weights, colors, world_size)
