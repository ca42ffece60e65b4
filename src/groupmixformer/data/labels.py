"""Labels of images: from a CSV file, in one column or a column for each class, or the classes of the objects in them."""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.utils.misc import natural_key

from ..files import read_text
from .annotations import Annotations
from .classes import few
from .formats import IMAGE_COLUMNS, Recognised, plain
from .images import ARRAY_SUFFIXES, IMAGE_SUFFIXES

SEVERAL, ONE = ("labels", "tags", "classes", "categories"), ("label", "tag", "class", "category")  # names of a column
VALUES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # in columns of classes, lower case
SEPARATORS = {"|": "|", ";": "semicolons", ",": "commas", " ": "spaces"}


@dataclass
class Labels:
    """The images of a part of a data set, with their labels.

    Attributes:
        class_names: In natural order for a column of labels, in that of the file otherwise.
        samples: Files, each with the numbers of its classes, in order.
        several: Whether an image may have several labels, or none; otherwise each has one.
        skipped: A line for each image that is left out.
        notes: Further lines.
    """

    class_names: list[str]
    several: bool
    samples: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_labels(found: Recognised, part: str) -> Labels:
    """Read a part of a data set of labels or of objects.

    Raises:
        ValueError: If it cannot be used; of a CSV file, says the line.
        OSError: If a file cannot be read.
    """
    return _of_csv(found, part) if found.format == "labels" else _of_objects(found, part)


def _of_objects(found: Recognised, part: str) -> Labels:
    read = Annotations(found, part, masks=False)
    if repeated := [name for name, count in Counter(read.class_names).items() if count > 1]:
        raise ValueError(
            f"{read.source}: has several categories of the name {few(repeated)}, expected a name of its own for each"
        )
    labels = Labels(read.class_names, True, skipped=read.skipped, notes=[*read.notes])
    labels.notes.append("the labels of an image are the categories of its objects")
    for key, image in read.images.items():
        classes = sorted({annotation["label"] - 1 for annotation in read.objects[key]})
        labels.samples.append((str(read.folder / image["file_name"]), tuple(classes)))
    return _counted(labels)


def _counted(labels: Labels) -> Labels:
    if bare := sum(not classes for _, classes in labels.samples):
        labels.notes.append(f"{bare} image{'s have' if bare > 1 else ' has'} no label")
    return labels


class _Table:
    """A CSV file: its header, and its rows by the number of their line."""

    def __init__(self, file: Path) -> None:
        self.file, text = file, read_text(file)
        head = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
        lines: list[tuple[int, list[str]]] = []
        try:
            for cells in reader:
                lines += [(reader.line_num, [cell.strip() for cell in cells])] if any(cells) else []
        except csv.Error as error:
            raise ValueError(f"{file}: line {reader.line_num}: not CSV: {error}") from error
        if len(lines) < 2:
            raise ValueError(f"{file}: has {len(lines)} lines, expected a header and one line for each image")
        (_, self.header), *rows = lines
        if repeated := [name for name, count in Counter(self.header).items() if count > 1]:
            raise ValueError(f"{file}: has several columns of the name {few(repeated)!r}, expected each once")
        for number, cells in rows:
            if len(cells) != len(self.header):
                names = ", ".join(self.header[:4]) + (", ..." if len(self.header) > 4 else "")
                raise ValueError(f"{file}: line {number}: has {len(cells)} values, expected {len(self.header)}: {names}")
        self.rows = {number: dict(zip(self.header, cells, strict=True)) for number, cells in rows}

    def column(self, name: str) -> list[str]:
        return [row[name] for row in self.rows.values()]

    @property
    def image(self) -> str:
        """The column of the images, by its name, or because its values end as names of images do."""
        plain_names = {plain(name): name for name in reversed(self.header)}
        named = next((plain_names[name] for name in IMAGE_COLUMNS if name in plain_names), None)
        ending = (
            name
            for name in self.header
            if all(Path(cell).suffix.lower() in {*IMAGE_SUFFIXES, *ARRAY_SUFFIXES} for cell in self.column(name))
        )
        found = named or next(ending, None)
        if found is None or len(self.header) < 2:
            raise ValueError(
                f"{self.file}: has the columns {few(self.header)}, expected image, and labels or a column for each class"
            )
        return found


