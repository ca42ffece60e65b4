"""A run by a recipe: processes, strategy, Lightning's Trainer, and the run folder that it writes."""

import contextlib
import logging
import os
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from timm.layers import convert_sync_batchnorm
from torch import nn

from ..data.samples import Samples
from ..files import printable
from ..run_folder import CHECKPOINT, PREVIOUS, RECIPE, SPLIT, VERSIONS, WEIGHTS, write_versions
from ..threads import ThreadChoice
from .callbacks import AtomicCheckpoints, CheckpointCallback, EarlyStopping, MetricsCallback, writing
from .claim import Claim
from .module import Task
from .pace import PaceCallback
from .progress import COLUMNS, EpochBar, StepLines, describe_network, lines, make_loggers
from .recipe import Recipe, write_recipe
from .resume import Start, changes, check_classes, find_start

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # the recipe's names and Lightning's
START = timedelta(seconds=float(os.environ.get("GMF_START_SECONDS", 300)))  # that processes wait for each other at the start

PARENT = "GMF_PARENT"  # environment variable: number of the process that starts the others


def is_first_process() -> bool:
    """Whether this is the process that writes and reports."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def processes(recipe: Recipe) -> tuple[int, int]:
    """Processes on each machine, and machines: those that torchrun or SLURM started, or the recipe's."""
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return recipe.devices, recipe.nodes


class _InTime:
    """A strategy whose processes wait for each other for a limited time at the start, and then as long as PyTorch has it."""

    _timeout: timedelta | None

    def setup_environment(self) -> None:
        usual, self._timeout = self._timeout, START
        try:
            super().setup_environment()  # type: ignore[misc]
        except torch.distributed.DistError as error:
            raise OSError(
                f"not all processes have come within {START.total_seconds():g} s (GMF_START_SECONDS): see what ended the others"
            ) from error
        # Public from PyTorch 2.13 on.
        distributed: Any = torch.distributed
        set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
        set_timeout(usual)


class _DDP(_InTime, DDPStrategy):
    pass


class _ModelParallel(_InTime, ModelParallelStrategy):
    pass


def _on_cuda(recipe: Recipe) -> bool:
    return recipe.device in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def with_precision(recipe: Recipe) -> Recipe:
    """Return a recipe whose precision is not ``auto``."""
    if recipe.precision != "auto":
        return recipe
    bf16 = _on_cuda(recipe) and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(recipe, precision="bf16" if bf16 else "fp32")


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what Lightning warns of and a recipe means, or this package does otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(not have many workers|worker processes in total).*")  # a recipe's choice
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's, about PyTorch
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # timm's schedulers are not torch's
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")  # `DataModule` is
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # metrics.csv has every epoch
        warnings.filterwarnings("ignore", ".*has `__len__` defined.*")  # a stream's is exact
        warnings.filterwarnings("ignore", ".*sync_dist.*")  # metrics are computed over all processes before they are logged
        warnings.filterwarnings("ignore", ".*in eval mode at the start.*")  # the EMA model
        yield


def _threads(recipe: Recipe, world_size: int) -> ThreadChoice | None:
    """Return what sets the number of threads; none for several processes, to which Lightning deals out the cores."""
    if recipe.threads != "auto":
        return ThreadChoice(recipe.threads)
    cpu = recipe.device == "cpu" or (recipe.device == "auto" and not torch.accelerator.is_available())
    return ThreadChoice() if cpu and world_size == 1 and not recipe.deterministic else None


