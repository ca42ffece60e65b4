"""Data sets with a class for every pixel: found, checked before training, turned into samples."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.annotations import Annotations, as_rle
from ...data.channels import AnyImage, ChannelImage, Channels, in_colour
from ...data.formats import TAKEN_WHOLE, WHOLE, recognise
from ...data.images import describe_left_out, image_sizes
from ...data.objects import READERS
from ...data.samples import Samples, in_threads, size_problem
from ...data.split import TRAIN, Splitter
from ...files import to_json
from ...visual.drawing import draw_segments, palette, to_image
from .masks import Meaning, meaning, pairs

BACKGROUND = "background"  # the class of pixels without a polygon
IGNORE = 255  # label of pixels that do not count
MOST_MASKS = 1000  # looked at before training for which classes are there


def _problem_of_pair(image: Path, mask: Path, by_color: bool | None, channels: Channels) -> str:
    """Return what is wrong with an image and its mask, by their heads alone, or nothing."""
    if not mask.is_file():
        return f"{image}: has no mask {mask}"
    try:
        size, _ = image_sizes(mask)
        with Image.open(mask) as opened:
            mode = opened.mode
    except ValueError as error:
        return str(error)
    if mode not in ("L", "P", "1", *(("RGB", "RGBA") if by_color is not False else ())):
        return f"{mask}: is of mode {mode}, expected one channel of class numbers"
    return size_problem(image, size, f"its mask {mask.name}", channels)


def _read_mask(path: Path, meaning: Meaning) -> NDArray[np.uint8]:
    """Read the numbers (H, W) of a mask, upright; those that its colours stand for, where colours count.

    Raises:
        ValueError: If it cannot be read, or has a colour of no class.
    """
    try:
        with Image.open(path) as mask:
            # Pillow spreads grey of 2 and 4 bits over 0 to 255.
            spread = {"L;2": 85, "L;4": 17}.get(str(mask.tile[0][3]) if mask.tile else "", 1)
            upright = ImageOps.exif_transpose(mask)
            if meaning.by_color or mask.mode in ("RGB", "RGBA"):
                pixels = np.asarray(upright.convert("RGB")).astype(np.int32)
            else:
                return np.asarray(upright).astype(np.uint8) // spread
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable mask: {error}") from error
    codes = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    known, numbers = meaning.codes
    places = known.searchsorted(codes).clip(max=len(known) - 1)
    if (unknown := known[places] != codes).any():
        color = ", ".join(map(str, pixels[unknown][0].tolist()))
        raise ValueError(f"{path}: holds the colour {color}, which is of no class in {meaning.source.name}")
    return numbers[places]


def _draw(record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the labels (H, W) of the objects of an image, the smaller ones over the larger; 0 is the background."""
    from faster_coco_eval.core import mask as rle

    height, width = record["height"], record["width"]
    encoded = [(as_rle(one["segmentation"], height, width), one["label"]) for one in record["objects"]]
    numbers = np.zeros((height, width), dtype=np.uint8)
    for one, label in sorted(encoded, key=lambda pair: -float(rle.area(pair[0]))):
        numbers[rle.decode(one) > 0] = label
    return numbers


