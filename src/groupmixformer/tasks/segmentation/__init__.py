"""Semantic segmentation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ...data.channels import ANY, Channels
from ...data.samples import Samples
from ...run_folder import RunFolder
from ..predictor import Predicted
from ..registry import Exportable, TaskSpec

if TYPE_CHECKING:  # which brings jsonargparse
    from ...training.recipe import Recipe


class SegmentationTask(TaskSpec):
    """Semantic segmentation with the decoders of segmentation_models_pytorch."""

    name = "segmentation"
    example_recipe = "camvid"
    module_class = "groupmixformer.tasks.segmentation.training:SegmentationModule"
    predictor_class = "groupmixformer.tasks.segmentation.predict:SegmentationPredictor"
    explainer_class = "groupmixformer.tasks.segmentation.predict:SegmentationExplainer"
    hub_name = "image-segmentation"
    hub_metrics = {  # noqa: RUF012 - never changed
        "val_mIoU": ("mean_iou", "mean IoU"),
        "val_accuracy": ("accuracy", "share of pixels right"),
    }
    predictor_options = ("sliding_window", "scales", "flip")
    data_options = ("split",)
    explainer_options = ("wanted_class",)
    columns = ("class", "share")
    other_options = ("out",)
    bench_size = (512, 512)  # of ADE20K
    usage = """With groupmixformer and its extra `segmentation`:

```python
from PIL import Image
import groupmixformer
from groupmixformer.tasks.segmentation.model import segment

model, stored = groupmixformer.load_segmenter("hf-hub:{repo_id}")
image = Image.open("image.jpg").convert("RGB")
labels = segment(model, model.prepare(image), (image.height, image.width)).argmax(dim=0)  # of stored["class_names"]
```
"""

    def table(self, found: Predicted) -> list[dict[str, Any]]:
        """Return the shares of the classes."""
        return [{"class": name, "share": share} for name, share in found.result["shares"].items()]

    def open_part(self, data: Path, part: str, recipe: "Recipe | None" = None) -> Samples:
        """Open images and masks."""
        from .data import SemanticImages, segmentation_transform

        if recipe is None:
            return SemanticImages(data, part, channels=ANY)
        settings, count = recipe.segmenter, recipe.in_chans
        colours = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        statistics = colours if count == 3 else ([0.0] * count, [1.0] * count)
        how = (settings.scale, settings.hflip, settings.photometric)
        transform = segmentation_transform(recipe.image_size, *how, *statistics)
        return SemanticImages(data, part, transform, seed=recipe.seed, channels=recipe.channels)

    def exportable(self, run: RunFolder, format: str, features: bool = False) -> Exportable:
        """Return the segmenter, if the format can carry its decoder."""
        from .model import load_segmenter

        segmenter, stored = load_segmenter(run)
        if segmenter.by_queries:
            raise ValueError(f"{run.source}: Mask2Former cannot be exported yet: export a segmenter with upernet or fpn")
        pools = any(getattr(module, "output_size", 1) not in (1, (1, 1)) for module in segmenter.modules())
        if format == "openvino" or (format == "onnx" and pools):  # UPerNet averages over grids of fixed size
            what = "a decoder that pools to a grid, such as UPerNet's" if format == "onnx" else "a segmenter"
            raise ValueError(f"{run.source}: {format} cannot carry {what} for all sizes: export it with --format pt2")
        size = (segmenter.backbone.in_chans, segmenter.image_size, segmenter.image_size)
        settings = {"input_size": size, "mean": segmenter.mean, "std": segmenter.std}
        return Exportable(
            segmenter, stored["class_names"], settings, channels=Channels.stored(stored, segmenter.backbone.in_chans)
        )

    def bench_network(self, name: str, size: tuple[int, int]) -> nn.Module:
        """Return UPerNet with 512 channels and a second head."""
        from ..backbone import Backbone
        from .model import Segmenter

        return Segmenter(Backbone(name), num_classes=150, decoder="upernet", channels=512, image_size=size[0])

    def bench_batch(self, images: Tensor, train: bool) -> tuple[Any, Any]:
        """Return the images, and a class for every pixel."""
        shape = (images.shape[0], *images.shape[2:])
        return images, torch.randint(0, 100, shape, device=images.device) if train else None
