"""What a path holds: the format of a data set by its names of files, its parts, and the tasks that it serves."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ..files import read_text
from .images import ARRAY_SUFFIXES, IMAGE_SUFFIXES, is_leftover

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
WHOLE = "all"  # the only part of a data set that is not split
TABLES = (
    *("classes.json", "class_dict.csv", "label_colors.txt", "labelmap.txt"),
    *("class_names.txt", "classes.csv", "classes.txt", "labels.txt"),
)
# Names of a column of images, as `plain` has them, the surest first.
IMAGE_COLUMNS = ("image", "filename", "imagepath", "imagename", "filepath", "path", "file", "fname", "imageid", "img", "id")
TAKEN_WHOLE = "it is not split: all of it is taken"
PEEKED = 2**20  # bytes of a file that are looked at

Parts = dict[str, tuple[Path, ...]]


@dataclass(frozen=True)
class Recognised:
    """What a path holds.

    Attributes:
        path: As it was given.
        format: Its short name, a key of `FORMATS`.
        title: The format in words.
        tasks: Those that it serves, by their names in recipes.
        parts: What is read for each part, by its name: train, val, test or another; `WHOLE` alone where it is not split. Of
            COCO, CVAT, labels: the file of annotations; for COCO perhaps that of keypoints too. Of YOLO: folders of images, or
            a list of them. Of Pascal VOC and labelme: the folder of annotations, and for Pascal VOC perhaps a list of names. Of
            masks: the folders of images and of masks. Of classes: the folder of their folders.
    """

    path: Path
    format: str
    title: str
    tasks: tuple[str, ...]
    parts: Mapping[str, tuple[Path, ...]]

    @property
    def split(self) -> bool:
        """Whether it has a part to train on and another to measure on."""
        return "train" in self.parts and "val" in self.parts

    @property
    def text(self) -> str:
        """A sentence for people."""
        parts = "not split into parts" if WHOLE in self.parts else f"with the parts {', '.join(self.parts)}"
        return f"{self.path}: {self.title}, {parts}, for {' and '.join(', '.join(self.tasks).rsplit(', ', 1))}"

    def part(self, name: str, or_whole: bool = False) -> str:
        """Return the name of a part as `parts` has it.

        Args:
            name: Of a part, also by another name for it, such as valid.
            or_whole: Whether a data set that is not split is taken whole.

        Raises:
            ValueError: If there is no such part.
        """
        for known in (name, part_of(name), *([WHOLE] if or_whole else [])):
            if known in self.parts:
                return known
        if WHOLE in self.parts:
            folder = ", or name the folder of all parts" if self.path.is_file() else ""
            hint = f"deal it out with --val-share 0.2{folder}"
            raise ValueError(f"{self.path}: {self.title}, not split, expected a part {name}: {hint}")
        there = "; ".join(f"{part} in {', '.join(map(str, read))}" for part, read in self.parts.items())
        raise ValueError(f"{self.path}: {self.title}, expected a part {name}; found {there}")

    def undivided(self) -> str:
        """Return the name of the only part, to deal its images out.

        Raises:
            ValueError: If there are several.
        """
        if len(self.parts) > 1:
            parts = f"with the parts {', '.join(self.parts)}"
            raise ValueError(f"{self.path}: {self.title}, {parts}, expected a data set that is not split: leave out val_share")
        return next(iter(self.parts))


def part_of(name: str) -> str:
    """Return train, val or test for the names that they go by, others as they are."""
    return next((part for part, names in PARTS.items() if name.lower() in names), name)


def peek(path: Path, pattern: str) -> bool:
    """Whether the first megabyte of a file has what a regular expression finds; false if it cannot be read."""
    try:
        with path.open("rb") as file:
            return re.search(pattern.encode(), file.read(PEEKED)) is not None
    except OSError:
        return False


def plain(name: str) -> str:
    """Return the name of a column without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", name).lower()


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_leftover(p.name)) if path.is_dir() else []


def _files(path: Path, *suffixes: str) -> Iterable[Path]:
    """Yield files in a folder by their endings, in no order: some folders hold a million."""
    there = path.iterdir() if path.is_dir() else ()
    return (p for p in there if p.suffix.lower() in suffixes and not is_leftover(p.name) and p.is_file())


