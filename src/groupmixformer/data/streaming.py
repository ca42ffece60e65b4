"""Data sets that are read as a stream, split over processes and workers without repeats.

timm's readers give each worker whole shards, and then repeat or drop samples until all have equally many. Here the length of
every shard is known before the first is read, so every worker of every process gets an equal range of all samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .channels import AnyImage, Channels
from .images import noted
from .samples import note_problems
from .seeding import seed_all
from .sources import HuggingFace, Sample, Source, WebDataset

SHUFFLE_BUFFER = 2048  # undecoded images from which a worker draws the next


class Stream(IterableDataset[tuple[Any, int, str]]):
    """Yields (transformed image, class, problem); `problem` names an image that could not be read, or is "".

    The shards form a ring, for training in an order and from a start that depend on seed and epoch alone, and each worker reads
    one range of it. Training shuffles again within the range, and drops the remainder of the division into ranges, different
    samples in each epoch; evaluation pads with zeros of class -1, which metrics leave out. An unreadable image is replaced in
    training by the next readable one of its range (by the last, if none follows), and in evaluation by zeros of class -1. So
    every process always has equally many samples.

    Random numbers are seeded for every training sample from seed, epoch, range and position.

    Args:
        source: Where the samples come from.
        transform: Makes of an image what is yielded; none for the image itself.
        channels: How images are read.

    Attributes:
        class_names: Names of the classes.
        num_samples: Number of samples in the split.
        notes: Lines about the data.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Any] | None = None, channels: Channels | None = None) -> None:
        super().__init__()
        self.transform, self.channels = transform, channels or Channels()
        self.source, self.class_names, self.num_samples = source, source.class_names, sum(source.lengths)
        self.places: Sequence[int] = range(len(self.class_names))
        self.notes: Sequence[str] = ()
        self.training, self.seed, self.rank, self.world_size = False, 0, 0, 1
        # Epoch, batches to skip, their size: shared, because workers that persist hold copies of everything else.
        self._place = torch.zeros(3, dtype=torch.int64).share_memory_()

    def relabel(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Take the classes of a model: their names, and the place of each class of the data among them."""
        self.class_names, self.places = list(names), places

    def configure(self, *, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Set the mode and the process; call it before workers start."""
        self.training, self.seed, self.rank, self.world_size = training, seed, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, also for workers that are already running."""
        if epoch != self._place[0]:
            self._place[:] = torch.tensor([epoch, 0, 0])

    def skip(self, batches: int, batch_size: int) -> None:
        """Skip the first batches of the current epoch, which a resumed run has done: they are read, not decoded."""
        self._place[1:] = torch.tensor([batches, batch_size])

    def batches(self, batch_size: int, workers: int) -> int:
        """Return the number of batches of a loader in each process; training drops those that are not full."""
        part = self._part(max(1, workers))
        return max(1, workers) * (part // batch_size if self.training else -(-part // batch_size))

    def _part(self, workers: int) -> int:
        """Length of the range of a worker."""
        parts = self.world_size * workers
        return self.num_samples // parts if self.training else -(-self.num_samples // parts)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        length, shards = self._part(workers), list(range(len(self.source.lengths)))
        if not self.training:
            return self._evaluate(self._range(shards, (self.rank * workers + worker) * length, length), length)
        epoch, batches, batch_size = self._place.tolist()
        worker = (worker + batches) % workers  # the loader takes batches from its workers in turn: resume with the next one
        part = self.rank * workers + worker
        rng = np.random.default_rng([self.seed, epoch])
        shards, first = rng.permutation(shards).tolist(), int(rng.integers(max(1, self.num_samples)))
        samples = self._range(shards * 2, first + part * length, length)
        samples = _shuffle(samples, np.random.default_rng([self.seed, epoch, part]))
        return self._train(samples, -(-(batches - worker) // workers) * batch_size, (self.seed, epoch, part))

    def _range(self, shards: Iterable[int], first: int, count: int) -> Iterator[Sample]:
        """Yield `count` samples from `first` on, of all the shards joined."""
        for shard in shards:
            name, length = self.source.shards[shard], self.source.lengths[shard]
            start, stop = min(first, length), min(first + count, length)
            first, count = first - start, count - (stop - start)
            if start == stop:
                continue
            samples, found = self.source.read(shard, start), start
            for sample in islice(samples, stop - start):
                found += 1
                yield sample
            if found < stop:
                raise ValueError(f"{name}: holds fewer than {length} samples")
            if stop == length and next(samples, None) is not None:
                raise ValueError(f"{name}: holds more than {length} samples")

    def _read(self, sample: Sample) -> tuple[tuple[AnyImage, int], str]:
        """Decode a sample, and say what is to be said of it; ValueError if its image or its class cannot be used."""
        content, label, name = sample
        if content is None:
            raise ValueError(f"{name}: holds no image")
        try:
            index = int(label)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < len(self.places):
            raise ValueError(f"{name}: got class {label!r}, expected 0 to {len(self.places) - 1}")
        with noted() as notes:
            return (self.channels.decode(content, name), self.places[index]), "\n".join(note_problems(notes))

    def _transformed(self, image: AnyImage) -> Any:
        return self.transform(image) if self.transform else image

    def _train(self, samples: Iterator[Sample], skip: int, keys: tuple[int, ...]) -> Iterator[tuple[Any, int, str]]:
        waiting: list[tuple[int, str]] = []  # places of unreadable images, and what is wrong with them
        last: tuple[AnyImage, int] | None = None

        def flush() -> Iterator[tuple[Any, int, str]]:
            for place, problem in waiting:
                assert last is not None
                seed_all(*keys, place)
                yield self._transformed(last[0]), last[1], problem
            waiting.clear()

        for place, sample in enumerate(samples):
            if place < skip - 1:  # the last skipped sample may have to replace the next one
                continue
            try:
                last, problem = self._read(sample)
            except ValueError as error:
                usable, problem = False, str(error)
            else:
                usable = True
            if place >= skip:
                waiting.append((place, problem))
            if usable:
                yield from flush()
        if waiting and last is None:
            raise ValueError(f"no image can be read: {waiting[0][1]}")
        yield from flush()

    def _evaluate(self, samples: Iterator[Sample], length: int) -> Iterator[tuple[Any, int, str]]:
        blank = self._transformed(self.channels.blank())
        blank = torch.zeros_like(blank) if isinstance(blank, torch.Tensor) else blank
        for sample in samples:
            length -= 1
            try:
                (image, label), problem = self._read(sample)
            except ValueError as error:
                yield blank, -1, str(error)
                continue
            yield self._transformed(image), label, problem
        for _ in range(length):
            yield blank, -1, ""


def _shuffle(samples: Iterator[Sample], rng: np.random.Generator) -> Iterator[Sample]:
    """Draw each sample from the next `SHUFFLE_BUFFER` ones."""
    buffer = list(islice(samples, SHUFFLE_BUFFER))
    for sample in samples:
        drawn = int(rng.integers(len(buffer)))
        sample, buffer[drawn] = buffer[drawn], sample
        yield sample
    yield from (buffer[drawn] for drawn in rng.permutation(len(buffer)))


def open_source(name: str, root: str, split: str) -> Source:
    """Find a data set that is read as a stream, and which classes and how many samples it has.

    Args:
        name: ``wds/NAME`` for WebDataset shards; ``hfids/NAME`` for a data set of the Hugging Face Hub, or a local folder in
            one of their formats.
        root: Folder or URL (http, https, hf, or another of fsspec's) where ``wds/`` shards lie, with their `_info.json`, either
            under NAME or itself.
        split: train or validation.

    Raises:
        ValueError: If there is no such data set, or it does not say which classes and how many samples it has.
    """
    kind, _, place = name.partition("/")
    return WebDataset(place, root, split) if kind == "wds" else HuggingFace(place, split)


def open_stream(name: str, root: str, split: str, transform: Callable[[Image.Image], Any] | None = None) -> Stream:
    """Open a data set that `open_source` finds, with what is made of its images."""
    return Stream(open_source(name, root, split), transform)
