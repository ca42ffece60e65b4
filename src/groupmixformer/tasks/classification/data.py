"""Data sets by name, mostly timm's, and the transforms that the model's configuration decides."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_dataset, create_transform
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, default_collate

from ...data.channels import AnyImage, ChannelImage, Channels
from ...data.classes import differences, few
from ...data.formats import FORMATS, TAKEN_WHOLE, WHOLE, Recognised, has_class_folders, recognise
from ...data.images import HIDDEN, describe_left_out, is_leftover, list_images
from ...data.labels import read_labels
from ...data.samples import Samples
from ...data.sources import HuggingFace, WebDataset
from ...data.split import TRAIN, VAL, Splitter
from ...data.streaming import Stream, open_source
from ...visual.drawing import to_image
from ..backbone import pixel_statistics, shown_channels

if TYPE_CHECKING:
    from ...training.recipe import Augmentation, Recipe  # needs jsonargparse, which prediction does without

VALIDATION_FOLDERS = ("val", "validation", "test")


class Digits(Dataset[tuple[Any, int]]):
    """The 1,797 handwritten digits of scikit-learn (UCI, 8 x 8 pixels); a fifth of each class is held out."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        chosen = train if split == "train" else held_out
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class ImageSamples(Samples):
    """A data set of images as (tensor (C, H, W), class, problem); a blank is of class -1.

    Args:
        source: Pairs of an image and its class, by index.
        transform: From an image to the tensor.
        class_names: Names of the classes, in order.
        seed: Of what the transform draws in training.
        channels: How images are read.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[[AnyImage], torch.Tensor],
        class_names: Sequence[str] = (),
        seed: int = 0,
        channels: Channels | None = None,
    ) -> None:
        self.source, self.transform, self.class_names, self.seed = source, transform, list(class_names), seed
        self.channels = channels or Channels()
        self.notes, self.skipped = list(getattr(source, "notes", ())), list(getattr(source, "skipped", ()))

    def __len__(self) -> int:
        return len(self.source)

    def files(self) -> list[Path]:
        """Return the files of a folder, without reading them."""
        return [Path(path) for path, _ in getattr(self.source, "samples", ())]

    def drawn_sample(self, sample: tuple[Any, ...]) -> Image.Image:
        """Return an augmented image."""
        return to_image(sample[0], *statistics_of(self.channels))

    def name(self, index: int) -> str:
        """Name of an image in messages: its file, if it has one."""
        samples = getattr(self.source, "samples", None)  # ours, and torchvision's folders
        return str(samples[index][0]) if samples else f"image {index}"

    def read(self, index: int) -> tuple[AnyImage, int]:
        """Return an image and its class.

        Raises:
            ValueError: If it cannot be read.
        """
        if isinstance(self.source, ListedImages):
            path, label = self.source.samples[index]
            return self.channels.read(Path(path)), self.place(label)
        file: Any = None
        image: Any = None
        try:
            if isinstance(self.source, ImageDataset):  # Hugging Face's, by timm
                file, label, *_ = self.source.reader[index]
            else:
                image, label = self.source[index]
        except Exception as error:  # of any library
            raise ValueError(f"{self.name(index)}: not a readable image: {error}") from error
        name = self.name(index)
        return self.channels.decode(file.read(), name) if file else self.channels.convert(image, name), self.place(int(label))

    def labels(self) -> list[int] | None:
        """Return the class of each image, where the labels are at hand."""
        reader: Any = getattr(self.source, "reader", None)
        if hasattr(reader, "label_key"):  # Hugging Face's
            labels: Any = reader.dataset[reader.label_key]
        else:  # ours, and torchvision's, which have two names for them
            labels = next((getattr(self.source, key) for key in ("labels", "targets") if hasattr(self.source, key)), None)
        return None if labels is None else [int(label) for label in labels[:]]

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Return the number of images of each class, where the labels are at hand."""
        labels = self.labels()
        if labels is None:
            return super().count_classes()
        return np.bincount(labels, minlength=len(self.class_names)).tolist(), "images", []

    def for_training(self, content: tuple[AnyImage, int]) -> tuple[torch.Tensor, int]:
        """Apply the transform, which draws random numbers."""
        return self.transform(content[0]), content[1]

    def for_evaluation(self, content: tuple[AnyImage, int] | None) -> tuple[torch.Tensor, int]:
        """Apply the transform."""
        if content is None:
            return torch.zeros_like(self.transform(self.channels.blank())), -1
        return self.transform(content[0]), content[1]


