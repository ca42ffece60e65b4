"""Detectors: every architecture over every kind of backbone, where weights come from, and runs from training to prediction."""

import copy
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from kill_and_resume import differences, scalars
from PIL import Image
from safetensors.torch import load_file
from shapes import CATEGORIES, write_coco, write_shapes, write_split
from torch import nn

from groupmixformer import GroupMixFormer, load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.run_folder import read_metrics, save_network
from groupmixformer.tasks.backbone import Backbone, start_from
from groupmixformer.tasks.detection.data import CocoImages, collate_detection, to_tensor
from groupmixformer.tasks.detection.metrics import COCO_METRICS, coco_metrics
from groupmixformer.tasks.detection.model import Detector, load_detector
from groupmixformer.tasks.detection.predict import DetectionPredictor
from groupmixformer.tasks.detection.training import DetectionModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import DetectorSettings as Settings
from groupmixformer.training.recipe import Recipe, read_recipe
from groupmixformer.training.trainer import train

ARCHITECTURES = ("retinanet", "faster_rcnn", "mask_rcnn")
BACKBONES = ("groupmixformer_mobile", "resnet18", "pvt_v2_b0", "coat_lite_tiny")
HEADS = [
    ("mask_rcnn", "pvt_v2_b0"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            *itertools.product(ARCHITECTURES, BACKBONES),
            ("mask_rcnn", "swin_tiny_patch4_window7_224"),
            ("rt_detr", "groupmixformer_mobile"),
            ("keypoint_rcnn", "groupmixformer_mobile"),
        )
        if pair != ("mask_rcnn", "pvt_v2_b0")
    ),
    *(
        pytest.param("rt_detr", name, marks=[pytest.mark.slow, pytest.mark.exhaustive])
        for name in ("pvt_v2_b0", "swin_tiny_patch4_window7_224")
    ),
]
FROZEN = ["--optimizer.lr", "0", "--schedule.warmup_lr", "0", "--schedule.min_lr", "0", "--optimizer.weight_decay", "0"]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=16, val=5)


def options(data, out, *more):
    small = ["--image_size", "64", "--batch_size", "2", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    small += ["--model", "test_convnext", "--optimizer.lr", "0.003", "--detector.max_size", "96", "--log_steps", "1"]
    small += ["--detector.fpn-channels", "32", "--detector.rois-per-image", "32", "--detector.max-detections", "20"]
    small += ["--channels_last", "false"]
    return ["--data", str(data), "--out", str(out), *small, *(str(word) for word in more)]


def fit(data, out, *more, resume=False):
    """Train without the command line around it, which evaluates and reports; return the run folder."""
    return train(read_recipe("nuclei", options(data, out, *more)), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def error(capsys, *argv, code=1):
    """The single line that a failed command leaves on stderr."""
    result = gmf(capsys, *argv, code=code)
    lines = result.err.strip().splitlines()
    assert (result.out, len(lines)) == ("", 1), lines
    return lines[0]


def task(data, architecture="faster_rcnn", variant="test_convnext", **more):
    """Open the data and create the detector, as a run does."""
    small = Settings(architecture=architecture, fpn_channels=32, rois_per_image=16, max_size=96, queries=15)
    # What is loaded is not in channels_last memory, and sums in another order there.
    settings = {"image_size": 64, "batch_size": 2, "workers": 0, "detector": small, "channels_last": False}
    return build_task(Recipe(str(data), task="detection", model=variant, **settings | more), world_size=1)


def batch(made, *indices):
    images, targets, problems = collate_detection([made.loaders.train[0, index] for index in indices])
    assert not problems
    return images, targets


def losses(model, images, targets):
    torch.manual_seed(0)  # of the regions that are drawn
    model.zero_grad()
    found = model.train()(images, targets)
    sum(found.values()).backward()
    return {name: loss.item() for name, loss in found.items()}


def learn_by_heart(made, index, steps, rate):
    """Train on one image alone, not augmented; return the image and what is annotated."""
    read = made.loaders.train.read(index)
    image, target = to_tensor(read[0]), dict(made.loaders.train.target(read[1]))
    optimizer = torch.optim.AdamW(made.model.parameters(), rate)
    made.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        sum(made.model([image], [dict(target)]).values()).backward()
        optimizer.step()
    made.model.eval()
    return image, target


def lower_threshold(model):
    """Let a new RetinaNet find something: its scores are near 0.01."""
    if hasattr(model.network, "score_thresh"):
        model.network.score_thresh = 0.0
    return model


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Every architecture over every kind of backbone


@pytest.mark.parametrize(("architecture", "variant"), HEADS)
def test_a_detector_trains_finds_and_is_loaded_as_it_was_saved(shapes, tmp_path, architecture, variant):
    made = task(shapes, architecture, variant)
    model, names = made.model, {name for name, _ in made.model.named_parameters()}
    images, targets = batch(made, 2, 4)
    assert (len(targets[0]["boxes"]) > 0, len(targets[1]["boxes"])) == (True, 0)
    found = losses(model, images, targets)
    assert all(math.isfinite(loss) for loss in found.values())
    assert len(found) == {"retinanet": 2, "faster_rcnn": 4, "mask_rcnn": 5, "keypoint_rcnn": 5, "rt_detr": 3}[architecture]
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()} == names

    made.save(model.eval(), tmp_path / "run")
    loaded, config = load_detector(tmp_path / "run")
    assert (config["class_names"], config["category_ids"]) == (["square", "disc"], [3, 7])
    assert not loaded.training and equal(loaded.state_dict(), model.state_dict())
    sizes = [(67, 51), (33, 90), (64, 64), (130, 41)]
    views = [torch.rand(3, *size) for size in sizes]
    with torch.inference_mode():
        outputs = lower_threshold(model)(views)
        again = lower_threshold(loaded)(views)
    assert sum(len(output["boxes"]) for output in outputs) > 20
    for (height, width), output, other in zip(sizes, outputs, again, strict=True):
        assert equal(output, other)
        count = len(output["scores"])
        shapes_of = {"boxes": (count, 4), "labels": (count,), "scores": (count,), "masks": (count, 1, height, width)}
        shapes_of |= {"keypoints": (count, 3, 3), "keypoints_scores": (count, 3)}
        assert {n: tuple(v.shape) for n, v in output.items()} == {n: shapes_of[n] for n in output}
        more = {"mask_rcnn": {"masks"}, "keypoint_rcnn": {"keypoints", "keypoints_scores"}}.get(architecture, set())
        assert output.keys() == {"boxes", "labels", "scores"} | more
        left, top, right, bottom = output["boxes"].unbind(1)
        assert ((left >= 0) & (left <= right) & (right <= width)).all()
        assert ((top >= 0) & (top <= bottom) & (bottom <= height)).all()
        assert set(output["labels"].tolist()) <= {1, 2}
        assert output["scores"].tolist() == sorted(output["scores"].tolist(), reverse=True)
        assert count <= 100 and ((output["scores"] >= 0) & (output["scores"] <= 1)).all()
        assert "masks" not in output or ((output["masks"] >= 0) & (output["masks"] <= 1)).all()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "keypoint_rcnn", pytest.param("rt_detr", marks=pytest.mark.slow)])
