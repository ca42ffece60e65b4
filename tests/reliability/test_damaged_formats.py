"""Data sets of other tools with one place damaged: refused in a line, or read, with all objects of other files as they were.

python tests/reliability/test_damaged_formats.py --count 1000
"""

import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from campaign import main, refusal, run
from shapes import write_shapes
from written import FORMATS

from groupmixformer.tasks.detection.data import CocoImages

JSON = ["null", "-1", "1e400", '"x"', "[]", "{}", "0", "true", "1.5", "99999999999999999999", '"\\u0000"', '""', "[1]"]
WORDS = ["nan", "inf", "-1", "x", "", "0", "1e999", "99999999999", "1.5", "\x01", "a b", "<b/>", "&#0;", "&bad;", "\u00fc"]
KEPT = ("train-1.png", "train-2.png")  # in formats with a file for each image, files of another one are damaged


def objects(root):
    """Return boxes with classes by image; what is left out counts as noted."""
    images = CocoImages(root, "train", masks=False)
    found = {}
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        rows = zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
        found[Path(record["file_name"]).name] = [(images.class_names[label - 1], *np.round(box, 3)) for label, box in rows]
    return found, bool(images.dropped or images.skipped)


@cache
def folders():
    """Return a folder in each format, with its objects."""
    root = Path(tempfile.mkdtemp(prefix="formats-"))
    source = write_shapes(root / "coco", train=3, val=1)
    for name, write in FORMATS.items():
        write(source, root / name, ["train", "val"], **({"masks": True} if name == "yolo" else {}))
    return {name: (root / name, objects(root / name)[0]) for name in FORMATS}


def damage(rng, text, words, pattern):
    """Return a text that is cut off, or has another byte or another word at one place."""
    kind = rng.random()
    if kind < 0.1:
        return text.encode()[: rng.integers(len(text) + 1)]
    if kind < 0.25:
        content = bytearray(text.encode())
        content[rng.integers(len(content))] = rng.integers(256)
        return bytes(content)
    places = list(re.finditer(pattern, text))
    place = places[rng.integers(len(places))]
    return f"{text[: place.start()]}{words[rng.integers(len(words))]}{text[place.end() :]}".encode()


def attempt(rng):
    name = list(FORMATS)[rng.integers(len(FORMATS))]
    root, truth = folders()[name]
    endings = (".json", ".xml", ".txt", ".yaml")
    files = sorted(file for file in root.rglob("*") if file.suffix in endings and file.stem not in ("train-1", "train-2"))
    file = files[rng.integers(len(files))]
    before = file.read_text()
    words, pattern = (
        (JSON, r'-?\d+\.?\d*|"[^"]*"(?!\s*:)|\[[^\[\]]*\]') if file.suffix == ".json" else (WORDS, r'[^\s,;:<>="/]+')
    )
    file.write_bytes(damage(rng, before, words, pattern))
    try:
        found, noted = objects(root)
    except Exception as error:
        return refusal(error)
    finally:
        file.write_text(before)
    # Files of another image say nothing of these; but names of all files may number the classes, and one may move all pixels.
    own = name in ("labelme", "yolo") and file.suffix != ".yaml"
    if own and any(found.get(image) != truth[image] for image in KEPT):
        return f"{file.name} changed the objects of other images"
    return "noted" if noted else "right"


def test_damaged_formats():
    result = run(attempt, 60)
    assert not result["failures"], result["failures"][:3]
    assert {"right", "refused"} <= set(result["counts"])


if __name__ == "__main__":
    main({"formats": (attempt, 1000)})
