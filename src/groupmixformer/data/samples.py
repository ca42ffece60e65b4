"""Map-style data sets: a sample by its index, seeded where it is loaded, replaced where its image cannot be read."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import Dataset

from .images import noted
from .seeding import seed_all

MAX_UNREADABLE_IN_A_ROW = 100  # then training stops: it is not a matter of single files
NOTE = "\0"  # begins a problem that does not make an image unreadable, and parts its name from what is said

LOGGER = logging.getLogger(__name__)


def too_many(unreadable: int, images: int, limit: float) -> bool:
    """Whether there are more unreadable images than a share of all; one is always allowed, unless the share is 0."""
    return unreadable > (max(1, limit * images) if limit else 0)


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


class Samples(Dataset[Any]):
    """A data set of a task. The last element of a sample is its problem: the names of images that could not be read, or "".

    For training the key is (epoch, index): random numbers are seeded from seed, epoch and index, so that a sample does not
    depend on the process that loads it, and an unreadable image is replaced by the next one. For evaluation the key is the
    index; -1, which pads a batch, and unreadable images give a blank sample, which metrics leave out.
    """

    seed = 0  # of the augmentation
    skipped: Sequence[str] = ()  # a line for each image that was left out when the data was opened
    dropped: Sequence[str] = ()  # a line for each object that was left out of its image
    notes: Sequence[str] = ()  # further lines about the data

    def left_out(self, name: str, limit: float) -> list[str]:
        """Return a line about the images, and one about the objects, that were left out, if any.

        Args:
            name: Of the split.
            limit: Largest share of the images that may be left out.

        Raises:
            ValueError: If it is exceeded.
        """
        whole = len(self) + len(self.skipped)
        if too_many(len(self.skipped), whole, limit):
            raise ValueError(
                f"{len(self.skipped)} of {whole} {name} images cannot be used, more than max_unreadable ({limit:.2%}) allows: "
                f"{_few(self.skipped)}"
            )
        kinds = {"images": self.skipped, "objects": self.dropped}
        lines = [f"{len(lines)} {name} {kind} left out: {_few(lines)}" for kind, lines in kinds.items() if lines]
        return [*lines, *(f"{name} data: {note}" for note in self.notes)]

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

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        if isinstance(key, int):
            content, problems = self._read(key) if key >= 0 else (None, [])
            return (*self.for_evaluation(content), "\n".join(problems))
        epoch, index = key
        seed_all(self.seed, epoch, index)
        problems = []
        for other in range(index, index + MAX_UNREADABLE_IN_A_ROW):
            content, found = self._read(other % len(self))
            problems += found
            if content is not None:
                return (*self.for_training(content), "\n".join(problems))
        raise ValueError(f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read: {problems[0]}; {problems[1]}; ...")