class SemanticImages(Samples):
    """The images of one split with the class of each pixel.

    Training samples are (image (C, H, W), labels (H, W), problem), augmented together; evaluation samples are (image
    (C, h, w), labels (H, W) in the size of the file, problem), and a blank has labels of (0, 0). Labels count from 0; `IGNORE`
    marks pixels that do not count.

    Args:
        folder: Holds images with masks or polygons, in any format of `groupmixformer.data.formats` for segmentation; where
            there are polygons, the background is a class.
        split: train, val or another.
        transform: From (image, labels) to the two augmented; none for evaluation.
        prepare: From an image to the tensor that a model takes; for evaluation.
        seed: Of the augmentation.
        or_whole: Whether a data set that is not split is taken whole.
        splitter: Deals out the images of a data set that is not split.
        channels: How images are read.

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
        prepare: Callable[[AnyImage], Tensor] | None = None,
        seed: int = 0,
        or_whole: bool = False,
        splitter: Splitter | None = None,
        channels: Channels | None = None,
    ) -> None:
        found = recognise(folder, "segmentation")
        self.channels = channels or Channels()
        part = found.undivided() if splitter else found.part(split, or_whole)
        self.transform, self.prepare, self.seed = transform, prepare, seed
        self.notes = [TAKEN_WHOLE] if part == WHOLE != split and not splitter else []
        if found.format in READERS:
            self._read_objects(Annotations(found, part, masks=True, channels=self.channels), split, splitter)
            return
        self.meaning = meaning(found)
        self.class_names, self.class_ids, self.colors = self.meaning.names, self.meaning.ids, self.meaning.colors
        left_out: Counter[str] = Counter()
        files = list(pairs(found, part, left_out))
        self.notes = [*self.notes, *describe_left_out(left_out)]
        if not files:
            raise ValueError(f"{found.parts[part][0]}: holds no images")
        problems = in_threads(lambda pair: _problem_of_pair(pair[0], pair[1], self.meaning.by_color, self.channels), files)
        self.skipped = [problem for problem in problems if problem]
        usable = [pair for pair, problem in zip(files, problems, strict=True) if not problem]
        if not usable:
            raise ValueError(f"{found.parts[part][0]}: none of its {len(files)} images can be used: {self.skipped[0]}")
        names = [image.relative_to(found.path).as_posix() for image, _ in usable]
        self._take(names, [(str(image), str(mask)) for image, mask in usable], split, splitter)

    def _read_objects(self, read: Annotations, split: str, splitter: Splitter | None) -> None:
        """Take the polygons and run lengths of objects for masks, over a background."""
        if len(read.class_names) > 254:
            raise ValueError(f"{read.source}: has {len(read.class_names)} categories, expected 254 at most")
        if not any(read.objects.values()):
            reason = f": {read.dropped[0]}" if read.dropped else ""
            raise ValueError(f"{read.source}: holds no object with a polygon or a mask{reason}")
        names = [BACKGROUND, *(name for name in read.class_names if name != BACKGROUND)]
        self.meaning = Meaning(read.source, names, list(range(len(names))), [[0, 0, 0], *palette(len(names) - 1)], [], [])
        self.class_names, self.class_ids, self.colors = self.meaning.names, self.meaning.ids, self.meaning.colors
        self.skipped, self.notes = read.skipped, [*self.notes, *read.notes]
        for one in (one for objects in read.objects.values() for one in objects):
            one["label"] = names.index(read.class_names[one["label"] - 1])
        masks = [to_json({**image, "objects": read.objects[key]}).encode() for key, image in read.images.items()]
        files = [image["file_name"] for image in read.images.values()]
        usable = [(str(read.folder / file), mask) for file, mask in zip(files, masks, strict=True)]
        self._take(files, usable, split, splitter)

    def _take(
        self, names: Sequence[str], usable: Sequence[tuple[str, str | bytes]], split: str, splitter: Splitter | None
    ) -> None:
        """Take images with their masks, those of the split if a splitter deals them out by their names."""
        self._labels = np.full(256, -1, dtype=np.int16)  # of each number in a mask file; -1 for those that mean nothing
        self._labels[self.meaning.ignored] = IGNORE
        self._labels[self.class_ids] = np.arange(len(self.class_ids))
        if splitter:
            by_name = dict(zip(names, (Path(image) for image, _ in usable), strict=True))
            chosen = splitter(by_name, lambda: in_threads(self._classes_in, (mask for _, mask in usable))).names(split)
            usable = [pair for name, pair in zip(names, usable, strict=True) if name in chosen]
            self.skipped = self.skipped if split == TRAIN else []
        self.names, self.masks = [image for image, _ in usable], [mask for _, mask in usable]

    def _classes_in(self, mask: str | bytes) -> list[int]:
        """Return the classes that the mask of an image has pixels of."""
        try:
            labels = np.unique(self._labels[self._numbers(mask)])
        except ValueError:
            return []  # which is told where it is read
        return [label for label in labels.tolist() if label != IGNORE]

    def relabel(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Take the classes of a model: their names, and the place of each class of the data among them."""
        super().relabel(names, places)
        self._labels[self.class_ids] = places

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Count the pixels of each class in masks drawn at random, until every class is found, in `MOST_MASKS` at most."""
        pixels, problems, looked_at = np.zeros(256, dtype=np.int64), [], 0

        def count(index: int) -> NDArray[np.int64] | str:
            try:
                return np.bincount(self._numbers(self.masks[index]).ravel(), minlength=256)
            except ValueError as error:
                return str(error)

        drawn = np.random.default_rng(0).permutation(len(self))[:MOST_MASKS].tolist()
        while drawn and (not looked_at or not pixels[self.class_ids].all()):
            for found in in_threads(count, drawn[:64]):
                if isinstance(found, str):
                    problems.append(found)
                else:
                    pixels += found
            looked_at, drawn = looked_at + len(drawn[:64]), drawn[64:]
        ignored = self.meaning.ignored
        if len(ignored) == 1 and not self.meaning.by_color and pixels[ignored[0]]:
            self.hint = f"; pixels of {ignored[0]} are ignored: if they mark a class, give it this id, and drop ignore_index"
        return pixels[self.class_ids].tolist(), f"pixels in {looked_at:,} of {len(self):,} masks", problems

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> list[Path]:
        """Return the image files."""
        return [Path(name) for name in self.names]

    def drawn(self, index: int) -> Image.Image:
        """Draw the classes over an image."""
        image, labels = self.read(index)
        return draw_segments(in_colour(image), labels, self.class_names, self.colors)

    def drawn_sample(self, sample: tuple[Any, ...]) -> Image.Image:
        """Draw the classes over an augmented image."""
        image = to_image(sample[0], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # which count for colours alone
        return draw_segments(image, sample[1], self.class_names, self.colors)

    def _numbers(self, mask: str | bytes) -> NDArray[np.uint8]:
        """Return the numbers in a mask (H, W); ValueError if it cannot be read, or one is of no class."""
        if isinstance(mask, bytes):
            return _draw(json.loads(mask))
        numbers = _read_mask(Path(mask), self.meaning)
        if (unknown := self._labels[numbers] < 0).any():
            raise ValueError(f"{mask}: holds the number {numbers[unknown][0]}, which is of no class")
        return numbers

    def read(self, index: int) -> tuple[AnyImage, Tensor]:
        """Return an image and its labels (H, W), uint8.

        Raises:
            ValueError: If one of them cannot be read, or a label is of no class.
        """
        image = self.channels.read(Path(self.names[index]))
        return image, torch.from_numpy(self._labels[self._numbers(self.masks[index])].astype(np.uint8))

    def for_training(self, content: tuple[AnyImage, Tensor]) -> tuple[Tensor, Tensor]:
        """Augment an image and its labels together."""
        assert self.transform is not None
        return self.transform(content[0], tv_tensors.Mask(content[1]))

    def for_evaluation(self, content: tuple[AnyImage, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Give the image as the model takes it, and its labels."""
        assert self.prepare is not None
        if content is None:
            return torch.zeros(self.channels.count, 32, 32), torch.zeros(0, 0, dtype=torch.int64)
        return self.prepare(content[0]), content[1].long()


