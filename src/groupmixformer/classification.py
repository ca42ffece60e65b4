"""Image classification: the model of a recipe and its training steps."""

from difflib import get_close_matches
from typing import Any

import lightning
import timm
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from .checkpoint import architecture, load_model
from .groupmixformer import GroupMixFormer
from .recipe import Recipe


def create_classifier(recipe: Recipe, num_classes: int) -> Any:
    """Create the recipe's timm model; from a checkpoint, with its architecture and weights and a new classifier.

    Raises:
        ValueError: If there is no such model or checkpoint.
    """
    settings: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": recipe.drop_path_rate}
    if not recipe.checkpoint:
        variants = [name for name in (f"groupmixformer_{recipe.variant}", recipe.variant) if timm.is_model(name)]
        if not variants:
            near = get_close_matches(recipe.variant, timm.list_models(), n=1, cutoff=0.0)[0]
            raise ValueError(f"no model {recipe.variant}, expected a name of timm.list_models(): the nearest is {near}")
        return timm.create_model(variants[0], **settings)
    source = load_model(recipe.checkpoint)
    source.reset_classifier(num_classes)
    if isinstance(source, GroupMixFormer):
        model: Any = GroupMixFormer(**architecture(source.state_dict()) | settings)
    else:
        model = timm.create_model(source.pretrained_cfg["architecture"], **settings)
    model.load_state_dict(source.state_dict())
    model.pretrained_cfg = source.pretrained_cfg
    return model


class Classification(lightning.LightningModule):
    """Trains a timm classifier by a recipe: timm's mixup, losses, optimisers and schedules.

    Args:
        recipe: The settings.
        num_classes: Size of the classifier.
        steps_per_epoch: Optimiser steps in an epoch, for the schedule.
    """

    def __init__(self, recipe: Recipe, num_classes: int, steps_per_epoch: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.model = create_classifier(recipe, num_classes)
        augmentation = recipe.augmentation
        self.mixup = None
        if augmentation.mixup > 0 or augmentation.cutmix > 0:
            if recipe.batch_size % 2:
                raise ValueError(f"got batch_size {recipe.batch_size}, expected an even one: mixup and cutmix pair the images")
            self.mixup = Mixup(
                augmentation.mixup,
                augmentation.cutmix,
                label_smoothing=augmentation.label_smoothing,
                num_classes=num_classes,
            )
        self.soft_loss = SoftTargetCrossEntropy()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch of images (B, 3, H, W) and classes (B)."""
        images, classes = batch
        if self.mixup is not None:
            images, targets = self.mixup(images, classes)
            loss: Tensor = self.soft_loss(self.model(images), targets)
        else:
            loss = F.cross_entropy(self.model(images), classes, label_smoothing=self.recipe.augmentation.label_smoothing)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Log loss and accuracy of held-out images."""
        images, classes = batch
        logits = self.model(images)
        self.top1.update(logits, classes)
        self.log("val_loss", F.cross_entropy(logits, classes), batch_size=len(images))
        self.log("val_top1", self.top1, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        """Return timm's optimiser and its schedule, stepped after every update."""
        optimizer, schedule = self.recipe.optimizer, self.recipe.schedule
        made = create_optimizer_v2(
            self.model,
            opt=optimizer.name,
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            layer_decay=optimizer.layer_decay,
        )
        scheduler, _ = create_scheduler_v2(
            made,
            sched=schedule.name,
            num_epochs=self.recipe.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        return [made], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's scheduler, which counts updates itself less than Lightning does."""
        scheduler.step_update(num_updates=self.global_step)
