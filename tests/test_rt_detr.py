"""RT-DETR of transformers over our backbones, by the commands that train, evaluate, use and explain a detector."""

import io
import json
import sys

import httpx
import pytest
import torch
from shapes import write_shapes
from test_detection import batch, error, gmf, learn_by_heart, task
from test_serve import PNG, serving
from torchvision.ops import box_convert, box_iou

from groupmixformer.cli.main import main
from groupmixformer.tasks.detection.predict import DetectionPredictor
from groupmixformer.tasks.detection.rt_detr import LOSSES

pytestmark = pytest.mark.slow  # it takes seconds to import transformers


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=16, val=5)


def words(shapes, out, *more):
    small = ["--detector.architecture", "rt_detr", "--detector.fpn-channels", "32", "--detector.queries", "15"]
    small += ["--image-size", "64", "--detector.max-size", "96", "--batch-size", "2", "--workers", "0", "--device", "cpu"]
    small += ["--model", "test_convnext", "--detector.max-detections", "20", "--optimizer.lr", "0.002"]
    return ["train", "nuclei", "--data", shapes, "--out", out, *small, *more]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    run = tmp_path_factory.mktemp("rt_detr") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main([str(word) for word in words(shapes, run, "--epochs", "2", "--json")]) == 0
        return run, json.loads(sys.stdout.getvalue())


def test_losses_are_those_of_the_library(shapes):
    """Each kind is the sum over the layers, together the loss of transformers; boxes are relative to the filled image."""
    made = task(shapes, "rt_detr")
    images, targets = batch(made, 0, 1)
    network = made.model.network.train()
    torch.manual_seed(0)
    losses = network(images, [dict(one) for one in targets])
    assert list(losses) == list(LOSSES)
    torch.manual_seed(0)  # of the size that is drawn, and of what is denoised
    filled, resized = network.transform(images, [dict(one) for one in targets])
    height, width = filled.tensors.shape[-2:]
    scale = torch.tensor([width, height, width, height])
    labels = [
        {"class_labels": one["labels"] - 1, "boxes": box_convert(one["boxes"], "xyxy", "cxcywh") / scale} for one in resized
    ]
    expected = network.detector(filled.tensors, labels=labels).loss
    torch.testing.assert_close(sum(losses.values()), expected)


def test_a_run_is_evaluated_used_and_explained(trained, shapes, tmp_path, capsys):
    run, result = trained
    assert "box_AP" in result and "mask_AP" not in result
    measured = json.loads(gmf(capsys, "eval", run, "--data", shapes, "--json").out)
    assert measured["box_AP"] == pytest.approx(result["box_AP"])
    options = ("--out", tmp_path / "found", "--score-threshold", "0.01", "--json")
    found = json.loads(gmf(capsys, "predict", run, shapes / "images", *options).out)
    assert sum(len(one["objects"]) for one in found["images"]) > 5
    image = shapes / "images" / "val-0.png"
    explained = gmf(capsys, "explain", run, image, "--out", tmp_path / "explained", "--json").out
    assert json.loads(explained)
    with serving(DetectionPredictor(run, torch.device("cpu"), score_threshold=0.01), "detection") as address:
        answer = httpx.post(f"{address}/predict", content=image.read_bytes(), headers=PNG).json()
    assert answer["objects"] and {"class", "score", "box"} <= set(answer["objects"][0])


def test_what_can_be_learnt_is_found_in_the_pixels_of_the_image(shapes):
    """Objects of an image that is learnt by heart are found, and at their places in the same image three times as large."""
    torch.manual_seed(0)
    made = task(shapes, "rt_detr")
    image, target = learn_by_heart(made, 0, 120, 1e-3)
    large = torch.nn.functional.interpolate(image[None], scale_factor=3, mode="bilinear")[0]
    for pixels, factor in ((image, 1), (large, 3)):
        with torch.inference_mode():
            found = made.model([pixels])[0]
        number = len(target["labels"])
        overlap, which = box_iou(factor * target["boxes"], found["boxes"][:number]).max(dim=1)
        assert overlap.min() > 0.6
        assert found["labels"][:number][which].tolist() == target["labels"].tolist()


def test_what_does_not_fit_is_said_in_a_line(trained, shapes, tmp_path, capsys):
    run, _ = trained
    line = error(capsys, "export", run, "--format", "onnx", "--out", tmp_path / "x.onnx")
    assert line == f"gmf: error: {run}: RT-DETR cannot be exported yet: export a detector of torchvision"
    line = error(capsys, *words(shapes, tmp_path / "wide", "--detector.fpn-channels", "30"))
    assert line == "gmf: error: got fpn_channels=30, expected a multiple of 8: RT-DETR has 8 heads"
    line = error(capsys, *words(shapes, tmp_path / "many", "--detector.queries", "300", "--epochs", "1"))
    assert "expected at least 300, one for each query: take a larger image_size, or fewer detector.queries" in line


def test_it_starts_from_another_of_other_classes(trained, tmp_path, capsys):
    other = write_shapes(tmp_path / "other", train=4, val=2, categories=[{"id": 3, "name": "brick"}, {"id": 7, "name": "coin"}])
    text = gmf(capsys, *words(other, tmp_path / "run", "--epochs", "1", "--checkpoint", trained[0], "--optimizer.lr", "0")).err
    assert "class_embed" in text
