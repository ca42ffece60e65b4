"""The training steps of self-supervised pre-training."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from ...files import atomic_write
from ...models.checkpoint import save_checkpoint
from ...run_folder import PRETRAINING
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from ...weights import write_tensors
from ..backbone import pixel_statistics, shown_channels
from .data import UnlabelledImages, collate_unlabelled, find_images
from .model import DinoModel, MaskedImageModel, Pretrained, create_backbone

HEAD = "head.safetensors"  # in the folder of a run, for its report: what stands on the backbone


class PretrainingModule(Task):
    """Pre-trains a backbone by a recipe; the model of the last epoch is saved, as losses do not tell which features are best.

    Args:
        recipe: The settings.
        model: The backbone under the head of a method.
        world_size: Number of processes.

    Raises:
        ValueError: If the data cannot be used, or the recipe asks for what pre-training does not have.
    """

    monitor = ""

    def __init__(self, recipe: Recipe, model: Pretrained, world_size: int) -> None:
        cfg = model.backbone.pretrained_cfg
        size = (recipe.in_chans, recipe.image_size, recipe.image_size)
        self.config = {"interpolation": cfg["interpolation"], **pixel_statistics(recipe, cfg)}
        train, held_out, notes = find_images(recipe, recipe.splitter)
        loaders = DataModule(
            UnlabelledImages(train, recipe, self.config, notes),
            UnlabelledImages(held_out, recipe, self.config),
            recipe.batch_size,
            recipe.workers,
            recipe.seed,
            collate_unlabelled,
        )
        super().__init__(recipe, model, loaders, [], world_size)
        self.config |= {"input_size": size, **shown_channels(recipe)}
        self.val_images = SumMetric()

    @property
    def counted(self) -> tuple[str, Any]:
        """The backbone."""
        return " of the backbone", self.model.backbone

    def save(self, model: Any, folder: Path) -> None:
        """Write the backbone as a checkpoint for the other tasks, and the head beside it."""
        about = {"task": PRETRAINING, "method": self.recipe.pretrain.method}
        save_checkpoint(model.backbone, folder, data_config=self.config, more=about)

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> "PretrainingModule":
        """Open the recipe's data and create its model.

        Raises:
            ValueError: If one of them cannot be used.
        """
        settings = recipe.pretrain
        given = {"patience": recipe.patience, "folds": recipe.folds}
        if name := next((name for name, value in given.items() if value is not None), None):
            raise ValueError(f"{name} compares runs or epochs by a metric, which pre-training does not have: leave it out")
        if recipe.in_chans != 3 and settings.method == "dino":
            raise ValueError(f"dino changes colours, and in_chans is {recipe.in_chans}: take --pretrain.method simmim")
        if recipe.optimizer.layer_decay is not None:
            raise ValueError("optimizer.layer_decay is for layers that are trained already: set it to null")
        if recipe.strategy == "fsdp":
            raise ValueError("strategy fsdp is not for pre-training: use ddp")
        if recipe.image_size < 32:
            raise ValueError(f"got image_size {recipe.image_size}, expected 32 or more")
        if settings.method == "dino":
            return DinoModule(recipe, world_size)
        if recipe.image_size % settings.mask_patch or recipe.image_size < 2 * settings.mask_patch:
            raise ValueError(
                f"got image_size {recipe.image_size} and pretrain.mask_patch {settings.mask_patch}, expected a multiple of the "
                "patch, twice as large or more"
            )
        return SimMIMModule(recipe, world_size)


class SimMIMModule(PretrainingModule):
    """Trains a backbone to fill in masked parts of images; see `MaskedImageModel`.

    Args:
        recipe: The settings.
        world_size: Number of processes.
    """

    def __init__(self, recipe: Recipe, world_size: int) -> None:
        model = MaskedImageModel(create_backbone(recipe), recipe.image_size, recipe.pretrain.mask_patch, recipe.in_chans)
        super().__init__(recipe, model, world_size)
        self.val_loss = MeanMetric()

    def training_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, 3, S, S), masks (B, S/P, S/P) and problems."""
        (images, mask), problems = batch
        self.note_unreadable(problems)
        loss: Tensor = self.model.losses(images, mask).mean()
        self.log_loss(loss, len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor, list[str]], batch_idx: int) -> None:
        """Measure the loss of held-out images."""
        images, mask, counts, _ = batch
        self.val_loss.update(self.evaluated.losses(images, mask), counts.float())
        self.val_images.update(counts.sum())
        self.log("val_loss", self.val_loss, batch_size=len(images))
        self.log("val_images", self.val_images, batch_size=len(images))

    def save(self, model: Any, folder: Path) -> None:
        """Write the backbone, and the head that the report draws with."""
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
        with atomic_write(folder / HEAD) as temporary:
            write_tensors(tensors, temporary / HEAD)
        super().save(model, folder)


