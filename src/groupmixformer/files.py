"""Files that are whole or not there: written beside their place, then renamed."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that nobody ever sees half of it, and an earlier one stays where that fails."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
