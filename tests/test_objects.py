"""Objects in other tools' formats are those of the COCO data set that they were written from; what is wrong in them is said."""

import json
import re

import numpy as np
import pytest
import torch
from shapes import write_shapes
from written import FORMATS, blank, damage, unsplit

from groupmixformer.cli.main import main
from groupmixformer.tasks.detection.data import CocoImages


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def few(source, out, number=6, boxes=False):
    """Copy the first images of a COCO data set, with their objects."""
    for split in ("train", "val"):
        content = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        content["images"] = content["images"][:number]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        for record in content["annotations"] if boxes else []:
            record.pop("segmentation", None)
        (out / "annotations").mkdir(parents=True, exist_ok=True)
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            (out / "images").mkdir(exist_ok=True)
            (out / "images" / image["file_name"]).write_bytes((source / "images" / image["file_name"]).read_bytes())
    return out


def targets(images):
    """Boxes, names of the classes and masks by the names of the images."""
    found = {}
    for index in range(len(images)):
        _, record = images.read(index)
        target = images.target(record)
        names = [images.class_names[label - 1] for label in target["labels"].tolist()]
        found[record["file_name"].rpartition("/")[2]] = (target["boxes"].as_subclass(torch.Tensor), names, target.get("masks"))
    return found


def assert_same(images, original, atol=1e-3):
    ours, theirs = targets(images), targets(original)
    assert set(ours) == set(theirs)
    for name, (boxes, classes, masks) in theirs.items():
        assert classes == ours[name][1], name
        torch.testing.assert_close(ours[name][0], boxes, atol=atol, rtol=0)
        if masks is not None:
            assert (ours[name][2] != masks).sum() <= 1e-3 * masks.sum()  # of shares of the image, pixels at the edge
    assert images.skipped == [] and not images.dropped
    used = [name for name, count in zip(original.class_names, original.count_classes()[0], strict=True) if count]
    assert set(images.class_names) <= set(original.class_names) and set(images.class_names) >= set(used)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("source", ["bccd", "coco-tiny"])
def test_real_boxes_are_those_of_coco(shared, tmp_path, name, source):
    root = few(shared(f"data/{source}"), tmp_path / "coco", boxes=True)
    FORMATS[name](root, tmp_path / "other", ["train", "val"])
    for split in ("train", "val"):
        images = CocoImages(tmp_path / "other", split, masks=False)
        assert_same(images, CocoImages(root, split, masks=False))
        assert sum(map(len, images.class_names))


@pytest.mark.parametrize("name", ["yolo", "roboflow", "labelme", "cvat"])
def test_polygons_are_the_masks_of_coco(shared, tmp_path, name):
    root = few(shared("data/coco-tiny"), tmp_path / "coco")
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    if name in ("yolo", "cvat"):  # which have no objects in several pieces
        content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"] and len(a["segmentation"]) == 1]
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    for record in content["annotations"]:  # COCO's boxes come from the masks
        xs, ys = ([v for p in record["segmentation"] for v in p[at::2]] for at in (0, 1))
        record["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    file.write_text(json.dumps(content))
    kwargs = {"masks": True} if name == "yolo" else {}
    FORMATS[name](root, tmp_path / "other", ["train"], **kwargs)
    assert_same(CocoImages(tmp_path / "other", "train", masks=True), CocoImages(root, "train", masks=True))


def test_a_set_that_is_not_split_is_read_whole_or_by_its_file(shapes, tmp_path):
    unsplit(shapes, tmp_path / "other", ["val"])
    for path in (tmp_path / "other", tmp_path / "other" / "annotations" / "instances_default.json"):
        images = CocoImages(path, "val", masks=True, or_whole=True)
        assert_same(images, CocoImages(shapes, "val", masks=True))
        assert images.notes == ["it is not split: all of it is taken"]
        folder = ", or name the folder of all parts" * path.is_file()
        with pytest.raises(ValueError, match=f"not split, expected a part train: deal it out with --val-share 0.2{folder}$"):
            CocoImages(path, "train", masks=True)


def test_the_category_that_stands_for_all_is_said_to_be_left_out(shapes, tmp_path):
    FORMATS["roboflow"](shapes, tmp_path, ["train"])
    images = CocoImages(tmp_path, "train", masks=False)
    assert images.class_names == ["square", "disc"]
    assert images.notes == ["the category things, which stands for the others, is left out"]


# What is wrong in YOLO


@pytest.fixture
def labelled(tmp_path):
    """YOLO with one image of 40 x 30 and two classes; its label is to be written."""
    blank(tmp_path / "images" / "train" / "1.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [disc, square]\n")

    def write(*lines):
        (tmp_path / "labels" / "train" / "1.txt").write_text("\n".join(lines))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 20 15 10 10", "holds 20, expected shares of the image's width and height, from 0 to 1"),
        ("0 0.5 0.5 1.2 0.5", "holds 1.2, expected shares"),
        ("0 0.5 -0.1 0.2 0.5", "holds -0.1, expected shares"),
        ("0 0.5 nan 0.2 0.5", "holds nan, expected shares"),
        ("2 0.5 0.5 0.2 0.2", "class is 2, expected 0 to 1, a number of the names"),
        ("-1 0.5 0.5 0.2 0.2", "class is -1, expected 0 to 1"),
        ("0.5 0.5 0.5 0.2 0.2", "class is 0.5, expected 0 to 1"),
        ("disc 0.5 0.5 0.2 0.2", "is 'disc 0.5 0.5 0.2 0.2', expected numbers"),
        ("0 0.5 0.5 0.2", "has 4 values, expected 5, class, x, y, width and height, or"),
        ("0 0.5 0.5 0.2 0.2 0.9", "has 6 values, expected 5"),  # a score
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1", "has 8 values, expected 5"),
    ],
)
def test_a_wrong_line_of_yolo_is_refused(labelled, line, words):
    root = labelled("0 0.5 0.5 0.2 0.2", "", line)
    with pytest.raises(ValueError, match=re.escape(f"labels/train/1.txt: line 3: {words}")):
        CocoImages(root, "train", masks=False)


