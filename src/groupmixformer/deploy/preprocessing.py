"""A classifier that takes an image as a file holds it: resizing, cropping, colours, probabilities are in the exported file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..data.channels import AnyImage, in_colour
from .export import SIZES, Exported

FILTERS = {"bilinear": 1.0, "bicubic": 2.0}  # half their width, in pixels of the smaller image
# Of a probability, against `gmf predict`: Pillow rounds to whole levels after each of two passes, the file does not round.
ROUNDING = 0.02


def _weigh(distance: Tensor, interpolation: str) -> Tensor:
    """Return the weight of pixels at a distance from the middle of one, by Pillow's filters."""
    x = distance.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


class WithPreprocessing(Exported):
    """What a file holds: an image (height, width, 3), uint8, RGB, of any size, to the probabilities of its classes (classes).

    It is resized with Pillow's filter, as products with two matrices, of which only the rows that the crop leaves are made.

    Args:
        network: A classifier for images of three channels, normalised.
        config: timm's: input_size, crop_pct, crop_mode, interpolation, mean and std.
        several: Whether an image may have several classes, whose probabilities are then sigmoids in place of a softmax.

    Raises:
        ValueError: If the images are prepared in a way that the file does not know.
    """

    free = {0: "height", 1: "width"}  # noqa: RUF012 - never changed
    input_name = "image"
    layout = "image: uint8, (height, width, 3), RGB"
    mean: Tensor
    std: Tensor

    def __init__(self, network: torch.nn.Module, config: Mapping[str, Any], several: bool = False) -> None:
        super().__init__(network)
        self.several = several
        channels, *size = config["input_size"]
        self.interpolation, self.mode = config["interpolation"], config["crop_mode"]
        known = channels == 3 and self.interpolation in FILTERS and self.mode in ("center", "squash")
        if not known or config["crop_pct"] > 1:
            raise ValueError(
                f"got {channels} channels, {self.interpolation}, crop_mode {self.mode} and crop_pct {config['crop_pct']}, "
                f"expected 3 channels, {' or '.join(FILTERS)}, center or squash, and at most 1: export without preprocessing"
            )
        self.size = (size[0], size[1])
        self.scaled = [int(side / config["crop_pct"]) for side in size]  # as timm rounds
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def _rows(self, length: Tensor, positions: Tensor, scaled: Tensor, size: int) -> Tensor:
        """Return the matrix (size, length) that resizes a side to `scaled` pixels and crops the middle."""
        ratio = length / scaled
        first = torch.round((scaled - size) / 2)
        middle = (torch.arange(size, device=positions.device) + first + 0.5) * ratio
        stretch = ratio.clamp(min=1)
        weights = _weigh((positions + 0.5 - middle[:, None]) / stretch, self.interpolation)
        return weights / weights.sum(dim=1, keepdim=True)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (classes)."""
        pixels = image.permute(2, 0, 1).float()  # (3, H, W)
        rows, columns = (torch.arange(side, device=image.device, dtype=torch.float32) for side in pixels.shape[1:])
        height, width = rows[-1:] + 1, columns[-1:] + 1  # as tensors, so that an exported graph holds for any size
        if self.mode == "squash":
            scaled = [torch.full_like(height, side) for side in self.scaled]
        else:  # the shorter side gets its length
            shorter = torch.minimum(height, width)
            scaled = [torch.floor(self.scaled[0] * side / shorter) for side in (height, width)]
        down = self._rows(height, rows, scaled[0], self.size[0])
        right = self._rows(width, columns, scaled[1], self.size[1])
        pixels = (down @ (pixels @ right.T).clamp(0, 255)).clamp(0, 255) / 255
        logits = self.network(((pixels - self.mean) / self.std)[None])[0]
        return (logits.sigmoid() if self.several else logits.softmax(dim=0),)

    def samples(self, image: AnyImage, size: tuple[int, int], about: Mapping[str, Any]) -> list[Tensor]:
        """Return an image and a random one."""
        height, width = size
        return [
            F.resize(F.pil_to_tensor(in_colour(image)), [height, width]).permute(1, 2, 0).contiguous(),
            torch.randint(0, 256, (height, width, 3), dtype=torch.uint8),
        ]

    def sizes(self, input_size: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Return sizes of images that are enlarged, kept and reduced."""
        return list(dict.fromkeys([self.size, *SIZES[1:], (480, 333)]))


@torch.no_grad()
def compare(network: WithPreprocessing, image: AnyImage, expected: Tensor) -> float:
    """Compare with the probabilities that `gmf predict` gives for an image (classes), and return the largest difference.

    Raises:
        ValueError: If it is larger than what rounding explains.
    """
    found = network(F.pil_to_tensor(in_colour(image)).permute(1, 2, 0))[0]
    difference = (found - expected).abs().max().item()
    if not difference <= ROUNDING:
        raise ValueError(
            f"probabilities differ from those of gmf predict by {difference:.2g}, expected {ROUNDING} at most: export without "
            "preprocessing, and prepare images as the metadata says"
        )
    return difference
