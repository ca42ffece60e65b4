"""Data sets with COCO's annotations: what is read, what is refused and named, what training sees, and COCO's numbers."""

import contextlib
import copy
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import CATEGORIES, COLORS, polygon, runs, write_coco, write_shapes
from torchvision.ops import masks_to_boxes

from groupmixformer.tasks.detection.data import (
    CocoImages,
    collate_detection,
    detection_transform,
    to_tensor,
)
from groupmixformer.tasks.detection.metrics import COCO_METRICS, coco_metrics, to_results
from groupmixformer.tasks.detection.predict import write_coco_results

PLAIN = detection_transform(0.0, 0.0, 0.0)
WIDTH, HEIGHT = 40, 30


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def photo(path, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def image(number, **fields):
    return {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT, **fields}


def thing(number=1, of=1, category=3, box=(10, 5, 12, 8), **fields):
    return {
        "id": number,
        "image_id": of,
        "category_id": category,
        "bbox": list(box),
        "area": 96,
        "iscrowd": 0,
        "segmentation": polygon(*box),
        **fields,
    }


def rectangle(left, top, width, height):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def compressed(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.fixture
def folder(tmp_path):
    """Give a function that writes validation data of two images, changed as it is told, and returns the folder."""

    def write(objects=None, images=None, categories=CATEGORIES):
        images = [image(1), image(2)] if images is None else images
        for record in images:
            if not (tmp_path / "images" / record["file_name"]).exists():
                photo(tmp_path / "images" / record["file_name"])
        write_coco(tmp_path, "val", images, [thing()] if objects is None else objects, categories)
        return tmp_path

    return write


# Reading


def test_every_form_of_mask_is_read(folder):
    first, second = rectangle(10, 5, 12, 8), rectangle(28, 20, 6, 5)
    both = first | second
    forms = {
        "polygon": (polygon(10, 5, 12, 8), first),
        "two polygons": (polygon(10, 5, 12, 8) + polygon(28, 20, 6, 5), both),
        "a broken polygon beside a good one": ([[1, 2, 3, 4], *polygon(10, 5, 12, 8)], first),
        "uncompressed": (runs(both), both),
        "uncompressed from the corner": (runs(rectangle(0, 0, 7, 9)), rectangle(0, 0, 7, 9)),
        "compressed": (compressed(both), both),
    }
    data = folder([thing(i, segmentation=form) for i, (form, _) in enumerate(forms.values())])
    images = CocoImages(data, "val", masks=True)
    assert images.dropped == []
    target = images.target(images.read(0)[1])
    expected = torch.from_numpy(np.stack([mask for _, mask in forms.values()]))
    assert torch.equal(target["masks"], expected)
    assert target["masks"].shape == (len(forms), HEIGHT, WIDTH)


def test_ids_with_gaps_become_labels_and_ids_again(folder):
    categories = [{"id": 90, "name": "last"}, {"id": 4, "name": "first"}, {"id": 40, "name": "none"}, {"id": 41, "name": "mid"}]
    images = CocoImages(
        folder([thing(i, category=c) for i, c in enumerate((41, 90, 4, 41))], categories=categories), "val", masks=False
    )
    assert images.class_names == ["first", "none", "mid", "last"]
    target = images.target(images.read(0)[1])
    assert target["labels"].tolist() == [3, 4, 1, 3]
    assert set(target) == {"boxes", "labels"}
    found = {**target, "scores": torch.tensor([0.5, 0.25, 0.75, 1.0])}
    results = to_results(found, 77, images.category_ids)
    assert results == [
        {"image_id": 77, "category_id": c, "bbox": [10.0, 5.0, 12.0, 8.0], "score": score}
        for c, score in zip((41, 90, 4, 41), (0.5, 0.25, 0.75, 1.0), strict=True)
    ]


def test_probabilities_become_masks_of_the_results():
    masks = torch.from_numpy(np.stack([rectangle(3, 4, 5, 6), rectangle(0, 0, 0, 0), rectangle(0, 0, WIDTH, HEIGHT)])) * 0.6
    masks[0, 20, 20], masks[0, 21, 21] = 0.5, 0.49
    found = {"boxes": torch.rand(3, 4), "labels": torch.ones(3, dtype=torch.int64), "scores": torch.rand(3)}
    results = to_results({**found, "masks": masks[:, None]}, 1, [5])
    decoded = coco_mask.decode([json.loads(json.dumps(result))["segmentation"] for result in results]).transpose(2, 0, 1)
    assert np.array_equal(decoded, np.asarray(masks >= 0.5))
    nothing = {name: value[:0] for name, value in {**found, "masks": masks[:, None]}.items()}
    assert to_results(nothing, 1, [5]) == []


def test_boxes_are_cut_at_the_image_for_training_and_kept_in_the_truth(folder):
    boxes = [(-5.5, -2, 15, 10), (30, 20, 50.25, 50), (10.5, 5.25, 12, 8)]
    images = CocoImages(folder([thing(box=box) for box in boxes]), "val", masks=False)
    target = images.target(images.read(0)[1])
    assert target["boxes"].tolist() == [[0, 0, 9.5, 8], [30, 20, WIDTH, HEIGHT], [10.5, 5.25, 22.5, 13.25]]
    assert [truth["bbox"] for truth in images.ground_truth["annotations"]] == [list(box) for box in boxes]


@pytest.mark.parametrize("masks", [False, True])
def test_crowds_are_left_out_of_training_and_kept_in_the_truth(folder, masks):
    crowd = thing(2, box=(0, 0, 30, 30), iscrowd=1, segmentation=runs(rectangle(0, 0, 30, 30)))
    objects = [thing(1), crowd, thing(3, category=7), {**crowd, "image_id": 2}]
    images = CocoImages(folder(objects), "val", masks)
    assert [(truth["image_id"], truth["iscrowd"]) for truth in images.ground_truth["annotations"]] == [
        (1, 0),
        (1, 1),
        (1, 0),
        (2, 1),
    ]
    targets = [images.target(images.read(i)[1]) for i in range(2)]
    assert [target["labels"].tolist() for target in targets] == [[1, 2], []]
    assert [len(target["boxes"]) for target in targets] == [2, 0]


@pytest.mark.parametrize("masks", [False, True])
def test_images_without_objects_stay(folder, masks):
    data = folder(images=[image(1), image(2), image(3)], objects=[thing(of=2)])
    write_coco(data, "train", [image(1), image(2), image(3)], [thing(of=2)])
    images = CocoImages(data, "train", masks, detection_transform(1.0, 1.0, 0.2))
    assert len(images) == 3
    for index in range(3):
        pixels, target, problem = images[0, index]
        count = int(index == 1)
        assert problem == ""
        assert pixels.shape == (3, HEIGHT, WIDTH)
        assert (target["boxes"].shape, target["labels"].shape) == ((count, 4), (count,))
        assert not masks or target["masks"].shape == (count, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("split", "annotations", "photos"),
    [
        ("val", "annotations/instances_val.json", "images"),
        ("val", "annotations/instances_val.json", "images/val"),
        ("val", "annotations/instances_val.json", "val"),
        ("val", "annotations/instances_val2017.json", "val2017"),
        ("val", "annotations/instances_val2017.json", "images/val2017"),
        ("train", "annotations/instances_train2017.json", "train2017"),
        ("val", "instances_val.json", "images"),
        ("test", "test.json", "test"),
        ("val", "val.json", "."),
        ("val", "annotations/val.json", "annotations"),
    ],
)
@pytest.mark.parametrize("missing", [None, "1.png"])
def test_the_usual_layouts_are_found(folder, tmp_path, split, annotations, photos, missing):
    root = tmp_path / "other"
    (root / annotations).parent.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        if name != missing:
            photo(root / photos / name)
    source = folder([thing(of=2)]) / "annotations" / "instances_val.json"
    source.rename(root / annotations)
    for other in ("captions", "person_keypoints"):
        (root / annotations).with_name(f"{other}_{split}2017.json").write_text("{}")
    (root / annotations).with_name(f"instances_{split}s.json").write_text("{}")
    images = CocoImages(root, split, masks=False)
    assert len(images) == (1 if missing else 2)
    assert [line.rpartition("/")[2] for line in images.skipped] == ([f"{missing}: no such file"] if missing else [])
    assert images.read(len(images) - 1)[1]["id"] == 2


def test_evaluation_gives_images_as_they_are(shapes):
    images = CocoImages(shapes, "val", masks=False)
    pixels, number, problem = images[2]
    assert (number, problem) == (1014, "")
    with Image.open(shapes / "images" / "val-2.png") as file:
        assert torch.equal((pixels * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(file)))
    blank, number, _ = images[-1]
    assert number is None and blank.shape[0] == 3


def test_a_sample_depends_on_seed_epoch_and_index_alone(shapes):
    def sample(seed, key):
        images = CocoImages(shapes, "train", True, detection_transform(0.5, 0.5, 0.3), seed)
        return images[key][:2]

    pixels, target = sample(0, (0, 1))
    for noise in range(2):
        torch.manual_seed(noise)
        again, others = sample(0, (0, 1))
        assert torch.equal(again, pixels)
        assert all(torch.equal(others[name], target[name]) for name in target)
    for seed, key in ((1, (0, 1)), (0, (1, 1))):
        assert not torch.equal(sample(seed, key)[0], pixels)


@pytest.mark.parametrize("split", ["val", pytest.param("train", marks=pytest.mark.slow)])
def test_real_annotations_are_read_whole(shared, split):
    data = shared("data/coco-tiny")
    content = json.loads((data / "annotations" / f"instances_{split}.json").read_text())
    images = CocoImages(data, split, masks=True)
    assert (images.skipped, images.dropped) == ([], [])
    assert len(images) == len(content["images"])
    assert len(images.class_names) == 80
    names = {category["id"]: category["name"] for category in content["categories"]}
    crowds = 0
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        own = [a for a in content["annotations"] if a["image_id"] == record["id"]]
        usual = [a for a in own if not a["iscrowd"]]
        crowds += len(own) - len(usual)
        assert [images.class_names[label - 1] for label in target["labels"]] == [names[a["category_id"]] for a in usual]
        areas = target["masks"].sum((1, 2)).tolist()
        assert areas == pytest.approx([a["area"] for a in usual], rel=0.1, abs=30)
    assert crowds == {"train": 9, "val": 3}[split]


# What is wrong is named: refused


def annotations(root):
    return root / "annotations" / "instances_val.json"


def rewrite(root, change):
    content = json.loads(annotations(root).read_text())
    change(content)
    annotations(root).write_text(json.dumps(content))


REFUSED = {
    "a list": (lambda content: None, "is [], expected an object with fields"),
    **{
        f"no {key}": (lambda content, key=key: content.pop(key), f"has no {key}, expected a list of objects")
        for key in ("images", "annotations", "categories")
    },
    "images that are no objects": (lambda c: c.update(images=[1, 2]), "images[0]: is 1, expected an object with fields"),
    "annotations by id": (lambda c: c.update(annotations={"1": {}}), 'annotations is {"1": {}}, expected a list of objects'),
    **{
        f"an image without {key}": (lambda c, key=key: c["images"][1].pop(key), f"images[1]: has no {key}, expected a")
        for key in ("id", "file_name", "width", "height")
    },
    "a width in words": (lambda c: c["images"][1].update(width="40"), 'images[1]: width is "40", expected an integer from 1'),
    "a category without name": (lambda c: c["categories"][0].pop("name"), "categories[0]: has no name, expected a text"),
    "no image": (lambda c: c["images"].clear(), "images is [], expected one or more"),
    "no category": (lambda c: c["categories"].clear(), "categories is [], expected one or more"),
    "categories of one id": (
        lambda c: c["categories"][0].update(id=3),
        "categories[1]: id is 3, as in categories[0], expected",
    ),
    "images of one id": (lambda c: c["images"][1].update(id=1), "images[1]: id is 1, as in images[0], expected"),
    "images of one file": (
        lambda c: c["images"][1].update(file_name="./1.png"),
        "images[1]: file_name is ./1.png, as in images[0], expected one record with all its objects",
    ),
    "an image's id in words": (
        lambda c: c["images"][1].update(id="2"),
        'images[1]: id is "2", expected an integer, as the first',
    ),
    "a first id in words": (lambda c: c["images"][0].update(id="1"), "images[1]: id is 2, expected a text, as the first"),
    "true as an id": (lambda c: c["images"][0].update(id=True), "images[0]: id is true, expected an integer"),
    "mixed categories": (lambda c: c["categories"][1].update(id="3"), 'categories[1]: id is "3", expected an integer'),
    "a category in words": (
        lambda c: thing_of(c).update(category_id="3"),
        'annotations[0]: category_id is "3", expected an integer',
    ),
    "an image in words": (lambda c: thing_of(c).update(image_id="1"), 'annotations[0]: image_id is "1", expected an integer'),
    "an object of no category": (lambda c: thing_of(c).pop("category_id"), "annotations[0]: has no category_id"),
    "an object of categories": (lambda c: thing_of(c).update(category_id=[3]), "annotations[0]: category_id is [3], expected"),
    "an object of no image": (
        lambda c: thing_of(c).update(image_id=None),
        "annotations[0]: image_id is null, expected an integer",
    ),
    "a crowd in words": (
        lambda c: thing_of(c).update(iscrowd="0"),
        'annotations[0]: iscrowd is "0", expected true, false, 1 or 0',
    ),
    "a half crowd": (lambda c: thing_of(c).update(iscrowd=0.5), "annotations[0]: iscrowd is 0.5, expected true"),
    "an area in words": (lambda c: thing_of(c).update(area="96"), 'annotations[0]: area is "96", expected a finite number'),
    "an id of an object that is none": (
        lambda c: thing_of(c).update(id=[1]),
        "annotations[0]: id is [1], expected an integer or",
    ),
    "corners": (
        lambda c: c.update(
            annotations=[thing(i, box=box) for i, box in enumerate([(10, 5, 22, 13), (25, 8, 38, 28), (0, 0, 9, 9)])]
        ),
        "1 of 3 boxes reach more than a pixel beyond their image, and as x1, y1, x2, y2 they would fit: expected x, y",
    ),
    "no annotation": (lambda c: c["annotations"].clear(), "holds no object with a mask to learn or to find"),
    "crowds only": (lambda c: thing_of(c).update(iscrowd=1), "holds no object with a mask to learn or to find"),
    "no mask": (
        lambda c: thing_of(c).pop("segmentation"),
        "holds no object with a mask to learn or to find: object 1 of 1.png: segmentation: has no polygon",
    ),
    "no such image": (
        lambda c: [i.update(file_name=f"gone/{i['id']}.png") for i in c["images"]],
        "gone/1.png: no such file",
    ),
}


def thing_of(content):
    return content["annotations"][0]


@pytest.mark.parametrize("case", REFUSED)
def test_annotations_that_cannot_be_used_are_refused(folder, case):
    change, reason = REFUSED[case]
    root = folder()
    if case == "a list":
        annotations(root).write_text("[]")
    rewrite(root, change)
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        CocoImages(root, "val", masks=True)
    assert str(annotations(root)) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"{", b"", b"\x89PNG\r\n\x1a\n\xff\xfe", b"images: []"])