def test_lines_of_yolo_are_boxes_and_polygons_in_pixels(labelled):
    root = labelled("1 0.5 0.5 0.25 0.2", "0 0.1 0.1 0.5 0.1 0.5 0.5")
    images = CocoImages(root, "train", masks=False)
    target = images.target(images.read(0)[1])
    assert target["boxes"].tolist() == [[15, 12, 25, 18], [4, 3, 20, 15]]
    assert [images.class_names[label - 1] for label in target["labels"]] == ["square", "disc"]
    masks = CocoImages(root, "train", masks=True)
    assert masks.dropped == ["object 1 of 1.png: segmentation: has no polygon of three points"]


def test_keypoints_of_yolo_are_no_polygon(labelled):
    root = labelled("0 0.5 0.5 0.5 0.2 0.1 0.1 2 0.9 0.9 2")
    damage(root / "data.yaml", "names", "kpt_shape: [2, 3]\nnames")
    with pytest.raises(ValueError, match="segmentation"):
        CocoImages(root, "train", masks=True)
    images = CocoImages(root, "train", masks=False)
    assert images.target(images.read(0)[1])["boxes"].tolist() == [[10, 12, 30, 18]]


def test_images_and_labels_without_each_other_are_told(labelled):
    root = labelled("0 0.5 0.5 0.2 0.2")
    blank(root / "images" / "train" / "2.png")  # background
    (root / "labels" / "train" / "3.txt").write_text("0 0.5 0.5 0.2 0.2")
    (root / "images" / "train" / "4.png").write_bytes(b"no image")
    images = CocoImages(root, "train", masks=False)
    assert len(images) == 2 and images.target(images.read(1)[1])["boxes"].shape == (0, 4)
    gone, unreadable = images.skipped
    assert gone.endswith("labels/train/3.txt: has no image")
    assert "images/train/4.png: not a readable image" in unreadable
    (root / "labels" / "train" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"images/train: holds 3 images, none of which has labels, expected such as .*/1\.txt"):
        CocoImages(root, "train", masks=False)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("names: [disc]\nnc: 2", "nc is 2 and names has 1, expected as many"),
        ("names: {1: disc, 2: square}", "names are of 1, 2, expected 0 to 1"),
        ("names: disc", "names is 'disc', expected a list of texts"),
        ("names: [disc, disc]", "names has disc twice"),
        ("names: [disc", "not YAML"),
    ],
)
def test_a_wrong_data_yaml_is_refused(labelled, yaml, words):
    root = labelled("0 0.5 0.5 0.2 0.2")
    (root / "data.yaml").write_text(f"train: images/train\n{yaml}\n")
    with pytest.raises(ValueError, match=f"data.yaml: {words}"):
        CocoImages(root, "train", masks=False)


