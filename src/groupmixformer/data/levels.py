"""8 bits from pixels of other types. The rule looks at one image alone, and docs/data.md states it."""

from typing import Any

import numpy as np
from PIL import ExifTags, Image

LEAST_LEVELS = 32  # of grey that should be left

# What is said of an image, after its name.
FLAT = f"fewer than {LEAST_LEVELS} levels of brightness are left of 16 bits or more"
GUESSED = {
    255: "16-bit numbers up to 255 at most, read as 8 bits",
    4095: "16-bit numbers up to 4,095 at most, read as 12 bits",
}
REMEDY = "rescale them, or store their range in the TIFF tags SMinSampleValue and SMaxSampleValue"

SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE = 340, 341  # tags of TIFF, which Pillow has no names for
WHITE_IS_ZERO = 0
ROWS = 512  # converted together
SCALED = ("JPEG2000", "PPM")  # Pillow spreads their numbers over 16 bits, whatever the file says is the largest


def is_deep(image: Image.Image) -> bool:
    """Whether the pixels of an image that is not loaded yet have more than 8 bits each, of which Pillow keeps 8 for colours."""
    return image.mode == "F" or image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def levels(image: Image.Image) -> int:
    """Count the different values of an image of 8 bits, over all of its channels."""
    return int(np.reshape(image.histogram(), (-1, 256)).any(axis=0).sum())


def to_8_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert grey of 16 or 32 bits, whole numbers or floating-point, to 8 bits.

    Returns:
        The image, of mode L, and of GUESSED and FLAT what is to be said of it.

    Raises:
        ValueError: If the range of its values cannot be told.
    """
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)  # (H, W)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel is a finite number")
    lowest, highest = (float(find(values, where=finite, initial=start)) for find, start in _ends(values.dtype))
    low, high, notes = _range(lowest, highest, values.dtype.kind == "f", image.format, tags)
    bits = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), ROWS):  # an image of the largest size takes a gigabyte at once
        rows = slice(top, top + ROWS)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = ((values[rows].astype(np.float32) - low) * np.float32(255 / (high - low))).clip(0, 255).round()
        if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
            scaled = 255 - scaled
        bits[rows] = np.where(finite[rows], scaled, 0)
    made = Image.fromarray(bits)
    sample = values.ravel()[:: max(1, values.size // 2**20)]  # enough to see that there were more levels
    if lowest < highest and (left := levels(made)) < LEAST_LEVELS and left < len(np.unique(sample)):
        notes.append(FLAT)
    return made, notes


def _ends(dtype: np.dtype[Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return what finds the least and the greatest number of a type, each with what it starts from."""
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return (np.min, limits.max), (np.max, limits.min)


def _range(lowest: float, highest: float, is_float: bool, format: str | None, tags: Any) -> tuple[float, float, list[str]]:
    """Return which values are black and white where values go from `lowest` to `highest`, and what is to be said of it."""
    low, high = (_number(tags.get(tag)) for tag in (SMIN_SAMPLE_VALUE, SMAX_SAMPLE_VALUE))
    if high is not None and high > (low or 0):
        return low or 0, high, []
    if is_float:
        for white in (1, 255):
            if -white / 510 <= lowest and highest <= white + white / 510:  # half a level beyond is rounding
                return 0, white, []
        raise ValueError(f"its floating-point pixels go from {lowest:g} to {highest:g}, expected 0 to 1 or 0 to 255: {REMEDY}")
    if lowest < 0 or highest > 65535:
        raise ValueError(f"its pixels go from {lowest:.0f} to {highest:.0f}, expected 0 to 65535: {REMEDY}")
    depth = _number(tags.get(ExifTags.Base.BitsPerSample))
    if depth and 8 < depth < 16:
        return 0, 2**depth - 1, []
    if format not in SCALED:
        for white, note in GUESSED.items():
            if highest <= white:
                return 0, white, [note] * (highest > lowest)
    return 0, 65535, []


def _number(tag: Any) -> float | None:
    """Return the one number of a TIFF tag, if that is what it holds."""
    try:
        (number,) = map(float, np.ravel(tag))
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if np.isfinite(number) else None
