"""RT-DETR, a detector without anchors and without suppression of what overlaps: transformers' over a backbone of timm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from ..backbone import Backbone, Features

STRIDES = (8, 16, 32)
LOSSES = ("loss_vfl", "loss_bbox", "loss_giou")  # each of all layers of the decoder, the encoder's proposals and denoising


def check_places(height: int, width: int, queries: int) -> None:
    """Check that the maps of an image have a place for each query, as RT-DETR chooses the places where it looks.

    Raises:
        ValueError: If they have not.
    """
    places = sum((height // stride) * (width // stride) for stride in STRIDES)
    if places < queries:
        raise ValueError(
            f"got images of {height} x {width}, whose maps have {places} places, expected at least {queries}, one for each "
            "query: take a larger image_size, or fewer detector.queries"
        )


class Encoder(Features):
    """A backbone in the form that transformers asks for: a map and the mask of its filling, which RT-DETR does not read."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, STRIDES, **options)
        self.intermediate_channel_sizes: list[int] = self.body.feature_info.channels()

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the maps, the finest first."""
        return [(feature, mask) for feature in self.maps(images)]


class RTDetr(nn.Module):
    """RT-DETR (Zhao et al., 2024, arXiv 2304.08069), with the interface of torchvision's detectors.

    Images are resized and filled up as torchvision does, not squashed to a square; boxes are relative to the filled image.

    Args:
        backbone: With features of strides 8, 16 and 32.
        num_classes: Number of classes.
        transform: Resizes, normalises and batches images, and brings boxes back.
        width: Of encoder and decoder, a multiple of 8.
        queries: Objects that the decoder looks for in an image.
        max_detections: Limit of the objects that are returned, of all queries and classes.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ModuleNotFoundError: If transformers is missing.
        ValueError: If the width does not divide into 8 heads, there are more queries than places in the maps, or the backbone
            lacks features.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        transform: GeneralizedRCNNTransform,
        width: int,
        queries: int,
        max_detections: int,
        **options: Any,
    ) -> None:
        import transformers

        if width % 8:
            raise ValueError(f"got fpn_channels={width}, expected a multiple of 8: RT-DETR has 8 heads")
        smallest = min(*transform.min_size, transform.max_size)
        check_places(smallest, smallest, queries)
        super().__init__()
        self.transform, self.num_classes, self.max_detections = transform, num_classes, max_detections
        encoder = Encoder(backbone, **options)
        channels = encoder.intermediate_channel_sizes
        library: Any = transformers  # whose configurations have no types
        # A stand-in with as many channels: transformers initialises what it makes, and ours keeps its weights.
        stand_in = library.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, *channels], depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
        )
        config = library.RTDetrConfig(
            backbone_config=stand_in,
            freeze_backbone_batch_norms=False,
            encoder_in_channels=channels,
            encoder_hidden_dim=width,
            encoder_ffn_dim=4 * width,
            d_model=width,
            decoder_in_channels=[width] * 3,
            decoder_ffn_dim=4 * width,
            num_queries=queries,
            num_labels=num_classes,
        )
        self.detector: Any = library.RTDetrForObjectDetection(config)
        self.detector.model.backbone = encoder

    @property
    def backbone(self) -> Encoder:
        """What gives the maps; its `body` is timm's model."""
        encoder: Encoder = self.detector.model.backbone
        return encoder

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return the losses by name in training, otherwise what is found in each image, the best first.

        Raises:
            ValueError: If there are fewer places in the maps than queries.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        height, width = batch.tensors.shape[-2:]
        check_places(height, width, self.detector.config.num_queries)
        scale = torch.tensor([width, height, width, height], device=batch.tensors.device)
        if self.training:
            assert targets is not None
            labels = [
                {"class_labels": one["labels"] - 1, "boxes": box_convert(one["boxes"], "xyxy", "cxcywh") / scale}
                for one in targets
            ]
            return self._losses(self.detector(batch.tensors, labels=labels).loss_dict)
        output = self.detector(batch.tensors)
        boxes = box_convert(output.pred_boxes.float(), "cxcywh", "xyxy") * scale  # (B, queries, 4)
        scores = output.logits.float().sigmoid().flatten(1)  # (B, queries * classes)
        best, places = scores.topk(min(self.max_detections, scores.shape[1]))
        found = []
        for of_image, score, place, (high, wide) in zip(boxes, best, places, batch.image_sizes, strict=True):
            limit = torch.tensor([wide, high, wide, high], device=scale.device)
            inside = torch.minimum(of_image[place // self.num_classes].clamp(min=0), limit)
            found.append({"boxes": inside, "labels": place % self.num_classes + 1, "scores": score})
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def _losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up each kind of loss over the layers."""
        added = {kind: torch.stack([loss for name, loss in losses.items() if name.startswith(kind)]).sum() for kind in LOSSES}
        # Without an object in the batch nothing is denoised, and processes wait for a gradient of every parameter.
        added["loss_vfl"] = added["loss_vfl"] + 0.0 * self.detector.model.denoising_class_embed.weight.sum()
        return added
