"""What the images of a data set are, file by file: sizes, channels, damage, duplicates within and between its parts."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from .channels import ANY, TIFF_SUFFIXES, ChannelImage, Channels, channels_of
from .duplicates import Fingerprint, fingerprint, groups, near_pairs
from .images import ARRAY_SUFFIXES, decode, noted
from .sources import Sample

CHANNELS = {"1": "black and white", "L": "grey", "LA": "grey with alpha", "P": "palette", "RGB": "colour"}
CHANNELS |= {
    "RGBA": "colour with alpha",
    "CMYK": "CMYK",
    "I;16": "grey, 16 bits",
    "I": "grey, 32 bits",
    "F": "grey, floating-point",
}


@dataclass(frozen=True)
class Look:
    """What one look at an image file tells.

    Attributes:
        path: The file.
        problem: Why it cannot be read; empty if it can.
        doubts: What is to be said of its conversion to 8 bits.
        bytes: Of the file.
        size: Width and height, upright.
        channels: In words.
        in_chans: Their number as a recipe has it; 3 of what is read as colour.
        format: By Pillow's names.
        print: What it is compared by.
        label: Name of its class, if it has one.
    """

    path: Path
    problem: str = ""
    doubts: tuple[str, ...] = ()
    bytes: int = 0
    size: tuple[int, int] = (0, 0)
    channels: str = ""
    in_chans: int = 3
    format: str = ""
    print: Fingerprint | None = None
    label: str | None = None


def look_at(path: Path) -> Look:
    """Read an image once."""
    try:
        with noted() as notes:
            found = fingerprint(path)
        size, _ = ANY.sizes(path)
        if path.suffix.lower() in (*ARRAY_SUFFIXES, *TIFF_SUFFIXES) and isinstance(image := ANY.read(path), ChannelImage):
            form, count = path.suffix[1:].upper(), channels_of(image)
            kind = f"{count}-channel {image.pixels.dtype}"
        else:
            with Image.open(path) as opened:
                kind, form, count = CHANNELS.get(opened.mode, opened.mode), str(opened.format), 3
    except (OSError, ValueError) as error:
        return Look(path, problem=str(error).removeprefix(f"{path}: "))
    texts = tuple(text for _, text in notes)
    return Look(path, "", texts, path.stat().st_size, size, kind, count, form, found)


def look_at_sample(sample: Sample, class_names: Sequence[str]) -> Look:
    """Look at a sample of a stream, without comparing it with others."""
    content, label, name = sample
    try:
        if content is None:
            raise ValueError("holds no image")
        data = content.read_bytes() if isinstance(content, Path) else content
        with noted() as notes:
            size = decode(data, name).size
        with Image.open(io.BytesIO(data)) as image:
            mode, form = image.mode, image.format
        texts = tuple(text for _, text in notes)
        known = str(label if isinstance(label, int) else bytes(label).decode()).isdecimal() and int(label) < len(class_names)
        if not known:
            raise ValueError(f"got class {label!r}, expected 0 to {len(class_names) - 1}")
    except (OSError, TypeError, ValueError) as error:
        return Look(Path(name), problem=str(error).removeprefix(f"{name}: "))
    return Look(Path(name), "", texts, len(data), size, CHANNELS.get(mode, mode), 3, str(form), label=class_names[int(label)])


def _histogram(values: Any) -> dict[str, list[float]]:
    """Return the edges of at most 12 equal bins, and the number of values in each."""
    counts, edges = np.histogram(values, bins=min(12, len(np.unique(values))))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Return the least value, the median and the greatest one."""
    least, middle, greatest = (float(value) for value in np.quantile(list(values), (0, 0.5, 1)))
    return {"min": least, "median": middle, "max": greatest}


def describe(looks: Sequence[Look]) -> dict[str, Any]:
    """Summarise files that were looked at: sizes, aspect ratios, channels, formats, and those that cannot be read."""
    read = [look for look in looks if not look.problem]
    result: dict[str, Any] = {"bytes": sum(look.bytes for look in read)}
    if read:
        sizes = np.array([look.size for look in read])
        result |= {"width": _spread(sizes[:, 0]), "height": _spread(sizes[:, 1])}
        ratios = sizes[:, 0] / sizes[:, 1]
        result["aspect_ratio"] = _spread(ratios)
        result["histograms"] = {"longer side": _histogram(sizes.max(axis=1)), "width : height": _histogram(ratios)}
    for name in ("channels", "format"):
        result[f"{name.removesuffix('s')}s"] = dict(Counter(getattr(look, name) for look in read).most_common())
    result["in_chans"] = sorted({look.in_chans for look in read})
    result["doubts"] = dict(Counter(doubt for look in read for doubt in look.doubts).most_common())
    result["damaged"] = [{"file": str(look.path), "reason": look.problem} for look in looks if look.problem]
    return result


def statistics(paths: Sequence[Path], channels: Channels) -> dict[str, Any]:
    """Compute mean and standard deviation of each channel over all pixels of images, one image in the memory at a time.

    Returns:
        ``in_chans``, ``images``, ``pixels``, ``mean`` and ``std`` of what a network is given, and ``skipped``: a line
        for each image that cannot be read.

    Raises:
        ValueError: If none can be read, or they differ in their channels.
    """
    from sklearn.preprocessing import StandardScaler  # takes a second to import

    skipped: list[str] = []
    images, scaler = 0, StandardScaler()
    for path in paths:
        try:
            image = channels.read(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        values = (image.tensor if isinstance(image, ChannelImage) else pil_to_tensor(image) / 255).flatten(1).double()
        if images and len(values) != scaler.n_features_in_:
            raise ValueError(
                f"{path}: has {len(values)} channels, and those before {scaler.n_features_in_}: name one number with --in-chans"
            )
        scaler.partial_fit(values.T.numpy())
        images += 1
    if not images:
        raise ValueError(f"none of {len(paths)} images can be read{f': {skipped[0]}' if skipped else ''}")
    mean, std, pixels = scaler.mean_.tolist(), np.sqrt(scaler.var_).tolist(), int(scaler.n_samples_seen_)
    return {"in_chans": len(mean), "images": images, "pixels": pixels, "mean": mean, "std": std, "skipped": skipped}


def duplicates(parts: Mapping[str, Sequence[Look]]) -> list[dict[str, Any]]:
    """Return the groups of duplicates over all parts, those that are in several parts first, then those of several classes.

    Returns:
        Of each group, whether its files are ``equal`` or near duplicates, the ``parts`` it is in, the ``classes`` if an image
        has one, and ``files`` by part.
    """
    looks = [(part, look) for part, found in parts.items() for look in found]
    group = groups(len(looks), near_pairs([look.print for _, look in looks]))
    numbers, sizes = np.unique(group, return_counts=True)
    found = []
    for number in numbers[sizes > 1].tolist():
        members = [looks[i] for i in np.flatnonzero(group == number)]
        files: dict[str, list[str]] = {}
        for part, look in members:
            files.setdefault(part, []).append(str(look.path))
        equal = len({look.print.content for _, look in members if look.print}) == 1
        classes = sorted({look.label for _, look in members if look.label is not None})
        found.append({"equal": equal, "parts": list(files), "classes": classes, "files": files})
    return sorted(found, key=lambda entry: (-len(entry["parts"]), -len(entry["classes"])))
