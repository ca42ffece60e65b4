"""Boxes and polygons of any format as records in COCO's form, each of which knows its file and its place there.

Formats are read here rather than by supervision (0.31), which draws every polygon as a mask of the image's size, decodes
whole images for Pascal VOC, names no line, reads one flat folder, and is silent about coordinates beyond the image, swapped
corners and labels without an image.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from ..files import Fields, read_json, read_text
from .channels import ANY
from .formats import WHOLE, Recognised, has_keypoints, part_of, read_yolo
from .images import list_images
from .samples import in_threads

Size = tuple[int, int]  # width and height
ROUNDING = 1e-3  # by which coordinates of YOLO may leave the image


@dataclass
class Objects:
    """A part of a data set in COCO's form; the records are not checked yet.

    Attributes:
        source: What an error about all of it names.
        folder: To which the names of the images are relative.
        images: Records with id, file_name, width and height.
        categories: Records with id and name; where there are keypoints, with keypoints, their names, and perhaps with skeleton,
            pairs of their numbers from 1 on, and flip_idx, the number from 0 on of the one that each becomes in a mirror.
        annotations: Records with image_id, category_id, bbox and perhaps segmentation and keypoints; id numbers those of an
            image.
        skipped: A line for each image or file that cannot be used.
        notes: Further lines.
    """

    source: Path
    folder: Path = Path()
    images: list[Fields] = field(default_factory=list)
    categories: list[Fields] = field(default_factory=list)
    annotations: list[Fields] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name_categories(self, names: Iterable[str]) -> dict[str, int]:
        """Number the categories from 1 in this order, and return their ids."""
        ids = {name: number for number, name in enumerate(dict.fromkeys(names), start=1)}
        self.categories = [Fields({"id": id, "name": name}, f"{self.source}: {name}") for name, id in ids.items()]
        return ids

    def add(self, where: str, file_name: str, size: Size, shapes: Iterable[tuple[str, int, Any]]) -> None:
        """Add an image and its objects, each with its place, its category and its box or what else `shape` takes."""
        key = len(self.images) + 1
        self.images.append(Fields({"id": key, "file_name": file_name, "width": size[0], "height": size[1]}, where))
        for number, (place, category, shape) in enumerate(shapes, start=1):
            self.annotations.append(Fields({"id": number, "image_id": key, "category_id": category, **shape}, place))


def from_box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """Return the box of an annotation."""
    return {"bbox": [left, top, right - left, bottom - top]}


def from_polygons(polygons: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return polygons (x, y, x, y, ...) with the box around them."""
    xs, ys = ([value for polygon in polygons for value in polygon[at::2]] for at in (0, 1))
    return from_box(min(xs), min(ys), max(xs), max(ys)) | {"segmentation": [list(polygon) for polygon in polygons]}


def from_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return COCO's run lengths of a mask (H, W), down its columns, with the box around it."""
    pixels = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], edges, [] if mask.size in edges else [mask.size]])).astype(int).tolist()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
    return from_box(*map(int, box)) | {"segmentation": {"size": list(mask.shape), "counts": counts}}


def read_objects(found: Recognised, part: str, keypoints: bool = False) -> Objects:
    """Read a part of a data set whose format has boxes or polygons.

    Args:
        found: Where it is.
        part: Its name.
        keypoints: Whether COCO's file of keypoints is read, where it lies beside that of instances.

    Raises:
        ValueError: If a file is damaged; says the file, the record and the field.
        OSError: If one cannot be read.
    """
    if found.format == "coco":
        files = found.parts[part]
        file = next((file for file in files if has_keypoints(file) == keypoints), files[0])
        found = replace(found, parts={part: (file,)})
    return READERS[found.format](found, part)


def _coco(found: Recognised, part: str) -> Objects:
    (file,) = found.parts[part]
    content = Fields(read_json(file), str(file))
    images, categories, annotations = (content.objects(kind) for kind in ("images", "categories", "annotations"))
    objects = Objects(file, Path(), images, categories, annotations)
    root = found.path if found.path.is_dir() else file.parent.parent if file.parent.name == "annotations" else file.parent
    split = re.sub("^(instances_|.*keypoints_)", "", file.stem)
    places = [root / "images" / split, root / split, root / "images", root, file.parent, root / "data"]
    objects.folder = _first_with([image.values.get("file_name") for image in images], places) or places[2]
    if file.name == "_annotations.coco.json":  # Roboflow's first category stands for all the others
        used, groups = {a.values.get("category_id") for a in annotations}, {c.values.get("supercategory") for c in categories}
        over = [c for c in categories if c.values.get("id") not in used and c.values.get("name") in groups]
        objects.categories = [c for c in categories if c not in over]
        objects.notes = [f"the category {c.values['name']}, which stands for the others, is left out" for c in over]
    return objects


