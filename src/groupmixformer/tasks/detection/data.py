"""Data sets with objects, in COCO's form whatever their format: checked before training, turned into samples."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...data.formats import recognise
from ...data.images import read_image
from ...data.objects import read_objects
from ...data.samples import Samples, in_threads, size_problem
from ...data.split import TRAIN, Splitter
from ...files import Fields
from ...visual.drawing import draw_objects, to_image


class _Ids:
    """Records of one kind by their ids, which are integers or texts, all of them.

    Args:
        records: What was read.
        kind: images or categories.
        source: What an error about all of them names.

    Raises:
        ValueError: If there are none, an id is of another kind than the first, or stands for two records.
    """

    def __init__(self, records: Sequence[Fields], kind: str, source: Path) -> None:
        if not records:
            raise ValueError(f"{source}: {kind} is [], expected one or more")
        self.texts = isinstance(records[0].values.get("id"), str)
        self.expected = f"{'a text' if self.texts else 'an integer'}, as the first id of the {kind} is"
        self.records: dict[Any, Fields] = {}
        for record in records:
            key = self.read(record, "id")
            if key in self.records:
                first = _short(self.records[key].where)
                raise ValueError(f"{record.where}: id is {key!r}, as in {first}, expected an id of its own")
            self.records[key] = record

    def read(self, record: Fields, name: str) -> Any:
        """Return an id of these in a field of any record."""
        value = record.values.get(name)
        if type(value) is (str if self.texts else int):
            return value
        return int(record.take(name, self.expected, lambda value: not self.texts and _whole(value)))


def _short(where: str) -> str:
    return where.rpartition(": ")[2]  # without the file


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()  # what some programs make of an integer


def _is_name(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _read_images(records: _Ids) -> dict[Any, dict[str, Any]]:
    """Return id, file_name, width and height of each image by its id."""
    images: dict[Any, dict[str, Any]] = {}
    files: dict[str, str] = {}  # and where they are named
    for key, record in records.records.items():
        name = record.text("file_name")
        first = files.setdefault(normpath(name), record.where)
        if first != record.where:
            first = _short(first)
            raise ValueError(f"{record.where}: file_name is {name}, as in {first}, expected one record with all its objects")
        width, height = (record.integer(side, 1, 10**6) for side in ("width", "height"))
        images[key] = {"id": key, "file_name": name, "width": width, "height": height}
    return images


def _as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return COCO's run-length encoding of polygons, of an uncompressed encoding or of itself.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(segmentation, dict):
        return dict(rle.merge(rle.frPyObjects(_polygons(segmentation), height, width)))
    fields = Fields(segmentation, "segmentation")
    size, counts = fields.integers("size", 2, 0), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"segmentation: size is {size}, expected height and width of the image, {[height, width]}")
    if isinstance(counts, list):
        if sum(fields.integers("counts", low=0)) != height * width:
            raise ValueError(f"segmentation: counts are {sum(counts)} pixels in all, expected {height * width}")
        return dict(rle.frPyObjects(segmentation, height, width))
    fields.take("counts", "a list of integers, or COCO's text", lambda value: isinstance(value, str) and value.isascii())
    try:
        rle.decode([{"size": size, "counts": counts}])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"segmentation: counts cannot be decoded: {error}") from error
    return {"size": size, "counts": counts}


def _polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons that have an area: three points or more.

    Raises:
        ValueError: If there are none, or one is damaged.
    """
    listed = segmentation if isinstance(segmentation, list) else []
    for polygon in listed:
        if not isinstance(polygon, list) or len(polygon) % 2 or not _finite(polygon):
            raise ValueError("segmentation: a polygon is not of pairs of numbers, x and y")
    usable = [polygon for polygon in listed if len(polygon) >= 6]
    if not usable:
        raise ValueError("segmentation: has no polygon of three points")
    return usable


def _finite(numbers: Any) -> bool:
    return all(isinstance(n, int | float) and not isinstance(n, bool) and -1e9 < n < 1e9 for n in numbers)


