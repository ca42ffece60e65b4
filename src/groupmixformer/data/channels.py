"""Images of other channels than red, green and blue: grey, depth, infrared; from image files, TIFF and numpy's arrays.

docs/data.md states the rules: which axis of an array is that of its channels, and what its numbers become.
"""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from .images import (
    ARRAY_SUFFIXES,
    Size,
    check_size,
    decode,
    image_sizes,
    limit_of,
    note,
    noted,
    opened_image,
    orientation_of,
    to_rgb,
)
from .levels import FLAT, LEAST_LEVELS, WHITE_IS_ZERO, is_deep, levels

TIFF_SUFFIXES = (".tif", ".tiff")
EXTRA_SAMPLES = 338  # tag of TIFF, which Pillow has no name for: 0 where a channel is no alpha
NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK"
WHITE = {"uint8": 255, "uint16": 65535}  # by which numbers of these types are divided; others are taken as they are
SAMPLED = 2**20  # pixels from which the percentiles of a display are taken


def stretched(values: NDArray[Any], display: Sequence[int] = ()) -> NDArray[np.uint8]:
    """Return channels of an image (H, W, C) as colours (H, W, 3), black at their 2nd percentile and white at their 98th.

    Args:
        values: Of any type.
        display: The channel that is shown in grey, or the three that are red, green and blue; by default the first three, or
            the first of fewer.
    """
    chosen = values[..., list(display or range(3 if values.shape[2] > 2 else 1))].astype(np.float32)
    step = max(1, math.isqrt(chosen.shape[0] * chosen.shape[1] // SAMPLED))
    low, high = np.percentile(chosen[::step, ::step], (2, 98), axis=(0, 1))
    share = (chosen - low) / np.where(high > low, high - low, 1)
    return (255 * share.clip(0, 1)).round().astype(np.uint8).repeat(3 // chosen.shape[2], axis=2)


@dataclass(frozen=True)
class ChannelImage:
    """An image with any channels.

    Attributes:
        pixels: (H, W, C), as the file holds them.
        display: As `stretched` takes it.
    """

    pixels: NDArray[Any]
    display: tuple[int, ...] = ()

    @property
    def height(self) -> int:
        """In pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.pixels.shape[1]

    @property
    def size(self) -> Size:
        """Width and height."""
        return self.width, self.height

    @property
    def tensor(self) -> Tensor:
        """(C, H, W), float32: numbers of 8 and 16 bits without a sign from 0 to 1, others as they are."""
        values = self.pixels.astype(np.float32) / np.float32(WHITE.get(self.pixels.dtype.name, 1))
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


AnyImage = Image.Image | ChannelImage


def to_npy(image: ChannelImage) -> bytes:
    """Return an image as the contents of a .npy file (C, H, W)."""
    buffer = io.BytesIO()
    np.save(buffer, image.pixels.transpose(2, 0, 1))
    return buffer.getvalue()


def in_colour(image: AnyImage) -> Image.Image:
    """Return an image as people look at it (RGB)."""
    return image if isinstance(image, Image.Image) else Image.fromarray(stretched(image.pixels, image.display))


def channels_of(image: AnyImage) -> int:
    """Return the number of channels; 3 of one that is read as colour."""
    return 3 if isinstance(image, Image.Image) else image.pixels.shape[2]


@dataclass(frozen=True)
class Channels:
    """Which channels images have, and how files and arrays are read.

    Attributes:
        count: Channels that a network takes. With 3, image files are read as colour; with 0, files are taken as they are.
        first: Whether channels are the first axis of an array, or the last (false); none for the axis of their number.
        display: As `stretched` takes it.
    """

    count: int = 3
    first: bool | None = None
    display: tuple[int, ...] = ()

    @classmethod
    def stored(cls, config: Mapping[str, Any], count: int) -> "Channels":
        """Return what is stored with a network."""
        return cls(count, config.get("channels_first"), tuple(config.get("display_channels") or ()))

    def read(self, path: Path, least_side: int | None = None) -> AnyImage:
        """Read an image file; ValueError as `decode` does."""
        return self.decode(path, str(path), least_side=least_side)

    def decode(self, file: bytes | Path, name: str, most_pixels: int | None = None, least_side: int | None = None) -> AnyImage:
        """Read an image: PIL's in RGB, or with other channels.

        Args:
            file: Its bytes or its path.
            name: What to call it in an error.
            most_pixels: For an upload, as `groupmixformer.data.images.decode` takes it.
            least_side: The same; for colour alone.

        Raises:
            ValueError: If it cannot be read, is over a limit, has other channels, or numbers that are not finite.
        """
        suffix = Path(name).suffix.lower()
        if suffix in ARRAY_SUFFIXES or (isinstance(file, bytes) and file.startswith(NPY_MAGIC)):
            return self._made(self._last(_read_array(file, name, most_pixels), name), name)
        if suffix in TIFF_SUFFIXES and isinstance(file, Path) and self._takes_all_of(file):
            return self._made(self._read_tiff(file), name)
        if self.count in (0, 3):
            return decode(file, name, most_pixels, least_side)
        with opened_image(file, name, most_pixels) as image, noted() if most_pixels else nullcontext():
            pixels = self._bands(image, name)
        return self._made(pixels, name)

    def convert(self, image: Image.Image, name: str = "") -> AnyImage:
        """Take an image of PIL's for one with these channels; ValueError if it has others."""
        return to_rgb(image, name) if self.count in (0, 3) else self._made(self._bands(image, name), name)

    def of_array(self, array: NDArray[Any], name: str = "array") -> ChannelImage:
        """Take an array (H, W), (H, W, C) or (C, H, W) for an image with these channels; ValueError if it has others."""
        return self._made(self._last(array, name), name)

    def sizes(self, path: Path) -> tuple[Size, Size]:
        """Return what `groupmixformer.data.images.image_sizes` does, of any file that `read` takes."""
        if path.suffix.lower() in ARRAY_SUFFIXES:
            pixels = self._last(_read_array(path, str(path), header=True), str(path))
            return (pixels.shape[1], pixels.shape[0]), (pixels.shape[1], pixels.shape[0])
        if path.suffix.lower() in TIFF_SUFFIXES and self._takes_all_of(path):
            pixels = self._read_tiff(path, header=True)
            return (pixels.shape[1], pixels.shape[0]), (pixels.shape[1], pixels.shape[0])
        return image_sizes(path)

    def blank(self) -> AnyImage:
        """Return a black image of 64 x 64 pixels."""
        return Image.new("RGB", (64, 64)) if self.count in (0, 3) else self._made(np.zeros((64, 64, self.count), np.uint8), "")

    def shown(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
        """Return a normalised image (C, H, W) of other channels as colours (H, W, 3)."""
        values = images.permute(1, 2, 0).cpu() * torch.tensor(std) + torch.tensor(mean)
        return stretched(values.numpy(), self.display)

    def check(self, image: AnyImage, name: str = "image") -> None:
        """Refuse an image with other channels."""
        if self.count and (found := channels_of(image)) != self.count:
            hint = f"train with --in-chans {found}, or convert it"
            raise ValueError(f"{name}: has {found} channel{'s' * (found != 1)}, expected {self.count}: {hint}")

    def _made(self, pixels: NDArray[Any], name: str) -> ChannelImage:
        if pixels.dtype.kind not in "buif":
            raise ValueError(f"{name}: holds {pixels.dtype}, expected numbers: bool, whole or floating-point")
        image = ChannelImage(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), self.display)
        self.check(image, name)
        try:
            check_size(image.size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if pixels.dtype.kind == "f":
            with np.errstate(over="ignore"):
                wrong = ~np.isfinite(pixels.astype(np.float32)).reshape(-1, pixels.shape[2])
            if wrong.any():
                where = ", ".join(f"{count:,} of channel {i}" for i, count in enumerate(wrong.sum(axis=0).tolist()) if count)
                raise ValueError(f"{name}: NaN, infinite or beyond float32 are {where}: write numbers in their place")
        return image

    def _last(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        """Return an array with its channels as the last axis."""
        if array.ndim not in (2, 3) or not array.size:
            raise ValueError(f"{name}: has the shape {array.shape}, expected (H, W), (H, W, C) or (C, H, W)")
        if array.ndim == 2:
            return array[..., None]
        ends = (array.shape[0], array.shape[2])
        fits = [end == (self.count or min(ends)) for end in ends]
        first = self.first if self.first is not None else fits[0]
        if self.first is None and fits[0] == fits[1]:
            if fits[0]:
                raise ValueError(f"{name}: has the shape {array.shape}, whose first or last axis may be that of its channels: "
                                 "say with channels_first which it is")  # fmt: skip
            expected = f"({self.count}, H, W) or (H, W, {self.count})"
            raise ValueError(f"{name}: has the shape {array.shape}, expected {expected}, for in_chans {self.count}")
        return array.transpose(1, 2, 0) if first else array

    def _takes_all_of(self, path: Path) -> bool:
        """Whether a TIFF is to be read with all of its channels, and not by Pillow."""
        try:
            with opened_image(path, str(path)) as image:
                tags: Any = getattr(image, "tag_v2", {})
                samples, extra = tags.get(ExifTags.Base.SamplesPerPixel, 1), tags.get(EXTRA_SAMPLES, ())
                pages = getattr(image, "n_frames", 1) if samples == 1 else 1
                alpha = 0 not in np.ravel(extra)
                if self.count == 3:
                    return False
                if self.count == 0:
                    return bool(samples > 4 or (samples == 4 and not alpha and image.mode != "CMYK") or pages > 1)
                return samples > 1 or (pages > 1 and self.count > 1) or is_deep(image) or image.mode not in ("1", "L")
        except ValueError:  # Pillow knows no such TIFF
            return path.is_file() and (self.count not in (0, 3) or find_spec("tifffile") is not None)

    def _read_tiff(self, path: Path, header: bool = False) -> NDArray[Any]:
        """Return the first image of a TIFF (H, W, C), upright; with `header`, one of the same shape that holds nothing."""
        import tifffile

        try:
            with tifffile.TiffFile(path) as file:
                series, page = file.series[0], file.pages.first
                _check_numbers(series.shape, str(path))
                pixels: NDArray[Any] = np.broadcast_to(np.uint8(0), series.shape)
                axes, turn = series.axes, page.tags.get(ExifTags.Base.Orientation)
                if not header:
                    pixels = np.asarray(series.asarray(maxworkers=1))
                    if page.photometric == WHITE_IS_ZERO and pixels.dtype.kind == "u":
                        pixels = np.iinfo(pixels.dtype).max - pixels
        except Exception as error:  # what it raises is its own, and damage makes it raise anything
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: not a readable image: {text}") from error
        axis = next((axes.index(name) for name in "SC" if name in axes), None)
        pixels = np.moveaxis(pixels, axis, -1) if pixels.ndim == 3 and axis is not None else self._last(pixels, str(path))
        return _upright(pixels, turn.value if turn else 1)

    def _bands(self, image: Image.Image, name: str) -> NDArray[Any]:
        """Return the pixels of an image of PIL's (H, W, C), upright: palettes and ink as colour, alpha where it is wanted."""
        deep, size = is_deep(image), image.size
        image.load()
        if image.size != size:
            check_size(image.size)
        mode = image.mode
        if mode[0] in "IF":
            pixels = np.asarray(image)  # of PNG and PGM, 16 bits may come as 32
            pixels = (pixels.astype(np.uint16) if mode == "I" and image.format in ("PNG", "PPM") else pixels)[..., None]
            return _upright(pixels, orientation_of(image))
        if deep and 1 < levels(image) < LEAST_LEVELS:
            note(name, [FLAT])
        plain = {"1": "L", "La": "LA", "RGBa": "RGBA"}.get(mode, mode if mode in ("L", "LA", "RGB", "RGBA") else "RGB")
        pixels = np.asarray(image if plain == mode else image.convert(plain))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., :-1] if plain.endswith("A") and pixels.shape[2] == self.count + 1 else pixels
        return _upright(pixels, orientation_of(image))


ANY, RGB = Channels(0), Channels()


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn pixels (H, W, C) by an orientation of EXIF."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def _check_numbers(shape: Sequence[int], name: str, most_pixels: int | None = None) -> None:
    """Refuse an array that is too large to be read."""
    most = 3 * (most_pixels or limit_of("GROUPMIXFORMER_MAX_PIXELS"))
    if math.prod(shape) > most:
        raised = "" if most_pixels else ", or a higher GROUPMIXFORMER_MAX_PIXELS"
        raise ValueError(f"{name}: {' x '.join(map(str, shape))} numbers, expected at most {most / 1e6:.3g} million{raised}")


def _read_array(file: bytes | Path, name: str, most_pixels: int | None = None, header: bool = False) -> NDArray[Any]:
    """Read a .npy file, or the one array of a .npz file; with `header`, an array of the same shape that holds nothing."""
    try:
        with file.open("rb") if isinstance(file, Path) else io.BytesIO(file) as opened:
            if opened.read(2) != ZIP_MAGIC:
                opened.seek(0)
                return _read_npy(opened, name, most_pixels, header)
            with zipfile.ZipFile(opened) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise ValueError(f"holds {len(names)} arrays ({', '.join(names[:3])}), expected one")
                with archive.open(names[0]) as member:
                    return _read_npy(member, name, most_pixels, header)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except Exception as error:  # of numpy's parser, of zip
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix(f"{name}: ")
        raise ValueError(f"{name}: not a readable array: {text}") from error


def _read_npy(file: IO[bytes], name: str, most_pixels: int | None, header: bool) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format, expected 1 or 2")
    shape, _, dtype = readers[version](file)
    _check_numbers(shape, name, most_pixels)
    if dtype.kind not in "buif":
        what = "pickled Python objects, which are never loaded" if dtype.hasobject else str(dtype)
        raise ValueError(f"it holds {what}, expected numbers: bool, whole or floating-point")
    if header:
        return np.broadcast_to(np.zeros((), dtype), shape)
    file.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array
