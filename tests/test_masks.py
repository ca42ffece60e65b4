"""Masks in other tools' layouts mean the same as in ours; what is wrong in them is said."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import write_shapes
from written import FORMATS, blank, damage

from groupmixformer.cli.main import main
from groupmixformer.tasks.detection.data import CocoImages
from groupmixformer.tasks.segmentation.data import IGNORE, SemanticImages
from groupmixformer.tasks.segmentation.masks import CITYSCAPES

NAMES = ["sky", "traffic light", "car"]
COLORS = [(128, 128, 128), (0, 128, 64), (64, 0, 128)]
VOID = 255


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def scenes(seed=0, number=3):
    """Yield a name, an image, and numbers (H, W) of the classes and of what does not count."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        yield (
            f"scene{i}",
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)),
            rng.choice([0, 1, 2, VOID], (20, 30)),
        )


def colored(numbers):
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:3] = COLORS
    return Image.fromarray(table[numbers])


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def parts(pattern, mask, draw=colored):
    """Write the scenes of two parts, by patterns of their paths."""

    def into(root):
        for seed, part in enumerate(("train", "val")):
            for name, image, numbers in scenes(seed):
                write(root / pattern.format(part=part, name=name), image)
                write(root / mask.format(part=part, name=name), draw(numbers))

    return into


def ours(root, color=True, draw=colored):
    classes = [{"id": i, "name": name, **({"color": COLORS[i]} if color else {})} for i, name in enumerate(NAMES)]
    root.mkdir(exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": [*classes, {"id": 9, "name": "nothing", "color": [0, 0, 0]}]}))
    parts("images/{part}/{name}.jpg", "masks/{part}/{name}.png", draw)(root)


def kaggle(root):
    parts("{part}/{name}.png", "{part}_labels/{name}_L.png")(root)
    rows = [f"{name}, {', '.join(map(str, color))}" for name, color in zip(NAMES, COLORS, strict=True)]
    (root / "class_dict.csv").write_text("\n".join(["name, r, g, b", *rows, "Void, 0, 0, 0", ""]))


def camvid(root):
    parts("images/{part}/{name}.png", "labels/{part}/{name}_L.png")(root)
    rows = [f"{' '.join(map(str, color))}\t\t{name}" for name, color in zip(NAMES, COLORS, strict=True)]
    (root / "label_colors.txt").write_text("\n".join([*rows, "0 0 0\t\tVoid"]))


def cvat(root):
    for part in ("train", "val"):
        listed = []
        for name, image, numbers in scenes(("train", "val").index(part)):
            listed.append(f"{part}-{name}")
            write(root / "JPEGImages" / f"{listed[-1]}.jpg", image)
            write(root / "SegmentationClass" / f"{listed[-1]}.png", colored(numbers))
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(listed))
    rows = [f"{name}:{','.join(map(str, color))}::" for name, color in zip(NAMES, COLORS, strict=True)]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", "void:0,0,0::", *rows]))


def roboflow(root):
    def draw(numbers):
        return Image.fromarray(np.array([1, 2, 5, *[0] * 253], dtype=np.uint8)[numbers])

    parts("{part}/{name}.jpg", "{part}/{name}_mask.png", draw)(root)
    for part in ("train", "val"):
        rows = ["Pixel Value, Class", "0, unlabeled", *(f"{i}, {name}" for i, name in zip((1, 2, 5), NAMES, strict=True))]
        (root / part / "_classes.csv").write_text("\n".join(rows))


def names_alone(root):
    parts("images/{part}/{name}.jpg", "masks/{part}/{name}.png", lambda n: Image.fromarray(n.astype(np.uint8)))(root)
    (root / "labels.txt").write_text("\n".join(NAMES))


@pytest.mark.parametrize("layout", [kaggle, camvid, cvat, roboflow, names_alone])
def test_masks_of_a_layout_are_the_numbers_that_they_were_written_from(tmp_path, layout):
    layout(tmp_path)
    for seed, part in enumerate(("train", "val")):
        images = SemanticImages(tmp_path, part)
        assert images.class_names == NAMES and images.skipped == [] and len(images) == 3
        if layout not in (roboflow, names_alone):
            assert [tuple(color) for color in images.colors] == COLORS
        for index, (_, image, numbers) in enumerate(scenes(seed)):
            pixels, labels = images.read(index)
            assert pixels.size == image.size
            assert np.array_equal(labels.numpy(), numbers)
        assert images.count_classes()[0] == [sum((n == i).sum() for *_, n in scenes(seed)) for i in range(3)]


