"""Speed and memory of models side by side: alternating in one run, warmed up, medians with their spread.

A model's floor is the time that its multiply-adds would take at the speed of one large matrix product, measured in the same
run with the same type and threads: no implementation is faster, and the ratio of floor to time says how near one is.

Time is the clock's on the wall, but processor time for one CPU thread, in which other programs on the machine count less.
"""

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .checkpoint import model_name
from .groupmixformer import PUBLISHED_TOP1, GroupMixFormer

# Sizes at which results are published: ImageNet, COCO, ADE20K.
SIZES = {"classification": (224, 224), "detection": (800, 1333), "segmentation": (512, 512)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share.

    Attributes:
        task: classification, detection (Mask R-CNN) or segmentation (UPerNet, 512 channels, with its second head).
        train: Measure a training step, forward, backward and AdamW, instead of inference.
        batch_size: Pictures at once.
        size: Height and width of the pictures.
        dtype: fp32, bf16 or fp16; for inference the type of weights and pictures, for training that of autocast.
        compile: Compile with torch.compile (a detector's backbone only).
        channels_last: Keep other models than GroupMixFormer, which always does, in channels_last memory.
        device: cpu, cuda, ...
        threads: CPU threads.
        rounds: Measurements of each model; they take turns.
        seconds: A measurement repeats the step for at least so long.
    """

    task: str = "classification"
    train: bool = False
    batch_size: int = 1
    size: tuple[int, int] = (224, 224)
    dtype: str = "fp32"
    compile: bool = False
    channels_last: bool = True
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    seconds: float = 0.2


def _network(name: str, settings: Settings) -> nn.Module:
    if settings.task == "classification":
        cfg = timm.get_pretrained_cfg(name)
        fixed: dict[str, Any] = {"img_size": settings.size} if cfg and cfg.fixed_input_size else {}
        return timm.create_model(name, **fixed)
    from .backbone import Backbone

    if settings.task == "detection":
        from .detection import Detector

        height, width = sorted(settings.size)
        return Detector(Backbone(name), num_classes=80, architecture="mask_rcnn", image_size=height, max_size=width)
    from .segmentation import Segmenter

    return Segmenter(Backbone(name), num_classes=150, decoder="upernet", channels=512, image_size=settings.size[0])


def _objects(settings: Settings, number: int = 8) -> dict[str, Tensor]:
    """Make boxes of an eighth to a half of the sides, with masks that fill them."""
    height, width = settings.size
    random = torch.Generator().manual_seed(0)
    sides = torch.tensor([width, height]) * (0.125 + 0.375 * torch.rand(number, 2, generator=random))
    corners = torch.rand(number, 2, generator=random) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corners, corners + sides], dim=1)
    masks = torch.zeros(number, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.randint(1, 81, (number,), generator=random), "masks": masks}


def _clock(settings: Settings) -> Callable[[], float]:
    return time.process_time if (settings.device, settings.threads) == ("cpu", 1) else time.perf_counter


class _Runner:
    """One model, ready to be stepped."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.settings, self.name = settings, name
        torch.manual_seed(0)
        network: Any = _network(name, settings)
        self.parameters = sum(p.numel() for p in network.parameters())
        inference = not settings.train
        if settings.channels_last and not any(isinstance(module, GroupMixFormer) for module in network.modules()):
            network = network.to(memory_format=torch.channels_last)
        dtype = TYPES[settings.dtype] if inference and settings.task == "classification" else torch.float32
        self.network: Any = network.to(settings.device, dtype).train(settings.train)
        pictures = torch.randn(settings.batch_size, 3, *settings.size, device=settings.device, dtype=dtype)
        self.inputs: Any = pictures.contiguous(memory_format=torch.channels_last)
        self.targets: Any = None
        if settings.task == "detection":
            self.inputs = [picture.sigmoid() for picture in pictures]
            target = {key: value.to(settings.device) for key, value in _objects(settings).items()}
            self.targets = [target] * settings.batch_size if settings.train else None
        elif settings.train:
            shape = (settings.batch_size, *(settings.size if settings.task == "segmentation" else ()))
            self.targets = torch.randint(0, 100, shape, device=settings.device)
        # Inference of a detector or segmenter runs under autocast too: their heads are not made for bf16 weights.
        self.autocast = settings.dtype != "fp32" and dtype == torch.float32
        self.optimizer = torch.optim.AdamW(network.parameters(), foreach=True) if settings.train else None
        if settings.compile:
            (network.body if settings.task == "detection" else network).compile()

    def step(self) -> None:
        """Run once."""
        kind = self.settings.device.split(":")[0]
        with (
            torch.inference_mode(not self.settings.train),
            torch.autocast(kind, TYPES[self.settings.dtype], enabled=self.autocast),
        ):
            if self.settings.task == "detection":
                output = self.network(self.inputs, self.targets) if self.settings.train else self.network(self.inputs)
            else:
                output = self.network(self.inputs)
        if self.optimizer is None:
            return
        if self.settings.task == "detection":
            loss = torch.stack(list(output.values())).sum()
        else:
            outputs = output if isinstance(output, tuple) else (output,)
            loss = torch.stack([F.cross_entropy(logits.float(), self.targets) for logits in outputs]).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Wait for an accelerator."""
        if self.settings.device != "cpu":
            torch.accelerator.synchronize()

    def timed(self) -> float:
        """Return the seconds of a step, as the mean of as many as fit."""
        clock = _clock(self.settings)
        self.wait()
        start, steps = clock(), 0
        while not steps or clock() - start < self.settings.seconds:
            self.step()
            self.wait()
            steps += 1
        return (clock() - start) / steps


def count_macs(name: str, settings: Settings) -> int | None:
    """Count the multiply-adds of the forward pass for one picture; none for a detector, where they depend on what is found."""
    if settings.task == "detection":
        return None
    with torch.device("meta"):
        network = _network(name, settings).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, *settings.size))
    return counter.get_total_flops() // 2


def matrix_speed(settings: Settings, side: int = 2048) -> float:
    """Measure the multiply-adds per second of one large matrix product: the best of several."""
    a, b = (torch.randn(side, side, device=settings.device, dtype=TYPES[settings.dtype]) for _ in range(2))
    best, clock = 0.0, _clock(settings)
    for _ in range(6):
        if settings.device != "cpu":
            torch.accelerator.synchronize()
        start = clock()
        a @ b
        if settings.device != "cpu":
            torch.accelerator.synchronize()
        best = max(best, side**3 / (clock() - start))
    return best


def _kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _peak_memory(step: Callable[[], None], device: str) -> float | None:
    """Return the MiB that a step needs beside what is there already; none where that cannot be told."""
    if device != "cpu":
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        step()
        torch.accelerator.synchronize()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed would hide the growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _kilobytes("VmRSS")
        step()
        return (_kilobytes("VmHWM") - before) / 1024
    except (OSError, StopIteration):  # no Linux
        return None


def machine(settings: Settings) -> str:
    """Name the device, and for a CPU its threads."""
    if settings.device != "cpu":
        return torch.cuda.get_device_name() if settings.device.startswith("cuda") else settings.device
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {settings.threads} threads, {torch.backends.cpu.get_cpu_capability()}"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench(models: Sequence[str], settings: Settings, progress: Callable[..., Any] = lambda items, *_: items) -> dict[str, Any]:
    """Measure models side by side.

    Args:
        models: Variants or names of timm; the first is what the others are compared with.
        settings: What they share.
        progress: Wraps the rounds, to show how far they are.

    Returns:
        The settings, machine and versions, and for each model a row: images_per_second and milliseconds of a step (medians),
        milliseconds_low and _high (the quartiles), speed_up over the first model, peak_memory of a step in MiB, parameters,
        macs of a forward pass, floor (its milliseconds) and of_floor (its share of the time; inference alone), published_top1.

    Raises:
        ValueError: If there is no such model, or it cannot be run like this.
    """
    names = [model_name(model) for model in models]
    if len(set(names)) < len(names):
        raise ValueError(f"got {', '.join(names)}, expected each model once")
    with _threads(settings.threads):
        speed = matrix_speed(settings)
        runners, memory = [], []
        for name in progress(names, "warming up"):
            try:
                runner = _Runner(name, settings)
                runner.step()
                memory.append(_peak_memory(runner.step, settings.device))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{name} cannot be run with these settings: {str(error).splitlines()[0]}") from error
            runners.append(runner)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in progress(range(settings.rounds), "measuring"):
            for runner in runners:
                seconds[runner.name].append(runner.timed())
    rows: list[dict[str, Any]] = []
    for runner, peak in zip(runners, memory, strict=True):
        times = sorted(seconds[runner.name])
        median, macs = statistics.median(times), count_macs(runner.name, settings)
        floor = macs * settings.batch_size / speed if macs and not settings.train else None
        rows.append(
            {
                "model": runner.name,
                "images_per_second": settings.batch_size / median,
                "milliseconds": 1000 * median,
                "milliseconds_low": 1000 * times[len(times) // 4],
                "milliseconds_high": 1000 * times[-1 - len(times) // 4],
                "speed_up": statistics.median(seconds[names[0]]) / median,
                "peak_memory": peak,
                "parameters": runner.parameters,
                "macs": macs,
                "floor": 1000 * floor if floor else None,
                "of_floor": floor / median if floor else None,
                "published_top1": PUBLISHED_TOP1.get(runner.name) if settings.task == "classification" else None,
            }
        )
    return {
        "settings": asdict(settings),
        "machine": machine(settings),
        "clock": "processor time" if _clock(settings) is time.process_time else "wall time",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "matrix_product": speed,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Lay out what `bench` found."""
    settings = result["settings"]
    kind = "training step" if settings["train"] else "inference"
    lines = [
        f"{settings['task']}, {kind}, batch {settings['batch_size']} of {settings['size'][0]} x {settings['size'][1]}, "
        f"{settings['dtype']}{', compiled' if settings['compile'] else ''}; {result['machine']}, {result['clock']}; "
        f"torch {result['versions']['torch']}",
        f"{'model':32}{'images/s':>10}{'ms':>10}{'quartiles':>18}{'speed-up':>10}{'memory':>12}{'MACs':>10}{'of floor':>10}",
    ]
    for row in result["rows"]:
        memory = "-" if row["peak_memory"] is None else f"{row['peak_memory']:,.0f} MiB"
        macs = "-" if row["macs"] is None else f"{row['macs'] / 1e9:.2f} G"
        near = "-" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
        spread = f"{row['milliseconds_low']:.1f} to {row['milliseconds_high']:.1f}"
        lines.append(
            f"{row['model']:32}{row['images_per_second']:>10.2f}{row['milliseconds']:>10.1f}{spread:>18}"
            f"{row['speed_up']:>9.2f}x{memory:>12}{macs:>10}{near:>10}"
        )
    return "\n".join(lines)