def test_what_is_no_json_is_refused(folder, content):
    root = folder()
    annotations(root).write_bytes(content)
    with pytest.raises(ValueError, match=r"not JSON|not UTF-8") as raised:
        CocoImages(root, "val", masks=False)
    assert str(annotations(root)) in str(raised.value)


def test_missing_annotations_are_named_with_what_is_there(folder, tmp_path):
    root = folder()
    with pytest.raises(ValueError, match=r"expected a part test; found val in .*/annotations/instances_val\.json"):
        CocoImages(root, "test", masks=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected one for detection \(COCO's annotations, .*\); found nothing"):
        CocoImages(tmp_path / "empty", "val", masks=False)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        CocoImages(tmp_path / "nowhere", "val", masks=False)


# What is wrong is named: left out


@pytest.fixture
def flawed(folder):
    """Five images, of which one can be used whole: the others are missing, no images, and of another size."""
    names = ["good", "missing", "text", "empty", "turned"]
    images = [image(i, file_name=f"{name}.png") for i, name in enumerate(names, start=1)]
    root = folder([thing(i, of=i) for i in range(1, 6)], images)
    for name, content in {"text": b"<html>not found</html>", "empty": b""}.items():
        (root / "images" / f"{name}.png").write_bytes(content)
    (root / "images" / "missing.png").unlink()
    photo(root / "images" / "turned.png", (HEIGHT, WIDTH))
    return root


def test_images_that_cannot_be_used_are_skipped_by_name(flawed):
    images = CocoImages(flawed, "val", masks=False)
    place = flawed / "images"
    assert images.skipped == [
        f"{place / 'missing.png'}: no such file",
        f"{place / 'text.png'}: not a readable image: no known format",
        f"{place / 'empty.png'}: not a readable image: no known format",
        f"{place / 'turned.png'}: is {HEIGHT} x {WIDTH} pixels and annotated as {WIDTH} x {HEIGHT}",
    ]
    assert len(images) == 1
    assert images.dropped == []  # their objects are left out with them
    assert [record["file_name"] for record in images.ground_truth["images"]] == ["good.png"]
    assert [truth["image_id"] for truth in images.ground_truth["annotations"]] == [1]


def test_a_truncated_image_is_replaced_in_training_and_blank_in_evaluation(folder):
    root = folder([thing(1, of=1), thing(2, of=2, category=7)])
    bad = root / "images" / "1.png"
    bad.write_bytes(bad.read_bytes()[:1000])  # its head is whole
    images = CocoImages(root, "val", masks=False)
    assert (images.skipped, len(images)) == ([], 2)
    blank, number, problem = images[0]
    assert number is None and blank.shape[0] == 3
    assert problem.startswith(f"{bad}: not a readable image")
    images = CocoImages(root, "val", masks=False, transform=PLAIN)
    pixels, target, problem = images[0, 0]
    assert problem.startswith(f"{bad}: not a readable image")
    assert target["labels"].tolist() == [2]
    assert torch.equal(pixels, to_tensor(images.read(1)[0]))
    photos, ids, problems = collate_detection([images[0, 0], images[0, 1]])
    assert len(photos) == len(ids) == 2
    assert problems == [problem]


def lay_on_its_side(path, orientation, transpose):
    """Store an image that people see as it was in another way."""
    with Image.open(path) as image:
        stored = image.transpose(transpose)
    exif = stored.getexif()
    exif[0x112] = orientation
    stored.save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "transpose"),
    [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)],
    ids=["turned", "upside down"],
)
def test_boxes_lie_on_what_people_see(folder, orientation, transpose):
    root = folder()
    plain = CocoImages(root, "val", masks=True)
    lay_on_its_side(root / "images" / "1.png", orientation, transpose)
    turned = CocoImages(root, "val", masks=True)
    assert (turned.skipped, turned.dropped) == ([], [])
    assert turned.read(0)[0].tobytes() == plain.read(0)[0].tobytes()
    assert torch.equal(turned.target(turned.read(0)[1])["boxes"], plain.target(plain.read(0)[1])["boxes"])


