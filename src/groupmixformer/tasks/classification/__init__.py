"""Image classification."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from ...data.channels import ANY, Channels
from ...data.formats import recognise
from ...data.samples import Samples
from ...run_folder import MULTI_LABEL, RunFolder
from ..predictor import Predicted
from ..registry import Exportable, NetworkInfo, TaskSpec, as_text

if TYPE_CHECKING:  # which brings jsonargparse
    from ...training.recipe import Recipe

USAGE_OURS = """With timm; the import registers the model:

```python
import timm
import groupmixformer

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for a PIL image
features = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)
```

With groupmixformer alone, and with transformers:

```python
import groupmixformer
from transformers import pipeline

model = groupmixformer.load_checkpoint("hf-hub:{repo_id}")
classify = pipeline("image-classification", model="{repo_id}")
```
"""
USAGE_OF_TIMM = """With timm, and with transformers:

```python
import timm
from transformers import pipeline

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
classify = pipeline("image-classification", model="{repo_id}")
```
"""


class ClassificationTask(TaskSpec):
    """Image classification with timm's models."""

    name = "classification"
    example_recipe = "folder"
    module_class = "groupmixformer.tasks.classification.training:ClassificationModule"
    predictor_class = "groupmixformer.tasks.classification.predict:ClassificationPredictor"
    explainer_class = "groupmixformer.tasks.classification.predict:ClassificationExplainer"
    hub_name = "image-classification"
    hub_tags = ("timm", "transformers")
    hub_library = "timm"
    hub_metrics = {  # noqa: RUF012 - never changed
        "val_top1": ("accuracy", "top-1 accuracy"),
        "val_mAP": ("mean_average_precision", "mAP over the labels"),
        "val_f1_macro": ("f1", "macro F1 at a threshold of 0.5"),
        "val_f1_micro": ("f1", "micro F1 at a threshold of 0.5"),
    }
    predictor_options = ("top", "score_threshold", "test_size", "crop_pct", "crop_mode", "interpolation")
    data_options = ("root",)
    evaluation_options = ("batch_size",)
    explainer_options = ("wanted_class",)
    columns = ("class", "probability")
    other_options = ("plot", "max_batch", "features", "int8", "with_preprocessing")
    casts_weights = True
    published = True

    def open_part(self, data: Path, part: str, recipe: "Recipe | None" = None) -> Samples:
        """Open a folder of class folders, or images with labels."""
        from .data import FolderImages, ImageData, LabelledImages, classification_transform, statistics_of

        found, several = recognise(data, self.name), False
        if found.format == "classes":
            source: Any = FolderImages(found.parts[part][0])
        else:
            source = LabelledImages(found, part)
            several = source.several
        transform: Any = None
        channels = recipe.channels if recipe else ANY
        if recipe:
            mean, std = statistics_of(recipe.channels)
            config = {"mean": mean, "std": std, "interpolation": "bicubic"}
            config["input_size"] = (recipe.in_chans, recipe.image_size, recipe.image_size)
            transform = classification_transform(recipe.augmentation, config)
        return ImageData(source, None, source.class_names, several).train(transform, recipe.seed if recipe else 0, channels)  # type: ignore[return-value]

    def load(self, run: RunFolder) -> Any:
        """Return a `GroupMixFormer` or another model of timm."""
        from ...models.checkpoint import load_model

        return load_model(run)

    def class_names(self, run: RunFolder) -> list[str]:
        """Return the names stored with the model; ImageNet's where there are 1,000 classes; numbers otherwise."""
        from .predict import class_names

        names: list[str] = run.config.get("label_names") or []
        return names if len(names) == run.config.get("num_classes") else class_names(self.load(run))

    def table(self, found: Predicted) -> list[dict[str, Any]]:
        """Return the likeliest classes."""
        return [{name: row[name] for name in self.columns} for row in found.result["classes"]]

    def exportable(self, run: RunFolder, format: str, features: bool = False) -> Exportable:
        """Return a GroupMixFormer, for its logits or its feature maps."""
        from ...models.checkpoint import LABEL_FIELDS, load_checkpoint
        from .predict import class_names, data_config

        model: Any = load_checkpoint(run)
        config = data_config(model)
        settings = {key: config[key] for key in ("input_size", "mean", "std")}
        settings["more"] = {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation")}
        if model.pretrained_cfg.get("problem_type") == MULTI_LABEL and not features:
            settings["more"] |= {key: model.pretrained_cfg[key] for key in LABEL_FIELDS if key in model.pretrained_cfg}
        if features:
            settings["names"] = [f"stride{2 ** (stage + 2)}" for stage in range(len(model.stages))]
        channels = Channels.stored(model.pretrained_cfg, settings["input_size"][0])
        return Exportable(model, [] if features else class_names(model), settings, channels=channels)

    def bench_network(self, name: str, size: tuple[int, int]) -> nn.Module:
        """Return a classifier; one that is made for one size of images, such as a ViT, for this one."""
        cfg = timm.get_pretrained_cfg(name)
        fixed: dict[str, Any] = {"img_size": size} if cfg and cfg.fixed_input_size else {}
        return timm.create_model(name, **fixed)

    def publish(self, run: RunFolder, folder: Path) -> NetworkInfo:
        """Write the folder that `load_checkpoint`, timm and transformers read."""
        from ...models.checkpoint import load_model, model_arguments, save_checkpoint, variant_of
        from ...models.groupmixformer import GroupMixFormer

        model = load_model(run)
        save_checkpoint(model, folder)
        cfg = model.pretrained_cfg
        channels, height, width = cfg["input_size"]
        facts = {
            "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
            "input": f"{channels} x {height} x {width}, {cfg['interpolation']}, centre crop of {cfg['crop_pct']:.4g}",
            "mean": as_text(cfg["mean"]),
            "standard deviation": as_text(cfg["std"]),
        }
        ours, name = isinstance(model, GroupMixFormer), f"`{cfg['architecture']}`"
        if ours:
            stages = model_arguments(model)
            if not variant_of(stages)[1]:
                name = "GroupMixFormer of other widths and depths than the published ones"
            facts |= {
                "widths of the stages": as_text(stages["embed_dims"]),
                "blocks of the stages": as_text(stages["depths"]),
                "MLP ratios": as_text(stages["mlp_ratios"]),
                "token mixer": model.mixer_name,
            }
        if adapter := getattr(model, "adapter", None):
            facts["layers beside its MLPs"] = f"AdaptFormer of width {adapter['rank']}, which timm and transformers do not read"
        facts["classes"] = f"{model.num_classes:,}"
        if cfg.get("problem_type") == MULTI_LABEL:
            facts["labels of an image"] = "several or none: the sigmoid of each output is the probability of a label"
            if "best_threshold" in cfg:
                facts["threshold of the best F1"] = f"{cfg['best_threshold']:.2f}, on the held-out images"
        paper = "([paper](https://arxiv.org/abs/2311.15157))"
        about = f"A GroupMixFormer, a vision transformer with Group-Mix Attention {paper}" if ours else "A model of timm"
        usage = self.usage if hasattr(model, "adapter") or channels != 3 else USAGE_OURS if ours else USAGE_OF_TIMM
        return NetworkInfo(name, about, ours, list(cfg.get("label_names") or []), facts, usage)