def _holds(path: Path, *suffixes: str) -> bool:
    return next(iter(_files(path, *suffixes)), None) is not None


def _images_in(path: Path) -> bool:
    return _holds(path, *IMAGE_SUFFIXES, *ARRAY_SUFFIXES)


def has_class_folders(path: Path) -> bool:
    """Whether a folder holds two or more folders, each with images."""
    folders = _folders(path)
    return len(folders) > 1 and all(map(_images_in, folders))


def _sub(path: Path, *names: str) -> Path | None:
    """Return the first folder of one of these names, in any case."""
    by_name = {p.name.lower(): p for p in _folders(path)}
    return next((by_name[name.lower()] for name in names if name.lower() in by_name), None)


def _in_parts(path: Path, find: Callable[[Path], tuple[Path, ...] | None]) -> Parts:
    """Return what is found in each subfolder that is named as a part; else in the folder itself, as a whole."""
    found = {part_of(p.name): find(p) for p in _folders(path) if part_of(p.name) in PARTS}
    parts = {name: found[name] for name in PARTS if found.get(name)}
    whole = () if parts else find(path)
    return {**parts, **({WHOLE: whole} if whole else {})}  # type: ignore[dict-item]


def _labels(path: Path) -> Parts:
    """labels.csv; train.csv, val.csv; _classes.csv in train/ and valid/, as Roboflow writes; a CSV file that is named."""

    def lists_images(file: Path) -> bool:
        if not file.is_file():
            return False
        with file.open("rb") as opened:
            head = opened.readline(PEEKED).decode("utf-8-sig", "replace")
        names = {plain(name) for name in re.split("[,;\t]", head)}
        return len(names) > 1 and not names.isdisjoint(IMAGE_COLUMNS)

    if path.is_file():
        return {WHOLE: (path,)} if path.suffix.lower() in (".csv", ".tsv") else {}
    named = {part: [path / f"{name}.csv" for name in names] for part, names in PARTS.items()}
    parts: Parts = {part: (file,) for part, files in named.items() for file in files if lists_images(file)}
    parts = parts or _in_parts(path, lambda p: tuple(f for f in [p / "_classes.csv"] if lists_images(f)))
    return parts or ({WHOLE: (path / "labels.csv",)} if lists_images(path / "labels.csv") else {})


def _coco(path: Path) -> Parts:
    """Annotations/instances_train.json or person_keypoints_train.json; Roboflow's train/_annotations.coco.json; a JSON file."""

    def is_coco(file: Path) -> bool:
        return peek(file, r'"(images|annotations)"\s*:\s*\[')

    if path.is_file():
        return {WHOLE: (path,)} if path.suffix.lower() == ".json" and is_coco(path) else {}
    kinds: dict[str, dict[bool, Path]] = {}  # of each part the first file without keypoints, and the first with them
    files = [file for place in (path / "annotations", path) for file in sorted(islice(_files(place, ".json"), 1000))]
    names = {file: re.fullmatch(r"(instances_|.*keypoints_)?(.+?)(\d{4})?", file.stem) for file in files}
    for file, name in names.items():
        assert name
        if name[1] or part_of(name[2]) in PARTS:
            kinds.setdefault(part_of(name[2]), {}).setdefault(has_keypoints(file), file)
    parts = {part: tuple(file for _, file in sorted(of_kind.items())) for part, of_kind in kinds.items()}
    if not parts:
        parts = _in_parts(path, lambda p: tuple(f for f in [p / "_annotations.coco.json"] if f.is_file()))
    if not parts:
        parts = {file.stem: (file,) for file in files[:20] if is_coco(file)}
    return {WHOLE: next(iter(parts.values()))} if len(parts) == 1 and not set(parts) & set(PARTS) else parts


def has_keypoints(file: Path) -> bool:
    """Whether a file is named as COCO's annotations of keypoints are, which lie beside those of instances."""
    return "keypoints_" in file.stem


def read_yolo(path: Path) -> tuple[dict[str, Any], Path] | None:
    """Read what YOLO's YAML file says, and return it with its path; none if there is no such file.

    Args:
        path: The file, or the folder that holds it under the name data.yaml or another.

    Raises:
        ValueError: If the file that is given, or that is named data.yaml, is no YAML.
    """
    files = [path] if path.is_file() else sorted(_files(path, ".yaml", ".yml"), key=lambda p: (p.stem != "data", p.name))
    for file in files:
        if file.suffix.lower() in (".yaml", ".yml"):
            try:
                content = yaml.safe_load(read_text(file))
            except yaml.YAMLError as error:
                raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
            if isinstance(content, dict) and "names" in content and {"train", "val", "test"} & set(content):
                return content, file
    return None