def test_boxes_of_an_image_as_it_is_stored_are_refused(folder):
    root = folder(images=[image(1, width=HEIGHT, height=WIDTH), image(2)], objects=[thing(of=2)])
    lay_on_its_side(root / "images" / "1.png", 6, Image.Transpose.ROTATE_90)
    images = CocoImages(root, "val", masks=False)
    assert len(images) == 1
    (line,) = images.skipped
    said = "is, turned upright by its EXIF orientation, 40 x 30 pixels and annotated as 30 x 40, as it is stored, where boxes"
    assert line.startswith(f"{root / 'images' / '1.png'}: {said} and masks would be misplaced: ")
    assert line.endswith(": annotate it as it is seen, or remove the orientation from the file")


def test_an_object_that_is_listed_twice_is_one(folder):
    images = CocoImages(folder([thing(1), thing(1, category=7), thing(1), thing(2)]), "val", masks=False)
    assert images.dropped == ["annotations[2]: is annotations[0] once more"]
    assert images.notes == ["1 objects left out: annotations[2]: is annotations[0] once more"]
    assert images.target(images.read(0)[1])["labels"].tolist() == [1, 2, 1]


def test_ids_may_be_texts(folder):
    categories = [{"id": "q", "name": "square"}, {"id": "d", "name": "disc"}]
    records = [image("a", file_name="1.png"), image("b", file_name="2.png")]
    images = CocoImages(
        folder([thing("x", of="b", category="q"), thing("y", of="b", category="d")], records, categories), "val", True
    )
    assert (images.class_names, images.category_ids) == (["disc", "square"], ["d", "q"])
    found = {**images.target(images.read(1)[1]), "scores": torch.ones(2)}
    found["masks"] = found["masks"][:, None]
    for kind in ("bbox", "segm"):
        metrics, per_class = coco_metrics(images.ground_truth, to_results(found, "b", images.category_ids), kind)
        assert metrics["AP"] == 1.0
        assert [row["class"] for row in per_class] == ["disc", "square"]


