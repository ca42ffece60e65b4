"""A run: one folder with recipe, versions, metrics, checkpoints and the best model; started, stopped, continued, recorded."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from timm.layers import convert_sync_batchnorm
from torch import nn

from ..files import write_file, write_rows
from ..run_folder import METRICS, RECIPE, UNREADABLE, read_metrics, write_versions
from .loaders import STOP_SIGNALS
from .module import Task
from .recipe import Recipe, write_recipe


class Stopped(BaseException):
    """A signal asked the run to stop; it was saved first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary name beside it and renames it, so that there is always a whole one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` as the file `path`.

        Raises:
            OSError: If it cannot be written; the file that was there before is intact.
        """
        path = Path(path)
        temporary = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            intact = f"; the checkpoint before it, {path}, is intact" if path.exists() else ""
            raise OSError(f"{path}: the checkpoint could not be written (is the disk full?): {error}{intact}") from error


class Keep(Callback):
    """Saves the run's state after every epoch, every few minutes, and when a signal asks the run to stop."""

    def __init__(self, path: Path, minutes: float, accumulate: int) -> None:
        self.path, self.seconds, self.accumulate = path, 60 * minutes, accumulate
        self.received = 0
        self.saved = time.monotonic()
        self.handlers: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print(f"{signal.Signals(number).name}: saving after this step, then stopping", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listen to signals, in place of Lightning, which stops without saving."""
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leave the signals to those who had them."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _save(self, trainer: lightning.Trainer, due: bool) -> None:
        number, now = self.received, int(due)
        if trainer.world_size > 1:  # what one process was told, all must do
            flags = torch.tensor([number, due], dtype=torch.float32, device=trainer.strategy.root_device)
            reduced = trainer.strategy.reduce(flags, reduce_op="max")
            assert isinstance(reduced, torch.Tensor)
            number, now = (int(flag) for flag in reduced.tolist())
        if number or now:
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
        if number:
            raise Stopped(number)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, between two steps; the last step leaves it to the end of the epoch."""
        if (batch_idx + 1) % self.accumulate == 0 and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer, time.monotonic() - self.saved > self.seconds)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the epoch. Comes after `Record`, so that what it wrote belongs to the checkpoint."""
        self._save(trainer, due=True)


NOTES = {"skipped_steps": "steps skipped", "unreadable": "images unreadable"}


class Patience(EarlyStopping):
    """Ends a run that does not become better, also one that is resumed after its end, by the patience of the recipe now."""

    def __init__(self, monitor: str, patience: int) -> None:
        # At the end of validation: Lightning calls it at the end of the epoch after `Keep`, which has to save what it counted.
        super().__init__(monitor, patience=patience, mode="max", check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was counted."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop before the first step where the patience was over."""
        trainer.should_stop = self.wait_count >= self.patience


class Record(Callback):
    """Writes a row of metrics.csv after every epoch, keeps the best model in the run folder and says how it goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = -1.0
        self.seconds = 0.0  # of the run, over all its parts
        self.start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best, "seconds": self.seconds + time.monotonic() - self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best accuracy of the run that is resumed."""
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop the rows of epochs that a resumed run does again."""
        self.start = time.monotonic()
        if trainer.is_global_zero:
            done = [row for row in read_metrics(self.folder) if row["epoch"] < trainer.current_epoch]
            write_rows(self.folder / METRICS, done)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell a stream, which has no sampler that Lightning could tell."""
        assert isinstance(pl_module, Task)
        if hasattr(pl_module.loaders.train, "set_epoch"):
            pl_module.loaders.train.set_epoch(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch; keep the model if it is the best so far."""
        assert isinstance(pl_module, Task)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        best = metrics[pl_module.monitor] > self.best
        self.best = max(self.best, metrics[pl_module.monitor])
        model = pl_module.whole_model() if best else None  # all processes take part where the weights are sharded
        unreadable = pl_module.all_unreadable()
        pl_module.check_unreadable(unreadable)  # a process counts its own as they come; here are those of all
        if not trainer.is_global_zero:
            return
        seconds = self.seconds + time.monotonic() - self.start
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[-1]["lr"],
            "loss": metrics["train_loss"],
            **{name: value for name, value in metrics.items() if name.startswith("val_")},
            "skipped_steps": pl_module.skipped,
            "unreadable": len(unreadable),
            "seconds": round(seconds, 1),
        }
        write_rows(self.folder / METRICS, [*read_metrics(self.folder), row])
        if unreadable:
            write_file(self.folder / UNREADABLE, "".join(f"{line}\n" for line in unreadable))
        if model is not None:
            pl_module.save(model, self.folder)
        done, epochs = trainer.current_epoch + 1, pl_module.recipe.epochs
        measured = "  ".join(
            f"{name.removeprefix('val_')} {metrics[name]:.4f}"
            for name in sorted(row)
            if name.startswith("val_") and name != "val_images"
        )
        noted = "".join(f"  {row[name]:.0f} {text}" for name, text in NOTES.items() if row[name])
        print(
            f"epoch {done}/{epochs}  training loss {row['loss']:.4f}  held out: {measured}{noted}  "
            f"{seconds:.0f} s, {seconds / done * (epochs - done):.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def is_first_process() -> bool:
    """Whether this is the process that writes and reports."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def _processes(recipe: Recipe) -> tuple[int, int]:
    """Processes on each machine, and machines: those that torchrun or SLURM started, or the recipe's."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return recipe.devices, recipe.nodes


def _strategy(recipe: Recipe, world_size: int) -> Strategy | str:
    if recipe.strategy == "fsdp":
        return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # Every parameter of every model has a gradient, so DDP need not look for those that have none.
    return DDPStrategy(gradient_as_bucket_view=True) if world_size > 1 else "auto"


def _say_how(task: Task, world_size: int, device: str) -> None:
    """Print the total batch and the learning rate that comes of it, and what a user could miss."""
    recipe, optimizer = task.recipe, task.recipe.optimizer
    scaled = f" = {optimizer.lr:g} x {task.total_batch}/{optimizer.lr_batch}" if optimizer.lr_batch else ""
    print(
        f"total batch {task.total_batch} = {recipe.batch_size} images x {world_size} processes x {recipe.accumulate} "
        f"accumulated; {optimizer.name}, peak learning rate {optimizer.lr * task.rate_scale:g}{scaled}; "
        f"{task.steps_per_epoch} steps an epoch",
        file=sys.stderr,
    )
    if world_size > 1 and device == "cpu" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
        print("BatchNorm is not synchronised over the processes: PyTorch does that on GPUs only", file=sys.stderr)


def train(recipe: Recipe, build_task: Callable[[Recipe, int], Task], resume: bool = False) -> Path:
    """Train by a recipe into its run folder, on one process or as one of several.

    The folder holds recipe.yaml, versions.json, metrics.csv, TensorBoard events, checkpoints/last.ckpt, and the model of the
    best epoch as model.safetensors and config.json, so the folder itself is a checkpoint for every command, timm and
    transformers.

    Args:
        recipe: The settings.
        build_task: Takes the recipe and the number of processes, opens the data and creates what is trained.
        resume: Continue from the folder's last checkpoint, if there is one.

    Returns:
        The run folder.

    Raises:
        ValueError: If the data, model or folder cannot be used, or training goes wrong in a way that the recipe limits.
        OSError: If a file cannot be written.
        Stopped: If a signal stopped the run, after it was saved.
    """
    folder = Path(recipe.out)
    devices, nodes = _processes(recipe)
    world_size = devices * nodes
    first = is_first_process()
    if first:
        if (folder / RECIPE).exists() and not resume:
            raise ValueError(f"{folder}: holds a run already: continue it with --resume, or choose another folder with --out")
        folder.mkdir(parents=True, exist_ok=True)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    task = build_task(recipe, world_size)
    if recipe.compile:
        task.compile_model()
    if first:
        write_recipe(recipe, folder / RECIPE)
        write_versions(folder)

    callbacks: list[Callback] = [LearningRateMonitor(logging_interval="step")]
    if recipe.patience is not None:
        callbacks.append(Patience(task.monitor, recipe.patience))
    callbacks += [Record(folder), Keep(recipe.last_checkpoint, recipe.save_minutes, recipe.accumulate)]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a recipe's choice
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's, about PyTorch
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # timm's schedulers are not torch's
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")  # `Loaders` is
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # metrics.csv has every epoch
        warnings.filterwarnings("ignore", ".*has `__len__` defined.*")  # a stream's is exact
        warnings.filterwarnings("ignore", ".*sync_dist.*")  # metrics are computed over all processes before they are logged
        warnings.filterwarnings("ignore", ".*in eval mode at the start.*")  # the averaged model
        trainer = lightning.Trainer(
            accelerator=recipe.device,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(recipe, world_size),
            precision=recipe.precision,
            use_distributed_sampler=False,  # `Loaders` deals the samples out
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            deterministic=recipe.deterministic,
            logger=TensorBoardLogger(folder, name="", version=""),
            callbacks=callbacks,
            plugins=[AtomicCheckpoints(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
            enable_checkpointing=False,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=recipe.log_steps,
        )
        device = trainer.strategy.root_device.type
        if world_size > 1 and device != "cpu":
            task.model = convert_sync_batchnorm(task.model)  # timm's, which keeps the activation of its BatchNormAct2d
        if first:
            _say_how(task, world_size, device)
            for note in task.notes:
                print(note, file=sys.stderr)
        last = recipe.last_checkpoint
        start = str(last) if resume and last.exists() else None
        try:
            trainer.fit(task, datamodule=task.loaders, ckpt_path=start, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return folder
