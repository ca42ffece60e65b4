"""What every task shares once a network is trained: it looks at images, is measured and reported. No Lightning here."""

import copy
import io
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.channels import AnyImage, Channels
from ..data.classes import few, match_classes
from ..files import short
from ..run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # which a prediction does without

Progress = Callable[..., Iterable[Any]]  # takes an iterable and what is done with it, as tqdm does
Point = tuple[int, int]  # row and column


@dataclass(frozen=True)
class View:
    """An image as a network sees it.

    Attributes:
        images: What the backbone takes (1, C, H, W).
        pixels: The image in its top left corner (h, w, 3), 8 bits; what is right of it and below is filling.
        original: Height and width of the image before.
        factors: By which its height and width were multiplied.
        offsets: Pixels that came before its first row and column; negative where it was cropped.
    """

    images: Tensor
    pixels: NDArray[np.uint8]
    original: tuple[int, int]
    factors: tuple[float, float]
    offsets: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image as it is seen."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def to_input(self, point: Sequence[int]) -> Point:
        """Return the pixel that holds the middle of a pixel of the original.

        Raises:
            ValueError: If it lies outside of the image, or of what was left after the crop.
        """
        if not all(0 <= at < side for at, side in zip(point, self.original, strict=True)):
            height, width = self.original
            raise ValueError(
                f"got query {point[0]},{point[1]}, expected a row from 0 to {height - 1} and a column to {width - 1}"
            )
        parts = zip(point, self.factors, self.offsets, strict=True)
        row, column = (math.floor((at + 0.5) * factor) + offset for at, factor, offset in parts)
        if not (0 <= row < self.size[0] and 0 <= column < self.size[1]):
            first, last = self.to_original((0, 0)), self.to_original((self.size[0] - 1, self.size[1] - 1))
            raise ValueError(
                f"query {point[0]},{point[1]} is cropped away: the network sees rows {first[0]} to {last[0]} and columns "
                f"{first[1]} to {last[1]}"
            )
        return row, column

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of the original that is seen, in its pixels."""
        parts = zip(self.size, self.factors, self.offsets, self.original, strict=True)
        (top, bottom), (left, right) = (
            (max(0.0, -offset / factor), min(side, (size - offset) / factor)) for size, factor, offset, side in parts
        )
        return left, top, right, bottom

    def to_original(self, point: Sequence[int]) -> Point:
        """Return the pixel of the original that holds the middle of a pixel that is seen, the nearest for what was added."""
        parts = zip(point, self.factors, self.offsets, self.original, strict=True)
        row, column = (min(max(int((at + 0.5 - offset) / factor), 0), side - 1) for at, factor, offset, side in parts)
        return row, column


@dataclass(frozen=True)
class Predicted:
    """What was found in an image.

    Attributes:
        result: For a JSON object.
        text: In a line.
        files: Contents by the ending of their name: the drawn image, and for segments the mask; nothing for classes.
        results: For boxes and masks, COCO's results.
    """

    result: dict[str, Any]
    text: str
    files: dict[str, bytes]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        result: Metrics by name, for a JSON object: images, images_per_second (with loading) and model_images_per_second (the
            model alone) at least; per_class, if it is there, holds those of each class.
        text: The main ones in a line or two.
        table: Those of each class, the worst first.
        skipped: A line for each image that was left out.
        details: How images were prepared, in a line.
        notes: Further lines about the data: how its classes were matched, which objects were left out.
        remarks: What must not be overlooked about the metrics, in words.
    """

    result: dict[str, Any]
    text: str
    table: str
    skipped: list[str]
    details: str = ""
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()

    def figure(self) -> "Figure | None":
        """Draw what numbers alone do not tell, if the task has a diagram for that."""
        return None


