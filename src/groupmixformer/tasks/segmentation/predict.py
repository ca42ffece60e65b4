"""A trained segmenter, ready to look at images, to be measured and to explain what it sees."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from ...data.channels import AnyImage, Channels, in_colour
from ...data.samples import Doubts
from ...data.split import Splitter
from ...run_folder import RunFolder
from ...visual.drawing import draw_segments
from ..explainer import BackboneExplainer, Target, class_index
from ..predictor import (
    EvalResult,
    Point,
    Predicted,
    Predictor,
    Progress,
    Stopwatch,
    View,
    class_table,
    no_better_than_one_class,
    to_png,
)
from .data import IGNORE, SemanticImages, collate_segmentation
from .metrics import confusion_matrix, segmentation_metrics
from .model import STRIDE, load_segmenter, segment


@dataclass(frozen=True)
class SegmentationResult(EvalResult):
    """What an evaluation of a segmenter found.

    Attributes:
        confusion: Pixels by true class (rows) and predicted class (columns), (K, K).
        by_image: Place and mIoU of each image.
    """

    confusion: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    by_image: Sequence[tuple[int, float]] = ()


class SegmentationPredictor(Predictor):
    """A segmenter: a class for every pixel.

    Options are ``sliding_window``, to look through windows of the training size, which overlap by a third, instead of at the
    whole image; ``scales``, factors by which an image is resized, over which probabilities are averaged; and ``flip``, to
    average with the mirrored image.
    """

    metric = ("val_mIoU", "mIoU")
    DEFAULTS: ClassVar = {"sliding_window": False, "scales": (1.0,), "flip": False}

    def load(self, run: RunFolder, image_size: int | None) -> tuple[Any, dict[str, Any]]:
        """Return the segmenter, and the names, ids and colours of its classes."""
        model, config = load_segmenter(run)
        self.class_names, self.channels = config["class_names"], Channels.stored(config, model.backbone.in_chans)
        model.image_size = image_size or model.image_size
        return model, config

    @property
    def planes(self) -> int:
        """One for each class."""
        return len(self.class_names)

    def open_data(self, data: str, split: str = "val", splitter: Splitter | None = None) -> SemanticImages:
        """Open a split of a folder with images, masks and classes, or of ADE20K's."""
        reading: dict[str, Any] = {"splitter": splitter, "channels": self.channels}
        opened = SemanticImages(data, split, prepare=self.model.prepare, or_whole=True, **reading)
        images: SemanticImages = self.match_classes(opened, data)
        return images

    def _labels(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        with self.autocast():
            return segment(self.model, image.to(self.device), size, **self.options).argmax(dim=0).cpu()

    def evaluate(
        self, images: SemanticImages, workers: int = 0, progress: Progress = lambda items, _: items
    ) -> SegmentationResult:
        """Compute mIoU and accuracies from one confusion matrix over all pixels, in the size of the files."""
        confusion: Any = 0
        doubtful, by_image, watch = list[str](), list[tuple[int, float]](), Stopwatch()
        loader = DataLoader(images, batch_size=1, num_workers=workers, collate_fn=collate_segmentation)
        for place, (inputs, (true, *_), problems) in enumerate(progress(loader, "evaluating")):
            doubtful += problems
            if not true.numel():
                continue
            with watch:
                predicted = self._labels(inputs[0], (true.shape[0], true.shape[1]))
            of_image = confusion_matrix(true, predicted, len(self.class_names))
            confusion = confusion + of_image
            by_image.append((place, segmentation_metrics(of_image)["mIoU"]))
        skipped = [*images.skipped, *Doubts().take(doubtful)]
        seen = len(by_image)
        if not seen:
            raise ValueError(f"no image to evaluate on: {skipped[0]}")
        metrics = segmentation_metrics(confusion)
        iou = metrics.pop("iou")
        classes = [
            {"class": name, "index": i, "IoU": value} for i, (name, value) in enumerate(zip(self.class_names, iou, strict=True))
        ]
        text = "  ".join(f"{name.replace('_', ' ')} {value:.2%}" for name, value in metrics.items())
        result = {
            **metrics,
            "images": seen,
            **watch.rates(seen),
            **self.options,
            "ignored_label": IGNORE,
            "per_class": classes,
        }
        right, counts = int(confusion.diag().sum()), confusion.sum(dim=1).int().tolist()
        remarks = no_better_than_one_class(right, counts, self.class_names, "pixels")
        table = class_table(classes, "IoU")
        return SegmentationResult(result, text, table, skipped, "", images.notes, remarks, confusion, by_image)

    def predict(self, image: AnyImage, name: str = "") -> Predicted:
        """Give each pixel its class: a mask with the numbers of the data set's own masks, and an overlay with a legend."""
        labels = self._labels(self.model.prepare(image), (image.height, image.width))
        ids = np.asarray(self.config["class_ids"], dtype=np.uint8)
        mask = Image.fromarray(ids[labels.numpy()], mode="P")
        colors = np.zeros((256, 3), dtype=np.uint8)
        colors[ids] = self.config["colors"]
        mask.putpalette(colors.tobytes())
        shares = labels.flatten().bincount(minlength=len(self.class_names)) / labels.numel()
        there = {self.class_names[i]: shares[i].item() for i in shares.argsort(descending=True).tolist() if shares[i]}
        drawn = draw_segments(in_colour(image), labels, self.class_names, self.config["colors"])
        text = ", ".join(f"{n} {share:.1%}" for n, share in there.items())
        return Predicted({"shares": there}, text, {"-overlay.png": to_png(drawn), "-mask.png": to_png(mask)}, [])

    def answer(self, found: Predicted) -> dict[str, Any]:
        """Return the shares, with the mask as a PNG and the numbers of the classes in it."""
        numbers = dict(zip(self.class_names, self.config["class_ids"], strict=True))
        mask = base64.b64encode(found.files["-mask.png"]).decode()
        return {**found.result, "numbers": {name: numbers[name] for name in found.result["shares"]}, "mask": mask}

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
                tuple(
                    draw_segments(in_colour(image), shown, self.class_names, self.config["colors"]) for shown in (true, labels)
                )
            )
        return pairs  # type: ignore[return-value]

    def report(self, folder: Path, images: Any, measured: EvalResult) -> Path:
        """Write the report of a run, with confusion, classes, the best and the worst images."""
        from .report import write_report

        assert isinstance(measured, SegmentationResult)
        return write_report(self, folder, images, measured)


