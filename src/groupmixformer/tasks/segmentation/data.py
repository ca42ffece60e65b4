"""Data sets with a class for every pixel: found, checked before training, turned into samples."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.images import IMAGE_SUFFIXES, read_image
from ...data.samples import Samples
from ...visual.drawing import palette

IGNORE = 255  # label of pixels that do not count
ADE20K = {"train": "training", "val": "validation"}  # its names of the splits


def _ade20k_classes(folder: Path) -> list[str]:
    """Read the 150 names from the file that comes with the data, objectInfo150.txt; numbers where it is missing."""
    listed = folder / "objectInfo150.txt"
    if not listed.is_file():
        return [str(number) for number in range(1, 151)]
    rows = [line.split("\t") for line in listed.read_text().splitlines()[1:] if line.strip()]
    return [row[-1].split(",")[0].strip() for row in rows]


def _classes(path: Path) -> tuple[list[str], list[int], list[list[int]], int | None]:
    """Read names, ids and colours of the classes, and the label to ignore."""
    try:
        content = json.loads(path.read_bytes())
        classes = content["classes"]
        names, ids = [str(c["name"]) for c in classes], [c["id"] for c in classes]
        ignore = content.get("ignore_index")
        colors = [c.get("color") or palette(len(classes))[i] for i, c in enumerate(classes)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: expected {{"classes": [{{"id": 0, "name": ...}}, ...], "ignore_index": 255}}') from error
    if not 0 < len(names) < 256 or len(set(ids)) < len(ids) or not all(map(_is_byte, ids)) or ignore in ids:
        raise ValueError(f"{path}: expected 1 to 255 classes, each with an id of its own from 0 to 255, not the one to ignore")
    if ignore is not None and not _is_byte(ignore):
        raise ValueError(f"{path}: got ignore_index {ignore!r}, expected a number from 0 to 255, or none")
    for name, color in zip(names, colors, strict=True):
        if not isinstance(color, list) or len(color) != 3 or not all(map(_is_byte, color)):
            raise ValueError(f"{path}: got color {color!r} for {name}, expected red, green and blue from 0 to 255")
    return names, ids, colors, ignore


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _problem_of_pair(image: Path, mask: Path) -> str:
    """Return what is wrong with an image and its mask, by their heads alone, or nothing."""
    sizes = []
    for path in (image, mask):
        try:
            with Image.open(path) as opened:
                sizes.append(opened.size)
                mode = opened.mode
        except FileNotFoundError:
            return f"{image}: has no mask {path}" if path == mask else f"{path}: no such file"
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return f"{path}: not a readable image"
    if sizes[0] != sizes[1]:
        return f"{mask}: is {sizes[1][0]} x {sizes[1][1]} pixels and its image {sizes[0][0]} x {sizes[0][1]}"
    return "" if mode in ("L", "P", "1") else f"{mask}: is of mode {mode}, expected one channel of class numbers"


class SemanticImages(Samples):
    """The images of one split with the class of each pixel.

    Training samples are (image (3, H, W), labels (H, W), problem), augmented together; evaluation samples are (image
    (3, h, w), labels (H, W) in the size of the file, problem), and a blank has labels of (0, 0). Labels count from 0; `IGNORE`
    marks pixels that do not count.

    Args:
        folder: Holds images/SPLIT, masks/SPLIT and classes.json; or images/training, annotations/training and so on as ADE20K,
            of which class 0 is ignored.
        split: train, val or another.
        transform: From (image, labels) to the two augmented; none for evaluation.
        prepare: From an image to the tensor that a model takes; for evaluation.
        seed: Of the augmentation.

    Attributes:
        class_names: Names of the classes, in the order of their labels.
        class_ids: Their numbers in the mask files.
        colors: Their colours for display.
        names: The image files.
        skipped: A line for each image that is left out: without a mask, unreadable, or of another size than its mask.

    Raises:
        ValueError: If there is no such data set.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        prepare: Callable[[Image.Image], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        folder = Path(folder)
        self.transform, self.prepare, self.seed = transform, prepare, seed
        ignore: int | None
        if (folder / "classes.json").is_file():
            self.class_names, self.class_ids, self.colors, ignore = _classes(folder / "classes.json")
            images, masks = folder / "images" / split, folder / "masks" / split
        elif (folder / "annotations" / "training").is_dir():
            self.class_names = _ade20k_classes(folder)
            self.class_ids, ignore = list(range(1, len(self.class_names) + 1)), 0
            self.colors = palette(len(self.class_names))
            split = ADE20K.get(split, split)
            images, masks = folder / "images" / split, folder / "annotations" / split
        else:
            raise ValueError(
                f"{folder}: expected classes.json, images/ and masks/, or ADE20K's images/training and annotations/training"
            )
        for place in (images, masks):
            if not place.is_dir():
                raise ValueError(f"{place}: no such folder, expected images in {images} and masks in {masks}")
        files = sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{images}: holds no images")
        pairs = [(file, masks / f"{file.stem}.png") for file in files]
        with ThreadPoolExecutor(8) as pool:
            problems = list(pool.map(lambda pair: _problem_of_pair(*pair), pairs))
        self.skipped = [problem for problem in problems if problem]
        usable = [pair for pair, problem in zip(pairs, problems, strict=True) if not problem]
        if not usable:
            raise ValueError(f"{images}: none of its {len(files)} images can be used: {self.skipped[0]}")
        self.names, self.masks = [str(image) for image, _ in usable], [str(mask) for _, mask in usable]
        self._labels = np.full(256, -1, dtype=np.int16)  # of each number in a mask file; -1 for those that mean nothing
        if ignore is not None:
            self._labels[ignore] = IGNORE
        self._labels[self.class_ids] = np.arange(len(self.class_ids))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return an image and its labels (H, W), uint8.

        Raises:
            ValueError: If one of them cannot be read, or a label is of no class.
        """
        image = read_image(Path(self.names[index]))
        try:
            with Image.open(self.masks[index]) as mask:
                numbers = np.asarray(mask).astype(np.uint8)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.masks[index]}: not a readable mask: {error}") from error
        labels = self._labels[numbers]
        if labels.min() < 0:
            unknown = int(numbers[labels < 0][0])
            raise ValueError(f"{self.masks[index]}: holds the number {unknown}, which is of no class")
        return image, torch.from_numpy(labels.astype(np.uint8))

    def for_training(self, content: tuple[Image.Image, Tensor]) -> tuple[Tensor, Tensor]:
        """Augment an image and its labels together."""
        assert self.transform is not None
        return self.transform(content[0], tv_tensors.Mask(content[1]))

    def for_evaluation(self, content: tuple[Image.Image, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Give the image as the model takes it, and its labels."""
        assert self.prepare is not None
        if content is None:
            return torch.zeros(3, 32, 32), torch.zeros(0, 0, dtype=torch.int64)
        return self.prepare(content[0]), content[1].long()


def segmentation_transform(
    image_size: int,
    scale: tuple[float, float],
    hflip: float,
    photometric: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """From an image and its labels to squares: resized, cut out or filled up, flipped, recoloured, normalised."""
    sides = range(max(1, round(scale[0] * image_size)), round(scale[1] * image_size) + 1)
    grey = [255 * value for value in mean]
    steps: list[Any] = [
        v2.ToImage(),
        v2.RandomShortestSize(list(sides), antialias=True),
        v2.RandomCrop(image_size, pad_if_needed=True, fill={tv_tensors.Image: grey, tv_tensors.Mask: IGNORE}),
        v2.RandomHorizontalFlip(hflip),
    ]
    if photometric:  # each half of the time, as is customary; torchvision's own version also exchanges channels
        changes = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
        steps += [v2.RandomApply([v2.ColorJitter(**change)], p=0.5) for change in changes]
    types = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    return v2.Compose([*steps, v2.ToDtype(types, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()])


def collate_segmentation(samples: Sequence[tuple[Any, ...]]) -> tuple[Any, Any, list[str]]:
    """Make a batch: squares stacked for training, lists for evaluation, where sizes differ; and the problems there were."""
    images, labels, problems = zip(*samples, strict=True)
    lines = [line for problem in problems for line in problem.splitlines()]
    if all(image.shape[1:] == mask.shape == labels[0].shape for image, mask in zip(images, labels, strict=True)):
        return torch.stack(images), torch.stack(labels), lines
    return list(images), list(labels), lines