def test_numbers_that_a_program_has_made_of_integers_are_ids(folder):
    images = CocoImages(folder([thing(1, of=1.0, category=3.0)], [image(1.0, file_name="1.png")]), "val", masks=False)
    assert json.dumps(images.read(0)[1]["id"]) == "1"


def test_results_of_several_images_have_an_id_each(tmp_path):
    def ids(*paths):
        file = write_coco_results(tmp_path, {path: [{"image_id": 0, "score": 1}] for path in paths})
        return [result["image_id"] for result in json.loads(Path(file).read_text())]

    assert ids("a/000012.jpg", "a/b.jpg") == [12, "b.jpg"]
    assert ids("a/12.jpg", "a/12.png") == ["12.jpg", "12.png"]
    assert ids("a/12.jpg", "b/12.jpg", "c.jpg") == ["a/12.jpg", "b/12.jpg", "c.jpg"]


def test_boxes_that_reach_beyond_an_image_are_said_once(folder):
    images = CocoImages(folder([thing(1, box=(30, 5, 20, 8)), thing(2, box=(30, 5, 10, 8))]), "val", masks=False)
    assert images.notes == ["1 of 2 boxes reach more than a pixel beyond their image; training cuts them"]


DROPPED = {
    "no width": (thing(5, box=(10, 5, 0, 8)), "object 5 of 1.png: box [10, 5, 0, 8] is less than a pixel wide or high"),
    "half a pixel": (thing(5, box=(10, 5, 12, 0.5)), "object 5 of 1.png: box [10, 5, 12, 0.5] is less than a pixel wide"),
    "negative": (thing(5, box=(10, 5, -12, 8)), "object 5 of 1.png: box [10, 5, -12, 8] is less than a pixel wide"),
    "right": (thing(5, box=(40, 5, 12, 8)), "object 5 of 1.png: box [40, 5, 12, 8] lies outside of the image of 40 x 30"),
    "above": (thing(5, box=(10, -9, 12, 9)), "object 5 of 1.png: box [10, -9, 12, 9] lies outside of the image of 40 x 30"),
    "NaN": (thing(5, box=(10, 5, math.nan, 8)), "object 5 of 1.png: box [10, 5, nan, 8], expected four numbers"),
    "infinite": (thing(5, box=(10, 5, math.inf, 8)), "object 5 of 1.png: box [10, 5, inf, 8], expected four numbers"),
    "three": (thing(5, bbox=[1, 2, 3]), "object 5 of 1.png: box [1, 2, 3], expected four numbers"),
    "words": (thing(5, bbox=["1", 2, 30, 4]), "object 5 of 1.png: box ['1', 2, 30, 4], expected four numbers"),
    "no box": ({"id": 5, "image_id": 1, "category_id": 3}, "object 5 of 1.png: box None, expected four numbers"),
    "category": (thing(5, category=4), "object 5 of 1.png: category 4, which is not defined"),
    "image": (thing(5, of=99), "object 5 of 99: an image that is not annotated"),
    "no id": ({"image_id": 2, "category_id": 9}, "object 2 of 2.png: category 9, which is not defined"),
}
NO_MASK = {
    "null": (None, "has no polygon of three points"),
    "nothing": ([], "has no polygon of three points"),
    "two points": ([[1, 2, 3, 4]], "has no polygon of three points"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is not of pairs of numbers"),
    "odd beside a good one": ([*polygon(10, 5, 12, 8), [1, 2, 3]], "a polygon is not of pairs of numbers"),
    "NaN": ([[1, 2, 3, math.nan, 5, 6]], "a polygon is not of pairs of numbers"),
    "other size": ({**runs(rectangle(1, 2, 9, 9)), "size": [WIDTH, HEIGHT]}, "size is [40, 30], expected height and width"),
    "no size": ({"counts": [1, 2, 3]}, "has no size"),
    "a number as size": ({"size": 5, "counts": [1200]}, "size is 5, expected a list of 2 integers"),
    "too few pixels": ({"size": [HEIGHT, WIDTH], "counts": [5, 7]}, "counts are 12 pixels in all, expected 1200"),
    "negative": (
        {"size": [HEIGHT, WIDTH], "counts": [-5, 1205]},
        "counts is [-5, 1205], expected a list of integers of at least 0",
    ),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "has no counts"),
    "too short": ({"size": [HEIGHT, WIDTH], "counts": "05"}, "counts cannot be decoded"),
    "no encoding": ({"size": [HEIGHT, WIDTH], "counts": "o" * 20}, "counts cannot be decoded"),
}


