"""Evaluation: every number by hand on small cases, and equal to what timm's validation gives on the same model and images."""

import importlib.util
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.tasks.classification.metrics import BINS, evaluate_classifier, per_class, reliability

DOCS = Path(__file__).parents[1] / "docs" / "evaluate.md"


class Given(nn.Module):
    """A classifier whose images (B, classes, 1, 1) are its logits."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.eval()

    def forward(self, images):
        return images.flatten(1) * self.one


def given(logits, classes, batch_size=3):
    """Evaluate logits (N, classes) against true classes (N)."""
    images, classes = torch.as_tensor(logits)[:, :, None, None], torch.as_tensor(classes)
    return evaluate_classifier(Given(), zip(images.split(batch_size), classes.split(batch_size), strict=True))


def confident(*confidences):
    """Logits (N, 3) whose most likely class is 0, with these probabilities."""
    top = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([top, (1 - top) * 0.7, (1 - top) * 0.3], dim=1).log().float()


def write_images(root, number, classes=7):
    """Write digits as images of several sizes into a folder for each class, the classes of unequal number."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero((labels < classes) & ~((labels == 1) & (np.arange(len(labels)) % 3 > 0)))[:number]
    for i in chosen:
        image = Image.fromarray((images[i].reshape(8, 8) * 15.9).astype(np.uint8)).convert("RGB")
        folder = root / f"class-{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        image.resize((40 + 5 * (i % 7), 36 + 7 * (i % 5)), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def fitted(randomise):
    """Give a random model a classifier fitted to some photos, so that it is neither always right nor at random."""

    def fit(model, photos, sizes, strength):
        randomise(model)
        features, classes = [], []
        for size in sizes:
            loader = create_loader(
                create_dataset("", str(photos)),
                (3, size, size),
                32,
                interpolation="bicubic",
                num_workers=0,
                persistent_workers=False,
                use_prefetcher=False,
            )
            with torch.inference_mode():
                for images, labels in loader:
                    features.append(model.forward_head(model.forward_features(images), pre_logits=True).double())
                    classes.append(labels)
        features, classes = torch.cat(features), torch.cat(classes)
        mean, std = features.mean(dim=0), features.std(dim=0) + 1e-9
        found = LogisticRegression(C=strength).fit(((features - mean) / std).numpy(), classes.numpy())
        weight = torch.as_tensor(found.coef_) / std
        model.head.fc.weight.data.copy_(weight)
        model.head.fc.bias.data.copy_(torch.as_tensor(found.intercept_) - weight @ mean)
        return model

    return fit


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """45 images in 7 classes."""
    return write_images(tmp_path_factory.mktemp("images"), 45)


@pytest.fixture(scope="session")
def checkpoint(fitted, images, tmp_path_factory):
    """A folder with a small model that is right on a part of `images`, and stores a size and a crop for tests."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = GroupMixFormer(embed_dims=(40, 40, 40, 80), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=7).eval()
    fitted(model, images, (48, 64), 0.005)
    config = {"input_size": (3, 48, 48), "crop_pct": 0.9, "test_input_size": (3, 80, 80), "test_crop_pct": 1.0}
    save_checkpoint(model, folder, [f"class-{i}" for i in range(7)], config)
    return folder


def command(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def measured(capsys, *argv):
    """The JSON object of `gmf eval`."""
    return json.loads(command(capsys, "eval", *argv, "--json").out)


@torch.inference_mode()
def timms_validation(checkpoint, photos, batch_size, prefetcher, use_test_size=False, **settings):
    """What timm's validate.py reports: its model, settings, data, loader and meters, called as it calls them."""
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    config = resolve_data_config(settings, model=model, use_test_size=use_test_size)
    loader = create_loader(
        create_dataset("", str(photos), split="validation"),
        batch_size=batch_size,
        use_prefetcher=prefetcher,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        **config,
    )
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for images, classes in loader:
        logits = model(images)
        right1, right5 = accuracy(logits, classes, topk=(1, 5))
        top1.update(right1.item(), len(images))
        top5.update(right5.item(), len(images))
        loss.update(nn.functional.cross_entropy(logits, classes).item(), len(images))
    assert config["input_size"][0] == 3
    return {"top1": top1.avg / 100, "top5": top5.avg / 100, "loss": loss.avg, "images": loss.count}


def check_equal(ours, theirs):
    """Equal but for rounding in float32: timm's of the means, and its prefetcher's of colours."""
    for name in ("top1", "top5", "images"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)