class Stopwatch:
    """Measures how long an evaluation takes, and how much of that the model alone."""

    def __init__(self) -> None:
        self.start, self.model = time.perf_counter(), 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.model += time.perf_counter() - self._begun

    def rates(self, images: int) -> dict[str, float]:
        """Return images a second, with loading and by the model alone."""
        whole = time.perf_counter() - self.start
        return {"images_per_second": images / whole, "model_images_per_second": images / self.model}


def windows(length: int, window: int) -> list[int]:
    """Return where windows begin that cover a length and overlap by a third or more."""
    if length <= window:
        return [0]
    steps = -(-(length - window) // max(1, window * 2 // 3))
    return [round(i * (length - window) / steps) for i in range(steps + 1)]


def to_png(image: Image.Image) -> bytes:
    """Return an image as the contents of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def percent(value: float | None) -> str:
    """Show a share; a dash for none, and for COCO's -1 where there is no object to find."""
    return "-" if value is None or value < 0 else f"{value:.2%}"


def class_table(rows: Sequence[Mapping[str, Any]], metric: str, title: str = "") -> str:
    """Return a table of the classes, the worst first; those without a value last.

    Args:
        rows: class, the metric, and maybe images, of each.
        metric: Which to show.
        title: What stands over it, if that is not its name.
    """
    ordered = sorted(rows, key=lambda row: (percent(row[metric]) == "-", row[metric] or 0))
    names = [short(row["class"]) for row in ordered]
    length = max(map(len, ["class", *names]))
    counted = "images" in rows[0]
    lines = [f"{'class':{length}}{'images' * counted:>{8 * counted}}{title or metric:>9}"]
    for name, row in zip(names, ordered, strict=True):
        images = f"{row['images']:>8,}" if counted else ""
        lines.append(f"{name:{length}}{images}{percent(row[metric]):>9}")
    return "\n".join(lines)


def no_better_than_one_class(right: int, counts: Sequence[int], class_names: Sequence[str], unit: str) -> list[str]:
    """Say it in a sentence where a model is right no more often than always answering the largest class would be.

    Args:
        right: How many it got right.
        counts: How many there are of each class.
        class_names: In the same order.
        unit: What is counted.
    """
    largest, total = max(range(len(counts)), key=counts.__getitem__), sum(counts)
    if right > counts[largest] or max(counts) == total:  # of one class alone any model is at best as good
        return []
    return [
        f"no better than always answering {short(class_names[largest])}, the largest class: that is right for "
        f"{counts[largest] / total:.2%} of the held-out {unit}, and the model for {right / total:.2%}"
    ]


class Predictor(ABC):
    """A trained network with what is stored beside it, ready to look at images.

    Args:
        run: A run.
        device: To run on.
        image_size: Side of the images, or the shorter side; the model's own by default.
        dtype: bfloat16 or float16 to run the model under autocast; none to run it as it is.
        options: Of the task; those that are not given are as in `DEFAULTS`.

    Attributes:
        model: The network, in eval mode.
        fused: Whether that is the inference form.
        config: What is stored with it.
        class_names: In the order of its labels.
        has_names: Whether they are stored with it; otherwise they are numbers or ImageNet's.
        batched: Whether it looks at several images together: `prepare` makes of each the model's input (C, H, W), of which
            `predict_prepared` takes a batch.
        channels: How images are read for it.
        metric: The main one: its column in metrics.csv, and in words.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it holds something else or is damaged.
    """

    model: Any
    fused: bool = False
    config: dict[str, Any]
    class_names: list[str]
    has_names: bool = True
    batched: ClassVar[bool] = False
    channels = Channels()
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    metric: tuple[str, str]

    def __init__(
        self,
        run: str | Path | RunFolder,
        device: torch.device | str = "cpu",
        image_size: int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if unknown := options.keys() - self.DEFAULTS.keys():
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        self.device, self.dtype, self.options = torch.device(device), dtype, {**self.DEFAULTS, **options}
        self.model, self.config = self.load(RunFolder.of(run), image_size)
        self.model.to(self.device)

    def with_options(self, **options: Any) -> Self:
        """Return the same network with other options of the task."""
        other = copy.copy(self)
        other.options = {**self.options, **options}
        return other

    @abstractmethod
    def load(self, run: RunFolder, image_size: int | None) -> tuple[Any, dict[str, Any]]:
        """Return the network in eval mode, set to a size of images, and what is stored with it; set `class_names`."""

    @abstractmethod
    def predict(self, image: AnyImage, name: str = "") -> Predicted:
        """Look at an image, which `channels` read; its name is told in results."""

    @abstractmethod
    def open_data(self, data: str) -> Any:
        """Open the held-out part of a data set as `evaluate` takes it; the options of a task say which part."""

    @abstractmethod
    def evaluate(self, images: Any, workers: int = 0, progress: Progress = lambda items, _: items) -> EvalResult:
        """Measure on every image once.

        Args:
            images: What `open_data` gave.
            workers: Processes that load images.
            progress: Takes the batches and what is done with them, and yields them, as tqdm does.
        """

    def answer(self, found: Predicted) -> dict[str, Any]:
        """Return the result of an image with what its files hold, for a client who has only a JSON object."""
        return found.result

    def to_supervision(self, found: Predicted) -> Any:
        """Return the objects of an image as supervision's Detections.

        Raises:
            ValueError: If the task finds no objects.
        """
        raise ValueError(f"{type(self).__name__} finds no objects, expected a detector")

    def frame(self, image: AnyImage) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of an image that the model sees, in its pixels."""
        return 0, 0, image.width, image.height

    @property
    def planes(self) -> int:
        """How many planes of an image's size the network fills for it."""
        return 0

    @property
    def max_pixels(self) -> int:
        """How many pixels an uploaded image may have: 64 million, or fewer if the network fills planes of its size.

        A segmenter fills one for each class and Mask R-CNN one for each object, which take 4 GB together at most.
        """
        return min(64_000_000, 1_000_000_000 // max(1, self.planes))

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context that the model runs in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def match_classes(self, images: Any, data: str) -> Any:
        """Let a data set number its classes as the model does: they are matched by name.

        The order may differ and classes may be missing, which its `notes` say. A model without names takes those of the data in
        their order, if they are as many.

        Raises:
            ValueError: If the model lacks a class of the data.
        """
        names = images.class_names
        if not self.has_names:
            if len(names) != len(self.class_names):
                counts = f"{data}: has {len(names)} classes and the model {len(self.class_names)} without names"
                raise ValueError(f"{counts}, expected as many, or names by which to match: gmf convert --class-names FILE")
            taken = f"the model has no names for its {len(names)} classes: they are taken for those of {data} in its order"
            images.notes = [*images.notes, taken]
        elif names != self.class_names:
            places = match_classes(self.class_names, names, data)
            images.relabel(self.class_names, places)
            found, there = f"the {len(names)} classes of {data} are matched by name", set(places)
            absent = [name for place, name in enumerate(self.class_names) if place not in there]
            more = f"; {len(absent)} of the model's have no image: {few(absent)}" if absent else ""
            images.notes = [*images.notes, found + more]
        return images

    def examples(self, images: Any, indices: Sequence[int]) -> list[tuple[Image.Image, Image.Image]]:
        """Draw some held-out images as they are annotated, and as the model sees them."""
        return []

    def save_examples(self, folder: Path, images: Any) -> list[Path]:
        """Write a few held-out images into the folder of the run, to try `gmf predict` on; return their paths."""
        return []

    def report(self, folder: Path, images: Any, measured: EvalResult) -> Path:
        """Write the report of a run, with some held-out images.

        Args:
            folder: Of the run.
            images: The held-out set.
            measured: What `evaluate` found on it.

        Returns:
            The path of report.html.
        """
        from .report import write_report

        return write_report(self, folder, images, measured)
