"""Batches of a data set: shuffled by epoch, split over processes, continued in the middle of an epoch."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from ..data.streaming import Stream

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, SLURM's preemption, SLURM's --signal=USR1@SECONDS


class TrainSampler(Sampler[tuple[int, ...]]):
    """Yields (epoch, index): a permutation that depends on seed and epoch alone, dealt out to the processes.

    With labels, (epoch, index, copy) of as many samples, equally many of each class: of a large class some are left out, others
    in every epoch, and of a small one some are shown again, which the number of the copy tells apart.

    Batch k of all processes together holds the same samples however many processes there are, as long as the batches together
    are equally large. Samples that do not fill a batch on every process are left out, others in every epoch.

    Args:
        samples: Number of samples.
        batch_size: Samples in a batch of one process.
        seed: Of the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        labels: Class of each sample, to show the classes equally often; none to show each sample once.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.samples, self.batch_size, self.seed, self.rank, self.world_size = samples, batch_size, seed, rank, world_size
        self.epoch = 0
        self.skip = 0  # samples of the next pass that a resumed run has done already, on all processes together

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples // (self.batch_size * self.world_size) * self.batch_size

    def _balanced(self, generator: torch.Generator) -> torch.Tensor:
        """Return the samples in order, with the number of the copy (samples, 2)."""
        assert self.labels is not None
        classes = self.labels.unique()
        classes = classes[torch.randperm(len(classes), generator=generator)]  # the first ones get what cannot be divided
        parts = []
        for place, label in enumerate(classes.tolist()):
            wanted, own = (self.samples + len(classes) - 1 - place) // len(classes), (self.labels == label).nonzero()[:, 0]
            for copy in range(-(-wanted // len(own))):
                drawn = own[torch.randperm(len(own), generator=generator)][: wanted - copy * len(own)]
                parts.append(torch.stack([drawn, torch.full_like(drawn, copy)], dim=1))
        return torch.cat(parts)[torch.randperm(self.samples, generator=generator)]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        # Times a prime above any number of epochs: no two pairs of seed and epoch give one permutation.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        balanced = self.labels is not None
        order = self._balanced(generator) if balanced else torch.randperm(self.samples, generator=generator)[:, None]
        skip, self.skip = self.skip, 0
        left = order[skip:]
        count = len(left) // (self.batch_size * self.world_size) * self.batch_size
        if skip and not count:  # larger batches than before the run was resumed: the rest is less than one of them
            count = len(left) // self.world_size // 2 * 2  # even, as mixup needs it
        epoch = self.epoch
        return iter([(epoch, *row) for row in left[self.rank :: self.world_size][:count].tolist()])


class EvalSampler(Sampler[int]):
    """Yields every index once over all processes; -1 fills up, so that each process has as many.

    Args:
        samples: Number of samples.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = list(range(rank, samples, world_size))
        self.indices += [-1] * (-(-samples // world_size) - len(self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SLURM's signals, which go to every process of a job: the process that trains handles them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StreamLoader(DataLoader[Any]):
    """A loader of a stream, whose length is the number of batches."""

    dataset: Stream

    def __len__(self) -> int:
        return self.dataset.batches(self.batch_size or 1, self.num_workers)


class DataModule(lightning.LightningDataModule):
    """Batches for training and validation, for any task.

    The position inside an epoch is part of Lightning's checkpoints, in samples, so that a run may be continued with other
    batches on other processes. Generators of random numbers are not: data sets seed them from (seed, epoch, index) for every
    sample, so a sample looks the same in whatever process, worker or run it is loaded.

    Args:
        train: Training set: maps (epoch, index) to a sample, or a `Stream`.
        held_out: Validation set: maps an index, or -1 for a sample that does not count, or a `Stream`.
        batch_size: Samples in a batch of one process.
        workers: Processes that load, for each process that trains.
        seed: Of the order.
        collate: Makes a batch of a list of samples.
        labels: Class of each training sample, to show the classes equally often.
    """

    def __init__(
        self,
        train: Any,
        held_out: Any,
        batch_size: int,
        workers: int,
        seed: int,
        collate: Callable[[list[Any]], Any],
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.batch_size, self.workers, self.seed = train, held_out, batch_size, workers, seed
        self.collate, self.labels = collate, labels
        self.epoch = -1  # the one inside which the run was resumed,
        self.done = 0  # the batches of it that were done then, of today's size,
        self.seen = 0  # and its samples that were done, on all processes

    @property
    def streams(self) -> bool:
        """Whether the training set is a stream, of which each worker gets a part."""
        return isinstance(self.train, Stream)

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return self.train.num_samples if isinstance(self.train, Stream) else len(self.train)

    def batches(self, world_size: int) -> int:
        """Count the training batches of each process in an epoch."""
        if isinstance(self.train, Stream):
            self.train.configure(training=True, world_size=world_size)
            return self.train.batches(self.batch_size, self.workers)
        return len(self.train) // (self.batch_size * world_size)

    def _settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "collate_fn": self.collate,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "worker_init_fn": _ignore_signals,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches of this process, from where a checkpoint left off."""
        assert self.trainer is not None
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        self.epoch = epoch
        if isinstance(self.train, Stream):
            self.train.configure(training=True, seed=self.seed, **place)
            self.train.set_epoch(epoch)
            self.train.skip(self.done, self.batch_size)
            return StreamLoader(self.train, drop_last=True, **self._settings())
        order = TrainSampler(len(self.train), self.batch_size, self.seed, **place, labels=self.labels)
        order.set_epoch(epoch)
        order.skip = self.seen
        return DataLoader(self.train, sampler=order, **self._settings())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches of this process, the same number on every process."""
        assert self.trainer is not None
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if isinstance(self.held_out, Stream):
            self.held_out.configure(training=False, **place)
            return StreamLoader(self.held_out, **self._settings())
        return DataLoader(self.held_out, sampler=EvalSampler(len(self.held_out), **place), **self._settings())

    def state_dict(self) -> dict[str, Any]:
        """Return how much of the current epoch is done: batches, and samples on all processes."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done = 0 if progress.is_last_batch else progress.current.processed  # type: ignore[attr-defined]
        samples = done * self.batch_size * self.trainer.world_size
        if done and self.trainer.current_epoch == self.epoch:
            samples += self.seen - self.done * self.batch_size * self.trainer.world_size
        return {"done": done, "samples": samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the samples that are done."""
        self.done, self.seen = state_dict["done"], state_dict["samples"]

    def move(self, checkpoint: dict[str, Any], before: Mapping[str, Any]) -> None:
        """Count the batches of the epoch that are done in those of now, so that it ends where an epoch does.

        Args:
            checkpoint: Lightning's, whose place inside the epoch is changed.
            before: What it says of its run.

        Raises:
            ValueError: If the rest of the epoch cannot be dealt out.
        """
        assert self.trainer is not None
        state = checkpoint["DataModule"]
        if not state["done"]:
            return
        world_size, recipe = self.trainer.world_size, before.get("recipe", {})
        batch_size, workers = (recipe.get(name, getattr(self, name)) for name in ("batch_size", "workers"))
        processes = before.get("processes", world_size)
        seen = state.setdefault("samples", state["done"] * batch_size * processes)
        if isinstance(self.train, Stream):
            if (batch_size, max(1, workers), processes) != (self.batch_size, max(1, self.workers), world_size):
                raise ValueError(
                    f"inside an epoch, a stream is continued as it was begun, with batch_size {batch_size}, workers {workers}, "
                    f"processes {processes}: continue with these, and change them after the end of an epoch"
                )
            return
        left = len(self.train) - seen
        if left < 2 * world_size:
            raise ValueError(
                f"{max(0, left)} images of the epoch are left for {world_size} processes: continue with fewer, or with the "
                "data set that the run began with"
            )
        total = self.batch_size * world_size
        done = len(self.train) // total - (left // total or 1)
        current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        for name in current:
            current[name] += done - state["done"]
        state["done"] = done