def _yolo(path: Path) -> Parts:
    """data.yaml; or images/ and labels/; or train/images/ and train/labels/; or images and texts in one folder."""
    if read := read_yolo(path):
        content, file = read
        return {
            part: tuple(_of_yaml(content, str(place), file) for place in (given if isinstance(given, list) else [given]))
            for part in PARTS
            if (given := content.get(part))
        }

    def pair(folder: Path) -> tuple[Path, ...] | None:
        images, labels = folder / "images", folder / "labels"
        return (images,) if _holds(labels, ".txt") and _images_in(images) else None

    if path.is_dir() and (path / "images").is_dir() and (path / "labels").is_dir():
        inner = {part_of(p.name): (p,) for p in _folders(path / "images") if _holds(path / "labels" / p.name, ".txt")}
        return {name: inner[name] for name in PARTS if name in inner} or _in_parts(path, pair)
    if parts := _in_parts(path, pair):
        return parts
    flat = any((path / name).is_file() for name in ("classes.txt", "obj.names")) and _images_in(path)
    return {WHOLE: (path,)} if flat and any(f.stem != "classes" for f in islice(_files(path, ".txt"), 2)) else {}


def _of_yaml(content: Mapping[str, Any], place: str, file: Path) -> Path:
    """Return a folder or list that a YAML file names, which is relative to its `path`, to itself, or, as Roboflow's, wrong."""
    root = file.parent / str(content.get("path") or "")
    cut = place
    while cut.startswith("../"):
        cut = cut.removeprefix("../")
    tried = [root / place, file.parent / place, root / cut, file.parent / cut]
    return next((p for p in tried if p.exists()), tried[0])


def _voc(path: Path) -> Parts:
    """Annotations/ with ImageSets/Main/, or XML files in train/, valid/, or in the folder itself."""
    annotations = _sub(path, "Annotations", "xmls", "labels")

    def has_objects(folder: Path) -> tuple[Path, ...] | None:
        first = next((f for place in (folder, *_folders(folder)) for f in _files(place, ".xml")), None)
        return (folder,) if first and peek(first, r"<annotation[\s>]") else None

    if annotations and (found := _in_parts(annotations, has_objects)):
        lists = {part_of(f.stem): (annotations, f) for f in _files(path / "ImageSets" / "Main", ".txt") if "_" not in f.stem}
        return {name: lists[name] for name in PARTS if name in lists} if WHOLE in found and set(lists) & set(PARTS) else found
    return _in_parts(path, has_objects)


def _labelme(path: Path) -> Parts:
    """A JSON file for each image, in train/ and val/ or in one folder."""

    def has_shapes(folder: Path) -> tuple[Path, ...] | None:
        places = [folder, *_folders(folder)]
        first = next((f for place in places for f in _files(place, ".json")), None)
        return (folder,) if first and peek(first, r'"shapes"\s*:\s*\[') else None

    return _in_parts(path, has_shapes) if path.is_dir() else {}


def _cvat(path: Path) -> Parts:
    """One XML file, whose images may be of subsets."""
    files = [path] if path.is_file() else sorted(islice(_files(path, ".xml"), 2))
    for file in files:
        if file.suffix.lower() == ".xml" and peek(file, r"<annotations[\s>]"):
            subsets = {part_of(name) for name in re.findall(r'<image [^>]*\bsubset="([^"]+)"', read_text(file))}
            return {name: (file,) for name in PARTS if name in subsets} or {WHOLE: (file,)}
    return {}


