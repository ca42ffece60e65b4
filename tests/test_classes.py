"""The classes of a model and of a data set are matched by name, and what was not seen of them is said before training."""

import json
import shutil

import numpy as np
import pytest
import torch
from shapes import write_shapes
from test_semantic import write_classes, write_pair

from groupmixformer import GroupMixFormer, Run
from groupmixformer.cli.main import main
from groupmixformer.data.classes import differences, match_classes
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.tasks.classification.data import ImageSamples, open_images
from groupmixformer.tasks.detection.data import CocoImages
from groupmixformer.tasks.segmentation import data as masks
from groupmixformer.tasks.segmentation.data import SemanticImages

MODEL = ["apple", "lime", "plum"]
RATES = ("images_per_second", "model_images_per_second")


@pytest.fixture(scope="module")
def fruit(write_digits, tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("fruit"), MODEL, train=2, val=5)


@pytest.fixture(scope="module")
def classifier(randomise, tmp_path_factory):
    """Give a function that writes one and the same classifier with its classes in an order, and returns its run."""
    torch.manual_seed(0)
    sizes = {"embed_dims": [20], "depths": [1], "mlp_ratios": [2]}
    body = randomise(GroupMixFormer(**sizes, num_classes=10))

    def write(names, order=None):
        order = list(range(len(names))) if order is None else order
        model = GroupMixFormer(**sizes, num_classes=len(names)).eval()
        weights = dict(body.state_dict())
        weights |= {name: weights[name][order] for name in ("head.fc.weight", "head.fc.bias")}
        model.load_state_dict(weights)
        folder = tmp_path_factory.mktemp("classifier")
        save_checkpoint(model, folder, [names[i] for i in order], {"input_size": (3, 32, 32), "crop_pct": 1.0})
        return Run.open(folder)

    return write


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (MODEL, [0, 1, 2]),
        (["plum", "apple", "lime"], [2, 0, 1]),
        (["plum"], [2]),
        (["lime", "apple"], [1, 0]),
    ],
)
def test_classes_are_found_by_name(data, places):
    assert match_classes(MODEL, data, "fruit") == places


def test_a_name_is_the_same_however_its_accents_are_written():
    assert match_classes(["e\u0301te\u0301", "hiver"], ["hiver", "\u00e9t\u00e9"], "saisons") == [1, 0]


def test_equal_lists_may_repeat_a_name_as_imagenet_does():
    assert match_classes(["crane", "crane"], ["crane", "crane"], "birds") == [0, 1]
    with pytest.raises(ValueError, match="the model: has several classes of the name crane"):
        match_classes(["crane", "crane", "gull"], ["gull", "crane"], "birds")
    with pytest.raises(ValueError, match="birds: has several classes of the name gull"):
        match_classes(["crane", "gull"], ["gull", "gull"], "birds")


def test_other_classes_are_refused_in_a_line_with_what_differs():
    with pytest.raises(ValueError, match="fruit: has other classes") as raised:
        match_classes(MODEL, ["lime", "plum", "zapple"], "fruit")
    assert "only the data has zapple; only the model has apple;" in str(raised.value)
    assert "\n" not in str(raised.value)
    many = [str(i) for i in range(1000)]
    with pytest.raises(ValueError, match=r"only the data has 0, 1, 2, 3, 4, \.\.\. \(1,000\); only the model has apple, lime"):
        match_classes(MODEL, many, "numbers")


def test_differences_name_both_sides():
    assert differences(["a", "b"], ["b", "c"], "the run", "the data") == "only the run has a; only the data has c"
    assert differences(["a", "b"], ["b", "a"], "the run", "the data") == ""


# In evaluations


def numbers(measured):
    """The metrics, without times, the order of the classes, and the last bits of confidences, which are sums in that order."""
    result = {name: value for name, value in measured.result.items() if name not in RATES}
    assert result.pop("reliability")
    for name in ("loss", "calibration_error"):  # sums in another order
        result[name] = pytest.approx(result[name], abs=1e-6)
    result["per_class"] = sorted((row["class"], row["images"], row["top1"]) for row in result["per_class"])
    return result


@pytest.mark.parametrize("kind", ["folder", "wds", "hfids", "digits"])
def test_classes_in_another_order_give_the_same_metrics(classifier, fruit, tmp_path, kind):
    names, data, root = MODEL, str(fruit), ""
    if kind == "wds":
        assert main(["shards", data, "--out", str(tmp_path / "shards"), "--images-per-shard", "4"]) == 0
        data, root = "wds/shards", str(tmp_path)
    elif kind == "hfids":
        data = f"hfids/{fruit}"
    elif kind == "digits":
        names, data = [str(digit) for digit in range(10)], "digits"
    order = [2, 0, 1, *range(3, len(names))]
    options = {"root": root} if root else {}
    usual, other = (classifier(names, places).evaluate(data, "cpu", **options) for places in (None, order))
    assert not usual.notes
    assert other.notes == [f"the {len(names)} classes of {data} are matched by name"]
    assert numbers(usual) == numbers(other)
    assert len({row["top1"] for row in usual.result["per_class"]}) > 1  # or any order would do
    assert other.result["per_class"][0]["class"] == names[2]


def test_some_of_the_classes_are_evaluated_with_all_outputs(classifier, fruit, tmp_path):
    run = classifier(MODEL)
    whole = run.evaluate(str(fruit), "cpu")
    shutil.copytree(fruit, tmp_path / "part")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "part" / split / "lime")
    part = run.evaluate(str(tmp_path / "part"), "cpu")
    assert part.notes == [f"the 2 classes of {tmp_path / 'part'} are matched by name; 1 of the model's have no image: lime"]
    expected = {row["class"]: row["top1"] for row in whole.result["per_class"]} | {"lime": None}
    assert {row["class"]: row["top1"] for row in part.result["per_class"]} == expected