def _strategy(recipe: Recipe, world_size: int) -> Strategy | str:
    if recipe.strategy == "fsdp":
        return _ModelParallel(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # Every parameter of every model has a gradient, so DDP need not look for those that have none.
    return _DDP(gradient_as_bucket_view=True) if world_size > 1 else "auto"


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, by which it would wait for others that never come."""
    # Lightning's processes inherit it: the first may have ended before this one came here.
    parent = os.getppid() if TorchElasticEnvironment.detect() else int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print(f"gmf: process {parent}, which started this one, has ended: so does this", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _print_settings(task: Task, world_size: int, device: str) -> None:
    """Print what data there is, the total batch, the learning rate scaled to it, and that BatchNorm is not synchronised."""
    recipe, optimizer = task.recipe, task.recipe.optimizer
    for name, samples in (("training", task.loaders.train), ("validation", task.loaders.held_out)):
        if isinstance(samples, Samples):
            text = f"{name}: {printable(samples.summary)}"
            print(textwrap.fill(text, COLUMNS, subsequent_indent="    ", break_on_hyphens=False), file=sys.stderr)
    print(lines(describe_network(task)), file=sys.stderr)
    scaled = f" = {optimizer.lr:g} x {task.total_batch}/{optimizer.lr_batch}" if optimizer.lr_batch else ""
    batches = f"{recipe.batch_size} images x {world_size} processes x {recipe.grad_accum_steps} accumulated"
    told = [f"total batch {task.total_batch} = {batches}", f"{optimizer.name}"]
    told += [f"peak learning rate {optimizer.lr * task.rate_scale:g}{scaled}", f"{task.steps_per_epoch:,} steps an epoch"]
    print(lines(told), file=sys.stderr)
    if world_size > 1 and device == "cpu" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
        print("BatchNorm is not synchronised over the processes: PyTorch does that on GPUs only", file=sys.stderr)


def _find_start(folder: Path, resume: bool | Literal["auto"]) -> Start | None:
    """Return where to continue, or None to begin.

    Raises:
        ValueError: If there is a run where one should begin, or none where one should continue.
    """
    if not resume:
        if any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS, *WEIGHTS)):
            raise ValueError(f"{folder}: holds a run already: continue it with --resume, or choose another folder with --out")
        return None
    start = find_start(folder)
    if start is None and resume != "auto":
        raise ValueError(
            f"{folder}: holds no checkpoint to resume: --auto-resume begins a run where there is none, and continues one"
        )
    return start


def _continue(task: Task, start: Start, processes: int) -> None:
    """Tell a task what it continues from and note what has changed since.

    Raises:
        ValueError: If the data has other classes.
    """
    check_classes(start.before, task.class_names, start.path)
    changed = changes(start.before, task.describe(processes))
    task.before, task.history = start.before, list(start.before.get("history", []))
    if changed:
        task.history.append({**start.place, "changed": changed})
    place = f"epoch {start.place['epoch'] + 1}, after step {start.place['step']}"
    task.notes.append(f"{f'{start.damage}: ' if start.damage else ''}continues from {start.path} in {place}")
    if changed:
        told = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
        task.notes.append(f"changed from there on, as recipe.yaml says too: {told}")


def train(
    recipe: Recipe,
    build_task: Callable[[Recipe, int], Task],
    resume: bool | Literal["auto"] = False,
    watchers: Sequence[Callback] = (),
) -> Path:
    """Train by a recipe into its run folder, on one process or as one of several.

    The folder holds recipe.yaml, versions.json, split.json where the recipe deals out the data, metrics.csv, TensorBoard
    events, checkpoints/last.ckpt and the one before it, previous.ckpt, and the model of the best epoch as model.safetensors and
    config.json, so the folder itself is a checkpoint for every command, timm and transformers.

    Args:
        recipe: The settings.
        build_task: Takes the recipe and the number of processes, opens the data and creates what is trained.
        resume: Continue from the folder's last checkpoint, or from the one before it where the last one is damaged; ``auto``
            begins a run where there is none.
        watchers: Further callbacks of Lightning; what they raise ends the run.

    Returns:
        The run folder.

    Raises:
        ValueError: If the data, model or folder cannot be used, there is nothing to resume, or training goes wrong in a way
            that the recipe limits.
        OSError: If a file cannot be written.
        Stopped: If a signal stopped the run, after it was saved.
    """
    recipe = with_precision(recipe)
    folder = Path(recipe.out)
    devices, nodes = processes(recipe)
    first = is_first_process()
    if TorchElasticEnvironment.detect() or not first:
        _end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    with Claim(folder) if first else contextlib.nullcontext() as claim:
        start = _find_start(folder, resume)
        try:
            _fit(recipe, build_task, start, claim, devices, nodes, watchers)
        except OSError as error:
            if claim:
                claim.check()  # a folder that was removed is the reason of all others
            if error.errno and error.filename is None:  # TensorBoard's, which names no file
                with writing("TensorBoard's events", folder):
                    raise
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return folder


def _fit(
    recipe: Recipe,
    build_task: Callable[[Recipe, int], Task],
    start: Start | None,
    claim: Claim | None,
    devices: int,
    nodes: int,
    watchers: Sequence[Callback],
) -> None:
    folder, first, world_size = Path(recipe.out), claim is not None, devices * nodes

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    task = build_task(recipe, world_size)
    if recipe.splitter:
        if recipe.splitter.split is None:
            raise ValueError(f"{recipe.data}: has a training and a held-out part of its own: leave out val_share and folds")
        task.notes += recipe.splitter.notes
    if recipe.compile == "auto":
        recipe.compile = _on_cuda(recipe) and task.fixed_size
    if start:
        _continue(task, start, world_size)
    if first:
        with writing(RECIPE, folder):
            write_recipe(recipe, folder / RECIPE, task.history)
        with writing(VERSIONS, folder):
            write_versions(folder)
        if recipe.splitter and recipe.splitter.split:
            with writing(SPLIT, folder):
                recipe.splitter.split.write(folder / SPLIT)

    pace = PaceCallback(_threads(recipe, world_size), recipe.grad_accum_steps)
    callbacks: list[Callback] = [LearningRateMonitor(logging_interval="step")] if recipe.loggers else []
    callbacks.append(pace)
    if recipe.patience is not None:
        callbacks.append(EarlyStopping(task.monitor, recipe.patience))
    callbacks += [
        MetricsCallback(folder, pace, claim),
        CheckpointCallback(recipe.last_checkpoint, recipe.save_minutes, recipe.grad_accum_steps, claim),
        *watchers,
    ]
    callbacks.append(EpochBar() if sys.stderr.isatty() else StepLines())
    checkpoints = AtomicCheckpoints(folder, {start.path: start.checkpoint} if start else {}, not (start and start.damage))
    with without_warnings():
        trainer = lightning.Trainer(
            accelerator=recipe.device,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(recipe, world_size),
            precision=PRECISIONS[recipe.precision],
            use_distributed_sampler=False,  # `DataModule` deals the samples out
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.grad_accum_steps,
            deterministic=recipe.deterministic,
            logger=make_loggers(recipe, folder),
            callbacks=callbacks,
            profiler=pace.loading,
            plugins=[checkpoints, *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
            enable_checkpointing=False,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=recipe.log_steps,
        )
        device = trainer.strategy.root_device.type
        if world_size > 1 and device != "cpu":
            task.model = convert_sync_batchnorm(task.model)  # timm's, which keeps the activation of its BatchNormAct2d
        if recipe.compile:
            task.compile_model()
        if first:
            _print_settings(task, world_size, device)
            if recipe.epochs <= recipe.schedule.warmup_epochs:
                task.notes.append(
                    f"the whole run ({recipe.epochs} of {recipe.schedule.warmup_epochs:g} epochs) is warm-up, in which the "
                    "learning rate only rises: train for more, or lower schedule.warmup_epochs"
                )
            for note in task.notes:
                logging.getLogger(__name__).warning(note)
        try:
            trainer.fit(task, datamodule=task.loaders, ckpt_path=start.path if start else None, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if start is None or "loading state_dict" not in str(error):
                raise
            raise ValueError(
                f"{start.path}: does not fit the network of the recipe: continue with the fields that it began with"
            ) from error
