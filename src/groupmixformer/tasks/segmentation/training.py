"""Semantic segmentation: decoders of segmentation_models_pytorch over a backbone of timm, and their training steps."""

from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2

from ...models.checkpoint import save_network
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from ..backbone import Backbone, Dense, load_network, open_backbone, start_from, take_any_size
from .data import IGNORE, SemanticImages, collate, numbers, train_transform

STRIDE = 32  # sides of images are filled up to multiples of it


def _width(decoder: str, channels: int | None) -> dict[str, int]:
    """Name the width of a decoder as the library does."""
    if channels is None:
        return {}
    if decoder == "upernet":
        return {"decoder_channels": channels}
    if decoder == "fpn":
        if channels % 64:
            raise ValueError(f"got channels {channels}, expected a multiple of 64: fpn normalises half of them in 32 groups")
        return {"decoder_pyramid_channels": channels, "decoder_segmentation_channels": channels // 2}
    raise ValueError(f"got channels {channels} for the decoder {decoder}, expected none: only upernet and fpn have one width")


class Segmenter(Dense):
    """A backbone and a decoder: images (B, 3, H, W) of any size, normalised, to logits (B, num_classes, H, W).

    In training there is a pair of logits where there is a second head: UPerNet's published setting (Xiao et al., 2018) is a
    small fully convolutional one on the features of stride 16.

    Args:
        backbone: With features of strides 4 to 32.
        num_classes: Number of classes.
        decoder: upernet (Xiao et al., 2018), fpn (Kirillov et al., 2019) or another of segmentation_models_pytorch.
        channels: Width of upernet and fpn; none for the library's.
        auxiliary: Whether there is a second head.
        image_size: Shorter side to which `prepare` resizes images.
        mean: Of the pixels, by channel.
        std: Their standard deviation.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ValueError: If there is no such decoder, or the backbone does not fit it.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        decoder: str,
        image_size: int,
        channels: int | None = None,
        auxiliary: bool = True,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        **options: Any,
    ) -> None:
        super().__init__(backbone)
        self.num_classes, self.image_size = num_classes, image_size
        self.mean, self.std = list(mean), list(std)
        known = list(smp.MODEL_ARCHITECTURES_MAPPING)
        if decoder not in known:
            near = get_close_matches(decoder, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"no decoder {decoder}, expected one of {', '.join(known)}: the nearest is {near}")
        backbone.indices((4, 8, 16, 32))
        made = backbone.options(**options)
        weights = True if made.pop("pretrained", False) else None
        del made["features_only"]  # the library says that itself
        width = _width(decoder, channels)
        try:
            self.network: Any = smp.create_model(
                decoder, f"tu-{backbone.name}", encoder_weights=weights, classes=num_classes, **width, **made
            )
            take_any_size(self.body)
            # The second head is on the features of stride 16.
            self.auxiliary = FCNHead(self.network.encoder.out_channels[4], num_classes) if auxiliary else None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the decoder {decoder} does not fit {backbone.name} ({reason}): choose upernet, fpn, unet or segformer"
            ) from error

    @property
    def body(self) -> Any:
        """The features of timm's model."""
        return self.network.encoder.model

    def prepare(self, image: Image.Image) -> Tensor:
        """From an image to a tensor (3, h, w), its shorter side resized, normalised."""
        pixels = v2.functional.resize(v2.functional.pil_to_tensor(image), [self.image_size], antialias=True)
        return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), self.mean, self.std)

    def forward(self, images: Tensor) -> Any:
        """Return the logits, in training with those of the second head, if there is one."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        if self.auxiliary is None or not self.training:
            return self.network(padded)[..., :height, :width]
        features = self.network.encoder(padded)
        logits = self.network.segmentation_head(self.network.decoder(features))
        second = F.interpolate(self.auxiliary(features[4]), padded.shape[-2:], mode="bilinear")
        return logits[..., :height, :width], second[..., :height, :width]


def _windows(length: int, window: int) -> list[int]:
    """Return where windows begin that cover a length and overlap by a third or more."""
    if length <= window:
        return [0]
    steps = -(-(length - window) // max(1, window * 2 // 3))
    return [round(i * (length - window) / steps) for i in range(steps + 1)]


def _logits(model: Segmenter, image: Tensor, window: int | None) -> Tensor:
    """Return logits (1, K, h, w) of an image (1, 3, h, w), whole or averaged over windows."""
    height, width = image.shape[-2:]
    if window is None or (height <= window and width <= window):
        return model(image)
    summed = image.new_zeros(1, model.num_classes, height, width, dtype=torch.float32)
    count = image.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in _windows(height, window):
        for left in _windows(width, window):
            part = (..., slice(top, top + window), slice(left, left + window))
            summed[part] += model(image[part])
            count[part] += 1
    return summed / count


@torch.no_grad()
def segment(
    model: Segmenter,
    image: Tensor,
    size: tuple[int, int],
    slide: bool = False,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Return the probabilities of the classes for each pixel of one image.

    Args:
        model: In eval mode.
        image: As `Segmenter.prepare` gives it (3, h, w), on the model's device.
        size: Height and width of the result, usually the image's own.
        slide: Look through square windows of the training size, which overlap by a third, instead of at the whole image.
        scales: Factors by which the image is resized; the probabilities are averaged.
        flip: Average with the mirrored image.

    Returns:
        Probabilities (K, H, W), float32.
    """
    summed = None
    for scale in scales:
        sides = [max(1, round(side * scale)) for side in image.shape[-2:]]
        scaled = image[None]
        if scale != 1:
            scaled = F.interpolate(scaled, sides, mode="bilinear", antialias=True)
        for mirrored in (False, True) if flip else (False,):
            logits = _logits(model, scaled.flip(3) if mirrored else scaled, model.image_size if slide else None)
            logits = logits.flip(3) if mirrored else logits
            probabilities = F.interpolate(logits.float(), size, mode="bilinear").softmax(dim=1)[0]
            summed = probabilities if summed is None else summed + probabilities
    assert summed is not None
    return summed / (len(scales) * (1 + flip))