def test_three_channels_are_read_by_the_colours_of_classes_json_if_it_has_them(tmp_path):
    ours(tmp_path / "colored")
    ours(tmp_path / "plain", color=False)
    images = SemanticImages(tmp_path / "colored", "train")
    for index, (_, _, numbers) in enumerate(scenes(0)):
        assert np.array_equal(images.read(index)[1].numpy(), np.where(numbers == VOID, 3, numbers))
    with pytest.raises(ValueError, match="is of mode RGB, expected one channel of class numbers"):
        SemanticImages(tmp_path / "plain", "train")


def test_masks_of_pascal_voc(tmp_path):
    name, image, numbers = next(scenes())
    write(tmp_path / "JPEGImages" / f"{name}.jpg", image)
    mask = Image.fromarray(numbers.astype(np.uint8), mode="P")
    mask.putpalette(list(range(256)) * 3)
    write(tmp_path / "SegmentationClass" / f"{name}.png", mask)
    images = SemanticImages(tmp_path, "val", or_whole=True)
    assert images.class_names[:3] == ["background", "aeroplane", "bicycle"] and len(images.class_names) == 21
    assert np.array_equal(images.read(0)[1].numpy(), np.where(numbers == VOID, IGNORE, numbers))


def test_cityscapes_counts_nineteen_classes(tmp_path):
    numbers = np.arange(34).repeat(30).reshape(34, 30)
    for city, number in (("ulm", 1), ("bonn", 2)):
        name = f"{city}_{number:06}_000019"
        write(tmp_path / "leftImg8bit" / "train" / city / f"{name}_leftImg8bit.png", Image.new("RGB", (30, 34)))
        mask = Image.fromarray(numbers.astype(np.uint8))
        write(tmp_path / "gtFine" / "train" / city / f"{name}_gtFine_labelIds.png", mask)
    images = SemanticImages(tmp_path, "train")
    assert len(images) == 2 and len(images.class_names) == 19 and images.class_names[13] == "car"
    labels = images.read(0)[1][:, 0].tolist()
    assert [labels[number] for number in CITYSCAPES] == list(range(19))
    assert {label for number, label in enumerate(labels) if number not in CITYSCAPES} == {IGNORE}


def test_real_masks_in_colours_are_those_with_numbers(shared, tmp_path):
    data = shared("data/camvid")
    content = json.loads((data / "classes.json").read_text())
    rows = [f"{row['name']},{','.join(map(str, row['color']))}" for row in content["classes"]]
    tmp_path.joinpath("class_dict.csv").write_text("\n".join(["name,r,g,b", *rows, "void,0,0,0"]))
    table = np.zeros((256, 3), dtype=np.uint8)
    table[[row["id"] for row in content["classes"]]] = [row["color"] for row in content["classes"]]
    original = SemanticImages(data, "val")
    for index in range(2):
        image, labels = original.read(index)
        write(tmp_path / "val" / f"{index}.png", image)
        write(tmp_path / "val_labels" / f"{index}_L.png", Image.fromarray(table[labels.numpy()]))
    images = SemanticImages(tmp_path, "val")
    assert images.class_names == original.class_names and images.colors == original.colors
    for index in range(2):
        assert np.array_equal(images.read(index)[1], original.read(index)[1])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sky, 128, 128, 128", "sky, 128, 128", r"line 2: is 'sky, 128, 128', expected a name with"),
        ("sky, 128, 128, 128", "sky, 0, 128, 64", r"line 3: is 'traffic light, 0, 128, 64', expected .* a colour of its own"),
        ("sky, 128, 128, 128", "sky, 128, 128, 300", r"line 2: is 'sky, 128, 128, 300', expected .* from 0 to 255"),
    ],
)
def test_a_wrong_table_of_colours_is_refused(tmp_path, old, new, words):
    kaggle(tmp_path)
    damage(tmp_path / "class_dict.csv", old, new)
    with pytest.raises(ValueError, match=rf"class_dict\.csv: {words}") as raised:
        SemanticImages(tmp_path, "train")
    assert "\n" not in str(raised.value)


def test_a_table_without_classes_is_refused(tmp_path):
    kaggle(tmp_path)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\n")
    with pytest.raises(ValueError, match="names no class, expected one in each line"):
        SemanticImages(tmp_path, "train")


