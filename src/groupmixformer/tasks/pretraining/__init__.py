"""Pre-training without labels."""

from pathlib import Path
from typing import Any

import torch

from ...run_folder import RunFolder
from ..predictor import Predictor
from ..registry import NetworkInfo, TaskSpec, as_text


class PretrainingTask(TaskSpec):
    """Self-supervised pre-training of a backbone of timm; what it gives is a checkpoint for the other tasks."""

    name = "pretraining"
    example_recipe = "pretrain"
    module_class = "groupmixformer.tasks.pretraining.training:PretrainingModule"
    predictor_class = "groupmixformer.tasks.pretraining.report:PretrainingReporter"
    hub_name = "image-feature-extraction"
    hub_tags = ("timm",)
    hub_library = "timm"
    usage = """With timm, as features, or as the beginning of a classifier:

```python
import timm
import groupmixformer

features = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)
model = timm.create_model("hf-hub:{repo_id}", pretrained=True, num_classes=10)
```

With groupmixformer's recipes: `gmf train finetune --checkpoint hf-hub:{repo_id} --data FOLDER`.
"""

    def predictor(
        self, run: RunFolder, device: torch.device, image_size: int | None, dtype: torch.dtype | None, **options: Any
    ) -> Predictor:
        """Say that there is nothing to predict.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{run.source}: holds a backbone pre-trained without labels, which has no classes: train it on some first, with "
            f"gmf train finetune --checkpoint {run.source} --data FOLDER, or a recipe for detection or segmentation"
        )

    def reporter(self, run: RunFolder, device: torch.device) -> Predictor:
        """Open a run to measure its features."""
        return super().predictor(run, device, None, None)

    def load(self, run: RunFolder) -> Any:
        """Return the backbone, as a classifier of timm without classes."""
        from ...models.checkpoint import load_model

        return load_model(run)

    def publish(self, run: RunFolder, folder: Path) -> NetworkInfo:
        """Write the folder that `load_checkpoint` and timm read."""
        from ...models.checkpoint import load_model, model_arguments, save_checkpoint
        from ...models.groupmixformer import GroupMixFormer

        model = load_model(run)
        save_checkpoint(model, folder, more={name: run.config[name] for name in ("task", "method") if name in run.config})
        cfg, ours = model.pretrained_cfg, isinstance(model, GroupMixFormer)
        facts = {
            "pre-trained by": str(run.config.get("method")),
            "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
            "input": as_text(cfg["input_size"]),
            "mean": as_text(cfg["mean"]),
            "standard deviation": as_text(cfg["std"]),
        }
        if ours:
            facts |= {name.replace("_", " "): as_text(value) for name, value in model_arguments(model).items()}
        about = "A backbone, pre-trained on images without labels"
        return NetworkInfo(f"`{cfg['architecture']}`", about, ours, [], facts, self.usage)
