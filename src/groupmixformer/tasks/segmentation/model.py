"""Semantic segmentation: decoders of segmentation_models_pytorch, and Mask2Former, over a backbone of timm."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2

from ...data.channels import AnyImage, ChannelImage
from ...files import Fields
from ...run_folder import CONFIG, RunFolder
from ..backbone import Backbone, BackboneModel, load_network, take_any_size
from ..predictor import windows

STRIDE = 32  # sides of images are filled up to multiples of it


def _width(decoder: str, channels: int | None) -> dict[str, int]:
    """Name the width of a decoder as the library does."""
    if channels is None:
        return {}
    if decoder == "upernet":
        return {"decoder_channels": channels}
    if decoder == "fpn":
        if channels % 64:
            raise ValueError(f"got channels {channels}, expected a multiple of 64: fpn normalises half of them in 32 groups")
        return {"decoder_pyramid_channels": channels, "decoder_segmentation_channels": channels // 2}
    raise ValueError(f"got channels {channels} for the decoder {decoder}, expected none: only upernet and fpn have one width")


class Segmenter(BackboneModel):
    """A backbone and a decoder: images (B, C, H, W) of any size, normalised, to logits (B, num_classes, H, W).

    In training there is a pair of logits where there is a second head: UPerNet's published setting (Xiao et al., 2018) is a
    small fully convolutional one on the features of stride 16.

    Args:
        backbone: With features of strides 4 to 32.
        num_classes: Number of classes.
        decoder: upernet (Xiao et al., 2018), fpn (Kirillov et al., 2019) or another of segmentation_models_pytorch, or
            mask2former (Cheng et al., 2022), as transformers has it.
        channels: Width of upernet, fpn and mask2former; none for the library's.
        auxiliary: Whether there is a second head; mask2former has losses of its own.
        image_size: Shorter side to which `prepare` resizes images.
        mean: Of the pixels, by channel.
        std: Their standard deviation.
        queries: Regions that mask2former looks for.
        options: Weights of the backbone, and its stochastic depth.

    Raises:
        ModuleNotFoundError: If transformers is missing, for mask2former.
        ValueError: If there is no such decoder, or the backbone does not fit it.
    """

    class_layers = ("segmentation_head.", "auxiliary.4.", "class_predictor", "criterion.")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        decoder: str,
        image_size: int,
        channels: int | None = None,
        auxiliary: bool = True,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        queries: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(backbone)
        self.num_classes, self.image_size = num_classes, image_size
        self.mean, self.std = list(mean), list(std)
        self.by_queries, self.auxiliary = decoder == "mask2former", None
        if self.by_queries:
            from .mask2former import Mask2Former  # transformers takes seconds to import

            self.network: Any = Mask2Former(backbone, num_classes, channels or 256, queries, **options)
            return
        known = [*smp.MODEL_ARCHITECTURES_MAPPING, "mask2former"]
        if decoder not in known:
            near = get_close_matches(decoder, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"no decoder {decoder}, expected one of {', '.join(known)}: the nearest is {near}")
        backbone.indices((4, 8, 16, 32))
        made = backbone.options(**options)
        weights = True if made.pop("pretrained", False) else None
        del made["features_only"]  # the library says that itself
        width = _width(decoder, channels)
        try:
            self.network = smp.create_model(
                decoder,
                f"tu-{backbone.name}",
                encoder_weights=weights,
                in_channels=made.pop("in_chans", 3),
                classes=num_classes,
                **width,
                **made,
            )
            take_any_size(self.features)
            # The second head is on the features of stride 16.
            self.auxiliary = FCNHead(self.network.encoder.out_channels[4], num_classes) if auxiliary else None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the decoder {decoder} does not fit {backbone.name} ({reason}): choose upernet, fpn, unet or segformer"
            ) from error

    @property
    def features(self) -> Any:
        """The features of timm's model."""
        return self.network.encoder.body if self.by_queries else self.network.encoder.model

    def prepare(self, image: AnyImage) -> Tensor:
        """From an image to a tensor (C, h, w), its shorter side resized, normalised."""
        return prepare_image(image, self.image_size, self.mean, self.std)

    def forward(self, images: Tensor) -> Any:
        """Return the logits, in training with those of the second head, if there is one.

        Of mask2former they are the logarithm of each class's score, so that a softmax gives its share.
        """
        height, width = images.shape[-2:]
        padded = _filled(images)
        if self.auxiliary is None or not self.training:
            return self.network(padded)[..., :height, :width]
        features = self.network.encoder(padded)
        logits = self.network.segmentation_head(self.network.decoder(features))
        second = F.interpolate(self.auxiliary(features[4]), padded.shape[-2:], mode="bilinear")
        return logits[..., :height, :width], second[..., :height, :width]

    def loss_by_queries(self, images: Tensor, labels: Tensor, ignore: int) -> Tensor:
        """Return mask2former's loss of images (B, C, H, W) with labels (B, H, W), of which `ignore` has no class."""
        loss: Tensor = self.network.loss(_filled(images), _filled(labels, ignore), ignore)
        return loss


