"""What a run tells of itself: the network, how far it is inside an epoch, and the loggers that it reports to."""

import copy
import importlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..files import duration
from .module import Task
from .recipe import Recipe

COLUMNS = 80
SECONDS = 60.0  # between lines inside an epoch


def lines(parts: Iterable[str]) -> str:
    """Join parts by two spaces, in lines of 80 columns; the second and further ones are indented."""
    made = [""]
    for part in parts:
        if made[-1] and len(made[-1]) + 2 + len(part) > COLUMNS:
            made.append(f"    {part}")
        else:
            made[-1] += f"  {part}" if made[-1] else part
    return "\n".join(made)


def macs_of(network: nn.Module, side: int, in_chans: int = 3) -> float | None:
    """Count the multiply-adds of a square image without computing anything; none where a network cannot be run like that."""
    try:
        network = copy.deepcopy(network).to("meta").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, in_chans, side, side, device="meta"))
    except Exception:  # whatever the networks of others do with a tensor that holds nothing
        return None
    return counter.get_total_flops() / 2


def describe_network(task: Task) -> list[str]:
    """Say what is trained: name, parameters, multiply-adds of an image of the recipe's size, classes."""
    recipe = task.recipe
    parameters = [parameter.numel() for parameter in task.model.parameters()]
    trained = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    told = [f"model {recipe.model}", f"{sum(parameters) / 1e6:.2f} M parameters"]
    if trained < sum(parameters):
        told.append(f"of which {trained / 1e6:.2f} M are trained")
    what, network = task.counted
    if macs := macs_of(network, recipe.image_size, recipe.in_chans):
        told.append(f"{macs / 1e9:.2f} GMACs{what} at {recipe.image_size} x {recipe.image_size}")
    return [*told, f"{len(task.class_names):,} classes"] if task.class_names else told


class EpochBar(RichProgressBar):
    """Lightning's bar on a terminal, with epochs that count from 1 as everywhere else."""

    def __init__(self) -> None:
        super().__init__(console_kwargs={"stderr": True})

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


class StepLines(Callback):
    """Tells where stderr is no terminal, once a minute, how far the epoch is and how long the rest of it takes."""

    first: int | None = None  # batch of this epoch in this process

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to measure, for a run that continues inside an epoch."""
        self.begun = self.told = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to measure."""
        self.begun = self.told = time.monotonic()
        self.first = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it if a minute is over."""
        assert isinstance(pl_module, Task)
        now, recipe = time.monotonic(), pl_module.recipe
        self.first = batch_idx if self.first is None else self.first
        if now - self.told < SECONDS or not trainer.is_global_zero:
            return
        self.told = now
        done, steps = (batch_idx + 1) // recipe.grad_accum_steps, pl_module.steps_per_epoch
        pace = (now - self.begun) / (batch_idx + 1 - self.first)  # seconds a batch
        left = pace * max(0, steps * recipe.grad_accum_steps - batch_idx - 1)
        told = [f"epoch {trainer.current_epoch + 1}/{recipe.epochs}", f"step {done:,}/{steps:,}"]
        told += [f"loss {float(outputs['loss']):.4f}", f"{duration(left)} left in this epoch"]
        print(lines(told), file=sys.stderr, flush=True)


def make_loggers(recipe: Recipe, folder: Path) -> list[Logger]:
    """Create the loggers that a recipe names; metrics.csv does not depend on them.

    Raises:
        ModuleNotFoundError: If the package of one is missing.
    """

    def make(name: str) -> Logger:
        if name == "tensorboard":
            return TensorBoardLogger(folder, name="", version="")
        if name == "csv":
            return CSVLogger(folder, name="", version="steps")
        importlib.import_module(name)  # Lightning's error would not tell which package is missing
        if name == "wandb":
            logger: Any = WandbLogger(name=folder.name, project="groupmixformer", save_dir=folder)
        else:
            place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
            logger = MLFlowLogger("groupmixformer", folder.name, place)
        logger.log_hyperparams(asdict(recipe))
        return logger

    return [make(name) for name in recipe.loggers]
