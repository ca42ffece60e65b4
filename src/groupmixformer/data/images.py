"""Images: found by paths and globs, read upright, and converted to RGB from any of Pillow's modes."""

import io
import logging
import math
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, UnidentifiedImageError

from .levels import FLAT, LEAST_LEVELS, is_deep, levels, to_8_bits

# Files that are taken for images by their endings; those of other endings are opened to see whether they are some.
IMAGE_SUFFIXES = {
    *(
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
    ),
    *(".tga", ".tif", ".tiff", ".webp"),
}
# Arrays, which are images in folders that hold no other ones.
ARRAY_SUFFIXES = {".npy", ".npz"}
# Usual companions of images, which are not opened.
OTHER_SUFFIXES = {
    *(".cls", ".csv", ".db", ".doc", ".docx", ".gz", ".html", ".ini", ".json", ".log", ".md", ".npy", ".npz", ".pdf", ".pt"),
    *(".pth", ".py", ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip"),
}
# What operating systems and tools leave, besides names that begin with a dot; lower case.
LEFTOVERS = {"$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found", "thumbs.db"}
HIDDEN = "hidden or of the system"

# Formats of Pillow that are never read: it starts another program for them (EPS: Ghostscript) or asks the system (WMF), leaves
# them to other packages (BUFR, GRIB, HDF5, MPEG), takes an image of any format out of them (FPX, IPTC, MIC), or unpacks them
# without a limit (FITS). Those that it cannot tell by their first bytes, such as TGA, are read under their own endings alone.
UNREAD_FORMATS = {"BUFR", "EPS", "FITS", "FPX", "GRIB", "HDF5", "IPTC", "MIC", "MPEG", "WMF"}
# Uploads, from people who are not trusted.
UPLOAD_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UPLOAD_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
# Limits, because a small file may hold an image that takes all memory, and because an extreme one becomes huge when its shorter
# side is resized to the model's input size.
LIMITS = {"GROUPMIXFORMER_MAX_PIXELS": 64_000_000, "GROUPMIXFORMER_MAX_RATIO": 50}

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


# Names of images with what is to be said of their conversion, where someone collects them.
_NOTED: ContextVar[list[tuple[str, str]] | None] = ContextVar("_NOTED", default=None)
LOGGER = logging.getLogger("groupmixformer")


@contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Collect what is to be said of images that are read: pairs of a name and a text; without it, each is logged."""
    lines: list[tuple[str, str]] = []
    token = _NOTED.set(lines)
    try:
        yield lines
    finally:
        _NOTED.reset(token)


def note(name: str, texts: Iterable[str]) -> None:
    """Say something of an image, to whoever collects it, or to the log."""
    for text in texts:
        lines = _NOTED.get()
        if lines is None:
            LOGGER.warning("%s: %s", name or "image", text)
        else:
            lines.append((name, text))


def is_leftover(name: str) -> bool:
    """Whether a file or a folder of this name is what operating systems and tools leave."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def list_images(folder: Path, left_out: Counter[str]) -> list[Path]:
    """List the images below a folder, in order of their paths.

    Args:
        folder: Links in it are followed, but no folder is entered twice. Arrays count where there are no other images.
        left_out: Files that are no images are counted here by their endings, those of the system under `HIDDEN`.

    Raises:
        OSError: If a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    arrays: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        about = Path(place).stat()
        if (about.st_dev, about.st_ino) in entered:
            folders.clear()
            continue
        entered.add((about.st_dev, about.st_ino))
        left_out[HIDDEN] += sum(map(is_leftover, (*folders, *files)))
        folders[:] = [name for name in folders if not is_leftover(name)]
        for path in (Path(place, name) for name in files if not is_leftover(name)):
            if is_image(path, path.suffix.lower()):
                found.append(path)
            elif path.suffix.lower() in ARRAY_SUFFIXES:
                arrays.append(path)
            else:
                left_out[path.suffix.lower() or "without ending"] += 1
    left_out += Counter(path.suffix.lower() for path in arrays if found)  # and drops zeros
    return sorted(found or arrays)


def is_image(file: Path | bytes, suffix: str) -> bool:
    """Whether a file, or what is in it, is an image: by the ending of its name where that tells, else by its content."""
    if suffix in IMAGE_SUFFIXES or suffix in OTHER_SUFFIXES:
        return suffix in IMAGE_SUFFIXES
    try:
        with opened_image(file, f"image{suffix}"):
            return True
    except ValueError:
        return False


def describe_left_out(left_out: Counter[str]) -> list[str]:
    """Return a line about the files that were left out, nothing if there are none."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0])))
    hint = " (pillow-heif reads .heic)" if {".heic", ".heif"} & set(left_out) and not find_spec("pillow_heif") else ""
    return [f"files left out: {kinds}{hint}"] if left_out else []


def find_images(paths: Iterable[str], left_out: Counter[str] | None = None) -> list[Path]:
    """Expand files, folders (searched through) and globs into image files, in order and without repeats.

    A path that matches nothing is returned as it is, so that reading it raises an error.

    Args:
        paths: What a user gave. A file is taken whatever it is.
        left_out: Counts what is left out of folders and globs, as `list_images` does.

    Raises:
        OSError: If a folder cannot be listed.
    """
    found: dict[Path, None] = {}
    left_out = Counter() if left_out is None else left_out
    for given in paths:
        matches = [Path(given)]
        if any(char in given for char in "*?[") and not matches[0].exists():
            anchor = Path(matches[0].anchor)
            globbed = sorted(anchor.glob(str(matches[0].relative_to(anchor))))
            left_out[HIDDEN] += (hidden := sum(is_leftover(path.name) for path in globbed))
            matches = [path for path in globbed if not is_leftover(path.name)] or ([] if hidden else matches)
        for path in matches:
            found.update(dict.fromkeys((list_images(path, left_out) or [path]) if path.is_dir() else [path]))
    left_out += Counter()
    return list(found)


def orientation_of(image: Image.Image) -> int:
    """Return the orientation in EXIF or XMP; 1, which is upright, where there is none or it is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow parses EXIF without checks: any error means that it is damaged
        return 1
    return orientation if orientation in TURNS else 1


def to_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """Turn an image upright and convert it from any mode to 8-bit RGB: the first frame of an animation; alpha is dropped.

    What is returned has no EXIF any more, so it is not turned again. Doubts about its brightness are noted under its name.

    Raises:
        ValueError: If the range of its pixels cannot be told.
    """
    deep = is_deep(image)
    image.load()
    return _to_rgb(image.copy() if image.mode == "RGB" else image, name, deep)  # the one that was given stays as it is


def _to_rgb(image: Image.Image, name: str, deep: bool) -> Image.Image:
    """Convert an image that is loaded, and may be changed."""
    turn = TURNS.get(orientation_of(image))
    if deep and image.mode[0] in "IF":
        image, texts = to_8_bits(image)
        note(name, texts)
    elif deep and 1 < levels(image) < LEAST_LEVELS:
        note(name, [FLAT])
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image if image.mode == "RGB" else image.convert("RGB")  # without a copy, which takes a tenth of decoding
    for key in ORIENTED_BY:
        image.info.pop(key, None)
    return image


@cache
def _formats() -> tuple[list[str], dict[str, str]]:
    """Return the formats of Pillow that are known by their first bytes, and the others by the endings of their files."""
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    read = [name for name in Image.ID if name not in UNREAD_FORMATS]
    signed = [name for name in read if Image.OPEN[name][1] is not None]
    return signed, {ending: name for ending, name in Image.registered_extensions().items() if name in set(read) - set(signed)}


def limit_of(variable: str) -> int:
    """Return a limit: the environment's, or ours."""
    given = os.environ.get(variable)
    if given is None:
        return LIMITS[variable]
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{variable} is {given!r}, expected a whole number from 1")
    return int(given)


def check_size(size: Size, most_pixels: int | None = None) -> None:
    """Refuse an image that is too large or too long, where it has the limit of an upload, or that of the environment.

    Raises:
        ValueError: If it is.
    """
    pixels, ratio = most_pixels or limit_of("GROUPMIXFORMER_MAX_PIXELS"), limit_of("GROUPMIXFORMER_MAX_RATIO")
    if math.prod(size) > pixels or max(size) > ratio * min(size):
        limits = f"at most {pixels / 1e6:.3g} million and no side over {ratio} times the other"
        raised = "" if most_pixels else f", or a higher {' or '.join(LIMITS)}"
        raise ValueError(f"{size[0]} x {size[1]} pixels, expected {limits}{raised}")


@contextmanager
def opened_image(file: IO[bytes] | bytes | Path, name: str, most_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image whose pixels are not decoded yet; every error, also while it is used, becomes a ValueError of one line."""
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # of sizes below Pillow's limit, of damaged metadata
            if isinstance(file, Path):  # opened here: Pillow would map it, which scrambles a TIFF that lies on its side
                if not file.is_file() and file.exists():
                    raise ValueError("a folder" if file.is_dir() else "neither a file nor a folder")  # reading might never end
                file = stack.enter_context(file.open("rb"))
            opened = io.BytesIO(file) if isinstance(file, bytes) else file
            if most_pixels:
                formats = UPLOAD_FORMATS
            else:
                signed, others = _formats()
                suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a third of Path's time
                formats = [*signed, others[suffix]] if suffix in others else signed
                if limit_of("GROUPMIXFORMER_MAX_PIXELS") > LIMITS["GROUPMIXFORMER_MAX_PIXELS"]:
                    Image.MAX_IMAGE_PIXELS = None  # whoever raised ours means Pillow's too
            with Image.open(opened, formats=formats) as image:
                check_size(image.size, most_pixels)
                yield image
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except UnidentifiedImageError as error:
        heif = Path(name).suffix.lower() in (".heic", ".heif") and not find_spec("pillow_heif")
        hint = ": pip install pillow-heif" if heif else ""
        if name.lower().endswith((".tif", ".tiff")) and not find_spec("tifffile"):
            hint = ": pip install 'groupmixformer[tiff]' reads more kinds of TIFF"
        raise ValueError(f"{name}: not a readable image: no known format{hint}") from error
    except MemoryError as error:
        raise ValueError(f"{name}: not a readable image: it takes more memory than there is") from error
    except Exception as error:  # Pillow's plugins trust what they parse: damage makes them raise anything
        text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise ValueError(f"{name}: not a readable image: {text.splitlines()[0]}") from error


def decode(
    file: IO[bytes] | bytes | Path, name: str, most_pixels: int | None = None, least_side: int | None = None
) -> Image.Image:
    """Read an image, upright, as RGB.

    Args:
        file: An open file, its bytes or its path.
        name: What to call it in an error; its ending tells formats that have no signature.
        most_pixels: For an upload: limit of its pixels, in place of the environment's. Its formats are then those of
            `UPLOAD_FORMATS`, and nothing is noted.
        least_side: A JPEG may be read, which is quicker, at a half, a quarter or an eighth of its size, but not below this.

    Raises:
        ValueError: If it cannot be read, is truncated, or is over a limit.
    """
    with opened_image(file, name, most_pixels) as image, noted() if most_pixels else nullcontext():
        if least_side:
            image.draft(image.mode, (least_side, least_side))
        if (samples := getattr(image, "tag_v2", {}).get(ExifTags.Base.SamplesPerPixel, 1)) > 4:
            raise ValueError(f"it has {samples} channels, expected 3 at most, and alpha: --in-chans {samples} reads them all")
        deep, size = is_deep(image), image.size
        image.load()  # turns a TIFF, and reads what follows the pixels of a PNG
        if image.size != size:  # an icon holds an image, which may be larger than it says
            check_size(image.size, most_pixels)
        return _to_rgb(image, name, deep)


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
    with opened_image(path, str(path)) as image:
        stored = image.size
        if tags := getattr(image, "tag_v2", None):  # of a TIFF, whose size Pillow gives upright
            stored = int(tags[ExifTags.Base.ImageWidth]), int(tags[ExifTags.Base.ImageLength])
        notes = _orientations_of_png(path) if image.format == "PNG" else 1  # none saves decoding the pixels that one may follow
        if notes > 1:
            image.load()  # Pillow goes by the last
        on_its_side = notes > 0 and orientation_of(image) >= 5
        return (stored[::-1] if on_its_side else stored), stored


def _orientations_of_png(path: Path) -> int:
    """Return how often a PNG holds EXIF or XMP, before or after its pixels."""
    found = 0
    keywords = tuple(name.encode() for name in ORIENTED_BY[1:3])
    with path.open("rb") as file:
        file.seek(8)  # behind the signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            text = file.read(min(length, 21))
            if kind == b"eXIf" or text.startswith(keywords):
                found += 1
            file.seek(length - len(text) + 4, 1)  # and the checksum
    return found
