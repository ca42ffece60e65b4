"""The objects of a data set of any format, checked: what makes no sense is refused, or left out and named."""

import contextlib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import Fields
from .channels import ANY, Channels
from .formats import Recognised
from .objects import read_objects
from .samples import in_threads, size_problem


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


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return COCO's run-length encoding of polygons, of an uncompressed encoding or of itself.

    Raises:
        ValueError: If it is none of them.
    """
    from faster_coco_eval.core import mask as rle  # of the extras detection and segmentation

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


def _read_keypoints(categories: Sequence[Fields]) -> tuple[list[str], list[list[int]], list[int] | None]:
    """Return the names of the keypoints, which all categories share, their skeleton, and those that they become in a mirror.

    Raises:
        ValueError: If a category has none or others, or what is said of them is damaged.
    """
    first, *others = categories
    if "keypoints" not in first:
        raise ValueError(f"{first.where}: has no keypoints, expected the list of their names, or kpt_shape in YOLO's data.yaml")
    names = first.texts("keypoints")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{first.where}: keypoints is {names}, expected one name or more, each once")
    for other in others:
        if (found := other.values.get("keypoints")) != names:
            raise ValueError(f"{other.where}: keypoints is {found}, expected those of the first category, {names}")
    pairs = first.items("skeleton", default=[])
    numbers = [n for pair in pairs for n in (pair if isinstance(pair, list) and len(pair) == 2 else [0])]
    if not all(type(n) is int and 1 <= n <= len(names) for n in numbers):
        raise ValueError(f"{first.where}: skeleton is {pairs}, expected pairs of numbers from 1 to {len(names)}")
    flip = first.integers("flip_idx", len(names), 0, len(names) - 1, default=None)
    if flip and any(flip[other] != place for place, other in enumerate(flip)):
        raise ValueError(f"{first.where}: flip_idx is {flip}, expected pairs that name each other")
    return names, [[start - 1, end - 1] for start, end in pairs], flip or _mirrored(names)


def _mirrored(names: Sequence[str]) -> list[int] | None:
    """Return the number of the keypoint that each becomes in a mirror, by left and right (l and r) in the names.

    None if the names do not tell: they are numbers, or one has no counterpart on the other side.
    """
    sides = {"left": "right", "right": "left", "l": "r", "r": "l"}
    places = {name.lower(): place for place, name in enumerate(names)}
    turned = [re.sub(r"left|right|(?<![a-z])[lr](?![a-z])", lambda side: sides[side[0]], name) for name in places]
    if len(places) < len(names) or all(name.isdecimal() for name in names) or not set(turned) <= set(places):
        return None
    return [places[other] for other in turned]


class Annotations:
    """The images of a part of a data set with their objects.

    Args:
        found: Where they are, in a format that has objects.
        part: Of the data set.
        masks: Whether objects need masks.
        channels: How images are read.
        keypoints: Whether the categories need keypoints, the same for all of them; none to take them where they are so.

    Attributes:
        source: What an error about all of it names.
        folder: Of the images.
        class_names: Names of the categories, in the order of their ids; label k is the (k - 1)th.
        category_ids: Their ids, in the same order.
        images: Records of those that can be used, with id, file_name, width and height, by their ids.
        objects: Of each of these, with id, image_id, category_id, label, bbox, area, iscrowd, segmentation for masks, and for
            keypoints one list of x, y and visibility of each (0: not annotated), keypoints, and num_keypoints with one.
        keypoint_names: Of the keypoints, if asked for.
        skeleton: Pairs of their numbers, from 0 on, between which a line is drawn.
        mirrored: The number of the keypoint that each becomes in a mirror; none where that is not known.
        skipped: A line for each image that is left out: missing, unreadable, or of another size than annotated.
        dropped: A line for each object that is left out: without area, outside of the image, of no category.
        notes: Further lines.

    Raises:
        ValueError: If the annotations cannot be used.
    """

    def __init__(
        self, found: Recognised, part: str, masks: bool, channels: Channels = ANY, keypoints: bool | None = False
    ) -> None:
        read = read_objects(found, part, bool(keypoints))
        self.source, self.folder, self.masks = read.source, read.folder, masks
        categories, records = _Ids(read.categories, "categories", read.source), _Ids(read.images, "images", read.source)
        self.category_ids = sorted(categories.records)
        names = (categories.records[key].take("name", "a text", _is_name) for key in self.category_ids)
        self.class_names = [str(name) for name in names]
        self._needs_keypoints = keypoints is True
        self.keypoint_names: list[str] = []
        self.skeleton: list[list[int]] = []
        self.mirrored: list[int] | None = None
        with contextlib.nullcontext() if keypoints else contextlib.suppress(ValueError):
            if keypoints is not False:
                self.keypoint_names, self.skeleton, self.mirrored = _read_keypoints(read.categories)
        images = _read_images(records)

        def problem(image: Mapping[str, Any]) -> str:
            return size_problem(self.folder / image["file_name"], (image["width"], image["height"]), "annotated as", channels)

        problems = in_threads(problem, images.values())
        self.skipped = [*read.skipped, *(problem for problem in problems if problem)]
        self.images = {image["id"]: image for image, problem in zip(images.values(), problems, strict=True) if not problem}
        if not self.images:
            raise ValueError(f"{self.source}: none of its {len(images)} images can be used: {next(filter(None, problems))}")
        self.dropped: list[str] = []
        self.notes = list(read.notes)
        self.objects = self._read_objects(read.annotations, records, categories, images, self.images)

    def _read_objects(
        self, records: Iterable[Fields], image_ids: _Ids, category_ids: _Ids, images: Mapping[Any, Any], usable: Container[Any]
    ) -> dict[Any, list[dict[str, Any]]]:
        """Check the objects, and gather those of usable images by image; note what is odd about them."""
        labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        found: dict[Any, list[dict[str, Any]]] = {key: [] for key in images if key in usable}
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
                if self.keypoint_names:
                    annotation["keypoints"] = places = self._keypoints(record)
                    annotation["num_keypoints"] = sum(seen > 0 for seen in places[2::3])
                found[image_id].append(annotation)
        if self.dropped:
            self.notes.append(f"{len(self.dropped)} objects left out: {'; '.join(self.dropped[:5])}")
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
        if self._needs_keypoints:
            self._keypoints(record)
        if self.masks:
            segmentation = record.values.get("segmentation")
            if isinstance(segmentation, dict):
                as_rle(segmentation, height, width)
            else:
                _polygons(segmentation)  # not drawn yet: they are many

    def _keypoints(self, record: Fields) -> list[float]:
        """Return x, y and visibility of each keypoint, which is 0 where there are none, or damaged ones are not needed."""
        length = 3 * len(self.keypoint_names)
        places = record.values.get("keypoints", [0] * length)
        problem = ""
        if not isinstance(places, list) or not _finite(places) or len(places) != length:
            problem = f"keypoints: expected {length} numbers, x, y and visibility of each"
        elif not set(places[2::3]) <= {0, 1, 2}:
            problem = "keypoints: a visibility is not 0 (not annotated), 1 (hidden) or 2 (visible)"
        if problem and self._needs_keypoints:
            raise ValueError(problem)
        places = [0] * length if problem else places
        return [float(value) for value in places]

    def _check_boxes(self, boxes: NDArray[np.float64]) -> None:
        """Refuse boxes (N, 4) that are corners in place of sizes, by the sizes of their images (N, 2) in the last columns."""
        x, y, w, h, width, height = boxes.T
        beyond = (x + w > width + 1) | (y + h > height + 1)
        corners = (x >= 0) & (y >= 0) & (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        if not beyond.any():
            return
        line = f"{beyond.sum()} of {len(boxes)} boxes reach more than a pixel beyond their image"
        if beyond.mean() > 0.05 and corners.mean() > 0.8:
            raise ValueError(f"{self.source}: {line}, and as x1, y1, x2, y2 they would fit: expected x, y, width, height")
        self.notes.append(f"{line}; training cuts them")
