"""Object detection and instance segmentation: torchvision's detectors over a backbone of timm, and their training steps."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ...models.checkpoint import save_network
from ...training.loaders import DataModule
from ...training.module import Task
from ...training.recipe import Recipe
from ..backbone import Backbone, Dense, load_network, open_backbone, start_from, take_any_size
from .data import CocoImages, coco_numbers, collate, restrict, to_results, train_transform


class Pyramid(nn.Module):
    """A backbone with a feature pyramid over it (Lin et al., 2017): images (B, 3, H, W) to maps (B, width, h, w) by name."""

    def __init__(self, backbone: Backbone, strides: Sequence[int], width: int, extra: Any, **options: Any) -> None:
        super().__init__()
        self.out_channels = width  # torchvision asks
        options = {**backbone.options(**options), "out_indices": backbone.indices(strides)}
        self.body = take_any_size(timm.create_model(backbone.name, **options))
        self.permuted = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # as Swin's are
        info: Any = self.body.feature_info
        self.pyramid = FeaturePyramidNetwork(info.channels(), width, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps, the finest first."""
        features = self.body(images)
        if self.permuted:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return self.pyramid(OrderedDict((str(i), feature) for i, feature in enumerate(features)))


class Detector(Dense):
    """RetinaNet (Lin et al., 2017), Faster R-CNN (Ren et al., 2015) or Mask R-CNN (He et al., 2017), as torchvision has them.

    Takes a list of images (3, H, W) in 0 to 1, of any sizes. In training it also takes their targets and gives the losses by
    name; otherwise it gives for each image boxes (N, 4) as x1, y1, x2, y2 in its pixels, labels (N) from 1 on, scores (N)
    and, for Mask R-CNN, masks (N, 1, H, W) of probabilities, the best first.

    Args:
        backbone: With features of strides 4 to 32, of which RetinaNet takes those from 8 on.
        num_classes: Number of classes, without the background.
        architecture: retinanet, faster_rcnn or mask_rcnn.
        image_size: Shorter side to which images are resized, in pixels.
        max_size: Limit of the longer side.
        sizes: Other shorter sides for training, of which one of all is drawn.
        fpn_channels: Channels of the feature pyramid and of the heads.
        anchor_scale: Side of the smallest anchors, in strides of their level.
        rois_per_image: Regions of a training image from which the second stage learns.
        max_detections: Limit of the objects that are found in an image.
        mean: Of the pixels, by channel.
        std: Their standard deviation.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ValueError: If there is no such architecture, or the backbone lacks features.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        architecture: str,
        image_size: int,
        max_size: int,
        sizes: Sequence[int] = (),
        fpn_channels: int = 256,
        anchor_scale: float = 8.0,
        rois_per_image: int = 512,
        max_detections: int = 100,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        **options: Any,
    ) -> None:
        super().__init__(backbone)
        shared: dict[str, Any] = {
            "min_size": (*sizes, image_size),  # torchvision tests at the last
            "max_size": max_size,
            "image_mean": list(mean),
            "image_std": list(std),
        }
        classes, ratios = num_classes + 1, (0.5, 1.0, 2.0)  # torchvision counts the background
        if architecture == "retinanet":
            pyramid = Pyramid(backbone, (8, 16, 32), fpn_channels, LastLevelP6P7(fpn_channels, fpn_channels), **options)
            sides = [[anchor_scale / 2 * stride * 2 ** (octave / 3) for octave in range(3)] for stride in (8, 16, 32, 64, 128)]
            anchors = AnchorGenerator(tuple(map(tuple, sides)), (ratios,) * len(sides))
            self.network: Any = detection.RetinaNet(
                pyramid, classes, anchor_generator=anchors, detections_per_img=max_detections, **shared
            )
        elif architecture in ("faster_rcnn", "mask_rcnn"):
            pyramid = Pyramid(backbone, (4, 8, 16, 32), fpn_channels, LastLevelMaxPool(), **options)
            sides = [[anchor_scale * stride] for stride in (4, 8, 16, 32, 64)]
            anchors = AnchorGenerator(tuple(map(tuple, sides)), (ratios,) * len(sides))
            heads: dict[str, Any] = {
                "box_head": TwoMLPHead(7 * 7 * fpn_channels, 4 * fpn_channels),
                "box_predictor": FastRCNNPredictor(4 * fpn_channels, classes),
            }
            if architecture == "mask_rcnn":
                heads["mask_head"] = MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, dilation=1)
                heads["mask_predictor"] = MaskRCNNPredictor(fpn_channels, fpn_channels, classes)
            made = detection.MaskRCNN if architecture == "mask_rcnn" else detection.FasterRCNN
            self.network = made(
                pyramid,
                rpn_anchor_generator=anchors,
                box_batch_size_per_image=rois_per_image,
                box_detections_per_img=max_detections,
                **heads,
                **shared,
            )
            # torchvision takes the strides from the first image that it sees, wrongly if much of that is filling.
            for pool in (self.network.roi_heads.box_roi_pool, self.network.roi_heads.mask_roi_pool):
                if pool is not None:
                    maps = {str(level): torch.zeros(1, 1, 64 >> level, 64 >> level) for level in range(4)}
                    pool(maps, [torch.zeros(1, 4)], [(256, 256)])
        else:
            raise ValueError(f"no detector {architecture}, expected retinanet, faster_rcnn or mask_rcnn")

    @property
    def body(self) -> Any:
        """The features of timm's model."""
        return self.network.backbone.body

    @property
    def masks(self) -> bool:
        """Whether it finds masks too."""
        return isinstance(self.network, detection.MaskRCNN)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the losses by name in training, otherwise what is found in each image."""
        found = self.network(images, targets)
        if self.training or not isinstance(self.network, detection.RetinaNet):
            return found
        # RetinaNet has logits for the background too, although nothing is ever labelled so.
        return [{name: value[one["labels"] > 0] for name, value in one.items()} for one in found]


def load_detector(folder: str | Path) -> tuple[Detector, dict[str, Any]]:
    """Load the detector of a run.

    Returns:
        The detector in eval mode, and what is stored with it: class_names and category_ids, in the order of the labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds something else or is damaged.
    """
    return load_network(folder, "detection", Detector)


class Detection(Task):
    """Trains a detector by a recipe.

    Args:
        recipe: The settings.
        train: Training set.
        held_out: Validation set.
        world_size: Number of processes.
    """

    def __init__(self, recipe: Recipe, train: CocoImages, held_out: CocoImages, world_size: int = 1) -> None:
        settings = recipe.detector
        backbone, weights, used_to = open_backbone(recipe.model, recipe.checkpoint, "detection")
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
            **used_to,
        }
        model = Detector(backbone, sizes=settings.sizes, **self.network, drop_path_rate=recipe.drop_path_rate, weights=weights)
        new = start_from(model, recipe.checkpoint, "detection")
        if settings.freeze_bn:
            model.freeze_statistics()
        train.seed = recipe.seed
        loaders = DataModule(train, held_out, recipe.batch_size, recipe.workers, recipe.seed, collate)
        super().__init__(recipe, model, loaders, train.class_names, world_size)
        self.note_new(new)
        self.truth = held_out.truth
        self.monitor = "val_mask_AP" if model.masks else "val_box_AP"
        self.found: list[tuple[Any, list[dict[str, Any]]]] = []  # of each held-out image

    def compile_model(self) -> None:
        """Compile the backbone; the rest depends on what is found in an image."""
        self.model.body.compile()

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
        """Find objects in held-out images; those of id -1 fill up a batch and do not count."""
        images, ids, _ = batch
        wanted = [i for i, image_id in enumerate(ids) if image_id != -1]
        if wanted:
            outputs = [self.evaluated([images[i]])[0] for i in wanted]  # together, they would be padded to one size
            self.found += [(ids[i], to_results(o, ids[i], self.category_ids)) for i, o in zip(wanted, outputs, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Compute COCO's numbers over the images of all processes, on the first of them."""
        found = dict(pair for pairs in self._of_all(self.found) for pair in pairs)
        numbers: dict[str, float] = {}
        if self.trainer.is_global_zero:
            # In the order of the annotations, whatever process an image was on: that decides between equal scores.
            results = [result for image in self.truth["images"] for result in found.get(image["id"], [])]
            truth = restrict(self.truth, found)
            for kind, name in (("bbox", "box"), *((("segm", "mask"),) if self.evaluated.masks else ())):
                measured, _ = coco_numbers(truth, results, kind)
                numbers |= {f"val_{name}_{number}": measured[number] for number in ("AP", "AP50", "AP75")}
        numbers = self.trainer.strategy.broadcast(numbers)
        self.log_dict({**numbers, "val_images": float(len(found))}, rank_zero_only=False)

    def save(self, model: Any, folder: Path) -> None:
        """Write a detector to a folder that `load_detector` reads."""
        network = {"backbone": asdict(model.backbone), **self.network}
        config = {"task": "detection", "class_names": self.class_names, "category_ids": self.category_ids, "network": network}
        save_network(model, folder, config)


def start(recipe: Recipe, world_size: int) -> Detection:
    """Open the recipe's data and create its detector.

    Raises:
        ValueError: If one of them cannot be used.
    """
    settings = recipe.detector
    transform = train_transform(settings.hflip, settings.vflip, settings.color_jitter)
    masks = settings.architecture == "mask_rcnn"
    train, held_out = CocoImages(recipe.data, "train", masks, transform), CocoImages(recipe.data, "val", masks)
    if (train.class_names, train.category_ids) != (held_out.class_names, held_out.category_ids):
        raise ValueError(f"{recipe.data}: the categories of train and val differ, expected the same ids and names")
    return Detection(recipe, train, held_out, world_size)