def segmentation_transform(
    image_size: int,
    scale: tuple[float, float],
    hflip: float,
    photometric: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """From an image and its labels to squares: resized, cut out or filled up, flipped, recoloured if of colours, normalised."""
    sides = range(max(1, round(scale[0] * image_size)), round(scale[1] * image_size) + 1)

    def placed(filling: list[float]) -> list[Any]:
        fill = {tv_tensors.Image: filling, tv_tensors.Mask: IGNORE}
        crop = v2.RandomCrop(image_size, pad_if_needed=True, fill=fill)
        return [v2.RandomShortestSize(list(sides), antialias=True), crop, v2.RandomHorizontalFlip(hflip)]

    steps: list[Any] = [v2.ToImage(), *placed([255 * value for value in mean])]
    if photometric:  # each half of the time, as is customary; torchvision's own version also exchanges channels
        changes = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
        steps += [v2.RandomApply([v2.ColorJitter(**change)], p=0.5) for change in changes]
    types = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    last = [v2.ToDtype(types, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    of_colours, of_channels = v2.Compose([*steps, *last]), v2.Compose([*placed(list(mean)), *last])
    return partial(_augmented, of_colours, of_channels)


def _augmented(of_colours: Any, of_channels: Any, image: AnyImage, labels: Any) -> tuple[Any, Any]:
    if isinstance(image, ChannelImage):
        return of_channels(tv_tensors.Image(image.tensor), labels)
    return of_colours(image, labels)


def collate_segmentation(samples: Sequence[tuple[Any, ...]]) -> tuple[Any, Any, list[str]]:
    """Make a batch: squares stacked for training, lists for evaluation, where sizes differ; and the problems there were."""
    images, labels, problems = zip(*samples, strict=True)
    lines = [line for problem in problems for line in problem.splitlines()]
    if all(image.shape[1:] == mask.shape == labels[0].shape for image, mask in zip(images, labels, strict=True)):
        return torch.stack(images), torch.stack(labels), lines
    return list(images), list(labels), lines
