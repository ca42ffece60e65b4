"""Speed and memory of networks in any form, such as eager beside compiled: warmed up, in turns, medians with their spread.

Time is wall-clock time, but processor time for one CPU thread, as it depends less on other programs on the machine, and device
time between two events for an accelerator. Latency is always wall-clock time: it is what a caller waits.
"""

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import nn

from ..models.fuse import fuse
from ..models.groupmixformer import GroupMixFormer
from ..tasks.registry import find_task

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Latency is taken over so many single steps, or as many as fit into the seconds; a 99th percentile of fewer than a hundred
# would be the maximum.
LATENCY_STEPS, LATENCY_SECONDS, ENOUGH_FOR_P99 = 200, 5.0, 100

# Sides of the square matrices whose product gives the speed of the floor: large enough to keep every core busy, small enough to
# take under a second; the best of so many is taken, as other programs only ever slow it down.
PRODUCT_SIDE, PRODUCT_ROUNDS = {"cpu": 2048, "accelerator": 8192}, 6


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share.

    Attributes:
        task: classification, detection (Mask R-CNN) or segmentation (UPerNet, 512 channels, with its second head).
        train: Measure a training step, forward, backward and AdamW, instead of inference.
        batch_size: Images at once.
        size: Height and width of the images.
        dtype: fp32, bf16 or fp16; for inference the type of weights and images, for training that of autocast.
        compile: Mode of torch.compile; none for eager. Of a detector, the backbone alone is compiled. On a CPU the weights are
            frozen for inference, so that they can be packed and folded.
        fuse: Bring GroupMixFormers into their inference form first, other models run as they are.
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
    compile: str | None = None
    fuse: bool = False
    channels_last: bool = True
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    seconds: float = 0.2


def _clock(settings: Settings) -> Callable[[], float]:
    return time.process_time if (settings.device, settings.threads) == ("cpu", 1) else time.perf_counter


def clock_name(settings: Settings) -> str:
    """Say which clock times the steps."""
    if settings.device != "cpu":
        return "device time"
    return "processor time" if _clock(settings) is time.process_time else "wall time"


