"""Image classification: the model of a recipe and its training steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ...models.checkpoint import load_model, model_arguments, model_name, save_checkpoint
from ...models.groupmixformer import GroupMixFormer
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from .data import (
    ImageData,
    ImageSamples,
    classification_transform,
    collate_classification,
    eval_transform,
    open_images,
    training_config,
)


def create_classifier(recipe: Recipe, class_names: Sequence[str]) -> Any:
    """Create the recipe's timm model; from a checkpoint, with its architecture and weights.

    The checkpoint's classifier stays if it has as many classes and does not name others; otherwise a new one takes its place.

    Raises:
        ValueError: If there is no such model or checkpoint.
    """
    settings: dict[str, Any] = {"num_classes": len(class_names), "drop_path_rate": recipe.drop_path_rate}
    if not recipe.checkpoint:
        name, options = model_name(recipe.model), recipe.model_options
        try:
            model: Any = timm.create_model(name, **settings, **_size(name, recipe), **options)
        except TypeError as error:
            raise ValueError(f"{name} cannot be made with model_options {options}: {error}") from error
        model.model_options = options
        return model
    if recipe.model_options:
        raise ValueError("got model_options and a checkpoint, expected one of them: a checkpoint has its own architecture")
    source = load_model(recipe.checkpoint)
    named = list(source.pretrained_cfg.get("label_names") or class_names)
    if named != list(class_names) or source.num_classes != len(class_names):
        source.reset_classifier(len(class_names))
    if isinstance(source, GroupMixFormer):
        model = GroupMixFormer(**model_arguments(source) | settings)
    else:
        other, options = source.pretrained_cfg["architecture"], source.model_options
        model = timm.create_model(other, **options | settings | _size(other, recipe))
        model.model_options = options
    model.load_state_dict(source.state_dict())
    model.pretrained_cfg = source.pretrained_cfg
    return model


def _size(name: str, recipe: Recipe) -> dict[str, Any]:
    """Tell a model that is made for one size of image, such as a ViT, which it is."""
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": recipe.image_size} if cfg and cfg.fixed_input_size else {}


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """Return a weight for each class, the inverse of its number of images; the mean over the images is 1."""
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes)
    return len(labels) / (counts.clamp(min=1) * (counts > 0).sum())


class ClassificationModule(Task):
    """Trains a timm classifier by a recipe, with timm's mixup and losses.

    Args:
        recipe: The settings.
        images: The data set.
        world_size: Number of processes.
    """

    class_weights: Tensor | None

    def __init__(self, recipe: Recipe, images: ImageData, world_size: int = 1) -> None:
        model = create_classifier(recipe, images.class_names)
        config = training_config(recipe, model)
        train = images.train(classification_transform(recipe.augmentation, config), recipe.seed)
        held_out = images.held_out(eval_transform(config))
        labels = train.labels() if isinstance(train, ImageSamples) else None
        if recipe.balance and labels is None:
            raise ValueError(
                f"{recipe.data}: the classes of its images are not known before they are read: set balance to null"
            )
        loaders = DataModule(
            train,
            held_out,
            recipe.batch_size,
            recipe.workers,
            recipe.seed,
            collate_classification,
            labels if recipe.balance == "sampling" else None,
        )
        super().__init__(recipe, model, loaders, images.class_names, world_size)
        weights = class_weights(labels, len(images.class_names)) if labels and recipe.balance == "loss" else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.config = config
        augmentation = recipe.augmentation
        self.mixup = None
        if augmentation.mixup > 0 or augmentation.cutmix > 0:
            if recipe.batch_size % 2:
                raise ValueError(f"got batch_size {recipe.batch_size}, expected an even one: mixup and cutmix pair the images")
            self.mixup = Mixup(
                augmentation.mixup,
                augmentation.cutmix,
                label_smoothing=augmentation.label_smoothing,
                num_classes=len(images.class_names),
            )
        self.soft_loss = SoftTargetCrossEntropy()
        self.val_images = SumMetric()
        self.val_loss = MeanMetric()
        self.top1 = MulticlassAccuracy(len(images.class_names), average="micro", ignore_index=-1)

    def training_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, 3, H, W), classes (B) and problems."""
        images, classes, problems = batch
        self.note_unreadable(problems)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = classes
        if self.mixup is not None:
            images, targets = self.mixup(images, classes)
        loss: Tensor
        if self.class_weights is not None:
            # Not divided by the weights of the batch, as PyTorch would, so that batches count as many of them do together.
            smoothing = 0.0 if self.mixup else self.recipe.augmentation.label_smoothing
            losses = F.cross_entropy(
                self.model(images), targets, self.class_weights, reduction="none", label_smoothing=smoothing
            )
            loss = losses.mean()
        elif self.mixup is not None:
            loss = self.soft_loss(self.model(images), targets)
        else:
            loss = F.cross_entropy(self.model(images), classes, label_smoothing=self.recipe.augmentation.label_smoothing)
        self.log_loss(loss, len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> None:
        """Measure loss and accuracy of held-out images; classes of -1 fill up a batch and do not count."""
        images, classes, _ = batch
        logits = self.evaluated(images)
        self.top1.update(logits, classes)
        self.val_loss.update(F.cross_entropy(logits, classes, ignore_index=-1, reduction="none"), (classes >= 0).float())
        self.val_images.update((classes >= 0).sum())
        self.log("val_images", self.val_images, batch_size=len(images))
        self.log("val_loss", self.val_loss, batch_size=len(images))
        self.log("val_top1", self.top1, prog_bar=True, batch_size=len(images))

    def save(self, model: Any, folder: Path) -> None:
        """Write a model to a folder that `load_model`, timm and transformers read."""
        save_checkpoint(model, folder, self.class_names, self.config)

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> "ClassificationModule":
        """Open the recipe's data and create its model.

        Raises:
            ValueError: If one of them cannot be used.
        """
        return cls(recipe, open_images(recipe.data, recipe.root, recipe.download, splitter=recipe.splitter), world_size)