@pytest.mark.parametrize("case", DROPPED)
@pytest.mark.parametrize("masks", [False, True])
def test_objects_that_make_no_sense_are_left_out_by_name(folder, case, masks):
    record, line = DROPPED[case]
    images = CocoImages(folder([thing(1), record]), "val", masks)
    assert len(images.dropped) == 1
    assert images.dropped[0].startswith(line)
    assert [truth["bbox"] for truth in images.ground_truth["annotations"]] == [[10, 5, 12, 8]]
    assert len(images.target(images.read(0)[1])["boxes"]) == 1
    assert len(images) == 2


@pytest.mark.parametrize("case", NO_MASK)
def test_objects_without_a_usable_mask_are_left_out_where_masks_are_learnt(folder, case):
    segmentation, reason = NO_MASK[case]
    root = folder([thing(1), thing(5, segmentation=segmentation)])
    images = CocoImages(root, "val", masks=True)
    assert len(images.dropped) == 1
    assert images.dropped[0].startswith(f"object 5 of 1.png: segmentation: {reason}")
    assert images.target(images.read(0)[1])["masks"].shape == (1, HEIGHT, WIDTH)
    boxes = CocoImages(root, "val", masks=False)
    assert boxes.dropped == []
    assert len(boxes.target(boxes.read(0)[1])["boxes"]) == 2


