"""Data sets and loaders, mostly timm's: by name, with transforms that the model's configuration decides."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from .recipe import Recipe  # needs jsonargparse, which prediction does without

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
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
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.labels[index])


@dataclass
class ImageData:
    """Training and held-out images of one data set, as (picture, class) pairs with a settable ``transform``."""

    train: Any
    held_out: Any
    class_names: list[str]


def _classes(folder: Path) -> list[str]:
    """Names of the classes in a folder, of which there must be two or more with images in each."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    empty = [n for n in names if not any(f.suffix.lower() in IMAGE_SUFFIXES for f in (folder / n).rglob("*"))]
    if len(names) < 2 or empty:
        raise ValueError(
            f"{folder}: expected two or more folders, one per class, with images in each; got {len(names)} folders"
            + (f", without images: {', '.join(empty[:3])}" if empty else "")
        )
    return names


def _folder(path: Path, need_train: bool) -> ImageData:
    held_out = next((path / name for name in VALIDATION_FOLDERS if (path / name).is_dir()), None)
    if not need_train:
        held_out = held_out or path
        return ImageData(None, create_dataset("", str(held_out)), _classes(held_out))
    if not (path / "train").is_dir() or held_out is None:
        found = sorted(child.name for child in path.iterdir())[:5]
        raise ValueError(
            f"{path}: expected the folders train/ and val/, each with one folder of images per class; found "
            f"{', '.join(found) or 'nothing'}"
        )
    names, others = _classes(path / "train"), _classes(held_out)
    if names != others:
        differing = sorted(set(names) ^ set(others))[:3]
        raise ValueError(
            f"{path}: train/ has {len(names)} classes and {held_out.name}/ has {len(others)}, expected the same; they differ "
            f"in {', '.join(differing)}"
        )
    return ImageData(create_dataset("", str(path / "train")), create_dataset("", str(held_out)), names)


def open_images(name: str, root: str = "data", download: bool = False, need_train: bool = True) -> ImageData:
    """Open a data set for classification.

    Args:
        name: ``digits``, a folder with train/ and val/ (or validation/, test/) of one folder per class, or a data set of timm
            such as ``torch/cifar10`` or ``hfds/NAME``.
        root: Where timm's data sets lie.
        download: Fetch a ``torch/`` data set that is not there.
        need_train: If not, a folder may hold the classes' folders itself, and `train` is None for it.

    Raises:
        ValueError: If there is no such data set, or the folder's classes differ between the splits or are empty.
    """
    if name == "digits":
        return ImageData(Digits("train"), Digits("held-out"), [str(digit) for digit in range(10)])
    if Path(name).is_dir():
        return _folder(Path(name), need_train)
    if not name.startswith(("torch/", "hfds/")):
        raise ValueError(f"no data set {name}: expected digits, a folder with train/ and val/, torch/NAME or hfds/NAME")
    train, held_out = (create_dataset(name, root, split=split, download=download) for split in ("train", "validation"))
    names = getattr(train, "classes", None)  # torchvision's
    if names is None:  # Hugging Face's
        names = train.reader.dataset.features[train.reader.label_key].names
    return ImageData(train, held_out, [str(n) for n in names])


def data_config(recipe: "Recipe", model: Any) -> dict[str, Any]:
    """Input of `model` trained by `recipe`, by timm's names: input_size, mean, std, interpolation, crop_pct."""
    config = {key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}
    return {**config, "input_size": (3, recipe.image_size, recipe.image_size), "crop_pct": recipe.crop_pct}


def train_loader(recipe: "Recipe", images: Any, config: dict[str, Any]) -> DataLoader[Any]:
    """Shuffled, augmented batches of (images (B, 3, S, S), classes (B))."""
    augmentation = recipe.augmentation
    images.transform = create_transform(
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
    if len(images) < recipe.batch_size:
        raise ValueError(f"{len(images)} training images are fewer than one batch of {recipe.batch_size}: lower batch_size")
    return DataLoader(
        images,
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(images: Any, config: dict[str, Any], batch_size: int = 64, workers: int = 0) -> DataLoader[Any]:
    """Batches in order, resized and cropped by `config`."""
    images.transform = eval_transform(config)
    return DataLoader(images, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())


def eval_transform(config: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """From a picture to a normalised tensor (3, H, W), by timm's evaluation transform."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        **{key: config[key] for key in keys if key in config}, is_training=False
    )
    return transform


def find_images(paths: Iterable[str]) -> list[Path]:
    """Expand files, folders (searched through) and globs into image files, in order and without repeats.

    A path that matches nothing is kept, so that reading it reports it.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            matches: Sequence[Path] = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif any(char in given for char in "*?[") and not path.exists():
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        else:
            matches = [path]
        found.update(dict.fromkeys(matches or [path]))
    return list(found)


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB; alpha is dropped, grey and palettes are converted, EXIF orientation is ignored as in training.

    Raises:
        ValueError: If the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder without images") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable picture: {str(error).splitlines()[0]}") from error