SETTINGS = {
    "as stored": ([], {}),
    "another crop": (["--crop-pct", "0.7"], {"crop_pct": 0.7}),
    "squash": (["--crop-mode", "squash"], {"crop_mode": "squash"}),
    "border": (["--crop-mode", "border", "--crop-pct", "1"], {"crop_mode": "border", "crop_pct": 1.0}),
    "bilinear": (["--interpolation", "bilinear"], {"interpolation": "bilinear"}),
    "odd size": (["--image-size", "65"], {"img_size": 65}),
    "test size": (["--test-size"], {"use_test_size": True}),
    "test size, own crop": (["--test-size", "--crop-pct", "0.8"], {"use_test_size": True, "crop_pct": 0.8}),
    "size before test size": (["--test-size", "--image-size", "64"], {"use_test_size": True, "img_size": 64}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_equal_timms(name, checkpoint, images, capsys):
    options, settings = SETTINGS[name]
    ours = measured(capsys, checkpoint, "--data", images, "--batch-size", "16", *options)  # batches of 16, 16 and 13
    for prefetcher in (False, True):
        check_equal(ours, timms_validation(checkpoint, images, 16, prefetcher, **settings))
    assert 1.2 / 7 < ours["top1"] < ours["top5"] < 1
    assert ours["images"] == 45


def test_settings_change_the_numbers(checkpoint, images, capsys):
    """Else the comparison above would compare one and the same thing."""
    losses = {measured(capsys, checkpoint, "--data", images, *options)["loss"] for options, _ in SETTINGS.values()}
    assert len(losses) == len(SETTINGS)


@pytest.mark.parametrize("size", [224, 384])
def test_usual_sizes(size, checkpoint, capsys, tmp_path):
    write_images(tmp_path, 17)
    result = measured(capsys, checkpoint, "--data", tmp_path, "--image-size", size, "--crop-pct", "1")
    assert (result["input_size"], result["crop_pct"]) == ([3, size, size], 1)
    check_equal(result, timms_validation(checkpoint, tmp_path, 64, False, img_size=size, crop_pct=1.0))


def test_the_calibration_error_by_hand():
    # Bins are 1/15 wide: 0.55 and 0.58 share one, in which half are right; 0.9 and 0.92 share another, in which all are.
    found = given(confident(0.55, 0.58, 0.9, 0.92), [0, 1, 0, 0])
    by_hand = 2 / 4 * abs(0.5 - 0.565) + 2 / 4 * abs(1 - 0.91)
    assert found.metrics["calibration_error"] == pytest.approx(by_hand, abs=1e-6)


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    logits = torch.cat([confident(0.96), torch.tensor([[200.0, 0, 0]])])
    found = given(logits, [0, 1])
    assert found.confidence[1] == 1
    assert reliability(found)[-1]["images"] == 2
    assert found.metrics["calibration_error"] == pytest.approx(abs(0.5 - 0.98), abs=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_calibration_error_is_torchmetrics(scale):
    logits, classes = torch.randn(500, 10) * scale, torch.randint(10, (500,))
    theirs = multiclass_calibration_error(logits.softmax(dim=1), classes, num_classes=10, n_bins=15, norm="l1")
    assert given(logits, classes).metrics["calibration_error"] == pytest.approx(theirs.item(), abs=1e-6)


def test_logits_between_0_and_1_are_still_logits():
    """torchmetrics would take them for probabilities."""
    logits = torch.rand(50, 4)
    found = given(logits, torch.randint(4, (50,)))
    torch.testing.assert_close(found.confidence, logits.softmax(dim=1).amax(dim=1))


def test_the_bins_make_up_the_calibration_error():
    found = given(torch.randn(400, 5) * 2, torch.randint(5, (400,)))
    bins = reliability(found)
    assert len(bins) == BINS == 15
    assert [row["below"] for row in bins[:-1]] == [row["from"] for row in bins[1:]]
    assert (bins[0]["from"], bins[-1]["below"]) == (0, 1)
    assert sum(row["images"] for row in bins) == 400
    for row in bins:
        inside = (found.confidence >= row["from"]) & (found.confidence < row["below"])
        assert row["images"] == inside.sum()
        if row["images"]:
            assert row["confidence"] == pytest.approx(found.confidence[inside].mean().item(), abs=1e-6)
            assert row["top1"] == pytest.approx((found.predicted == found.true)[inside].float().mean().item(), abs=1e-6)
    assert bins[0] == {"from": 0, "below": pytest.approx(1 / 15), "images": 0, "confidence": None, "top1": None}
    error = sum(row["images"] * abs(row["top1"] - row["confidence"]) for row in bins if row["images"]) / 400
    assert found.metrics["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_accuracy_of_each_class():
    found = given(torch.eye(4)[[0, 0, 1, 2, 2, 2]], [0, 1, 1, 2, 2, 0])
    rows = per_class(found, ["a", "b", "c", "d"])
    assert [row["class"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["images"] for row in rows] == [2, 2, 2, 0]
    assert [row["top1"] for row in rows] == [0.5, 0.5, 1.0, None]
    assert found.metrics["top1"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 1000])
def test_ranks_are_timms_with_few_classes_and_with_ties(classes):
    logits, true = torch.randint(0, 3, (60, classes)).float(), torch.randint(classes, (60,))
    found = given(logits, true, batch_size=60)
    for share, percent in zip((found.metrics["top1"], found.metrics["top5"]), accuracy(logits, true, (1, 5)), strict=True):
        assert 100 * share == pytest.approx(percent.item(), abs=1e-4)
    if classes <= 5:
        assert found.metrics["top5"] == 1


def test_the_loss_is_the_mean_over_images_and_not_over_batches():
    logits, classes = torch.randn(7, 4), torch.randint(4, (7,))
    mean = nn.functional.cross_entropy(logits.double(), classes).item()
    for batch_size in (1, 3, 7):
        assert given(logits, classes, batch_size).metrics["loss"] == pytest.approx(mean, rel=1e-9)


def test_unreadable_images_are_left_out():
    logits, classes = torch.randn(9, 4), torch.randint(4, (9,))
    classes[[1, 3, 4, 5]] = -1  # one in the first batch, all of the second
    readable = classes >= 0
    logits[~readable] = float("nan")
    images = logits[:, :, None, None]
    problems = [["b.png: empty"], ["d.png: empty", "e.png: text", "f.png: half"], []]
    found = evaluate_classifier(Given(), list(zip(images.split(3), classes.split(3), problems, strict=True)))
    alone = given(logits[readable], classes[readable])
    for name in ("top1", "top5", "loss", "calibration_error", "images"):
        assert found.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-12)
    assert (found.metrics["images"], found.metrics["skipped"]) == (5, 4)
    assert found.positions.tolist() == [0, 2, 6, 7, 8]
    assert found.problems == ["b.png: empty", "d.png: empty", "e.png: text", "f.png: half"]
    filled = evaluate_classifier(Given(), list(zip(images.split(3), classes.split(3), [["b.png: empty"], [], []], strict=True)))
    assert filled.metrics["skipped"] == 1  # the others without a problem only fill up
    assert evaluate_classifier(Given(), list(zip(images.split(3), classes.split(3), strict=True))).metrics["skipped"] == 4


def test_there_must_be_an_image():
    with pytest.raises(ValueError, match="2 were given and none could be read"):
        given(torch.randn(2, 3), [-1, -1])
    with pytest.raises(ValueError, match="no image"):
        evaluate_classifier(Given(), [])


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        evaluate_classifier(Given().train(), [(torch.randn(1, 3, 1, 1), torch.zeros(1, dtype=torch.long))])


def test_values_that_are_not_finite_are_refused():
    logits = torch.randn(8, 3)
    logits[5, 1] = float("inf")
    with pytest.raises(ValueError, match="output for image 5 is not finite"):
        given(logits, [0] * 8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision_device_and_memory_layout(device, randomise):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = GroupMixFormer(embed_dims=(40, 40, 40, 80), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=7).eval()
    images, classes = torch.randn(6, 3, 48, 48), torch.randint(7, (6,))
    reference = evaluate_classifier(randomise(model), [(images, classes)])
    model = model.to(device)
    laid_out = evaluate_classifier(model, [(images.contiguous(memory_format=torch.channels_last), classes)])
    assert laid_out.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=1e-3)
    assert torch.equal(laid_out.predicted, reference.predicted)
    for dtype in (torch.bfloat16, torch.float16):
        found = evaluate_classifier(model, [(images, classes)], dtype)
        assert found.confidence.dtype == torch.float32
        assert found.metrics["loss"] != laid_out.metrics["loss"]
        assert found.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=0.05)


def test_an_evaluation_counts_the_images_of_its_time(checkpoint, images, capsys):
    result = measured(capsys, checkpoint, "--data", images)
    assert 0 < result["images_per_second"] < result["model_images_per_second"]


def test_the_documented_keys_are_those_of_the_result(checkpoint, images, capsys):
    result = measured(capsys, checkpoint, "--data", images)
    page = re.sub(r"^## Several labels.*?(?=^## )", "", DOCS.read_text(), flags=re.M | re.S)
    documented = re.findall(r"^\| `(\w+)`", page, re.M)
    assert set(documented) == set(result)
    assert result["plot"] is None
    assert result["skipped"] == []
    assert sum(row["images"] for row in result["per_class"]) == sum(row["images"] for row in result["reliability"]) == 45


def test_an_unreadable_image_is_named_and_left_out(checkpoint, images, capsys, tmp_path):
    copy = write_images(tmp_path / "images", 45)
    whole = measured(capsys, checkpoint, "--data", copy)
    (copy / "class-2" / "000.png").write_bytes(b"not an image")
    printed = command(capsys, "eval", checkpoint, "--data", copy, "--json")
    result = json.loads(printed.out)
    for name in ("top1", "top5", "loss", "calibration_error", "images", "per_class"):
        assert result[name] == pytest.approx(whole[name]) if name != "per_class" else result[name] == whole[name]
    assert len(result["skipped"]) == 1
    assert f"{copy / 'class-2' / '000.png'}: not a readable image" in result["skipped"][0]
    assert [line for line in printed.err.splitlines() if "000.png" in line] == [f"gmf eval: skipped {result['skipped'][0]}"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_numbers_of_its_images(workers, checkpoint, images, capsys, tmp_path):
    (tmp_path / "train").symlink_to(images)
    write_images(tmp_path / "val", 45)
    command(capsys, "shards", tmp_path, "--out", tmp_path / "shards", "--images-per-shard", "8")
    argv = ["--data", "wds/", "--root", tmp_path / "shards", "--batch-size", "16", "--workers", workers]
    stream, folder = measured(capsys, checkpoint, *argv), measured(capsys, checkpoint, "--data", tmp_path / "val")
    for name in ("images", "top1", "top5", "loss", "calibration_error"):
        assert stream[name] == pytest.approx(folder[name], rel=1e-5), name
    assert stream["skipped"] == []
    assert [row["images"] for row in stream["per_class"]] == [row["images"] for row in folder["per_class"]]


def test_the_classes_are_shown_worst_first(checkpoint, images, capsys):
    lines = command(capsys, "eval", checkpoint, "--data", images, "--per-class").out.splitlines()
    shown = [float(line.split()[-1].rstrip("%")) for line in lines if line.startswith("class-")]
    assert len(shown) == 7
    assert shown == sorted(shown)
    assert shown[0] < shown[-1]
    assert not [line for line in command(capsys, "eval", checkpoint, "--data", images).out.splitlines() if "class-" in line]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("deep/b.SVG", b"<?xml"), ("c.pdf", b"%PDF")])
def test_the_plot_is_a_file_of_its_kind(name, start, checkpoint, images, capsys, tmp_path):
    result = measured(capsys, checkpoint, "--data", images, "--plot", tmp_path / name)
    path = tmp_path / name
    assert result["plot"] == str(path)
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_the_diagram_shows_the_bins():
    from groupmixformer.tasks.classification.report import reliability_diagram

    found = given(torch.randn(400, 5) * 2, torch.randint(5, (400,)))
    accuracy_axes, count_axes = reliability_diagram(found).axes
    bins = reliability(found)
    assert [bar.get_height() for bar in accuracy_axes.containers[0]] == pytest.approx([row["top1"] or 0 for row in bins])
    assert [bar.get_height() for bar in count_axes.containers[0]] == [row["images"] for row in bins]
    assert tuple(accuracy_axes.lines[0].get_xdata()) == (0, 1)
    assert f"{found.metrics['calibration_error']:.2%}" in accuracy_axes.get_title()


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        (["--image-size", "0"], "expected a whole number from 1"),
        (["--image-size", "2.5"], "expected a whole number from 1"),
        (["--crop-pct", "1.5"], "up to 1"),
        (["--crop-pct", "nan"], "up to 1"),
        (["--crop-pct", "most"], "up to 1"),
        (["--crop-mode", "centre"], "did you mean center?"),
        (["--interpolation", "bicubc"], "did you mean bicubic?"),
        (["--precision", "fp23"], "did you mean fp32?"),
        (["--batch-size", "0"], "expected a whole number from 1"),
        (["--workers", "-1"], "expected a whole number from 0"),
        (["--plot", "x.gif"], ".png, .svg or .pdf"),
        (["--per-clas"], "did you mean --per-class?"),
    ],
)
def test_wrong_values_are_wrong_usage(option, hint, capsys):
    result = command(capsys, "eval", "nowhere", *option, code=2)
    assert len(result.err.strip().splitlines()) == 1
    assert hint in result.err
    assert result.out == ""


