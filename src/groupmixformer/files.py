"""Atomic writes: a file is whole or not there, and an earlier one stays until the new one is complete."""

import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    """Write a file of these bytes, or of this text in UTF-8."""
    with atomic_write(path) as folder:
        (folder / path.name).write_bytes(content if isinstance(content, bytes) else content.encode())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file with the names of the first row as its header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
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
    out.mkdir(parents=True, exist_ok=True)
    folder, number, stem = out.resolve(), 1, image.stem
    while not taken.isdisjoint(folder / f"{stem}{ending}" for ending in files):  # of one name from several folders
        number += 1
        stem = f"{image.stem}-{number}"
    for ending, content in files.items():
        write_file(out / f"{stem}{ending}", content)
        taken.add(folder / f"{stem}{ending}")
    return [str(out / f"{stem}{ending}") for ending in files]
