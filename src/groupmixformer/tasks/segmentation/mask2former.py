"""Mask2Former, which finds regions and their classes by queries: transformers' over a backbone of timm."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Features

STRIDES = (4, 8, 16, 32)


class Encoder(Features):
    """A backbone in the form that transformers asks for."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, STRIDES, **options)
        self.channels: list[int] = self.body.feature_info.channels()

    def forward(self, images: Tensor) -> Any:
        """Return the maps, the finest first."""
        return SimpleNamespace(feature_maps=self.maps(images))


class Mask2Former(nn.Module):
    """Mask2Former (Cheng et al., 2022, arXiv 2112.01527) for semantic segmentation.

    Pixels without a class belong to no region, so they teach masks where not to be, as in the authors' code.

    Args:
        backbone: With features of strides 4 to 32.
        num_classes: Number of classes.
        width: Of both decoders, a multiple of 32.
        queries: Regions that are looked for in an image.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ModuleNotFoundError: If transformers is missing.
        ValueError: If the width does not fit, or the backbone lacks features.
    """

    def __init__(self, backbone: Backbone, num_classes: int, width: int, queries: int, **options: Any) -> None:
        import transformers

        if width % 32:
            raise ValueError(f"got channels {width}, expected a multiple of 32: mask2former normalises them in 32 groups")
        super().__init__()
        self.num_classes = num_classes
        encoder = Encoder(backbone, **options)
        library: Any = transformers  # whose configurations have no types
        # A stand-in with as many channels: transformers initialises what it makes, and ours keeps its weights.
        stand_in = library.ResNetConfig(
            embedding_size=8, hidden_sizes=encoder.channels, depths=[1] * 4, layer_type="basic", out_indices=[1, 2, 3, 4]
        )
        config = library.Mask2FormerConfig(
            backbone_config=stand_in,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            num_queries=queries,
            num_labels=num_classes,
        )
        verbosity = library.logging.get_verbosity()
        library.logging.set_verbosity_error()  # it would say that only Swin is supported
        try:
            self.segmenter: Any = library.Mask2FormerForUniversalSegmentation(config)
        finally:
            library.logging.set_verbosity(verbosity)
        self.segmenter.model.pixel_level_module.encoder = encoder

    @property
    def encoder(self) -> Encoder:
        """What gives the maps; its `body` is timm's model."""
        encoder: Encoder = self.segmenter.model.pixel_level_module.encoder
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Return for images (B, C, H, W) the logarithm of each class's score (B, num_classes, H, W)."""
        output = self.segmenter(images)
        classes = output.class_queries_logits.float().softmax(dim=2)[..., : self.num_classes]  # without "no region"
        masks = F.interpolate(output.masks_queries_logits.float(), images.shape[-2:], mode="bilinear").sigmoid()
        return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp(min=1e-6).log()

    def loss(self, images: Tensor, labels: Tensor, ignore: int) -> Tensor:
        """Return the sum of the losses of regions, classes and all layers of the decoder.

        Args:
            images: (B, C, H, W).
            labels: Of their pixels (B, H, W).
            ignore: The label of pixels without a class.
        """
        classes = [present[present != ignore] for present in map(torch.unique, labels)]
        masks = [(one == present[:, None, None]).float() for one, present in zip(labels, classes, strict=True)]
        loss: Tensor = self.segmenter(images, mask_labels=masks, class_labels=classes).loss
        return loss.sum()  # of one element
