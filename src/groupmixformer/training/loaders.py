"""Batches of a data set: shuffled by epoch, split over processes, continued in the middle of an epoch."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from ..data.streaming import Stream

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, SLURM's preemption, SLURM's --signal=USR1@SECONDS


class TrainSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index): a permutation that depends on seed and epoch alone, dealt out to the processes.

    Batch k of all processes together holds the same samples however many processes there are, as long as the batches together
    are equally large. Samples that do not fill a batch on every process are left out, others in every epoch.

    Args:
        samples: Number of samples.
        batch_size: Samples in a batch of one process.
        seed: Of the permutations.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.samples, self.batch_size, self.seed, self.rank, self.world_size = samples, batch_size, seed, rank, world_size
        self.epoch = 0
        self.skip = 0  # batches of the next pass that a resumed run has done already

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples // (self.batch_size * self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Times a prime above any number of epochs: no two pairs of seed and epoch give one permutation.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=generator)
        mine = order[self.rank :: self.world_size][: len(self)]
        first, self.skip = self.skip * self.batch_size, 0
        epoch = self.epoch
        return iter([(epoch, index) for index in mine[first:].tolist()])


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

    The position inside an epoch is part of Lightning's checkpoints. Generators of random numbers are not: data sets seed them
    from (seed, epoch, index) for every sample, so a sample looks the same in whatever process, worker or run it is loaded.

    Args:
        train: Training set: maps (epoch, index) to a sample, or a `Stream`.
        held_out: Validation set: maps an index, or -1 for a sample that does not count, or a `Stream`.
        batch_size: Samples in a batch of one process.
        workers: Processes that load, for each process that trains.
        seed: Of the order.
        collate: Makes a batch of a list of samples.
    """

    def __init__(
        self, train: Any, held_out: Any, batch_size: int, workers: int, seed: int, collate: Callable[[list[Any]], Any]
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.batch_size, self.workers, self.seed = train, held_out, batch_size, workers, seed
        self.collate = collate
        self.done = 0  # batches of the current epoch

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
        done, self.done = self.done, 0
        if isinstance(self.train, Stream):
            self.train.configure(training=True, seed=self.seed, **place)
            self.train.set_epoch(epoch)
            self.train.skip(done, self.batch_size)
            return StreamLoader(self.train, drop_last=True, **self._settings())
        order = TrainSampler(len(self.train), self.batch_size, self.seed, **place)
        order.set_epoch(epoch)
        order.skip = done
        return DataLoader(self.train, sampler=order, drop_last=True, **self._settings())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches of this process, the same number on every process."""
        assert self.trainer is not None
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if isinstance(self.held_out, Stream):
            self.held_out.configure(training=False, **place)
            return StreamLoader(self.held_out, **self._settings())
        return DataLoader(self.held_out, sampler=EvalSampler(len(self.held_out), **place), **self._settings())

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches that are done in the current epoch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"done": 0 if progress.is_last_batch else progress.current.processed}  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that are done."""
        self.done = state_dict["done"]