def _filled(maps: Tensor, value: float = 0) -> Tensor:
    """Fill up the sides of maps (..., H, W) to multiples of `STRIDE`."""
    return F.pad(maps, (0, -maps.shape[-1] % STRIDE, 0, -maps.shape[-2] % STRIDE), value=value)


def prepare_image(image: AnyImage, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From an image to a tensor (C, h, w), its shorter side resized to `image_size`, normalised."""
    pixels = image.tensor if isinstance(image, ChannelImage) else v2.functional.pil_to_tensor(image)
    pixels = v2.functional.resize(pixels, [image_size], antialias=True)
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), list(mean), list(std))


def _logits(model: Segmenter, image: Tensor, window: int | None) -> Tensor:
    """Return logits (1, K, h, w) of an image (1, C, h, w), whole or averaged over windows."""
    height, width = image.shape[-2:]
    if window is None or (height <= window and width <= window):
        return model(image)
    summed = image.new_zeros(1, model.num_classes, height, width, dtype=torch.float32)
    count = image.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in windows(height, window):
        for left in windows(width, window):
            part = (..., slice(top, top + window), slice(left, left + window))
            summed[part] += model(image[part])
            count[part] += 1
    return summed / count


@torch.no_grad()
def segment(
    model: Segmenter,
    image: Tensor,
    size: tuple[int, int],
    sliding_window: bool = False,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Return the probabilities of the classes for each pixel of one image.

    Args:
        model: In eval mode.
        image: As `Segmenter.prepare` gives it (C, h, w), on the model's device.
        size: Height and width of the result, usually the image's own.
        sliding_window: Look through square windows of the training size, which overlap by a third, not at the whole image.
        scales: Factors by which the image is resized; the probabilities are averaged.
        flip: Average with the mirrored image.

    Returns:
        Probabilities (K, H, W), float32.
    """
    summed = None
    for scale in scales:
        sides = [max(1, round(side * scale)) for side in image.shape[-2:]]
        scaled = image[None]
        if scale != 1:
            scaled = F.interpolate(scaled, sides, mode="bilinear", antialias=True)
        for mirrored in (False, True) if flip else (False,):
            logits = _logits(model, scaled.flip(3) if mirrored else scaled, model.image_size if sliding_window else None)
            logits = logits.flip(3) if mirrored else logits
            probabilities = F.interpolate(logits.float(), size, mode="bilinear").softmax(dim=1)[0]
            summed = probabilities if summed is None else summed + probabilities
    assert summed is not None
    return summed / (len(scales) * (1 + flip))


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def load_segmenter(folder: str | Path | RunFolder) -> tuple[Segmenter, dict[str, Any]]:
    """Load the segmenter of a run.

    Returns:
        The segmenter in eval mode, and what is stored with it: class_names, class_ids and colors, in the order of the labels.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds something else or is damaged.
    """
    run = RunFolder.of(folder)
    model, config = load_network(run, "segmentation", Segmenter)
    fields, classes = Fields(config, str(run.path / CONFIG)), len(config["class_names"])
    fields.integers("class_ids", classes, 0, 255)
    if len(fields.items("colors")) != classes or not all(_is_color(color) for color in config["colors"]):
        raise ValueError(f"{fields.where}: colors are {config['colors']}, expected red, green and blue of {classes} classes")
    return model, config
