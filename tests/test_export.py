"""Exported files: the same function in the program they are for, for any size; wrong ones do not survive."""

import dataclasses
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from test_cli import error, output
from test_groupmixformer import STAGES
from timm.data import create_transform
from torch import nn

from groupmixformer import GroupMixFormer, Run
from groupmixformer.deploy.export import FORMATS, TOLERANCE, Exported, export
from groupmixformer.deploy.export_detector import unlike
from groupmixformer.deploy.preprocessing import WithPreprocessing, compare
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import RunFolder, save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.detection.model import Detector
from groupmixformer.tasks.segmentation.model import Segmenter

DOCS = Path(__file__).parents[1] / "docs"
SHALLOW = {"embed_dims": [20], "depths": [1], "mlp_ratios": [2], "num_classes": 3}  # quick to export
NAMES = ["rose", "lily & co", "Löwenzahn"]
COLORS = {"mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.5]}
KEYS = ("classes", "mean", "std", "input_size", "crop_pct", "crop_mode", "interpolation", "layout", "outputs", "version")
OTHER_SHAPES = ((1, 3, 32, 32), (5, 3, 33, 70), (1, 3, 65, 200))


@pytest.fixture(scope="module")
def model(randomise):
    return randomise(GroupMixFormer(**SHALLOW)).eval()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(model, folder, NAMES, {"input_size": (3, 64, 64), **COLORS})
    return folder


@pytest.fixture
def about():
    """What is written beside a network of `SHALLOW`, and the image to compare on."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return {"image": Image.fromarray(pixels), "input_size": (3, 64, 64), "classes": NAMES, **COLORS}


@pytest.fixture
def write_segmenter(randomise):
    """Give a function that writes a segmenter to a folder as a run does."""

    def write(decoder, folder):
        arguments = {"embed_dims": [20] * 4, "depths": [1] * 4, "mlp_ratios": [2] * 4}
        backbone = Backbone("groupmixformer_mobile", arguments)
        channels = 32 if decoder == "upernet" else 128  # else FPN norms single values at 32 x 32
        segmenter = randomise(Segmenter(backbone, 3, decoder, 64, channels=channels)).eval()
        network = {"backbone": dataclasses.asdict(backbone), "num_classes": 3, "decoder": decoder, "image_size": 64}
        config = {
            "task": "segmentation",
            "class_names": NAMES,
            "class_ids": [0, 1, 2],
            "colors": [[0, 0, 0], [255, 0, 0], [0, 255, 0]],
            "network": {**network, "channels": channels},
        }
        save_network(segmenter, folder, config)
        return segmenter

    return write


def read_metadata(format, path):
    """Read the metadata as somebody who has none of our code."""
    if format == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    if format == "pt2":
        found = dict.fromkeys(KEYS, "")
        torch.export.load(path, extra_files=found)
        return found
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path)).get_metadata()
    if format == "executorch":
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(path)
        return {key: program.load_method(key).execute([])[0] for key in KEYS}
    if format == "coreml":
        import coremltools

        description = coremltools.utils.load_spec(str(path)).description
        assert [list(put.type.multiArrayType.shape) for put in description.input] == [[1, 3, 64, 64]]
        assert [put.name for put in (*description.input, *description.output)] == ["images", "logits"]
        return description.metadata.userDefined
    if format == "litert":
        with zipfile.ZipFile(path) as archive:
            return {key: archive.read(key).decode() for key in KEYS}
    import openvino

    stored = openvino.Core().read_model(path)
    return {key: stored.get_rt_info(["groupmixformer", key]).value for key in KEYS}


def assert_same_function(format, path, network, shapes=OTHER_SHAPES):
    """Compare at sizes that the export did not."""
    run = FORMATS[format].load(path)
    for shape in shapes:
        images = torch.randn(shape)
        with torch.no_grad():
            for got, expected in zip(run(images), network(images), strict=True):
                assert (got - expected).abs().max() < TOLERANCE * expected.abs().max(), shape


@pytest.mark.parametrize(
    "format",
    [
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("pt2", marks=pytest.mark.slow),
        pytest.param("aoti", marks=pytest.mark.slow),
        pytest.param("openvino", marks=pytest.mark.slow),
        pytest.param("executorch", marks=pytest.mark.slow),
        pytest.param("coreml", marks=pytest.mark.slow),
        pytest.param("litert", marks=pytest.mark.slow),
    ],
)
def test_the_command(model, run, tmp_path, capsys, format):
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    path = tmp_path / "new" / f"file{FORMATS[format].suffix}"
    said = output(capsys, "export", run, "--format", format, "--out", path, "--json")
    result = json.loads(said.out)
    assert result["bytes"] == sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    sizes = ["64x64"] if FORMATS[format].fixed else ["64x64", "32x32", "97x129", "160x224"]
    assert list(result["errors"]) == (sizes if FORMATS[format].runs else [])
    assert max(result["errors"].values(), default=0) < TOLERANCE
    assert all(f"gmf export: comparing at {size.replace('x', ' x ')}" in said.err for size in result["errors"])
    assert "Traceback" not in said.err
    metadata = read_metadata(format, path)
    assert json.loads(metadata["classes"]) == NAMES
    assert {key: json.loads(metadata[key]) for key in COLORS} == COLORS
    assert [json.loads(metadata[key]) for key in ("input_size", "crop_pct", "interpolation")] == [[3, 64, 64], 0.875, "bicubic"]
    assert "(batch, channels, height, width)" in metadata["layout"]
    assert metadata["version"]
    folder = str(Path(export.__code__.co_filename).parent).encode()
    assert not any(folder in content for content in contents(path)), "names the machine's source files"
    if result["errors"]:
        assert_same_function(format, path, Exported(model), [(1, 3, 64, 64)] if FORMATS[format].fixed else OTHER_SHAPES)


@pytest.mark.parametrize("page", ["export.md", "onnxruntime.md"])
def test_the_clients_of_the_docs_prepare_images_as_gmf_predict_does(run, tmp_path, page):
    """A client that squeezes the whole image to the size may answer with another class."""
    predictor = Run.open(run).predictor("cpu")
    more = Run.open(run).definition.exportable(RunFolder(run), "onnx").settings["more"]
    about = {key: json.dumps(value) for key, value in {**COLORS, "input_size": [3, 64, 64], **more}.items()}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 151, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    block = re.search(r"^def prepare.*?return.*?$", (DOCS / page).read_text(), re.M | re.S)[0]
    names = {"np": np, "json": json, "Image": Image, "ImageOps": ImageOps, "height": 64, "width": 64}
    names |= {key: json.loads(value) for key, value in about.items()}
    exec(block, names)
    given = names["prepare"](tmp_path / "image.png", *[about] * (page == "export.md"))
    assert np.abs(given - predictor.prepare(image).numpy()).max() < 1e-5


def contents(path):
    """What a file and those beside it hold; of an archive, what is packed in it."""
    for file in path.parent.rglob("*"):
        if not file.is_file():
            continue
        yield file.read_bytes()
        if not zipfile.is_zipfile(file):
            continue
        with zipfile.ZipFile(file) as archive:
            yield from (archive.read(name) for name in archive.namelist())


@pytest.mark.slow
def test_onnx_names_what_is_free_and_its_opset(run, tmp_path, capsys):
    import onnx

    path = tmp_path / "maps.onnx"
    result = json.loads(output(capsys, "export", run, "--format", "onnx", "--features", "--out", path, "--json").out)
    stored = onnx.load(path)
    onnx.checker.check_model(stored)
    assert [entry.version for entry in stored.opset_import if entry.domain == ""] == [result["opset"]]
    sides = [side.dim_param or side.dim_value for side in stored.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "height", "width"]
    assert [put.name for put in stored.graph.output] == ["stride4"]
    assert [file.name for file in tmp_path.iterdir()] == ["maps.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format", "features"),
    [
        pytest.param("mobile", "onnx", False, marks=pytest.mark.exhaustive),
        ("stages", "onnx", True),
        pytest.param("stages", "pt2", True, marks=pytest.mark.exhaustive),
        pytest.param("stages", "openvino", True, marks=pytest.mark.exhaustive),
    ],
)
def test_whole_networks(randomise, about, tmp_path, name, format, features):
    made = GroupMixFormer(**STAGES, num_classes=3) if name == "stages" else timm.create_model("groupmixformer_mobile")
    network = Exported(randomise(made), features).eval()
    path = tmp_path / f"file{FORMATS[format].suffix}"
    names = ["a", "b", "c", "d"] if features else ["logits"]
    result = export(network, format, path, names=names, **about)
    assert max(result["errors"].values()) < TOLERANCE
    assert_same_function(format, path, network)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "format"),
    [
        pytest.param("upernet", "pt2", marks=pytest.mark.exhaustive),
        pytest.param("fpn", "pt2", marks=pytest.mark.exhaustive),
        ("fpn", "onnx"),
    ],
)
def test_segmenters(write_segmenter, tmp_path, capsys, decoder, format):
    segmenter = write_segmenter(decoder, tmp_path / "run")
    path = tmp_path / f"file{FORMATS[format].suffix}"
    assert json.loads(output(capsys, "export", tmp_path / "run", "--format", format, "--out", path, "--json").out)["file"]
    assert_same_function(format, path, Exported(segmenter), [(1, 3, 65, 100)])
    assert json.loads(read_metadata(format, path)["classes"]) == NAMES


@pytest.mark.slow
def test_other_channels(randomise, about, tmp_path):
    network = Exported(randomise(GroupMixFormer(**SHALLOW, in_chans=2))).eval()
    about |= {"input_size": (2, 40, 40), "mean": [0.5, 0.5], "std": [0.5, 0.5]}
    export(network, "pt2", tmp_path / "two.pt2", **about)
    assert_same_function("pt2", tmp_path / "two.pt2", network, [(1, 2, 50, 50)])


# Files that must not survive


def shifted(write):
    """Write another network than the one that is compared with, as a wrong exporter would."""

    def wrong(network, *arguments):
        network.network.head.fc.bias += 0.01
        write(network, *arguments)

    return wrong


def damaged(write):
    """Write no program."""
    return lambda network, images, names, metadata, path: path.write_bytes(b"no program")


def full(write):
    """Fail as on a disk without space."""

    def fail(network, images, names, metadata, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    return fail


def unable(write):
    """Fail as an exporter does that lacks an operator."""

    def fail(*arguments):
        raise RuntimeError("no operator\nfor this")

    return fail


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        pytest.param(shifted, "differs from the model by", marks=pytest.mark.slow),
        (damaged, "does not run, so it is removed"),
        (full, "No space left on device"),
        (unable, "pt2 cannot carry this network (RuntimeError: no operator)"),
    ],
)
def test_a_wrong_file_is_removed_and_an_earlier_one_kept(run, tmp_path, capsys, monkeypatch, breaks, message):
    monkeypatch.setitem(FORMATS, "pt2", dataclasses.replace(FORMATS["pt2"], write=breaks(FORMATS["pt2"].write)))
    path = tmp_path / "file.pt2"
    for earlier in (False, True):
        if earlier:
            path.write_text("earlier")
        said = output(capsys, "export", run, "--out", path, code=1)
        *progress, last = said.err.splitlines()
        assert last.startswith("gmf: error: ") and message in last
        assert all(line.startswith("gmf export: ") for line in progress)
        assert said.out == ""
        assert [file.read_text() for file in tmp_path.iterdir()] == ["earlier"] * earlier
        if breaks is shifted:
            break  # once is enough: it takes seconds


def test_nan_is_no_agreement(about, tmp_path, monkeypatch, model):
    nothing = dataclasses.replace(
        FORMATS["pt2"],
        write=lambda network, images, names, metadata, path: path.touch(),
        load=lambda path: lambda images: [torch.full((len(images), 3), torch.nan)],
    )
    monkeypatch.setitem(FORMATS, "pt2", nothing)
    with pytest.raises(ValueError, match="differs from the model by inf"):
        export(Exported(model).eval(), "pt2", tmp_path / "file.pt2", **about)


# What is refused


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["--format", "onxx", "--out", "x.onnx"], "did you mean onnx?", 2),
        (["--format", "onnx"], "required: --out", 2),
        (["--out", "x.engine"], "expected a name that ends in .mlpackage, .onnx, .pt2, .pte, .tflite, .xml, or --format", 2),
        (["--format", "onnx", "--out", "x.pt2"], "expected a name that ends in .onnx", 2),
        (["--format", "openvino", "--out", "x.onnx"], "expected a name that ends in .xml", 2),
        (["--format", "pt2", "--half", "--out", "x.pt2"], "--half is for --format onnx, got pt2", 2),
        (["--format", "pt2", "--features", "--with-preprocessing", "--out", "x.pt2"], "expected one of them", 2),
        (["--format", "coreml", "--out", "x.pte"], "expected a name that ends in .mlpackage", 2),
        (["--format", "onnx", "--int8", "static", "--no-check", "--out", "x.onnx"], "give no other form with it", 2),
    ],
)
def test_wrong_usage(run, capsys, argv, message, code):
    assert message in error(capsys, "export", run, *argv, code=code)


def test_a_missing_checkpoint(capsys, tmp_path):
    message = error(capsys, "export", tmp_path / "none", "--format", "onnx", "--out", tmp_path / "x.onnx", code=1)
    assert "no such checkpoint" in message


@pytest.mark.parametrize(
    ("package", "format", "extra"),
    [
        *(("onnx", "onnx", "export"), ("onnxscript", "onnx", "export"), ("onnxruntime", "onnx", "export"), ("openvino",) * 3),
        *(("executorch",) * 3, ("coremltools", "coreml", "coreml"), ("litert_torch", "litert", "litert")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(run, tmp_path, capsys, monkeypatch, package, format, extra):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / f"x{FORMATS[format].suffix}"
    message = error(capsys, "export", run, "--format", format, "--out", out, code=1)
    assert message == f"gmf: error: this needs {package}: pip install 'groupmixformer[{extra}]'"


def test_a_folder_of_core_ml_is_not_written_over(run, tmp_path, capsys):
    (tmp_path / "x.mlpackage").mkdir()
    (tmp_path / "x.mlpackage" / "Manifest.json").touch()
    message = error(capsys, "export", run, "--format", "coreml", "--out", tmp_path / "x.mlpackage", code=1)
    assert "a folder that is there already" in message


def test_preprocessing_is_for_formats_that_take_any_size(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FORMATS, "executorch", dataclasses.replace(FORMATS["executorch"], packages=()))
    argv = ["--format", "executorch", "--with-preprocessing", "--out", tmp_path / "x.pte"]
    assert "executorch takes images of one size" in error(capsys, "export", run, *argv, code=1)


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = error(capsys, "export", run, "--format", "pt2", "--out", tmp_path / "file" / "x.pt2", code=1)
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize(("decoder", "format"), [pytest.param("upernet", "onnx", marks=pytest.mark.slow), ("fpn", "openvino")])
def test_segmenters_that_a_format_cannot_carry(write_segmenter, tmp_path, capsys, decoder, format):
    write_segmenter(decoder, tmp_path / "run")
    out = tmp_path / f"x{FORMATS[format].suffix}"
    message = error(capsys, "export", tmp_path / "run", "--format", format, "--out", out, code=1)
    assert f"{format} cannot carry" in message and "--format pt2" in message


def test_features_are_for_classifiers(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"task": "segmentation"}))
    argv = ["export", tmp_path, "--format", "onnx", "--features", "--out", tmp_path / "x.onnx"]
    assert "--features is for classification" in error(capsys, *argv, code=2)


def test_a_model_in_training_mode_is_refused(about, tmp_path, model):
    with pytest.raises(ValueError, match="in training mode"):
        export(Exported(model), "pt2", tmp_path / "x.pt2", **about)
    assert not list(tmp_path.iterdir())


# Preparing images inside the file, and other forms


@pytest.mark.parametrize(("height", "width"), [(64, 64), (300, 200), (48, 333), (40, 50), (65, 129)])
@pytest.mark.parametrize(
    ("mode", "interpolation", "crop_pct"),
    [("center", "bicubic", 0.875), ("center", "bilinear", 1.0), ("squash", "bicubic", 0.9)],
)
def test_images_are_prepared_as_timm_does(height, width, mode, interpolation, crop_pct):
    """To a level and a half of 255: Pillow rounds twice."""
    config = {"input_size": (3, 64, 64), "crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation}
    seen = []

    def network(images):
        seen.append(images)
        return torch.zeros(1, 2)

    prepared = WithPreprocessing(nn.Identity(), config | COLORS)
    prepared.network.forward = network
    rng = np.random.default_rng(height)
    smooth = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    prepared(torch.from_numpy(np.array(image)))
    expected = create_transform(**config | COLORS)(image)
    levels = (seen[0][0] - expected) * torch.tensor(COLORS["std"])[:, None, None] * 255
    assert levels.abs().max() < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx", "openvino"])
def test_a_file_takes_an_image_as_it_is(run, tmp_path, capsys, format):
    path = tmp_path / f"file{FORMATS[format].suffix}"
    result = json.loads(output(capsys, "export", run, "--format", format, "--with-preprocessing", "--out", path, "--json").out)
    assert set(result["errors"]) == {"64x64", "97x129", "160x224", "480x333"} and max(result["errors"].values()) < TOLERANCE
    assert result["rounding"] < 0.02
    metadata = read_metadata(format, path)
    assert metadata["layout"] == "image: uint8, (height, width, 3), RGB" and json.loads(metadata["outputs"]) == [
        "probabilities"
    ]
    pixels = np.random.default_rng(1).integers(0, 256, (150, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (probabilities,) = FORMATS[format].load(path)(torch.from_numpy(pixels))
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    found = json.loads(output(capsys, "predict", run, tmp_path / "image.png", "--json").out)["images"][0]["classes"]
    for row in found:
        assert probabilities[row["index"]].item() == pytest.approx(row["probability"], abs=0.02)


def test_what_cannot_be_prepared_inside_is_refused(model):
    config = {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "border", "interpolation": "bicubic"} | COLORS
    with pytest.raises(ValueError, match=r"got 3 channels, bicubic, crop_mode border and crop_pct 1\.0, expected"):
        WithPreprocessing(model, config)
    prepared = WithPreprocessing(model, config | {"crop_mode": "center"}).eval()
    image = Image.new("RGB", (64, 64))
    right = prepared(torch.zeros(64, 64, 3, dtype=torch.uint8))[0].detach()
    assert compare(prepared, image, right) == 0
    with pytest.raises(ValueError, match=r"probabilities differ from those of gmf predict by 0\.5"):
        compare(prepared, image, right + 0.5)


@pytest.mark.slow
def test_half_precision(run, tmp_path, capsys):
    whole, half = (
        json.loads(output(capsys, "export", run, "--format", "onnx", *flag, "--out", tmp_path / name, "--json").out)
        for name, flag in (("whole.onnx", []), ("half.onnx", ["--half"]))
    )
    assert half["bytes"] < 0.85 * whole["bytes"]  # a network so small is half names
    assert half["tolerance"] > TOLERANCE and 0 < max(half["errors"].values()) < half["tolerance"]


@pytest.mark.slow
def test_a_file_without_a_check(run, tmp_path, capsys, model):
    path = tmp_path / "file.pt2"
    result = json.loads(output(capsys, "export", run, "--format", "pt2", "--no-check", "--out", path, "--json").out)
    assert result["errors"] == {}
    assert_same_function("pt2", path, Exported(model))


# Detectors


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["retinanet", "mask_rcnn", "keypoint_rcnn"])
def test_detectors(architecture, randomise, tmp_path, capsys):
    backbone = Backbone("groupmixformer_mobile", {"embed_dims": [20] * 4, "depths": [1] * 4, "mlp_ratios": [2] * 4})
    network = {
        "num_classes": 3,
        "architecture": architecture,
        "image_size": 64,
        "max_size": 96,
        "fpn_channels": 16,
        "max_detections": 20,
        "keypoints": 5,
    }
    detector = randomise(Detector(backbone, **network)).eval()
    config = {"task": "detection", "class_names": NAMES, "category_ids": [1, 2, 3]}
    save_network(detector, tmp_path / "run", config | {"network": {"backbone": dataclasses.asdict(backbone), **network}})
    out = tmp_path / "detector.onnx"
    result = json.loads(output(capsys, "export", tmp_path / "run", "--format", "onnx", "--out", out, "--json").out)
    assert result["objects"] > 100 and result["strays"] <= 5
    assert read_metadata("onnx", out)["classes"] == json.dumps(NAMES)

    import onnxruntime

    session = onnxruntime.InferenceSession(out)
    for size in ((50, 131), (140, 64)):  # others than the export compared at
        image = torch.rand(3, *size)
        with torch.no_grad():
            expected = detector([image])[0]
        found = [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]
        names = [item.name for item in session.get_outputs()]
        apart = unlike(found, [expected[name] for name in names], 0.05, network["max_detections"])
        assert len(apart) > 10 and (apart <= 1e-3).float().mean() >= 0.9


def objects(*boxes, score=0.9, labels=None):
    count = len(boxes)
    return torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels or [1] * count), torch.full((count,), score)


ONE, OTHER = (0, 0, 50, 100), (50, 0, 100, 100)


@pytest.mark.parametrize(
    ("got", "expected", "difference"),
    [
        (objects(ONE, OTHER), objects(OTHER, ONE), [0.0] * 4),  # in another order
        (objects((0, 1, 50, 100)), objects(ONE), [0.01] * 2),
        (objects(ONE, score=0.7), objects(ONE), [0.2] * 2),
        (objects(ONE), objects(ONE, OTHER), [0.0, 0.0, 0.5]),  # the nearest is the other
        (objects(ONE), objects(ONE, labels=[2]), [torch.inf] * 2),
        (objects(ONE), objects(), [torch.inf]),
        (objects(ONE, score=0.0505), objects(), []),  # may be missing, as its score is hardly above the least
        (objects(), objects(), []),
    ],
)
def test_objects_are_compared_with_the_nearest_of_their_class(got, expected, difference):
    assert unlike(got, expected, 0.05, 100).tolist() == pytest.approx(difference)


def test_masks_are_compared_too():
    mask = torch.zeros(1, 1, 100, 100)
    other = mask.clone()
    other[..., :10, :10] = 1
    assert unlike((*objects(ONE), mask), (*objects(ONE), other), 0.05, 100).tolist() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("format", ["pt2", "aoti", "openvino"])
def test_what_cannot_carry_a_detector_says_so(tmp_path, capsys, format):
    (tmp_path / "config.json").write_text(json.dumps({"task": "detection"}))
    out = tmp_path / f"x{FORMATS[format].suffix}"
    message = error(capsys, "export", tmp_path, "--format", format, "--out", out, code=1)
    assert f"{format} cannot carry a detector: export it with --format onnx" in message
