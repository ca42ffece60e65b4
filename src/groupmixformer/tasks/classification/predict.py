"""A trained classifier with what is stored beside it, ready to look at images; scenes.py has its siblings for other tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.config import resolve_data_config
from torch import Tensor

from ...models.checkpoint import load_model
from .data import eval_transform

Point = tuple[int, int]  # row and column


@dataclass(frozen=True)
class View:
    """An image as a network sees it.

    Attributes:
        images: What the backbone takes (1, 3, H, W).
        pixels: The image in its top left corner (h, w, 3), 8 bits; what is right of it and below is filling.
        original: Height and width of the image before.
        factors: By which its height and width were multiplied.
        offsets: Pixels that came before its first row and column; negative where it was cropped.
    """

    images: Tensor
    pixels: NDArray[np.uint8]
    original: tuple[int, int]
    factors: tuple[float, float]
    offsets: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image as it is seen."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def seen(self, point: Sequence[int]) -> Point:
        """Return the pixel that holds the middle of a pixel of the original.

        Raises:
            ValueError: If it lies outside of the image, or of what was left after the crop.
        """
        if not all(0 <= at < side for at, side in zip(point, self.original, strict=True)):
            height, width = self.original
            raise ValueError(
                f"got query {point[0]},{point[1]}, expected a row from 0 to {height - 1} and a column to {width - 1}"
            )
        parts = zip(point, self.factors, self.offsets, strict=True)
        row, column = (math.floor((at + 0.5) * factor) + offset for at, factor, offset in parts)
        if not (0 <= row < self.size[0] and 0 <= column < self.size[1]):
            first, last = self.unseen((0, 0)), self.unseen((self.size[0] - 1, self.size[1] - 1))
            raise ValueError(
                f"query {point[0]},{point[1]} is cropped away: the network sees rows {first[0]} to {last[0]} and columns "
                f"{first[1]} to {last[1]}"
            )
        return row, column

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of the original that is seen, in its pixels."""
        parts = zip(self.size, self.factors, self.offsets, self.original, strict=True)
        (top, bottom), (left, right) = (
            (max(0.0, -offset / factor), min(side, (size - offset) / factor)) for size, factor, offset, side in parts
        )
        return left, top, right, bottom

    def unseen(self, point: Sequence[int]) -> Point:
        """Return the pixel of the original that holds the middle of a pixel that is seen, the nearest for what was added."""
        parts = zip(point, self.factors, self.offsets, self.original, strict=True)
        row, column = (min(max(int((at + 0.5 - offset) / factor), 0), side - 1) for at, factor, offset, side in parts)
        return row, column


@dataclass(frozen=True)
class Predicted:
    """What was found in an image.

    Attributes:
        result: For a JSON object.
        text: In a line.
        files: Contents by the ending of their name: the drawn image, and for segments the mask; nothing for classes.
        results: For boxes and masks, COCO's results.
    """

    result: dict[str, Any]
    text: str
    files: dict[str, bytes]
    results: list[dict[str, Any]]


def data_config(model: Any, image_size: int | None = None, test_size: bool = False, **crop: Any) -> dict[str, Any]:
    """Size, crop and colours of the model's input by timm's rules: what is asked for, or else what is stored with the model."""
    asked = {"img_size": image_size, "in_chans": model.pretrained_cfg["input_size"][0], **crop}
    config: dict[str, Any] = resolve_data_config(asked, model.pretrained_cfg, use_test_size=test_size)
    return config


def class_names(model: Any) -> list[str]:
    """Names stored with the model; ImageNet's where there are 1,000 classes; numbers otherwise."""
    names = list(model.pretrained_cfg.get("label_names") or [])
    if not names and model.num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(index) for index in range(1000)]
    return names or [str(index) for index in range(model.num_classes)]


def most_pixels(model: Any, task: str) -> int:
    """Return how many pixels a stranger's image may have: 64 million, or fewer if a network fills planes of its size.

    A segmenter fills one for each class and Mask R-CNN one for each object, which take 4 GB together at most.

    Args:
        model: A classifier, detector or segmenter, ready to look at images.
        task: Of the model.
    """
    planes = len(model.class_names) if task == "segmentation" else 0
    if task == "detection" and model.model.masks:
        planes = model.model.network.roi_heads.detections_per_img
    return min(64_000_000, 1_000_000_000 // max(1, planes))


class Classes:
    """A classifier.

    Args:
        run: Folder of a run, or what `load_model` reads.
        device: To run on.
        image_size: Side of the images; the model's own by default.
        top: Number of classes to name.

    Attributes:
        model: In eval mode.
        class_names: In the order of its logits.
        config: Size, crop and colours of the model's input.
        transform: From an image (RGB) to the model's input (C, H, W).
    """

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None = None, top: int = 5) -> None:
        self.model: Any = load_model(run).to(device)
        self.device, self.top = device, top
        self.class_names = class_names(self.model)
        self.config = data_config(self.model, image_size)
        self.transform: Any = eval_transform(self.config)

    def view(self, image: Image.Image) -> View:
        """Prepare an image (RGB), following the transform step by step to know where each pixel goes."""
        original, factors, offsets = (image.height, image.width), [1.0, 1.0], [0, 0]
        made: Any = image
        for step in self.transform.transforms:
            made = step(made)
            if not isinstance(made, Image.Image):
                continue  # a tensor, whose pixels stay where they are
            for i, (old, new) in enumerate(((image.height, made.height), (image.width, made.width))):
                if "Crop" in type(step).__name__:  # as torchvision and timm round
                    offsets[i] += (new - old) // 2 if new > old else -round((old - new) / 2)
                else:
                    factors[i] *= new / old
            image = made
        images = made[None].to(self.device)
        return View(images, np.asarray(image), original, (factors[0], factors[1]), (offsets[0], offsets[1]))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the classes' probabilities (B, classes) on the CPU, of images (B, C, H, W) that `transform` made."""
        return self.model(images.to(self.device)).float().softmax(dim=1).cpu()

    def ranked(self, probabilities: Tensor) -> Predicted:
        """Name the likeliest classes of one image, from its probabilities (classes)."""
        best = probabilities.topk(min(self.top, len(probabilities)))
        classes = [
            {"class": self.class_names[index], "index": index, "probability": probability}
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return Predicted({"classes": classes}, ", ".join(f"{c['class']} {c['probability']:.1%}" for c in classes), {}, [])

    def predict(self, image: Image.Image, name: str = "", score: float = 0.5) -> Predicted:
        """Classify an image (RGB); its name and a score matter for detection alone."""
        return self.ranked(self.probabilities(self.transform(image)[None])[0])
