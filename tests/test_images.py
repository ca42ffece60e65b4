"""Image files: turned upright, converted to 8-bit RGB by a stated rule, found by content, refused where they are too much."""

import io
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from groupmixformer.data.images import (
    UNREAD_FORMATS,
    decode,
    describe_left_out,
    find_images,
    image_sizes,
    list_images,
    noted,
    read_image,
)
from groupmixformer.data.levels import FLAT, GUESSED
from groupmixformer.data.samples import Doubts, note_problems
from groupmixformer.data.shards import write_shards
from groupmixformer.data.streaming import open_stream
from groupmixformer.run import open_image
from groupmixformer.tasks.classification.data import collate_classification, open_images

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


def test_of_two_orientations_the_last_counts_everywhere(tmp_path):
    image, exif = lying(6)
    block, nothing = exif.tobytes()[6:], Image.Exif().tobytes()[6:]
    for name, first, last, size in (("a.png", nothing, block, (48, 32)), ("b.png", block, nothing, (32, 48))):
        (tmp_path / name).write_bytes(png(image, (b"eXIf", first), after=[(b"eXIf", last)]))
        assert read_image(tmp_path / name).size == size
        assert image_sizes(tmp_path / name) == (size, (32, 48))


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


# Ranges: 8 bits from other types. RAMP has 256 levels, so that each expected value is exact.
RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


def tiff(values, dtype, **tags):
    file = io.BytesIO()
    Image.fromarray(np.asarray(values).astype(dtype)).save(
        file, "TIFF", tiffinfo={int(tag[1:]): value for tag, value in tags.items()}
    )
    return file.getvalue()


def converted(content, name="x.tif"):
    """Grey values that an image is read as, and what is noted of it."""
    with noted() as notes:
        image = decode(content, name)
    pixels = np.asarray(image).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0], [text for _, text in notes]


@pytest.mark.parametrize(
    ("values", "dtype", "tags", "expected", "notes"),
    [
        (RAMP / 255, np.float32, {}, RAMP, []),
        (RAMP, np.float32, {}, RAMP, []),
        (RAMP / 255 * 1.001 - 0.0005, np.float32, {}, RAMP, []),  # rounding beyond 0 and 1
        (RAMP * 10 - 300, np.float32, {"t340": -300.0, "t341": 2250.0}, RAMP, []),
        (RAMP * 10, np.float32, {"t341": 2550.0}, RAMP, []),
        (RAMP * 257, np.uint16, {}, RAMP, []),
        (RAMP * 16, np.uint16, {"t341": 4080}, RAMP, []),
        (RAMP * 16, np.uint16, {"t340": 0, "t341": 65280}, RAMP / 16, [FLAT]),  # stated, so not guessed
        (RAMP * 4095 / 255, np.uint16, {}, RAMP, [GUESSED[4095]]),
        (RAMP, np.uint16, {}, RAMP, [GUESSED[255]]),
        (RAMP * 0, np.uint16, {}, RAMP * 0, []),  # black in any range
        (RAMP * 257, np.int32, {}, RAMP, []),
        (RAMP, np.int32, {}, RAMP, [GUESSED[255]]),
        (RAMP * 1000, np.int32, {"t341": 255000.0}, RAMP, []),
        (RAMP * 257, np.uint16, {"t262": 0}, 255 - RAMP, []),  # white is zero
        (RAMP / 255, np.float32, {"t262": 0}, 255 - RAMP, []),
        (RAMP % 4 + 200, np.float32, {}, RAMP % 4 + 200, []),  # few levels, none of them lost
        (RAMP / 255 * 9, np.float32, {}, (RAMP / 255 * 9).round(), [FLAT]),
    ],
)
def test_the_range_goes_by_type_metadata_and_a_rule(values, dtype, tags, expected, notes):
    found, said = converted(tiff(values, dtype, **tags))
    assert np.abs(found - expected).max() <= 0.51
    assert said == notes