def test_a_size_below_the_models_least_is_refused(checkpoint, images, capsys):
    result = command(capsys, "eval", checkpoint, "--data", images, "--image-size", "31", code=1)
    assert len(result.err.strip().splitlines()) == 1
    assert "at least 32" in result.err


def test_without_a_test_size_the_usual_one_is_used(fitted, images, checkpoint, capsys, tmp_path):
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    save_checkpoint(model, tmp_path / "plain", data_config={"test_input_size": None, "test_crop_pct": None})
    printed = command(capsys, "eval", tmp_path / "plain", "--data", images, "--test-size", "--json")
    assert "stores no size or crop for tests" in printed.err
    assert json.loads(printed.out)["input_size"] == [3, 48, 48]


@pytest.fixture(scope="session")
def many(fitted, tmp_path_factory):
    """The registered `mobile`, right on a part of 803 images: their folder and the checkpoint's."""
    root = tmp_path_factory.mktemp("many")
    model = timm.create_model("groupmixformer_mobile", num_classes=10).eval()
    fitted(model, write_images(root / "few", 200, 10), (64, 96), 0.003)
    save_checkpoint(model, root / "checkpoint", data_config={"input_size": (3, 64, 64)})
    return write_images(root / "images", 803, 10), root / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        pytest.param(
            ["--crop-pct", "0.95", "--image-size", "96"],
            {"crop_pct": 0.95, "img_size": 96},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["--crop-mode", "border", "--image-size", "81"],
            {"crop_mode": "border", "img_size": 81},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["as stored", "another size and crop", "border"],
)
def test_numbers_equal_timms_on_many_images(options, settings, many, capsys):
    images, checkpoint = many
    ours = measured(capsys, checkpoint, "--data", images, "--batch-size", "50", *options)
    for prefetcher in (False, True):
        check_equal(ours, timms_validation(checkpoint, images, 50, prefetcher, **settings))
    assert ours["images"] == 803
    assert 1.5 / 10 < ours["top1"] < ours["top5"] < 1


