"""Detection of objects, their masks and their keypoints: torchvision's detectors, and RT-DETR, over a backbone of timm."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ...files import Fields
from ...run_folder import CONFIG, RunFolder
from ..backbone import Backbone, BackboneModel, Features, load_network

if TYPE_CHECKING:  # which brings faster-coco-eval
    from .metrics import Kind

TWO_STAGES: dict[str, Any] = {
    "faster_rcnn": detection.FasterRCNN,
    "mask_rcnn": detection.MaskRCNN,
    "keypoint_rcnn": detection.KeypointRCNN,
}


class Pyramid(Features):
    """A backbone with a feature pyramid over it (Lin et al., 2017): images (B, C, H, W) to maps (B, width, h, w) by name."""

    def __init__(self, backbone: Backbone, strides: Sequence[int], width: int, extra: Any, **options: Any) -> None:
        super().__init__(backbone, strides, **options)
        self.out_channels = width  # torchvision asks
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), width, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps, the finest first."""
        return self.pyramid(OrderedDict((str(i), feature) for i, feature in enumerate(self.maps(images))))


class HeatMaps(KeypointRCNNPredictor):  # type: ignore[misc]
    """The last layers of Keypoint R-CNN, whose loss in torchvision needs maps in one piece of memory, not channels last."""

    def forward(self, features: Tensor) -> Tensor:
        """From features (N, C, h, w) to heat maps (N, K, 4h, 4w)."""
        return super().forward(features).contiguous()


class Detector(BackboneModel):
    """RetinaNet (Lin et al., 2017), Faster R-CNN (Ren et al., 2015), Mask R-CNN or Keypoint R-CNN (both He et al., 2017).

    These are torchvision's. Or RT-DETR (Zhao et al., 2024), as transformers has it, which finds boxes without anchors.

    Takes a list of images (C, H, W) in 0 to 1, of any sizes. In training it also takes their targets and gives the losses by
    name; otherwise it gives for each image boxes (N, 4) as x1, y1, x2, y2 in its pixels, labels (N) from 1 on, scores (N)
    and, for Mask R-CNN, masks (N, 1, H, W) of probabilities, for Keypoint R-CNN keypoints (N, K, 3) as x, y and 1 with
    keypoints_scores (N, K), the heights of their heat maps; the best object first.

    Args:
        backbone: With features of strides 4 to 32, of which RetinaNet and RT-DETR take those from 8 on.
        num_classes: Number of classes, without the background.
        architecture: retinanet, faster_rcnn, mask_rcnn, keypoint_rcnn or rt_detr.
        image_size: Shorter side to which images are resized, in pixels.
        max_size: Limit of the longer side.
        sizes: Other shorter sides for training, of which one of all is drawn.
        fpn_channels: Channels of the feature pyramid and of the heads, or of RT-DETR's encoder and decoder.
        anchor_scale: Side of the smallest anchors, in strides of their level.
        rois_per_image: Regions of a training image from which the second stage learns.
        max_detections: Limit of the objects that are found in an image.
        queries: Objects that RT-DETR looks for in an image.
        keypoints: Number of the keypoints of an object that Keypoint R-CNN finds.
        mean: Of the pixels, by channel.
        std: Their standard deviation.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ModuleNotFoundError: If transformers is missing, for RT-DETR.
        ValueError: If there is no such architecture, or the backbone lacks features.
    """

    class_layers = ("classification_head.cls_logits", "box_predictor", "mask_fcn_logits", "enc_score_head", "class_embed")

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
        queries: int = 300,
        keypoints: int = 17,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **options: Any,
    ) -> None:
        super().__init__(backbone)
        self.architecture = architecture
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
        elif architecture in TWO_STAGES:
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
            elif architecture == "keypoint_rcnn":
                heads["keypoint_head"] = KeypointRCNNHeads(fpn_channels, (2 * fpn_channels,) * 8)
                heads["keypoint_predictor"] = HeatMaps(2 * fpn_channels, keypoints)
            self.network = TWO_STAGES[architecture](
                pyramid,
                rpn_anchor_generator=anchors,
                box_batch_size_per_image=rois_per_image,
                box_detections_per_img=max_detections,
                **heads,
                **shared,
            )
            # torchvision takes the strides from the first image that it sees, wrongly if much of that is filling.
            with torch.device("cpu"):  # whatever the network is made on
                maps = {str(level): torch.zeros(1, 1, 64 >> level, 64 >> level) for level in range(4)}
                for part in ("box", "mask", "keypoint"):
                    if pool := getattr(self.network.roi_heads, f"{part}_roi_pool"):
                        pool(maps, [torch.zeros(1, 4)], [(256, 256)])
        elif architecture == "rt_detr":
            from .rt_detr import RTDetr  # transformers takes seconds to import

            transform = GeneralizedRCNNTransform(**shared)
            self.network = RTDetr(backbone, num_classes, transform, fpn_channels, queries, max_detections, **options)
        else:
            raise ValueError(f"no detector {architecture}, expected retinanet, {', '.join(TWO_STAGES)} or rt_detr")

    @property
    def features(self) -> Any:
        """The features of timm's model."""
        return self.network.backbone.body

    @property
    def masks(self) -> bool:
        """Whether it finds masks too."""
        return self.architecture == "mask_rcnn"

    @property
    def keypoints(self) -> bool:
        """Whether it finds keypoints too."""
        return self.architecture == "keypoint_rcnn"

    @property
    def kinds(self) -> "dict[str, Kind]":
        """What is measured of its objects, by COCO's name for it; the last is what a model is chosen by."""
        kinds: dict[str, Kind] = {"box": "bbox"}
        return kinds | ({"mask": "segm"} if self.masks else {}) | ({"keypoint": "keypoints"} if self.keypoints else {})

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the losses by name in training, otherwise what is found in each image."""
        found = self.network(images, targets)
        if self.training or self.architecture != "retinanet":
            return found
        # RetinaNet has logits for the background too, although nothing is ever labelled so.
        return [{name: value[one["labels"] > 0] for name, value in one.items()} for one in found]


def load_detector(folder: str | Path | RunFolder) -> tuple[Detector, dict[str, Any]]:
    """Load the detector of a run.

    Returns:
        The detector in eval mode, and what is stored with it: class_names and category_ids, in the order of the labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds something else or is damaged.
    """
    run = RunFolder.of(folder)
    model, config = load_network(run, "detection", Detector)
    count = len(config["class_names"])

    def fits(ids: Any) -> bool:
        return isinstance(ids, list) and len(ids) == count and all(type(key) in (int, str) for key in ids)

    Fields(config, str(run.path / CONFIG)).take("category_ids", f"a list of {count} integers or texts", fits)
    return model, config