# Augmentation


@pytest.mark.parametrize(("hflip", "vflip"), list(itertools.product((0.0, 1.0), repeat=2)))
def test_boxes_masks_and_pixels_move_together(shapes, hflip, vflip):
    images = CocoImages(shapes, "train", True, detection_transform(hflip, vflip, 0.0))
    objects = 0
    for index in range(len(images)):
        pixels, target, _ = images[0, index]
        original, record = images.read(index)
        axes = [axis for axis, flipped in ((2, hflip), (1, vflip)) if flipped]
        assert torch.equal(pixels, to_tensor(original).flip(axes))
        before = images.target(record)
        assert torch.equal(target["masks"], before["masks"].flip(axes))
        assert torch.equal(target["labels"], before["labels"])
        assert {type(value) for value in (pixels, *target.values())} == {torch.Tensor}
        if not len(target["boxes"]):
            continue
        objects += len(target["boxes"])
        boxes = masks_to_boxes(target["masks"])
        boxes[:, 2:] += 1  # from the last pixel to the edge
        assert (target["boxes"] - boxes).abs().max() <= 1
        for mask, label in zip(target["masks"], target["labels"].tolist(), strict=True):
            color = torch.tensor(COLORS[images.category_ids[label - 1]]) / 255
            right = (pixels - color[:, None, None]).abs().amax(0)[mask.bool()] < 1e-3
            assert right.float().mean() > 0.9  # to the edges, which polygons blur
    assert objects >= 8


