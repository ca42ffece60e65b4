"""Images that show the same: equal files, and near duplicates by a perceptual hash and a small copy in colour."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .channels import ANY, in_colour

# Copies of 100 photographs, video frames and micrographs at half size, at JPEG quality 30, or 10 % brighter differ by up to 4
# bits, 20 levels, 0.26; with 2 % cut off each side mostly by up to 8 bits, 22 levels, 0.4.
BITS = 8  # of 64 that may differ,
LEVELS = 32.0  # of 255: root mean square of the difference of the small copies,
CONTRAST = 0.4  # the same without the mean colour, as a part of their standard deviation
SIDE = 16  # of the small copy
DECODED = 64  # least side at which a JPEG is decoded for it


@dataclass(frozen=True)
class Fingerprint:
    """What an image is compared by.

    Attributes:
        content: Digest of the bytes of its file.
        bits: Perceptual hash: signs of the 64 lowest frequencies.
        colors: Small copy (16, 16, 3), 0 to 255.
    """

    content: bytes
    bits: int
    colors: NDArray[np.float32]


def fingerprint(path: Path) -> Fingerprint:
    """Return what an image is compared by.

    Raises:
        ValueError: If it cannot be read.
    """
    image = in_colour(ANY.read(path, least_side=DECODED))
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "blake2b").digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imagehash import phash  # of the extra that trains

    bits = int.from_bytes(np.packbits(phash(image).hash).tobytes(), "big")
    colors = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    return Fingerprint(content, bits, colors)


def near_pairs(prints: Sequence[Fingerprint | None]) -> list[tuple[int, int]]:
    """Return the pairs of near duplicates, equal files included, by their numbers, the lower one first.

    Every image is compared with every other: a second for 20,000, a minute for 150,000. A mirrored, turned or recoloured copy
    is another image.
    """
    there = [i for i, found in enumerate(prints) if found is not None]
    known = [found for found in prints if found is not None]
    bits = np.array([found.bits for found in known], dtype=np.uint64)
    pairs: list[tuple[int, int]] = []
    for i, own in enumerate(known):
        for j in (np.flatnonzero(np.bitwise_count(bits[i + 1 :] ^ bits[i]) <= BITS) + i + 1).tolist():
            if own.content == known[j].content or _look_alike(own.colors, known[j].colors):
                pairs.append((there[i], there[j]))
    return pairs


def _look_alike(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    def root_mean_square(values: NDArray[np.float32]) -> float:
        return float(np.sqrt((values**2).mean()))

    shapes = [colors - colors.mean((0, 1)) for colors in (one, other)]
    contrast = max(2.0, *(root_mean_square(shape) for shape in shapes))  # of flat images, whose noise differs
    return root_mean_square(one - other) <= LEVELS and root_mean_square(shapes[0] - shapes[1]) <= CONTRAST * contrast


def groups(number: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the number of the group of each of so many images: those that a chain of pairs joins are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones, others = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    return connected_components(coo_array((np.ones(len(ones)), (ones, others)), (number, number)), directed=False)[1]
