"""Images of real formats, types and orientations, whole and damaged: each is read as it should look, or refused in one line.

python tests/reliability/test_damaged_images.py --count 1000 --out images.json

Every attempt runs in a process of its own that may take 1.5 GB and a minute. An image that is read must be the same from its
path and from its bytes, of the size that `image_sizes` tells, and small enough when its shorter side is resized to 224 pixels;
one that was not damaged must look as it did before it was saved.
"""

import io
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import campaign
import numpy as np
import pytest
from PIL import Image

from groupmixformer.data.images import TURNS, decode, image_sizes, noted, read_image

LYING = {orientation: Image.Transpose(turn) for orientation, turn in TURNS.items()} | {  # the inverse of what makes it upright
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
COLOURS = ("L", "RGB")
# Formats, with the modes that Pillow saves and whether the result is exact.
SAVED: list[tuple[str, str, dict[str, object]]] = [
    *[("JPEG", mode, {"quality": 95}) for mode in ("L", "RGB", "CMYK", "YCbCr")],
    ("JPEG", "RGB", {"progressive": True, "quality": 95}),
    ("MPO", "RGB", {"quality": 95}),
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (True, False)],
    *[
        ("TIFF", mode, {"compression": kind})
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
        for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ],
    ("TIFF", "RGB", {"compression": "jpeg"}),
    *[("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")],
    *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    *[("PPM", mode, {}) for mode in ("1", "L", "RGB", "I", "F")],
    *[("JPEG2000", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")],
    *[("AVIF", mode, {}) for mode in ("L", "RGB", "RGBA")],
    *[("TGA", mode, {"compression": kind}) for mode in ("L", "P", "RGB", "RGBA") for kind in (None, "tga_rle")],
    *[(kind, mode, {}) for kind in ("PCX", "DIB") for mode in ("1", "L", "P", "RGB")],
    *[(kind, "RGB", {}) for kind in ("SGI", "ICO", "ICNS", "QOI", "DDS", "IM")],
]
TURNED = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF")  # formats that carry EXIF
RESIZED = ("ICO", "ICNS")  # keep other sizes
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def pattern(rng: np.random.Generator, mode: str) -> Image.Image:
    """Smooth grey that no two orientations share."""
    width, height = int(rng.integers(33, 90)), int(rng.integers(33, 90))
    ramp = np.add.outer(np.linspace(0, 90, height) ** 1.1, np.linspace(0, 70, width) ** 1.2)
    ramp = ramp / ramp.max() * 255
    return Image.fromarray((255 * (ramp > 127) if mode == "1" else ramp).astype(np.uint8))


def of_mode(image: Image.Image, mode: str, rng: np.random.Generator) -> Image.Image:
    if mode not in ("I;16", "I", "F"):
        return image.convert(mode)
    values = np.asarray(image, dtype=np.float64) / 255
    if mode == "F":
        values = values * float(rng.choice([1, 255]))
        return Image.fromarray(values.astype(np.float32))
    return Image.fromarray((values * int(rng.choice([4095, 65535]))).astype(np.uint16 if mode == "I;16" else np.int32))


def saved(rng: np.random.Generator) -> tuple[bytes, str, Image.Image | None]:
    """An image's file, the ending of its name, and how it should look."""
    kind, mode, options = SAVED[int(rng.integers(len(SAVED)))]
    upright = pattern(rng, mode)
    image, exif = upright, Image.Exif()
    if kind in TURNED and rng.random() < 0.6:
        orientation = int(rng.integers(1, 9))
        if turn := LYING.get(orientation):
            image = upright.transpose(turn)
        elif orientation == 2:
            image = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        exif[0x112] = orientation
        options = options | {"exif": exif}
    image = of_mode(image, mode, rng)
    if kind == "JPEG2000" and mode == "I;16":  # which says that white is 65535, as Pillow saves it
        image = Image.fromarray((np.asarray(image) / np.asarray(image).max() * 65535).astype(np.uint16))
    if kind == "PPM" and mode in "IF":  # which say that white is 65535, or 1
        values = np.asarray(image, dtype=np.float64) / np.asarray(image).max()
        image = Image.fromarray(values.astype(np.float32) if mode == "F" else (values * 65535).astype(np.int32))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue(), f".{kind.lower()}", None if kind in RESIZED else upright


def flipped(content: bytes, rng: np.random.Generator, among: int) -> bytes:
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    bits[rng.integers(min(len(bits), 8 * among), size=int(rng.integers(1, 20)))] ^= 1
    return np.packbits(bits).tobytes()


def edited(content: bytes, rng: np.random.Generator) -> bytes:
    """Numbers of a header replaced by extreme ones."""
    made = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        order, kind = str(rng.choice(["<", ">"])), str(rng.choice(["H", "I"]))
        number = struct.pack(order + kind, INTEGERS[int(rng.integers(len(INTEGERS)))] & (0xFFFF if kind == "H" else 0xFFFFFFFF))
        start = int(rng.integers(min(len(made), 200)))
        made[start : start + len(number)] = number
    return bytes(made)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat_png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    lines = zlib.compress(bytes(min(200_000_000, (1 + -(-width // 8)) * height)), 9)
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def flat(rng: np.random.Generator) -> tuple[bytes, str]:
    """Much from little: extreme shapes, and all that unpacks to more than it is."""
    sides = (1, 2, 40, 1000, 8000, 8001, 20000, 50000)
    width, height = (int(rng.choice(sides)) for _ in "xy")
    if width * height > 70_000_000:
        width, height = 8000, int(rng.choice([7999, 8001]))
    choice = int(rng.integers(9))
    if choice == 0:
        return flat_png(width, height), ".png"
    if choice == 1:
        bomb = zlib.compress(bytes(100_000_000), 9)
        return flat_png(64, 64, chunk(b"zTXt", b"bomb\0\0" + bomb), chunk(b"iCCP", b"bomb\0\0" + bomb)), ".png"
    if choice == 2:  # a head alone
        heads = {
            ".bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0),
            ".gif": b"GIF89a" + struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, 0, 0, 0) + b",",
            ".ppm": f"P6 {width} {height} 255\n".encode(),
            ".qoi": b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + b"\xfd" * 100_000,
            ".tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, width & 0xFFFF, height & 0xFFFF, 24, 0)
            + b"\xff" * 999,
        }
        ending = str(rng.choice(list(heads)))
        return heads[ending], ending
    file = io.BytesIO()
    kind, mode, options = [
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", "F", {"compression": "tiff_lzw"}),
        ("TIFF", "I;16", {"compression": "tiff_adobe_deflate"}),
        ("GIF", "P", {}),
        ("JPEG", "L", {}),
        ("JPEG2000", "L", {}),
    ][choice - 3]
    if kind == "JPEG2000":
        width, height = width % 3000 + 1, height % 3000 + 1  # its encoder is slow
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue(), f".{kind.lower()}"


def special(folder: Path, rng: np.random.Generator) -> Path:
    """What is named as an image and is no file of one."""
    path = folder / "x.jpg"
    kind = int(rng.integers(5))
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind < 4:
        path.symlink_to(["/dev/zero", folder / "gone.jpg"][kind - 2])
    else:
        path.write_bytes(rng.bytes(int(rng.integers(3000))))
    return path


def look(path: Path, expected: Image.Image | None, content: bytes | None) -> str:
    """Read an image in each way."""
    with noted() as notes:
        image = read_image(path)
    if image.mode != "RGB" or image_sizes(path)[0] != image.size:
        return f"is {image.mode} of {image.size} and should be of {image_sizes(path)[0]}"
    if content is not None and decode(content, path.name).tobytes() != image.tobytes():
        return "differs between file and bytes"
    ratio = 224 / min(image.size)
    if max(image.size) * ratio > 224 * 51:
        return f"is {image.size}, too long"
    if expected is not None:
        difference = np.abs(np.asarray(image.convert("L"), dtype=float) - np.asarray(expected, dtype=float)).mean()
        if image.size != expected.size or difference > 6:
            return f"looks different by {difference:.0f} of 255"
    return "noted" if notes else "right"


def attempt(rng: np.random.Generator) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), rng.random()
        expected: Image.Image | None = None
        content: bytes | None = None
        if draw < 0.05:
            path = special(folder, rng)
        else:
            if draw < 0.2:
                content, ending = flat(rng)
            else:
                content, ending, expected = saved(rng)
                damages: list[Callable[[bytes], bytes]] = [
                    lambda whole: flipped(whole, rng, len(whole)),
                    lambda whole: flipped(whole, rng, 100),
                    lambda whole: whole[: int(rng.integers(len(whole)))],
                    lambda whole: edited(whole, rng),
                    lambda whole: whole[: (at := int(rng.integers(len(whole))))] + rng.bytes(50) + whole[at:],
                ]
                if draw < 0.75:
                    content, expected = damages[int(rng.integers(len(damages)))](content), None
            path = folder / f"image{ending}"
            path.write_bytes(content)
        outcome = campaign.apart(lambda: look(path, expected, content))
        return outcome if expected is None or outcome != "refused" else "refused, but is whole"


CAMPAIGNS = {"images": (attempt, 1000)}


@pytest.mark.slow
def test_damaged_images():
    logging.disable(logging.NOTSET)
    result = campaign.run(attempt, 25)
    assert not result["failures"]
    assert result["counts"]["right"] and result["counts"]["refused"]


if __name__ == "__main__":
    campaign.main(CAMPAIGNS)
