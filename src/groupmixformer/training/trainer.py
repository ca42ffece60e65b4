"""A run by a recipe: processes, strategy, Lightning's Trainer, and the run folder that it writes."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from timm.layers import convert_sync_batchnorm
from torch import nn

from ..run_folder import RECIPE, write_versions
from .callbacks import AtomicCheckpoints, CheckpointCallback, EarlyStopping, MetricsCallback
from .module import Task
from .recipe import Recipe, write_recipe

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # the recipe's names and Lightning's


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


def _print_settings(task: Task, world_size: int, device: str) -> None:
    """Print the total batch, the learning rate scaled to it, and a warning where BatchNorm is not synchronised."""
    recipe, optimizer = task.recipe, task.recipe.optimizer
    scaled = f" = {optimizer.lr:g} x {task.total_batch}/{optimizer.lr_batch}" if optimizer.lr_batch else ""
    print(
        f"total batch {task.total_batch} = {recipe.batch_size} images x {world_size} processes x {recipe.grad_accum_steps} "
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
        callbacks.append(EarlyStopping(task.monitor, recipe.patience))
    callbacks += [
        MetricsCallback(folder),
        CheckpointCallback(recipe.last_checkpoint, recipe.save_minutes, recipe.grad_accum_steps),
    ]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a recipe's choice
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's, about PyTorch
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # timm's schedulers are not torch's
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")  # `DataModule` is
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")  # metrics.csv has every epoch
        warnings.filterwarnings("ignore", ".*has `__len__` defined.*")  # a stream's is exact
        warnings.filterwarnings("ignore", ".*sync_dist.*")  # metrics are computed over all processes before they are logged
        warnings.filterwarnings("ignore", ".*in eval mode at the start.*")  # the EMA model
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
            _print_settings(task, world_size, device)
            for note in task.notes:
                logging.getLogger(__name__).warning(note)
        last = recipe.last_checkpoint
        start = str(last) if resume and last.exists() else None
        try:
            trainer.fit(task, datamodule=task.loaders, ckpt_path=start, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return folder