class LabelledSamples(ImageSamples):
    """Images that may have several labels, or none: the class of a sample is a row of 0 and 1, or of -1 for a blank."""

    fewest_classes = 1

    def _row(self, labels: Sequence[int]) -> torch.Tensor:
        row = torch.zeros(len(self.class_names))
        row[[self.place(label) for label in labels]] = 1
        return row

    def read(self, index: int) -> tuple[AnyImage, Any]:
        """Return an image and its labels (classes).

        Raises:
            ValueError: If it cannot be read.
        """
        path, labels = self.source.samples[index]
        return self.channels.read(Path(path)), self._row(labels)

    def labels(self) -> None:
        """Return none: an image has no one class."""

    def named(self, index: int) -> str:
        """Return the names of the labels."""
        return ", ".join(self.class_names[self.place(label)] for label in self.source.samples[index][1])

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Return the number of images that have each label."""
        found = [self.place(label) for _, labels in self.source.samples for label in labels]
        return np.bincount(np.array(found, dtype=np.int64), minlength=len(self.class_names)).tolist(), "images", []

    def for_evaluation(self, content: tuple[AnyImage, Any] | None) -> tuple[torch.Tensor, Any]:
        """Apply the transform."""
        image, blank = super().for_evaluation(content)
        return image, torch.full((len(self.class_names),), -1.0) if content is None else blank


def collate_classification(
    samples: Sequence[tuple[torch.Tensor, Any, str]],
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Make a batch: images (B, C, H, W), classes (B), or labels (B, classes), and a problem for each unreadable image."""
    images, classes, problems = zip(*samples, strict=True)
    return default_collate(list(images)), default_collate(list(classes)), [line for p in problems for line in p.splitlines()]


@dataclass(frozen=True)
class ImageData:
    """Where the images of a data set come from, for data sets for training and evaluation.

    Attributes:
        train_source: Pairs of an image and its class, by index, or what a `Stream` reads; none where only an evaluation was
            asked for.
        held_out_source: The same of the images that are held out.
        class_names: Names of the classes, in order.
        several: Whether an image may have several labels.
    """

    train_source: Any
    held_out_source: Any
    class_names: list[str]
    several: bool = False

    def train(self, transform: Callable[[Any], Any], seed: int, channels: Channels | None = None) -> "ImageSamples | Stream":
        """Return the training set."""
        return self._data_set(self.train_source, transform, seed, channels)

    def held_out(self, transform: Callable[[Any], Any], channels: Channels | None = None) -> "ImageSamples | Stream":
        """Return the set to evaluate on."""
        return self._data_set(self.held_out_source, transform, 0, channels)

    def _data_set(
        self, source: Any, transform: Callable[[Any], Any], seed: int, channels: Channels | None
    ) -> "ImageSamples | Stream":
        if isinstance(source, WebDataset | HuggingFace):
            return Stream(source, transform, channels)
        return (LabelledSamples if self.several else ImageSamples)(source, transform, self.class_names, seed, channels)


class ListedImages:
    """Images with what they are, in files.

    Attributes:
        folder: To which the names of the images in a split are relative.
        class_names: In order.
        samples: Images, each with the number of its class, or those of its labels.
        notes: What is said of them.
        skipped: A line for each image that cannot be used.
    """

    folder: Path
    class_names: list[str]
    samples: list[tuple[str, Any]]
    notes: list[str]
    skipped: Sequence[str] = ()

    def split(self, splitter: Splitter) -> tuple[Self, Self]:
        """Return two of some of the images each: to train on, and held out."""
        names = [Path(os.path.relpath(path, self.folder)).as_posix() for path, _ in self.samples]
        files = dict(zip(names, [Path(path) for path, _ in self.samples], strict=True))
        split = splitter(files, lambda: [[found] if isinstance(found, int) else found for _, found in self.samples])

        def part(title: str) -> Any:
            kept, chosen = copy(self), split.names(title)
            kept.samples = [sample for name, sample in zip(names, self.samples, strict=True) if name in chosen]
            kept.skipped = self.skipped if title == TRAIN else ()
            return kept

        return part(TRAIN), part(VAL)

    @property
    def targets(self) -> list[Any]:
        """What each image is."""
        return [found for _, found in self.samples]

    def __len__(self) -> int:
        return len(self.samples)


class LabelledImages(ListedImages):
    """Images whose labels a CSV file has, or those of the objects in them."""

    def __init__(self, found: Recognised, part: str) -> None:
        read = read_labels(found, part)
        self.folder = found.path if found.path.is_dir() else found.path.parent
        self.class_names, self.several, self.skipped, self.notes = read.class_names, read.several, read.skipped, read.notes
        self.samples = [(path, labels if read.several else labels[0]) for path, labels in read.samples]