def test_a_folder_that_data_yaml_names_must_be_there(labelled):
    root = labelled("0 0.5 0.5 0.2 0.2")
    damage(root / "data.yaml", "images/train", "images/gone")
    with pytest.raises(ValueError, match="images/gone: no such folder, expected one of images"):
        CocoImages(root, "train", masks=False)


def test_yolo_takes_lists_of_images_and_names_from_a_text(labelled, shapes, tmp_path):
    root = labelled("1 0.5 0.5 0.25 0.2")
    blank(root / "images" / "train" / "2.png")
    (root / "labels" / "train" / "2.txt").write_text("0 0.5 0.5 0.25 0.2")
    (root / "train.txt").write_text("./images/train/1.png\n")
    (root / "data.yaml").write_text("train: train.txt\nnames: [disc, square]\n")
    assert list(targets(CocoImages(root, "train", masks=False))) == ["1.png"]
    (root / "data.yaml").unlink()
    bare = CocoImages(root, "train", masks=False)
    assert bare.class_names == ["0", "1"] and "numbers are taken" in bare.notes[0]
    (root / "classes.txt").write_text("ring\nstar\n")
    assert CocoImages(root, "train", masks=False).class_names == ["ring", "star"]


# What is wrong in XML and labelme


@pytest.fixture
def voc(shapes, tmp_path):
    FORMATS["voc"](shapes, tmp_path / "voc", ["train", "val"])
    return tmp_path / "voc"


def test_pixels_of_pascal_voc_count_from_one_unless_a_box_begins_at_zero(voc, shapes, tmp_path):
    images = CocoImages(voc, "val", masks=False)
    assert images.notes == ["pixels of its boxes are counted from 1, as Pascal VOC has them"]
    FORMATS["voc"](shapes, tmp_path / "other", ["train", "val"], first=0)
    file = tmp_path / "other" / "Annotations" / "train-0.xml"  # another part tells as well
    damage(file, re.search("<xmin>.*?</xmin>", file.read_text())[0], "<xmin>0</xmin>")
    others = CocoImages(tmp_path / "other", "val", masks=False)
    assert others.notes == ["pixels of its boxes are counted from 0, as the least corner of its boxes is 0"]
    assert_same(others, images)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"<xmin>.*?</xmin>", "<xmin>left</xmin>", r'object\[0\]: bndbox: xmin is "left", expected a finite number'),
        (r"<xmin>.*?</xmin>", "<xmin>inf</xmin>", r"object\[0\]: bndbox: xmin is inf, expected a finite number"),
        (r"<ymax>.*?</ymax>", "", r"object\[0\]: bndbox: has no ymax, expected a finite number"),
        (r"<bndbox>.*?</bndbox>", "", r"object\[0\]: has no bndbox, expected xmin, ymin, xmax and ymax"),
        (r"<name>.*?</name>", "<name> </name>", r"object\[0\]: has no name, expected that of its class"),
        (r"</annotation>", "", r"not XML: "),
        (r"<width>.*?</width>", "<width>wide</width>", r'size: width is "wide", expected an integer'),
    ],
)
def test_wrong_xml_is_refused(voc, old, new, words):
    file = voc / "Annotations" / "val-0.xml"
    file.write_text(re.sub(old, new, file.read_text(), count=1))
    with pytest.raises(ValueError, match=rf"Annotations/val-0\.xml: {words}"):
        CocoImages(voc, "val", masks=False)


def test_swapped_corners_missing_images_and_names_are_told(voc):
    file = voc / "Annotations" / "val-0.xml"
    file.write_text(re.sub("<xmin>.*?</xmin>", "<xmin>63</xmin>", file.read_text(), count=1))
    (voc / "JPEGImages" / "val-1.png").unlink()
    lists = voc / "ImageSets" / "Main" / "val.txt"
    lists.write_text(lists.read_text() + "\ngone\n")
    images = CocoImages(voc, "val", masks=False)
    (dropped,) = images.dropped
    assert re.fullmatch(
        r"object 1 of val-0\.png: box \[62.0, .*\] is less than a pixel wide or high: its corners are swapped", dropped
    )
    gone, missing = images.skipped
    assert gone.endswith("Annotations/gone.xml: no such file, which val.txt names")
    assert re.search(r"Annotations/val-1\.xml: has no image val-1 in .*JPEGImages", missing)