def seconds_of(call: Callable[[], object], settings: Settings, at_least: float) -> float:
    """Return the seconds of a call, as the mean of as many as fill the time."""
    if settings.device == "cpu":
        clock = _clock(settings)
        start, calls = clock(), 0
        while not calls or clock() - start < at_least:
            call()
            calls += 1
        return (clock() - start) / calls
    calls = 1
    while True:
        start_event, end_event = (torch.Event(settings.device, enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(calls):
            call()
        end_event.record()
        end_event.synchronize()
        seconds = start_event.elapsed_time(end_event) / 1000
        if seconds >= at_least:
            return seconds / calls
        calls *= 2


def _is_ours(network: nn.Module) -> bool:
    return any(isinstance(module, GroupMixFormer) for module in network.modules())


class Runner:
    """A network in one form, ready to be stepped on random images.

    Args:
        network: For the task, in float32 on the CPU.
        settings: Its form.

    Attributes:
        fused: Whether it was fused.
        parameters: Number of parameters before that.
    """

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.parameters = sum(p.numel() for p in network.parameters())
        self.fused = settings.fuse and _is_ours(network)
        if self.fused:
            network = fuse(network.to(settings.device).eval())
        elif settings.channels_last and not _is_ours(network):
            network = network.to(memory_format=torch.channels_last)
        self.task = find_task(settings.task)
        dtype = TYPES[settings.dtype] if not settings.train and self.task.casts_weights else torch.float32
        self.network: Any = network.to(settings.device, dtype).train(settings.train)
        images = torch.randn(settings.batch_size, 3, *settings.size, device=settings.device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        self.inputs, self.targets = self.task.bench_batch(images, settings.train)
        # Inference of a detector or segmenter runs under autocast too: their heads are not made for bf16 weights.
        self.autocast = settings.dtype != "fp32" and dtype == torch.float32
        self.optimizer = torch.optim.AdamW(network.parameters(), foreach=True) if settings.train else None
        if settings.compile:
            self.task.compiled_part(self.network).compile(mode=settings.compile)

    def forward(self, inputs: Any) -> Any:
        """Return the network's output in the form's type; its losses in training of a detector."""
        kind = self.settings.device.split(":")[0]
        with (
            torch.inference_mode(not self.settings.train),
            torch.autocast(kind, TYPES[self.settings.dtype], enabled=self.autocast),
        ):
            if self.task.gives_losses and self.settings.train:
                return self.network(inputs, self.targets)
            return self.network(inputs)

    def step(self) -> None:
        """Run once."""
        output = self.forward(self.inputs)
        if self.optimizer is None:
            return
        if self.task.gives_losses:
            loss = torch.stack(list(output.values())).sum()
        else:
            outputs = output if isinstance(output, tuple) else (output,)
            loss = torch.stack([F.cross_entropy(logits.float(), self.targets) for logits in outputs]).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def latency(self) -> float:
        """Return the wall-clock seconds of a step."""
        start = time.perf_counter()
        self.step()
        if self.settings.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    def warm_up(self) -> None:
        """Run a step before timing; this is when a network is compiled."""
        # The option of torch.compile comes too late: the weights have become inputs of the graph by then.
        with inductor.patch(freezing=not self.settings.train and self.settings.device == "cpu"):
            self.step()


def matrix_speed(settings: Settings) -> float:
    """Measure the multiply-adds per second of one large matrix product: the best of several."""
    side = PRODUCT_SIDE["cpu" if settings.device == "cpu" else "accelerator"]
    a, b = (torch.randn(side, side, device=settings.device, dtype=TYPES[settings.dtype]) for _ in range(2))
    return max(side**3 / seconds_of(lambda: a @ b, settings, 0.0) for _ in range(PRODUCT_ROUNDS))


def _kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def _peak_memory(step: Callable[[], None], device: str) -> float | None:
    """Return the MiB that a step allocates at its peak; none where the system does not report it."""
    if device != "cpu":
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        step()
        torch.accelerator.synchronize()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    try:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise memory freed by earlier steps would hide the growth
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
def set_threads(number: int) -> Iterator[None]:
    """Use so many CPU threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    builds: Mapping[str, Callable[[], Runner]],
    settings: Settings,
    progress: Callable[..., Any] = lambda items, *_: items,
) -> list[dict[str, Any]]:
    """Warm up and measure networks in turns.

    Args:
        builds: Functions that build the runners, by label. Their settings may differ, but for device and threads.
        settings: Device, threads, rounds and seconds.
        progress: Wraps the iterators over models and rounds, to show a progress bar.

    Returns:
        A row for each: model (the label), fused, images_per_second and milliseconds of a step (medians), milliseconds_low and
        _high (the quartiles), speed_up over the first one, latency_p50 and _p99 in milliseconds over latency_steps (inference
        on single images alone), peak_memory of a step in MiB, parameters.

    Raises:
        ValueError: If one cannot be run.
    """
    with set_threads(settings.threads):
        runners: dict[str, Runner] = {}
        memory: dict[str, float | None] = {}
        for label in progress(list(builds), "warming up"):
            try:
                runner = builds[label]()
                assert (runner.settings.device, runner.settings.threads) == (settings.device, settings.threads)
                runner.warm_up()
                memory[label] = _peak_memory(runner.step, settings.device)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{label} cannot be run with these settings: {str(error).splitlines()[0]}") from error
            runners[label] = runner
        seconds: dict[str, list[float]] = {label: [] for label in runners}
        latencies: dict[str, list[float]] = {label: [] for label in runners}
        for turn in progress(range(1, settings.rounds + 1), "measuring"):
            share = turn / settings.rounds
            for label, runner in runners.items():
                seconds[label].append(seconds_of(runner.step, settings, settings.seconds))
                single = latencies[label]
                if not runner.settings.train and runner.settings.batch_size == 1:
                    while len(single) < LATENCY_STEPS * share and sum(single) < LATENCY_SECONDS * share:
                        single.append(runner.latency())
    rows: list[dict[str, Any]] = []
    for label, runner in runners.items():
        times, single = sorted(seconds[label]), sorted(latencies[label])
        median = statistics.median(times)
        speed = runner.settings.batch_size / median
        enough = len(single) >= ENOUGH_FOR_P99
        rows.append(
            {
                "model": label,
                "fused": runner.fused,
                "images_per_second": speed,
                "milliseconds": 1000 * median,
                "milliseconds_low": 1000 * times[len(times) // 4],
                "milliseconds_high": 1000 * times[-1 - len(times) // 4],
                "speed_up": speed / rows[0]["images_per_second"] if rows else 1.0,
                "latency_p50": 1000 * statistics.median(single) if single else None,
                "latency_p99": 1000 * statistics.quantiles(single, n=100, method="inclusive")[98] if enough else None,
                "latency_steps": len(single) if single else None,
                "peak_memory": memory[label],
                "parameters": runner.parameters,
            }
        )
    return rows
