"""Where masks lie and what their numbers or colours mean, in the layouts of several tools."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data.formats import TABLES, Recognised
from ...data.images import list_images
from ...files import Fields, read_json, read_text
from ...visual.drawing import palette

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".gif")  # JPEG changes numbers and colours
ENDINGS = ("", "_L", "_mask", "_label", "_labels")  # of masks, after the name of the image
UNLABELLED = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
)
# Those of Cityscapes that count, by their numbers in *_labelIds.png.
CITYSCAPES = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}


@dataclass(frozen=True)
class Meaning:
    """What masks mean.

    Attributes:
        source: The file that says it.
        names: Of the classes.
        ids: Their numbers in masks.
        colors: Theirs for display, and in masks where `by_color`.
        ignored: Numbers of pixels that do not count.
        ignored_colors: Their colours, where `by_color`.
        by_color: Whether colours count: always, only in masks with three channels (none), or never.
    """

    source: Path
    names: list[str]
    ids: list[int]
    colors: list[list[int]]
    ignored: list[int]
    ignored_colors: list[list[int]]
    by_color: bool | None = False

    @property
    def codes(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The colours as one number each (red is the highest byte), in order, and the numbers that they stand for."""
        rows = zip([*self.colors, *self.ignored_colors], [*self.ids, *self.ignored], strict=False)
        codes = dict(sorted(((red << 16) + (green << 8) + blue, number) for (red, green, blue), number in rows))
        return np.array(list(codes)), np.array(list(codes.values()), dtype=np.uint8)


def meaning(found: Recognised) -> Meaning:
    """Read the classes of a data set.

    Raises:
        ValueError: If they are damaged; says the file and the field or line.
    """
    path, ignored = found.path, [255]
    if found.format == "cityscapes":
        names, colors = (list(column) for column in zip(*CITYSCAPES.values(), strict=True))
        others = [number for number in range(256) if number not in CITYSCAPES]
        return Meaning(path, names, list(CITYSCAPES), [list(color) for color in colors], others, [])
    if found.format == "ade20k":
        names, ids, ignored = _ade20k_classes(path), list(range(1, 151)), [0]
    elif found.format == "voc-masks":
        names, ids = VOC_CLASSES.split(), list(range(21))
    else:
        table = next((path / name for name in TABLES if (path / name).is_file()), None)
        return _table(table or next(read[0] / "_classes.csv" for read in found.parts.values()))
    return Meaning(path, names, ids[: len(names)], palette(len(names)), ignored, [])


def _ade20k_classes(folder: Path) -> list[str]:
    """Read the 150 names from the file that comes with the data, objectInfo150.txt; numbers where it is missing."""
    listed = folder / "objectInfo150.txt"
    if not listed.is_file():
        return [str(number) for number in range(1, 151)]
    rows = [line.split("\t") for line in read_text(listed).splitlines()[1:] if line.strip()]
    return [row[-1].split(",")[0].strip() for row in rows]


def _classes_json(path: Path) -> Meaning:
    content = Fields(read_json(path), str(path))
    records = content.objects("classes")
    if not 0 < len(records) < 256:
        raise ValueError(f"{path}: classes has {len(records)} entries, expected 1 to 255")
    names: list[str] = []
    ids: list[int] = []
    for record in records:
        names.append(str(record.take("name", "a text", lambda value: isinstance(value, int | str))))
        ids.append(record.integer("id", 0, 255))
        if first := ids.index(ids[-1]) + 1 - len(ids):
            raise ValueError(
                f"{record.where}: id is {ids[-1]}, as in classes[{len(ids) - 1 + first}], expected an id of its own"
            )
    colors = [record.integers("color", 3, 0, 255, default) for record, default in zip(records, palette(len(ids)), strict=True)]
    ignore = content.integer("ignore_index", 0, 255, None)
    if ignore in ids:
        raise ValueError(f"{path}: ignore_index is {ignore}, the id of {names[ids.index(ignore)]}, expected another, or none")
    own = all("color" in record for record in records) and len(set(map(tuple, colors))) == len(colors)
    return Meaning(path, names, ids, colors, [] if ignore is None else [ignore], [], None if own else False)


