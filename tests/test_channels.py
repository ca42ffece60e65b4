"""Images of other channels than colours: read by stated rules, learnt from in every task, and used as any run is."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from fastapi.testclient import TestClient
from PIL import Image
from shapes import write_coco
from timm.models import adapt_input_conv

from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.data.channels import ANY, ChannelImage, Channels, channels_of, in_colour, stretched, to_npy
from groupmixformer.data.images import find_images, read_image
from groupmixformer.deploy.routes import application
from groupmixformer.deploy.serve import Limits, Service, served
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.run import Run
from groupmixformer.tasks.backbone import open_backbone
from groupmixformer.tasks.classification.training import create_classifier
from groupmixformer.training.recipe import Recipe, RecipeError

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 65536, (20, 30, 5)).astype(np.uint16)  # (H, W, C)
TINY = ["--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--schedule.warmup_epochs", "0"]
TINY += ["--optimizer.lr_batch", "null"]


def saved(path, write, *args, **options):
    write(path, *args, **options)
    return path


def tags(orientation):
    return [(274, "H", 1, orientation, True)]


def test_all_channels_of_arrays_and_tiffs_are_read(tmp_path):
    files = [
        saved(tmp_path / "last.npy", np.save, FIVE),
        saved(tmp_path / "first.npy", np.save, FIVE.transpose(2, 0, 1)),
        saved(tmp_path / "big.npy", np.save, FIVE.astype(">u2")),
        saved(tmp_path / "one.npz", np.savez_compressed, FIVE),
        saved(tmp_path / "samples.tif", tifffile.imwrite, FIVE, photometric="minisblack", planarconfig="contig"),
        saved(
            tmp_path / "planes.tif",
            tifffile.imwrite,
            FIVE.transpose(2, 0, 1),
            photometric="minisblack",
            planarconfig="separate",
        ),
        saved(tmp_path / "pages.tiff", tifffile.imwrite, FIVE.transpose(2, 0, 1), photometric="minisblack", compression="lzw"),
    ]
    lying = np.rot90(FIVE)  # counter-clockwise, so that a quarter to the right shows it upright
    files.append(
        saved(
            tmp_path / "lying.tif",
            tifffile.imwrite,
            lying,
            photometric="minisblack",
            planarconfig="contig",
            extratags=tags(6),
        )
    )
    for path in files:
        for channels in (Channels(5), ANY):
            image = channels.read(path)
            assert np.array_equal(image.pixels, FIVE), path
            assert channels.sizes(path) == ((30, 20), (30, 20)) and channels_of(image) == 5
    torch.testing.assert_close(image.tensor, torch.from_numpy(FIVE.transpose(2, 0, 1) / 65535).float())
    assert sorted(files[:4]) == find_images([str(tmp_path / "*.np[yz]")])
    inverse = saved(tmp_path / "inverse.tif", tifffile.imwrite, FIVE[..., 0], photometric="miniswhite")
    assert np.array_equal(Channels(1).read(inverse).pixels[..., 0], 65535 - FIVE[..., 0])
    floats = FIVE[..., :2].astype(np.float32) - 30000
    torch.testing.assert_close(
        Channels(2).of_array(floats).tensor, torch.from_numpy(floats.transpose(2, 0, 1))
    )  # taken as they are
    square = np.zeros((5, 8, 5), np.uint8)
    with pytest.raises(ValueError, match="say with channels_first"):
        Channels(5).of_array(square)
    assert Channels(5, first=True).of_array(square).size == (5, 8)
    assert Channels(5, first=False).of_array(square).size == (8, 5)


def test_image_files_are_read_with_the_channels_that_are_asked_for(tmp_path):
    grey, deep, depth = tmp_path / "grey.png", tmp_path / "deep.png", tmp_path / "depth.png"
    pixels = RNG.integers(0, 256, (8, 9, 4)).astype(np.uint8)
    Image.fromarray(pixels[..., 0]).save(grey)
    Image.fromarray(FIVE[..., 0]).save(deep)
    Image.fromarray(pixels, "RGBA").save(depth)
    assert np.array_equal(Channels(1).read(grey).pixels[..., 0], pixels[..., 0])
    assert np.array_equal(Channels(1).read(deep).pixels[..., 0], FIVE[..., 0])
    assert np.array_equal(Channels(4).read(depth).pixels, pixels)
    lying = tmp_path / "lying.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.kron([[0], [255]], np.ones((16, 16))).astype(np.uint8)).save(lying, exif=exif)  # dark above
    upright = Channels(1).read(lying).pixels[..., 0]
    assert upright.shape == (16, 32) and upright[:, :12].max() > 200 > 60 > upright[:, 20:].max()
    for path in (grey, deep, depth):  # in a run for colours, as ever
        assert Channels(3).read(path).tobytes() == read_image(path).tobytes()
        assert ANY.read(path).mode == "RGB"
    for count, path, words in (
        (1, depth, "has 4 channels, expected 1"),
        (4, grey, "has 1 channel, expected 4"),
        (5, depth, "has 4 channels, expected 5: train with --in-chans 4"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            Channels(count).read(path)
        assert str(path) in str(error.value)


def test_what_is_no_image_of_numbers_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "image.npy"

    def refused(words, channels=Channels(5)):  # noqa: B008 - never changed
        with pytest.raises(ValueError, match=words) as error:
            channels.read(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)

    wrong = FIVE.astype(np.float32)
    wrong[2, 3, 4], wrong[1, 1, 4], wrong[0, 0, 1] = np.nan, np.inf, np.nan
    np.save(path, wrong)
    refused("1 of channel 1, 2 of channel 4")
    np.save(path, FIVE.astype(np.float64) * 1e300)
    refused("beyond float32")
    np.save(path, FIVE)
    refused(r"expected \(4, H, W\) or \(H, W, 4\), for in_chans 4", Channels(4))
    path.write_bytes(path.read_bytes()[:500])
    refused("not a readable array")
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    refused("pickled Python objects, which are never loaded, expected numbers")
    path.write_bytes(pickle.dumps(FIVE))
    refused("not a readable array")
    np.save(path, np.zeros((4, 4), dtype="U3"))
    refused("expected numbers")
    np.savez(path.with_suffix(""), one=FIVE, two=FIVE)
    path.with_suffix(".npz").rename(path)
    refused("holds 2 arrays")
    monkeypatch.setenv("GROUPMIXFORMER_MAX_PIXELS", "700")
    np.save(path, FIVE)
    refused("20 x 30 x 5 numbers, expected at most 0.0021 million")
    monkeypatch.undo()
    path = saved(tmp_path / "five.tif", tifffile.imwrite, FIVE, photometric="minisblack", planarconfig="contig")
    refused("has 5 channels, expected 3", Channels(3))  # as tifffile tells
    saved(path, tifffile.imwrite, FIVE[..., :3].repeat(2, axis=2).astype(np.uint8), photometric="rgb")
    refused("has 6 channels, expected 3 at most, and alpha", Channels(3))  # as Pillow does, which would leave out three
    path.write_bytes(path.read_bytes()[:200])
    refused("not a readable image")
    with pytest.raises(ValueError, match="at most"):  # an upload, whose size its head tells
        Channels(5).decode(to_npy(ChannelImage(FIVE)), "image", most_pixels=900)


def test_channels_are_shown_between_their_percentiles():
    values = np.zeros((10, 10, 4), np.float32)
    values[..., 3] = np.linspace(-5, 5, 100).reshape(10, 10)
    shown = stretched(values, (3,))
    assert shown.shape == (10, 10, 3) and (shown[0, 0] == 0).all() and (shown[-1, -1] == 255).all()
    assert not stretched(values).any()  # the first three, which are constant
    assert np.asarray(in_colour(ChannelImage(values, (0, 1, 3))))[-1, -1].tolist() == [0, 0, 255]


def test_statistics_are_those_of_numpy(tmp_path, capsys):
    images = [RNG.normal(100, 7, (5, 9 + i, 8)).astype(np.float32) for i in range(4)]
    for part in ("train", "val"):
        for name, two in zip("ab", (images[:2], images[2:]), strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for i, image in enumerate(two):
                np.save(tmp_path / part / name / f"{i}.npy", image if part == "train" else image + 1000)
    assert main(["data", str(tmp_path), "--statistics", "--in-chans", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pixels = np.concatenate([image.reshape(5, -1) for image in images], axis=1).astype(np.float64)
    np.testing.assert_allclose(found["mean"], pixels.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["std"], pixels.std(axis=1), rtol=1e-6)
    assert (found["part"], found["images"], found["pixels"], found["in_chans"]) == ("train", 4, pixels.shape[1], 5)
    assert main(["data", str(tmp_path), "--statistics", "--channels-first"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "in_chans: 5" and lines[1].startswith("mean: [") and lines[2].startswith("std: [")
    assert main(["data", str(tmp_path)]) == 0
    assert "train with --in-chans 5" in capsys.readouterr().out


def test_fields_of_channels_are_checked_together():
    for fields, words in (
        ({"in_chans": 4, "mean": [1, 2, 3], "std": [1, 1, 1]}, "for 4 channels"),
        ({"mean": [0, 0, 0]}, "expected a number of each for 3"),
        ({"in_chans": 2, "mean": [0, 0], "std": [1, 0]}, "std above 0"),
        ({"in_chans": 4, "display_channels": [0, 4, 1]}, "from 0 to 3"),
        ({"in_chans": 4, "display_channels": [0, 1]}, "one channel or three"),
        ({"in_chans": 0}, "in_chans is 0, expected an integer from 1 to 4096"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe(data="x", **fields)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_first_layer_is_adapted_as_timm_does(tmp_path, randomise, count):
    sizes = {"embed_dims": (20, 30, 40, 50), "depths": (1, 1, 1, 1), "mlp_ratios": (1, 1, 1, 1)}
    save_checkpoint(randomise(GroupMixFormer(num_classes=2, **sizes)), tmp_path, ["a", "b"])
    source = load_model(tmp_path)
    overlay = {"state_dict": source.state_dict(), "num_classes": 2, "input_size": (3, 224, 224)}
    expected = timm.create_model(
        "groupmixformer_mobile", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=count, num_classes=2, **sizes
    ).state_dict()
    made = create_classifier(Recipe("x", checkpoint=str(tmp_path), in_chans=count), ["a", "b"])
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    stem = expected["stem.conv1.weight"]
    assert torch.equal(stem, adapt_input_conv(count, source.state_dict()["stem.conv1.weight"])) and stem.shape[1] == count
    backbone, weights, _ = open_backbone("mobile", str(tmp_path), "detection", in_chans=count)
    features = timm.create_model(backbone.name, **backbone.options(weights=weights)).state_dict()
    assert torch.equal(features["model.stem.conv1.weight"], stem)
    # One for as many channels is taken as it is, and another is refused.
    made.pretrained_cfg = source.pretrained_cfg
    save_checkpoint(made, tmp_path / "own", ["a", "b"])
    own = str(tmp_path / "own")
    again = create_classifier(Recipe("x", checkpoint=own, in_chans=count), ["a", "b"])
    assert torch.equal(again.state_dict()["stem.conv1.weight"], stem)
    with pytest.raises(ValueError, match=f"is made for {count} channels, and cannot be adapted to in_chans 5"):
        create_classifier(Recipe("x", checkpoint=own, in_chans=5), ["a", "b"])


def gmf(*argv):
    assert main([str(word) for word in argv]) == 0


def depths(root):
    """Write arrays of which the fourth channel alone tells the class."""
    rng = np.random.default_rng(1)
    for part, number in (("train", 12), ("val", 4)):
        for label, name in enumerate(("near", "far")):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (36, 34, 4)).astype(np.uint8)
                pixels[..., 3] = rng.normal(60 + 120 * label, 10, (36, 34)).clip(0, 255)
                np.save(root / part / name / f"{i}.npy", pixels.transpose(2, 0, 1) if i % 2 else pixels)
    return root


@pytest.mark.slow
def test_a_class_that_the_fourth_channel_alone_tells_is_learnt_and_used(tmp_path, capsys):
    data, run = depths(tmp_path / "data"), tmp_path / "run"
    gmf("data", data, "--page", tmp_path / "page.html")
    assert main(["train", "folder", "--data", str(data), "--in-chans", "4", "--out", str(run)]) == 1
    assert f"gmf data {data} --statistics --in-chans 4" in capsys.readouterr().err
    statistics = ["--mean", "[0.5, 0.5, 0.5, 0.47]", "--std", "[0.29, 0.29, 0.29, 0.24]", "--display-channels", "[3]"]
    gmf("train", "folder", "--data", data, "--in-chans", 4, *statistics, *TINY, "--epochs", 4, "--model", "test_resnet",
        "--crop-pct", "1.0", "--optimizer.lr", "3e-3", "--out", run, "--augmentation.random-erasing", "0.1")  # fmt: skip
    assert "color_jitter would change colours, and is left out for 4 channels" in capsys.readouterr().err
    assert (run / "report.html").is_file() and len(list((run / "examples").glob("*.npy"))) == 2
    opened = Run.open(run)
    measured = opened.evaluate(device="cpu")
    assert measured.result["top1"] == 1 and opened.metrics[-1]["val_top1"] == 1
    config = json.loads((run / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5, 0.47] and config["display_channels"] == [3]
    assert config["pretrained_cfg"]["input_size"] == [4, 32, 32]
    path = data / "val" / "far" / "1.npy"
    found = opened.predict(path, device="cpu").result["classes"]
    assert found[0]["class"] == "far" and found == opened.predict(np.load(path), device="cpu").result["classes"]
    capsys.readouterr()
    gmf("predict", run, data / "val", "--device", "cpu", "--json")
    rows = json.loads(capsys.readouterr().out)["images"]
    assert all(row["classes"][0]["class"] == Path(row["image"]).parent.name for row in rows) and len(rows) == 8
    card = opened.definition.publish(opened.folder, tmp_path / "hub")
    assert "Run.open" in card.use and card.facts["input"].startswith("4 x 32")
    client = TestClient(application(Service([served(opened.predictor(device="cpu"), "run", "classification")], Limits())))
    with client:
        answer = client.post("/predict", files={"file": ("far.npy", path.read_bytes())}).json()
        assert answer["classes"][0]["class"] == "far", answer
        colour = (run / "report.html").read_bytes()
        assert client.post("/predict", files={"file": ("x.npy", colour)}).status_code == 400
    assert main(["demo", str(run), "--port", "0"]) == 1
    assert "is for 4 channels, and the page is for colours" in capsys.readouterr().err
    # Filled in without labels, too.
    gmf("train", "pretrain", "--data", data, "--in-chans", 4, *statistics, *TINY, "--epochs", 1, "--model", "test_resnet",
        "--pretrain.mask-patch", 16, "--out", tmp_path / "filled")  # fmt: skip
    assert load_model(tmp_path / "filled").pretrained_cfg["input_size"][0] == 4
    assert (tmp_path / "filled" / "report.html").is_file()
    # Fine-tuning from it takes its statistics along.
    gmf(
        "train",
        "folder",
        "--data",
        data,
        "--in-chans",
        4,
        *TINY,
        "--epochs",
        1,
        "--checkpoint",
        run,
        "--out",
        tmp_path / "next",
    )
    assert json.loads((tmp_path / "next" / "config.json").read_text())["pretrained_cfg"]["mean"][3] == 0.47


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=pytest.mark.exhaustive)])
def test_a_groupmixformer_of_four_channels_is_explained_and_exported(tmp_path, randomise, form):
    sizes = {"embed_dims": (20, 30), "depths": (1, 1), "mlp_ratios": (1, 1)}
    model = randomise(GroupMixFormer(num_classes=2, in_chans=4, **sizes))
    statistics = {"input_size": (4, 64, 64), "mean": [0.4] * 4, "std": [0.2] * 4, "display_channels": [3, 0, 1]}
    save_checkpoint(model, tmp_path / "run", ["a", "b"], statistics)
    run, image = Run.open(tmp_path / "run"), RNG.integers(0, 65536, (50, 70, 4)).astype(np.uint16)
    explained = run.explain(image, [(20, 30)], device="cpu")
    arrays = np.load(io.BytesIO(explained.files["-explained.npz"]))
    assert arrays["image"].shape == (64, 64, 3) and 60 < arrays["image"].mean() < 200
    written = run.export(form, tmp_path / f"run.{form}")
    assert json.loads(written["metadata"]["input_size"]) == [4, 64, 64] and "RGB" not in written["metadata"]["layout"]
    assert max(written["errors"].values()) < 1e-4
    with pytest.raises(ValueError, match="got 4 channels"):
        run.export("onnx", tmp_path / "whole.onnx", with_preprocessing=True)
    with pytest.raises(ValueError, match="expected 4"):
        run.predict(Image.new("RGB", (40, 40)), device="cpu")


@pytest.mark.slow
def test_segments_of_five_channels_and_objects_in_grey(tmp_path, capsys):
    rng, data = np.random.default_rng(2), tmp_path / "fields"
    for part, number in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (data / kind / part).mkdir(parents=True)
        for i in range(number):
            mask = np.zeros((40, 48), np.uint8)
            mask[8:30, 10 : 30 + i] = 1
            image = rng.integers(0, 3000, (40, 48, 5)).astype(np.uint16)
            image[..., 4] += 20000 * mask.astype(np.uint16)
            stored, plan = (image.transpose(2, 0, 1), "separate") if i % 2 else (image, "contig")
            tifffile.imwrite(data / "images" / part / f"{i}.tif", stored, photometric="minisblack", planarconfig=plan)
            Image.fromarray(mask).save(data / "masks" / part / f"{i}.png")
    (data / "classes.json").write_text(json.dumps({"classes": [{"id": 0, "name": "soil"}, {"id": 1, "name": "crop"}]}))
    five = ["--in-chans", "5", "--mean", "[0.02, 0.02, 0.02, 0.02, 0.1]", "--std", "[0.01, 0.01, 0.01, 0.01, 0.14]"]
    run = tmp_path / "segments"
    gmf("train", "camvid", "--data", data, *five, *TINY, "--epochs", 6, "--model", "test_convnext", "--checkpoint", "null",
        "--segmenter.decoder", "fpn", "--segmenter.channels", "null", "--optimizer.lr", "3e-3", "--out", run)  # fmt: skip
    opened = Run.open(run)
    assert opened.evaluate(device="cpu").result["mIoU"] == pytest.approx(opened.metrics[-1]["val_mIoU"], abs=0.02)
    assert opened.load().backbone.in_chans == 5 and (run / "report.html").is_file()
    path = data / "images" / "val" / "0.tif"
    array = tifffile.imread(path)
    assert opened.predict(path, device="cpu").result == opened.predict(array, device="cpu").result
    assert opened.predict(path, device="cpu").result["shares"]
    gmf("explain", run, path, "--out", tmp_path / "explained", "--device", "cpu")
    assert opened.definition.exportable(opened.folder, "pt2").settings["input_size"] == (5, 32, 32)

    scans = tmp_path / "scans"
    (scans / "images").mkdir(parents=True)
    for part, number in (("train", 4), ("val", 2)):
        images, objects = [], []
        for i in range(number):
            pixels = rng.integers(0, 60, (64, 64)).astype(np.uint8)
            pixels[10:40, 12:44] = 220
            name = f"{part}{i}.png"
            Image.fromarray(pixels).save(scans / "images" / name)
            images.append({"id": i, "file_name": name, "width": 64, "height": 64})
            box = [12, 10, 32, 30]
            objects.append({"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 960, "iscrowd": 0})
        write_coco(scans, part, images, objects, [{"id": 1, "name": "nodule"}])
    run = tmp_path / "boxes"
    gmf("train", "bccd", "--data", scans, "--in-chans", 1, *TINY, "--epochs", 1, "--model", "test_convnext", "--checkpoint",
        "null", "--detector.architecture", "retinanet", "--detector.fpn_channels", 32, "--detector.sizes", "[]",
        "--out", run)  # fmt: skip
    opened = Run.open(run)
    config = json.loads((run / "config.json").read_text())
    assert config["network"]["backbone"]["in_chans"] == 1 and len(config["network"]["mean"]) == 1
    path = scans / "images" / "val0.png"
    options = {"device": "cpu", "score_threshold": 0.0}
    found = opened.predict(path, **options)
    assert found.result == opened.predict(np.asarray(Image.open(path)), **options).result and found.files[".png"]
    assert opened.definition.exportable(opened.folder, "onnx").channels.count == 1
    colour = tmp_path / "colour.png"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(colour)
    assert main(["predict", str(run), str(colour), "--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert f"{colour}: has 3 channels, expected 1" in capsys.readouterr().err
