"""Settings found by a few steps before a run: the learning rate by a range test, and how many images fit in a batch."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from ..files import to_json, write_file
from ..visual.charts import line_chart
from ..visual.page import Chart, html_head, html_page, html_section
from .module import Task
from .recipe import Recipe
from .trainer import PRECISIONS, processes, with_precision, without_warnings

BuildTask = Callable[[Recipe, int], Task]
SMOOTH = 0.9  # share of the running mean of losses that a step leaves
DIVERGED = 4.0  # times the least loss
BELOW = 10.0  # times that the suggested rate is under the one of the least loss
STEPS = 4  # of a size of batches, the first of which is not measured
ENOUGH_FASTER = 1.03  # a CPU takes no larger batches than that which two doublings have not made faster by so much
MEMORY = 0.8  # share of a CPU's free memory that is taken


def _run_steps(recipe: Recipe, build_task: BuildTask, steps: int, watcher: Callback) -> None:
    """Train for some steps by a recipe, on one process, and keep nothing."""
    recipe = with_precision(recipe)
    devices, nodes = processes(recipe)
    if devices * nodes > 1:
        raise ValueError(f"got {devices * nodes} processes, expected one: look for settings with --devices 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    with without_warnings():
        trainer = lightning.Trainer(
            accelerator=recipe.device,
            devices=1,
            precision=PRECISIONS[recipe.precision],
            use_distributed_sampler=False,
            max_epochs=-1,
            max_steps=steps,
            limit_val_batches=0,
            accumulate_grad_batches=recipe.grad_accum_steps,
            logger=False,
            callbacks=[watcher],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        task = build_task(recipe, 1)
        trainer.fit(task, datamodule=task.loaders)


@dataclass(frozen=True)
class RateTest:
    """What a range test found.

    Attributes:
        rates: Learning rates of the steps, as a recipe has them.
        losses: Of the steps.
        smoothed: Their running mean.
        suggestion: A tenth of the rate at which that was least.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float

    def write(self, folder: Path) -> Path:
        """Write find-lr.json and the page find-lr.html; return the path of the page."""
        labels: dict[str, Any] = {"xlabel": "learning rate", "ylabel": "training loss", "xscale": "log"}
        # Beyond the start, the end of the curve would leave nothing to see of it.
        labels["ylim"] = (min(self.smoothed) * 0.9, max(self.smoothed[: len(self.smoothed) // 2]) * 1.3)
        lines = {"running mean": self.smoothed, "steps": self.losses}
        chart = Chart(
            "find-lr",
            "Training loss while the learning rate rises",
            lambda: line_chart(self.rates, lines, x_form="{:.1e}", strong="running mean", mark=self.suggestion, **labels),
        )
        tiles = {"suggested": f"{self.suggestion:.1e}", "steps": len(self.rates)}
        head = html_head(f"Range test for {folder.name}", f"Learning rate {self.suggestion:.1e}", tiles, [])
        note = "The dotted line is the suggestion, a tenth of the rate at which the running mean was least."
        write_file(folder / "find-lr.json", to_json(asdict(self), indent=1))
        write_file(folder / "find-lr.html", html_page("Learning rate", head + html_section("", [chart, note])))
        return folder / "find-lr.html"


class _RisingRate(Callback):
    """Lets the learning rate grow exponentially from step to step, whatever the schedule sets, and notes the losses."""

    def __init__(self, low: float, high: float, steps: int) -> None:
        self.low, self.high, self.steps = low, high, steps
        self.rates, self.losses, self.smoothed = list[float](), list[float](), list[float]()
        self.batches: list[torch.Tensor] = []
        self.mean = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        self.rate = self.low * (self.high / self.low) ** (trainer.global_step / (self.steps - 1))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rate * pl_module.rate_scale * group.get("lr_scale", 1.0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)  # which Lightning divides by it
        if trainer.global_step == len(self.rates):  # the weights are not updated yet
            return
        loss = torch.stack(self.batches).mean().item()
        self.batches = []
        if not math.isfinite(loss):
            trainer.should_stop = True
            return
        self.mean = SMOOTH * self.mean + (1 - SMOOTH) * loss
        self.rates.append(self.rate)
        self.losses.append(loss)
        self.smoothed.append(self.mean / (1 - SMOOTH ** len(self.rates)))
        trainer.should_stop = self.smoothed[-1] > DIVERGED * min(self.smoothed)


def find_rate(recipe: Recipe, build_task: BuildTask, low: float = 1e-7, high: float = 1.0, steps: int = 100) -> RateTest:
    """Find a learning rate by a range test (Smith, arXiv 1506.01186): it rises until the loss does.

    The rates of groups of parameters keep their ratios, as layer decay has them. Nothing of the training is kept.

    Args:
        recipe: The settings.
        build_task: Takes the recipe and the number of processes, opens the data and creates what is trained.
        low: First rate.
        high: Last rate; the test ends where the loss is four times its least.
        steps: Updates of the weights from the one to the other.

    Raises:
        ValueError: If the loss was not finite from the beginning, or the recipe asks for several processes.
    """
    watcher = _RisingRate(low, high, steps)
    _run_steps(recipe, build_task, steps, watcher)
    if len(watcher.rates) < 2:
        raise ValueError(f"the loss is not finite at a learning rate of {low:g}: use precision bf16 or fp32, or check the data")
    best = watcher.rates[watcher.smoothed.index(min(watcher.smoothed))]
    return RateTest(watcher.rates, watcher.losses, watcher.smoothed, float(f"{best / BELOW:.1e}"))


class _Speed(Callback):
    """Measures steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


@dataclass(frozen=True)
class BatchSize:
    """A size of batches that fits: the images that are trained on in a second, and MiB that it takes."""

    batch_size: int
    images_per_second: float
    memory: float


def _peak_memory(cuda: bool) -> float:
    """Return the greatest memory so far in MiB: of the GPU since the last reset, else of this process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _free_memory() -> float:
    """Return the free memory of this machine in MiB, where the system tells."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError):
        return math.inf


def try_batch_sizes(recipe: Recipe, build_task: BuildTask) -> Iterator[BatchSize]:
    """Yield each power of two that is a batch size which fits, measured by three steps.

    It ends where the memory does, or the training set; on a CPU, whose memory others need too, also where two doublings have
    not made training 3 % faster.

    Raises:
        ValueError: If not even one image fits, or the recipe asks for several processes.
    """
    cuda = recipe.device in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    found: list[BatchSize] = []
    base = 0.0 if cuda else _peak_memory(cuda)
    size, samples = 2, 2  # mixup takes even numbers
    while size <= samples:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        watcher, counted = _Speed(), list[int]()

        def build(recipe: Recipe, processes: int, counted: list[int] = counted) -> Task:
            task = build_task(recipe, processes)
            counted.append(task.loaders.samples)
            return task

        try:
            _run_steps(replace(recipe, batch_size=size, grad_accum_steps=1), build, STEPS, watcher)
        except RuntimeError as error:
            if not any(text in str(error).lower() for text in ("out of memory", "can't allocate memory")):
                raise
            if not found:
                raise ValueError(f"not even a batch of {size} images fits: lower image_size or take a smaller model") from error
            return
        samples = counted[0]
        speed = size * (STEPS - 1) / sum(watcher.seconds[1:])
        found.append(BatchSize(size, speed, _peak_memory(cuda) - base))
        yield found[-1]
        slow = len(found) > 2 and max(row.images_per_second for row in found[-2:]) < ENOUGH_FASTER * found[-3].images_per_second
        if not cuda and (slow or 2 * found[-1].memory > MEMORY * _free_memory()):
            return
        size *= 2