class FolderImages(ListedImages):
    """A folder of one folder of images per class, of which there must be two or more with images in each.

    Attributes:
        class_names: Names of the folders, in natural order: 2 before 10.
        samples: Images and the numbers of their classes, in natural order of the paths.
        notes: What was left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        entries = list(folder.iterdir())
        children = [child for child in entries if not is_leftover(child.name)]
        names = sorted((child.name for child in children if child.is_dir()), key=natural_key)
        left_out = Counter(HIDDEN for child in entries if is_leftover(child.name))
        found = [list_images(folder / name, left_out) for name in names]
        self.class_names, self.notes = names, describe_left_out(left_out)
        if beside := [child.name for child in children if not child.is_dir()]:
            self.notes.append(f"left out beside the folders of the classes: {few(beside)}")
        empty = [name for name, paths in zip(names, found, strict=True) if not paths]
        if len(names) < 2 or empty:
            raise ValueError(
                f"{folder}: expected two or more folders, one per class, with images in each; got {len(names)} folders"
                + (f", without images: {few(empty)}" if empty else "")
                + "".join(f"; {note}" for note in self.notes)
            )
        for name, paths in zip(names, found, strict=True):
            if deeper := next((path.parent for path in paths if path.parent != folder / name), None):
                raise ValueError(f"{folder}: expected images directly in the folders of the classes; found {deeper}")
        labelled = [(str(path), label) for label, paths in enumerate(found) for path in paths]
        self.samples = sorted(labelled, key=lambda sample: natural_key(sample[0]))


def _folder(path: Path, need_train: bool, splitter: Splitter | None) -> ImageData:
    held_out = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if splitter and held_out is None:
        whole = FolderImages(path / "train" if (path / "train").is_dir() else path)
        return ImageData(*whole.split(splitter), whole.class_names)
    if not need_train:
        images = FolderImages(held_out or path)
        return ImageData(None, images, images.class_names)
    if not (path / "train").is_dir() or held_out is None:
        found = sorted(child.name for child in path.iterdir())[:5]
        raise ValueError(
            f"{path}: expected the folders train/ and val/, each with one folder of images per class, or such folders alone "
            f"and --val-share 0.2; found {', '.join(found) or 'nothing'}"
        )
    train, test = FolderImages(path / "train"), FolderImages(held_out)
    names, others = train.class_names, test.class_names
    if names != others:
        differing = sorted(set(names) ^ set(others))[:3]
        raise ValueError(
            f"{path}: train/ has {len(names)} classes and {held_out.name}/ has {len(others)}, expected the same; they differ "
            f"in {', '.join(differing)}"
        )
    return ImageData(train, test, names)


def _labelled(found: Recognised, need_train: bool, splitter: Splitter | None) -> ImageData:
    if splitter:  # a test part without labels is usual
        whole = LabelledImages(found, "train" if "train" in found.parts and "val" not in found.parts else found.undivided())
        return ImageData(*whole.split(splitter), whole.class_names, whole.several)
    train = LabelledImages(found, found.part("train")) if need_train else None
    part = found.part("val", or_whole=not need_train)
    held_out = LabelledImages(found, part)
    held_out.notes += [TAKEN_WHOLE] if part == WHOLE else []
    if train and train.class_names != held_out.class_names:
        differing = differences(train.class_names, held_out.class_names, "train", "val") or "their order"
        raise ValueError(f"{found.path}: the classes of train and val differ, expected the same: {differing}")
    several = held_out.several or (train is not None and train.several)
    for source in (train, held_out):
        if source and several and not source.several:
            source.samples = [(path, (label,)) for path, label in source.samples]
    return ImageData(train, held_out, held_out.class_names, several)


def _recognised(path: Path) -> Recognised | None:
    """Return what holds labels of images, unless it is a folder for each class."""
    whole = path / "train" if (path / "train").is_dir() else path
    if path.is_dir() and has_class_folders(whole) and not FORMATS["labels"].find(path):
        return None
    try:
        found = recognise(path, "classification")
    except ValueError:
        return None
    return found if found.format != "classes" else None


def open_images(
    name: str, root: str = "data", download: bool = False, need_train: bool = True, splitter: Splitter | None = None
) -> ImageData:
    """Open a data set for classification.

    Args:
        name: ``digits``, a folder with train/ and val/ (or validation/, test/) of one folder per class, or by timm's naming
            ``torch/cifar10`` and others of torchvision, ``hfds/NAME`` of Hugging Face, and, as streams, ``hfids/NAME`` and
            ``wds/NAME``; or, with several labels for an image, what `groupmixformer.data.labels` reads.
        root: Where timm's data sets lie; for ``wds/`` also a URL.
        download: Fetch a ``torch/`` data set that is not there.
        need_train: If not, a folder may hold the classes' folders itself, and `train_source` is None for it.
        splitter: Deals out the images of a folder without a held-out part.

    Raises:
        ValueError: If there is no such data set, or the folder's classes differ between the splits or are empty.
    """
    if name == "digits":
        return ImageData(Digits("train"), Digits("held-out"), [str(digit) for digit in range(10)])
    if Path(name).exists() and (found := _recognised(Path(name))):
        return _labelled(found, need_train, splitter)
    if Path(name).is_dir():
        return _folder(Path(name), need_train, splitter)
    if name.startswith(("hfids/", "wds/")):
        held_out = open_source(name, root, "validation")
        return ImageData(open_source(name, root, "train") if need_train else None, held_out, held_out.class_names)
    if not name.startswith(("torch/", "hfds/")):
        kinds = "digits, a folder with train/ and val/, labels in a CSV file, torch/NAME, hfds/NAME, hfids/NAME or wds/NAME"
        raise ValueError(f"no data set {name}: expected {kinds}")
    train, held_out = (create_dataset(name, root, split=split, download=download) for split in ("train", "validation"))
    names = getattr(train, "classes", None)  # torchvision's
    if names is None:  # Hugging Face's
        names = train.reader.dataset.features[train.reader.label_key].names
    return ImageData(train, held_out, [str(n) for n in names])


def training_config(recipe: "Recipe", model: Any) -> dict[str, Any]:
    """Input of `model` trained by `recipe`, by timm's names: input_size, mean, std, interpolation, crop_pct."""
    config = {"interpolation": model.pretrained_cfg["interpolation"], **pixel_statistics(recipe, model.pretrained_cfg)}
    config["input_size"] = (recipe.in_chans, recipe.image_size, recipe.image_size)
    return {**config, "crop_pct": recipe.crop_pct, **shown_channels(recipe)}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep `bits` of each colour. RandAugment of magnitude 9 asks for none in 1 of 44 cases, which Pillow 13 refuses."""
    from timm.data.auto_augment import posterize

    return Image.new(image.mode, image.size) if bits <= 0 else posterize(image, bits)  # black, as earlier Pillows had it


def _taken(image: AnyImage, channels: int, crop_mode: str = "") -> Image.Image | torch.Tensor:
    """Return what timm's transforms take: an image of PIL's, or of other channels a tensor (C, H, W), float32."""
    Channels(channels).check(image)
    if isinstance(image, Image.Image):
        return image
    if crop_mode == "border":
        raise ValueError("crop_mode border is for colours: take center or squash")
    return image.tensor


def classification_transform(augmentation: "Augmentation", config: dict[str, Any]) -> Callable[[AnyImage], torch.Tensor]:
    """From an image to an augmented, normalised tensor (C, H, W), by timm's training transform.

    Colours are changed in image files read as colour alone: in arrays and other channels they mean something else.
    """
    plain = replace(augmentation, color_jitter=None, auto_augment=None)
    of_channels = _training_transform(plain, config)
    of_colours = _training_transform(augmentation, config) if config["input_size"][0] == 3 else of_channels
    return partial(_augmented, of_colours, of_channels, config["input_size"][0])


def _augmented(
    of_colours: Callable[[Any], torch.Tensor], of_channels: Callable[[Any], torch.Tensor], channels: int, image: AnyImage
) -> torch.Tensor:
    return (of_channels if isinstance(image, ChannelImage) else of_colours)(_taken(image, channels))


def _training_transform(augmentation: "Augmentation", config: dict[str, Any]) -> Callable[[Any], torch.Tensor]:
    transform: Callable[[Any], torch.Tensor] = create_transform(
        config["input_size"],
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or 0.0,
        auto_augment=augmentation.auto_augment,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
        **{key: config[key] for key in ("mean", "std", "interpolation")},
    )
    for step in getattr(transform, "transforms", ()):
        policy = [op for group in getattr(step, "policy", ()) for op in group]  # AutoAugment's; RandAugment has operations
        for operation in (*getattr(step, "ops", ()), *policy):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.aug_fn = _posterize
    return transform


def statistics_of(channels: Channels) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of what is only looked at: ImageNet's for colours, 0 and 1 for other channels."""
    return (
        (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if channels.count == 3
        else ([0.0] * channels.count, [1.0] * channels.count)
    )


def eval_transform(config: dict[str, Any]) -> Callable[[AnyImage], torch.Tensor]:
    """From an image to a normalised tensor (C, H, W), by timm's evaluation transform."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform: Any = create_transform(**{key: config[key] for key in keys if key in config}, is_training=False)
    taken = partial(_taken, channels=config["input_size"][0], crop_mode=config.get("crop_mode") or "")
    transform.transforms.insert(0, taken)
    made: Callable[[AnyImage], torch.Tensor] = transform
    return made


def eval_loader(images: Any, batch_size: int = 64, workers: int = 0) -> DataLoader[Any]:
    """Batches of a data set, in order."""
    return DataLoader(
        images, batch_size, num_workers=workers, collate_fn=collate_classification, pin_memory=torch.cuda.is_available()
    )
