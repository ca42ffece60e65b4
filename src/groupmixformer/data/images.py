"""Images: found by paths and globs, read, and converted to RGB from any of Pillow's modes."""

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# Uploads, from people who are not trusted: only the formats above, as Pillow starts another program to read some others. The
# longer side is limited because an extreme image becomes huge when its shorter side is resized to the model's input size.
UPLOAD_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
UPLOAD_RATIO = 50  # longer side over shorter side, at most


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB: the first frame of an animation, grey, palette, CMYK; alpha is dropped.

    Pillow clips 16-bit grey to white; here it is scaled. EXIF orientation is ignored, as in ImageNet's training.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        scale = 1 if values.max(initial=0) <= 255 else 257
        image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(file: IO[bytes] | bytes | Path, name: str, most_pixels: int | None = None) -> Image.Image:
    """Read an image as RGB.

    Args:
        file: An open file, its bytes or its path.
        name: What to call it in an error.
        most_pixels: For an upload: limit of its pixels. Its formats are then those of `UPLOAD_FORMATS`, and no side may be over
            `UPLOAD_RATIO` times the other.

    Raises:
        ValueError: If it cannot be read, is truncated, or has so many pixels (above 179 million) that it may be an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            with Image.open(opened, formats=UPLOAD_FORMATS if most_pixels else None) as image:
                too_long = max(image.size) > UPLOAD_RATIO * min(image.size)
                if most_pixels and (too_long or math.prod(image.size) > most_pixels):
                    limits = f"at most {most_pixels / 1e6:.3g} million and no side over {UPLOAD_RATIO} times the other"
                    raise ValueError(f"{image.width} x {image.height} pixels, expected {limits}")
                return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name}: a folder without images") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a readable image: no known format") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{name}: not a readable image: {lines[0]}") from error


def read_image(path: Path) -> Image.Image:
    """Read the image at `path` as RGB.

    Raises:
        ValueError: As `decode` does.
    """
    return decode(path, str(path))