def test_pixels_that_are_not_finite_are_black():
    for bad in (np.nan, np.inf, -np.inf):
        values = np.where(RAMP == 77, bad, RAMP / 255)
        found, said = converted(tiff(values, np.float32))
        assert (found == np.where(RAMP == 77, 0, RAMP)).all() and said == []
    with pytest.raises(ValueError, match="no pixel is a finite number"):
        decode(tiff(np.full((4, 4), np.nan), np.float32), "x.tif")


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        (RAMP * 4 - 1, np.float32, "from -1 to 1019, expected 0 to 1 or 0 to 255: rescale them, or store their range"),
        (RAMP / 128 - 1, np.float32, "from -1 to 0.992188, expected 0 to 1"),
        (RAMP * 1000, np.int32, "from 0 to 255000, expected 0 to 65535"),
        (RAMP - 9, np.int32, "from -9 to 246, expected 0 to 65535"),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(values, dtype, words):
    with pytest.raises(ValueError, match=rf"^x\.tif: not a readable image: its .*{words}") as error:
        decode(tiff(values, dtype), "x.tif")
    assert "\n" not in str(error.value)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(values):
    """A PNG of 16-bit colours, which Pillow does not write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def test_other_files_of_more_than_8_bits():
    pgm = b"P5 16 16 4095\n" + (RAMP * 4095 / 255).round().astype(">u2").tobytes()
    assert np.abs(converted(pgm, "x.pgm")[0] - RAMP).max() <= 1  # a PGM says which number is white
    dark = b"P5 16 16 65535\n" + (RAMP * 16).astype(">u2").tobytes()
    found, said = converted(dark, "x.pgm")
    assert found.max() == 16 and said == [FLAT]  # so this one is dark
    pfm = b"Pf\n16 16\n-1.0\n" + (RAMP / 255).astype("<f4")[::-1].tobytes()
    assert (converted(pfm, "x.pfm")[0] == RAMP).all()
    colours = np.repeat(RAMP[..., None] * 257, 3, axis=2)
    assert (converted(deep_png(colours), "x.png")[0] == RAMP).all()
    assert converted(deep_png(colours // 16), "x.png")[1] == [FLAT]  # Pillow keeps the upper 8 bits of 16
    file = io.BytesIO()
    Image.fromarray((RAMP * 16).astype(np.uint16)).save(file, "PNG")
    assert converted(file.getvalue(), "x.png")[1] == [GUESSED[4095]]
    file = io.BytesIO()
    Image.fromarray(RAMP > 100).save(file, "TIFF")
    assert (converted(file.getvalue())[0] == 255 * (RAMP > 100)).all()


def test_doubts_are_said_once_and_counted(caplog):
    doubts = Doubts()
    for number in range(25):
        notes = note_problems([(f"{number}.tif", GUESSED[4095]), *([("0.tif", FLAT)] if number == 3 else [])])
        assert doubts.take([*notes, "gone.png: no such file"]) == ["gone.png: no such file"]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"0.tif: {GUESSED[4095]}", f"0.tif: {FLAT}", f"10 images (9.tif, ...): {GUESSED[4095]}"]


# Which files are images


def test_leftovers_are_neither_classes_nor_images(tmp_path, write_digits):
    write_digits(tmp_path / "clean", ("zero", "one"), 3, 2)
    write_digits(tmp_path / "photos", ("zero", "one"), 3, 2)
    for split in ("train", "val"):
        folder = tmp_path / "photos" / split
        for place in (folder / "__MACOSX", folder / "one" / "@eaDir", folder / ".thumbnails", folder / "$RECYCLE.BIN"):
            place.mkdir()
            quarters().save(place / "x.png")
        for name in (".DS_Store", "Thumbs.db", "one/Thumbs.db", "one/desktop.ini", "one/._0.png", "one/.hidden.jpg"):
            (folder / name).write_bytes(b"left")
        (folder / "one" / "notes.txt").write_text("text")
        (folder / "one" / "page").write_bytes(b"text")
        (folder / "readme.md").write_text("text")
    images = open_images(str(tmp_path / "photos"))
    clean = open_images(str(tmp_path / "clean"))
    assert images.class_names == clean.class_names == ["one", "zero"]
    for found, expected in ((images.train_source, clean.train_source), (images.held_out_source, clean.held_out_source)):
        assert [path.removeprefix(f"{tmp_path}/photos") for path, _ in found.samples] == [
            path.removeprefix(f"{tmp_path}/clean") for path, _ in expected.samples
        ]
        assert found.notes == [
            "files left out: 10 hidden or of the system, 1 .txt, 1 without ending",
            "left out beside the folders of the classes: readme.md",
        ]
    samples = images.train(lambda image: image, 0)
    assert samples.notes == images.train_source.notes
    left_out = Counter()
    assert len(find_images([str(tmp_path / "photos")], left_out)) == 10
    assert describe_left_out(left_out)[0].startswith("files left out: 20 hidden or of the system, 2 .")


def test_a_class_without_images_is_named(tmp_path, write_digits):
    root = write_digits(tmp_path / "photos", ("zero", "one"), 3, 2)
    for name in ("two", "three"):
        (root / "train" / name).mkdir()
    (root / "train" / "two" / "Thumbs.db").write_bytes(b"left")
    with pytest.raises(ValueError, match=r"without images: three, two; files left out: 1 hidden"):
        open_images(str(root))


WRITTEN = {  # endings that folders are searched for, or by which content, with the format to write
    **{".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".pgm": "PPM", ".tga": "TGA", ".dib": "DIB"},
    **{".unheard": "PNG", "": "WEBP", ".ico": "ICO", ".pcx": "PCX", ".sgi": "SGI", ".qoi": "QOI", ".icns": "ICNS", ".im": "IM"},
}


def test_every_format_is_taken_by_content(tmp_path):
    folder = tmp_path / "photos"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for ending, kind in WRITTEN.items():
                quarters().resize((64, 64)).save(folder / split / name / f"image{ending}", kind)
    paths = list_images(folder / "train" / "a", left_out := Counter())
    assert {path.suffix for path in paths} == set(WRITTEN) and not left_out
    expected = np.asarray(quarters("L").resize((64, 64)), dtype=float)
    for path in paths:
        pixels = np.asarray(read_image(path).resize((64, 64)).convert("L"), dtype=float)
        assert np.abs(pixels - expected).mean() < 12, path
    images = open_images(str(folder))
    splits = {"train": images.train_source.samples, "validation": images.held_out_source.samples}
    result = write_shards(folder, splits, images.class_names, tmp_path / "shards", 7, 0, 1, lambda done, *_: done)
    assert result["train"] == 2 * len(WRITTEN) and result["skipped"] == []
    stream = open_stream("wds/", str(tmp_path / "shards"), "validation")
    found = list(stream)
    assert [problem for *_, problem in found] == [""] * 2 * len(WRITTEN)
    assert Counter(label for _, label, _ in found) == {0: len(WRITTEN), 1: len(WRITTEN)}


def test_formats_that_reach_further_are_never_read(tmp_path):
    file = io.BytesIO()
    quarters().save(file, "EPS")
    for name in ("x.eps", "x.png"):
        with pytest.raises(ValueError, match="no known format"):
            decode(file.getvalue(), name)
    (tmp_path / "x.eps").write_bytes(file.getvalue())
    (tmp_path / "y.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert list_images(tmp_path, left_out := Counter()) == []
    assert describe_left_out(left_out) == ["files left out: 1 .eps, 1 .heic (pillow-heif reads .heic)"]
    assert {"EPS", "WMF"} <= UNREAD_FORMATS
    file = io.BytesIO()
    quarters().save(file, "TGA")
    with pytest.raises(ValueError, match="no known format"):
        decode(file.getvalue(), "x.png")  # has no signature, so anything might be taken for it


def test_links_are_followed_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    quarters().save(tmp_path / "a" / "b" / "x.png")
    (tmp_path / "a" / "b" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "a" / "b")
    assert len(find_images([str(tmp_path / "a")])) == 1


# What cannot be read


def flat_png(width, height):
    """A small PNG of any size: black, 1 bit."""
    lines = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 50000), (50000, 1), (20, 1001), (8001, 8000)])
def test_files_have_the_limits_of_uploads(tmp_path, monkeypatch, size):
    path = tmp_path / "x.png"
    path.write_bytes(flat_png(*size))
    for read in (read_image, image_sizes):
        with pytest.raises(
            ValueError, match=rf"x\.png: .* {size[0]} x {size[1]} pixels, expected at most 64 million .* GROUPMIX"
        ):
            read(path)
    monkeypatch.setenv("GROUPMIXFORMER_MAX_PIXELS", "65000000")
    monkeypatch.setenv("GROUPMIXFORMER_MAX_RATIO", "50000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert image_sizes(path)[0] == size
    monkeypatch.setenv("GROUPMIXFORMER_MAX_RATIO", "many")
    with pytest.raises(ValueError, match="GROUPMIXFORMER_MAX_RATIO is 'many', expected a whole number"):
        read_image(path)


def test_nothing_that_cannot_be_read_ends_a_run(tmp_path, write_digits):
    root = write_digits(tmp_path / "photos", ("zero", "one"), 6, 4)
    names = []
    for split in ("train", "val"):
        folder = root / split / "one"
        (folder / "dangling.png").symlink_to(folder / "gone.png")
        os.mkfifo(folder / "fifo.jpg")
        (folder / "device.png").symlink_to("/dev/zero")
        (folder / "empty.png").write_bytes(b"")
        (folder / "long.png").write_bytes(flat_png(1, 50000))
        locked = folder / "locked.png"
        quarters().save(locked)
        locked.chmod(0)
        names = ["dangling.png", "fifo.jpg", "device.png", "empty.png", "long.png"] + ["locked.png"] * (os.geteuid() != 0)
    data = open_images(str(root))
    (root / "train" / "zero" / "1.png").unlink()  # meanwhile
    (root / "val" / "zero" / "7.png").unlink()
    for samples, count in (
        (data.train(lambda image: image, 0), 12),
        (data.held_out(lambda image: torch.zeros(3)), 8),
    ):
        keys = [(0, i) for i in range(len(samples))] if count == 12 else range(len(samples))
        problems = [problem for key in keys for problem in samples[key][-1].splitlines()]
        assert {Path(problem.split(":")[0]).name for problem in problems} >= {
            *names,
            "1.png" if count == 12 else "7.png",
        }


def test_the_words_for_what_cannot_be_read(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    words = {
        tmp_path / "x.jpg": "a folder",
        tmp_path / "fifo.jpg": "neither a file nor a folder",
        tmp_path / "gone.jpg": "no such file",
    }
    for path, text in words.items():
        with pytest.raises(ValueError, match=rf"^{path}: .*{text}$"):
            read_image(path)


def test_notes_do_not_make_an_image_unreadable(tmp_path, write_digits):
    root = write_digits(tmp_path / "photos", ("zero", "one"), 3, 2)
    (root / "train" / "one" / "x.tif").write_bytes(tiff(RAMP * 16, np.uint16))
    samples = open_images(str(root)).train(lambda image: torch.zeros(3), 0)
    batch = collate_classification([samples[i] for i in range(len(samples))])
    assert (batch[1] >= 0).all()
    assert len(batch[2]) == 1
    assert Doubts().take(batch[2]) == []
