"""Keypoint R-CNN: how keypoints are read and mirrored, COCO's numbers for them, and the commands that use a run."""

import contextlib
import copy
import io
import json
import re
import shutil
import sys

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import CATEGORIES, KEYPOINTS, write_coco, write_shapes
from test_detection import batch, error, gmf, learn_by_heart, losses, task
from test_serve import PNG, serving

from groupmixformer import Run
from groupmixformer.cli.main import main
from groupmixformer.tasks.detection import DetectionTask
from groupmixformer.tasks.detection.data import CocoImages, detection_transform, to_tensor
from groupmixformer.tasks.detection.metrics import KEYPOINT_METRICS, coco_metrics, to_results
from groupmixformer.tasks.detection.predict import DetectionPredictor
from groupmixformer.training.recipe import read_recipe
from groupmixformer.visual.drawing import draw_objects

ARCHITECTURE = ["--detector.architecture", "keypoint_rcnn"]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=16, val=5)


def words(data, out, *more):
    small = ["--image-size", "64", "--detector.max-size", "96", "--detector.fpn-channels", "32", "--batch-size", "2"]
    small += ["--detector.rois-per-image", "32", "--detector.max-detections", "20", "--model", "test_convnext"]
    small += ["--workers", "0", "--device", "cpu", "--optimizer.lr", "0.002", "--epochs", "1", "--loggers", "[]"]
    return ["train", "nuclei", *ARCHITECTURE, "--data", data, "--out", out, *small, *more]


def relabelled(shapes, root, categories):
    """The same images and objects with other categories."""
    shutil.copytree(shapes / "images", root / "images")
    for split in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        write_coco(root, split, content["images"], content["annotations"], categories)
    return root


# Reading and augmenting


@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_mirror_turns_left_into_right(shapes, hflip, vflip):
    """Left is left of what is seen, so it is so in a mirror image too; turned upside down by both flips, it is right."""
    images = CocoImages(shapes, "train", False, detection_transform(hflip, vflip, 0.0), keypoints=True)
    assert (images.keypoint_names, images.mirrored) == (["centre", "left", "right"], [0, 2, 1])
    _, record = images.read(2)
    before = images.target(record)["keypoints"]
    pixels, target, problem = images[0, 2]
    after, (height, width) = target["keypoints"], pixels.shape[-2:]
    assert not problem and set(target) == {"boxes", "labels", "keypoints"} and len(after) == len(before) > 0
    expected = before.clone()
    expected[..., 0] = width - 1 - expected[..., 0] if hflip else expected[..., 0]
    expected[..., 1] = height - 1 - expected[..., 1] if vflip else expected[..., 1]
    torch.testing.assert_close(after, expected[:, [0, 2, 1]] if hflip != vflip else expected)
    assert before[0, :, 2].tolist() == [2, 1, 2] and set(after[..., 2].flatten().tolist()) == {1.0, 2.0}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["nose", "left_eye", "right_eye"], [0, 2, 1]),
        (["LeftEar", "RightEar", "tail"], [1, 0, 2]),
        (["l-hip", "r-hip", "ball"], [1, 0, 2]),
        (["top", "bottom", "curl"], [0, 1, 2]),
        (["left_eye", "nose", "mouth"], None),
        (["0", "1", "2"], None),
    ],
)
def test_what_changes_places_is_known_by_names(shapes, tmp_path, names, expected):
    categories = [{**category, "keypoints": names} for category in CATEGORIES]
    images = CocoImages(relabelled(shapes, tmp_path, categories), "val", False, keypoints=True)
    assert images.mirrored == expected


def test_images_are_not_flipped_where_it_is_not_known_what_changes_places(shapes, tmp_path):
    data = relabelled(shapes, tmp_path, [{**category, "keypoints": ["0", "1", "2"]} for category in CATEGORIES])
    made = task(data, "keypoint_rcnn")
    assert any("images are not flipped" in note for note in made.notes)
    train = made.loaders.train
    for _ in range(8):
        pixels, target, _ = train[0, 2]
        image, record = train.read(2)
        assert torch.equal(pixels, to_tensor(image))
        assert torch.equal(target["keypoints"], train.target(record)["keypoints"])


