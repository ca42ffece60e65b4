"""Map-style data sets: a sample by its index, seeded where it is loaded, replaced where its image cannot be read."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .seeding import seed_all

MAX_UNREADABLE_IN_A_ROW = 100  # then training stops: it is not a matter of single files


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

    def left_out(self, name: str, limit: float) -> list[str]:
        """Return a line about the images, and one about the objects, that were left out, if any.

        Args:
            name: Of the split.
            limit: Largest share of the images that may be left out.

        Raises:
            ValueError: If it is exceeded.
        """
        whole = len(self) + len(self.skipped)
        if len(self.skipped) > limit * whole:
            raise ValueError(
                f"{len(self.skipped)} of {whole} {name} images cannot be used, more than max_unreadable ({limit:.2%}) allows: "
                f"{_few(self.skipped)}"
            )
        kinds = {"images": self.skipped, "objects": self.dropped}
        return [f"{len(lines)} {name} {kind} left out: {_few(lines)}" for kind, lines in kinds.items() if lines]

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

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        problems: list[str] = []
        if isinstance(key, int):
            content, problem = None, ""
            if key >= 0:
                try:
                    content = self.read(key)
                except ValueError as error:
                    problem = str(error)
            return (*self.for_evaluation(content), problem)
        epoch, index = key
        seed_all(self.seed, epoch, index)
        for other in range(index, index + MAX_UNREADABLE_IN_A_ROW):
            try:
                content = self.read(other % len(self))
            except ValueError as error:
                problems.append(str(error))
                continue
            return (*self.for_training(content), "\n".join(problems))
        raise ValueError(f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read: {problems[0]}; {problems[1]}; ...")