@pytest.fixture(scope="session")
def imagenet(shared, fitted, tmp_path_factory):
    """250 images of ImageNet, one of every fourth class, as a folder for each, and a model right on a part of them."""
    source, root = shared("data/imagenet-sample/images"), tmp_path_factory.mktemp("imagenet")
    for path in source.glob("*.jpg"):
        folder = root / "images" / path.stem.split("_")[0]
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
    model = GroupMixFormer(embed_dims=(40, 40, 80, 160), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=250).eval()
    fitted(model, root / "images", (224, 384), 0.001)
    save_checkpoint(model, root / "checkpoint")
    return root / "images", root / "checkpoint"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("options", "settings"),
    [([], {}), (["--image-size", "384", "--crop-pct", "1"], {"img_size": 384, "crop_pct": 1.0})],
    ids=["224", "384"],
)
def test_numbers_equal_timms_on_imagenet(options, settings, imagenet, capsys):
    images, checkpoint = imagenet
    ours = measured(capsys, checkpoint, "--data", images, *options)
    check_equal(ours, timms_validation(checkpoint, images, 64, True, **settings))
    assert ours["images"] == 250
    assert 5 / 250 < ours["top1"] < ours["top5"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--crop-pct", "0.7"], ["--img-size", "65"], ["--crop-mode", "border"]])
def test_numbers_equal_the_script(options, shared, checkpoint, images, capsys, caplog):
    """timm's validate.py itself, which timm's packages leave out: from a checkout of timm."""
    spec = importlib.util.spec_from_file_location("validate", shared("timm/validate.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    argv = ["--data-dir", str(images), "--model", f"local-dir:{checkpoint}", "--pretrained", "-b", "16", "-j", "0"]
    with caplog.at_level(logging.INFO):
        theirs = script.validate(
            script.parser.parse_args([*argv, "--use-train-size", "--device", "cpu", "--log-freq", "1", *options])
        )
    ours = measured(capsys, checkpoint, "--data", images, "--batch-size", "16", *(o.replace("img", "image") for o in options))
    assert (theirs["top1"], theirs["top5"]) == (round(100 * ours["top1"], 4), round(100 * ours["top5"], 4))
    loss = float(re.findall(r"Loss: .*\( ?([\d.]+)\)  Acc@1", caplog.messages[-2])[0])
    assert ours["loss"] == pytest.approx(loss, abs=1e-4)