class SegmentationExplainer(BackboneExplainer):
    """Explains the segment of a class: one that is named, that of the pixel at the first query, or the largest."""

    def __init__(
        self, run: str | Path | RunFolder, device: torch.device, image_size: int | None = None, wanted_class: str | None = None
    ) -> None:
        super().__init__(SegmentationPredictor(run, device, image_size))
        self.wanted = None if wanted_class is None else class_index(self.predictor.class_names, wanted_class)

    def view(self, image: AnyImage) -> View:
        """Resize the image as the segmenter does, and fill it up."""
        prepared = self.model.prepare(image)[None].to(self.predictor.device)
        height, width = prepared.shape[-2:]
        images = F.pad(prepared, (0, -width % STRIDE, 0, -height % STRIDE))
        return self._view(image, images, (height, width), self.model.mean, self.model.std)

    def choose(self, image: AnyImage, view: View, stage: int, point: Point | None) -> Target:
        """Weigh the logits of the class where it is the likeliest."""
        height, width = view.size
        logits, features = self._run(view.images[..., :height, :width].detach().requires_grad_())
        probabilities = logits[0].detach().float().softmax(dim=0)
        labels = probabilities.argmax(dim=0)
        if self.wanted is not None:
            index = self.wanted
        elif point is not None:
            index = int(labels[view.to_input(point)])
        else:
            index = int(labels.flatten().bincount().argmax())
        segment = labels == index
        name, share = self.predictor.class_names[index], segment.float().mean().item()
        probability = probabilities[index][segment].mean().item() if share else 0.0
        about = {"class": name, "index": index, "probability": probability, "share": share}
        values = self._weigh(logits[0, index][segment].sum(), features, view, stage)
        return Target(about, values)
