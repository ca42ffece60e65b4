"""A run: one folder with the recipe, versions, metrics, checkpoints and the best model; started, resumed, recorded."""

import csv
import json
import logging
import platform
import sys
import time
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from .checkpoint import save_checkpoint
from .classification import Classification
from .data import data_config, eval_loader, open_images, train_loader
from .recipe import Recipe, write_recipe


class Record(Callback):
    """Appends a row to metrics.csv after every epoch, keeps the best model in the run folder and says how it goes."""

    def __init__(self, folder: Path, class_names: list[str], config: dict[str, Any]) -> None:
        self.folder, self.class_names, self.config = folder, class_names, config
        self.best = -1.0
        self.start = time.monotonic()
        self.first_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best accuracy of the run that is resumed."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop the rows of epochs that a resumed run does again."""
        self.start, self.first_epoch = time.monotonic(), trainer.current_epoch
        rows = read_metrics(self.folder)
        _write_rows(self.folder, [row for row in rows if row["epoch"] < trainer.current_epoch])

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch; keep the model if it is the best so far."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "loss": metrics["loss_epoch"],
            "val_loss": metrics["val_loss"],
            "val_top1": metrics["val_top1"],
            "seconds": round(time.monotonic() - self.start, 1),
        }
        _write_rows(self.folder, [*read_metrics(self.folder), row])
        if row["val_top1"] > self.best:
            self.best = row["val_top1"]
            save_checkpoint(pl_module.model, self.folder, self.class_names, self.config)
        done = trainer.current_epoch + 1 - self.first_epoch
        assert trainer.max_epochs is not None
        left = row["seconds"] / done * (trainer.max_epochs - trainer.current_epoch - 1)
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  loss {row['loss']:.3f}  held-out loss "
            f"{row['val_loss']:.3f}  top-1 {row['val_top1']:.2%}  {row['seconds']:.0f} s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _write_rows(folder: Path, rows: list[dict[str, float]]) -> None:
    temporary = folder / "metrics.csv.part"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(folder / "metrics.csv")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of the run's metrics.csv, one an epoch: epoch, step, lr, loss, val_loss, val_top1, seconds."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the machine."""
    packages = ("groupmixformer", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": f"{machine}, {torch.get_num_threads()} threads",
    }


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train by a recipe into its run folder.

    The folder holds recipe.yaml, versions.json, metrics.csv, TensorBoard events, checkpoints/last.ckpt, and the model of the
    best epoch as model.safetensors and config.json, so the folder itself is a checkpoint for every command, timm and
    transformers.

    Args:
        recipe: The settings.
        resume: Continue from the folder's last checkpoint, if there is one.

    Returns:
        The run folder.

    Raises:
        ValueError: If the data, model or folder cannot be used.
    """
    folder = Path(recipe.out)
    last = folder / "checkpoints" / "last.ckpt"
    if (folder / "recipe.yaml").exists() and not resume:
        raise ValueError(f"{folder}: holds a run already: continue it with --resume, or choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    images = open_images(recipe.data, recipe.root, recipe.download)
    steps_per_epoch = len(images.train) // recipe.batch_size
    module = Classification(recipe, len(images.class_names), steps_per_epoch)
    config = data_config(recipe, module.model)
    loaders = train_loader(recipe, images.train, config), eval_loader(images.held_out, config, recipe.batch_size)
    write_recipe(replace(recipe, out=str(folder)), folder / "recipe.yaml")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2))

    callbacks: list[Callback] = [
        Record(folder, images.class_names, config),
        # At the very end of an epoch: what Record wrote belongs to the checkpoint.
        ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0, save_on_train_epoch_end=True),
        LearningRateMonitor(logging_interval="step"),
    ]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    trainer = lightning.Trainer(
        accelerator=recipe.device,
        devices=1,
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.optimizer.clip_grad,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, steps_per_epoch),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a recipe's choice
        warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's, about PyTorch
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # timm's schedulers are not torch's
        trainer.fit(module, *loaders, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.interrupted:
        print(f"stopped; to continue: gmf train {folder / 'recipe.yaml'} --resume", file=sys.stderr)
        raise KeyboardInterrupt
    return folder