def test_a_colour_of_no_class_is_named_and_a_mask_of_jpeg_is_none(tmp_path):
    kaggle(tmp_path)
    mask = tmp_path / "train_labels" / "scene0_L.png"
    Image.new("RGB", (30, 20), (1, 2, 3)).save(mask)
    images = SemanticImages(tmp_path, "train")
    with pytest.raises(ValueError, match=r"scene0_L\.png: holds the colour 1, 2, 3, which is of no class in class_dict\.csv"):
        images.read(0)
    mask.unlink()
    blank(mask.with_suffix(".jpg"), (30, 20))
    (line,) = SemanticImages(tmp_path, "train").skipped
    assert "scene0.png: has no mask" in line


def test_a_listed_image_that_is_gone_is_named(tmp_path):
    cvat(tmp_path)
    (tmp_path / "JPEGImages" / "val-scene1.jpg").unlink()
    (line,) = SemanticImages(tmp_path, "val").skipped
    assert line.endswith("JPEGImages/val-scene1.jpg: no such file")


@pytest.mark.parametrize("name", [None, "yolo", "labelme", "cvat", "roboflow"])
def test_polygons_are_drawn_over_a_background(shapes, tmp_path, name):
    root = shapes
    if name:
        FORMATS[name](shapes, tmp_path, ["train", "val"], **({"masks": True} if name == "yolo" else {}))
        root = tmp_path
    objects, images = CocoImages(shapes, "val", masks=True), SemanticImages(root, "val")
    assert images.class_names[0] == "background"
    assert set(images.class_names) == {"background", "square", "disc"}
    square, by_name = images.class_names.index("square"), {name.rpartition("/")[2]: i for i, name in enumerate(images.names)}
    assert len(images) == len(objects)
    for index in range(len(objects)):
        _, record = objects.read(index)
        target = objects.target(record)
        squares = [objects.class_names[label - 1] == "square" for label in target["labels"].tolist()]
        expected = target["masks"].bool()[squares].any(dim=0)
        seen = images.read(by_name[record["file_name"]])[1] == square
        seen[:, -8:], expected[:, -8:] = False, False  # where the first image has a crowd of squares, which other formats lack
        assert (seen != expected).sum() <= 2 * len(squares)
    assert all(images.count_classes()[0][: square + 1])


def test_smaller_objects_lie_over_larger_ones_and_boxes_alone_are_refused(tmp_path):
    blank(tmp_path / "1.png")
    shapes = [
        {"label": "a", "points": [[10, 10], [20, 20]], "shape_type": "rectangle"},
        {"label": "b", "points": [[5, 5], [30, 25]], "shape_type": "rectangle"},
        {"label": "background", "points": [[0, 0], [4, 4]], "shape_type": "rectangle"},
    ]
    (tmp_path / "1.json").write_text(json.dumps({"shapes": shapes, "imagePath": "1.png"}))
    images = SemanticImages(tmp_path, "val", or_whole=True)
    labels = images.read(0)[1]
    assert images.class_names == ["background", "a", "b"] and images.colors[0] == [0, 0, 0]
    assert [labels[row, column].item() for row, column in ((15, 15), (7, 7), (0, 0))] == [1, 2, 0]
    assert torch.bincount(labels.flatten().long()).tolist() == [1200 - 500, 100, 400]
    content = {"images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 30}], "categories": [{"id": 1, "name": "a"}]}
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"boxes\.json: holds no object with a polygon or a mask: object 1 of 1\.png"):
        SemanticImages(tmp_path / "boxes.json", "val", or_whole=True)


@pytest.mark.slow
def test_a_segmenter_is_trained_and_measured_on_masks_in_colours(tmp_path, capsys):
    kaggle(tmp_path / "data")
    words = ["--image-size", "32", "--epochs", "1", "--model", "test_convnext", "--batch-size", "2", "--workers", "0"]
    words += ["--device", "cpu", "--segmenter.decoder", "fpn", "--segmenter.channels", "64", "--out", str(tmp_path / "run")]
    assert main(["train", "camvid", "--data", str(tmp_path / "data"), *words]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    image = tmp_path / "data" / "val" / "scene0.png"
    assert main(["predict", str(tmp_path / "run"), str(image), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "scene0-mask.png") as mask:
        assert set(map(tuple, np.unique(np.asarray(mask.convert("RGB")).reshape(-1, 3), axis=0).tolist())) <= set(COLORS)
