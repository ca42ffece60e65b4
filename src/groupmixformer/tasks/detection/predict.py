"""A trained detector, ready to look at images, to be measured and to explain what it finds."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import batched_nms

from ...data.channels import AnyImage, Channels, in_colour
from ...data.samples import Doubts
from ...data.split import Splitter
from ...files import to_json, write_file
from ...run_folder import RunFolder
from ...visual.drawing import draw_objects
from ..explainer import BackboneExplainer, Target
from ..predictor import (
    EvalResult,
    Point,
    Predicted,
    Predictor,
    Progress,
    Stopwatch,
    View,
    class_table,
    percent,
    to_png,
    windows,
)
from .data import CocoImages, collate_detection, to_tensor
from .metrics import coco_metrics, restrict, to_results
from .model import load_detector

CUT = 2  # pixels from the edge of a window within which the side of a box counts as cut


@dataclass(frozen=True)
class DetectionResult(EvalResult):
    """What an evaluation of a detector found; also what is annotated and what was found, in COCO's form."""

    ground_truth: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()


class DetectionPredictor(Predictor):
    """A detector: boxes, masks if it is Mask R-CNN, and keypoints if it is Keypoint R-CNN.

    Options are ``score_threshold``, the least score of an object that is drawn and listed; and ``tile``, the side in pixels of
    square windows, which overlap by a third, through which a larger image is looked at besides as a whole.
    """

    DEFAULTS: ClassVar = {"score_threshold": 0.5, "tile": None}

    def load(self, run: RunFolder, image_size: int | None) -> tuple[Any, dict[str, Any]]:
        """Return the detector, and the names and ids of its classes."""
        model, config = load_detector(run)
        self.class_names, self.channels = config["class_names"], Channels.stored(config, model.backbone.in_chans)
        self.keypoint_names, self.skeleton = config.get("keypoints", []), config.get("skeleton", [])
        self.kinds = model.kinds
        self.metric = (f"val_{list(self.kinds)[-1]}_AP", f"{list(self.kinds)[-1]} AP")
        if image_size:
            transform = model.network.transform
            transform.min_size, transform.max_size = (image_size,), max(image_size, transform.max_size)
        return model, config

    @property
    def planes(self) -> int:
        """One for the mask of each object."""
        return int(self.model.network.roi_heads.detections_per_img) if self.model.masks else 0

    def open_data(self, data: str, split: str = "val", splitter: Splitter | None = None) -> CocoImages:
        """Open a split of a folder with COCO's annotations."""
        reading: dict[str, Any] = {"splitter": splitter, "channels": self.channels, "keypoints": self.model.keypoints}
        opened = CocoImages(data, split, self.model.masks, or_whole=True, **reading)
        if opened.keypoint_names != self.keypoint_names:
            got, expected = (", ".join(names) for names in (opened.keypoint_names, self.keypoint_names))
            raise ValueError(f"{data}: its keypoints are {got}, expected those of the run, {expected}")
        images: CocoImages = self.match_classes(opened, data)
        return images

    def _find(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is found in an image (C, H, W), the best first, and in windows of it if there is to be some."""
        tile, (height, width) = self.options["tile"], image.shape[-2:]
        whole = self._look(image)
        if not tile or max(height, width) <= tile:
            return whole
        found = [{**whole, "at": torch.zeros(len(whole["scores"]), 2, dtype=torch.int64)}]
        for top in windows(height, tile):
            for left in windows(width, tile):
                inside = self._look(image[:, top : top + tile, left : left + tile])
                # What an edge cuts is whole in the next window or, if it is large, in the image.
                ends = torch.tensor([left > 0, top > 0, left + tile < width, top + tile < height])
                edges = torch.tensor([0, 0, tile, tile])
                kept = ~(((inside["boxes"] - edges).abs() < CUT) & ends).any(dim=1)
                one = {name: value[kept] for name, value in inside.items()}
                offset = torch.tensor([left, top])
                one["boxes"] = one["boxes"] + offset.repeat(2)
                if "keypoints" in one:
                    one["keypoints"][..., :2] += offset
                found.append({**one, "at": offset.expand(len(one["scores"]), 2)})
        merged = {name: torch.cat([one[name] for one in found]) for name in found[0] if name != "masks"}
        best = batched_nms(merged["boxes"], merged["scores"], merged["labels"], iou_threshold=0.5)
        merged = {name: value[best] for name, value in merged.items()}
        at = merged.pop("at")
        if "masks" in whole:
            masks = [mask for one in found for mask in one["masks"]]
            merged["masks"] = torch.zeros(len(best), 1, height, width)
            for canvas, index, (left, top) in zip(merged["masks"], best.tolist(), at.tolist(), strict=True):
                mask = masks[index]
                canvas[:, top : top + mask.shape[1], left : left + mask.shape[2]] = mask
        return merged

    @torch.inference_mode()
    def _look(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.autocast():
            found: dict[str, torch.Tensor] = self.model([image.to(self.device)])[0]
        return {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in found.items()}

    def evaluate(self, images: CocoImages, workers: int = 0, progress: Progress = lambda items, _: items) -> DetectionResult:
        """Compute COCO's metrics, for boxes, masks and keypoints."""
        results: list[dict[str, Any]] = []
        doubtful, watch = list[str](), Stopwatch()
        seen: set[Any] = set()
        loader = DataLoader(images, batch_size=1, num_workers=workers, collate_fn=collate_detection)
        for inputs, ids, problems in progress(loader, "evaluating"):
            doubtful += problems
            if ids[0] is not None:
                with watch:
                    results += to_results(self._find(inputs[0]), ids[0], images.category_ids)
                seen.add(ids[0])
        skipped = [*images.skipped, *Doubts().take(doubtful)]
        if not seen:
            raise ValueError(f"no image to evaluate on: {skipped[0]}")
        result: dict[str, Any] = {}
        lines: list[str] = []
        classes: list[dict[str, Any]] = [{"class": name, "index": index} for index, name in enumerate(self.class_names)]
        ground_truth, remarks = restrict(images.ground_truth, seen), list[str]()
        for name, kind in self.kinds.items():
            metrics, per_class = coco_metrics(ground_truth, results, kind)
            if not metrics["AP50"]:
                remarks.append(f"no {name} that it finds is right: {name} AP50 is 0, as it is for a model that finds nothing")
            result |= {f"{name}_{metric}": value for metric, value in metrics.items()}
            lines.append(f"{name:4}  {'  '.join(f'{metric} {percent(value)}' for metric, value in metrics.items())}")
            for row, of_class in zip(classes, per_class, strict=True):
                row[f"{name}_AP"] = of_class["AP"]
        result |= {"images": len(seen), **watch.rates(len(seen)), "objects_left_out": images.dropped, "per_class": classes}
        table = class_table(classes, self.metric[0].removeprefix("val_"))
        text = "\n".join(lines)
        return DetectionResult(result, text, table, skipped, "", images.notes, remarks, ground_truth, results)

    def predict(self, image: AnyImage, name: str = "") -> Predicted:
        """Find objects; those of at least the least score are drawn and listed, all are in COCO's results."""
        found = self._find(to_tensor(image))
        results = to_results(found, _image_id(name), self.config["category_ids"])
        sure = found["scores"] >= self.options["score_threshold"]
        objects = {key: value[sure] for key, value in found.items()}
        if "masks" in objects:
            objects["masks"] = objects["masks"][:, 0] >= 0.5
        listed = [
            {"class": self.class_names[label - 1], "score": value, "box": box}
            for label, value, box in zip(
                objects["labels"].tolist(), objects["scores"].tolist(), objects["boxes"].tolist(), strict=True
            )
        ]
        if "keypoints" in found:
            for row, stored in zip(listed, results, strict=False):
                places = np.reshape(stored["keypoints"], (-1, 3)).tolist()
                row["keypoints"] = dict(zip(self.keypoint_names, places, strict=True))
        counts = {n: sum(row["class"] == n for row in listed) for n in self.class_names}
        text = ", ".join(f"{count} {n}" for n, count in counts.items() if count) or "nothing"
        drawn = draw_objects(in_colour(image), objects, self.class_names, self.skeleton)
        return Predicted({"objects": listed}, text, {".png": to_png(drawn)}, results)

    def answer(self, found: Predicted) -> dict[str, Any]:
        """Return the objects, with their masks in COCO's run lengths."""
        # Both lists begin with the best.
        return {
            **found.result,
            "objects": [
                row | ({"mask": stored["segmentation"]} if "segmentation" in stored else {})
                for row, stored in zip(found.result["objects"], found.results, strict=False)
            ],
        }

    def to_supervision(self, found: Predicted) -> Any:
        """Return the objects of at least the least score as supervision's Detections, with the names of their classes.

        Keypoints (N, K, 3) are in their data, as x, y and the height of the heat map.
        """
        from supervision import Detections

        results = found.results[: len(found.result["objects"])]
        boxes = np.array([row["box"] for row in found.result["objects"]], dtype=np.float32).reshape(-1, 4)
        masks = [rle.decode(one["segmentation"]).astype(bool) for one in results if "segmentation" in one]
        places = [one["keypoints"] for one in results if "keypoints" in one]
        keypoints = {"keypoints": np.reshape(places, (len(places), -1, 3))} if self.model.keypoints else {}
        return Detections(
            xyxy=boxes,
            mask=np.stack(masks) if masks else None,
            confidence=np.array([one["score"] for one in results], dtype=np.float32),
            class_id=np.array([self.config["category_ids"].index(one["category_id"]) for one in results], dtype=int),
            data={"class_name": np.array([row["class"] for row in found.result["objects"]], dtype=str), **keypoints},
        )

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
            annotated = draw_objects(in_colour(image), target, self.class_names, self.skeleton)
            found = self.predict(image, record["file_name"])
            pairs.append((annotated, Image.open(io.BytesIO(found.files[".png"]))))
        return pairs

    def report(self, folder: Path, images: Any, measured: EvalResult) -> Path:
        """Write the report of a run, with curves, confusion, and images drawn at the best threshold."""
        from .report import write_report

        assert isinstance(measured, DetectionResult)
        return write_report(self, folder, images, measured)


def _image_id(name: str) -> int | str:
    """Return the number of a file that is named by one, as COCO's are, or else its name."""
    path = Path(name)
    return int(path.stem) if path.stem.isdecimal() else path.name


def write_coco_results(out: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write COCO's results of all images, by their paths, as results.json; return the file.

    An image's id is its number or name, or where these are the same for several images, the names of all, or the paths of all.
    """
    names: tuple[Callable[[str], Any], ...] = (_image_id, lambda path: Path(path).name, str)
    ids = next(ids for name in names if len(set((ids := {path: name(path) for path in results}).values())) == len(results))
    listed = [{**result, "image_id": ids[path]} for path, of_image in results.items() for result in of_image]
    write_file(out / "results.json", to_json(listed))
    return str(out / "results.json")


class DetectionExplainer(BackboneExplainer):
    """Explains an object that a detector finds: by its number, or the nearest to the first query, or the best."""

    def __init__(
        self, run: str | Path | RunFolder, device: torch.device, image_size: int | None = None, wanted_object: int | None = None
    ) -> None:
        super().__init__(DetectionPredictor(run, device, image_size))
        self.wanted = wanted_object

    def view(self, image: AnyImage) -> View:
        """Resize the image as torchvision does."""
        transform = self.model.network.transform
        seen, _ = transform([to_tensor(image).to(self.predictor.device)])
        return self._view(image, seen.tensors, seen.image_sizes[0], transform.image_mean, transform.image_std)

    def choose(self, image: AnyImage, view: View, stage: int, point: Point | None) -> Target:
        """Weigh the score of the object."""
        (found,), features = self._run([to_tensor(image).to(self.predictor.device).requires_grad_()])
        boxes, scores = found["boxes"].detach().cpu(), found["scores"].detach().cpu()
        if self.wanted is not None:
            if self.wanted >= len(scores):
                last = f", expected 0 to {len(scores) - 1}" if len(scores) else ""
                raise ValueError(f"got object {self.wanted}, and {len(scores)} were found{last}")
            number = self.wanted
        elif len(scores) and point is not None:
            sure = max(1, int((scores >= 0.5).sum()))  # those that gmf predict shows, the best if there is none
            x, y = point[1] + 0.5, point[0] + 0.5
            left, top, right, bottom = boxes[:sure].unbind(dim=1)
            away = torch.hypot(torch.relu(torch.maximum(left - x, x - right)), torch.relu(torch.maximum(top - y, y - bottom)))
            areas = (right - left) * (bottom - top)
            number = min(range(sure), key=lambda i: (away[i].item(), areas[i].item()))
        elif len(scores):
            number = 0
        else:
            return Target({"objects": 0})
        label, probability = int(found["labels"][number]), scores[number].item()
        name, box = self.predictor.class_names[label - 1], boxes[number].tolist()
        about = {"class": name, "index": label - 1, "probability": probability}
        about |= {"object": number, "objects": len(scores), "box": box}
        values = self._weigh(found["scores"][number], features, view, stage)
        height, width = view.factors
        seen = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
        return Target(about, values, seen)
