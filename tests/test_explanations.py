"""gmf explain, for every task: where queries land, what is chosen, figures and arrays, what is said when it fails."""

import functools
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from groupmixformer import GroupMixFormer, attention_maps
from groupmixformer.cli.main import main
from groupmixformer.models.attention_maps import class_relevance, overlays
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run import Run
from groupmixformer.run_folder import save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.detection.model import Detector
from groupmixformer.tasks.predictor import View
from groupmixformer.tasks.segmentation.model import Segmenter
from groupmixformer.visual import figures
from groupmixformer.visual.figures import Row, overlay_figure

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 1, 1.5, 3)}
NAMES = ["cat", "dog", "a house"]
CPU = torch.device("cpu")
BACKBONE = Backbone("groupmixformer_mobile", STAGES)


def output(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def error(capsys, *argv, code=1):
    """The single line that a failed command leaves on stderr."""
    result = output(capsys, *argv, code=code)
    lines = result.err.strip().splitlines()
    assert (result.out, len(lines)) == ("", 1), lines
    assert "GMF_TRACEBACK" not in lines[0]
    return lines[0]


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, randomise):
    """Runs of every task with weights that see something, and a few images."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("explained")
    config = {"input_size": (3, 128, 128), "crop_pct": 0.8}
    save_checkpoint(randomise(GroupMixFormer(**STAGES, num_classes=3)), root / "classifier", NAMES, config)
    heads = {
        "num_classes": 3,
        "architecture": "mask_rcnn",
        "image_size": 256,
        "max_size": 320,
        "fpn_channels": 16,
        "anchor_scale": 2.0,
    }
    detector = Detector(BACKBONE, **heads, max_detections=40)
    randomise(detector.features)
    network = {"backbone": asdict(BACKBONE), **heads, "max_detections": 40}
    stored = {"task": "detection", "class_names": NAMES, "category_ids": [1, 2, 3], "network": network}
    save_network(detector, root / "detector", stored)
    heads = {"num_classes": 3, "decoder": "fpn", "channels": 64, "auxiliary": False, "image_size": 72}
    segmenter = Segmenter(BACKBONE, **heads)
    randomise(segmenter.features)
    stored = {
        "task": "segmentation",
        "class_names": NAMES,
        "class_ids": [0, 1, 2],
        "colors": [[0, 0, 0], [9, 9, 9], [99, 0, 0]],
    }
    save_network(segmenter, root / "segmenter", stored | {"network": {"backbone": asdict(BACKBONE), **heads}})
    photo(90, 150).save(root / "wide.png")
    (root / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def explainer(folder):
    """Give the explainer of a run; tests that change it open their own."""
    return functools.cache(lambda name: Run.open(folder / name).explainer(CPU))


def arrays(path):
    with np.load(path) as stored:
        return dict(stored)


# Where pixels go


@pytest.mark.parametrize("size", [(90, 150), (141, 99), pytest.param((33, 32), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [
        *("center", "squash"),
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("border", "border, all", "wide", "detector", "segmenter")),
    ],
)
def test_queries_follow_the_image(explainer, tmp_path, randomise, how, size):
    """A white square is found where its middle is said to be, and that is mapped back to it."""
    if how in ("detector", "segmenter"):
        sees = explainer(how)
    else:
        share = 1.0 if how in ("border, all", "wide") else 0.8
        config = {"input_size": (3, 96, 128) if how == "wide" else (3, 128, 128), "crop_pct": share}
        config["crop_mode"] = how.split(",")[0] if how != "wide" else "center"
        save_checkpoint(randomise(GroupMixFormer(**STAGES, num_classes=3)), tmp_path / "run", NAMES, config)
        sees = Run.open(tmp_path / "run").explainer(CPU)
    height, width = size
    for point in ((height // 2, width // 2), (height // 3, width // 2 + 9), (height // 2 + 9, width // 3 + 1)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[point[0] - 2 : point[0] + 3, point[1] - 2 : point[1] + 3] = 255
        view = sees.view(Image.fromarray(pixels))
        assert view.images.shape[-2] >= view.size[0] and view.images.shape[-1] >= view.size[1]
        bright = view.pixels.max(axis=2) > 150  # what is added around is darker
        middle = np.argwhere(bright).mean(axis=0)
        seen = view.to_input(point)
        reach = max(view.factors)
        assert np.abs(middle - seen).max() <= 0.5 * reach + 1, (point, seen, middle)
        assert np.abs(np.subtract(view.to_original(seen), point)).max() <= 1


def test_what_is_not_seen_is_refused(folder):
    view = View(torch.zeros(1, 3, 50, 100), np.zeros((50, 100, 3), np.uint8), (100, 400), (0.5, 0.5), (0, -50))
    assert [view.to_input((y, x)) for y, x in ((0, 100), (99, 299), (30, 200))] == [(0, 0), (49, 99), (15, 50)]
    for point, words in (((0, 99), "columns 101 to 299"), ((0, 300), "rows 1 to 99"), ((100, 100), "a row from 0 to 99")):
        with pytest.raises(ValueError, match=words):
            view.to_input(point)
    added = View(torch.zeros(1, 3, 50, 50), np.zeros((50, 50, 3), np.uint8), (30, 50), (1, 1), (10, 0))
    assert (added.to_input((0, 0)), added.to_original((0, 7)), added.to_original((49, 7))) == ((10, 0), (0, 7), (29, 7))
    assert (view.frame, added.frame) == ((100, 0, 300, 100), (0, 0, 50, 30))


# Classes


@pytest.mark.slow
def test_a_classifier_is_explained_without_lightning(folder, tmp_path):
    command = ["explain", str(folder / "classifier"), str(folder / "wide.png"), "--out", str(tmp_path)]
    script = (
        f"import sys; from groupmixformer.cli.main import main; assert main({command}) == 0; print('lightning' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_several_images_in_one_call(folder, explainer, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "more").mkdir()
    photo(90, 150, seed=1).save(tmp_path / "more" / "wide.png")
    images = [folder / "wide.png", folder / "broken.png", tmp_path / "more"]
    given = ["--query", "60,70", "--query", "50,50", "--stage", "2", "--out", out, "--json"]
    result = output(capsys, "explain", folder / "classifier", *images, *given)
    assert "gmf explain: skipped" in result.err and "broken.png: not a readable image" in result.err
    found = json.loads(result.out)
    assert (found["task"], found["skipped"]) == ("classification", [str(folder / "broken.png")])
    assert [image["figure"] for image in found["images"]] == [str(out / f"{name}-explained.png") for name in ("wide", "wide-2")]
    model = explainer("classifier").predictor.model
    for image in found["images"]:
        stored = arrays(image["arrays"])
        assert (image["queries"], image["queries_from"], image["stages"]) == ([[60, 70], [50, 50]], "given", [2])
        assert Image.open(image["figure"]).format == "PNG"
        view = explainer("classifier").view(Image.open(image["image"]))
        assert np.array_equal(stored["image"], view.pixels) and stored["image"].shape == (128, 128, 3)
        assert stored["queries"].tolist() == [[60, 70], [50, 50]]
        assert [tuple(point) for point in stored["queries_seen"]] == [view.to_input((60, 70)), view.to_input((50, 50))]
        assert stored["group_sizes"].tolist() == [1, 1, 3, 3, 5, 5, 7, 7]
        assert stored["local_stage2"].shape == (2, 8, 4, 7, 7) and stored["constant_stage2"].shape == (2, 8, 4)
        for i, point in enumerate(stored["queries_seen"].tolist()):
            expected = attention_maps(model, view.images, point, stage=2)[0].detach().numpy()
            np.testing.assert_allclose(stored["maps_stage2"][i], expected, rtol=1e-5, atol=1e-7)
        relevance, logits = class_relevance(model, view.images, stage=2)
        np.testing.assert_allclose(stored["relevance"], relevance[0].numpy(), atol=1e-6)
        probability, index = logits[0].softmax(0).max(dim=0)
        assert (image["class"], image["index"]) == (NAMES[index], index) == (str(stored["class"]), int(stored["index"]))
        assert image["probability"] == pytest.approx(probability.item()) == float(stored["probability"])
        assert (image["relevance_stage"], image["relevant"]) == (2, True)


@pytest.mark.slow
def test_the_figure_has_the_maps_of_each_query_and_stage(folder, explainer, monkeypatch):
    drawn = []

    def draw(rows, *titles):
        drawn.append((rows, titles))
        return overlay_figure(rows, *titles)

    monkeypatch.setattr(figures, "overlay_figure", draw)
    classes = explainer("classifier")
    image = Image.open(folder / "wide.png")
    found = classes.explain(image, [(60, 70), (50, 50)], [2, 1])
    view = classes.view(image)
    ((rows, titles),) = drawn
    name, probability = found.result["class"], found.result["probability"]
    assert titles == ("query marked", f"relevance, stage 2:\n{name} ({probability:.1%})")
    expected = [(query, stage) for query in ((60, 70), (50, 50)) for stage in (1, 2)]
    assert [row.name for row in rows] == [f"query {y}, {x}\nstage {stage}" for (y, x), stage in expected]
    assert [row.relevance is not None for row in rows] == [True, False, False, False]
    for row, (query, stage) in zip(rows, expected, strict=True):
        assert row.point == view.to_input(query)
        np.testing.assert_array_equal(row.image, view.pixels / np.float32(255))
        strengths = overlays(classes.predictor.model, view.images[0], view.to_input(query), stage)
        np.testing.assert_allclose(row.strengths, strengths, rtol=1e-4, atol=1e-6)


def test_without_a_query_the_most_relevant_pixel_is_taken(folder, tmp_path, capsys):
    result = output(capsys, "explain", folder / "classifier", folder / "wide.png", "--out", tmp_path)
    stored = arrays(tmp_path / "wide-explained.npz")
    assert stored["relevance"][tuple(stored["queries_seen"][0])] == stored["relevance"].max() == 1
    row, column = stored["queries"][0]
    name, probability = str(stored["class"]), float(stored["probability"])
    assert f"wide.png: {name} {probability:.1%}, most relevant at {row},{column}" in result.out
    assert int(stored["relevance_stage"]) == 3 and "maps_stage2" in stored


@pytest.mark.parametrize("wanted", ["a house", "2"])
def test_a_class_by_name_or_number(folder, wanted):
    explainer = Run.open(folder / "classifier").explainer(CPU, wanted_class=wanted)
    image = Image.open(folder / "wide.png")
    about = explainer.choose(image, explainer.view(image), 3, None).about
    assert (about["class"], about["index"]) == ("a house", 2)


@pytest.mark.parametrize(("form", "start"), [("svg", b"<?xml"), pytest.param("pdf", b"%PDF", marks=pytest.mark.slow)])
def test_figures_in_other_forms(folder, tmp_path, capsys, form, start):
    given = ["explain", folder / "classifier", folder / "wide.png", "--format", form, "--stage", "0", "2", "--out"]
    output(capsys, *given, tmp_path)
    content = (tmp_path / f"wide-explained.{form}").read_bytes()
    assert content.startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide-explained.npz", f"wide-explained.{form}"]
    stored = arrays(tmp_path / "wide-explained.npz")
    assert (stored["maps_stage0"].shape, stored["maps_stage2"].shape) == ((1, 8, 32, 32), (1, 8, 8, 8))
    assert int(stored["relevance_stage"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_same_image_gives_the_same_figure(explainer, folder, form):
    first, second = (explainer("classifier").explain(Image.open(folder / "wide.png"), form=form).files for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_nothing_that_speaks_for_a_class_is_said(tmp_path, capsys, randomise):
    model = randomise(GroupMixFormer(**STAGES, num_classes=2))
    nn.init.zeros_(model.head.fc.weight)
    save_checkpoint(model, tmp_path / "run", ["one", "two"], {"input_size": (3, 64, 64)})
    photo(80, 80).save(tmp_path / "a.png")
    result = output(capsys, "explain", tmp_path / "run", tmp_path / "a.png", "--class", "two", "--out", tmp_path, "--json")
    (image,) = json.loads(result.out)["images"]
    assert (image["relevant"], image["queries_from"], image["class"]) == (False, "centre", "two")
    assert not arrays(image["arrays"])["relevance"].any()
    found = Run.open(tmp_path / "run").explainer(CPU).explain(Image.open(tmp_path / "a.png"))
    assert "for which nothing speaks in stage 2: its relevance is zero" in found.text


@pytest.mark.slow
def test_other_backbones_have_relevance_or_one_line(folder, tmp_path, capsys):
    config = {"input_size": (3, 160, 160), "label_names": NAMES}
    for name in ("test_resnet", "test_vit"):
        save_checkpoint(timm.create_model(name, num_classes=3), tmp_path / name, NAMES, config)
    photo = folder / "wide.png"
    result = output(capsys, "explain", tmp_path / "test_resnet", photo, "--query", "9,40", "--out", tmp_path, "--json")
    assert "test_resnet: has no Group-Mix Attention to show at --query: figures show what speaks for the answer" in result.err
    (image,) = json.loads(result.out)["images"]
    assert (image["stages"], image["relevance_stage"]) == ([], 3)
    stored = arrays(image["arrays"])
    assert stored["relevance"].shape == (160, 160) and not [name for name in stored if name.startswith("maps")]
    assert "cannot be shown" in error(capsys, "explain", tmp_path / "test_vit", photo, "--out", tmp_path)


# Objects


@pytest.fixture(scope="module")
def objects(explainer):
    """What the detector finds in an image of its own size: forty small boxes."""
    image = photo(256, 320)
    pixels = torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()
    model = explainer("detector").model  # loaded outside of what follows, whose tensors have no gradients
    with torch.inference_mode():
        (found,) = model([pixels])
    assert len(found["boxes"]) == 40
    return image, {name: value.numpy() for name, value in found.items()}


@pytest.mark.slow
def test_the_relevance_of_an_object_is_around_it(folder, objects):
    """Of several that look alike, it lights up the chosen one: on the last stage, what the region and the pyramid reach."""
    image, found = objects
    explainer = Run.open(folder / "detector").explainer(CPU)
    seen = 0
    for number in range(12):
        explainer.wanted = number
        chosen = explainer.choose(image, explainer.view(image), 3, None)
        about, box = chosen.about, found["boxes"][number]
        assert (about["class"], about["index"]) == (NAMES[about["index"]], found["labels"][number] - 1)
        assert (about["object"], about["objects"]) == (number, 40)
        assert about["probability"] == pytest.approx(found["scores"][number], rel=1e-4)
        np.testing.assert_allclose(about["box"], box, atol=1e-2)
        np.testing.assert_allclose(chosen.box, box, atol=1e-2)
        assert chosen.relevance.shape == (256, 320)
        if not chosen.relevance.any():  # with random weights nothing may speak for an object
            continue
        seen += 1
        assert chosen.relevance.max() == 1
        places = np.argwhere(chosen.relevance)[:, ::-1]  # x, y
        assert (places.min(axis=0) >= box[:2] - 70).all() and (places.max(axis=0) <= box[2:] + 70).all()
    assert seen >= 3


@pytest.mark.slow
def test_the_object_nearest_to_a_query_is_taken(folder, objects):
    image, _ = objects
    explainer = Run.open(folder / "detector").explainer(CPU)
    view = explainer.view(image)
    head = explainer.model.network.roi_heads.box_predictor.cls_score
    while explainer.choose(image, view, 3, None).about["probability"] >= 0.5:  # no score is above 0.5: the best counts alone
        head.bias.data += torch.tensor([0.5, 0.0, 0.0, 0.0])
    assert [explainer.choose(image, view, 3, at).about["object"] for at in (None, (250, 5))] == [0, 0]
    with torch.no_grad():  # now all are sure
        head.bias += torch.tensor([-20.0, 3.0, 0.0, 0.0])
        boxes = explainer.model([torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()])[0]["boxes"].tolist()
    for left, top, right, bottom in (boxes[3], boxes[20]):
        y, x = int((top + bottom) / 2), int((left + right) / 2)
        about = explainer.choose(image, view, 3, (y, x)).about
        around = [i for i, box in enumerate(boxes) if box[0] <= x + 0.5 <= box[2] and box[1] <= y + 0.5 <= box[3]]
        areas = {i: (boxes[i][2] - boxes[i][0]) * (boxes[i][3] - boxes[i][1]) for i in around}
        assert around and about["object"] == min(areas, key=areas.get)
    for row, column in ((5, 5), (250, 5), (250, 314), (5, 314)):  # near corners
        x, y = column + 0.5, row + 0.5
        away = [np.hypot(max(left - x, x - right, 0), max(top - y, y - bottom, 0)) for left, top, right, bottom in boxes]
        assert explainer.choose(image, view, 3, (row, column)).about["object"] == np.argmin(away) and min(away) > 0


@pytest.mark.parametrize("size", [(90, 150), pytest.param((140, 101), marks=pytest.mark.slow)])
def test_objects_are_explained_on_the_image(folder, explainer, tmp_path, capsys, size):
    photo(*size).save(tmp_path / "a.png")
    result = output(capsys, "explain", folder / "detector", tmp_path / "a.png", "--object", "1", "--out", tmp_path, "--json")
    (image,) = json.loads(result.out)["images"]
    assert image["object"] == 1 and image["objects"] >= 2 and image["class"] in NAMES
    stored = arrays(image["arrays"])
    height, width = stored["image"].shape[:2]
    assert stored["relevance"].shape == (height, width) and height / width == pytest.approx(size[0] / size[1], rel=0.02)
    assert stored["maps_stage2"].shape == (1, 8, -(-height // 32) * 2, -(-width // 32) * 2)  # with the filling
    chosen = explainer("detector").choose(photo(*size), explainer("detector").view(photo(*size)), 3, None)
    np.testing.assert_allclose(
        chosen.box,
        np.array(chosen.about["box"]) * [width / size[1], height / size[0], width / size[1], height / size[0]],
        rtol=1e-5,
    )
    original = np.asarray(photo(*size).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(stored["image"] - original).mean() < 3


@pytest.mark.slow
def test_an_image_without_objects_has_attention_alone(folder, tmp_path, capsys):
    explainer = Run.open(folder / "detector").explainer(CPU)
    explainer.model.network.roi_heads.score_thresh = 1.0
    found = explainer.explain(Image.open(folder / "wide.png"))
    assert found.result["queries_from"] == "centre" and not found.result["relevant"] and found.result["objects"] == 0
    assert found.text == "nothing found, so there is no relevance"
    assert set(found.files) == {"-explained.png", "-explained.npz"}
    explainer.wanted = 0
    with pytest.raises(ValueError, match="got object 0, and 0 were found"):
        explainer.explain(Image.open(folder / "wide.png"))


# Segments


def test_the_relevance_of_a_segment_is_that_of_its_pixels(folder):
    """Against the parts of the network called one after the other."""
    explainer = Run.open(folder / "segmenter").explainer(CPU)
    image = Image.open(folder / "wide.png")
    view = explainer.view(image)
    assert view.images.shape == (1, 3, 96, 128) and view.size == (72, 120)
    network = explainer.model.network
    features = network.encoder(view.images)
    logits = network.segmentation_head(network.decoder(features))[0, :, :72, :120]
    labels = logits.argmax(dim=0)
    for stage in (1, 3):
        wanted = int(labels[20, 30])
        explainer.wanted = wanted
        chosen = explainer.choose(image, view, stage, None)
        score = logits[wanted][labels == wanted].sum()
        (gradient,) = torch.autograd.grad(score, features[stage + 2], retain_graph=True)  # after the image and a dummy
        expected = (gradient * features[stage + 2]).sum(dim=1, keepdim=True).relu()
        expected = nn.functional.interpolate(expected, (96, 128), mode="bilinear")[0, 0, :72, :120].detach()
        np.testing.assert_allclose(chosen.relevance, expected / expected.max(), atol=1e-4)
        assert chosen.about["share"] == pytest.approx((labels == wanted).float().mean().item())


@pytest.mark.slow
def test_which_segment_is_explained(folder, tmp_path, capsys):
    explainer = Run.open(folder / "segmenter").explainer(CPU)
    image = Image.open(folder / "wide.png")
    with torch.no_grad():
        explainer.model.network.segmentation_head[0].bias.zero_()
    view = explainer.view(image)
    labels = explainer.model(view.images[..., :72, :120])[0].argmax(dim=0)
    largest = int(labels.flatten().bincount().argmax())
    assert explainer.choose(image, view, 3, None).about["index"] == largest
    other = next(index for index in labels.unique().tolist() if index != largest)
    row, column = (labels == other).nonzero()[0].tolist()
    assert explainer.choose(image, view, 3, view.to_original((row, column))).about["index"] == other
    explainer.wanted = next(index for index in range(3) if index != other)
    assert explainer.choose(image, view, 3, view.to_original((row, column))).about["index"] == explainer.wanted


@pytest.mark.slow
def test_segments_are_explained_from_the_command_line(folder, tmp_path, capsys):
    given = ["--class", "dog", "--query", "40,60", "--format", "pdf", "--out", tmp_path, "--json"]
    result = output(capsys, "explain", folder / "segmenter", folder / "wide.png", *given)
    (image,) = json.loads(result.out)["images"]
    assert (image["class"], image["index"], image["queries"]) == ("dog", 1, [[40, 60]])
    assert arrays(image["arrays"])["relevance"].shape == (72, 120)


# Figures


def test_a_figure_has_a_row_for_each_query_and_stage(folder):
    image, values = np.zeros((8, 12, 3)), np.linspace(0, 1, 96).reshape(8, 12)
    rows = [
        Row(image, "one", (2, 3), (1, 1, 4, 5), np.stack([values] * 4), values),
        Row(image, "two", (2, 3), None, np.stack([values] * 4)),
    ]
    figure = overlay_figure(rows, "query marked", "relevance for\ncat")
    axes = figure.axes
    assert len(axes) == 2 * 6 + 1
    assert [axis.get_title() for axis in axes[:6]] == [
        *("query marked", "single tokens", "3 × 3 groups", "5 × 5 groups", "7 × 7 groups", "relevance for\ncat")
    ]
    assert [axes[0].get_ylabel(), axes[6].get_ylabel()] == ["one", "two"]
    assert axes[5].get_visible() and not axes[11].get_visible()
    assert axes[-1].get_ylabel() == "share of the panel's largest"
    assert [len(axis.lines) for axis in axes[:6]] == [1, 1, 1, 1, 1, 0]
    assert [len(axis.patches) for axis in axes[:6]] == [1, 0, 0, 0, 0, 1]
    for axis in axes[1:5]:
        np.testing.assert_array_equal(axis.images[1].get_array(), values)
        assert not axis.lines[0].get_clip_on(), "half of the mark of a query at an edge is missing"
        assert axis.images[1].get_cmap().name == "viridis" and axis.images[1].get_clim() == (0, 1)
    alone = overlay_figure([Row(image, relevance=values)], "image")
    assert [axis.get_title() for axis in alone.axes] == ["image", "relevance", ""]


# What cannot be done


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        (["classifier", "wide.png", "--query", "90,10"], "wide.png: got query 90,10, expected a row from 0 to 89", 1),
        (
            ["classifier", "wide.png", "--query", "2,60"],
            "wide.png: query 2,60 is cropped away: the network sees rows 9 to 80",
            1,
        ),
        (["classifier", "wide.png", "--query", "40"], "got 40, expected a pixel's row and column", 2),
        (["classifier", "wide.png", "--query", "4,-1"], "expected a pixel's row and column", 2),
        (["classifier", "wide.png", "--stage", "4"], "4", 2),
        (
            ["classifier", "wide.png", "--class", "hause"],
            "no class hause, expected a name or a number from 0 to 2: the nearest is a house",
            1,
        ),
        (["classifier", "wide.png", "--class", "3"], "no class 3", 1),
        (["classifier", "broken.png"], "broken.png", 1),
        (["classifier", "wide.png", "--object", "0"], "--object is for detection, and", 2),
        (["segmenter", "wide.png", "--object", "0"], "holds a model for segmentation", 2),
        (["detector", "wide.png", "--class", "cat"], "--class is for classification and segmentation", 2),
        (["detector", "wide.png", "--object", "999"], "wide.png: got object 999, and", 1),
        (["missing", "wide.png"], "missing", 1),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder, tmp_path, capsys, monkeypatch, argv, words, code):
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    if argv[1] == "broken.png":
        lines = output(capsys, "explain", *argv, "--out", out, code=code).err.strip().splitlines()
        assert "skipped broken.png" in lines[0] and lines[1] == "gmf: error: none of 1 images could be read"
    else:
        assert words in error(capsys, "explain", *argv, "--out", out, code=code)
    assert not out.exists()
