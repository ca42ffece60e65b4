"""What is done with a trained detector or segmenter: measured, used on images, reported."""

import io
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader

from ..files import write_file
from ..visual.drawing import draw_objects, draw_segments
from ..visual.figures import BLUE
from .classification.predict import Predicted
from .classification.report import curves, write_page

Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        result: Metrics by name, for a JSON object; per_class holds those of each class.
        text: The main ones in a line or two.
        table: Those of each class, the worst first.
        skipped: A line for each image that was left out.
    """

    result: dict[str, Any]
    text: str
    table: str
    skipped: list[str]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _percent(value: float | None) -> str:
    """Show a share; a dash for none, and for COCO's -1 where there is no object to find."""
    return "-" if value is None or value < 0 else f"{value:.2%}"


def _ranked(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Make a table of the classes, the worst first; those without a number last."""
    length = max(len(row["class"]) for row in (*rows, {"class": "class"}))
    ordered = sorted(rows, key=lambda row: (_percent(row[metric]) == "-", row[metric] or 0))
    lines = [f"{row['class']:{length}}{_percent(row[metric]):>9}" for row in ordered]
    return "\n".join([f"{'class':{length}}{metric:>9}", *lines])


def _side_by_side(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> Figure:
    figure = Figure(figsize=(9, 3.4 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), 2, squeeze=False)
    for row, pair in zip(axes, pairs, strict=True):
        for axis, image in zip(row, pair, strict=True):
            axis.imshow(image)
            axis.axis("off")
    axes[0][0].set_title("annotated", fontsize=9)
    axes[0][1].set_title("found", fontsize=9)
    return figure


class _Scenes(ABC):
    """A trained network with what is stored beside it."""

    metric: tuple[str, str]  # the main one: in metrics.csv, and in words

    def __init__(self, run: str | Path, device: torch.device, image_size: int | None, dtype: torch.dtype | None) -> None:
        self.model, self.config = self._load(run)
        self.model.to(device)
        self.class_names: list[str] = self.config["class_names"]
        self.device, self.dtype = device, dtype
        if image_size:
            self._resize(image_size)

    @abstractmethod
    def _load(self, run: str | Path) -> tuple[Any, dict[str, Any]]: ...

    @abstractmethod
    def _resize(self, image_size: int) -> None: ...

    @abstractmethod
    def open(self, data: str, split: str) -> Any:
        """Open a split of a data set."""

    @abstractmethod
    def evaluate(self, images: Any, workers: int, progress: Progress) -> Measured:
        """Measure on every image once."""

    @abstractmethod
    def predict(self, image: Image.Image, name: str = "", score: float = 0.5) -> Predicted:
        """Look at an image (RGB); the score from which objects are drawn matters for detection alone."""

    @abstractmethod
    def examples(self, images: Any, indices: Sequence[int]) -> list[tuple[Image.Image, Image.Image]]:
        """Draw some held-out images as they are annotated, and as the model sees them."""

    def _loader(self, images: Any, workers: int, collate: Any) -> DataLoader[Any]:
        return DataLoader(images, batch_size=1, num_workers=workers, collate_fn=collate)

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _check_classes(self, images: Any, data: str) -> Any:
        if images.class_names != self.class_names:
            raise ValueError(
                f"{data} has the classes {', '.join(images.class_names[:4])}, ... ({len(images.class_names)}) and the model "
                f"{', '.join(self.class_names[:4])}, ... ({len(self.class_names)}), expected the same in the same order"
            )
        return images

    def report(self, folder: Path, images: Any, measured: Measured) -> Path:
        """Write the report of a run, with some held-out images."""
        shown = np.random.default_rng(0).permutation(len(images))[:6].tolist()
        rows = measured.result["per_class"]
        name = next(key for key in ("mask_AP", "box_AP", "IoU") if key in rows[0])
        bars = Figure(figsize=(9, 1 + 0.25 * len(rows)), layout="constrained")
        axis = bars.subplots()
        axis.barh([row["class"] for row in rows], [100 * max(0, row[name] or 0) for row in rows], color=BLUE)
        axis.invert_yaxis()
        axis.set(xlabel=f"{name.replace('_', ' ')} (%)", xlim=(0, 100))
        table = {
            key.replace("_", " "): f"{value:.2f}" if "per_second" in key else _percent(value)
            for key, value in measured.result.items()
            if isinstance(value, float)
        }
        table["held-out images"] = f"{measured.result['images']:,}; the epoch shown is the best of the run on these same images"
        sections = {"Curves": ("curves", curves(folder, *self.metric)), "Classes": ("classes", bars)}
        if pairs := self.examples(images, sorted(shown)):
            sections["Held-out images"] = ("predictions", _side_by_side(pairs))
        value = measured.result[self.metric[0].removeprefix("val_")]
        return write_page(folder, f"{self.metric[1]} {value:.2%} on held-out images", table, sections)


class Objects(_Scenes):
    """A detector: boxes, and masks if it is Mask R-CNN."""

    def _load(self, run: str | Path) -> tuple[Any, dict[str, Any]]:
        from .detection.training import load_detector

        model, config = load_detector(run)
        self.kinds = {"box": "bbox", **({"mask": "segm"} if model.masks else {})}
        self.metric = ("val_mask_AP", "mask AP") if model.masks else ("val_box_AP", "box AP")
        return model, config

    def _resize(self, image_size: int) -> None:
        self.model.network.transform.min_size = (image_size,)
        self.model.network.transform.max_size = max(image_size, self.model.network.transform.max_size)

    def open(self, data: str, split: str) -> Any:
        """Open a split of a folder with COCO's annotations."""
        from .detection.data import CocoImages

        return self._check_classes(CocoImages(data, split, masks=self.model.masks), data)

    @torch.inference_mode()
    def _find(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        with self._precision():
            found: dict[str, torch.Tensor] = self.model([image.to(self.device)])[0]
        return {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in found.items()}

    def evaluate(self, images: Any, workers: int, progress: Progress) -> Measured:
        """Compute COCO's twelve numbers, for boxes and masks."""
        from .detection.data import coco_numbers, collate, restrict, to_results

        results: list[dict[str, Any]] = []
        skipped, seconds, start = list(images.skipped), 0.0, time.perf_counter()
        seen: set[Any] = set()
        for inputs, ids, problems in progress(self._loader(images, workers, collate), "evaluating"):
            skipped += problems
            if ids[0] != -1 and not problems:
                begun = time.perf_counter()
                results += to_results(self._find(inputs[0]), ids[0], images.category_ids)
                seconds += time.perf_counter() - begun
                seen.add(ids[0])
        if not seen:
            raise ValueError(f"no image to evaluate on: {skipped[0]}")
        result: dict[str, Any] = {}
        classes: list[dict[str, Any]] = [{"class": name, "index": index} for index, name in enumerate(self.class_names)]
        for name, kind in self.kinds.items():
            numbers, per_class = coco_numbers(restrict(images.truth, seen), results, kind)  # type: ignore[arg-type]
            result |= {f"{name}_{number}": value for number, value in numbers.items()}
            for row, measured in zip(classes, per_class, strict=True):
                row[f"{name}_AP"] = measured["AP"]
        lines = []
        for name in self.kinds:
            numbers = {key.removeprefix(f"{name}_"): value for key, value in result.items() if key.startswith(name)}
            lines.append(f"{name:4}  {'  '.join(f'{key} {_percent(value)}' for key, value in numbers.items())}")
        rates = {"images_per_second": len(seen) / (time.perf_counter() - start), "model_images_per_second": len(seen) / seconds}
        result |= {"images": len(seen), **rates, "objects_left_out": images.dropped, "per_class": classes}
        main = f"{list(self.kinds)[-1]}_AP"
        return Measured(result, "\n".join(lines), _ranked(classes, main), skipped)

    def predict(self, image: Image.Image, name: str = "", score: float = 0.5) -> Predicted:
        """Find objects; those of at least `score` are drawn and listed, all are in COCO's results."""
        from .detection.data import to_results, to_tensor

        found = self._find(to_tensor(image))
        stem = Path(name).stem
        image_id = int(stem) if stem.isdecimal() else Path(name).name  # as COCO's files are named
        results = to_results(found, image_id, self.config["category_ids"])
        sure = found["scores"] >= score
        objects = {key: value[sure] for key, value in found.items()}
        if "masks" in objects:
            objects["masks"] = objects["masks"][:, 0] >= 0.5
        listed = [
            {"class": self.class_names[label - 1], "score": value, "box": box}
            for label, value, box in zip(
                objects["labels"].tolist(), objects["scores"].tolist(), objects["boxes"].tolist(), strict=True
            )
        ]
        counts = {n: sum(thing["class"] == n for thing in listed) for n in self.class_names}
        text = ", ".join(f"{count} {n}" for n, count in counts.items() if count) or "nothing"
        drawn = {".png": _png(draw_objects(image, objects, self.class_names))}
        return Predicted({"objects": listed}, text, drawn, results)

    def examples(self, images: Any, indices: Sequence[int]) -> list[tuple[Image.Image, Image.Image]]:
        """Draw objects as they are annotated and as they are found."""
        pairs: list[tuple[Image.Image, Image.Image]] = []
        for index in indices:
            try:
                image, record = images.read(index)
            except ValueError:  # unreadable
                continue
            target = images.target(record)
            if "masks" in target:
                target["masks"] = target["masks"].bool()
            found = self.predict(image, record["file_name"], score=0.5)
            pairs.append((draw_objects(image, target, self.class_names), Image.open(io.BytesIO(found.files[".png"]))))
        return pairs


class Segments(_Scenes):
    """A segmenter: a class for every pixel."""

    metric = ("val_mIoU", "mIoU")

    def __init__(
        self,
        run: str | Path,
        device: torch.device,
        image_size: int | None,
        dtype: torch.dtype | None,
        slide: bool = False,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        super().__init__(run, device, image_size, dtype)
        self.how: dict[str, Any] = {"slide": slide, "scales": scales, "flip": flip}

    def _load(self, run: str | Path) -> tuple[Any, dict[str, Any]]:
        from .segmentation.training import load_segmenter

        return load_segmenter(run)

    def _resize(self, image_size: int) -> None:
        self.model.image_size = image_size

    def open(self, data: str, split: str) -> Any:
        """Open a split of a folder with images, masks and classes, or of ADE20K's."""
        from .segmentation.data import SemanticImages

        return self._check_classes(SemanticImages(data, split, prepare=self.model.prepare), data)

    def _labels(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        from .segmentation.training import segment

        with self._precision():
            return segment(self.model, image.to(self.device), size, **self.how).argmax(dim=0).cpu()

    def evaluate(self, images: Any, workers: int, progress: Progress) -> Measured:
        """Compute mIoU and accuracies from one confusion matrix over all pixels, in the size of the files."""
        from .segmentation.data import IGNORE, collate, confusion_matrix, numbers

        confusion: Any = 0
        skipped, seen, seconds, start = list(images.skipped), 0, 0.0, time.perf_counter()
        for inputs, (true, *_), problems in progress(self._loader(images, workers, collate), "evaluating"):
            skipped += problems
            if not true.numel():
                continue
            begun = time.perf_counter()
            predicted = self._labels(inputs[0], (true.shape[0], true.shape[1]))
            seconds += time.perf_counter() - begun
            confusion = confusion + confusion_matrix(true, predicted, len(self.class_names))
            seen += 1
        if not seen:
            raise ValueError(f"no image to evaluate on: {skipped[0]}")
        measured = numbers(confusion)
        iou = measured.pop("iou")
        classes = [
            {"class": name, "index": i, "IoU": value} for i, (name, value) in enumerate(zip(self.class_names, iou, strict=True))
        ]
        text = "  ".join(f"{name.replace('_', ' ')} {value:.2%}" for name, value in measured.items())
        rates = {"images_per_second": seen / (time.perf_counter() - start), "model_images_per_second": seen / seconds}
        result = {**measured, "images": seen, **rates, **self.how, "ignored_label": IGNORE, "per_class": classes}
        return Measured(result, text, _ranked(classes, "IoU"), skipped)

    def predict(self, image: Image.Image, name: str = "", score: float = 0.5) -> Predicted:
        """Give each pixel its class: a mask with the numbers of the data set's own masks, and an overlay with a legend."""
        labels = self._labels(self.model.prepare(image), (image.height, image.width))
        ids = np.asarray(self.config["class_ids"], dtype=np.uint8)
        mask = Image.fromarray(ids[labels.numpy()], mode="P")
        colors = np.zeros((256, 3), dtype=np.uint8)
        colors[ids] = self.config["colors"]
        mask.putpalette(colors.tobytes())
        shares = labels.flatten().bincount(minlength=len(self.class_names)) / labels.numel()
        there = {self.class_names[i]: shares[i].item() for i in shares.argsort(descending=True).tolist() if shares[i]}
        drawn = draw_segments(image, labels, self.class_names, self.config["colors"])
        text = ", ".join(f"{n} {share:.1%}" for n, share in there.items())
        return Predicted({"shares": there}, text, {"-overlay.png": _png(drawn), "-mask.png": _png(mask)}, [])

    def examples(self, images: Any, indices: Sequence[int]) -> list[tuple[Image.Image, Image.Image]]:
        """Draw segments as they are annotated and as they are found."""
        pairs = []
        for index in indices:
            try:
                image, true = images.read(index)
            except ValueError:  # unreadable
                continue
            labels = self._labels(self.model.prepare(image), (image.height, image.width))
            pairs.append(
                tuple(draw_segments(image, shown, self.class_names, self.config["colors"]) for shown in (true, labels))
            )
        return pairs  # type: ignore[return-value]


def write_results(out: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write COCO's results of all images as results.json; return the file."""
    write_file(out / "results.json", json.dumps(results))
    return str(out / "results.json")
