"""Sets of masks, damaged at random: read as what was written into them, or refused, or named as left out.

python tests/reliability/test_damaged_masks.py --count 200
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from campaign import main, refusal, run
from PIL import Image, ImageOps

from groupmixformer.tasks.segmentation.data import IGNORE, SemanticImages

NAMES = ["ground", "road", "car"]
TURNS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
KINDS = ["missing", "cut", "bits", "size", "palette", "few bits", "colour", "deep", "alpha", "JPEG", "number"]
VALUES = [None, True, -1, 0, 3, 255, 256, 1.5, 10**30, float("nan"), "", "0", "road", [], {}, [1, 2, 3], [0, 0, 300]]


def save(rng, path, image, turned):
    """Store an image as it is, or on its side or upside down, with the orientation that makes it upright again, or without."""
    orientation = int(rng.choice(list(TURNS))) if turned else 1
    if TURNS[orientation] is not None:
        image = image.transpose(TURNS[orientation])
    exif = Image.Exif()
    told = rng.random() < 0.8
    exif[0x112] = orientation if told else 1
    image.save(path, exif=exif)
    return told or orientation == 1


def damage_mask(rng, path, numbers, kind):
    """Damage a mask; return the numbers that are right to read, none if it must not be read."""
    mask = Image.fromarray(numbers)
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
    elif kind == "bits":
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(content))
        return numbers  # where it can be read at all
    elif kind == "size":
        mask.resize((mask.width + int(rng.integers(1, 4)), mask.height), Image.Resampling.NEAREST).save(path)
    elif kind == "palette":
        mask = Image.fromarray(numbers, mode="P")
        mask.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        mask.save(path)
        return numbers
    elif kind == "few bits":
        if numbers.max() <= 3:
            indexed = Image.fromarray(numbers, mode="P")
            indexed.putpalette([0, 0, 0, 90, 90, 90, 180, 180, 180, 255, 255, 255])
            indexed.save(path, bits=2)
        return numbers
    elif kind == "colour":
        mask.convert("RGB").save(path)
    elif kind == "deep":
        Image.fromarray(numbers.astype(np.uint16) * int(rng.choice([1, 256]))).save(path)
    elif kind == "alpha":
        mask.convert("LA").save(path)
    elif kind == "JPEG":  # as a .png: it changes numbers
        buffer = io.BytesIO()
        mask.save(buffer, "JPEG", quality=95)
        path.write_bytes(buffer.getvalue())
        with Image.open(buffer) as seen:
            return np.asarray(seen)
    elif kind == "number":
        numbers = numbers.copy()
        numbers[0, 0] = 77
        Image.fromarray(numbers).save(path)
    return None


def attempt(rng):
    """Write four images with masks, damage some, or the list of classes; read them and compare with what was written."""
    root = Path(tempfile.mkdtemp(prefix="masks-"))
    try:
        return _attempt(rng, root)
    finally:
        shutil.rmtree(root)


def _attempt(rng, root):
    style = rng.choice(["usual", "usual", "0 and 255", "one class"])
    ids = [0, 1, 3] if style != "0 and 255" else [0, 1, 3][: int(rng.integers(2, 4))]
    ignore = 255 if style == "0 and 255" or rng.random() < 0.5 else None
    classes = {"classes": [{"id": i, "name": name} for i, name in zip(ids, NAMES, strict=False)], "ignore_index": ignore}
    damaged_list = rng.random() < 0.25
    if damaged_list:
        place = classes["classes"][rng.integers(len(ids))] if rng.random() < 0.7 else classes
        place[rng.choice(list(place))] = VALUES[rng.integers(len(VALUES))]
    (root / "classes.json").write_text(json.dumps(classes))
    expected = {}
    kinds = []
    doubtful = False
    for i in range(4):
        for kind in ("images", "masks"):
            (root / kind / "train").mkdir(parents=True, exist_ok=True)
        choice = {"usual": ids + ([255] if ignore else []), "0 and 255": [0, 255], "one class": [0]}[style]
        numbers = rng.choice(choice, (12, 18)).astype(np.uint8)
        image = Image.fromarray(np.repeat(numbers[..., None], 3, axis=2) // 2 + 60)  # tells where the image lies
        path = root / "masks" / "train" / f"{i}.png"
        turned = bool(rng.random() < 0.3)
        told = save(rng, root / "images" / "train" / f"{i}.png", image, turned)
        told &= save(rng, path, Image.fromarray(numbers), turned and rng.random() < 0.3)
        doubtful |= not told  # turned by a quarter it is refused, turned by half nothing can tell
        expected[str(i)] = numbers if told else "untold"
        if told and rng.random() < 0.3:
            kinds.append(str(rng.choice(KINDS)))
            with Image.open(path) as mask:
                stored = np.asarray(ImageOps.exif_transpose(mask))
            expected[str(i)] = damage_mask(rng, path, stored, kinds[-1])
    try:
        images = SemanticImages(root, "train", transform=lambda *pair: pair)
        said = getattr(images, "check", None) or images.left_out
        lines = said("training", 1.0)
        read = {}
        for index in range(len(images)):
            try:
                read[Path(images.names[index]).stem] = images.read(index)
            except ValueError as error:
                if refusal(error) != "refused":
                    return refusal(error)
    except Exception as error:
        usable = {
            int(number) for numbers in expected.values() if isinstance(numbers, np.ndarray) for number in np.unique(numbers)
        }
        fits = style == "usual" and not damaged_list and not doubtful and len(usable & set(ids)) > 1 and "bits" not in kinds
        return f"refused what can be used: {error}" if fits else refusal(error)
    if damaged_list:
        listed = classes["classes"]
        if not isinstance(listed, list) or not all(type(entry.get("id")) is int for entry in listed):
            return "took a damaged list of classes"
        ids, ignore = [entry["id"] for entry in listed], classes.get("ignore_index")
    table = np.full(256, -1)
    if ignore is not None:
        table[ignore] = IGNORE
    table[ids] = range(len(ids))
    present = set()
    for name, (image, labels) in read.items():
        numbers = expected[name]
        if numbers is None:
            return f"read a mask that is damaged: {name}"
        if isinstance(numbers, str):
            continue
        if labels.shape != numbers.shape or not np.array_equal(labels.numpy(), table[numbers]):
            return "other labels than what was written"
        brightness = np.asarray(image)[..., 0]
        if style == "usual" and brightness.shape != numbers.shape:
            return "the mask lies across the image"
        present |= set(np.unique(labels).tolist()) - {IGNORE}
    if not doubtful and len(present) < 2:
        return "trains on one class alone"
    if not doubtful and any(images.class_names[label] not in " ".join(lines) for label in set(range(len(ids))) - present):
        return "a class without a pixel is not named"
    return "right" if len(read) == 4 and not lines else "noted"


def test_damaged_masks():
    result = run(attempt, 40)
    assert not result["failures"], result["failures"][:3]
    assert {"right", "refused", "noted"} <= set(result["counts"])


if __name__ == "__main__":
    main({"masks": (attempt, 200)})
