"""How fast a run goes: its steps are measured, and how long the loop waits for batches."""

import math
import os
import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from ..threads import ThreadChoice
from .module import Task

BOUND = 0.1  # share of the time: a loop that waits longer is bounded by its loader
ENOUGH = 8  # batches to judge by


def workers_needed(workers: int, wait: float, step: float) -> int:
    """Return how many workers load a batch in the seconds of a step, where so many let it wait."""
    load = workers * (wait + step) if workers else wait  # seconds of one worker for a batch
    return math.ceil(load / step)


class LoaderProfiler(Profiler):
    """Measures the seconds that the loop waits for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def start(self, action_name: str) -> None:
        """Begin, if a batch is asked for."""
        if action_name.endswith("train_dataloader_next"):
            self.begun = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Note how long it took."""
        if action_name.endswith("train_dataloader_next"):
            self.waits.append(time.perf_counter() - self.begun)


class PaceCallback(Callback):
    """Sets the number of threads step by step, and says once if the loader and not the network bounds the run.

    Args:
        threads: Chooses the number; none to leave it alone.

    Attributes:
        loading: The Trainer's profiler.
        waiting: Share of the epoch's time that the loop waited for batches.
    """

    def __init__(self, threads: ThreadChoice | None, grad_accum_steps: int) -> None:
        self.threads, self.grad_accum_steps = threads, grad_accum_steps
        self.before = torch.get_num_threads()
        self.loading, self.steps = LoaderProfiler(), list[float]()
        self.waiting, self.told = 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the choice of threads."""
        return self.threads.state_dict() if self.threads else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        if self.threads:
            self.threads.load_state_dict(state_dict)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Set the number of threads that there was before, among which the next run of this process chooses."""
        if self.threads:
            torch.set_num_threads(self.before)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to measure."""
        self.loading.waits, self.steps = [], []

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the number of threads."""
        if self.threads:
            self.threads.use()
        self.begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure; a step is over when the weights were updated."""
        self.steps.append(time.perf_counter() - self.begun)
        if self.threads and (batch_idx + 1) % self.grad_accum_steps == 0:
            self.threads.took(sum(self.steps[-self.grad_accum_steps :]))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell how many workers would suffice, if batches come too slowly. The first one is late for other reasons."""
        assert isinstance(pl_module, Task)
        waits = self.loading.waits[1 : len(self.steps)]
        if not waits:
            return
        wait, step, workers = sum(waits) / len(waits), sum(self.steps) / len(self.steps), pl_module.loaders.workers
        self.waiting = wait / (wait + step)
        if self.waiting < BOUND or len(waits) < ENOUGH or self.told or not trainer.is_global_zero:
            return
        self.told = True
        wanted, cores = workers_needed(workers, wait, step), os.cpu_count() or 1
        print(
            f"the loader bounds this run: {self.waiting:.0%} of the time goes on waiting for batches, {wait:.2g} s for each, "
            f"which trains for {step:.2g} s: --workers {wanted} would suffice"
            + (f", but this machine has {cores} cores" if wanted > cores else ""),
            file=sys.stderr,
        )
