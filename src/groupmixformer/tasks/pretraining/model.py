"""What is trained without labels: a backbone of timm under the head of a method."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ...models.checkpoint import LABEL_FIELDS, fixed_size, load_model, model_name, remade
from ...models.mixers.replace import create_model
from ...training.recipe import PretrainSettings, Recipe


def create_backbone(recipe: Recipe) -> Any:
    """Create the recipe's model of timm without a classifier; from a checkpoint, with its architecture and weights.

    Raises:
        ValueError: If there is no such model or checkpoint, or it has no feature maps.
    """
    if recipe.checkpoint:
        if recipe.model_options:
            raise ValueError("got model_options and a checkpoint, expected one of them: a checkpoint has its own architecture")
        source = load_model(recipe.checkpoint)
        if hasattr(source, "adapter"):
            raise ValueError(f"{recipe.checkpoint}: has AdaptFormer's layers, which cannot be merged: begin from its base")
        source.reset_classifier(0)
        unneeded = ("label_names", *LABEL_FIELDS)
        source.pretrained_cfg = {name: value for name, value in source.pretrained_cfg.items() if name not in unneeded}
        return remade(source, recipe.image_size, num_classes=0, drop_path_rate=recipe.drop_path_rate, in_chans=recipe.in_chans)
    name, options = model_name(recipe.model), recipe.model_options
    settings = {"num_classes": 0, "drop_path_rate": recipe.drop_path_rate, **fixed_size(name, recipe.image_size)}
    settings["in_chans"] = recipe.in_chans
    try:
        model = create_model(name, **settings, **options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with model_options {options}: {error}") from error
    model.model_options = options
    return model


def _freeze_unused(network: nn.Module, *inputs: Tensor) -> None:
    """Take out of the training what no gradient reaches, such as norms before a classifier: DDP would wait for them."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    gradients = torch.autograd.grad(network(*inputs).sum(), parameters, allow_unused=True)
    network.train()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


class Pretrained(nn.Module):
    """A backbone under a head.

    Args:
        backbone: Of timm, without a classifier.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)


class MaskedImageModel(Pretrained):
    """Fills in masked parts of images: SimMIM (Xie et al., 2022, arXiv 2111.09886) for networks that begin with convolutions.

    SimMIM puts a learnt token in the place of the patch embeddings of masked patches. Convolutions with overlapping windows
    would mix masked pixels into the embeddings beside them, so here it is the pixels of the patches that a learnt colour takes
    the place of: nothing of them reaches the network, whatever its stem is. As in SimMIM, one linear layer predicts from each
    position of the last map, after its norm, the normalised pixels that it covers, and the loss is L1.

    Args:
        backbone: Of timm, without a classifier.
        image_size: Side of the images in pixels.
        patch: Side of the patches that are masked together, of which image_size is a multiple.
        in_chans: Channels of the images.

    Raises:
        ValueError: If timm gives no feature maps of the backbone.
    """

    def __init__(self, backbone: Any, image_size: int, patch: int, in_chans: int = 3) -> None:
        super().__init__(backbone)
        self.patch = patch
        self.token = nn.Parameter(torch.zeros(1, in_chans, 1, 1))  # in normalised pixels: the mean colour of all images
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"timm gives no feature maps of a {type(backbone).__name__}, expected a model that has them")
        images = torch.zeros(1, in_chans, image_size, image_size)
        backbone.eval()
        with torch.no_grad():
            channels, height = self._last_map(images).shape[1:3]
        stride = -(-image_size // height)
        self.head = nn.Sequential(nn.Conv2d(channels, in_chans * stride**2, 1), nn.PixelShuffle(stride))
        mask = torch.eye(image_size // patch, dtype=torch.bool)[None]
        _freeze_unused(self, images, mask)

    def _last_map(self, images: Tensor) -> Tensor:
        maps: Tensor = self.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
        return maps

    def hide(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return images (B, C, H, W) with the token in the patches that a mask (B, H/P, W/P) covers."""
        return torch.where(self.of_pixels(mask), self.token.to(images.dtype), images)

    def of_pixels(self, mask: Tensor) -> Tensor:
        """Return a mask of patches (B, H/P, W/P) as one of pixels (B, 1, H, W)."""
        return mask[:, None].repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return all pixels (B, C, H, W) as they are predicted from those that are not masked."""
        predicted: Tensor = self.head(self._last_map(self.hide(images, mask)))
        return predicted[..., : images.shape[2], : images.shape[3]]

    def losses(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the mean absolute error of the masked pixels of each image (B)."""
        hidden = self.of_pixels(mask)
        errors = (self(images, mask).float() - images.float()).abs() * hidden
        return errors.sum(dim=(1, 2, 3)) / (images.shape[1] * hidden.sum(dim=(1, 2, 3)))


class DinoModel(Pretrained):
    """A backbone under the head of DINO (Caron et al., 2021, arXiv 2104.14294), lightly's.

    Args:
        backbone: Of timm, without a classifier.
        image_size: Side of the images in pixels.
        settings: Of the recipe.
    """

    def __init__(self, backbone: Any, image_size: int, settings: PretrainSettings) -> None:
        from lightly.models.modules import DINOProjectionHead

        super().__init__(backbone)
        images = torch.zeros(1, 3, image_size, image_size)
        backbone.eval()
        with torch.no_grad():
            width = backbone(images).shape[1]
            for side in {settings.local_size} if settings.local_crops else ():
                try:
                    backbone(torch.zeros(1, 3, side, side))
                except (AssertionError, RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"a {type(backbone).__name__} made for {image_size} pixels does not take views of local_size {side}: "
                        f"set local_crops to 0, or choose another model ({error})"
                    ) from error
        self.head = DINOProjectionHead(width, 2048, 256, settings.outputs, freeze_last_layer=1)
        _freeze_unused(self, images)

    def forward(self, images: Tensor) -> Tensor:
        """Return what the head gives for images (B, outputs), before the softmax."""
        given: Tensor = self.head(self.backbone(images))
        return given

    def teacher(self, other: "DinoModel") -> "DinoModel":
        """Make `other`, of the same architecture, the teacher: equal, without gradients and stochastic depth."""
        other.load_state_dict(self.state_dict())
        for module in other.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return other.requires_grad_(False)
