"""Files: written atomically (whole or not there, and an earlier one stays until then), and read with their types checked."""

import csv
import io
import json
import math
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REQUIRED: Any = object()  # default of a field that must be there
JOINERS = "\u200c\u200d"  # inside words of some scripts, and inside emoji
LARGEST = sys.float_info.max  # JSON has integers that are larger


def printable(text: str) -> str:
    """Return a text in one line that does nothing to a terminal or a page: what is no visible character becomes an escape.

    These are line breaks, control characters, such as those that colour a terminal, marks that reverse the direction of what
    follows, and bytes of file names that are no text.
    """
    return "".join(
        c if c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def short(name: str, most: int = 40) -> str:
    """Return a name as figures show it: printable, and cut if it has over `most` characters."""
    text = printable(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(text: object) -> str:
    """Return what an error or another text says, without its line breaks."""
    return " ".join(str(text).split())


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 120 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(*paths: Path) -> Iterator[Path]:
    """Give a new folder to write to; then its files or folders of the names of `paths` take their places, in this order.

    They get ordinary permissions, by the umask; some libraries write files that only their owner may read. Whatever else was
    written to the folder is removed with it. If an error is raised, nothing has changed; if the process is killed, the folder
    stays and the next writer to the same place removes it.

    Args:
        paths: All in one folder, which is created if need be. A folder among them must not exist, or be empty.
    """
    part = paths[-1].with_name(f".{paths[-1].name}.part")
    _remove(part)
    part.mkdir(parents=True)
    try:
        yield part
        for path in paths:
            written = part / path.name
            for file in written.rglob("*") if written.is_dir() else [written]:
                if file.is_file():
                    file.chmod(part.stat().st_mode & 0o666)  # mkdir applied the umask
            written.replace(path)
    finally:
        _remove(part)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file of these bytes, or of this text in UTF-8; bytes of file names that are no text become escapes."""
    with atomic_write(path) as folder:
        (folder / path.name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], header: Sequence[str] = ()) -> None:
    """Write a CSV file with the names of the first row as its header, or those that are given."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header or (list(rows[0]) if rows else []))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def write_prediction(out: Path, image: Path, files: Mapping[str, bytes], taken: set[Path]) -> list[str]:
    """Write what was made of an image under the image's name.

    Args:
        out: Folder to write to.
        image: The file that was looked at.
        files: Contents by the ending of their name.
        taken: Files to keep, resolved: images that are looked at and what was written of them. A number is added to a name
            that would replace one; what is written is added to them.

    Returns:
        The files.
    """
    stem = free_stem(out, image, files, taken)
    for ending, content in files.items():
        write_file(out / f"{stem}{ending}", content)
    return [str(out / f"{stem}{ending}") for ending in files]


def free_stem(out: Path, image: Path, endings: Collection[str], taken: set[Path]) -> str:
    """Return the stem of an image, with a number if files of it are `taken` in a folder, which is made; they are taken now."""
    out.mkdir(parents=True, exist_ok=True)
    folder, number, stem = out.resolve(), 1, image.stem
    while not taken.isdisjoint(folder / f"{stem}{ending}" for ending in endings):  # of one name from several folders
        number += 1
        stem = f"{image.stem}-{number}"
    taken.update(folder / f"{stem}{ending}" for ending in endings)
    return stem


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON, which any parser reads: numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {name: finite(item) for name, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read_text(path: Path) -> str:
    """Read a text in UTF-8, with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not such a text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: save it in this encoding") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON, with the line and the column.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not JSON that can be read: nested too deeply") from None


class Fields:
    """A JSON object from a user's file, whose fields are read with their types checked.

    Args:
        values: What was read.
        where: The file, and the record in it, for messages: ``train.json: annotations[3]``.

    Raises:
        ValueError: If it is no object; from each method, if the field is missing or not what is expected. The message names the
            file, the field, what came and what is expected.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ValueError(f"{where}: is {_shown(values)}, expected an object with fields")
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, expected: str, fits: Callable[[Any], bool], default: Any = REQUIRED) -> Any:
        """Return a field that `fits`; `default`, if there is one, where it is missing or null."""
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if name not in self.values:
            raise ValueError(f"{self.where}: has no {name}, expected {expected}")
        if not fits(value):
            raise ValueError(f"{self.where}: {name} is {_shown(value)}, expected {expected}")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a text."""
        return self.take(name, "a text", lambda value: isinstance(value, str), default)

    def choice(self, name: str, options: Collection[str], default: Any = REQUIRED) -> Any:
        """Return one of the texts `options`."""
        expected = f"one of {', '.join(options)}"
        return self.take(name, expected, lambda value: isinstance(value, str) and value in options, default)

    def integer(self, name: str, low: int | None = None, high: int | None = None, default: Any = REQUIRED) -> Any:
        """Return an integer from `low` to `high`, both included; 3.0 is one, "3" and true are none."""
        value = self.take(name, f"an integer{_span(low, high)}", lambda value: _is_integer(value, low, high), default)
        return value if value is default else int(value)

    def number(self, name: str, low: float | None = None, high: float | None = None, default: Any = REQUIRED) -> Any:
        """Return a finite number from `low` to `high`, both included."""
        value = self.take(name, f"a finite number{_span(low, high)}", lambda value: _is_number(value, low, high), default)
        return value if value is default else float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        """Return true or false, also written 1 or 0; never a text."""
        value = self.take(name, "true, false, 1 or 0", lambda value: not isinstance(value, str) and value in (0, 1), default)
        return value if value is default else bool(value)

    def items(self, name: str, expected: str = "a list", default: Any = REQUIRED) -> Any:
        """Return a list of anything."""
        return self.take(name, expected, lambda value: isinstance(value, list), default)

    def texts(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a list of texts."""
        return self._list(name, "texts", lambda item: isinstance(item, str), None, default)

    def integers(
        self, name: str, length: int | None = None, low: int | None = None, high: int | None = None, default: Any = REQUIRED
    ) -> Any:
        """Return a list of integers from `low` to `high`."""
        return self._list(name, f"integers{_span(low, high)}", lambda item: _is_integer(item, low, high), length, default)

    def numbers(
        self, name: str, length: int | None = None, low: float | None = None, high: float | None = None, default: Any = REQUIRED
    ) -> Any:
        """Return a list of finite numbers from `low` to `high`."""
        return self._list(name, f"finite numbers{_span(low, high)}", lambda item: _is_number(item, low, high), length, default)

    def object(self, name: str, default: Any = REQUIRED) -> Any:
        """Return the fields of an object in this one."""
        value = self.take(name, "an object with fields", lambda value: isinstance(value, dict), default)
        return value if value is default else Fields(value, f"{self.where}: {name}")

    def objects(self, name: str, default: Any = REQUIRED) -> Any:
        """Return the fields of each object of a list."""
        value = self.items(name, "a list of objects", default)
        return value if value is default else [Fields(item, f"{self.where}: {name}[{i}]") for i, item in enumerate(value)]

    def _list(self, name: str, of: str, fits: Callable[[Any], bool], length: int | None, default: Any) -> Any:
        def all_fit(value: Any) -> bool:
            return isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))

        return self.take(name, f"a list of {'' if length is None else f'{length} '}{of}", all_fit, default)


def _is_integer(value: Any, low: int | None, high: int | None) -> bool:
    return _is_number(value, low, high) and value == int(value)


def _is_number(value: Any, low: float | None, high: float | None) -> bool:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return fits and (low is None or value >= low) and (high is None or value <= high)


def _span(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return (
        f" from {low} to {high}"
        if low is not None and high is not None
        else f" of at least {low}"
        if high is None
        else f" of at most {high}"
    )


def _shown(value: Any) -> str:
    """A value in a message: as in JSON, and cut."""
    text = (
        repr(value)
        if isinstance(value, float) and not math.isfinite(value)
        else json.dumps(value, default=str, ensure_ascii=False)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
