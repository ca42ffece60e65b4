"""What was found is written in the formats of other tools, and the readers of these formats read the same back."""

import csv
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from groupmixformer import GroupMixFormer, Run
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.detection.data import CocoImages
from groupmixformer.tasks.detection.model import Detector
from groupmixformer.tasks.detection.write import Classes, Drawn, write

NAMES = ["red & blue", "größer", "<b>"]
PLACES = {"coco": "images", "yolo": "images", "voc": "JPEGImages"}


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, randomise):
    """An untrained Mask R-CNN, which finds many things, an untrained classifier, and two images."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("untrained")
    heads = {"num_classes": 3, "architecture": "mask_rcnn", "image_size": 96, "max_size": 128, "fpn_channels": 16}
    backbone = Backbone("test_convnext", {})
    detector = Detector(backbone, **heads, max_detections=12)
    network = {"backbone": asdict(backbone), **heads, "max_detections": 12}
    stored = {"task": "detection", "class_names": NAMES, "category_ids": [2, 5, 9], "network": network}
    save_network(randomise(detector), root / "detector", stored)
    tiny = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
    model = randomise(GroupMixFormer(num_classes=3, **tiny))
    save_checkpoint(model, root / "classifier", NAMES, {"input_size": (3, 64, 64)})
    for folder, size in (("a", (150, 90)), ("b", (80, 120))):
        (root / "images" / folder).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(root / "images" / folder / "1.png")
    return root


def boxes_of(images):
    """Boxes as x, y, width, height with the names of their classes, by the names of the images."""
    found = {}
    for image in images.ground_truth["images"]:
        own = [a for a in images.ground_truth["annotations"] if a["image_id"] == image["id"]]
        found[image["file_name"]] = [(images.class_names[a["label"] - 1], *a["bbox"]) for a in own]
    return found


@pytest.mark.parametrize("name", PLACES)
def test_boxes_are_read_back_as_they_were_written(shared, tmp_path, name):
    original = CocoImages(shared("data/bccd"), "val", masks=False)
    truth, images = original.ground_truth, original.ground_truth["images"][:4]
    drawn = []
    for image in images:
        objects = [
            {**a, "score": 0.87654, "bbox": [v + 0.123 for v in a["bbox"][:2]] + a["bbox"][2:]} for a in truth["annotations"]
        ]
        objects = [a for a in objects if a["image_id"] == image["id"]]
        drawn.append(Drawn(image["file_name"], (image["width"], image["height"]), objects))
        (tmp_path / PLACES[name]).mkdir(exist_ok=True)
        shutil.copy(original.folder / image["file_name"], tmp_path / PLACES[name])
    write(name, tmp_path, drawn, Classes(dict(zip(original.category_ids, original.class_names, strict=True))))
    again = boxes_of(CocoImages(tmp_path, "val", masks=False, or_whole=True))
    assert list(again) == [image.name for image in drawn]
    for image in drawn:
        names = dict(zip(original.category_ids, original.class_names, strict=True))
        assert [row[0] for row in again[image.name]] == [names[one["category_id"]] for one in image.objects]
        expected = [one["bbox"] for one in image.objects]
        np.testing.assert_allclose([row[1:] for row in again[image.name]], expected, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_predictions_of_a_command_are_read_back(runs, tmp_path, capsys, name):
    out = tmp_path / "out"
    words = ["--score-threshold", "0.01", "--out", out, "--device", "cpu", "--json"]
    said = json.loads(gmf(capsys, "predict", runs / "detector", runs / "images", *words, "--format", name).out)
    assert (out / "a" / "1.png").exists() is False and said[name].startswith(str(out))
    shutil.copytree(runs / "images", out / PLACES[name])
    images = CocoImages(out, "val", masks=False, or_whole=True)
    assert set(images.class_names) <= set(NAMES) and images.skipped == []
    found = {row["image"].removeprefix(f"{runs / 'images'}/"): row["objects"] for row in said["images"]}
    again = boxes_of(images)
    assert set(again) == set(found) == {"a/1.png", "b/1.png"} and all(found.values())
    sizes = {"a/1.png": (150, 90), "b/1.png": (80, 120)}
    for file, objects in found.items():
        large = [o for o in objects if o["box"][2] - o["box"][0] >= 1 and o["box"][3] - o["box"][1] >= 1]
        if name == "yolo":  # whose polygons have boxes of their own
            continue
        assert [row[0] for row in again[file]] == [o["class"] for o in large]
        expected = [[o["box"][0], o["box"][1], o["box"][2] - o["box"][0], o["box"][3] - o["box"][1]] for o in large]
        np.testing.assert_allclose([row[1:] for row in again[file]], expected, atol=2e-3)
        assert all(x + w <= sizes[file][0] + 0.01 and y + h <= sizes[file][1] + 0.01 for _, x, y, w, h in again[file])


def test_masks_are_read_back_from_coco_and_as_polygons_from_yolo(tmp_path):
    rows, columns = np.ogrid[:60, :80]
    disc = (rows - 30) ** 2 + (columns - 40) ** 2 <= 15**2
    small = np.zeros((60, 80), dtype=bool)
    small[5:13, 60:70] = True
    from groupmixformer.tasks.detection.metrics import encode

    objects = [
        {
            "category_id": 1,
            "score": 0.9,
            "bbox": [25.0, 15.0, 31.0, 31.0],
            "segmentation": encode(torch.from_numpy(disc)[None])[0],
        },
        {
            "category_id": 1,
            "score": 0.8,
            "bbox": [60.0, 5.0, 10.0, 8.0],
            "segmentation": encode(torch.from_numpy(small)[None])[0],
        },
    ]
    for name in ("coco", "yolo"):
        write(name, tmp_path / name, [Drawn("1.png", (80, 60), objects)], Classes({1: "disc"}))
        (tmp_path / name / "images").mkdir()
        Image.new("RGB", (80, 60)).save(tmp_path / name / "images" / "1.png")
        images = CocoImages(tmp_path / name, "val", masks=True, or_whole=True)
        masks = images.target(images.read(0)[1])["masks"].numpy().astype(bool)
        for mask, true in zip(masks, (disc, small), strict=True):
            assert (mask & true).sum() / (mask | true).sum() >= (1 if name == "coco" else 0.95)


def test_images_that_would_share_a_file_of_labels_are_refused(tmp_path):
    images = [Drawn("1.png", (8, 8), []), Drawn("1.jpg", (8, 8), [])]
    with pytest.raises(ValueError, match="2 images are named 1, expected one for each file of labels: write --format coco"):
        write("yolo", tmp_path, images, Classes({1: "disc"}))
    assert len(json.loads(write("coco", tmp_path, images, Classes({1: "disc"})).read_text())["images"]) == 2


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_table_has_a_row_for_each_object(runs, tmp_path, capsys):
    image = runs / "images" / "a" / "1.png"
    words = [image, "--format", "csv", "--device", "cpu", "--json", "--out", tmp_path]
    said = json.loads(gmf(capsys, "predict", runs / "detector", *words, "--score-threshold", "0.01").out)
    assert said["predictions"] == str(tmp_path / "predictions.csv")
    rows, objects = read_csv(tmp_path / "predictions.csv"), said["images"][0]["objects"]
    assert objects and [(row["image"], row["class"]) for row in rows] == [(str(image), one["class"]) for one in objects]
    numbers = [[float(row[key]) for key in ("score", "x1", "y1", "x2", "y2")] for row in rows]
    assert numbers == [[one["score"], *one["box"]] for one in objects]
    gmf(capsys, "predict", runs / "detector", *words, "--score-threshold", "1")
    assert (tmp_path / "predictions.csv").read_text().split() == ["image,class,score,x1,y1,x2,y2"]


def test_a_table_has_a_row_for_each_class(runs, tmp_path, capsys):
    image = runs / "images" / "a" / "1.png"
    words = [image, "--format", "csv", "--device", "cpu", "--json", "--out", tmp_path]
    said = json.loads(gmf(capsys, "predict", runs / "classifier", *words).out)
    rows = read_csv(tmp_path / "predictions.csv")
    expected = [(str(image), one["class"], one["probability"]) for one in said["images"][0]["classes"]]
    assert [(row["image"], row["class"], float(row["probability"])) for row in rows] == expected


def test_a_format_that_a_task_does_not_have_is_refused(runs, tmp_path, capsys):
    image = runs / "images" / "a" / "1.png"
    said = gmf(capsys, "predict", runs / "classifier", image, "--format", "yolo", "--out", tmp_path, code=2).err
    assert "--format yolo: " in said and "holds a model for classification, expected json, csv" in said


@pytest.mark.slow
def test_a_run_gives_detections_of_supervision(runs):
    import supervision

    run, image = Run.open(runs / "detector"), runs / "images" / "a" / "1.png"
    options = {"device": "cpu", "score_threshold": 0.01}
    found = run.detections(image, **options)
    objects = run.predict(image, **options).result["objects"]
    assert isinstance(found, supervision.Detections) and len(found) == len(objects) > 0
    np.testing.assert_allclose(found.xyxy, [one["box"] for one in objects], rtol=1e-6)
    np.testing.assert_allclose(found.confidence, [one["score"] for one in objects], rtol=1e-6)
    assert found.data["class_name"].tolist() == [one["class"] for one in objects]
    assert [NAMES[number] for number in found.class_id] == [one["class"] for one in objects]
    assert found.mask.shape == (len(objects), 90, 150)
    drawn = supervision.BoxAnnotator().annotate(Image.open(image).convert("RGB"), found)
    assert np.asarray(drawn).shape == (90, 150, 3)
    none, several = run.detections([image, image], device="cpu", score_threshold=1.0), run.detections([image], **options)
    assert [len(one) for one in none] == [0, 0] and len(several[0]) == len(found)
    with pytest.raises(ValueError, match="ClassificationPredictor finds no objects, expected a detector"):
        Run.open(runs / "classifier").detections(image, device="cpu")
