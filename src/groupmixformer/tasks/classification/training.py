"""Image classification: the model of a recipe and its training steps."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import AsymmetricLossMultiLabel, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from ...models.adapters import add_adapters, freeze_statistics, trained_names
from ...models.checkpoint import LABEL_FIELDS, fixed_size, load_model, model_name, remade, save_checkpoint
from ...models.elastic import forward_at, sliced_weights
from ...models.mixers.replace import create_model
from ...run_folder import MULTI_LABEL, RunFolder
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from ...weights import checksum
from ..backbone import colours_left_out
from .data import (
    ImageData,
    ImageSamples,
    classification_transform,
    collate_classification,
    eval_transform,
    open_images,
    training_config,
)
from .distillation import distillation, open_teacher
from .multi_label import LabelEvaluation


def create_classifier(recipe: Recipe, class_names: Sequence[str]) -> Any:
    """Create the recipe's timm model; from a checkpoint, with its architecture and weights.

    The checkpoint's classifier stays if it has as many classes and does not name others; otherwise a new one takes its place.

    Raises:
        ValueError: If there is no such model or checkpoint.
    """
    settings: dict[str, Any] = {"num_classes": len(class_names), "drop_path_rate": recipe.drop_path_rate}
    settings["in_chans"] = recipe.in_chans
    if not recipe.checkpoint:
        if recipe.adapter.kind != "none":
            raise ValueError(f"adapter {recipe.adapter.kind} is for a trained model: name one with --checkpoint")
        name, options = model_name(recipe.model), recipe.model_options
        try:
            model = create_model(name, **settings, **fixed_size(name, recipe.image_size), **options)
        except TypeError as error:
            raise ValueError(f"{name} cannot be made with model_options {options}: {error}") from error
        model.model_options = options
        return model
    if recipe.model_options:
        raise ValueError("got model_options and a checkpoint, expected one of them: a checkpoint has its own architecture")
    source = load_model(recipe.checkpoint)
    if getattr(source, "adapter", None):
        raise ValueError(f"{recipe.checkpoint}: has AdaptFormer's layers, which cannot be merged: begin from its base")
    base = {"source": recipe.checkpoint, "checksum": checksum(source.state_dict())}
    named = list(source.pretrained_cfg.get("label_names") or class_names)
    if named != list(class_names) or source.num_classes != len(class_names):
        source.reset_classifier(len(class_names))
    if recipe.adapter.kind != "none" and source.pretrained_cfg["input_size"][0] != recipe.in_chans:
        raise ValueError(
            f"adapters leave the first layer of {recipe.checkpoint} as it is, which is not for in_chans {recipe.in_chans}"
        )
    model = remade(source, recipe.image_size, **settings)
    if recipe.adapter.kind != "none":
        if "adapter" in RunFolder(recipe.checkpoint).config:
            raise ValueError(
                f"{recipe.checkpoint}: has adapters itself: write it whole first (gmf convert {recipe.checkpoint} --out DIR)"
            )
        add_adapters(model, asdict(recipe.adapter) | {"base": base})
    return model


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
        train = images.train(classification_transform(recipe.augmentation, config), recipe.seed, recipe.channels)
        held_out = images.held_out(eval_transform(config), recipe.channels)
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
        changes = [name for name in ("color_jitter", "auto_augment") if getattr(recipe.augmentation, name)]
        self.notes += colours_left_out(recipe, train, changes)
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
        if recipe.adapter.kind != "none":
            if recipe.strategy == "fsdp":
                raise ValueError("strategy fsdp shards what is trained, of which adapters have little: use ddp")
            self.depends["base"] = model.adapter["base"]["checksum"]
        if recipe.elastic:
            sliced_weights(model, min(recipe.elastic))  # which tells if it cannot be
            others = {"distill.teacher": recipe.distill.teacher, "grad_checkpointing": recipe.grad_checkpointing}
            others |= {"adapter": recipe.adapter.kind != "none", "strategy fsdp": recipe.strategy == "fsdp"}
            if given := [name for name, value in (others | {"compile": recipe.compile is True}).items() if value]:
                raise ValueError(f"elastic takes weights apart in each step, and does not go with {given[0]}: leave one out")
            self.fixed_size = False  # widths change, as sizes of images do elsewhere, so compile auto is eager
        # In a list, and so no part of this module: its teacher is in no checkpoint, and always in eval mode.
        self.distillation: list[Any] = []
        if recipe.distill.teacher:
            teacher = open_teacher(recipe.distill.teacher, recipe.image_size, recipe.in_chans)
            self.depends["teacher"] = checksum(teacher.state_dict())
            self.distillation.append(distillation(recipe.distill, teacher, model, self.label_loss, images.class_names))
            if self.trained is not model:
                if recipe.strategy == "fsdp":
                    raise ValueError("strategy fsdp shards the model alone: teach logits (--distill.kind logits)")
                self.projection = self.distillation[0].trainable_module.projection
        self.val_images = SumMetric()
        self.val_loss = MeanMetric()
        self.top1 = MulticlassAccuracy(max(2, len(images.class_names)), average="micro", ignore_index=-1)

    def training_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, 3, H, W), classes (B) and problems."""
        images, classes, problems = batch
        self.note_unreadable(problems)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = classes
        if self.mixup is not None:
            images, targets = self.mix(images, classes)
        if self.distillation:
            losses = self.distillation[0](images, targets)
            loss = losses["loss"]
            self.log("distill_loss", losses["kd_loss"])
        else:
            # Drawn after the step was seeded, so that a run which continues draws the same.
            width = random.choice(self.recipe.elastic) if self.recipe.elastic else 1
            loss = self.label_loss(forward_at(self.model, images, width), targets)
        self.log_loss(loss, len(images))
        return loss

    def mix(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix, and return the images with the shares of their classes (B, classes)."""
        assert self.mixup is not None
        mixed: tuple[Tensor, Tensor] = self.mixup(images, classes)
        return mixed

    def on_train_start(self) -> None:
        """Keep the statistics of BatchNorm where few parameters are trained; validation restores the mode of each module."""
        super().on_train_start()
        if self.recipe.adapter.kind != "none":
            freeze_statistics(self.model)

    def _frozen(self) -> dict[str, Tensor]:
        """Return what of the model and its EMA comes from the base of adapters."""
        trained = trained_names(self.model) if self.recipe.adapter.kind != "none" else set()
        parts = {"model.": self.model, "average.module.": self.average.module if self.average else nn.Module()}
        return {
            prefix + name: tensor
            for prefix, part in parts.items()
            for name, tensor in part.state_dict().items()
            if trained and name not in trained
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what comes from the base of adapters."""
        super().on_save_checkpoint(checkpoint)
        frozen = self._frozen()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from the base what was left out.

        Raises:
            ValueError: If the base is another model than it was.
        """
        before, now = self.before.get("base"), self.depends.get("base")
        if before != now:
            raise ValueError(
                f"adapters are for the model that they began on: {self.recipe.checkpoint} was {before} and is {now}"
            )
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"] |= self._frozen()

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, classes) and classes (B) or, after mixup, their shares (B, classes)."""
        smoothing = 0.0 if self.mixup else self.recipe.augmentation.label_smoothing
        if self.class_weights is not None:
            # Not divided by the weights of the batch, as PyTorch would, so that batches count as many of them do together.
            losses = F.cross_entropy(logits, targets, self.class_weights, reduction="none", label_smoothing=smoothing)
            return losses.mean()
        if self.mixup is not None:
            return self.soft_loss(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    @property
    def trained(self) -> nn.Module:
        """The model, with the layer that makes its features as wide as a teacher's."""
        of_features = self.distillation and self.recipe.distill.kind == "features"
        return self.distillation[0].trainable_module if of_features else self.model

    def on_fit_start(self) -> None:
        """Put the teacher on the device."""
        for task in self.distillation:
            task.teacher.to(self.device)
            task.student_mean, task.student_std = task.student_mean.to(self.device), task.student_std.to(self.device)

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
        save_checkpoint(model, folder, self.class_names, dict.fromkeys(LABEL_FIELDS) | self.config)  # maybe its checkpoint's

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> "ClassificationModule":
        """Open the recipe's data and create its model.

        Raises:
            ValueError: If one of them cannot be used.
        """
        images = open_images(recipe.data, recipe.root, recipe.download, splitter=recipe.splitter)
        if images.several:
            return LabelModule(recipe, images, world_size)
        if recipe.loss:
            raise ValueError(f"loss {recipe.loss} is for several labels for an image, and {recipe.data} has one class for each")
        return cls(recipe, images, world_size)


class LabelModule(ClassificationModule):
    """Trains a timm classifier to give an image several labels, each by its own sigmoid.

    Args:
        recipe: The settings.
        images: The data set.
        world_size: Number of processes.

    Raises:
        ValueError: If the recipe asks for what several labels do not have.
    """

    monitor = "val_mAP"

    def __init__(self, recipe: Recipe, images: ImageData, world_size: int = 1) -> None:
        several = f"{recipe.data}: its images have several labels"
        if recipe.balance:
            raise ValueError(f"{several}, and balance is for one class each: set it to null, and take loss asl for rare labels")
        if recipe.distill.teacher and recipe.distill.kind == "logits":
            raise ValueError(f"{several}, whose logits timm does not distill: teach features (--distill.kind features)")
        super().__init__(recipe, images, world_size)
        if self.mixup is not None:  # of the shares that images have in a mixed one
            self.mixup.num_classes, self.mixup.label_smoothing = recipe.batch_size, 0.0
        self.asl = AsymmetricLossMultiLabel() if recipe.loss == "asl" else None
        self.found: list[tuple[Tensor, Tensor]] = []
        self.best_threshold: float | None = None

    def mix(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Apply mixup or cutmix, and return the images with their shares of labels (B, classes)."""
        images, shares = super().mix(images, torch.arange(len(images), device=images.device))
        return images, shares[:, : len(images)] @ classes

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits and labels (B, classes): the mean of binary cross entropies, or the asymmetric loss."""
        smoothing = self.recipe.augmentation.label_smoothing
        targets = targets * (1 - smoothing) + 0.5 * smoothing
        if self.asl is None:
            return F.binary_cross_entropy_with_logits(logits, targets)
        loss: Tensor = self.asl(logits.float(), targets)
        return loss if hasattr(self.asl, "reduction") else loss / len(logits)  # which timm summed before 1.0.31

    def on_validation_epoch_start(self) -> None:
        """Forget what was found."""
        self.found = []

    def validation_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> None:
        """Look at held-out images; labels of -1 fill up a batch and do not count."""
        images, labels, _ = batch
        counts = (labels >= 0).all(dim=1)
        self.found.append((self.evaluated(images)[counts].float().cpu(), labels[counts].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Measure the images of all processes."""
        logits, labels = zip(*(pair for pairs in self._of_all(self.found) for pair in pairs), strict=True)
        self.found = []
        metrics = LabelEvaluation.of(torch.cat(logits), torch.cat(labels)).metrics
        self.best_threshold = metrics["best_threshold"]
        told = {f"val_{name}": metrics[name] for name in ("mAP", "f1_macro", "f1_micro", "loss")}
        self.log_dict(told | {"val_images": float(sum(map(len, labels)))}, rank_zero_only=False)

    def save(self, model: Any, folder: Path) -> None:
        """Write a model with what its answers are."""
        about = {"problem_type": MULTI_LABEL, "best_threshold": self.best_threshold}
        save_checkpoint(model, folder, self.class_names, dict.fromkeys(LABEL_FIELDS) | self.config | about)
