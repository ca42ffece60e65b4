"""Data sets with COCO's annotations: read, checked before training, turned into samples."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.images import read_image
from ...data.samples import Samples

FIELDS: dict[str, dict[str, Any]] = {  # that each record must have, and of what kind
    "images": {"id": int | str, "file_name": str, "width": int, "height": int},
    "categories": {"id": int | str, "name": int | str},
}


def find_annotations(folder: Path, split: str) -> Path:
    """Find the annotations of a split: annotations/instances_SPLIT.json, with or without a year, or SPLIT.json.

    Raises:
        ValueError: If there are none.
    """
    pattern = re.compile(rf"(instances_)?{re.escape(split)}(\d{{4}})?")
    places = [place for place in (folder / "annotations", folder) if place.is_dir()]
    files = [file for place in places for file in sorted(place.glob("*.json"))]
    for file in files:
        if pattern.fullmatch(file.stem):
            return file
    there = ", ".join(str(file.relative_to(folder)) for file in files[:5]) or "no JSON file"
    raise ValueError(f"{folder}: expected COCO's annotations in annotations/instances_{split}.json; found {there}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{path}: not COCO's annotations: expected a list of objects under {key}")
    for key, fields in FIELDS.items():
        for record in content[key]:
            if wrong := [field for field, kind in fields.items() if not isinstance(record.get(field), kind)]:
                raise ValueError(f"{path}: not COCO's annotations: a record under {key} has no {', '.join(wrong)} as expected")
    return content


def _folder_of(annotations: Path, folder: Path, file_names: Iterable[str]) -> Path:
    """Find the folder with the images: the first of the usual ones in which one of them lies."""
    split = annotations.stem.removeprefix("instances_")
    places = [folder / "images" / split, folder / split, folder / "images", folder, annotations.parent]
    return next((place for name in file_names for place in places if (place / name).is_file()), places[2])


def _problem_of_image(path: Path, width: int, height: int) -> str:
    """Return what is wrong with an image, by its head alone, or nothing."""
    try:
        with Image.open(path) as image:
            size = image.size
    except FileNotFoundError:
        return f"{path}: no such file"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return f"{path}: not a readable image"
    return "" if size == (width, height) else f"{path}: is {size[0]} x {size[1]} pixels and annotated as {width} x {height}"


def _as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return COCO's run-length encoding of polygons, of an uncompressed encoding or of itself.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), list(segmentation.get("size") or [])
        if size != [height, width]:
            raise ValueError(f"segmentation of size {size}")
        if isinstance(counts, list):
            if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != height * width:
                raise ValueError("segmentation with a wrong number of pixels")
            return dict(rle.frPyObjects(segmentation, height, width))
        if not isinstance(counts, str) or not counts.isascii():
            raise ValueError("segmentation without counts")
        try:
            rle.decode([{"size": size, "counts": counts}])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"segmentation that cannot be decoded: {error}") from error
        return {"size": size, "counts": counts}
    return dict(rle.merge(rle.frPyObjects(_polygons(segmentation), height, width)))


def _polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons that have three points or more.

    Raises:
        ValueError: If there are none.
    """
    listed = segmentation if isinstance(segmentation, list) else []
    usable = [p for p in listed if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _finite(p)]
    if not usable:
        raise ValueError("segmentation without a polygon of three points")
    return usable


def _finite(numbers: Any) -> bool:
    return all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)