class CocoImages(Samples):
    """The images of one split with their objects.

    Training samples are (image (3, H, W) in 0 to 1, target, problem); the target holds boxes (N, 4) as x1, y1, x2, y2 in
    pixels, labels (N) from 1 on, and masks (N, H, W) if asked for. Crowds are left out of training, as is usual, and objects
    that make no sense out of everything; images without objects stay. Evaluation samples are (image, id of the image,
    problem); a blank has none.

    Args:
        folder: Holds annotations and images, in any format of `groupmixformer.data.formats` that has objects.
        split: train, val or another.
        masks: Whether objects need masks.
        transform: From (image, target) to the two augmented; none for evaluation.
        seed: Of the augmentation.
        or_whole: Whether a data set that is not split is taken whole.
        splitter: Deals out the images of a data set that is not split.

    Attributes:
        class_names: Names of the categories, in the order of their ids; label k is the (k - 1)th.
        category_ids: Their ids, in the same order.
        skipped: A line for each image that is left out: missing, unreadable, or of another size than annotated.
        dropped: A line for each object that is left out: without area, outside of the image, of no category.
        ground_truth: COCO's annotations of what is left, for the evaluation.

    Raises:
        ValueError: If the annotations cannot be used.
    """

    fewest_classes = 1  # beside the background

    def __init__(
        self,
        folder: str | Path,
        split: str,
        masks: bool,
        transform: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
        or_whole: bool = False,
        splitter: Splitter | None = None,
    ) -> None:
        found = recognise(folder, "detection")
        read = read_objects(found, found.undivided() if splitter else found.part(split, or_whole))
        self.annotations, self.folder = read.source, read.folder
        self.masks, self.transform, self.seed = masks, transform, seed
        categories, records = _Ids(read.categories, "categories", read.source), _Ids(read.images, "images", read.source)
        self.category_ids = sorted(categories.records)
        names = (categories.records[key].take("name", "a text", _is_name) for key in self.category_ids)
        self.class_names = [str(name) for name in names]
        images = _read_images(records)

        def problem(image: Mapping[str, Any]) -> str:
            return size_problem(self.folder / image["file_name"], (image["width"], image["height"]), "annotated as")

        problems = in_threads(problem, images.values())
        self.skipped = [*read.skipped, *(problem for problem in problems if problem)]
        usable = {image["id"]: image for image, problem in zip(images.values(), problems, strict=True) if not problem}
        if not usable:
            raise ValueError(
                f"{self.annotations}: none of its {len(images)} images can be used: {next(filter(None, problems))}"
            )
        objects = self._read_objects(read.annotations, records, categories, images, usable)
        self.notes = [*read.notes, *self.notes]
        if splitter:
            files = {image["file_name"]: self.folder / image["file_name"] for image in usable.values()}
            dealt = splitter(files, lambda: [{annotation["label"] for annotation in objects[key]} for key in usable])
            chosen = dealt.names(split)
            usable = {key: image for key, image in usable.items() if image["file_name"] in chosen}
            objects = {key: objects[key] for key in usable}
            self.skipped = self.skipped if split == TRAIN else []
        learnable = [annotation["label"] for row in objects.values() for annotation in row if not annotation["iscrowd"]]
        self._counts = np.bincount(np.array(learnable, dtype=np.int64), minlength=len(self.class_names) + 1)[1:].tolist()
        if not learnable:
            reason = f": {self.dropped[0]}" if self.dropped else ""
            reason += ": where there are boxes alone, take --detector.architecture retinanet" if masks else ""
            raise ValueError(
                f"{self.annotations}: holds no object {'with a mask ' if masks else ''}to learn or to find{reason}"
            )
        self.ground_truth: dict[str, Any] = {}
        if transform is None:
            self.ground_truth = {
                "images": list(usable.values()),
                "annotations": [annotation for row in objects.values() for annotation in row],
                "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)],
            }
        # As bytes: a worker that counts references to millions of objects would copy the memory that it shares.
        self._records = [json.dumps({**image, "objects": objects[key]}).encode() for key, image in usable.items()]

    def _read_objects(
        self, records: Iterable[Fields], image_ids: _Ids, category_ids: _Ids, images: Mapping[Any, Any], usable: Container[Any]
    ) -> dict[Any, list[dict[str, Any]]]:
        """Check the objects, and gather those of usable images by image; note what is odd about them."""
        labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        found: dict[Any, list[dict[str, Any]]] = {key: [] for key in images if key in usable}
        self.dropped: list[str] = []
        boxes: list[tuple[float, ...]] = []  # with width and height of their images
        by_id: dict[Any, Fields] = {}
        for number, record in enumerate(records, start=1):
            image_id, category = image_ids.read(record, "image_id"), category_ids.read(record, "category_id")
            crowd, area = record.flag("iscrowd", False), record.number("area", default=None)
            own = record.take("id", "an integer or a text", _is_name, None)
            image, box = images.get(image_id), record.values.get("bbox")
            if own is not None and by_id.setdefault(own, record) is not record and by_id[own].values == record.values:
                self.dropped.append(f"{_short(record.where)}: is {_short(by_id[own].where)} once more")
                continue
            try:
                if image is None:
                    raise ValueError("an image that is not annotated")
                if category not in labels:
                    raise ValueError(f"category {category}, which is not defined")
                if not isinstance(box, list) or len(box) != 4 or not _finite(box):
                    raise ValueError(f"box {box}, expected four numbers: x, y, width, height")
                boxes.append((*box, image["width"], image["height"]))
                annotation = {"category_id": category, "label": labels[category], "bbox": box, "iscrowd": int(crowd)}
                self._check_object(record, image, box)
            except ValueError as error:
                name = number if own is None else own
                self.dropped.append(f"object {name} of {image['file_name'] if image else image_id}: {error}")
                continue
            if image_id in found:
                annotation |= {"id": number, "image_id": image_id, "area": box[2] * box[3] if area is None else area}
                if self.masks:
                    annotation["segmentation"] = record.values["segmentation"]
                found[image_id].append(annotation)
        self.notes = [f"{len(self.dropped)} objects left out: {'; '.join(self.dropped[:5])}"] if self.dropped else []
        self._check_boxes(np.array(boxes, dtype=np.float64).reshape(-1, 6))
        return found

    def _check_object(self, record: Fields, image: Mapping[str, Any], box: Sequence[float]) -> None:
        height, width = image["height"], image["width"]
        x, y, w, h = box
        if w < 1 or h < 1:
            swapped = ": its corners are swapped" if w < 0 or h < 0 else ""
            raise ValueError(f"box {box} is less than a pixel wide or high{swapped}")
        if min(x + w, width) - max(x, 0) < 1 or min(y + h, height) - max(y, 0) < 1:
            raise ValueError(f"box {box} lies outside of the image of {width} x {height}")
        if self.masks:
            segmentation = record.values.get("segmentation")
            if isinstance(segmentation, dict):
                _as_rle(segmentation, height, width)
            else:
                _polygons(segmentation)  # not drawn yet: they are many

    def _check_boxes(self, boxes: NDArray[np.float64]) -> None:
        """Refuse boxes (N, 4) that are corners in place of sizes, by the sizes of their images (N, 2) in the last columns."""
        x, y, w, h, width, height = boxes.T
        beyond = (x + w > width + 1) | (y + h > height + 1)
        corners = (x >= 0) & (y >= 0) & (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        if not beyond.any():
            return
        line = f"{beyond.sum()} of {len(boxes)} boxes reach more than a pixel beyond their image"
        if beyond.mean() > 0.05 and corners.mean() > 0.8:
            raise ValueError(f"{self.annotations}: {line}, and as x1, y1, x2, y2 they would fit: expected x, y, width, height")
        self.notes = [*self.notes, f"{line}; training cuts them"]

    def relabel(self, names: Sequence[str], places: Sequence[int]) -> None:
        """Take the classes of a model; those that the annotations do not have get ids that stand for nothing."""
        super().relabel(names, places)
        ids: list[Any] = [("no category", name) for name in names]
        for place, category in zip(places, self.category_ids, strict=True):
            ids[place] = category
        self.category_ids = ids
        self.ground_truth["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]

    def count_classes(self) -> tuple[Sequence[int], str, list[str]]:
        """Return the number of objects of each class, without crowds."""
        return self._counts, "object", []

    def __len__(self) -> int:
        return len(self._records)

    def files(self) -> list[Path]:
        """Return the image files."""
        return [self.folder / json.loads(record)["file_name"] for record in self._records]

    def drawn(self, index: int) -> Image.Image:
        """Draw the objects of an image, without crowds."""
        image, record = self.read(index)
        return self._drawn(image, self.target(record))

    def drawn_sample(self, sample: tuple[Any, ...]) -> Image.Image:
        """Draw the objects of an augmented image."""
        return self._drawn(to_image(sample[0]), sample[1])

    def _drawn(self, image: Image.Image, target: Mapping[str, Tensor]) -> Image.Image:
        masks = {"masks": target["masks"].bool()} if "masks" in target else {}
        return draw_objects(image, {**target, **masks}, self.class_names)

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
            "labels": torch.tensor([self.place(annotation["label"] - 1) + 1 for annotation in annotated], dtype=torch.int64),
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

    def for_evaluation(self, content: tuple[Image.Image, dict[str, Any]] | None) -> tuple[Tensor, Any]:
        """Give the image and its id."""
        if content is None:
            return torch.zeros(3, 32, 32), None
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
