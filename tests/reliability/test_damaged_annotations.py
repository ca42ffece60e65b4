"""COCO's annotations, damaged at random places: read as an independent reader reads them, or refused, or named as left out.

python tests/reliability/test_damaged_annotations.py --count 500
"""

import copy
import json
import math
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from campaign import main, refusal, run
from PIL import Image
from pycocotools import mask as coco_mask

from groupmixformer.tasks.detection.data import CocoImages
from groupmixformer.tasks.detection.metrics import coco_metrics, to_results

WIDTH, HEIGHT = 60, 40
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.0, 0.5, 1e30, 10**400, math.nan, math.inf, "", "0", "1", "7", "text", "1.png"),
    *([], {}, [1, 2], [[1, 2, 3, 4, 5, 6, 7]], {"id": 1}, [None] * 4, "\ud800", "../1.png", "a\0b", "x" * 300),
]


@cache
def folder():
    """Return a folder with four images of noise, of which every attempt writes the annotations anew."""
    root = Path(tempfile.mkdtemp(prefix="annotations-"))
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(1, 5):
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
    return root


def annotations(rng):
    """Return annotations that are right: polygons and run lengths, a crowd, ids of integers or of texts."""
    texts = rng.random() < 0.2
    name = (lambda i: f"n{i}") if texts else int
    content = {
        "images": [{"id": name(i), "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, 5)],
        "categories": [{"id": name(i), "name": word} for i, word in ((7, "disc"), (3, "square"), (20, "ring"))],
        "annotations": [],
    }
    for number in range(12):
        x, y = int(rng.integers(0, WIDTH - 20)), int(rng.integers(0, HEIGHT - 20))
        w, h = (int(side) for side in rng.integers(4, 20, 2))
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
        mask[y : y + h, x : x + w] = 1
        encoded = coco_mask.encode(mask)
        changes = np.flatnonzero(np.diff(mask.reshape(-1, order="F"))) + 1
        runs = np.diff([0, *changes, mask.size]).tolist()
        form = number % 3
        segmentation = (
            [[x, y, x + w, y, x + w, y + h, x, y + h]],
            {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if mask[0, 0] else runs},
            {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()},
        )[form]
        record = {"id": number + 1, "image_id": name(number % 4 + 1), "category_id": name((7, 3, 20)[number % 3])}
        record |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(number == 5), "segmentation": segmentation}
        content["annotations"].append(record)
    return content


def places(value, path=()):
    """Yield the path of everything in a JSON value."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def damage(rng, content):
    """Change one thing: remove it, take another value, repeat it, write it as a text; or all boxes become corners."""
    if rng.random() < 0.05:
        for record in content["annotations"] if isinstance(content.get("annotations"), list) else []:
            if isinstance(record, dict) and isinstance(record.get("bbox"), list) and len(record["bbox"]) == 4:
                x, y, w, h = record["bbox"]
                if all(isinstance(side, int) for side in record["bbox"]):
                    record["bbox"] = [x, y, x + w, y + h]
        return "corners"
    found = list(places(content))
    *parents, key = found[rng.integers(len(found))]
    parent = content
    for step in parents:
        parent = parent[step]
    kind = rng.choice(["remove", "value", "value", "value", "repeat", "text"])
    if kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(parent[key]))
    elif kind == "text":
        parent[key] = str(parent[key])
    else:
        parent[key] = VALUES[rng.integers(len(VALUES))]
    return kind


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def naive(path, masks):
    """Read annotations step by step without any code of the package.

    Returns:
        Whether types and ids are as COCO has them; for each image that can be used its objects as (name of the category, box as
        corners, crowd, mask); the number of images and of objects that make no sense.
    """
    content = json.loads(path.read_text())
    try:
        images, kinds = content["images"], content["categories"]
        ids = {id_: [entry["id"] for entry in list_] for id_, list_ in (("image_id", images), ("category_id", kinds))}
        for known in ids.values():
            assert known and len(set(known)) == len(known) and len({isinstance(i, str) for i in known}) == 1
            assert all(isinstance(i, str) or (is_number(i) and i == int(i)) for i in known)
        files = [Path(image["file_name"]).as_posix() for image in images]
        assert len(set(files)) == len(files)
        for image in images:
            assert all(is_number(image[side]) and 1 <= image[side] == int(image[side]) <= 10**6 for side in ("width", "height"))
        names = {kind["id"]: kind["name"] for kind in kinds}
        assert all(isinstance(name, str | int) and not isinstance(name, bool) for name in names.values())
        for record in content["annotations"]:
            for key, known in ids.items():
                assert isinstance(record[key], str) == isinstance(known[0], str)
                assert isinstance(record[key], str) or (is_number(record[key]) and record[key] == int(record[key]))
            assert not isinstance(record.get("iscrowd"), str) and record.get("iscrowd") in (None, 0, 1)
            assert record.get("area") is None or (is_number(record["area"]) and abs(record["area"]) < 1e300)
            assert record.get("id") is None or (isinstance(record["id"], str | int) and not isinstance(record["id"], bool))
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
        return False, {}, 0, 0
    usable = {}
    for image in images:
        try:
            with Image.open(path.parents[1] / "images" / image["file_name"]) as opened:
                if opened.size == (image["width"], image["height"]):
                    usable[image["id"]] = []
        except (OSError, ValueError):
            pass
    wrong, seen = 0, []
    for record in content["annotations"]:
        if record.get("id") is not None and record in [other for other in seen if other["id"] == record["id"]]:
            wrong += 1  # the same object once more
            continue
        if record.get("id") is not None and record["id"] not in [other["id"] for other in seen]:
            seen.append(record)
        try:
            image = next(image for image in images if image["id"] == record["image_id"])
            name, (x, y, w, h) = names[record["category_id"]], record["bbox"]
            assert isinstance(record["bbox"], list) and all(is_number(side) and abs(side) < 1e9 for side in record["bbox"])
            box = [max(x, 0), max(y, 0), min(x + w, image["width"]), min(y + h, image["height"])]
            assert w >= 1 and h >= 1 and box[2] - box[0] >= 1 and box[3] - box[1] >= 1
            mask = mask_of(record["segmentation"], image["height"], image["width"]) if masks else None
        except (AssertionError, KeyError, TypeError, ValueError, StopIteration):
            wrong += 1
            continue
        if record["image_id"] in usable:
            usable[record["image_id"]].append((str(name), box, bool(record.get("iscrowd")), mask))
    return True, usable, len(images) - len(usable), wrong


def mask_of(segmentation, height, width):
    """Decode a segmentation by pycocotools, after checks that it does not make."""
    if isinstance(segmentation, dict):
        size, counts = segmentation["size"], segmentation["counts"]
        assert isinstance(size, list) and size == [height, width] and not any(isinstance(side, bool) for side in size)
        if isinstance(counts, str):
            return coco_mask.decode({"size": size, "counts": counts})
        assert (
            isinstance(counts, list)
            and all(is_number(n) and n == int(n) >= 0 for n in counts)
            and sum(counts) == height * width
        )
        return coco_mask.decode(coco_mask.frPyObjects({"size": size, "counts": [int(n) for n in counts]}, height, width))
    assert isinstance(segmentation, list)
    for polygon in segmentation:
        assert isinstance(polygon, list) and len(polygon) % 2 == 0 and all(is_number(n) and abs(n) < 1e9 for n in polygon)
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    assert polygons
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def attempt(rng):
    """Damage annotations in one to three places, read them, and compare with `naive`."""
    root, content = folder(), annotations(rng)
    kinds = [damage(rng, content) for _ in range(rng.integers(1, 4))]
    path = root / "annotations" / "instances_val.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content)
    if rng.random() < 0.05:
        text = text[: rng.integers(len(text))]
    path.write_text(text, encoding="utf-8-sig" if rng.random() < 0.1 else "utf-8")
    masks = bool(rng.random() < 0.5)
    try:
        images = CocoImages(root, "val", masks)
    except Exception as error:
        outcome = refusal(error)
        if outcome == "refused" and path.read_text() == text and "corners" not in kinds:
            try:
                fits, usable, _, _ = naive(path, masks)
            except ValueError:
                return outcome
            if fits and any(not crowd for found in usable.values() for _, _, crowd, _ in found):
                return f"refused what can be used: {error}"
        return outcome
    path.write_text(text)  # without its mark
    fits, usable, left_out, wrong = naive(path, masks)
    if not fits:
        return "read although its types are wrong"
    if kinds.count("corners") == 1:  # twice makes boxes of no meaning
        return "took corners for sizes"
    found = {}
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        found[record["id"]] = (record, target)
    if list(found) != list(usable) or len(images.skipped) != left_out:
        return f"other images: {list(found)}, expected {list(usable)}"
    if len(images.dropped) != wrong:
        return f"left out {images.dropped}, expected {wrong}"
    for key, expected in usable.items():
        record, target = found[key]
        if [annotation["iscrowd"] for annotation in record["objects"]] != [int(crowd) for _, _, crowd, _ in expected]:
            return "other crowds"
        expected = [entry for entry in expected if not entry[2]]
        if [images.class_names[label - 1] for label in target["labels"].tolist()] != [name for name, *_ in expected]:
            return "other classes"
        boxes = np.array([box for _, box, _, _ in expected], dtype=np.float32).reshape(-1, 4)
        if not np.allclose(np.asarray(target["boxes"]), boxes, atol=1e-4):
            return "other boxes"
        if masks and not all(np.array_equal(mask, own[3]) for mask, own in zip(target["masks"].numpy(), expected, strict=True)):
            return "other masks"
    results = []
    for key, (_, target) in found.items():
        objects = {**target, "scores": np.ones(len(target["labels"]))}
        if masks:
            objects["masks"] = target["masks"][:, None]
        results += to_results(objects, key, images.category_ids) if len(target["labels"]) else []
    metrics, _ = coco_metrics(images.ground_truth, results, "segm" if masks else "bbox")
    cut = any(  # what is annotated differs from its part in the image
        not (annotation["bbox"][side] >= 0 and sum(annotation["bbox"][side::2]) <= length)
        for annotation in images.ground_truth["annotations"]
        for side, length in enumerate((WIDTH, HEIGHT))
    )
    if metrics["AR100"] < 0.99 and not cut:
        return f"the truth reaches a recall of {metrics['AR100']}"
    return "noted" if images.dropped or images.skipped else "right"


def test_damaged_annotations():
    result = run(attempt, 40)
    assert not result["failures"], result["failures"][:3]
    assert {"right", "refused", "noted"} <= set(result["counts"])


if __name__ == "__main__":
    main({"annotations": (attempt, 500)})