class CocoImages(Samples):
    """The images of one split with their objects.

    Training samples are (image (3, H, W) in 0 to 1, target, problem); the target holds boxes (N, 4) as x1, y1, x2, y2 in
    pixels, labels (N) from 1 on, and masks (N, H, W) if asked for. Crowds are left out of training, as is usual, and objects
    that make no sense out of everything; images without objects stay. Evaluation samples are (image, id of the image,
    problem); a blank has id -1.

    Args:
        folder: Holds annotations and images.
        split: train, val or another.
        masks: Whether objects need masks.
        transform: From (image, target) to the two augmented; none for evaluation.
        seed: Of the augmentation.

    Attributes:
        class_names: Names of the categories, in the order of their ids; label k is the (k - 1)th.
        skipped: A line for each image that is left out: missing, unreadable, or of another size than annotated.
        dropped: A line for each object that is left out: without area, outside of the image, of no category.
        ground_truth: COCO's annotations of what is left, for the evaluation.

    Raises:
        ValueError: If the annotations cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        masks: bool,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        folder = Path(folder)
        annotations = find_annotations(folder, split)
        content = _read(annotations)
        self.annotations, self.masks, self.transform, self.seed = annotations, masks, transform, seed
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.class_names = [str(category["name"]) for category in categories]
        self.category_ids = [category["id"] for category in categories]
        if not categories or len(set(self.category_ids)) < len(categories):
            raise ValueError(f"{annotations}: expected one or more categories, each with an id of its own")
        if not content["images"]:
            raise ValueError(f"{annotations}: holds no images")
        self.folder = _folder_of(annotations, folder, (image["file_name"] for image in content["images"]))
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(
                lambda image: _problem_of_image(self.folder / image["file_name"], image["width"], image["height"]),
                content["images"],
            )
            problems = list(found)
        self.skipped = [problem for problem in problems if problem]
        images = [image for image, problem in zip(content["images"], problems, strict=True) if not problem]
        if not images:
            raise ValueError(f"{annotations}: none of its {len(problems)} images can be used: {self.skipped[0]}")
        self.dropped: list[str] = []
        objects = self._objects(content["annotations"], content["images"], {image["id"] for image in images})
        if not any(not annotation["iscrowd"] for of_image in objects.values() for annotation in of_image):
            reason = f": {self.dropped[0]}" if self.dropped else ""
            raise ValueError(f"{annotations}: holds no object {'with a mask ' if masks else ''}to learn or to find{reason}")
        annotated = [annotation for of_image in objects.values() for annotation in of_image]
        ground_truth = {"images": images, "annotations": annotated, "categories": categories}
        self.ground_truth: dict[str, Any] = ground_truth if transform is None else {}
        # As bytes: a worker that counts references to millions of objects would copy the memory that it shares.
        self._records = [
            json.dumps({**image, "objects": objects.get(image["id"], [])}, default=str).encode() for image in images
        ]

    def _objects(self, annotations: Iterable[Any], images: Sequence[Any], usable: set[Any]) -> dict[Any, list[dict[str, Any]]]:
        """Check the objects, and gather them by image."""
        by_id = {image["id"]: image for image in images}
        if len(by_id) < len(images):
            raise ValueError(f"{self.annotations}: two images are annotated under one id, expected an id for each")
        labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        found: dict[Any, list[dict[str, Any]]] = {}
        for number, record in enumerate(annotations, start=1):
            image_id = record.get("image_id")
            image = by_id.get(image_id) if isinstance(image_id, int | str) else None
            name = f"object {record.get('id', number)} of {image['file_name'] if image else image_id}"
            try:
                if image is None:
                    raise ValueError("an image that is not annotated")
                annotation = self._object(record, image, labels)
            except ValueError as error:
                self.dropped.append(f"{name}: {error}")
                continue
            if image["id"] in usable:
                found.setdefault(image["id"], []).append({"id": number, "image_id": image["id"], **annotation})
        return found

    def _object(self, record: Mapping[str, Any], image: Mapping[str, Any], labels: Mapping[Any, int]) -> dict[str, Any]:
        height, width = image["height"], image["width"]
        category = record.get("category_id")
        if not isinstance(category, int | str) or category not in labels:
            raise ValueError(f"category {category}, which is not defined")
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not _finite(box):
            raise ValueError(f"box {box}, expected four numbers: x, y, width, height")
        x, y, w, h = box
        inside = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
        if w < 1 or h < 1:
            raise ValueError(f"box {box} is less than a pixel wide or high")
        if min(inside) < 1:
            raise ValueError(f"box {box} lies outside of the image of {width} x {height}")
        area = record.get("area")
        annotation = {
            "category_id": category,
            "label": labels[category],
            "bbox": box,
            "area": area if isinstance(area, int | float) else w * h,
            "iscrowd": int(bool(record.get("iscrowd"))),
        }
        if self.masks:
            annotation["segmentation"] = record.get("segmentation")
            if isinstance(annotation["segmentation"], dict):
                _as_rle(annotation["segmentation"], height, width)
            else:
                _polygons(annotation["segmentation"])  # not drawn yet: they are many
        return annotation

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """Return an image and its annotations.

        Raises:
            ValueError: If it cannot be read.
        """
        record = json.loads(self._records[index])
        return read_image(self.folder / record["file_name"]), record

    def target(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return boxes (N, 4), labels (N) and, if asked for, masks (N, H, W) of an image, without crowds."""
        height, width = record["height"], record["width"]
        annotated = [annotation for annotation in record["objects"] if not annotation["iscrowd"]]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotated], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([annotation["label"] for annotation in annotated], dtype=torch.int64),
        }
        if self.masks:
            encoded = [_as_rle(annotation["segmentation"], height, width) for annotation in annotated]
            masks = rle.decode(encoded) if encoded else np.zeros((height, width, 0), dtype=np.uint8)  # (H, W, N)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))))
        return target

    def for_training(self, content: tuple[Image.Image, dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment an image and its objects together."""
        assert self.transform is not None
        image, record = content
        return self.transform(image, self.target(record))

    def for_evaluation(self, content: tuple[Image.Image, dict[str, Any]] | None) -> tuple[Tensor, int]:
        """Give the image and its id."""
        if content is None:
            return torch.zeros(3, 32, 32), -1
        return to_tensor(content[0]), content[1]["id"]


def to_tensor(image: Image.Image) -> Tensor:
    """From an image to (3, H, W) in 0 to 1."""
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def detection_transform(hflip: float, vflip: float, color_jitter: float) -> Callable[[Any, Any], tuple[Any, Any]]:
    """From an image and its target to the two augmented; objects that have become too small are left out."""
    steps: list[Any] = [v2.ToImage()]
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    steps += [v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=1.0), v2.ToPureTensor()])


def collate_detection(samples: Sequence[tuple[Any, ...]]) -> tuple[list[Tensor], list[Any], list[str]]:
    """Make a batch of lists, since images differ in size: images, targets (or ids), and the problems there were."""
    images, targets, problems = zip(*samples, strict=True)
    return list(images), list(targets), [line for problem in problems for line in problem.splitlines()]
