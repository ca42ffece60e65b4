"""Map-style data sets: a sample by its index, seeded where it is loaded, replaced where its image cannot be read."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..files import short
from .channels import ANY, Channels, in_colour
from .classes import few
from .images import noted
from .seeding import seed_all

MAX_UNREADABLE_IN_A_ROW = 100  # then training stops: it is not a matter of single files
NOTE = "\0"  # begins a problem that does not make an image unreadable, and parts its name from what is said

LOGGER = logging.getLogger(__name__)


def too_many(unreadable: int, images: int, limit: float) -> bool:
    """Whether there are more unreadable images than a share of all; one is always allowed, unless the share is 0."""
    return unreadable > (max(1, limit * images) if limit else 0)


def spread(counts: Sequence[int], names: Sequence[str], what: str) -> str:
    """Say how many there are of the rarest and of the most frequent class, by name where these are far apart."""
    least, most = min(counts), max(counts)
    if most <= 2 * least:
        return f"{f'{least:,} to ' * (least < most)}{most:,} {what} a class"
    rarest, commonest = (short(names[counts.index(count)]) for count in (least, most))
    return f"from {least:,} of {rarest} to {most:,} of {commonest} ({what})"


def note_problems(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Return what was said of images that are read as problems, from which `Doubts` takes them."""
    return [f"{NOTE}{' '.join(name.splitlines())}{NOTE}{text}" for name, text in notes]