def test_a_batch_without_any_object_has_losses_and_gradients(shapes, architecture):
    made = task(shapes, architecture)
    images, targets = batch(made, 4, 9)
    assert [len(target["boxes"]) for target in targets] == [0, 0]
    assert all(math.isfinite(loss) for loss in losses(made.model, images, targets).values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.model.parameters())


def test_settings_reach_the_network(shapes):
    limits = {"max_size": 90, "rois_per_image": 20, "max_detections": 7}
    settings = Settings("faster_rcnn", sizes=[48, 80], fpn_channels=24, anchor_scale=4, **limits)
    made = task(shapes, variant="resnet18", detector=settings)
    network = made.model.network
    assert (network.transform.min_size, network.transform.max_size) == ((48, 80, 64), 90)
    assert network.backbone.out_channels == 24
    assert network.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    assert (network.roi_heads.fg_bg_sampler.batch_size_per_image, network.roi_heads.detections_per_img) == (20, 7)
    cfg = timm.get_pretrained_cfg("resnet18")
    assert (network.transform.image_mean, network.transform.image_std) == (list(cfg.mean), list(cfg.std))
    with torch.inference_mode():
        assert len(made.model.eval()([torch.rand(3, 64, 64)])[0]["boxes"]) == 7
    sides = set()
    network.train()
    for _ in range(20):
        images, _ = network.transform([torch.rand(3, 100, 100)])
        sides.add(images.image_sizes[0])
    assert sides == {(48, 48), (64, 64), (80, 80)}
    network.eval()
    assert network.transform([torch.rand(3, 100, 200)])[0].image_sizes == [(45, 90)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "vit_tiny_patch16_224"], "features of strides [16, 16, 16], expected [4, 8, 32] too"),
        (["--model", "resnet81"], "no model resnet81"),
        (["--batch_size", "32"], "16 training images are fewer than one batch of 32: lower batch_size"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--model", "coat_lite_tiny", "--grad_checkpointing", "true"], "coat_lite_tiny has no gradient checkpointing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_in_one_line(shapes, tmp_path, capsys, more, words):
    line = error(capsys, "train", "nuclei", *options(shapes, tmp_path / "run", *more))
    assert line.startswith("gmf: error: ")
    assert words in line
    assert "GMF_TRACEBACK" not in line


# Weights, layers and memory


def plain(names):
    """Names as timm's features have them: without the wrapper and with underscores for some of the dots."""
    return {name.removeprefix("model.").replace(".", "_"): tensor for name, tensor in names.items()}


@pytest.fixture
def classifier(tmp_path, randomise, golden):
    """Give a function that saves a classifier with random weights and returns it."""

    def save(name):
        if name == "custom widths":
            model = golden("test").model()
        else:
            model = randomise(
                timm.create_model(name, num_classes=3, **({"drop_path_rate": 0.1} if name == "pvt_v2_b0" else {}))
            )
        save_checkpoint(model, tmp_path / "classifier", [f"class {i}" for i in range(model.num_classes)])
        return model

    return save


@pytest.mark.parametrize(
    "name",
    [pytest.param("groupmixformer_mobile", marks=pytest.mark.slow), "custom widths", "resnet18", "pvt_v2_b0", "coat_lite_tiny"],
)
def test_the_weights_of_a_classifier_arrive_in_the_backbone(shapes, classifier, tmp_path, name):
    source = classifier(name)
    made = task(shapes, "mask_rcnn", variant="test_resnet", checkpoint=str(tmp_path / "classifier"))
    expected, found = plain(source.state_dict()), plain(made.model.features.state_dict())
    assert len(found) > 50
    assert equal(found, {key: expected[key] for key in found})
    assert {key.split("_")[0] for key in expected.keys() - found.keys()} <= {"head", "fc", "norm", "norm4"}
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        features = made.model.eval().features(image)[-1]
        whole = source.eval().forward_intermediates(image, intermediates_only=True)[-1]
    torch.testing.assert_close(features, whole, rtol=1e-5, atol=1e-5)
    made.save(made.model, tmp_path / "run")
    again, _ = load_detector(tmp_path / "run")
    assert equal(again.state_dict(), made.model.state_dict())


@pytest.mark.slow
def test_a_file_of_weights_serves_too(shapes, classifier, tmp_path):
    source = classifier("groupmixformer_mobile")
    torch.save({"model": source.state_dict()}, tmp_path / "mobile.pth")
    made = task(shapes, checkpoint=str(tmp_path / "mobile.pth"))
    assert isinstance(made.model.features.model, GroupMixFormer)
    expected, found = plain(source.state_dict()), plain(made.model.features.state_dict())
    assert equal(found, {key: expected[key] for key in found})


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("retinanet", "test_resnet"),
        ("faster_rcnn", "test_resnet"),
        pytest.param("mask_rcnn", "groupmixformer_mobile", marks=pytest.mark.slow),
    ],
)
def test_a_detector_continues_with_all_weights_that_fit(shapes, tmp_path, randomise, architecture, variant):
    first = task(shapes, architecture, variant)
    first.save(randomise(first.model), tmp_path / "first")
    again = task(shapes, architecture, "resnet18", checkpoint=str(tmp_path / "first"))
    assert equal(again.model.state_dict(), first.model.state_dict())

    categories = [*CATEGORIES, {"id": 1, "name": "triangle"}]
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, 5, categories=categories)
    other = task(tmp_path / "data", architecture, checkpoint=str(tmp_path / "first"))
    before, after = first.model.state_dict(), other.model.state_dict()
    different = {name for name in after if not torch.equal(after[name], before[name])}
    last = ("cls_logits", "box_predictor", "mask_fcn_logits")
    assert {name for name in after if any(part in name for part in last) and "rpn" not in name} == different
    assert all(after[name].shape != before[name].shape for name in different)
    fresh = Detector(Backbone(variant), **other.network)
    assert set(start_from(fresh, str(tmp_path / "first"), "detection", other.class_names)) == different
    exchanged = Detector(Backbone(variant), **first.network)
    assert set(start_from(exchanged, str(tmp_path / "first"), "detection", first.class_names[::-1])) == different


