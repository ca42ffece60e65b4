"""What happens during a run besides the steps: checkpoints, signals, metrics.csv, the best model, early stopping."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError

from ..files import atomic_write, duration, write_file, write_rows
from ..run_folder import CHECKPOINT, METRICS, PREVIOUS, UNREADABLE, WEIGHTS, one_line, read_metrics
from .claim import Claim
from .loaders import STOP_SIGNALS
from .module import Task
from .pace import PaceCallback
from .progress import lines


class Stopped(BaseException):
    """A signal asked the run to stop; it was saved first."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _cause(error: BaseException | None) -> str:
    """Return why a file could not be written; libraries hide the reason in what they raise."""
    first = error
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            return "the disk is full"
        if number == errno.EFBIG or "os error 27" in str(error):
            return "it would be larger than files may be here"
        if number:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return one_line(Exception(first)).split(". ")[0][:200]


@contextlib.contextmanager
def writing(name: str, folder: Path) -> Iterator[None]:
    """Write a file of a run folder; an error names it, the cause, and what remains.

    Raises:
        OSError: If it cannot be written; what was there before is intact.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = [kept for kept in (CHECKPOINT, PREVIOUS, WEIGHTS[0], METRICS) if (folder / kept).is_file()]
        remains = f"intact are {', '.join(kept)} of before: continue with --resume" if kept else "nothing was saved yet"
        raise OSError(f"{folder / name}: could not be written: {_cause(error)}; {remains}") from error


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically, so that there is always a whole one, and keeps the one before it.

    Args:
        folder: Of the run.
        opened: A checkpoint that was read already, by its path: it is given out once.
        keep: Whether the last checkpoint is whole; a damaged one does not take the place of the one before it.
    """

    def __init__(self, folder: Path, opened: dict[Path, dict[str, Any]], keep: bool) -> None:
        super().__init__()
        self.folder, self.opened, self.keep = folder, opened, keep

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Return a checkpoint."""
        found = self.opened.pop(Path(path), None)
        return super().load_checkpoint(path, *args, **options) if found is None else found

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save `checkpoint` as the file `path`.

        Raises:
            OSError: If it cannot be written; the file that was there before is intact.
        """
        path, previous = Path(path), self.folder / PREVIOUS
        with writing(str(path.relative_to(self.folder)), self.folder), atomic_write(path) as temporary:
            with (temporary / path.name).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if self.keep and path.exists():
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)  # so that there is a last one at every moment
                except OSError:  # a file system without links
                    path.replace(previous)
        self.keep = True


class CheckpointCallback(Callback):
    """Saves the run's state after every epoch, every few minutes, and when a signal asks the run to stop."""

    def __init__(self, path: Path, minutes: float, grad_accum_steps: int, claim: Claim | None = None) -> None:
        self.path, self.seconds, self.grad_accum_steps, self.claim = path, 60 * minutes, grad_accum_steps, claim
        self.received = 0
        self.saved = time.monotonic()
        self.handlers: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print(f"{signal.Signals(number).name}: saving after this step, then stopping", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Handle signals in place of Lightning, which stops without saving."""
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Restore the handlers that were there before."""
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
            if self.claim:
                self.claim.check()
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
        if number:
            raise Stopped(number)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, between two steps; the last step leaves it to the end of the epoch."""
        if (batch_idx + 1) % self.grad_accum_steps == 0 and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer, time.monotonic() - self.saved > self.seconds)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the epoch. Comes after `MetricsCallback`, so that what it wrote belongs to the checkpoint."""
        self._save(trainer, due=True)


class EarlyStopping(callbacks.EarlyStopping):
    """Stops a run whose metric has not grown for `patience` epochs; also one that is resumed after it had stopped."""

    def __init__(self, monitor: str, patience: int) -> None:
        # At the end of validation: at the end of the epoch it would come after `CheckpointCallback`, which saves the count.
        super().__init__(monitor, patience=patience, mode="max", check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count, but not the patience, which the recipe may have changed."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop before the first step if the patience was exhausted."""
        trainer.should_stop = self.wait_count >= self.patience


PROBLEM_COUNTS = {"skipped_steps": "steps skipped", "unreadable": "images unreadable"}  # said of an epoch only where there are


class MetricsCallback(Callback):
    """Writes a row of metrics.csv after every epoch, saves the best model in the run folder and prints the progress."""

    def __init__(self, folder: Path, pace: PaceCallback, claim: Claim | None = None) -> None:
        self.folder, self.pace, self.claim = folder, pace, claim
        self.best = -1.0
        self.seconds = 0.0  # of the run, over all its parts
        self.start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best, "seconds": self.seconds + time.monotonic() - self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best metric of the run that is resumed."""
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Drop the rows of epochs that a resumed run repeats."""
        self.start = time.monotonic()
        if trainer.is_global_zero:
            done = [row for row in read_metrics(self.folder) if row["epoch"] < trainer.current_epoch]
            with writing(METRICS, self.folder):
                write_rows(self.folder / METRICS, done)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tell a stream, which has no sampler that Lightning could tell."""
        assert isinstance(pl_module, Task)
        if hasattr(pl_module.loaders.train, "set_epoch"):
            pl_module.loaders.train.set_epoch(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the metrics of the epoch, and the model if it is the best so far."""
        assert isinstance(pl_module, Task)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metric = metrics[pl_module.monitor] if pl_module.monitor else float(trainer.current_epoch)
        best = metric > self.best
        self.best = max(self.best, metric)
        model = pl_module.whole_model() if best else None  # all processes take part where the weights are sharded
        unreadable = pl_module.all_unreadable()
        pl_module.check_unreadable(unreadable)  # a process counts its own as they come; here are those of all
        if not trainer.is_global_zero:
            return
        if self.claim:
            self.claim.check()
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
            "waiting": round(self.pace.waiting, 3),
            "threads": torch.get_num_threads(),
        }
        with writing(METRICS, self.folder):
            rows = read_metrics(self.folder)
            known = rows[0] if rows else row  # a run of an earlier version may have fewer columns
            write_rows(self.folder / METRICS, [*rows, {name: value for name, value in row.items() if name in known}])
        if unreadable:
            with writing(UNREADABLE, self.folder):
                write_file(self.folder / UNREADABLE, "".join(f"{line}\n" for line in unreadable))
        if model is not None:
            with writing(WEIGHTS[0], self.folder):
                pl_module.save(model, self.folder)
        done, epochs = trainer.current_epoch + 1, pl_module.recipe.epochs
        told = [f"epoch {done}/{epochs}", f"loss {row['loss']:.4f}"]
        if "val_loss" in row:
            told[-1] += f", val loss {row['val_loss']:.4f}"
        shown = [name for name in sorted(row) if name.startswith("val_") and name not in ("val_loss", "val_images")]
        told += [f"{name.removeprefix('val_')} {metrics[name]:.4f}" for name in shown]
        told += [f"{row[name]:.0f} {text}" for name, text in PROBLEM_COUNTS.items() if row[name]]
        told.append(f"{duration(seconds)}, {duration(seconds / done * (epochs - done))} left")
        print(lines(told), file=sys.stderr, flush=True)