def _masks(path: Path) -> Parts:
    """Folders of images and of masks beside a table of classes; CamVid's and Roboflow's names for them."""
    if any((path / name).is_file() for name in TABLES):
        images = _sub(path, "images", "imgs", "JPEGImages")
        masks = _sub(path, "masks", "labels", "annotations", "SegmentationClass")
        if images and masks and any(map(_images_in, [masks, *_folders(masks)])):
            lists = {part_of(f.stem): f for f in _files(path / "ImageSets" / "Segmentation", ".txt")}
            if lists:
                return {name: (images, masks, lists[name]) for name in PARTS if name in lists}
            parts = {part_of(p.name): (p, masks / p.name) for p in _folders(images)}
            parts |= {} if parts else {WHOLE: (images, masks)}
            return {name: parts[name] for name in sorted(parts, key=lambda n: (n not in PARTS, [*PARTS, n].index(n)))}
        pairs: Parts = {}
        for folder in _folders(path):
            beside = _sub(path, *(f"{folder.name}{end}" for end in ("_labels", "_masks", "annot", "_annotations")))
            if beside and part_of(folder.name) in PARTS:
                pairs[part_of(folder.name)] = (folder, beside)
        return {name: pairs[name] for name in PARTS if name in pairs}
    return _in_parts(path, lambda p: (p, p) if (p / "_classes.csv").is_file() and any(p.glob("*_mask.png")) else None)


def _voc_masks(path: Path) -> Parts:
    images, masks = path / "JPEGImages", path / "SegmentationClass"
    if not (images.is_dir() and masks.is_dir()):
        return {}
    lists = {part_of(f.stem): (images, masks, f) for f in _files(path / "ImageSets" / "Segmentation", ".txt")}
    return {name: lists[name] for name in PARTS if name in lists} or {WHOLE: (images, masks)}


def _ade20k(path: Path) -> Parts:
    names = [n for n in ("training", "validation", "testing") if (path / "annotations" / n).is_dir()]
    return {part_of(n): (path / "images" / n, path / "annotations" / n) for n in names} if "training" in names else {}


def _cityscapes(path: Path) -> Parts:
    images, masks = path / "leftImg8bit", path / "gtFine"
    names = [n for n in ("train", "val") if (masks / n).is_dir()] if images.is_dir() else []  # those of test are not public
    return {n: (images / n, masks / n) for n in names}


def _classes(path: Path) -> Parts:
    """Folders of classes, in train/ and val/ or not."""
    return _in_parts(path, lambda folder: (folder,) if any(map(_images_in, _folders(folder))) else None)


@dataclass(frozen=True)
class _Format:
    title: str
    tasks: tuple[str, ...]
    find: Callable[[Path], Parts]


OBJECTS = ("detection", "segmentation", "classification")
# In the order in which they are looked for: what is surer first, and masks before objects of which some are to be drawn.
FORMATS = {
    "labels": _Format("labels in a CSV file", ("classification",), _labels),
    "cityscapes": _Format("Cityscapes", ("segmentation",), _cityscapes),
    "ade20k": _Format("ADE20K", ("segmentation",), _ade20k),
    "masks": _Format("images and masks", ("segmentation",), _masks),
    "coco": _Format("COCO's annotations", OBJECTS, _coco),
    "yolo": _Format("YOLO", OBJECTS, _yolo),
    "voc": _Format("Pascal VOC", ("detection", "classification"), _voc),
    "voc-masks": _Format("Pascal VOC's masks", ("segmentation",), _voc_masks),
    "cvat": _Format("CVAT for images", OBJECTS, _cvat),
    "labelme": _Format("labelme", OBJECTS, _labelme),
    "classes": _Format("a folder of images for each class", ("classification",), _classes),
}


def recognise(path: str | Path, task: str = "") -> Recognised:
    """Tell what a path holds, by names of files and a look into a few of them.

    Args:
        path: A folder or a file.
        task: Take only formats that serve it; any by default.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If it is of no known format, or of none that serves the task.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    others: list[str] = []
    for name, format in FORMATS.items():
        parts = {} if others and name == "classes" else format.find(path)  # images/ and the like are no classes
        if parts and (not task or task in format.tasks):
            return Recognised(path, name, format.title, format.tasks, parts)
        others += [f"{format.title}, for {' and '.join(format.tasks)}"] if parts else []
    expected = ", ".join(format.title for format in FORMATS.values() if not task or task in format.tasks)
    names = sorted(p.name for p in path.iterdir() if not is_leftover(p.name)) if path.is_dir() else []
    there = others[0] if others else f"found {', '.join(names[:5]) or 'nothing'}" if path.is_dir() else "a file"
    raise ValueError(f"{path}: expected {'a data set' if not task else f'one for {task}'} ({expected}); {there}")
