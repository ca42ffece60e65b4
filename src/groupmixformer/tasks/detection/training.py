"""The training steps of the detection of objects, masks and keypoints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.classes import differences
from ...run_folder import save_network
from ...training.loaders import DataModule
from ...training.module import Task, compile_blocks
from ...training.recipe import Recipe
from ..backbone import colours_left_out, open_backbone, pixel_statistics, shown_channels, start_from
from .data import CocoImages, collate_detection, detection_transform
from .metrics import coco_metrics, restrict, to_results
from .model import Detector


class DetectionModule(Task):
    """Trains a detector by a recipe.

    Args:
        recipe: The settings.
        train: Training set.
        held_out: Validation set.
        world_size: Number of processes.
    """

    fixed_size = False

    def __init__(self, recipe: Recipe, train: CocoImages, held_out: CocoImages, world_size: int = 1) -> None:
        settings = recipe.detector
        backbone, weights, used_to = open_backbone(
            recipe.model, recipe.checkpoint, "detection", recipe.model_options, recipe.in_chans
        )
        self.category_ids = train.category_ids
        self.network: dict[str, Any] = {
            "num_classes": len(train.class_names),
            "architecture": settings.architecture,
            "image_size": recipe.image_size,
            "max_size": settings.max_size,
            "fpn_channels": settings.fpn_channels,
            "anchor_scale": settings.anchor_scale,
            "rois_per_image": settings.rois_per_image,
            "max_detections": settings.max_detections,
            **({"queries": settings.queries} if settings.architecture == "rt_detr" else {}),
            **({"keypoints": len(train.keypoint_names)} if settings.architecture == "keypoint_rcnn" else {}),
            **pixel_statistics(recipe, used_to),
        }
        model = Detector(backbone, sizes=settings.sizes, **self.network, drop_path_rate=recipe.drop_path_rate, weights=weights)
        new = start_from(model, recipe.checkpoint, "detection", train.class_names)
        if settings.freeze_bn:
            model.freeze_statistics()
        loaders = DataModule(train, held_out, recipe.batch_size, recipe.workers, recipe.seed, collate_detection)
        super().__init__(recipe, model, loaders, train.class_names, world_size)
        self.note_new(new)
        self.notes += colours_left_out(recipe, train, ["color_jitter"] if settings.color_jitter else [])
        self.keypoint_names, self.skeleton = train.keypoint_names, train.skeleton
        self.ground_truth = held_out.ground_truth
        self.monitor = f"val_{list(model.kinds)[-1]}_AP"
        self.found: list[tuple[Any, list[dict[str, Any]]]] = []  # of each held-out image

    def compile_model(self) -> None:
        """Compile the backbone; the rest depends on what is found in an image."""
        compile_blocks(self.model.features)

    @property
    def counted(self) -> tuple[str, nn.Module]:
        """The backbone, as the rest depends on what is found in an image."""
        return " of the backbone", self.model.features

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]], list[str]], batch_idx: int) -> Tensor:
        """Return the sum of the detector's losses for a batch of images, targets and problems."""
        images, targets, problems = batch
        self.note_unreadable(problems)
        losses: Mapping[str, Tensor] = self.model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict(dict(losses), batch_size=len(images))
        self.log_loss(loss, len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget what was found."""
        self.found = []

    def validation_step(self, batch: tuple[list[Tensor], list[Any], list[str]], batch_idx: int) -> None:
        """Find objects in held-out images; those without an id fill up a batch and do not count."""
        images, ids, _ = batch
        wanted = [i for i, image_id in enumerate(ids) if image_id is not None]
        if wanted:
            outputs = [self.evaluated([images[i]])[0] for i in wanted]  # together, they would be padded to one size
            self.found += [(ids[i], to_results(o, ids[i], self.category_ids)) for i, o in zip(wanted, outputs, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Compute COCO's metrics over the images of all processes, on the first of them."""
        found = dict(pair for pairs in self._of_all(self.found) for pair in pairs)
        metrics: dict[str, float] = {}
        if self.trainer.is_global_zero:
            # In the order of the annotations, whatever process an image was on: that decides between equal scores.
            results = [result for image in self.ground_truth["images"] for result in found.get(image["id"], [])]
            ground_truth = restrict(self.ground_truth, found)
            for name, kind in self.evaluated.kinds.items():
                measured, _ = coco_metrics(ground_truth, results, kind)
                metrics |= {f"val_{name}_{metric}": measured[metric] for metric in ("AP", "AP50", "AP75")}
        metrics = self.trainer.strategy.broadcast(metrics)
        self.log_dict({**metrics, "val_images": float(len(found))}, rank_zero_only=False)

    def save(self, model: Any, folder: Path) -> None:
        """Write a detector to a folder that `load_detector` reads."""
        network = {"backbone": asdict(model.backbone), **self.network}
        config = {"task": "detection", "class_names": self.class_names, "category_ids": self.category_ids, "network": network}
        config |= {"keypoints": self.keypoint_names, "skeleton": self.skeleton} if self.keypoint_names else {}
        save_network(model, folder, config | shown_channels(self.recipe))

    @classmethod
    def from_recipe(cls, recipe: Recipe, world_size: int) -> "DetectionModule":
        """Open the recipe's data and create its detector.

        Raises:
            ValueError: If one of them cannot be used.
        """
        settings = recipe.detector
        transform = detection_transform(settings.hflip, settings.vflip, settings.color_jitter)
        masks, keypoints = settings.architecture == "mask_rcnn", settings.architecture == "keypoint_rcnn"
        reading: dict[str, Any] = {"splitter": recipe.splitter, "channels": recipe.channels, "keypoints": keypoints}
        train = CocoImages(recipe.data, "train", masks, transform, recipe.seed, **reading)
        if keypoints and train.mirrored is None and settings.hflip + settings.vflip:
            what = "left and right in the names of keypoints, or flip_idx of YOLO, would say which change places"
            train.notes = [*train.notes, f"images are not flipped: {what}"]
        held_out = CocoImages(recipe.data, "val", masks, **reading)
        pairs = [
            [f"{name} ({i})" for name, i in zip(images.class_names, images.category_ids, strict=True)] + images.keypoint_names
            for images in (train, held_out)
        ]
        if differing := differences(pairs[0], pairs[1], "train", "val"):
            raise ValueError(
                f"{recipe.data}: the categories of train and val differ, expected the same names and ids: {differing}"
            )
        return cls(recipe, train, held_out, world_size)