def test_a_detector_becomes_one_of_another_architecture(shapes, tmp_path):
    first = task(shapes, "faster_rcnn")
    first.save(first.model, tmp_path / "first")
    second = task(shapes, "mask_rcnn", checkpoint=str(tmp_path / "first"))
    before, after = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.split(".")[2] for name in after.keys() - before.keys()} == {"mask_head", "mask_predictor"}


def test_models_of_other_tasks_are_refused(shapes, tmp_path, capsys, randomise):
    config = {"task": "segmentation", "class_names": ["a"], "network": {"backbone": {"name": "resnet18"}}}
    save_network(nn.Linear(2, 2), tmp_path / "segmenter", config)
    argv = options(shapes, tmp_path / "run", "--checkpoint", tmp_path / "segmenter")
    line = error(capsys, "train", "nuclei", *argv)
    assert line == f"gmf: error: {tmp_path / 'segmenter'}: holds a model for segmentation, expected one for detection"
    with pytest.raises(ValueError, match="holds a model for segmentation, expected one for detection"):
        load_detector(tmp_path / "segmenter")

    made = task(shapes)
    made.save(made.model, tmp_path / "detector")
    for load in (load_model, load_checkpoint):
        with pytest.raises(ValueError, match="holds a model for detection, expected a classifier"):
            load(tmp_path / "detector")
    line = error(capsys, "train", "digits", "--checkpoint", tmp_path / "detector", "--out", tmp_path / "run")
    assert "holds a model for detection, expected a classifier" in line

    grey = randomise(timm.create_model("groupmixformer_mobile", in_chans=1))
    save_checkpoint(grey, tmp_path / "grey")
    line = error(capsys, "train", "nuclei", *options(shapes, tmp_path / "run", "--checkpoint", tmp_path / "grey"))
    assert f"{tmp_path / 'grey'}: is made for 1 channels, and cannot be adapted to in_chans 3" in line


