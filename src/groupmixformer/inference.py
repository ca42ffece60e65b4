"""A trained classifier with what is stored beside it, ready to look at pictures; scenes.py has its siblings for other tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.config import resolve_data_config
from torch import Tensor

from .checkpoint import load_model
from .data import eval_transform


@dataclass(frozen=True)
class Predicted:
    """What was found in a picture.

    Attributes:
        result: For a JSON object.
        text: In a line.
        files: Contents by the ending of their name: the drawn picture, and for segments the mask; nothing for classes.
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
    """Return how many pixels a stranger's picture may have: 64 million, or fewer if a network fills planes of its size.

    A segmenter fills one for each class and Mask R-CNN one for each object, which take 4 GB together at most.

    Args:
        model: A classifier, detector or segmenter, ready to look at pictures.
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
        transform: From a picture (RGB) to the model's input (C, H, W).
    """

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None = None, top: int = 5) -> None:
        self.model: Any = load_model(run).to(device)
        self.device, self.top = device, top
        self.class_names = class_names(self.model)
        self.config = data_config(self.model, image_size)
        self.transform: Any = eval_transform(self.config)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the classes' probabilities (B, classes) on the CPU, of images (B, C, H, W) that `transform` made."""
        return self.model(images.to(self.device)).float().softmax(dim=1).cpu()

    def ranked(self, probabilities: Tensor) -> Predicted:
        """Name the likeliest classes of one picture, from its probabilities (classes)."""
        best = probabilities.topk(min(self.top, len(probabilities)))
        classes = [
            {"class": self.class_names[index], "index": index, "probability": probability}
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return Predicted({"classes": classes}, ", ".join(f"{c['class']} {c['probability']:.1%}" for c in classes), {}, [])

    def predict(self, picture: Image.Image, name: str = "", score: float = 0.5) -> Predicted:
        """Classify a picture (RGB); its name and a score matter for detection alone."""
        return self.ranked(self.probabilities(self.transform(picture)[None])[0])
