"""Beyond accuracy: how runs bear corruptions, shifts and other sizes; how alike heads and how faithful maps are."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.coat import FactorAttnConvRelPosEnc
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as images

from ..files import read_json, to_json, write_file
from ..models.groupmixformer import GroupMixAttention
from ..training.recipe import Recipe
from .compare import open_last
from .faithfulness import faithfulness

BEYOND = "beyond.json"
MOST = 500  # held-out images that are looked at, evenly spaced
BATCH = 50
SHIFTS = ((1, 0), (0, 1), (-1, -1), (1, -1))  # in eighths of the side
SIZES = (0.75, 1.25, 1.5, 2.0)  # of the size that the models were trained at


def _brighter(pixels: Tensor, strength: float) -> Tensor:
    return (pixels.float() + 255 * strength).clamp(0, 255).byte()


def _pixelated(pixels: Tensor, share: float) -> Tensor:
    side = pixels.shape[-2:]
    small = images.resize(pixels, [max(1, round(length * share)) for length in side], antialias=True)
    return images.resize(small, list(side), interpolation=images.InterpolationMode.NEAREST)


def _noisy(pixels: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the same noise for every model
    noise = torch.randn(pixels.shape, generator=generator)
    return (pixels + 255 * sigma * noise).clamp(0, 255).byte()


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    sigma *= max(pixels.shape[-1] / 224, 0.4)  # as strong on small images, but never so little that no pixel changes
    return images.gaussian_blur(pixels, [2 * round(3 * sigma) + 1] * 2, [sigma] * 2)


def _compressed(pixels: Tensor, quality: int) -> Tensor:
    found = []
    for image in pixels:
        file = BytesIO()
        images.to_pil_image(image).save(file, "JPEG", quality=quality)
        found.append(images.pil_to_tensor(Image.open(file)))
    return torch.stack(found)


# Strengths of the levels 1 to 5: those of ImageNet-C (arXiv 1903.12261). Brightness is added to all channels, not to HSV's V.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Any], Tensor], Sequence[float]]] = {
    "noise": (_noisy, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": (_blurred, (1, 2, 3, 4, 6)),
    "brightness": (_brighter, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (images.adjust_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelated, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_compressed, (25, 18, 15, 10, 7)),
}


def _pixels(transform: Any, image: Image.Image) -> Tensor:
    """Return an image resized and cropped as for the model, in 8 bits (3, H, W)."""
    if not isinstance(image, Image.Image):
        raise ValueError("got images of other channels, expected colours: corruptions and shifts are for them alone")
    for step in transform.transforms:
        made = step(image)
        if not isinstance(made, Image.Image):
            break
        image = made
    return images.pil_to_tensor(image)


def _samples(data: Any) -> list[tuple[Image.Image, int]]:
    """Return images and classes of a held-out set, evenly spaced; without those that cannot be read."""
    if not hasattr(data, "read"):
        raise ValueError("got a data set that is a stream, expected one whose images are read by their number")
    found = []
    for index in torch.linspace(0, len(data) - 1, min(MOST, len(data))).round().int().tolist():
        try:
            found.append(data.read(index))
        except ValueError:  # named when the run was evaluated
            continue
    return found


class _Looker:
    """A trained classifier and held-out images."""

    def __init__(self, run: Recipe, size: int | None = None) -> None:
        self.predictor = open_last(run, size)
        samples = _samples(self.predictor.open_data(run.data, root=run.root))
        self.pixels = torch.stack([_pixels(self.predictor.transform, image) for image, _ in samples])
        self.classes = torch.tensor([label for _, label in samples])

    def predicted(self, change: Callable[..., Tensor] | None = None, *arguments: Any) -> Tensor:
        """Return the class that is found for each image (N), which ``change(pixels, *arguments)`` changes first."""
        found = []
        for pixels in self.pixels.split(BATCH):
            changed = change(pixels, *arguments) if change else pixels
            found.append(self.predictor.probabilities(self.normalised(changed)).argmax(1))
        return torch.cat(found)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return what the model takes."""
        mean, std = (torch.tensor(self.predictor.config[name])[:, None, None] for name in ("mean", "std"))
        return (pixels.float() / 255 - mean) / std

    def top1(self, change: Callable[..., Tensor] | None = None, *arguments: Any) -> float:
        """Return the share of images that are classified rightly."""
        return (self.predicted(change, *arguments) == self.classes).double().mean().item()


def _robustness(run: Recipe) -> dict[str, float]:
    """Return corrupted_top1, the mean over corruptions and levels, and what it is of: the top-1 of each."""
    looker = _Looker(run)
    found = {
        f"top1_{name}_{level}": looker.top1(apply, strength)
        for name, (apply, strengths) in CORRUPTIONS.items()
        for level, strength in enumerate(strengths, 1)
    }
    return {"corrupted_top1": sum(found.values()) / len(found), **found}


