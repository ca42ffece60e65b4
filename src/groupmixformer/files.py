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


def write_prediction(out: Path, picture: Path, files: Mapping[str, bytes], taken: set[str]) -> list[str]:
    """Write what was made of a picture under the picture's name.

    Args:
        out: Folder to write to.
        picture: The file that was looked at.
        files: Contents by the ending of their name.
        taken: Names, without their ending, of other pictures in `out`; a number is added to one of them.

    Returns:
        The files.
    """
    stem, number = picture.stem, 1
    while stem in taken:  # pictures of one name from several folders
        number += 1
        stem = f"{picture.stem}-{number}"
    taken.add(stem)
    out.mkdir(parents=True, exist_ok=True)
    for ending, content in files.items():
        write_file(out / f"{stem}{ending}", content)
    return [str(out / f"{stem}{ending}") for ending in files]
