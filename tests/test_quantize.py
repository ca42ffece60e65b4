"""int8 files: nearly the same function, smaller, and honest about what they lose."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from test_cli import error, output

from groupmixformer import GroupMixFormer
from groupmixformer.deploy.export import FORMATS, Exported
from groupmixformer.deploy.quantize import BATCH, IMAGES, from_data, from_folder, quantize, verdict
from groupmixformer.models.checkpoint import load_checkpoint, save_checkpoint
from groupmixformer.tasks.classification.data import eval_loader, eval_transform, open_images

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
ABOUT = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classes": [str(digit) for digit in range(10)]}
CASES = [
    ("onnx", "static"),
    pytest.param("openvino", "static", marks=pytest.mark.exhaustive),
    pytest.param("pt2", "weights", marks=pytest.mark.exhaustive),
    pytest.param("pt2", "dynamic", marks=pytest.mark.exhaustive),
]


def digits(part):
    """All images of a part of the digits and their classes."""
    data = open_images("digits")
    samples = data.train(eval_transform(CONFIG), 0) if part == "train" else data.held_out(eval_transform(CONFIG))
    images, classes = zip(*[batch[:2] for batch in eval_loader(samples)], strict=True)
    return torch.cat(images), torch.cat(classes)


@pytest.fixture(scope="module")
def untrained(randomise, tmp_path_factory):
    """A folder with a classifier for what fails before it is used."""
    folder = tmp_path_factory.mktemp("untrained")
    model = randomise(GroupMixFormer(embed_dims=[20], depths=[1], mlp_ratios=[2], num_classes=10))
    save_checkpoint(model, folder, ABOUT["classes"], CONFIG)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small classifier that has learned the digits in seconds, to 90 % or more."""
    torch.manual_seed(0)
    model = GroupMixFormer(embed_dims=[40, 40], depths=[1, 1], mlp_ratios=[2, 2], num_classes=10)
    images, classes = digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(4):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    save_checkpoint(model.eval(), folder, ABOUT["classes"], CONFIG)
    return folder


@pytest.fixture(scope="module")
def some_images(write_digits, tmp_path_factory):
    """Digits without classes' folders of their own: a folder to calibrate on."""
    return write_digits(tmp_path_factory.mktemp("some"), [str(digit) for digit in range(10)], train=16, val=1)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "way"), CASES)
def test_the_command(trained, some_images, tmp_path, capsys, format, way):
    path = tmp_path / "new" / f"small{FORMATS[format].suffix}"
    argv = ["export", trained, "--format", format, "--int8", way, "--data", "digits", "--out", path, "--json"]
    if way == "static":
        argv += ["--calibrate", some_images]
    result = json.loads(output(capsys, *argv).out)
    exact, int8 = result["rows"]
    assert [row["form"] for row in result["rows"]] == ["float32", "int8"]
    assert result["calibration"] == ({"data": some_images.name, "images": IMAGES} if way == "static" else None)
    # The numbers are those of the files, found here without the code that made them.
    images, classes = digits("held_out")
    with torch.no_grad():
        expected = load_checkpoint(trained)(images).argmax(dim=1)
    got = FORMATS[format].load(path)(images)[0].argmax(dim=1)
    right = [(predicted == classes).double().mean().item() for predicted in (expected, got)]
    assert [exact["top1"], int8["top1"]] == pytest.approx(right, abs=1e-9)
    assert int8["agreement"] == pytest.approx((got == expected).double().mean().item(), abs=1e-9)
    assert right[0] > 0.85 and right[1] > right[0] - 0.03 and int8["agreement"] > 0.95
    assert exact["images"] == int8["images"] == 360
    files = list(path.parent.iterdir())
    assert {file.suffix for file in files} == {path.suffix, *FORMATS[format].data}
    assert int8["bytes"] == sum(file.stat().st_size for file in files)
    if format == "openvino":  # of so small a network the .xml is the larger part
        assert path.with_suffix(".bin").stat().st_size < 4 * sum(p.numel() for p in load_checkpoint(trained).parameters()) / 2
    assert min(row[key] for row in result["rows"] for key in ("milliseconds", f"milliseconds_{BATCH}")) > 0
    assert result["verdict"] == verdict(exact, int8)
    assert json.loads(result["metadata"]["int8"])["way"] == way
    assert json.loads(stored(format, path)["int8"]) == {"way": way, "calibration": result["calibration"]}
    assert json.loads(stored(format, path)["classes"]) == ABOUT["classes"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["weights", "dynamic"])
def test_images_whose_last_map_is_one_token(randomise, tmp_path, way):
    """At 32 x 32, where PyTorch would refuse what it did not see while tracing."""
    model = GroupMixFormer(embed_dims=(10,) * 4, depths=(1,) * 4, mlp_ratios=(2,) * 4, num_classes=10)
    network = Exported(randomise(model)).eval()
    held_out = eval_loader(open_images("digits").held_out(eval_transform(CONFIG)))
    result = quantize(network, "pt2", way, tmp_path / "int8.pt2", Image.new("RGB", (9, 9)), held_out, None, "", ABOUT)
    run = FORMATS["pt2"].load(tmp_path / "int8.pt2")
    assert run(torch.randn(1, 3, 32, 32))[0].shape == (1, 10)
    assert result["rows"][1]["agreement"] > 0.8


def stored(format, path):
    """Read the metadata as somebody who has none of our code."""
    if format == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    if format == "pt2":
        found = {"int8": "", "classes": ""}
        torch.export.load(path, extra_files=found)
        return found
    import openvino

    model = openvino.Core().read_model(path)
    return {key: model.get_rt_info(["groupmixformer", key]).value for key in ("int8", "classes")}