def test_flips_are_drawn_at_random_and_jitter_leaves_objects_alone(shapes):
    images = CocoImages(shapes, "train", True, detection_transform(0.5, 0.0, 0.4))
    original, record = images.read(0)
    before = images.target(record)
    flipped = []
    for epoch in range(20):
        pixels, target, _ = images[epoch, 0]
        assert not torch.equal(pixels, to_tensor(original)) and not torch.equal(pixels, to_tensor(original).flip(2))
        assert pixels.min() >= 0 and pixels.max() <= 1
        same = torch.equal(target["masks"], before["masks"])
        assert same or torch.equal(target["masks"], before["masks"].flip(2))
        flipped.append(not same)
    assert 3 <= sum(flipped) <= 17


# COCO's numbers


def reference(truth, results, kind):
    """What pycocotools computes: the twelve numbers and the AP of each category."""
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = copy.deepcopy(truth)
        expected.createIndex()
        if results:
            # For masks without boxes, or it would take the areas of the boxes for those of the masks.
            kept = [{k: v for k, v in result.items() if kind == "bbox" or k != "bbox"} for result in results]
            found = expected.loadRes(copy.deepcopy(kept))
        else:
            found.dataset = {"images": truth["images"], "annotations": [], "categories": truth["categories"]}
            found.createIndex()
        evaluation = COCOeval(expected, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = {}
    for index, category in enumerate(evaluation.params.catIds):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        there = precision[precision > -1]
        per_class[expected.cats[category]["name"]] = there.mean() if there.size else -1
    return dict(zip(COCO_METRICS, evaluation.stats, strict=True)), per_class


def detections(images, rng, decimals):
    """Make detections of the truth: moved, of other labels, doubled, missing, and some of nothing at all."""
    results = []
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        height, width, classes = record["height"], record["width"], len(images.class_names)
        boxes, labels, masks = [], [], []
        for box, label, mask in zip(target["boxes"].numpy(), target["labels"].tolist(), target["masks"].numpy(), strict=True):
            for _ in range(rng.choice([0, 1, 2], p=[0.1, 0.7, 0.2])):
                side = np.tile(box[2:] - box[:2], 2)
                boxes.append(box + rng.normal(0, rng.choice([0.02, 0.1]), 4) * side)
                labels.append(label if rng.random() < 0.85 else int(rng.integers(1, classes + 1)))
                masks.append(np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1)))
        for _ in range(rng.integers(0, 4) if index else 120):  # more in one image than count
            corner, side = rng.uniform(0, 0.6, 2) * (width, height), rng.uniform(0.05, 0.4, 2) * (width, height)
            boxes.append(np.concatenate([corner, corner + side]))
            labels.append(int(rng.integers(1, classes + 1)))
            mask = np.zeros((height, width), dtype=np.uint8)
            left, top, right, bottom = boxes[-1].astype(int)
            mask[top : bottom + 1, left : right + 1] = 1
            masks.append(mask)
        if boxes:
            found = {
                "boxes": torch.tensor(np.array(boxes)),
                "labels": torch.tensor(labels),
                "scores": torch.tensor(rng.random(len(boxes)).round(decimals)),
                "masks": torch.from_numpy(np.stack(masks))[:, None].float(),
            }
            results += to_results(found, record["id"], images.category_ids)
    return results