def test_a_damaged_detector_is_refused_by_name(shapes, tmp_path):
    made = task(shapes)
    made.save(made.model, tmp_path / "run")
    config, weights = tmp_path / "run" / "config.json", tmp_path / "run" / "model.safetensors"
    whole, content = config.read_text(), weights.read_bytes()
    for network in ({}, {"backbone": {}}, {**json.loads(whole)["network"], "num_classes": 5}):
        config.write_text(json.dumps({**json.loads(whole), "network": network}))
        with pytest.raises(ValueError, match=r"config\.json: network: .*(has no num_classes|num_classes is 5)") as raised:
            load_detector(tmp_path / "run")
        assert str(tmp_path / "run") in str(raised.value) and "\n" not in str(raised.value)
    config.write_text(whole)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable checkpoint"):
        load_detector(tmp_path / "run")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        load_detector(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_detector(tmp_path / "nowhere")


@pytest.mark.parametrize("variant", ["groupmixformer_mobile", "resnet18", "pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_layer_decay_slows_the_first_layers_and_no_head(shapes, variant):
    recipe = {"optimizer": read_recipe("nuclei", ["--optimizer.layer_decay", "0.5"]).optimizer}
    made = task(shapes, "mask_rcnn", variant, **recipe)
    (optimizer,), _ = made.configure_optimizers()
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == len(list(made.model.parameters()))
    body = {p: name for name, p in made.model.features.named_parameters()}
    assert {scale for p, scale in scales.items() if p not in body} == {1.0}
    by_name = {name: scales[p] for p, name in body.items()}
    first, *_, last = by_name
    assert by_name[first] == min(by_name.values()) <= 0.5**4
    assert by_name[last] == max(by_name.values()) <= 1
    assert len(set(by_name.values())) >= 5
    stages = ["stages", "layer", "layers"]
    found = {}
    for name, scale in by_name.items():
        parts = name.removeprefix("model.").replace("_", ".").split(".")
        stage = next((p for p in parts if p.isdecimal()), None) if parts[0] in stages else parts[0].removeprefix("layer")
        found.setdefault(stage, []).append(scale)
    ordered = [max(found[stage]) for stage in sorted(found) if stage and stage.isdecimal()]
    assert len(ordered) == 4 and ordered == sorted(ordered) and ordered[0] < ordered[-1]


@pytest.mark.parametrize("variant", ["swin_tiny_patch4_window7_224", "groupmixformer_mobile"])
def test_what_its_authors_do_not_decay_is_not_decayed(shapes, variant):
    made = task(shapes, "retinanet", variant)
    (optimizer,), _ = made.configure_optimizers()
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decays[p] for name, p in made.model.named_parameters()}
    left_alone = made.model.no_weight_decay()
    assert (len(left_alone) > 0) == variant.startswith("swin")
    assert all("relative_position_bias_table" in name and names[name] == 0 for name in left_alone)
    for name, p in made.model.named_parameters():
        assert (names[name] == 0) == (name in left_alone or p.ndim <= 1), name


@pytest.mark.parametrize("variant", [pytest.param("groupmixformer_mobile", marks=pytest.mark.slow), "resnet18", "pvt_v2_b0"])
def test_recomputed_activations_give_the_same_losses_and_gradients(shapes, variant):
    made = task(shapes, "mask_rcnn", variant, drop_path_rate=0.1 if variant != "resnet18" else 0.0)
    images, targets = batch(made, 0, 1)
    other = copy.deepcopy(made.model)
    other.set_grad_checkpointing()
    counts = []
    for model in (made.model, other):
        calls = []
        blocks = [module for module in model.features.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        handles = [block.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for block in blocks]
        found = losses(model, images, targets)
        counts.append((len(calls), found))
        for handle in handles:
            handle.remove()
    (calls, expected), (more, found) = counts
    assert more > 1.5 * calls  # what is recomputed is done twice
    assert found == pytest.approx(expected, rel=1e-5)
    for (name, p), q in zip(made.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


# From training to prediction by the command line


@pytest.fixture(scope="session")
def trained(shapes, tmp_path_factory):
    """A run that has learnt something, so that its numbers mean something, and what the command printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(["train", "nuclei", *options(shapes, run, "--epochs", "4"), "--json"]) == 0
        result = json.loads(sys.stdout.getvalue())
    assert result["mask_AP"] > 0.1
    return run, result


@pytest.mark.slow
def test_a_run_folder_holds_everything(trained, shapes):
    run, result = trained
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "versions.json", "metrics.csv", "model.safetensors", "config.json", "report.html"} <= names
    assert not [name for name in names if name.endswith(".part")]
    assert {path.name for path in (run / "report").iterdir()} == {
        *("loss.png", "metric.png", "rate.png", "precision-recall.png", "f1-confidence.png"),
        *("confusion.png", "confusion-counts.png", "classes.png"),
    }
    for path in (run / "report").iterdir():
        with Image.open(path) as image:
            image.load()
    page = (run / "report.html").read_text()
    assert f"mask AP {result['mask_AP']:.2%} on 5 held-out images" in page
    assert page.count("<img") == 10 and "could not be drawn" not in page
    rows = read_metrics(run)
    assert [(row["epoch"], row["step"], row["val_images"]) for row in rows] == [(e, 8.0 * (e + 1), 5) for e in range(4)]
    measured = [f"val_{kind}_{number}" for kind in ("box", "mask") for number in ("AP", "AP50", "AP75")]
    assert {name for name in rows[0] if name.startswith("val_")} == {*measured, "val_images"}
    best = max(rows, key=lambda row: row["val_mask_AP"])
    assert {name: result[name.removeprefix("val_")] for name in measured} == pytest.approx({n: best[n] for n in measured})
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"):
        assert len(scalars(run, name)) == 32
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["class_names"], config["category_ids"]) == ("detection", ["square", "disc"], [3, 7])


@pytest.mark.slow
def test_a_recipe_has_no_fields_of_other_tasks(trained, shapes, tmp_path, capsys):
    text = (trained[0] / "recipe.yaml").read_text()
    assert "\ndetector:" in text
    for name in ("augmentation", "segmenter", "crop_pct"):
        assert f"{name}:" not in text
    recipe = read_recipe(str(trained[0] / "recipe.yaml"))
    assert (recipe.task, recipe.data, recipe.detector.architecture) == ("detection", str(shapes), "mask_rcnn")
    for option, task_ in {
        "augmentation.mixup": "classification",
        "crop_pct": "classification",
        "segmenter.aux_loss_weight": "segmentation",
    }.items():
        line = error(capsys, "train", "nuclei", *options(shapes, tmp_path / "run", f"--{option}", "0.5"), code=2)
        assert line == f"gmf: error: {option} is a field for {task_}, and the recipe's task is detection"
    line = error(capsys, "train", "digits", "--detector.fpn-channels", "32", "--out", tmp_path / "run", code=2)
    assert line == "gmf: error: detector.fpn_channels is a field for detection, and the recipe's task is classification"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluation_gives_the_numbers_of_the_run(trained, shapes, tmp_path, capsys):
    run, result = trained
    measured = json.loads(gmf(capsys, "eval", run, "--json").out)
    names = [f"{kind}_{number}" for kind in ("box", "mask") for number in COCO_METRICS]
    assert {name: measured[name] for name in names} == {name: result[name] for name in names}
    assert (measured["task"], measured["split"], measured["images"], measured["skipped"]) == ("detection", "val", 5, [])
    assert [row["class"] for row in measured["per_class"]] == ["square", "disc"]
    for kind in ("box", "mask"):
        assert np.mean([row[f"{kind}_AP"] for row in measured["per_class"]]) == pytest.approx(measured[f"{kind}_AP"])
    text = gmf(capsys, "eval", run, "--per-class").out
    assert f"mask  AP {measured['mask_AP']:.2%}" in text
    assert "AP_large -" in text  # there is no large object
    assert "on 5 images of val" in text
    worst = min(measured["per_class"], key=lambda row: row["mask_AP"])
    assert text.strip().splitlines()[-2].split()[0] == worst["class"]

    other = json.loads(gmf(capsys, "eval", run, "--split", "train", "--json").out)
    assert (other["images"], other["split"]) == (16, "train")
    larger = json.loads(gmf(capsys, "eval", run, "--image-size", "96", "--json").out)
    assert larger["mask_AP"] != measured["mask_AP"]


@pytest.mark.slow
def test_evaluation_on_other_ids_of_the_same_classes(trained, shapes, tmp_path, capsys):
    run, result = trained
    shutil.copytree(shapes, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for record in content["annotations"]:
        record["category_id"] += 50
    for category in content["categories"]:
        category["id"] += 50
    path.write_text(json.dumps(content))
    other = json.loads(gmf(capsys, "eval", run, "--data", tmp_path / "data", "--json").out)
    assert (other["mask_AP"], other["per_class"]) == (result["mask_AP"], result["per_class"])
    for record in [*content["annotations"], *content["categories"]]:  # in the other order, as texts
        key = "category_id" if "category_id" in record else "id"
        record[key] = {53: "b", 57: "a"}[record[key]]
    path.write_text(json.dumps(content))
    other = json.loads(gmf(capsys, "eval", run, "--data", tmp_path / "data", "--json").out)
    assert (other["mask_AP"], other["per_class"]) == (result["mask_AP"], result["per_class"])
    assert other["notes"] == [f"the 2 classes of {tmp_path / 'data'} are matched by name"]
    content["categories"][0]["name"] = "ring"
    path.write_text(json.dumps(content))
    line = error(capsys, "eval", run, "--data", tmp_path / "data")
    assert "has other classes than the model: only the data has ring; only the model has disc; expected classes of" in line
    content["categories"] = content["categories"][1:]
    content["annotations"] = [record for record in content["annotations"] if record["category_id"] == "b"]
    path.write_text(json.dumps(content))
    part = json.loads(gmf(capsys, "eval", run, "--data", tmp_path / "data", "--json").out)
    assert part["mask_AP"] == result["per_class"][0]["mask_AP"]
    assert [row["mask_AP"] for row in part["per_class"]] == [part["mask_AP"], -1]
    assert part["notes"] == [f"the 1 classes of {tmp_path / 'data'} are matched by name; 1 of the model's have no image: disc"]


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said_in_one_line(trained, shapes, tmp_path, capsys):
    run, _ = trained
    line = error(capsys, "eval", run, "--split", "test")
    assert "expected a part test; found train in " in line and "annotations/instances_val.json" in line
    write_coco(tmp_path, "val", [], [])
    assert f"{tmp_path}/annotations/instances_val.json: images is [], expected one or more" in error(
        capsys, "eval", run, "--data", tmp_path
    )
    assert "none of 1 images could be read" in gmf(capsys, "predict", run, tmp_path / "annotations", code=1).err


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "--test-size"],
        ["eval", "--crop-pct", "0.9"],
        ["eval", "--crop-mode", "center"],
        ["eval", "--interpolation", "bicubic"],
        ["eval", "--plot", "x.png"],
        ["eval", "--batch-size", "2"],
        ["eval", "--root", "data"],
        ["eval", "--sliding-window"],
        ["eval", "--scales", "1,2"],
        ["eval", "--flip"],
        ["predict", "--top", "3"],
        ["predict", "--sliding-window"],
        ["predict", "--flip"],
    ],
    ids=" ".join,
)
def test_options_of_other_tasks_are_refused(trained, shapes, tmp_path, capsys, argv):
    command, option, *value = argv
    where = [shapes / "images"] if command == "predict" else []
    line = error(capsys, command, trained[0], *where, option, *value, code=2)
    assert line.startswith(f"gmf: error: {option} is for ")
    assert line.endswith(f"and {trained[0]} holds a model for detection")


@pytest.mark.slow
def test_prediction_draws_and_lists_what_is_found(trained, shapes, tmp_path, capsys):
    run, measured = trained
    images = sorted((shapes / "images").glob("val-*.png"))
    (tmp_path / "7.png").write_bytes(images[0].read_bytes())
    (tmp_path / "broken.png").write_bytes(b"not an image")
    before = {path: path.read_bytes() for path in images}
    out = tmp_path / "found"
    said = gmf(capsys, "predict", run, *images, tmp_path, "--out", out, "--score-threshold", "0.3", "--json")
    result = json.loads(said.out)
    assert result["skipped"] == [str(tmp_path / "broken.png")]
    assert f"gmf predict: skipped {tmp_path / 'broken.png'}" in said.err
    assert [row["image"] for row in result["images"]] == [str(path) for path in [*images, tmp_path / "7.png"]]
    assert {path: path.read_bytes() for path in images} == before

    coco = json.loads((out / "results.json").read_text())
    assert result["coco_results"] == str(out / "results.json")
    ids = {path.name: path.name for path in images} | {"7.png": 7}
    assert {7, "val-0.png", "val-1.png"} <= {row["image_id"] for row in coco} <= set(ids.values())
    listed = 0
    for row in result["images"]:
        name = Path(row["image"]).name
        own = [found for found in coco if found["image_id"] == ids[name]]
        sure = [found for found in own if found["score"] >= 0.3]
        assert [thing["score"] for thing in row["objects"]] == [found["score"] for found in sure]
        assert [thing["class"] for thing in row["objects"]] == [
            {3: "square", 7: "disc"}[found["category_id"]] for found in sure
        ]
        for thing, found in zip(row["objects"], sure, strict=True):
            left, top, right, bottom = thing["box"]
            assert found["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-4)
        listed += len(sure)
        (file,) = row["files"]
        assert file == str(out / name)
        with Image.open(file) as drawn, Image.open(row["image"]) as image:
            assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.01)
            plain_ = np.asarray(image.convert("RGB").resize(drawn.size, Image.Resampling.BICUBIC)).astype(int)
            assert (np.abs(np.asarray(drawn.convert("RGB")).astype(int) - plain_).max() > 50) == bool(sure)
    assert 0 < listed < len(coco)

    # The results are what pycocotools would take for the images of the data set, which the numbers above are of.
    truth = CocoImages(shapes, "val", masks=True)
    by_name = {record["file_name"]: record["id"] for record in truth.ground_truth["images"]}
    own = [{**row, "image_id": by_name[row["image_id"]]} for row in coco if row["image_id"] in by_name]
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        assert coco_metrics(truth.ground_truth, own, kind)[0]["AP"] == pytest.approx(measured[f"{name}_AP"])


@pytest.mark.slow
def test_prediction_shows_nothing_where_nothing_is_sure(trained, shapes, tmp_path, capsys):
    image = shapes / "images" / "val-0.png"
    text = gmf(capsys, "predict", trained[0], image, "--out", tmp_path / "found", "--score-threshold", "1").out
    assert f"{image}: nothing  ({tmp_path / 'found' / 'val-0.png'})" in text
    twice = [image, tmp_path / "val-0.png"]
    shutil.copy(image, twice[1])
    gmf(capsys, "predict", trained[0], *twice, "--out", tmp_path / "twice")
    assert {path.name for path in (tmp_path / "twice").iterdir()} == {"val-0.png", "val-0-2.png", "results.json"}
    content = twice[1].read_bytes()
    gmf(capsys, "predict", trained[0], twice[1], "--out", tmp_path)  # beside the image
    assert twice[1].read_bytes() == content and (tmp_path / "val-0-2.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["retinanet", "faster_rcnn"])
def test_detectors_of_boxes_train_from_the_command_line(shapes, tmp_path, capsys, architecture):
    run = tmp_path / "run"
    for split in ("train", "val"):  # boxes need no masks
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        objects = [{name: value for name, value in a.items() if name != "segmentation"} for a in content["annotations"]]
        write_coco(tmp_path / "data", split, content["images"], objects)
    shutil.copytree(shapes / "images", tmp_path / "data" / "images")
    more = ["--detector.architecture", architecture, "--ema", "0.5", "--detector.sizes", "[48]"]
    result = json.loads(gmf(capsys, "train", "nuclei", *options(tmp_path / "data", run, *more), "--json").out)
    assert result["box_AP"] == pytest.approx(read_metrics(run)[0]["val_box_AP"])
    assert not [name for name in result if name.startswith("mask")]
    assert "box AP" in (run / "report.html").read_text()
    model, _ = load_detector(run)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    prefix = "average.module."
    assert equal(model.state_dict(), {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    assert not equal(model.state_dict(), {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")})


# What is wrong with the data is said before training, or counted in it


def changed(shapes, root, split, change):
    shutil.copytree(shapes, root)
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("split", "change", "words"),
    [
        ("val", lambda c: c["categories"][0].update(name="ring"), "the categories of train and val differ"),
        ("train", lambda c: c["categories"].append({"id": 9, "name": "ring"}), "the categories of train and val differ"),
        ("val", lambda c: c["annotations"].clear(), "instances_val.json: holds no object with a mask to learn or to find"),
        ("train", lambda c: c["annotations"].clear(), "instances_train.json: holds no object with a mask to learn"),
        ("val", lambda c: c["images"].clear(), "instances_val.json: images is [], expected one or more"),
        ("train", lambda c: c.pop("images"), "instances_train.json: has no images, expected a list of objects"),
        (
            "train",
            lambda c: [a.pop("segmentation") for a in c["annotations"]],
            "no object with a mask to learn or to find: obj",
        ),
    ],
    ids=["names", "ids", "val empty", "train empty", "no images", "no images", "no masks"],
)
def test_data_that_cannot_be_used_is_refused_before_training(shapes, tmp_path, capsys, split, change, words):
    data = changed(shapes, tmp_path / "data", split, change)
    line = error(capsys, "train", "nuclei", *options(data, tmp_path / "run"))
    assert words in line
    assert str(data) in line
    assert "GMF_TRACEBACK" not in line
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_what_is_left_out_of_training_is_said(shapes, tmp_path, capsys, caplog):
    def flaw(content):
        content["images"][3].update(file_name="gone.png")
        content["annotations"][0].update(bbox=[1, 2, 0, 9])

    data = changed(shapes, tmp_path / "data", "train", flaw)
    gone = f"{data / 'images' / 'gone.png'}: no such file"
    line = error(capsys, "train", "nuclei", *options(data, tmp_path / "run", "--max-unreadable", "0"))
    assert line == f"gmf: error: 1 of 16 training images cannot be used, more than max_unreadable (0.00%) allows: {gone}"
    fit(data, tmp_path / "run", "--max-unreadable", "0.1", "--detector.architecture", "retinanet")
    said = caplog.text
    assert f"1 training images left out: {gone}" in said
    box = "object 0 of train-0.png: box [1, 2, 0, 9] is less than a pixel wide or high"
    assert f"training data: 1 objects left out: {box}" in said
    (row,) = read_metrics(tmp_path / "run")
    assert row["step"] == 7  # of 15 images
    assert {name for name in row if name.startswith("val_")} == {"val_box_AP", "val_box_AP50", "val_box_AP75", "val_images"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:3000])  # its head is whole


@pytest.mark.slow
def test_truncated_images_are_replaced_counted_and_named(shapes, trained, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "data")
    bad = [data / "images" / name for name in ("train-1.png", "val-0.png")]
    for path in bad:
        truncate(path)
    with pytest.raises(ValueError, match=r"1 of 16 training images cannot be read, more than max_unreadable") as raised:
        fit(data, tmp_path / "refused", "--max-unreadable", "0")
    assert str(bad[0]) in str(raised.value)

    run = fit(data, tmp_path / "run", "--checkpoint", trained[0], *FROZEN, "--max-unreadable", "0.1")
    result = json.loads(gmf(capsys, "eval", run, "--json").out)
    (row,) = read_metrics(run)
    assert (row["unreadable"], row["val_images"], result["images"]) == (1, 4, 4)
    assert (run / "unreadable.txt").read_text().startswith(f"{bad[0]}: not a readable image")
    assert [line.split(": not a readable image")[0] for line in result["skipped"]] == [str(bad[1])]
    # What cannot be read cannot be found: it counts neither while training nor afterwards.
    assert row["val_mask_AP"] == pytest.approx(result["mask_AP"])
    assert row["val_box_AP"] == pytest.approx(result["box_AP"])


# Stopping and continuing

LONG = [
    *("--model", "test_efficientnet", "--epochs", "2", "--grad-accum-steps", "2", "--ema", "0.9", "--drop_path_rate", "0.2"),
    *("--batch_size", "3", "--detector.sizes", "[48]", "--detector.color_jitter", "0.3", "--detector.vflip", "0.5"),
]  # 5 batches an epoch, the last of which is alone in its step


@pytest.fixture(scope="session")
def undisturbed(shapes, tmp_path_factory):
    return fit(shapes, tmp_path_factory.mktemp("undisturbed") / "run", *LONG)


class Crash(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "stops", "workers"),
    [
        (signal.SIGTERM, [(0, 2)], 0),
        (signal.SIGTERM, [(0, 2), (1, 0)], 1),
        (signal.SIGINT, [(0, 4)], 0),
        (Crash, [(0, 3), (1, 3)], 0),
    ],
    ids=["middle of an epoch", "twice", "end of an epoch", "crashes"],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(shapes, undisturbed, monkeypatch, tmp_path, capsys, how, stops, workers):
    run, waiting, real = tmp_path / "run", list(stops), DetectionModule.training_step
    assert set(stops) <= set(itertools.product(range(2), range(5)))

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) in waiting:
            waiting.remove((self.current_epoch, batch_idx))
            if how is Crash:
                raise Crash
            os.kill(os.getpid(), how)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DetectionModule, "training_step", training_step)
    more = [*LONG, "--workers", workers, "--save_minutes", 0 if how is Crash else 10]
    for _ in stops:
        gmf(capsys, "train", "nuclei", *options(shapes, run, *more), "--auto-resume", code=1 if how is Crash else 128 + how)
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0
    assert not waiting
    fit(shapes, run, *more, resume=True)
    assert differences(undisturbed, run) == []
    weights = load_file(run / "model.safetensors")
    assert weights and equal(weights, load_file(undisturbed / "model.safetensors"))


# Several processes


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_measure_what_one_does(shapes, trained, tmp_path):
    more = ["--checkpoint", trained[0], *FROZEN, "--detector.hflip", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    fit(shapes, one, *more)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    argv = [*launcher, "-m", "groupmixformer.cli.main", "train", "nuclei", *options(shapes, two, *more)]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "total batch 4 = 2 images x 2 processes" in done.stderr
    assert equal(load_file(one / "model.safetensors"), load_file(trained[0] / "model.safetensors"))
    assert equal(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))
    (first,), (second,) = read_metrics(one), read_metrics(two)
    measured = {name for name in first if name.startswith("val_")}
    assert {name: second[name] for name in measured} == {name: first[name] for name in measured}
    assert second["val_images"] == 5
    assert second["val_mask_AP"] == pytest.approx(trained[1]["mask_AP"])


# Learning


@pytest.mark.slow
@pytest.mark.exhaustive
def test_groupmixformer_learns_to_find_shapes(shapes, tmp_path):
    run = fit(shapes, tmp_path / "run", "--model", "mobile", "--optimizer.lr", "0.001", "--epochs", "10")
    rows = read_metrics(run)
    assert max(row["val_mask_AP"] for row in rows) > 0.3
    assert max(row["val_box_AP"] for row in rows) > 0.3
    found = DetectionPredictor(run, torch.device("cpu"), None, None)
    images = found.open(str(shapes), "val")
    image, record = images.read(0)
    sure = found.predict(image, record["file_name"], 0.5).result["objects"]
    assert {thing["class"] for thing in sure} <= {"square", "disc"}
    target = images.target(record)
    assert len(sure) >= len(target["labels"]) > 0


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_statistics_of_the_backbone_are_frozen_on_demand(shapes, tmp_path, frozen):
    more = ["--model", "test_resnet", "--detector.architecture", "faster_rcnn", "--detector.freeze-bn", frozen]
    run = fit(shapes, tmp_path / "run", *more, "--epochs", "2")
    trained = load_detector(run)[0].features
    fresh = timm.create_model("test_resnet", features_only=True)
    norms = {name for name in fresh.state_dict() if name.endswith(("running_mean", "running_var"))}
    assert norms
    kept = {name for name in norms if torch.equal(trained.state_dict()[name], fresh.state_dict()[name])}
    assert kept == (norms if frozen else set())
    learnt = [name for name, value in trained.named_parameters() if "bn" in name and not torch.equal(value, value.round())]
    assert learnt  # their weights, which begin as 1 and 0, learn all the same


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn"])
def test_what_is_found_does_not_depend_on_the_image_before(architecture, randomise):
    """torchvision would take the strides of its maps from the first image, here one that is half filling."""
    settings = {
        "num_classes": 2,
        "architecture": architecture,
        "image_size": 64,
        "max_size": 96,
        "fpn_channels": 16,
        "max_detections": 5,
    }
    images = torch.rand(3, 50, 131), torch.rand(3, 96, 96)
    found = []
    for order in (images, images[::-1]):
        detector = randomise(Detector(Backbone("test_convnext", {}), **settings)).eval()
        with torch.no_grad():
            boxes = [detector([image])[0]["boxes"] for image in order]
        found.append(boxes if order is images else boxes[::-1])
    torch.testing.assert_close(found[0], found[1])