def test_cvat_has_boxes_that_are_turned_ellipses_and_masks(tmp_path):
    blank(tmp_path / "images" / "1.png")
    shapes = """<box label="a" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90.00"/>
      <ellipse label="b" cx="20" cy="15" rx="8" ry="4"/>
      <mask label="a" left="5" top="6" width="4" height="2" rle="1, 3, 2, 2"/><points label="b" points="1,2"/>"""
    image = f'<image id="7" name="1.png" width="40" height="30">{shapes}</image>'
    (tmp_path / "annotations.xml").write_text(f"<annotations>{image}</annotations>")
    images = CocoImages(tmp_path, "val", masks=True, or_whole=True)
    target = images.target(images.read(0)[1])
    torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor)[0], torch.tensor([13.0, 7, 17, 17]))
    torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor)[1], torch.tensor([12.0, 11, 28, 19]))
    assert target["boxes"][2].tolist() == [6, 6, 9, 8]
    assert target["masks"][2].nonzero().tolist() == [[6, 6], [6, 7], [6, 8], [7, 7], [7, 8]]
    assert images.class_names == ["a", "b"] and "left out: 1 points" in images.notes
    for old, new, words in [
        ("1, 3, 2, 2", "1, 3", r"image\[0\]: mask\[2\]: rle has 4 pixels in all, expected 4 x 2"),
        ('xtl="10"', 'xtl="x"', r'image\[0\]: box\[0\]: xtl is "x", expected a finite number'),
        ('width="40"', "", r"image\[0\]: width is null, expected an integer"),
    ]:
        file = tmp_path / "annotations.xml"
        text = file.read_text()
        damage(file, old, new)
        with pytest.raises(ValueError, match=rf"annotations\.xml: {words}"):
            CocoImages(tmp_path, "val", masks=True, or_whole=True)
        file.write_text(text)
    damage(file, "<annotations>", '<annotations><track id="0" label="a"></track>')
    with pytest.raises(ValueError, match="is CVAT's for video, expected CVAT for images"):
        CocoImages(tmp_path, "val", masks=False, or_whole=True)


def test_labelme_groups_shapes_and_says_what_it_leaves_out(tmp_path):
    blank(tmp_path / "1.png")
    shape = {"label": "a", "group_id": 1, "shape_type": "rectangle"}
    shapes = [
        {**shape, "points": [[10, 8], [4, 2]]},
        {**shape, "points": [[20, 2], [24, 12]]},
        {"label": "a", "points": [[30, 20], [35, 20]], "shape_type": "circle"},
        {"label": "a", "points": [[1, 1]], "shape_type": "point"},
    ]
    content = {"shapes": shapes, "imagePath": "..\\photos\\1.png", "imageHeight": None, "imageWidth": None}
    file = tmp_path / "1.json"
    file.write_text(json.dumps(content))
    images = CocoImages(tmp_path, "val", masks=True, or_whole=True)
    target = images.target(images.read(0)[1])
    torch.testing.assert_close(
        target["boxes"].as_subclass(torch.Tensor), torch.tensor([[4.0, 2, 24, 12], [25, 15, 35, 25]]), atol=0.1, rtol=0
    )
    assert target["masks"][0].sum() == 6 * 6 + 4 * 10
    assert abs(target["masks"][1].sum() - np.pi * 25) < 8
    assert "shapes left out: 1 point" in images.notes
    content["shapes"][2]["points"] = [[30, "x"], [35, 20]]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1\.json: shapes\[2\]: points is \[30, .x.\], expected a list of 2 finite numbers"):
        CocoImages(tmp_path, "val", masks=True, or_whole=True)
    del content["imagePath"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1\.json: has no imagePath, expected a text"):
        CocoImages(tmp_path, "val", masks=True, or_whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_a_detector_is_trained_and_measured_on_a_format(shapes, tmp_path, capsys, name):
    FORMATS[name](shapes, tmp_path / "data", ["train", "val"])
    words = ["--detector.architecture", "retinanet", "--detector.fpn-channels", "32", "--image-size", "64", "--epochs", "1"]
    words += [
        "--model",
        "test_convnext",
        "--batch-size",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", "bccd", "--data", str(tmp_path / "data"), *words]) == 0
    capsys.readouterr()
    for data in (tmp_path / "data", shapes):
        assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--device", "cpu", "--json"]) == 0
        measured = json.loads(capsys.readouterr().out)
        assert measured["images"] == len(CocoImages(shapes, "val", masks=False)) and "box_AP" in measured