def _shift(run: Recipe) -> dict[str, float]:
    """Return shift_consistency: the share of images, shifted by an eighth of their side, that keep their class."""
    looker, eighth = _Looker(run), max(1, run.image_size // 8)

    def shifted(pixels: Tensor, down: int, right: int) -> Tensor:
        wide = F.pad(pixels.float(), [eighth] * 4, mode="reflect")
        rows, columns = eighth * (1 - down), eighth * (1 - right)
        return wide[..., rows : rows + pixels.shape[-2], columns : columns + pixels.shape[-1]]

    before = looker.predicted()
    same = [(looker.predicted(shifted, *shift) == before).double().mean() for shift in SHIFTS]
    return {"shift_consistency": torch.stack(same).mean().item()}


def _resolution(run: Recipe) -> dict[str, float | None]:
    """Return top1_at_SIZE: of images prepared at other sizes; none where the model is made for one size."""
    found: dict[str, float | None] = {}
    for size in sorted({max(32, round(run.image_size * factor / 16) * 16) for factor in SIZES}):
        try:
            found[f"top1_at_{size}"] = _Looker(run, size).top1()
        except (AssertionError, RuntimeError):
            found[f"top1_at_{size}"] = None
    return found


def cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment (arXiv 1905.00414) of two features of the same tokens (N, E), 0 to 1."""
    x, y = x - x.mean(0), y - y.mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).square().sum() / scale) if scale > 0 else 0.0


def head_features(network: nn.Module, batch: Tensor) -> list[Tensor]:
    """Return what the heads of Group-Mix Attention, and of the control without groups, give to the projection.

    Args:
        network: In eval mode.
        batch: Images (B, 3, H, W).

    Returns:
        For each attention, by heads and tokens: (8, B * N, E). None of other mixers.
    """
    found: list[Tensor] = []

    def widths(attention: Any) -> tuple[int, int]:
        ours = isinstance(attention, GroupMixAttention)
        return (8, attention.head_dim) if ours else (attention.num_heads, attention.proj.in_features // attention.num_heads)

    def hook(heads: int, width: int) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor]) -> None:
            found.append(inputs[0].flatten(0, 1)[:, : heads * width].unflatten(1, (heads, width)).transpose(0, 1))

        return keep

    attentions: list[Any] = [m for m in network.modules() if isinstance(m, GroupMixAttention | FactorAttnConvRelPosEnc)]
    hooks = [attention.proj.register_forward_pre_hook(hook(*widths(attention))) for attention in attentions]
    with torch.inference_mode():
        network(batch)
    for handle in hooks:
        handle.remove()
    return found


def _heads(run: Recipe) -> dict[str, float | None]:
    """Return head_similarity: CKA between the heads of an attention, over their pairs and blocks; and within and between sizes.

    Heads come in pairs of the same group size. Without groups the pairs are arbitrary, which makes them the control.
    """
    looker = _Looker(run)
    batch = looker.normalised(looker.pixels[:BATCH])
    pairs: dict[str, list[float]] = {"head_similarity": [], "head_similarity_within": [], "head_similarity_between": []}
    for heads in head_features(looker.predictor.model, batch.to(looker.predictor.device)):
        for i, j in combinations(range(len(heads)), 2):
            value = cka(heads[i].double(), heads[j].double())
            pairs["head_similarity"].append(value)
            pairs["head_similarity_within" if i // 2 == j // 2 else "head_similarity_between"].append(value)
    return {name: sum(values) / len(values) if values else None for name, values in pairs.items()}


def _faithfulness(run: Recipe) -> dict[str, float]:
    """Return deletion, insertion and randomised by map, of a hundred images; see `groupmixformer.bench.faithfulness`."""
    looker = _Looker(run)
    parts = [looker.normalised(pixels) for pixels in looker.pixels[:: max(1, len(looker.pixels) // 100)].split(BATCH)]
    torch.manual_seed(0)  # of the random weights
    found = [faithfulness(looker.predictor.model, looker.predictor.probabilities, part) for part in parts]
    shares = [len(part) / sum(map(len, parts)) for part in parts]
    return {name: sum(share * one[name] for share, one in zip(shares, found, strict=True)) for name in found[0]}


MEASURES: dict[str, Callable[[Recipe], Mapping[str, float | None]]] = {
    "robustness": _robustness,
    "shift": _shift,
    "resolution": _resolution,
    "heads": _heads,
    "faithfulness": _faithfulness,
}


def measure_beyond(run: Recipe, wanted: Sequence[str]) -> None:
    """Measure the weights of the last epoch in further ways, each once, and write them beside the run.

    Args:
        run: Is done.
        wanted: Of `MEASURES`.

    Raises:
        ValueError: If the data is a stream.
    """
    found = read_beyond(run)
    for name in wanted:
        if name not in found:
            found[name] = dict(MEASURES[name](run))
            write_file(Path(run.out) / BEYOND, to_json(found, indent=2))


def read_beyond(run: Recipe) -> dict[str, dict[str, float | None]]:
    """Return what was measured of a run, by the names of `MEASURES`."""
    path = Path(run.out) / BEYOND
    found: dict[str, dict[str, float | None]] = read_json(path) if path.is_file() else {}
    return found
