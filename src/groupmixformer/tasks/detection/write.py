"""What a detector found, written as data sets of COCO, YOLO and Pascal VOC, which the readers of these formats read back."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from faster_coco_eval.core import mask as rle

from ...files import to_json, write_file


@dataclass(frozen=True)
class Drawn:
    """The objects of an image.

    Attributes:
        name: Of the image, relative to the folder of all.
        size: Its width and height.
        objects: In COCO's form, with category_id, bbox, score, perhaps segmentation as run lengths, and keypoints.
    """

    name: str
    size: tuple[int, int]
    objects: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Classes:
    """What the objects of a data set may be.

    Attributes:
        names: Of the categories, by their ids.
        keypoints: Names of the keypoints of each object.
        skeleton: Pairs of their numbers, from 0 on.
    """

    names: Mapping[int, str]
    keypoints: Sequence[str] = ()
    skeleton: Sequence[Sequence[int]] = ()


def _coco(out: Path, images: Sequence[Drawn], classes: Classes) -> Path:
    """Annotations/instances_default.json, for images in images/; scores are kept."""
    listed = [
        {"id": i, "file_name": image.name, "width": image.size[0], "height": image.size[1]} for i, image in enumerate(images, 1)
    ]
    found = [
        {**one, "image_id": i, "iscrowd": 0, "area": _area(one), **_visible(one)}
        for i, image in enumerate(images, 1)
        for one in image.objects
    ]
    lines = [[start + 1, end + 1] for start, end in classes.skeleton]
    keypoints = {"keypoints": list(classes.keypoints), "skeleton": lines} if classes.keypoints else {}
    content = {
        "images": listed,
        "annotations": [{**one, "id": number} for number, one in enumerate(found, 1)],
        "categories": [{"id": key, "name": name, **keypoints} for key, name in classes.names.items()],
    }
    write_file(out / "annotations" / "instances_default.json", to_json(content))
    return out / "annotations" / "instances_default.json"


def _area(one: Mapping[str, Any]) -> float:
    return float(rle.area(one["segmentation"])) if "segmentation" in one else one["bbox"][2] * one["bbox"][3]


def _visible(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return keypoints as they are annotated, all of them visible, in place of their scores."""
    if "keypoints" not in one:
        return {}
    places = np.reshape(one["keypoints"], (-1, 3))
    places[:, 2] = 2
    return {"keypoints": places.ravel().tolist(), "num_keypoints": len(places)}


def _yolo(out: Path, images: Sequence[Drawn], classes: Classes) -> Path:
    """Labels/ with a text for each image, for images in images/, and data.yaml; polygons where there are masks, no scores."""
    numbers = {key: number for number, key in enumerate(classes.names)}
    for image in images:
        lines = []
        for one in image.objects:
            x, y, width, height = one["bbox"]
            pixels = _outline(one) if "segmentation" in one else [x + width / 2, y + height / 2, width, height]
            shares = [min(max(value / image.size[i % 2], 0.0), 1.0) for i, value in enumerate(pixels)]
            words = [str(numbers[one["category_id"]]), *(f"{share:.8g}" for share in shares)]
            if "keypoints" in one:
                places = np.reshape(one["keypoints"], (-1, 3))[:, :2] / image.size
                words += [f"{min(max(x, 0.0), 1.0):.8g} {min(max(y, 0.0), 1.0):.8g} 2" for x, y in places.tolist()]
            lines.append(" ".join(words))
        write_file((out / "labels" / image.name).with_suffix(".txt"), "".join(f"{line}\n" for line in lines))
    names: dict[int, str] = dict(enumerate(classes.names.values()))
    content: dict[str, Any] = {"path": ".", "val": "images", "names": names}
    if classes.keypoints:
        content |= {
            "kpt_shape": [len(classes.keypoints), 3],
            "kpt_names": {number: list(classes.keypoints) for number in names},
        }
    write_file(out / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return out / "data.yaml"


def _outline(one: Mapping[str, Any]) -> list[float]:
    """Return the largest polygon around a mask (x, y, x, y, ...); of nothing, its box."""
    from supervision import mask_to_polygons

    doubled = np.asarray(rle.decode(one["segmentation"])).repeat(2, axis=0).repeat(2, axis=1)  # a polygon runs through middles
    polygons = sorted(mask_to_polygons(doubled.astype(bool)), key=len)
    if polygons and len(polygons[-1]) >= 3:
        return [float(value) for value in ((polygons[-1] + 0.5) / 2).ravel()]
    x, y, width, height = one["bbox"]
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _voc(out: Path, images: Sequence[Drawn], classes: Classes) -> Path:
    """Annotations/ with an XML file for each image, for images in JPEGImages/; pixels count from 1, the last one included."""
    for image in images:
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = Path(image.name).name
        _add(ElementTree.SubElement(root, "size"), width=image.size[0], height=image.size[1], depth=3)
        for one in image.objects:
            element = ElementTree.SubElement(root, "object")
            _add(element, name=classes.names[one["category_id"]], difficult=0, score=round(one["score"], 4))
            x, y, width, height = one["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
            _add(ElementTree.SubElement(element, "bndbox"), **{name: round(value, 3) for name, value in corners.items()})
        ElementTree.indent(root)
        text = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
        write_file((out / "Annotations" / image.name).with_suffix(".xml"), f"{text}\n")
    return out / "Annotations"


def _add(parent: ElementTree.Element, **values: Any) -> None:
    for name, value in values.items():
        ElementTree.SubElement(parent, name).text = str(value)


def write(format: str, out: Path, images: Sequence[Drawn], classes: Classes) -> Path:
    """Write a data set in one of `FORMATS`, and return the file or folder to begin with.

    Raises:
        ValueError: If two images would have one file of labels.
    """
    names = Counter(str(Path(image.name).with_suffix("")) for image in images)
    if format != "coco" and names and (twice := names.most_common(1)[0])[1] > 1:
        raise ValueError(f"{twice[1]} images are named {twice[0]}, expected one for each file of labels: write --format coco")
    return FORMATS[format](out, images, classes)


FORMATS: dict[str, Callable[[Path, Sequence[Drawn], Classes], Path]] = {"coco": _coco, "yolo": _yolo, "voc": _voc}
