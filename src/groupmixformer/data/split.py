"""A data set without parts dealt out to training and validation: seeded, stratified, near duplicates together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import Fields, read_json, to_json, write_file
from .classes import few
from .duplicates import Fingerprint, fingerprint, groups, near_pairs
from .images import noted
from .samples import in_threads

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Split:
    """Which image is in which part.

    Attributes:
        seed: Of the dealing.
        val_share: Share of the images that are held out; none for folds.
        folds: Number of folds.
        fold: The one that is held out, from 1; none where the parts are the folds themselves.
        parts: Names of the images by part: train and val, or 1, 2, ...
    """

    seed: int
    val_share: float | None
    folds: int | None
    fold: int | None
    parts: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Split":
        """Read a file that `write` wrote.

        Raises:
            ValueError: If it is something else.
        """
        fields = Fields(read_json(path), str(path))
        parts: Fields = fields.object("parts")
        return cls(
            fields.integer("seed", 0),
            fields.number("val_share", 0, 1, default=None),
            fields.integer("folds", 2, default=None),
            fields.integer("fold", 1, default=None),
            {name: parts.texts(name) for name in parts.values},
        )

    def names(self, part: str) -> set[str]:
        """Return the names of the images of a part.

        Raises:
            ValueError: If there is no such part.
        """
        if part not in self.parts:
            raise ValueError(f"the data was dealt out to {' and '.join(self.parts)}, and has no part {part}")
        return set(self.parts[part])

    def write(self, path: Path) -> None:
        """Write a JSON file, atomically."""
        write_file(path, to_json(asdict(self), indent=1))

    def hold_out(self, fold: int) -> "Split":
        """Return the split whose held-out part is one of the folds."""
        rest = [name for part, names in self.parts.items() if part != str(fold) for name in names]
        return replace(self, fold=fold, parts={TRAIN: sorted(rest), VAL: self.parts[str(fold)]})


def deal(classes: Sequence[Collection[int]], group: NDArray[np.int64], shares: Sequence[float], seed: int) -> NDArray[np.int64]:
    """Deal images out to parts, so that each part has its share of every class: iterative stratification.

    The rarest class is dealt out first (Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, 2011), and a
    group as a whole. Where each image has one class and is a group of its own, a part has its share of the class, rounded.
    (scikit-learn's StratifiedGroupKFold knows equal shares and one class for each image.)

    Args:
        classes: Of each image (N); it may have several, or none.
        group: Of each image (N); a group is not divided.
        shares: Of each part; their sum is 1.
        seed: Of the order.

    Returns:
        The number of the part of each image (N).
    """
    group = np.unique(group, return_inverse=True)[1]
    rows = np.zeros((group.max() + 1, max((max(found, default=-1) for found in classes), default=-1) + 2))
    for row, found in zip(group.tolist(), classes, strict=True):
        rows[row, [*found, -1]] += 1  # the last column counts all images
    random = np.random.default_rng(seed)
    order = random.permutation(len(rows))
    order = order[np.argsort(-rows[order, -1], kind="stable")]  # large groups first: single images fill up what is missing
    wanted = np.array(shares)[:, None] * rows.sum(0)  # (parts, classes and all)
    part = np.full(len(rows), -1)
    for _ in range(rows.shape[1]):
        left = rows[part < 0].sum(0)
        if not left[-1]:
            break
        rarest = int(np.where(left > 0, left, np.inf)[:-1].argmin()) if left[:-1].any() else -1
        for row in order[(part[order] < 0) & (rows[order, rarest] > 0)]:
            best = np.flatnonzero(np.isclose(wanted[:, rarest], wanted[:, rarest].max()))
            part[row] = best[wanted[best, -1].argmax()]
            wanted[part[row]] -= rows[row]
    return part[group]


class Splitter:
    """Says which images of a data set without parts are trained on and which are held out.

    Args:
        val_share: Share of the images to hold out; none for folds.
        folds: Number of folds.
        fold: The one to hold out, from 1; none to deal out the folds alone.
        seed: Of the dealing.
        stored: Files of an earlier split; the first one that is there is used.

    Attributes:
        split: The split, once it is known.
        dealt: The same before one of the folds was held out.
        notes: Lines about it.
    """

    def __init__(
        self,
        val_share: float | None = None,
        folds: int | None = None,
        fold: int | None = None,
        seed: int = 0,
        stored: Sequence[Path] = (),
    ) -> None:
        self.val_share, self.folds, self.fold, self.seed = val_share, folds, fold, seed
        self.stored = next((path for path in stored if path.is_file()), None)
        self.split: Split | None = None
        self.dealt: Split | None = None
        self.notes: list[str] = []

    def __call__(self, files: Mapping[str, Path], classes: Callable[[], Sequence[Collection[int]]]) -> Split:
        """Return the split; the same one for every call.

        Args:
            files: Of the images, by name.
            classes: Gives those in each image, in the order of `files`; called only where images are dealt out.

        Raises:
            ValueError: If a part would be empty, or the stored split was made otherwise.
        """
        if self.split is None:
            self.dealt = self._read(files, self.stored) if self.stored else self._deal(files, classes())
            self.split = self.dealt.hold_out(self.fold) if self.fold and not self.dealt.fold else self.dealt
        return self.split

    def _read(self, files: Mapping[str, Path], path: Path) -> Split:
        split = Split.read(path)
        made, wanted = (split.val_share, split.folds, split.fold or self.fold), (self.val_share, self.folds, self.fold)
        if any(wanted) and wanted != made:
            fields = "val_share {}, folds {}, fold {}".format(*made)
            raise ValueError(f"{path}: was made with {fields}: continue with these, or begin a run in another folder")
        known = {name for names in split.parts.values() for name in names}
        if added := [name for name in files if name not in known]:
            self.notes.append(f"{len(added)} images were added since {path} was made and are left out: {few(added)}")
        if gone := sorted(known.difference(files)):
            self.notes.append(f"{len(gone)} images of {path} are not there any more: {few(gone)}")
        return split

    def _deal(self, files: Mapping[str, Path], classes: Sequence[Collection[int]]) -> Split:
        names = list(files)
        pairs = near_pairs(in_threads(_fingerprint, files.values()))
        group = groups(len(names), pairs)
        if self.folds:
            titles, shares = [str(i + 1) for i in range(self.folds)], [1 / self.folds] * self.folds
        else:
            assert self.val_share is not None
            titles, shares = [TRAIN, VAL], [1 - self.val_share, self.val_share]
        part = deal(classes, group, shares, self.seed)
        parts = {title: sorted(names[i] for i in np.flatnonzero(part == number)) for number, title in enumerate(titles)}
        joined = np.unique(group, return_counts=True)[1]
        joined = joined[joined > 1]
        together = f"{joined.sum()} of them near duplicates, in {len(joined)} group{'s' * (len(joined) != 1)} kept together"
        kept = together if pairs else "without near duplicates"
        sizes = ", ".join(f"{title} {len(found)}" for title, found in parts.items())
        if empty := [title for title, found in parts.items() if not found]:
            raise ValueError(
                f"{len(names)} images, {kept}, cannot be dealt out: nothing is left for {few(empty)}: change val_share or folds"
            )
        self.notes.append(f"{len(names)} images, {kept}, are dealt out by seed {self.seed}: {sizes}")
        return Split(self.seed, self.val_share, self.folds, None, parts)


def _fingerprint(path: Path) -> Fingerprint | None:
    try:
        with noted():
            return fingerprint(path)
    except ValueError:
        return None  # which is told where it is read
