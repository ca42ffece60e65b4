"""Image files: turned upright, converted to 8-bit RGB by a stated rule, found by content, refused where they are too much."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from groupmixformer.data.images import decode, image_sizes, read_image
from groupmixformer.run import open_image

ORIENTATION = 0x112
# Saved as it lies, an image looks as `upright` once its orientation is applied.
LYING = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters(mode="RGB"):
    """An image of 48 x 32 pixels whose quarters differ, so that no two orientations look alike."""
    image = Image.fromarray(np.kron([[20, 90], [160, 240]], np.ones((16, 24))).astype(np.uint8))
    return image.convert(mode)


def lying(orientation, mode="RGB"):
    turn, upright = LYING[orientation], quarters(mode)
    image = upright.transpose(turn) if turn is not None else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return image, exif


def is_upright(image):
    """Whether an image looks as `quarters`, in spite of lossy formats."""
    expected = np.asarray(quarters("L"), dtype=float)
    return image.size == (48, 32) and np.abs(np.asarray(image.convert("L"), dtype=float) - expected).mean() < 6


@pytest.mark.parametrize("orientation", LYING)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif", "mpo"])
def test_images_are_turned_upright_once(tmp_path, ending, orientation):
    path = tmp_path / f"image.{ending}"
    image, exif = lying(orientation)
    image.save(path, exif=exif)
    read = read_image(path)
    assert is_upright(read)
    assert image_sizes(path) == ((48, 32), image.size)
    assert is_upright(decode(path.read_bytes(), "bytes"))  # of a shard, of an upload
    # What was turned is not turned again: the image itself, and what is saved of it.
    assert is_upright(open_image(read)[0])
    assert is_upright(ImageOps.exif_transpose(read))
    assert is_upright(open_image(Image.open(path))[0])
    assert is_upright(open_image(Image.open(path).convert("RGB"))[0])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16", "CMYK"])
def test_every_mode_is_turned(tmp_path, mode):
    image, exif = lying(6, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / "image.tif", exif=exif)
    assert read_image(tmp_path / "image.tif").size == (48, 32)
    if mode != "CMYK":
        image.save(tmp_path / "image.png", exif=exif)
        assert read_image(tmp_path / "image.png").size == (48, 32)


def png(image, *before, after=()):
    """A PNG with chunks of metadata before its pixels or after them."""
    file = io.BytesIO()
    image.save(file, "PNG")
    content = file.getvalue()
    parts = []
    for kind, data in (*before, *after):
        chunk = io.BytesIO()
        PngImagePlugin.putchunk(chunk, kind, data)
        parts.append(chunk.getvalue())
    head, tail = content[:33], content[33:-12]
    return head + b"".join(parts[: len(before)]) + tail + b"".join(parts[len(before) :]) + content[-12:]


def test_an_orientation_is_found_wherever_programs_write_it(tmp_path):
    image, exif = lying(6)
    block = exif.tobytes()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    profile = b"Raw profile type exif\0\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"  # ImageMagick's
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    contents = {
        "late.png": png(image, after=[(b"eXIf", block[6:])]),
        "early.png": png(image, (b"eXIf", block[6:])),
        "magick.png": png(image, (b"tEXt", profile)),
        "late-magick.png": png(image, after=[(b"tEXt", profile)]),
        "xmp.png": png(image, (b"iTXt", xmp)),
        "late-xmp.png": png(image, after=[(b"iTXt", xmp)]),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    image.save(tmp_path / "xmp.jpg", xmp=packet)
    image.save(tmp_path / "xmp.webp", xmp=packet, lossless=True)
    image.save(tmp_path / "xmp.tif", tiffinfo={700: packet})
    for path in sorted(tmp_path.iterdir()):
        assert is_upright(read_image(path)), path.name
        assert image_sizes(path) == ((48, 32), (32, 48)), path.name


def test_damaged_exif_leaves_an_image_as_it_is_stored(tmp_path):
    image = quarters()
    block = lying(6)[1].tobytes()
    rng = np.random.default_rng(0)
    blocks = [b"Exif\0\0", b"Exif\0\0garbage", block[:9], block[:-7], *(b"Exif\0\0" + rng.bytes(40) for _ in range(20))]
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        blocks.append(exif.tobytes())
    for number, damaged in enumerate(blocks):
        for ending in ("jpg", "png", "webp"):
            path = tmp_path / f"{number}.{ending}"
            image.save(path, exif=damaged)
            assert is_upright(read_image(path))
            assert image_sizes(path) == ((48, 32), (48, 32))


def test_sizes_are_known_without_decoding(tmp_path, monkeypatch):
    exif = lying(6)[1]
    for ending in ("jpg", "png", "webp", "tif"):
        quarters().save(tmp_path / f"turned.{ending}", exif=exif)
        quarters().save(tmp_path / f"plain.{ending}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail(f"{image.filename} was decoded"))
    for path in sorted(tmp_path.iterdir()):
        assert image_sizes(path) == ((32, 48) if path.stem == "turned" else (48, 32), (48, 32))
    with pytest.raises(ValueError, match=r"gone\.png: no such file"):
        image_sizes(tmp_path / "gone.png")