def compare(images, truth, results, kind):
    numbers, per_class = coco_metrics(images.ground_truth, results, kind)
    expected, expected_per_class = reference(truth, results, kind)
    assert list(numbers) == list(COCO_METRICS)
    assert numbers == pytest.approx(expected, abs=1e-6)
    assert {row["class"]: row["AP"] for row in per_class} == pytest.approx(expected_per_class, abs=1e-6)
    assert [row["index"] for row in per_class] == list(range(len(images.class_names)))
    assert [row["class"] for row in per_class] == images.class_names
    return numbers


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("seed", "decimals"), [(0, 9), (1, 1)], ids=["scores", "equal scores"])
def test_the_numbers_are_those_of_pycocotools_on_real_annotations(shared, kind, seed, decimals):
    data = shared("data/coco-tiny")
    images = CocoImages(data, "val", masks=True)
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())
    numbers = compare(images, truth, detections(images, np.random.default_rng(seed), decimals), kind)
    assert all(0.05 < value < 0.95 for value in numbers.values())
    assert len(set(numbers.values())) == 12


@pytest.fixture(scope="session")
def sizes(tmp_path_factory):
    """Shapes in images of many sizes, so that there are small, medium and large ones; one category has no object."""
    root = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    images, objects = [], []
    for i in range(6):
        width, height = (int(side) for side in rng.integers(200, 320, 2))
        images.append(image(i + 1, width=width, height=height))
        photo(root / "images" / f"{i + 1}.png", (width, height))
        for _ in range(9):
            side = [int(n) for n in rng.choice([14, 24, 60, 90, 130], 2)]
            left, top = (int(rng.integers(0, whole - part)) for whole, part in zip((width, height), side, strict=True))
            rows, columns = np.ogrid[:height, :width]
            centre = top + side[1] / 2, left + side[0] / 2
            inside = ((rows - centre[0]) / side[1]) ** 2 + ((columns - centre[1]) / side[0]) ** 2 <= 0.25
            crowd = int(rng.random() < 0.1)
            box, mask = [left, top, *side], runs(inside)
            category = int(rng.choice([3, 7]))
            fields = {"iscrowd": crowd, "segmentation": mask, "area": int(inside.sum())}
            objects.append(thing(len(objects) + 1, i + 1, category, box, **fields))
    write_coco(root, "val", images, objects, [*CATEGORIES, {"id": 5, "name": "nothing"}])
    return root


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(("seed", "decimals"), [(0, 9), (1, 1)], ids=["scores", "equal scores"])
def test_the_numbers_are_those_of_pycocotools(sizes, kind, seed, decimals):
    images = CocoImages(sizes, "val", masks=True)
    truth = json.loads(annotations(sizes).read_text())
    assert {a["iscrowd"] for a in truth["annotations"]} == {0, 1}
    results = detections(images, np.random.default_rng(seed), decimals)
    numbers = compare(images, truth, results, kind)
    assert all(0 < value < 1 for value in numbers.values())
    _, per_class = coco_metrics(images.ground_truth, results, kind)
    assert [row["class"] for row in per_class if row["AP"] == -1] == ["nothing"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_detections_score_one(shapes, kind):
    images = CocoImages(shapes, "val", masks=True)
    truth = json.loads(annotations(shapes).read_text())
    results = []
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        found = {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        results += to_results(found, record["id"], images.category_ids)
    for record in truth["annotations"]:  # pycocotools takes 0 for no object
        record["id"] += 1
    numbers = compare(images, truth, results, kind)
    assert numbers["AP"] == numbers["AR100"] == 1
    assert numbers["AP_large"] == -1  # there is none


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("data", ["shapes", "sizes"])
def test_nothing_found_scores_zero_where_there_is_something_to_find(request, data, kind):
    root = request.getfixturevalue(data)
    images = CocoImages(root, "val", masks=True)
    numbers = compare(images, json.loads(annotations(root).read_text()), [], kind)
    assert numbers["AP"] == numbers["AR100"] == 0


def test_the_numbers_are_the_same_whenever_they_are_computed(sizes):
    images = CocoImages(sizes, "val", masks=True)
    results = detections(images, np.random.default_rng(0), 2)
    before = copy.deepcopy(results)
    first, *again = [coco_metrics(images.ground_truth, results, kind) for kind in ("segm", "bbox", "segm")]
    assert results == before
    assert again[1] == first != again[0]


@pytest.mark.parametrize("names", [("a", "b"), ("0007", "0008")])
def test_images_may_be_numbered_by_words(folder, names):
    images = CocoImages(folder([thing(i, of=n) for i, n in enumerate(names)], [image(n) for n in names]), "val", masks=False)
    for _ in range(2):  # epochs
        results = []
        for index in range(2):
            found = {**images.target(images.read(index)[1]), "scores": torch.ones(1)}
            results += to_results(found, images[index][1], images.category_ids)
        assert [result["image_id"] for result in results] == list(names)
        assert coco_metrics(images.ground_truth, results, "bbox")[0]["AP"] == 1
        assert [record["id"] for record in images.ground_truth["images"]] == list(names)
