"""Images: found by paths and globs, read, and converted to RGB from any of Pillow's modes."""

import io
import math
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# Uploads, from people who are not trusted: only the formats above, as Pillow starts another program to read some others. The
# longer side is limited because an extreme image becomes huge when its shorter side is resized to the model's input size.
UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
UPLOAD_RATIO = 50  # longer side over shorter side, at most

# What makes an image upright, by its orientation in EXIF.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow finds an orientation: in `Image.info`, and by the same names in a PNG.
ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

Size = tuple[int, int]  # width, height


def find_images(paths: Iterable[str]) -> list[Path]:
    """Expand files, folders (searched through) and globs into image files, in order and without repeats.

    A path that matches nothing is returned as it is, so that reading it raises an error.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            matches: Sequence[Path] = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif any(char in given for char in "*?[") and not path.exists():
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        else:
            matches = [path]
        found.update(dict.fromkeys(matches or [path]))
    return list(found)


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF or XMP; 1, which is upright, where there is none or it is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow parses EXIF without checks: any error means that it is damaged
        return 1
    return orientation if orientation in TURNS else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright and convert it from any mode to 8-bit RGB: the first frame of an animation; alpha is dropped.

    What is returned has no EXIF any more, so it is not turned again.
    """
    image.load()  # turns a TIFF, and reads what follows the pixels of a PNG
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 1 if values.max(initial=0) <= 255 else 257
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("RGB")
    for key in ORIENTED_BY:
        image.info.pop(key, None)
    return image


@contextmanager
def _opened(file: IO[bytes] | bytes | Path, name: str, most_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image whose pixels are not decoded yet; every error, also while it is used, becomes a ValueError of one line."""
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # of sizes below the limit, of damaged metadata
            if isinstance(file, Path):  # opened here: Pillow would map it, which scrambles a TIFF that lies on its side
                if file.exists() and not file.is_file():
                    raise ValueError("a folder" if file.is_dir() else "neither a file nor a folder")  # reading might never end
                file = stack.enter_context(file.open("rb"))
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            with Image.open(opened, formats=UPLOAD_FORMATS if most_pixels else None) as image:
                too_long = max(image.size) > UPLOAD_RATIO * min(image.size)
                if most_pixels and (too_long or math.prod(image.size) > most_pixels):
                    limits = f"at most {most_pixels / 1e6:.3g} million and no side over {UPLOAD_RATIO} times the other"
                    raise ValueError(f"{image.width} x {image.height} pixels, expected {limits}")
                yield image
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image: no known format") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{name}: not a readable image: {lines[0]}") from error


def decode(file: IO[bytes] | bytes | Path, name: str, most_pixels: int | None = None) -> Image.Image:
    """Read an image, upright, as RGB.

    Args:
        file: An open file, its bytes or its path.
        name: What to call it in an error.
        most_pixels: For an upload: limit of its pixels. Its formats are then those of `UPLOAD_FORMATS`, and no side may be over
            `UPLOAD_RATIO` times the other.

    Raises:
        ValueError: If it cannot be read, is truncated, or has so many pixels (above 179 million) that it may be an attack.
    """
    with _opened(file, name, most_pixels) as image:
        return to_rgb(image)


def read_image(path: Path) -> Image.Image:
    """Read the image at `path`, upright, as RGB.

    Raises:
        ValueError: As `decode` does.
    """
    return decode(path, str(path))


def image_sizes(path: Path) -> tuple[Size, Size]:
    """Return (width, height) of the image that `read_image` gives, and of its pixels as they are stored.

    They differ where EXIF says that the image lies on its side. No pixels are decoded, except where a PNG has such a note.

    Raises:
        ValueError: As `decode` does.
    """
    with _opened(path, str(path)) as image:
        stored = image.size
        if tags := getattr(image, "tag_v2", None):  # of a TIFF, whose size Pillow gives upright
            stored = int(tags[ExifTags.Base.ImageWidth]), int(tags[ExifTags.Base.ImageLength])
        unturned = image.format == "PNG" and not _png_is_oriented(path)  # saves decoding the pixels that EXIF may follow
        on_its_side = not unturned and _orientation(image) >= 5
        return (stored[::-1] if on_its_side else stored), stored


def _png_is_oriented(path: Path) -> bool:
    """Whether a PNG holds EXIF or XMP, before or after its pixels."""
    keywords = tuple(name.encode() for name in ORIENTED_BY[1:3])
    with path.open("rb") as file:
        file.seek(8)  # behind the signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            text = file.read(min(length, 21))
            if kind == b"eXIf" or text.startswith(keywords):
                return True
            file.seek(length - len(text) + 4, 1)  # and the checksum
    return False