@dataclass(frozen=True)
class _Form:
    """How labels are written: all parts of a data set have them in the way of the first.

    Attributes:
        column: Of the labels; none for a column for each class.
        separator: Between labels; none where an image has one.
        names: Of the classes.
        notes: How they are read.
    """

    column: str | None
    separator: str | None
    names: list[str]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, table: _Table) -> "_Form":
        others = [name for name in table.header if name not in ("", table.image)]
        known = {name: plain(name) for name in others}
        column = next((name for name in others if known[name] in SEVERAL + ONE), None)
        if column is None and len(others) == 1 and not {cell.lower() for cell in table.column(others[0])} <= set(VALUES):
            column = others[0]
        if column is None:
            return cls(None, None, others, ("a column for each class",))
        cells = table.column(column)
        separator = next((mark for mark in "|;," if any(mark in cell for cell in cells)), None)
        if separator is None and known[column] in SEVERAL:
            separator = " "
        found = {label for cell in cells for label in _split(cell, separator)}
        names = sorted(sorted(found), key=natural_key)  # which tells no case apart
        if not names:
            raise ValueError(f"{table.file}: its column {column} is empty, expected labels")
        said = f"labels separated by {SEPARATORS[separator]}" if separator else "one label a line"
        notes = [f"the column {column} has {said}"]
        if left := [name for name in others if name != column]:
            notes.append(f"other columns are left out: {few(left)}")
        cases: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            cases[name.casefold()].append(name)
        if alike := [", ".join(same) for same in cases.values() if len(same) > 1]:
            notes.append(f"labels that differ in case alone are different classes: {few(alike)}")
        return cls(column, separator, names, tuple(notes))

    def read(self, table: _Table) -> Iterable[tuple[int, str, tuple[int, ...]]]:
        """Yield line, image and numbers of the classes.

        Raises:
            ValueError: If a label or a value is not known, or a column is missing.
        """
        numbers, image = {name: number for number, name in enumerate(self.names)}, table.image
        columns = self.names if self.column is None else [self.column]
        if missing := [name for name in columns if name not in table.header]:
            raise ValueError(f"{table.file}: has no column {few(missing)}, which the training part has")
        for line, row in table.rows.items():
            where = f"{table.file}: line {line}"
            if self.column is None:
                if wrong := [name for name in columns if row[name].lower() not in VALUES]:
                    raise ValueError(
                        f"{where}: {wrong[0]} is {row[wrong[0]]!r:.60}, expected 0 or 1 as in every column beside {image}, "
                        "or a column named labels: remove columns that are no classes"
                    )
                yield line, row[image], tuple(number for name, number in numbers.items() if VALUES[row[name].lower()])
                continue
            labels = _split(row[self.column], self.separator)
            if unknown := [label for label in labels if label not in numbers]:
                near = get_close_matches(unknown[0], self.names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{where}: label {unknown[0]!r:.60} is not among those of training: the nearest is {near!r:.60}"
                )
            yield line, row[image], tuple(sorted({numbers[label] for label in labels}))


def _split(cell: str, separator: str | None) -> list[str]:
    """Return the labels of a cell; a list as Python prints it is one too."""
    if separator is None:
        return [cell] if cell else []
    parts = (part.strip(" '\"") for part in re.sub(r"^\[(.*)\]$", r"\1", cell).split(separator))
    return [part for part in parts if part]


def _of_csv(found: Recognised, part: str) -> Labels:
    (file,), first = found.parts[part], found.parts["train" if "train" in found.parts else part][0]
    table = _Table(file)
    form = _Form.of(table if first == file else _Table(first))
    labels = Labels(form.names, form.column is None or form.separator is not None, notes=list(form.notes))
    rows = list(form.read(table))
    find, several = _Finder(file, [name for _, name, _ in rows]), defaultdict[str, list[tuple[int, tuple[int, ...]]]](list)
    for line, name, classes in rows:
        if path := find(name):
            several[path].append((line, classes))
        else:
            labels.skipped.append(f"{file}: line {line}: no image {name or 'is named'}")
    if not several:
        raise ValueError(f"{file}: none of its {len(rows)} images is there, such as {rows[0][1]!r}: looked in {find.looked_in}")
    repeated = {path: named for path, named in several.items() if len(named) > 1}
    for path, ((line, classes), *more) in repeated.items():
        if form.column is None and (other := next((n for n, own in more if own != classes), None)):
            raise ValueError(
                f"{file}: line {other}: {path} has other labels than in line {line}, expected one line for each image"
            )
    if repeated:
        joined = "" if form.column is None else ": their labels are joined"
        labels.notes.append(f"{len(repeated)} images are listed several times{joined}: {few(list(repeated), 3)}")
        labels.several |= any(len({own for _, own in named}) > 1 for named in repeated.values())
    for path, named in several.items():
        labels.samples.append((path, tuple(sorted({number for _, classes in named for number in classes}))))
    if not labels.several and (bare := next((line for line, _, classes in rows if not classes), None)):
        raise ValueError(f"{file}: line {bare}: has no {form.column}, expected one for each image")
    return _counted(labels)


class _Finder:
    """Finds images by their names in a CSV file, with or without ending, beside the file or in a usual folder beside it."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        stem, base = file.stem, file.parent
        own = [name for name in (stem, f"{stem}_images", f"images/{stem}") if (base / name).is_dir()]
        usual = [
            "",
            "images",
            "imgs",
            *(own or ["train", "train_images"]),
        ]  # in train/ of val.csv there may be others by its names
        places = [base / name for name in usual if (base / name).is_dir()]
        self.looked_in = few([str(place) for place in places])
        bare = any(Path(name).suffix.lower() not in {*IMAGE_SUFFIXES, *ARRAY_SUFFIXES} for name in names)
        endings = [
            "",
            *(
                [*sorted(IMAGE_SUFFIXES, key=lambda s: (s not in (".jpg", ".png", ".jpeg"), s)), *sorted(ARRAY_SUFFIXES)]
                if bare
                else []
            ),
        ]
        self.ways = [(place, ending) for ending in endings for place in places]

    def __call__(self, name: str) -> str | None:
        for way in self.ways if name else ():
            path = os.path.join(way[0], name.replace("\\", "/") + way[1])  # noqa: PTH118 - Path takes a name with a zero byte to be one
            if _is_file(path):
                if self.ways[0] != way:  # most others lie there too
                    self.ways.remove(way)
                    self.ways.insert(0, way)
                return path
        return None


def _is_file(path: Any) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # no name that the system can have
        return False