class Doubts:
    """What is said of images although they are read: logged once for each kind, and again when they are ten times as many."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def take(self, problems: Iterable[str]) -> list[str]:
        """Log what is new, and return the problems that are unreadable images."""
        found: dict[str, dict[str, None]] = {}
        unreadable: list[str] = []
        for problem in problems:
            if problem.startswith(NOTE):
                _, name, text = problem.split(NOTE)
                found.setdefault(text, {})[name] = None
            else:
                unreadable.append(problem)
        for text, names in found.items():
            known = self.names.setdefault(text, set())
            before = len(known)
            known.update(names)
            if not before or len(str(len(known))) > len(str(before)):
                first = next(iter(names))
                LOGGER.warning("%s: %s", first if len(known) == 1 else f"{len(known):,} images ({first}, ...)", text)
        return unreadable


def _few(lines: Sequence[str]) -> str:
    return "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")


def in_threads(look: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Look at files, which takes time mostly for waiting, and return what was found in their order."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(look, items))


def size_problem(image: Path, annotated: tuple[int, int], what: str, channels: Channels = ANY) -> str:
    """Say why an image does not fit its annotation, by its head alone; nothing if it fits.

    Coordinates are those of the image as people see it, so a size that fits only the pixels as they are stored is a problem.

    Args:
        image: The file.
        annotated: Width and height that its annotation is for.
        what: The annotation, as in "its mask is".
        channels: How images are read.
    """
    try:
        upright, stored = channels.sizes(image)
    except ValueError as error:
        return str(error)
    if annotated == upright:
        return ""
    sizes = "{} x {} pixels and {} {} x {}".format(*upright, what, *annotated)
    if annotated == stored:
        return (
            f"{image}: is, turned upright by its EXIF orientation, {sizes}, as it is stored, where boxes and masks would be "
            "misplaced: annotate it as it is seen, or remove the orientation from the file"
        )
    return f"{image}: is {sizes}"


class Samples(Dataset[Any]):
    """A data set of a task. The last element of a sample is its problem: the names of images that could not be read, or "".

    For training the key is (epoch, index), or (epoch, index, copy) of one that is shown again: random numbers are seeded
    from it, so that a sample does not depend on the process that loads it, and an unreadable image is replaced by the next
    one. For evaluation the key is the index; -1, which pads a batch, and unreadable images give a blank sample, which
    metrics leave out.
    """

    seed = 0  # of the augmentation
    class_names: list[str]  # in the order of the labels
    channels = Channels()  # of the images
    places: Sequence[int] = ()  # of the classes among a model's, where `relabel` set them
    skipped: Sequence[str] = ()  # a line for each image that was left out when the data was opened
    notes: Sequence[str] = ()  # further lines about the data
    summary = ""  # how much there is of what, found by `check`
    hint = ""  # what to do where classes are missing, found by `count_classes`
    fewest_classes = 2  # of which a training set must hold something

    def relabel(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Take the classes of a model: their names, and the place of each class of the data among them."""
        self.class_names, self.places = list(names), places

    def place(self, label: int) -> int:
        """Return the number of a class as `class_names` has it."""
        return self.places[label] if self.places else label

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Count what there is of each class, where that takes no reading of all images.

        Returns:
            Counts by label, nothing where they are not known; what was counted; a line for each file that cannot be used.
        """
        return (), "", []

    def labels(self) -> list[int] | None:
        """Return the class of each image, where each has one and that takes no reading of images."""
        return None

    def named(self, index: int) -> str:
        """Return the name of an image's class, or of its labels, where that takes no reading of images."""
        labels = self.labels()
        return self.class_names[labels[index]] if labels else ""

    def files(self) -> list[Path]:
        """Return the image files, in the order of the samples; none where images come from elsewhere."""
        return []

    def drawn(self, index: int) -> Image.Image:
        """Return an image with its annotation drawn, if it has one beside its class.

        Raises:
            ValueError: If it cannot be read.
        """
        return in_colour(self.read(index)[0])

    def drawn_sample(self, sample: tuple[Any, ...]) -> Image.Image:
        """Return a training sample as it looks, with its annotation drawn."""
        raise NotImplementedError

    def check(self, name: str, limit: float) -> list[str]:
        """Return a line about the images that were left out, others about the data, and one about classes that are not there.

        Args:
            name: Of the split: training, of which there must be something to learn, or another.
            limit: Largest share of the images that may be left out.

        Raises:
            ValueError: If it is exceeded, or if too few classes are there.
        """
        counts, what, problems = self.count_classes()
        self.summary = f"{len(self):,} images, {len(self.class_names):,} class{'es' * (len(self.class_names) != 1)}"
        if counts and len(counts) > 1:
            self.summary += f", {spread(counts, self.class_names, what)}"
        whole, left_out = len(self) + len(self.skipped), [*self.skipped, *problems]
        if too_many(len(left_out), whole, limit):
            raise ValueError(
                f"{len(left_out)} of {whole} {name} images cannot be used, more than max_unreadable ({limit:.2%}) allows: "
                f"{_few(left_out)}"
            )
        lines = [f"{len(self.skipped)} {name} images left out: {_few(self.skipped)}"] if self.skipped else []
        unusable = [f"{len(problems)} images cannot be used: {_few(problems)}"] if problems else []
        lines += [f"{name} data: {note}" for note in (*self.notes, *unusable)]
        there = [name for name, count in zip(self.class_names, counts, strict=True) if count] if counts else []
        if len(there) == len(counts):
            return lines
        absent = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        line = f"{name} data: {len(absent)} of {len(counts)} classes have no {what}: {few(absent)}"
        if len(there) < (self.fewest_classes if name == "training" else 1):
            raise ValueError(f"{line}; there is nothing to tell apart but {few(there) or 'nothing'}{self.hint}")
        return [*lines, line + self.hint]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Any:
        """Read an image and its annotation.

        Raises:
            ValueError: If it cannot be read.
        """

    @abstractmethod
    def for_training(self, content: Any) -> tuple[Any, ...]:
        """Return a sample, without its problem, randomly augmented from what `read` returned."""

    @abstractmethod
    def for_evaluation(self, content: Any) -> tuple[Any, ...]:
        """Return a sample, without its problem, of what `read` returned; a blank one for None."""

    def _read(self, index: int) -> tuple[Any, list[str]]:
        """Return what `read` does, none if it cannot; and the problems there are."""
        with noted() as notes:
            try:
                return self.read(index), note_problems(notes)
            except ValueError as error:
                return None, [" ".join(str(error).splitlines())]

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Any, ...]:
        if isinstance(key, int):
            content, problems = self._read(key) if key >= 0 else (None, [])
            return (*self.for_evaluation(content), "\n".join(problems))
        index = key[1]
        seed_all(self.seed, *key)
        problems = []
        for other in range(index, index + MAX_UNREADABLE_IN_A_ROW):
            content, found = self._read(other % len(self))
            problems += found
            if content is not None:
                return (*self.for_training(content), "\n".join(problems))
        raise ValueError(f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read: {problems[0]}; {problems[1]}; ...")