@pytest.mark.slow
def test_calibration_on_nothing_like_the_data_is_found_out(trained, tmp_path):
    """Ranges from images of one colour fit no digit: the table and the verdict say so, and the file is written."""
    network = Exported(load_checkpoint(trained)).eval()
    held_out = eval_loader(open_images("digits").held_out(eval_transform(CONFIG)))
    image = Image.fromarray(load_sample_image("china.jpg"))
    flat = torch.zeros(8, 3, 32, 32)
    path = tmp_path / "bad.onnx"
    result = quantize(network, "onnx", "static", path, image, held_out, flat, "one colour", ABOUT)
    exact, int8 = result["rows"]
    assert path.is_file()
    assert exact["top1"] - int8["top1"] > 0.1
    assert any(line.startswith("int8 loses") and line.endswith("points of top-1, more than 1") for line in result["verdict"])


ROW = {"top1": 0.9, "milliseconds": 10.0, "milliseconds_16": 100.0, "bytes": 20_000_000}


@pytest.mark.parametrize(
    ("int8", "lines"),
    [
        ({}, []),
        ({"top1": 0.89}, []),  # one point exactly
        ({"top1": 0.88}, ["int8 loses 2.0 points of top-1, more than 1"]),
        ({"top1": 0.95, "milliseconds": 9.0}, []),
        ({"milliseconds": 12.0}, ["int8 is slower on one image: 12.0 ms instead of 10.0"]),
        ({"milliseconds_16": 130.0}, ["int8 is slower on 16 images: 130.0 ms instead of 100.0"]),
        ({"bytes": 31_000_000}, ["int8 is larger: 31.0 MB instead of 20.0"]),
    ],
)
def test_verdict(int8, lines):
    assert verdict(ROW, ROW | int8) == lines


def test_images_to_calibrate_on_are_drawn_alike_each_time(some_images, tmp_path):
    images, problems = from_folder(str(some_images), CONFIG)
    assert images.shape == (IMAGES, 3, 32, 32) and problems == []
    assert torch.equal(images, from_folder(str(some_images), CONFIG)[0])
    own, _ = from_data(open_images("digits").train(eval_transform(CONFIG), 0), "digits")
    everything = {image.numpy().tobytes() for image in digits("train")[0]}
    assert len({image.numpy().tobytes() for image in own} & everything) == IMAGES
    # One that cannot be read is left out and named.
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images, problems = from_folder(str(tmp_path), CONFIG)
    assert len(images) == 1 and len(problems) == 1 and "bad.png" in problems[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "pt2", "--int8", "static"], "--int8 static is for --format onnx and openvino, got pt2"),
        (["--format", "onnx", "--int8", "weights"], "--int8 weights is for --format pt2, got onnx"),
        (["--format", "aoti", "--int8", "dynamic"], "--int8 dynamic is for --format pt2, got aoti"),
        (["--format", "pt2", "--int8", "dynamic", "--calibrate", "x"], "--calibrate is for --int8 static"),
        (["--format", "onnx", "--calibrate", "x"], "--calibrate is for --int8"),
        (["--format", "onnx", "--data", "digits"], "--data is for --int8"),
        (["--format", "onnx", "--int8", "static", "--features"], "--int8 is for the logits of classifiers"),
    ],
)
def test_wrong_usage(untrained, tmp_path, capsys, argv, message):
    out = tmp_path / f"x{FORMATS[argv[1]].suffix}"
    assert message in error(capsys, "export", untrained, *argv, "--out", out, code=2)


def test_segmenters_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"task": "segmentation"}))
    argv = ["export", tmp_path, "--format", "pt2", "--int8", "weights", "--out", tmp_path / "x.pt2"]
    assert "--int8 is for classification, and" in error(capsys, *argv, code=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calibrate", "EMPTY", "--data", "digits"], "no folder with images, expected one to calibrate on"),
        (["--calibrate", "NONE", "--data", "digits"], "no folder with images, expected one to calibrate on"),
        (["--data", "digits"], "has no recipe that names its training data: name a folder of images with --calibrate"),
        (["--calibrate", "EMPTY"], "has no recipe that names a data set: name one with --data"),
        (["--calibrate", "PHOTOS", "--data", "PHOTOS"], "has other classes than the model: only the data has one, zero"),
    ],
)
def test_data_that_does_not_fit(untrained, photos, tmp_path, capsys, argv, message):
    (tmp_path / "empty").mkdir()
    paths = {"EMPTY": tmp_path / "empty", "NONE": tmp_path / "none", "PHOTOS": photos}
    argv = [paths.get(word, word) for word in argv]
    out = tmp_path / "x.onnx"
    assert message in error(capsys, "export", untrained, "--format", "onnx", "--int8", "static", *argv, "--out", out, code=1)
    assert not out.exists()


@pytest.mark.parametrize(("package", "format", "way"), [("nncf", "openvino", "static"), ("torchao", "pt2", "weights")])
def test_a_missing_package_is_named_with_its_extra(untrained, some_images, tmp_path, capsys, monkeypatch, package, format, way):
    monkeypatch.setitem(sys.modules, package, None)
    argv = ["export", untrained, "--format", format, "--int8", way, "--data", "digits", "--out", tmp_path / "x"]
    argv[-1] = tmp_path / f"x{FORMATS[format].suffix}"
    argv += ["--calibrate", some_images] if way == "static" else []
    message = error(capsys, *argv, code=1)
    assert message == f"gmf: error: this needs {package}: pip install 'groupmixformer[quantization]'"