def test_the_file_of_keypoints_is_read_beside_that_of_instances(shapes, tmp_path):
    data = relabelled(shapes, tmp_path, [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}])
    for split in ("train", "val"):
        source = shapes / "annotations" / f"instances_{split}.json"
        shutil.copyfile(source, data / "annotations" / f"person_keypoints_{split}2017.json")
    images = CocoImages(data, "val", False, keypoints=True)
    assert images.annotations.name == "person_keypoints_val2017.json" and images.skeleton == [[0, 1], [0, 2]]
    assert CocoImages(data, "val", False).annotations.name == "instances_val.json"


@pytest.mark.parametrize("values", [2, 3])
def test_yolo_has_keypoints(tmp_path, values):
    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / f"{name}.png")
    places = [(0.25, 0.5, 2), (0.75, 0.4, 1), (0.0, 0.0, 0)]
    line = " ".join(str(value) for place in places for value in place[:values])
    (tmp_path / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.6 0.8 {line}\n")
    yaml = f"names: [fish]\ntrain: images\nval: images\nkpt_shape: [3, {values}]\nflip_idx: [1, 0, 2]\n"
    (tmp_path / "data.yaml").write_text(yaml)
    images = CocoImages(tmp_path, "val", False, keypoints=True)
    assert (images.keypoint_names, images.mirrored) == (["0", "1", "2"], [1, 0, 2])
    target = images.target(images.read(0)[1])
    seen = [2, 1, 0] if values == 3 else [2, 2, 0]
    assert target["keypoints"].tolist() == [[[10, 10, seen[0]], [30, 8, seen[1]], [0, 0, seen[2]]]]
    torch.testing.assert_close(target["boxes"], torch.tensor([[8.0, 2.0, 32.0, 18.0]]))
    assert CocoImages(tmp_path, "val", False).dropped == []  # boxes alone are read from the same lines


def test_what_is_wrong_with_keypoints_is_said(shapes, tmp_path, capsys):
    plain = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    line = error(capsys, *words(relabelled(shapes, tmp_path / "plain", plain), tmp_path / "run"))
    assert "categories[0]: has no keypoints, expected the list of their names, or kpt_shape in YOLO's data.yaml" in line
    other = [CATEGORIES[0], {**CATEGORIES[1], "keypoints": ["top"]}]
    line = error(capsys, *words(relabelled(shapes, tmp_path / "other", other), tmp_path / "run"))
    assert "categories[1]: keypoints is ['top'], expected those of the first category, ['centre', 'left', 'right']" in line
    wrong = [{**category, "skeleton": [[0, 1]]} for category in CATEGORIES]
    line = error(capsys, *words(relabelled(shapes, tmp_path / "wrong", wrong), tmp_path / "run"))
    assert "skeleton is [[0, 1]], expected pairs of numbers from 1 to 3" in line
    content = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    content["annotations"][0]["keypoints"] = [1, 2, 2]
    content["annotations"][1]["keypoints"][2] = 7
    data = relabelled(shapes, tmp_path / "broken", CATEGORIES)
    (data / "annotations" / "instances_val.json").write_text(json.dumps(content))
    dropped = CocoImages(data, "val", False, keypoints=True).dropped
    assert [re.sub(".*: ", "", one) for one in dropped] == [
        "expected 9 numbers, x, y and visibility of each",
        "a visibility is not 0 (not annotated), 1 (hidden) or 2 (visible)",
    ]


def test_objects_without_annotated_keypoints_teach_their_boxes_alone(shapes):
    made = task(shapes, "keypoint_rcnn")
    images, targets = batch(made, 2)
    seen = losses(made.model, images, targets)
    targets[0]["keypoints"][..., 2] = 0
    unseen = losses(made.model, images, targets)
    assert seen["loss_keypoint"] > 0 and unseen["loss_keypoint"] == 0
    assert unseen["loss_box_reg"] == pytest.approx(seen["loss_box_reg"], rel=1e-4)


# COCO's numbers


@pytest.mark.parametrize("number", [3, 17])
def test_the_numbers_are_those_of_pycocotools(number):
    random = np.random.default_rng(number)
    categories = [{"id": 4, "name": "a", "keypoints": [f"p{i}" for i in range(number)]}]
    truth = {"images": [{"id": i, "file_name": f"{i}", "width": 300, "height": 300} for i in range(12)], "annotations": []}
    truth["categories"], results = categories, []
    for i in range(36):
        corner, sides = random.uniform(0, 100, 2), random.uniform(20, 180, 2)
        places, seen = corner + sides * random.random((number, 2)), random.integers(0, 3, (number, 1)) * (i % 9 > 0)
        keypoints = np.hstack([places, seen])
        fields = {"bbox": [*corner, *sides], "area": float(sides.prod() / 2), "iscrowd": int(i % 11 == 10)}
        fields |= {"keypoints": keypoints.ravel().tolist(), "num_keypoints": int((seen > 0).sum())}
        truth["annotations"].append({"id": i + 1, "image_id": i % 12, "category_id": 4, **fields})
        for _ in range(int(random.integers(0, 3))):
            moved = places + random.normal(0, random.choice([1.0, 6.0]) * (1 if number == 17 else 6), places.shape)
            keypoints = {"keypoints": torch.tensor(moved).unsqueeze(0), "keypoints_scores": torch.ones(1, number)}
            one = {"boxes": torch.tensor([[*corner, *(corner + sides)]]), "labels": torch.tensor([1])}
            results += to_results(one | keypoints | {"scores": torch.tensor([random.random()])}, i % 12, [4])
    got, per_class = coco_metrics(truth, results, "keypoints")
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = COCO(), COCO()
        expected.dataset = copy.deepcopy(truth)
        expected.createIndex()
        found = expected.loadRes([{k: v for k, v in result.items() if k != "bbox"} for result in results])
        evaluation = COCOeval(expected, found, "keypoints")
        if number != 17:
            evaluation.params.kpt_oks_sigmas = np.full(number, 1 / number)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert list(got) == list(KEYPOINT_METRICS)
    assert list(got.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-6)
    assert all(0 < value < 1 for value in got.values())
    assert per_class == [{"class": "a", "index": 0, "AP": pytest.approx(got["AP"])}]


def test_keypoints_are_drawn_in_their_places():
    target = {"boxes": torch.tensor([[100.0, 100, 400, 400]]), "labels": torch.tensor([1])}
    target["keypoints"] = torch.tensor([[[200.0, 200, 1], [300, 300, 2], [350, 150, 0]]])
    drawn = draw_objects(Image.new("RGB", (480, 480)), target, ["thing"], [[0, 1], [1, 2]])
    shown = np.asarray(drawn).sum(axis=2) > 0
    assert shown[200, 200] and shown[300, 300] and shown[250, 250]  # two points and the line between them
    assert not shown[150, 350] and not shown[225, 325]


# Runs


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    run = tmp_path_factory.mktemp("keypoints") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main([str(word) for word in words(shapes, run, "--json")]) == 0
        return run, json.loads(sys.stdout.getvalue())


@pytest.mark.slow
def test_a_run_is_evaluated_used_and_explained(trained, shapes, tmp_path, capsys):
    run, result = trained
    measured = json.loads(gmf(capsys, "eval", run, "--data", shapes, "--json").out)
    assert {f"keypoint_{name}" for name in KEYPOINT_METRICS} <= set(measured)
    assert measured["keypoint_AP"] == pytest.approx(result["keypoint_AP"])
    image = shapes / "images" / "val-0.png"
    predictor = Run.open(run)
    found = predictor.predict(image, score_threshold=0.01)
    first = found.result["objects"][0]
    assert list(first["keypoints"]) == KEYPOINTS["keypoints"] and len(first["keypoints"]["left"]) == 3
    detections = predictor.detections(image, score_threshold=0.01)
    assert detections.data["keypoints"].shape == (len(found.result["objects"]), 3, 3)
    assert detections.data["keypoints"][0, 1].tolist() == pytest.approx(first["keypoints"]["left"])
    explained = gmf(capsys, "explain", run, image, "--out", tmp_path / "explained", "--json").out
    assert json.loads(explained)
    with serving(DetectionPredictor(run, torch.device("cpu"), score_threshold=0.01), "detection") as address:
        answer = httpx.post(f"{address}/predict", content=image.read_bytes(), headers=PNG).json()
    assert answer["objects"][0]["keypoints"]["left"] == pytest.approx(first["keypoints"]["left"], abs=1e-3)
    other = relabelled(shapes, tmp_path / "other", [{**one, "keypoints": ["a", "b", "c"]} for one in CATEGORIES])
    line = error(capsys, "eval", run, "--data", other)
    assert line.endswith("its keypoints are a, b, c, expected those of the run, centre, left, right")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_what_is_found_is_a_data_set_again(trained, shapes, tmp_path, capsys, format):
    run, _ = trained
    options = ("--format", format, "--score-threshold", "0.01", "--out", tmp_path / "found")
    gmf(capsys, "predict", run, shapes / "images", *options)
    shutil.copytree(shapes / "images", tmp_path / "found" / "images")
    images = CocoImages(tmp_path / "found", "val", False, or_whole=True, keypoints=True)
    assert (images.keypoint_names, images.mirrored) == (KEYPOINTS["keypoints"], [0, 2, 1])
    assert images.dropped == [] and images.skeleton == ([[0, 1], [0, 2]] if format == "coco" else [])
    _, record = images.read(0)
    rows = Run.open(run).predict(shapes / "images" / record["file_name"], score_threshold=0.01).result["objects"]
    expected = torch.tensor([[place[:2] for place in row["keypoints"].values()] for row in rows])
    torch.testing.assert_close(images.target(record)["keypoints"][..., :2], expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_what_can_be_learnt_is_found_in_the_pixels_of_the_image(shapes):
    """Keypoints of an image that is learnt by heart are found."""
    torch.manual_seed(0)
    made = task(shapes, "keypoint_rcnn")
    image, target = learn_by_heart(made, 2, 160, 2e-3)
    found = made.model([image])[0]
    number = len(target["labels"])
    places, expected = found["keypoints"][:number, :, :2], target["keypoints"][..., :2]
    apart = (places[:, None] - expected).norm(dim=3).amax(dim=2)  # (found, annotated)
    assert apart.amin(dim=0).max() < 4


def test_a_data_set_is_shown_with_its_keypoints(shapes, tmp_path):
    samples = DetectionTask().open_part(shapes, "train")
    assert samples.keypoint_names == KEYPOINTS["keypoints"] and samples.masks
    without = CocoImages(shapes, "train", False)
    assert np.any(np.asarray(samples.drawn(2)) != np.asarray(without.drawn(2)))
    differing = relabelled(shapes, tmp_path, [CATEGORIES[0], {**CATEGORIES[1], "keypoints": ["top"]}])
    assert DetectionTask().open_part(differing, "train").keypoint_names == []  # which boxes do not need
    path = differing / "annotations" / "instances_train.json"
    content = json.loads(path.read_text()) | {"categories": CATEGORIES}
    content["annotations"][0]["keypoints"] = [1, 2]
    path.write_text(json.dumps(content))
    shown = DetectionTask().open_part(differing, "train")
    assert shown.keypoint_names == KEYPOINTS["keypoints"] and shown.dropped == []  # nor damaged ones
    assert DetectionTask().open_part(shapes, "train", read_recipe("nuclei")).keypoint_names == []  # training sees none