def test_other_classes_are_not_evaluated(classifier, fruit, tmp_path, capsys):
    run = classifier(MODEL)
    shutil.copytree(fruit, tmp_path / "other")
    (tmp_path / "other" / "val" / "apple").rename(tmp_path / "other" / "val" / "zapple")
    with pytest.raises(ValueError, match="only the data has zapple; only the model has apple; expected classes of the model"):
        run.evaluate(str(tmp_path / "other"), "cpu")
    argv = ["export", str(run.path), "--format", "pt2", "--int8", "weights", "--data", str(tmp_path / "other")]
    assert main([*argv, "--out", str(tmp_path / "x.pt2")]) == 1
    assert "only the data has zapple" in capsys.readouterr().err


def test_a_model_without_names_goes_by_the_number_and_says_so(classifier, fruit, tmp_path, capsys):
    run = classifier(MODEL)
    config = json.loads((run.path / "config.json").read_text())
    for names in (config, config["pretrained_cfg"]):
        names.pop("label_names", None)
    (run.path / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["eval", str(run.path), "--data", str(fruit), "--device", "cpu", "--json"]) == 0
    note = f"the model has no names for its 3 classes: they are taken for those of {fruit} in its order"
    said = capsys.readouterr()
    assert json.loads(said.out)["notes"] == [note]
    assert note in said.err
    with pytest.raises(ValueError, match=r"digits: has 10 classes and the model 3 without .* expected .*--class-names FILE"):
        Run.open(run.path).evaluate("digits", "cpu")


# Before training


@pytest.fixture
def regions(tmp_path):
    """Give a function that writes masks of some numbers, for classes of the numbers 0 and 1, and opens them."""

    def write(*numbers, split="train", classes=(("ground", 0), ("road", 1)), ignore=255):
        write_classes(tmp_path, classes=[{"name": name, "id": i} for name, i in classes], ignore_index=ignore)
        for i, number in enumerate(numbers):
            write_pair(tmp_path, split, f"{i}", np.zeros((4, 4, 3)), np.array([[0, 0, 0, 0], [number] * 4] * 2))
        return SemanticImages(tmp_path, split)

    return write


def test_masks_of_0_and_255_leave_nothing_to_learn(regions):
    said = "training data: 1 of 2 classes have no pixels in 3 of 3 masks: road; there is nothing to tell apart but ground; "
    with pytest.raises(
        ValueError, match=said + "pixels of 255 are ignored: if they mark a class, give it this id, and drop ignore"
    ):
        regions(255, 255, 255).check("training", 0.001)
    held_out = regions(255, 255, split="val").check("held-out", 0.001)
    assert len(held_out) == 1 and held_out[0].startswith(
        "held-out data: 1 of 2 classes have no pixels in 2 of 2 masks: road; pix"
    )
    usual = regions(255, 255, 255, classes=(("ground", 0), ("road", 255)), ignore=None)
    assert usual.check("training", 0.001) == []
    assert usual.read(0)[1].unique().tolist() == [0, 1]


def test_classes_without_a_pixel_are_named(regions, monkeypatch):
    three = (("ground", 0), ("road", 1), ("car", 2))
    assert regions(0, 1, 0, 1, classes=three).check("training", 0.001) == [
        "training data: 1 of 3 classes have no pixels in 4 of 4 masks: car"
    ]
    assert regions(0, 1, 0, 2, classes=three).check("training", 0.001) == []
    monkeypatch.setattr(masks, "MOST_MASKS", 2)
    assert "no pixels in 2 of 4 masks: " in regions(0, 1, 1, 0, classes=three).check("training", 0.001)[0]


def test_numbers_of_no_class_end_training_before_it_begins(regions):
    with pytest.raises(
        ValueError, match=r"1 of 3 training images cannot be used, more than .*1\.png: holds the number 9, which"
    ):
        regions(1, 9, 1).check("training", 0)
    assert "training data: 1 images cannot be used: " in regions(1, 9, 1).check("training", 0.5)[0]


def test_categories_without_an_object_are_named(tmp_path):
    write_shapes(tmp_path, train=4, val=1)
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [record for record in content["annotations"] if record["category_id"] == 3]
    path.write_text(json.dumps(content))
    said = CocoImages(tmp_path, "train", masks=False).check("training", 0)
    assert said == ["training data: 1 of 2 classes have no objects: disc"]


class Labelled:
    """As torchvision's data sets have their labels."""

    def __init__(self, labels):
        self.targets = labels

    def __len__(self):
        return len(self.targets)


def test_classes_without_an_image_are_named(fruit):
    for data in (str(fruit), "digits"):
        opened = open_images(data)
        for samples in (opened.train(None, 0), opened.held_out(None)):
            assert samples.check("training", 0) == []
            counts, what, _ = samples.count_classes()
            assert (sum(counts), what) == (len(samples), "images")
    for labels, classes in (
        ([0, 2, 2], "1 of 3 classes have no images: lime"),
        ([2, 2], "2 of 3 classes have no images: apple, lime"),
    ):
        samples = ImageSamples(Labelled(labels), None, MODEL)
        if len(set(labels)) > 1:
            assert samples.check("training", 0) == [f"training data: {classes}"]
        else:
            with pytest.raises(ValueError, match=f"{classes}; there is nothing to tell apart but plum"):
                samples.check("training", 0)