def _first_with(names: Iterable[Any], places: Sequence[Path]) -> Path | None:
    """Return the first place in which one of these files lies."""

    def is_file(path: Path) -> bool:
        try:
            return path.is_file()
        except (OSError, ValueError):  # no name that the system can have
            return False

    return next((place for name in names if isinstance(name, str) for place in places if is_file(place / name)), None)


def _size(width: int, height: int, file: Path) -> Size | str:
    """Return width and height, where they are not known those of the image as people see it, or why it cannot be read."""
    try:
        return (width, height) if width and height else ANY.sizes(file)[0]
    except ValueError as error:
        return str(error)


def _in_one_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


# YOLO


def _yolo(found: Recognised, part: str) -> Objects:
    """A text for each image, with a line for each object: its class, and its box or its polygon in shares of the image."""
    content, source = read_yolo(found.path) or ({}, found.path)
    objects = Objects(source)
    lists = [place for place in found.parts[part] if place.is_file()]
    images = [image for place in found.parts[part] if place not in lists for image in _listed(place)]
    images += [image for place in lists for image in _images_of_list(place, found.path)]
    labels = [_label_of(image) for image in images]
    if not any(label.is_file() for label in labels):
        expected = f"expected such as {labels[0]}" if labels else "expected images"
        raise ValueError(f"{found.parts[part][0]}: holds {len(images)} images, none of which has labels, {expected}")
    if not lists:
        known = set(labels)
        texts = (file for folder in sorted({label.parent for label in labels}) for file in sorted(folder.glob("*.txt")))
        objects.skipped = [f"{text}: has no image" for text in texts if text not in known and text.name != "classes.txt"]
    objects.folder = _in_one_folder(images)
    names = _yolo_names(content, source, found.path)
    number, values = Fields(content, str(source)).integers("kpt_shape", 2, 1, default=(0, 2))
    if values not in (2, 3):
        raise ValueError(f"{source}: kpt_shape is {[number, values]}, expected 2 or 3 values of each keypoint")
    read: list[tuple[Path, Path, Size, list[tuple[str, list[float]]]]] = []
    sizes = in_threads(lambda image: _size(0, 0, image), images)
    for image, label, size in zip(images, labels, sizes, strict=True):
        if isinstance(size, str):
            objects.skipped.append(size)
        else:
            read.append((image, label, size, list(_yolo_lines(label, number, values)) if label.is_file() else []))
    if not names:
        most = max((int(numbers[0]) for *_, lines in read for _, numbers in lines), default=0)
        names = [str(number) for number in range(most + 1)]
        objects.notes.append("no names of the classes, in names of data.yaml or in classes.txt: numbers are taken")
    ids = list(objects.name_categories(names).values())
    if number:
        _name_yolo_keypoints(Fields(content, str(source)), number, objects.categories)
    for image, label, size, lines in read:
        shapes = [
            (where, _yolo_class(numbers[0], ids, where), _yolo_shape(numbers[1:], size, number, values))
            for where, numbers in lines
        ]
        objects.add(str(label), str(image.relative_to(objects.folder)), size, shapes)
    return objects


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one of images")
    return list_images(folder, Counter())


def _images_of_list(file: Path, root: Path) -> list[Path]:
    """Return the images that a text names, relative to it or to the folder of the data set."""
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    base = root if root.is_dir() else root.parent
    return [next((p for p in (file.parent / name, base / name) if p.exists()), file.parent / name) for name in names]


def _label_of(image: Path) -> Path:
    """Return the text of an image: below labels/ in place of the last images/, or beside it."""
    at = max((i for i, name in enumerate(image.parts[:-1]) if name == "images"), default=None)
    parts = image.parts if at is None else (*image.parts[:at], "labels", *image.parts[at + 1 :])
    label, beside = Path(*parts).with_suffix(".txt"), image.with_suffix(".txt")
    return beside if beside.is_file() and not label.is_file() else label


def _yolo_names(content: Mapping[str, Any], source: Path, path: Path) -> list[str]:
    names = content.get("names")
    if names is None:
        files = [folder / name for folder in (path, path / "labels") for name in ("classes.txt", "obj.names")]
        file = next((file for file in files if file.is_file()), None)
        names = [line.strip() for line in read_text(file).splitlines() if line.strip()] if file else []
        source = file or source
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{source}: names are of {', '.join(map(str, names))[:60]}, expected 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise ValueError(f"{source}: names is {names!r:.60}, expected a list of texts")
    if len(set(map(str, names))) < len(names):
        raise ValueError(f"{source}: names has {Counter(map(str, names)).most_common(1)[0][0]} twice, expected each once")
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"{source}: nc is {content['nc']} and names has {len(names)}, expected as many")
    return [str(name) for name in names]