class DinoModule(PretrainingModule):
    """Trains a backbone to agree with its teacher about views of an image (DINO), with the loss and the head of lightly.

    The teacher's weights are a moving average of the network's, updated after each step; it sees the two large views, the
    network all of them. Its outputs are centred and sharpened, so that they do not become the same for all images. BatchNorm of
    both takes the statistics of the batch. The teacher is what is saved.

    Args:
        recipe: The settings.
        world_size: Number of processes.

    Raises:
        ValueError: If the recipe has EMA weights too.
    """

    def __init__(self, recipe: Recipe, world_size: int) -> None:
        if recipe.ema:
            raise ValueError("method dino saves its teacher, which is an average itself: set ema to null")
        from lightly.loss import DINOLoss

        settings = recipe.pretrain
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm.*")  # lightly's, about PyTorch
            backbone = create_backbone(recipe)
            spare = copy.deepcopy(backbone)
            model, other = (DinoModel(network, recipe.image_size, settings) for network in (backbone, spare))
        super().__init__(recipe, model, world_size)
        self.fixed_size = not settings.local_crops
        self.teacher = model.teacher(other)
        self.loss = DINOLoss(settings.outputs, teacher_temp=settings.teacher_temperature)
        self.found = torch.zeros(settings.outputs + 2, dtype=torch.float64)  # sums of outputs and entropies, and their number

    @property
    def evaluated(self) -> Any:
        """The teacher."""
        return self.teacher

    def training_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of views, two of (B, 3, S, S) and others of (B, 3, s, s), and problems."""
        views, problems = batch
        self.note_unreadable(problems)
        large = torch.cat(views[:2])
        with torch.no_grad():
            wanted = self.teacher(large)
        given = [*self.model(large).chunk(2)]
        if views[2:]:
            given += self.model(torch.cat(views[2:])).chunk(len(views) - 2)
        loss: Tensor = self.loss([part.float() for part in wanted.chunk(2)], [part.float() for part in given])
        self.log_loss(loss, len(views[0]))
        return loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Keep the last layer as it is in the first epoch, as the paper does; then clip."""
        self.model.head.cancel_last_layer_gradients(self.current_epoch)
        super().configure_gradient_clipping(*args, **kwargs)

    @property
    def momentum(self) -> float:
        """Of the teacher after this step."""
        from lightly.utils.scheduler import cosine_schedule

        steps = self.recipe.epochs * self.steps_per_epoch
        return cosine_schedule(min(self.global_step, steps), steps, self.recipe.pretrain.momentum, 1.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the weights, and the teacher after them."""
        super().optimizer_step(*args, **kwargs)
        if not self.skipped_in_a_row:
            from lightly.models.utils import update_momentum

            update_momentum(self.model, self.teacher, self.momentum)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor, list[str]], batch_idx: int) -> None:
        """Look at held-out images."""
        images, _, counts, _ = batch
        outputs = (self.teacher(images)[counts].float() - self.loss.center[0]) / self.recipe.pretrain.teacher_temperature
        shares = outputs.softmax(dim=1).double().cpu()
        entropies = torch.special.entr(shares).sum()
        self.found += torch.cat([shares.sum(dim=0), entropies[None], torch.tensor([len(shares)])])

    def on_validation_epoch_end(self) -> None:
        """Measure what the teacher's output tells of a held-out image, in nats: nothing where it is the same for all of them.

        It is the mutual information of image and output: the entropy of the mean less the mean of the entropies.
        """
        found = torch.stack(self._of_all(self.found)).sum(dim=0)
        self.found.zero_()
        images, means = found[-1], found[:-1] / found[-1]
        information = (torch.special.entr(means[:-1]).sum() - means[-1]).float()
        self.log_dict({"val_information": information, "val_images": images.float()}, rank_zero_only=False)
