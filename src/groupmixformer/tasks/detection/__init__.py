"""Object detection and instance segmentation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...run_folder import RunFolder
from ..registry import Exportable, TaskSpec

if TYPE_CHECKING:
    from ...training.recipe import Recipe
    from .predict import DetectionExplainer, DetectionPredictor
    from .training import DetectionModule


class DetectionTask(TaskSpec):
    """Object detection and instance segmentation with torchvision's detectors."""

    name = "detection"
    hub_name = "object-detection"
    hub_metrics = {  # noqa: RUF012 - never changed
        "val_mask_AP": ("mean_average_precision", "mask AP (COCO, IoU 0.50 to 0.95)"),
        "val_box_AP": ("mean_average_precision", "box AP (COCO, IoU 0.50 to 0.95)"),
    }
    predictor_options = ("score_threshold",)
    data_options = ("split",)
    explainer_options = ("wanted_object",)
    other_options = ("out",)
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

    def build_task(self, recipe: "Recipe", world_size: int) -> "DetectionModule":
        """Open the recipe's images and create its detector."""
        from .training import DetectionModule

        return DetectionModule.from_recipe(recipe, world_size)

    def predictor(
        self, run: RunFolder, device: torch.device, image_size: int | None, dtype: torch.dtype | None, **options: Any
    ) -> "DetectionPredictor":
        """Open a detector."""
        from .predict import DetectionPredictor

        return DetectionPredictor(run, device, image_size, dtype, **options)

    def explainer(self, run: RunFolder, device: torch.device, image_size: int | None, **options: Any) -> "DetectionExplainer":
        """Open a detector to explain an object."""
        from .predict import DetectionExplainer

        return DetectionExplainer(run, device, image_size, **options)

    def load(self, run: RunFolder) -> Any:
        """Return the detector."""
        from .model import load_detector

        return load_detector(run)[0]

    def exportable(self, run: RunFolder, format: str, features: bool = False) -> Exportable:
        """Return the detector, which ONNX alone can carry."""
        from .model import load_detector

        if features:
            raise ValueError(f"{run.source}: holds a detector, expected a classifier to export feature maps of")
        if format != "onnx":
            raise ValueError(f"{run.source}: {format} cannot carry a detector: export it with --format onnx")
        detector, stored = load_detector(run)
        return Exportable(detector, stored["class_names"], gives_objects=True)

    def write_results(self, out: Path, results: list[dict[str, Any]]) -> dict[str, str]:
        """Write COCO's results."""
        from .predict import write_coco_results

        return {"coco_results": write_coco_results(out, results)}
