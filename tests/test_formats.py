"""Formats of data sets: what a path holds."""

import re

import pytest

from groupmixformer.data.formats import WHOLE, recognise

COCO = '{"images": [], "annotations": []}'
YAML = "names: [disc, square]\ntrain: images/train\nval: images/val\n"
LABELME = '{"version": "5.0", "flags": {}, "shapes": []}'
CVAT = '<annotations><image id="0" name="1.jpg" subset="Train"/><image id="1" name="2.jpg" subset="Validation"/></annotations>'
# Format, names of files with what they hold, and the parts with the first thing that is read of each.
LAYOUTS = {
    "coco": (
        "coco",
        {"annotations/instances_train2017.json": "", "annotations/instances_val2017.json": ""},
        {"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"},
    ),
    "coco beside images": ("coco", {"valid.json": "", "train.json": ""}, {"train": "train.json", "val": "valid.json"}),
    "coco unsplit": (
        "coco",
        {"annotations/instances_default.json": "", "images/1.jpg": ""},
        {WHOLE: "annotations/instances_default.json"},
    ),
    "coco of any name": ("coco", {"labels.json": COCO, "data/1.jpg": ""}, {WHOLE: "labels.json"}),
    "roboflow": (
        "coco",
        {"train/_annotations.coco.json": COCO, "train/1.jpg": "", "valid/_annotations.coco.json": COCO},
        {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
    ),
    "yolo": (
        "yolo",
        {"data.yaml": YAML, "images/train/1.jpg": "", "images/val/1.jpg": ""},
        {"train": "images/train", "val": "images/val"},
    ),
    "yolo of roboflow": (
        "yolo",
        {"data.yaml": YAML.replace("images/train", "../train/images"), "train/images/1.jpg": "", "images/val/1.jpg": ""},
        {"train": "train/images", "val": "images/val"},
    ),
    "yolo without yaml": (
        "yolo",
        {"images/train/1.jpg": "", "labels/train/1.txt": "", "images/val/2.jpg": "", "labels/val/2.txt": ""},
        {"train": "images/train", "val": "images/val"},
    ),
    "yolo unsplit": (
        "yolo",
        {"classes.txt": "", "notes.json": '{"categories": []}', "images/1.jpg": "", "labels/1.txt": ""},
        {WHOLE: "images"},
    ),
    "yolo of labelImg": ("yolo", {"classes.txt": "", "1.jpg": "", "1.txt": ""}, {WHOLE: "."}),
    "voc": (
        "voc",
        {
            "JPEGImages/1.jpg": "",
            "Annotations/1.xml": "<annotation>",
            "ImageSets/Main/train.txt": "1",
            "ImageSets/Main/val.txt": "",
            "ImageSets/Main/cat_train.txt": "1 -1",
        },
        {"train": "Annotations", "val": "Annotations"},
    ),
    "voc unsplit": ("voc", {"images/1.jpg": "", "annotations/1.xml": "<annotation>"}, {WHOLE: "annotations"}),
    "voc of roboflow": (
        "voc",
        {"train/1.jpg": "", "train/1.xml": "<annotation>", "valid/2.xml": "<annotation>"},
        {"train": "train", "val": "valid"},
    ),
    "voc masks": (
        "voc-masks",
        {
            "JPEGImages/1.jpg": "",
            "SegmentationClass/1.png": "",
            "ImageSets/Segmentation/train.txt": "1",
            "ImageSets/Segmentation/val.txt": "1",
        },
        {"train": "JPEGImages", "val": "JPEGImages"},
    ),
    "labelme": (
        "labelme",
        {"train/1.json": LABELME, "train/1.jpg": "", "val/2.json": LABELME},
        {"train": "train", "val": "val"},
    ),
    "labelme unsplit": ("labelme", {"1.json": LABELME, "1.jpg": ""}, {WHOLE: "."}),
    "cvat": ("cvat", {"annotations.xml": CVAT, "images/1.jpg": ""}, {"train": "annotations.xml", "val": "annotations.xml"}),
    "masks": (
        "masks",
        {"classes.json": "{}", "images/val/1.jpg": "", "images/train/1.jpg": "", "masks/train/1.png": ""},
        {"train": "images/train", "val": "images/val"},
    ),
    "masks of camvid": (
        "masks",
        {"class_dict.csv": "", "train/1.png": "", "train_labels/1_L.png": "", "val/1.png": "", "val_labels/1_L.png": ""},
        {"train": "train", "val": "val"},
    ),
    "masks of cvat": (
        "masks",
        {"labelmap.txt": "", "JPEGImages/1.jpg": "", "SegmentationClass/1.png": "", "ImageSets/Segmentation/train.txt": "1"},
        {"train": "JPEGImages"},
    ),
    "masks of roboflow": ("masks", {"train/_classes.csv": "", "train/1.jpg": "", "train/1_mask.png": ""}, {"train": "train"}),
    "masks unsplit": ("masks", {"label_colors.txt": "", "images/1.jpg": "", "labels/1.png": ""}, {WHOLE: "images"}),
    "ade20k": (
        "ade20k",
        {"images/training/1.jpg": "", "annotations/training/1.png": "", "annotations/validation/1.png": ""},
        {"train": "images/training", "val": "images/validation"},
    ),
    "cityscapes": (
        "cityscapes",
        {"leftImg8bit/train/ulm/1_leftImg8bit.png": "", "gtFine/train/ulm/1_gtFine_labelIds.png": ""},
        {"train": "leftImg8bit/train"},
    ),
    "classes": ("classes", {"train/cat/1.jpg": "", "val/cat/1.jpg": ""}, {"train": "train", "val": "val"}),
    "classes unsplit": ("classes", {"cat/1.jpg": "", "dog/1.jpg": ""}, {WHOLE: "."}),
}


def lay_out(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_path_is_recognised(tmp_path, layout):
    name, files, parts = LAYOUTS[layout]
    lay_out(tmp_path, {**files, ".DS_Store": ""})
    found = recognise(tmp_path)
    assert (found.format, {part: read[0] for part, read in found.parts.items()}) == (
        name,
        {part: tmp_path / place for part, place in parts.items()},
    )
    assert list(found.parts) == list(parts)
    assert found.split == (set(parts) >= {"train", "val"})
    for task in found.tasks:
        assert recognise(tmp_path, task) == found
        assert task in found.text
    for other in {"classification", "detection", "segmentation"} - set(found.tasks):
        with pytest.raises(ValueError, match=f"expected one for {other} .*; {re.escape(found.title)}, for {found.tasks[0]}"):
            recognise(tmp_path, other)


@pytest.mark.parametrize(
    ("layout", "file"), [("coco of any name", "labels.json"), ("yolo", "data.yaml"), ("cvat", "annotations.xml")]
)
def test_a_file_is_recognised_by_its_path(tmp_path, layout, file):
    lay_out(tmp_path, LAYOUTS[layout][1])
    found = recognise(tmp_path / file)
    assert (found.format, found.parts) == (LAYOUTS[layout][0], recognise(tmp_path).parts)


def test_parts_are_found_by_their_other_names(tmp_path):
    lay_out(tmp_path, LAYOUTS["roboflow"][1])
    found = recognise(tmp_path)
    assert [found.part(name) for name in ("val", "valid", "validation", "training")] == ["val", "val", "val", "train"]
    with pytest.raises(ValueError, match=r"expected a part test; found train in .*/train/_annotations.coco.json; val in .*"):
        found.part("test")


def test_what_is_not_split_is_taken_whole_where_that_is_wanted(tmp_path):
    lay_out(tmp_path, LAYOUTS["labelme unsplit"][1])
    found = recognise(tmp_path)
    assert found.part("val", or_whole=True) == WHOLE
    assert found.undivided() == WHOLE
    with pytest.raises(ValueError, match="labelme, not split, expected a part val: deal it out with --val-share"):
        found.part("val")


def test_what_is_split_is_not_dealt_out(tmp_path):
    lay_out(tmp_path, LAYOUTS["voc of roboflow"][1])
    with pytest.raises(ValueError, match="Pascal VOC, with the parts train, val, expected a data set that is not split"):
        recognise(tmp_path).undivided()


def test_what_is_unknown_is_said_with_what_is_there(tmp_path):
    lay_out(tmp_path, {"notes.txt": "", "a.csv": ""})
    with pytest.raises(
        ValueError, match=r"expected a data set \(labels in a CSV file, Cityscapes, .*\); found a\.csv, notes\.txt"
    ):
        recognise(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        recognise(tmp_path / "nowhere")
