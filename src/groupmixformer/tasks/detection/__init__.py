"""Detection of objects, their masks and their keypoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.channels import ANY, Channels
from ...data.samples import Samples
from ...run_folder import RunFolder
from ..predictor import Predicted
from ..registry import Exportable, TaskSpec

if TYPE_CHECKING:  # which brings jsonargparse
    from ...training.recipe import Recipe


class DetectionTask(TaskSpec):
    """Detection of objects, masks and keypoints with torchvision's detectors, and of objects with RT-DETR."""

    name = "detection"
    example_recipe = "bccd"
    module_class = "groupmixformer.tasks.detection.training:DetectionModule"
    predictor_class = "groupmixformer.tasks.detection.predict:DetectionPredictor"
    explainer_class = "groupmixformer.tasks.detection.predict:DetectionExplainer"
    hub_name = "object-detection"
    hub_metrics = {  # noqa: RUF012 - never changed
        "val_mask_AP": ("mean_average_precision", "mask AP (COCO, IoU 0.50 to 0.95)"),
        "val_keypoint_AP": ("mean_average_precision", "keypoint AP (COCO, OKS 0.50 to 0.95)"),
        "val_box_AP": ("mean_average_precision", "box AP (COCO, IoU 0.50 to 0.95)"),
    }
    predictor_options = ("score_threshold", "tile")
    data_options = ("split",)
    explainer_options = ("wanted_object",)
    columns = ("class", "score", "x1", "y1", "x2", "y2")
    formats = ("coco", "yolo", "voc")
    other_options = ("out",)
    bench_size = (800, 1333)  # of COCO
    gives_losses = True
    counts_macs = False  # they depend on what is found
    usage = """With groupmixformer and its extra `detection`:

```python
import torch
import groupmixformer

model, stored = groupmixformer.load_detector("hf-hub:{repo_id}")
with torch.inference_mode():
    found = model([torch.rand(3, 480, 640)])[0]  # images of any sizes, RGB from 0 to 1
names = [stored["class_names"][label - 1] for label in found["labels"].tolist()]
```
"""

    def open_part(self, data: Path, part: str, recipe: "Recipe | None" = None) -> Samples:
        """Open objects of any format: with masks where all have one, and keypoints where a recipe needs them.

        Without a recipe, keypoints are shown where all categories have the same.
        """
        from .data import CocoImages, detection_transform

        transform: Any = None
        if recipe:
            transform = detection_transform(*(getattr(recipe.detector, name) for name in ("hflip", "vflip", "color_jitter")))
        seed = recipe.seed if recipe else 0
        reading: dict[str, Any] = {"channels": recipe.channels if recipe else ANY, "keypoints": None}
        if recipe:
            reading["keypoints"] = recipe.detector.architecture == "keypoint_rcnn"
        if reading["keypoints"]:
            return CocoImages(data, part, False, transform, seed, **reading)
        try:
            images = CocoImages(data, part, True, transform, seed, **reading)
        except ValueError:  # which is told if it is not for want of masks
            return CocoImages(data, part, False, transform, seed, **reading)
        maskless = any("segmentation: " in line for line in images.dropped)
        return CocoImages(data, part, False, transform, seed, **reading) if maskless else images

    def exportable(self, run: RunFolder, format: str, features: bool = False) -> Exportable:
        """Return the detector, which ONNX alone can carry."""
        from .model import load_detector

        if format != "onnx":
            raise ValueError(f"{run.source}: {format} cannot carry a detector: export it with --format onnx")
        detector, stored = load_detector(run)
        if detector.architecture == "rt_detr":
            raise ValueError(f"{run.source}: RT-DETR cannot be exported yet: export a detector of torchvision")
        channels = Channels.stored(stored, detector.backbone.in_chans)
        return Exportable(detector, stored["class_names"], gives_objects=True, channels=channels)

    def write_results(self, out: Path, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
        """Write COCO's results."""
        from .predict import write_coco_results

        return {"coco_results": write_coco_results(out, results)}

    def table(self, found: Predicted) -> list[dict[str, Any]]:
        """Return the objects."""
        return [
            {"class": row["class"], "score": row["score"], **dict(zip(self.columns[2:], row["box"], strict=True))}
            for row in found.result["objects"]
        ]

    def write_format(
        self, format: str, out: Path, images: Sequence[tuple[str, tuple[int, int], Predicted]], run: RunFolder
    ) -> Path:
        """Write objects of at least the least score as a data set."""
        from .write import Classes, Drawn, write

        base = os.path.commonpath([Path(path).absolute().parent for path, *_ in images])
        listed = [  # both lists begin with the best
            Drawn(os.path.relpath(Path(path).absolute(), base), size, found.results[: len(found.result["objects"])])
            for path, size, found in images
        ]
        classes = dict(zip(run.config["category_ids"], run.config["class_names"], strict=True))
        return write(format, out, listed, Classes(classes, run.config.get("keypoints", ()), run.config.get("skeleton", ())))

    def bench_network(self, name: str, size: tuple[int, int]) -> nn.Module:
        """Return Mask R-CNN."""
        from ..backbone import Backbone
        from .model import Detector

        height, width = sorted(size)
        return Detector(Backbone(name), num_classes=80, architecture="mask_rcnn", image_size=height, max_size=width)

    def bench_batch(self, images: Tensor, train: bool) -> tuple[Any, Any]:
        """Return a list of images in 0 to 1, and for each eight boxes of an eighth to a half of the sides, filled by masks."""
        number, sides = 8, torch.tensor(images.shape[:1:-1])  # width and height
        random = torch.Generator().manual_seed(0)
        extents = sides * (0.125 + 0.375 * torch.rand(number, 2, generator=random))
        corners = torch.rand(number, 2, generator=random) * (sides - extents)
        boxes = torch.cat([corners, corners + extents], dim=1)
        masks = torch.zeros(number, *images.shape[2:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = {"boxes": boxes, "labels": torch.randint(1, 81, (number,), generator=random), "masks": masks}
        target = {name: value.to(images.device) for name, value in target.items()}
        return [image.sigmoid() for image in images], [target] * len(images) if train else None

    def compiled_part(self, network: Any) -> nn.Module:
        """Return the backbone; the rest depends on what is found in an image."""
        features: nn.Module = network.features
        return features