BEHIND = re.compile(r"\"?(?P<name>.+?)\"?\s*[,;:\s]\s*(?P<color>\d+\s*[,;\s]\s*\d+\s*[,;\s]\s*\d+)\s*(:.*)?")  # name, colour
BEFORE = re.compile(r"(?P<color>\d+[,;\s]+\d+[,;\s]+\d+)[,;:\s]+\"?(?P<name>[^\"]+?)\"?")  # colour, name
NUMBERED = re.compile(r"(?P<number>\d+)\s*[,;:\s]\s*(?P<name>.+)")
HEADERS = ("name,r,g,b", "class,r,g,b", "pixelvalue,class", "label:color_rgb:parts:actions")


def _table(path: Path) -> Meaning:
    """Read a table of classes: names with colours, numbers with names, or names alone, which are numbered from 0."""
    if path.suffix == ".json":
        return _classes_json(path)
    lines = [(i, line.strip()) for i, line in enumerate(read_text(path).splitlines(), start=1)]
    rows = [(i, line) for i, line in lines if line and line[0] != "#" and re.sub(r"\s", "", line).lower() not in HEADERS]
    kinds = [kind for kind in (BEHIND, BEFORE, NUMBERED) if any(kind.fullmatch(line) for _, line in rows)]
    names: list[str] = []
    colors: list[list[int]] = []
    ids: list[int] = []
    for i, line in rows:
        match = kinds[0].fullmatch(line) if kinds else None
        if kinds and not match:
            raise ValueError(f"{path}: line {i}: is {line[:60]!r}, expected a name with a colour or a number, as other lines")
        fields = match.groupdict() if match else {"name": line}
        names.append(fields["name"].strip())
        ids.append(int(fields.get("number") or len(ids)))
        colors.append([int(part) for part in re.findall(r"\d+", fields.get("color") or "")])
        twice = ids.count(ids[-1]) > 1 or (colors[-1] and colors.count(colors[-1]) > 1)
        if twice or max([ids[-1], *colors[-1]]) > 255:
            raise ValueError(f"{path}: line {i}: is {line[:60]!r}, expected a number or a colour of its own, from 0 to 255")
    keep = [i for i, name in enumerate(names) if name.lower() not in UNLABELLED]
    if not keep:
        raise ValueError(f"{path}: names no class, expected one in each line: its name with its colour or its number")
    others = [i for i in range(len(names)) if i not in keep]
    by_color = any(colors)
    shown = colors if by_color else palette(len(names))
    return Meaning(
        path,
        [names[i] for i in keep],
        [ids[i] for i in keep],
        [shown[i] for i in keep],
        [ids[i] for i in others] or ([] if by_color or 255 in ids else [255]),
        [shown[i] for i in others],
        by_color,
    )


def pairs(found: Recognised, part: str, left_out: Counter[str]) -> Iterator[tuple[Path, Path]]:
    """Yield each image of a part with its mask, which may not be there; count what is left out.

    Raises:
        ValueError: If there is no such folder.
    """
    images, masks, *lists = found.parts[part]
    for place in (images, masks):
        if not place.is_dir():
            raise ValueError(f"{place}: no such folder, expected images in {images} and masks in {masks}")
    listed = list_images(images, left_out)
    if found.format == "cityscapes":
        for image in listed:
            name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
            yield image, masks / image.parent.relative_to(images) / name
        return
    files = [file for file in listed if file.parent == images]
    if deeper := len(listed) - len(files):
        left_out["in deeper folders"] = deeper
    if images == masks:
        files = [file for file in files if not file.stem.endswith("_mask")]
    if lists:
        by_stem = {file.stem: file for file in files}
        stems = [line.split()[0] for line in read_text(lists[0]).splitlines() if line.strip()]
        files = [by_stem.get(stem, images / f"{stem}.jpg") for stem in stems]
    there = {file.stem: file for file in masks.iterdir() if file.suffix.lower() in LOSSLESS}
    for file in files:
        names = [f"{file.stem}{ending}" for ending in (ENDINGS[1:] if images == masks else ENDINGS)]
        yield file, next((there[name] for name in names if name in there), masks / f"{names[0]}.png")