def _name_yolo_keypoints(content: Fields, number: int, categories: Sequence[Fields]) -> None:
    """Give the categories the names of their keypoints, or numbers, and those that they become in a mirror."""
    names, flip = content.values.get("kpt_names") or {}, content.integers("flip_idx", number, 0, number - 1, default=None)
    for place, category in enumerate(categories):
        listed = names.get(place) if isinstance(names, dict) else names
        category.values["keypoints"] = listed or [str(one) for one in range(number)]
        category.values["flip_idx"] = flip


def _yolo_lines(file: Path, keypoints: int, values: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the place of each line with its numbers: class and box, perhaps with keypoints, or class and polygon."""
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        words, where = line.split(), f"{file}: line {number}"
        if not words:
            continue
        with_keypoints = keypoints > 0 and len(words) == 5 + keypoints * values
        if not with_keypoints and len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
            polygon = "or class and the points of a polygon, three or more"
            raise ValueError(f"{where}: has {len(words)} values, expected 5, class, x, y, width and height, {polygon}")
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            raise ValueError(f"{where}: is {line[:60]!r}, expected numbers") from None
        shares = numbers[1:5] + _places(numbers[5:], values) if with_keypoints else numbers[1:]
        if outside := [n for n in shares if not -ROUNDING <= n <= 1 + ROUNDING]:
            raise ValueError(f"{where}: holds {outside[0]:g}, expected shares of the image's width and height, from 0 to 1")
        yield where, numbers


def _yolo_class(number: float, ids: Sequence[int], where: str) -> int:
    if number not in range(len(ids)):
        raise ValueError(f"{where}: class is {number:g}, expected 0 to {len(ids) - 1}, a number of the names")
    return ids[int(number)]


def _places(numbers: Sequence[float], values: int) -> list[float]:
    """Return x and y of keypoints, (x, y, ...) one after another."""
    return [number for at in range(0, len(numbers), values) for number in numbers[at : at + 2]]


def _yolo_shape(numbers: Sequence[float], size: Size, keypoints: int, values: int) -> dict[str, Any]:
    with_keypoints = keypoints > 0 and len(numbers) == 4 + keypoints * values
    pixels = [number * size[i % 2] for i, number in enumerate(numbers[:4] if with_keypoints else numbers)]
    if len(pixels) > 4:
        return from_polygons([pixels])
    x, y, width, height = pixels
    shape: dict[str, Any] = {"bbox": [x - width / 2, y - height / 2, width, height]}
    if with_keypoints:
        shape["keypoints"] = []
        for at in range(4, len(numbers), values):
            place = numbers[at : at + 2]
            seen = numbers[at + 2] if values > 2 else 2.0 * any(place)  # without a value, one in the corner is not there
            shape["keypoints"] += [place[0] * size[0], place[1] * size[1], seen]
    return shape


# Pascal VOC and CVAT


def _parse_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file}: not XML: {error}") from None


def _as_numbers(values: Mapping[str, Any], where: str) -> Fields:
    """Return texts of XML that are numbers as such, for their fields to be checked."""

    def number(text: Any) -> Any:
        try:
            return float(text)
        except (TypeError, ValueError):
            return text

    return Fields({name: number(value) for name, value in values.items()}, where)


def _voc(found: Recognised, part: str) -> Objects:
    """An XML file for each image. Classes and the first pixel's number are those of the whole data set, so of all its parts."""
    place, *lists = found.parts[part]
    objects = Objects(place)
    folders = {read[0] for read in found.parts.values()}
    files = [file for folder in sorted(folders) for file in sorted(folder.rglob("*.xml"))]
    roots = dict(zip(files, in_threads(_parse_xml, files), strict=True))
    ids = objects.name_categories(sorted(name for file, root in roots.items() for name in _voc_names(file, root)))
    boxes = {file: list(_voc_boxes(file, root)) for file, root in roots.items()}
    first = min((min(box[:2]) for found_boxes in boxes.values() for *_, box in found_boxes), default=1)
    offset = 1 if first >= 1 else 0
    said = "as Pascal VOC has them" if offset else f"as the least corner of its boxes is {first:g}"
    objects.notes.append(f"pixels of its boxes are counted from {offset}, {said}")
    chosen = [file for file in files if file.is_relative_to(place)]
    if lists:
        stems = [line.split()[0] for line in read_text(lists[0]).splitlines() if line.strip()]
        chosen = [place / f"{stem}.xml" for stem in stems]
        objects.skipped = [f"{file}: no such file, which {lists[0].name} names" for file in chosen if file not in roots]
        chosen = [file for file in chosen if file in roots]
    base = next((f for name in ("JPEGImages", "images", "imgs", "img") if (f := found.path / name).is_dir()), place)
    base = base / place.name if (base / place.name).is_dir() else base
    objects.folder, images = base, list_images(base, Counter())
    beside = {image.relative_to(base).with_suffix(""): image for image in images}
    named = Counter(name for image in images for name in {image.name, image.stem})
    elsewhere = {name: image for image in images for name in (image.name, image.stem) if named[name] == 1}
    taken: set[Path] = set()
    for file in chosen:
        name = roots[file].findtext("filename") or ""
        image = beside.get(file.relative_to(place).with_suffix("")) or elsewhere.get(file.stem) or elsewhere.get(name)
        taken |= {image} if image else set()
        if image is None:
            objects.skipped.append(f"{file}: has no image {file.stem} in {base}")
            continue
        written = _as_numbers({child.tag: child.text for child in roots[file].iterfind("size/*")}, f"{file}: size")
        size = _size(written.integer("width", 0, 10**6, 0), written.integer("height", 0, 10**6, 0), image)
        if isinstance(size, str):
            objects.skipped.append(size)
            continue
        shapes = [(where, ids[n], from_box(b[0] - offset, b[1] - offset, b[2], b[3])) for where, n, b in boxes[file]]
        objects.add(str(file), str(image.relative_to(base)), size, shapes)
    if not lists and (bare := len(images) - len(taken)):
        objects.notes.append(f"{bare} images without an XML file are left out")
    return objects


def _voc_names(file: Path, root: ElementTree.Element) -> Iterator[str]:
    for number, element in enumerate(root.iterfind("object")):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{file}: object[{number}]: has no name, expected that of its class")
        yield name


def _voc_boxes(file: Path, root: ElementTree.Element) -> Iterator[tuple[str, str, list[float]]]:
    """Yield the place, the class and the box of each object, as it is written."""
    for number, (element, name) in enumerate(zip(root.iterfind("object"), _voc_names(file, root), strict=True)):
        where = f"{file}: object[{number}]"
        box = element.find("bndbox")
        if box is None:
            raise ValueError(f"{where}: has no bndbox, expected xmin, ymin, xmax and ymax")
        fields = _as_numbers({child.tag: child.text for child in box}, f"{where}: bndbox")
        yield where, name, [fields.number(corner) for corner in ("xmin", "ymin", "xmax", "ymax")]


def _cvat(found: Recognised, part: str) -> Objects:
    """One XML file for all images: boxes, polygons, ellipses and masks."""
    (file,) = found.parts[part]
    objects, root = Objects(file), _parse_xml(file)
    if root.find("track") is not None:
        raise ValueError(f"{file}: is CVAT's for video, expected CVAT for images: export the task in that format")
    elements = [(i, e) for i, e in enumerate(root.iterfind("image")) if part in (WHOLE, part_of(e.get("subset", "")))]
    shapes = [child.get("label", "") for image in root.iterfind("image") for child in image if child.tag in CVAT_SHAPES]
    ids = objects.name_categories([*(e.text or "" for e in root.iterfind(".//labels/label/name")), *sorted(shapes)])
    base = file.parent
    names = {element.get("subset", "") for _, element in elements}
    places = [base / "images" / name for name in names if name] + [base / "images", base, *(base / name for name in names)]
    objects.folder = _first_with((e.get("name") for _, e in elements), places) or base / "images"
    others: Counter[str] = Counter()
    for number, element in elements:
        where = f"{file}: image[{number}]"
        fields = _as_numbers({k: element.get(k) for k in ("width", "height")}, where)
        size = (fields.integer("width", 1, 10**6), fields.integer("height", 1, 10**6))
        name = Fields(dict(element.attrib), where).text("name")
        children = [(i, child) for i, child in enumerate(element) if child.tag in CVAT_SHAPES]
        others.update(child.tag for child in element if child.tag not in CVAT_SHAPES)
        found_shapes = [(f"{where}: {child.tag}[{i}]", child) for i, child in children]
        objects.add(where, name, size, [(at, ids[c.get("label", "")], _cvat_shape(c, at, size)) for at, c in found_shapes])
    if others:
        objects.notes.append(f"left out: {', '.join(f'{count} {tag}' for tag, count in others.items())}")
    return objects


CVAT_SHAPES = ("box", "polygon", "ellipse", "mask")


def _cvat_shape(element: ElementTree.Element, where: str, size: Size) -> dict[str, Any]:
    fields = _as_numbers({k: v for k, v in element.attrib.items() if k not in ("points", "rle", "label")}, where)
    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        try:
            return from_polygons([[float(value) for x, y in pairs for value in (x, y)]])
        except ValueError:
            raise ValueError(f"{where}: points is {element.get('points', '')[:60]!r}, expected x,y;x,y;...") from None
    if element.tag == "mask":
        left, top, width, height = (fields.integer(n, 0, 10**6) for n in ("left", "top", "width", "height"))
        runs = [int(run) if run.strip().isdecimal() else -1 for run in element.get("rle", "").split(",")]
        if min(runs) < 0 or sum(runs) != width * height or left + width > size[0] or top + height > size[1]:
            raise ValueError(f"{where}: rle has {sum(runs)} pixels in all, expected {width} x {height}, inside of the image")
        mask = np.zeros((size[1], size[0]), dtype=bool)
        mask[top : top + height, left : left + width] = np.repeat(np.arange(len(runs)) % 2 > 0, runs).reshape(height, width)
        return from_mask(mask)
    angle = math.radians(fields.number("rotation", default=0.0))
    if element.tag == "ellipse":
        x, y, across, down = (fields.number(n) for n in ("cx", "cy", "rx", "ry"))
        points = [(across * math.cos(t), down * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 65)[:-1]]
    else:
        left, top, right, bottom = (fields.number(n) for n in ("xtl", "ytl", "xbr", "ybr"))
        if not angle:
            return from_box(left, top, right, bottom)
        x, y, across, down = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
        points = [(-across, -down), (across, -down), (across, down), (-across, down)]
    cos, sin = math.cos(angle), math.sin(angle)
    return from_polygons([[value for a, b in points for value in (x + a * cos - b * sin, y + a * sin + b * cos)]])


# labelme


def _labelme(found: Recognised, part: str) -> Objects:
    """A JSON file for each image; shapes of one label and group are one object. Classes are those of all parts."""
    (place,) = found.parts[part]
    objects = Objects(place, place)
    contents = {
        file: Fields(content, str(file))
        for read in found.parts.values()
        for file in sorted(read[0].rglob("*.json"))
        if isinstance(content := read_json(file), dict) and "shapes" in content
    }
    ids = objects.name_categories(sorted(s.text("label") for content in contents.values() for s in content.objects("shapes")))
    others: Counter[str] = Counter()
    for file, content in contents.items():
        if not file.is_relative_to(place):
            continue
        name = content.text("imagePath").replace("\\", "/")  # of Windows
        image = next((p for p in (file.parent / name, file.parent / Path(name).name) if p.is_file()), file.parent / name)
        size = _size(content.integer("imageWidth", 1, 10**6, 0), content.integer("imageHeight", 1, 10**6, 0), image)
        if isinstance(size, str):
            objects.skipped.append(size)
            continue
        shapes: dict[Any, tuple[str, int, list[list[float]]]] = {}
        for number, shape in enumerate(content.objects("shapes")):
            kind, label = shape.text("shape_type", "polygon"), shape.text("label")
            points = [Fields({"points": pair}, shape.where).numbers("points", 2) for pair in shape.items("points")]
            if kind not in LABELME_SHAPES or (kind == "circle" and len(points) != 2) or len(points) < 2:
                others[kind] += 1
                continue
            group = shape.values.get("group_id")
            key = number if group is None else (label, str(group))
            shapes.setdefault(key, (shape.where, ids[label], []))[2].append(_labelme_polygon(kind, points))
        relative = os.path.relpath(image, place)
        objects.add(str(file), relative, size, [(where, n, from_polygons(polygons)) for where, n, polygons in shapes.values()])
    if others:
        objects.notes.append(f"shapes left out: {', '.join(f'{count} {kind}' for kind, count in others.items())}")
    return objects


LABELME_SHAPES = ("polygon", "rectangle", "circle")


def _labelme_polygon(kind: str, points: Sequence[Sequence[float]]) -> list[float]:
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif kind == "circle":
        (x, y), border = points
        radius = math.dist((x, y), border)
        points = [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 65)[:-1]]
    return [value for point in points for value in point]


READERS = {"coco": _coco, "yolo": _yolo, "voc": _voc, "cvat": _cvat, "labelme": _labelme}
