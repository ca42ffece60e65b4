"""Images without labels: found in any nesting, cropped into views or masked."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import default_collate

from ...data.channels import AnyImage
from ...data.images import describe_left_out, list_images
from ...data.samples import Samples
from ...data.seeding import seed_all
from ...data.split import TRAIN, VAL, Splitter
from ...training.recipe import Recipe

HELD_OUT = ("val", "valid", "validation", "test")  # folders beside train/
SHARE, MOST = 20, 1000  # without such a folder one of so many images is held out, but no more than these


def draw_mask(side: int, share: float) -> Tensor:
    """Draw which of a square of patches are masked: their share, rounded, but neither none nor all.

    Returns:
        Booleans (side, side), true for masked ones, by PyTorch's global generator.
    """
    patches = side * side
    mask = torch.zeros(patches, dtype=torch.bool)
    mask[torch.randperm(patches)[: min(max(round(share * patches), 1), patches - 1)]] = True
    return mask.view(side, side)


class UnlabelledImages(Samples):
    """Images without labels.

    A training sample is an image (C, S, S) and its mask (S/P, S/P), or a list of views; one for evaluation an image, its mask,
    which is the same in every epoch, and whether it counts.

    Args:
        paths: Of the images.
        recipe: Its settings of pre-training and size of images.
        config: Mean, std and interpolation of the pixels.
    """

    class_names: list[str] = []  # noqa: RUF012 - never changed

    def __init__(self, paths: Sequence[Path], recipe: Recipe, config: dict[str, Any], notes: Sequence[str] = ()) -> None:
        self.paths, self.seed, self.notes, self.settings = list(paths), recipe.seed, notes, recipe.pretrain
        self.channels = recipe.channels
        self.side = recipe.image_size // self.settings.mask_patch
        common = {"input_size": (recipe.in_chans, recipe.image_size, recipe.image_size), **config}
        self.transform: Callable[[Any], Tensor] = create_transform(**common)
        self.views = self.augment = None
        if self.settings.method == "dino":
            self.views = _views(recipe, config)
        else:
            scale, hflip = self.settings.scale or (0.67, 1.0), self.settings.hflip
            self.augment = create_transform(**common, is_training=True, scale=scale, hflip=hflip, color_jitter=0.0)

    def __len__(self) -> int:
        return len(self.paths)

    def files(self) -> list[Path]:
        """Return the image files."""
        return self.paths

    def check(self, name: str, limit: float) -> list[str]:
        """Return what is said of the data."""
        lines = super().check(name, limit)
        self.summary = f"{len(self):,} images without labels"
        return lines

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Any, ...]:
        if isinstance(key, int):
            seed_all(self.seed, key + 1)  # of its mask
        return super().__getitem__(key)

    def read(self, index: int) -> tuple[AnyImage]:
        """Return an image.

        Raises:
            ValueError: If it cannot be read.
        """
        image = self.channels.read(self.paths[index])
        if self.views and not isinstance(image, Image.Image):
            raise ValueError(f"{self.paths[index]}: dino changes colours, and takes no arrays: take --pretrain.method simmim")
        return (image,)

    def _mask(self) -> Tensor:
        return draw_mask(self.side, self.settings.mask_share) if self.settings.method == "simmim" else torch.zeros(0)

    def for_training(self, content: tuple[AnyImage]) -> tuple[Any]:
        """Return an augmented image and its mask, or its views."""
        if self.views:
            return (self.views(content[0]),)
        assert self.augment is not None
        return ([self.augment(_taken(content[0])), self._mask()],)

    def for_evaluation(self, content: tuple[AnyImage] | None) -> tuple[Tensor, Tensor, bool]:
        """Return an image, its mask and whether it counts."""
        image = self.channels.blank() if content is None else content[0]
        return self.transform(_taken(image)), self._mask(), content is not None


def _taken(image: AnyImage) -> Image.Image | Tensor:
    """Return what timm's transforms take."""
    return image if isinstance(image, Image.Image) else image.tensor


def _views(recipe: Recipe, config: dict[str, Any]) -> Callable[[Any], Any]:
    """Return what makes two large and some small views of an image: lightly's, as the paper describes them."""
    from lightly.transforms.dino_transform import DINOTransform

    settings = recipe.pretrain
    return DINOTransform(
        global_crop_size=recipe.image_size,
        global_crop_scale=settings.scale or (0.4, 1.0),
        local_crop_size=settings.local_size,
        local_crop_scale=settings.local_scale,
        n_local_views=settings.local_crops,
        hf_prob=settings.hflip,
        normalize={name: list(config[name]) for name in ("mean", "std")},
    )


def collate_unlabelled(samples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Make a batch of samples, with a problem for each unreadable image."""
    *parts, problems = zip(*samples, strict=True)
    return *(default_collate(list(part)) for part in parts), [line for text in problems for line in text.splitlines()]


def find_images(recipe: Recipe, splitter: Splitter | None) -> tuple[list[Path], list[Path], list[str]]:
    """Find the images to train on and those that are held out, and what is said of them.

    The latter are those of val/, valid/, validation/ or test/ beside train/; or the share that the recipe names; or else one of
    twenty. Names of other folders mean nothing.

    Args:
        recipe: Names the folder.
        splitter: Deals the images out, if the recipe says so.

    Raises:
        ValueError: If there is no such folder, or there are too few images in it.
    """
    folder, left_out = Path(recipe.data), Counter[str]()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one with images, in any nesting")
    own = next((folder / name for name in HELD_OUT if (folder / "train").is_dir() and (folder / name).is_dir()), None)
    if own and not splitter:
        parts = [list_images(part, left_out) for part in (folder / "train", own)]
        if not all(parts):
            raise ValueError(f"{own.parent / 'train' if parts[1] else own}: holds no images")
        return *parts, describe_left_out(left_out)  # type: ignore[return-value]
    paths = list_images(folder / "train" if own else folder, left_out)
    notes = describe_left_out(left_out)
    if len(paths) < 2:
        raise ValueError(f"{folder}: holds {len(paths)} images, expected two or more{''.join(f'; {note}' for note in notes)}")
    if splitter:
        names = {Path(os.path.relpath(path, folder)).as_posix(): path for path in paths}
        split = splitter(names, lambda: [[0]] * len(names))
        first, second = ([path for name, path in names.items() if name in split.names(part)] for part in (TRAIN, VAL))
        return first, second, notes
    order = np.random.default_rng(recipe.seed).permutation(len(paths))
    count = min(max(1, len(paths) // SHARE), MOST)
    notes.append(f"{count:,} of {len(paths):,} are held out (--val-share chooses another share)")
    return [paths[i] for i in sorted(order[count:])], [paths[i] for i in sorted(order[:count])], notes