def load_segmenter(folder: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """Load the segmenter of a run.

    Returns:
        The segmenter in eval mode, and what is stored with it: class_names, class_ids and colors, in the order of the labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds something else or is damaged.
    """
    return load_network(folder, "segmentation", Segmenter)


class Segmentation(Task):
    """Trains a segmenter by a recipe.

    Args:
        recipe: The settings.
        train: Training set; its transform is set.
        held_out: Validation set; its preparation is set.
        world_size: Number of processes.
    """

    monitor = "val_mIoU"

    def __init__(self, recipe: Recipe, train: SemanticImages, held_out: SemanticImages, world_size: int = 1) -> None:
        settings = recipe.segmenter
        backbone, weights, used_to = open_backbone(recipe.model, recipe.checkpoint, "segmentation")
        self.colors, self.class_ids = train.colors, train.class_ids
        self.network: dict[str, Any] = {
            "num_classes": len(train.class_names),
            "decoder": settings.decoder,
            "channels": settings.channels,
            "auxiliary": settings.aux_loss_weight > 0,
            "image_size": recipe.image_size,
            **used_to,
        }
        model = Segmenter(backbone, **self.network, drop_path_rate=recipe.drop_path_rate, weights=weights)
        new = start_from(model, recipe.checkpoint, "segmentation")
        if settings.freeze_bn:
            model.freeze_statistics()
        if recipe.batch_size < 2 and any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.network.modules()):
            raise ValueError(
                f"got batch_size 1, expected 2 or more: {settings.decoder} has BatchNorm after pooling to one pixel"
            )
        train.seed = recipe.seed
        train.transform = train_transform(
            recipe.image_size, settings.scale, settings.hflip, settings.photometric, model.mean, model.std
        )
        held_out.prepare = model.prepare
        loaders = DataModule(train, held_out, recipe.batch_size, recipe.workers, recipe.seed, collate)
        super().__init__(recipe, model, loaders, train.class_names, world_size)
        self.note_new(new)
        self.confusion = MulticlassConfusionMatrix(len(train.class_names), ignore_index=IGNORE)
        self.val_images = SumMetric()

    def training_step(self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, 3, H, W), labels (B, H, W) and problems: cross entropy of the pixels."""
        images, labels, problems = batch
        self.note_unreadable(problems)
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
        """Compute the numbers from the one confusion matrix of all processes."""
        measured = numbers(self.confusion.compute())
        self.log_dict(
            {f"val_{name}": measured[name] for name in ("mIoU", "accuracy")} | {"val_images": self.val_images.compute()}
        )
        self.confusion.reset()
        self.val_images.reset()

    def save(self, model: Any, folder: Path) -> None:
        """Write a segmenter to a folder that `load_segmenter` reads."""
        network = {"backbone": asdict(model.backbone), **self.network}
        names = {"class_names": self.class_names, "class_ids": self.class_ids, "colors": self.colors}
        save_network(model, folder, {"task": "segmentation", **names, "network": network})


def start(recipe: Recipe, world_size: int) -> Segmentation:
    """Open the recipe's data and create its segmenter.

    Raises:
        ValueError: If one of them cannot be used.
    """
    return Segmentation(recipe, SemanticImages(recipe.data, "train"), SemanticImages(recipe.data, "val"), world_size)
