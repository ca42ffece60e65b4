"""gmf data: what a data set holds, its duplicates and damage, as JSON and as a page, for every kind of data."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_split import copies, picture, write_coco, write_flat

from groupmixformer.cli.main import main
from groupmixformer.tasks.registry import find_task
from groupmixformer.tasks.survey import Survey
from groupmixformer.training.recipe import read_recipe

HOSTILE = "<img src=x onerror=alert(1)>&\n\x1b[31m"


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


@pytest.fixture
def photos(tmp_path):
    """Two parts with a copy of a training image among the held-out ones, an equal file, a broken one and a grey one."""
    root = tmp_path / "photos"
    write_flat(root / "train", {"cat": 6, "dog": 3})
    write_flat(root / "val", {"cat": 2, "dog": 2}, start=100)
    made = copies(root / "train" / "cat" / "0.png")
    for path in made[1:]:
        path.unlink()
    shutil.move(made[0], root / "val" / "dog" / "copy.png")
    shutil.copy(root / "train" / "dog" / "1.png", root / "train" / "dog" / "same.png")
    (root / "val" / "cat" / "broken.jpg").write_bytes(b"no image")
    picture(77).convert("L").save(root / "train" / "cat" / "grey.png")
    (root / "train" / "cat" / "notes.txt").write_text("left out")
    return root


def test_a_folder_of_classes(photos, tmp_path, capsys):
    page = tmp_path / "out" / "page.html"
    found = json.loads(gmf(capsys, "data", photos, "--page", page, "--json").out)
    assert (found["format"], found["task"], list(found["parts"])) == ("classes", "classification", ["train", "val"])
    train, val = found["parts"].values()
    assert train["classes"] == [{"class": "cat", "count": 7}, {"class": "dog", "count": 4}]
    assert train["images"] == 11 and val["images"] == 6
    assert train["channels"] == {"colour": 10, "grey": 1} and train["formats"] == {"PNG": 11}
    assert train["width"] == {"min": 60, "median": 60, "max": 60} and train["aspect_ratio"]["max"] == pytest.approx(1.2)
    assert val["height"] == {"min": 50, "median": 50, "max": 100}
    assert train["notes"] == ["files left out: 1 .txt"] and train["damaged"] == []
    assert val["damaged"] == [{"file": "val/cat/broken.jpg", "reason": "not a readable image: no known format"}]
    leak, same = found["duplicates"]
    assert leak == {
        "equal": False,
        "parts": ["train", "val"],
        "classes": ["cat", "dog"],
        "files": {"train": ["train/cat/0.png"], "val": ["val/dog/copy.png"]},
    }
    assert same["equal"] and same["files"] == {"train": ["train/dog/1.png", "train/dog/same.png"]}
    text = page.read_text()
    assert text.index("Leaks") < text.index("Parts") < text.index("Classes") < text.index("Duplicates within")
    shown = re.findall(r'<figure><img(?: class="small")? alt="([^"]*)" src="data:image/[a-z]+;base64,[^"]+">', text)
    assert "val: val/dog/copy.png" in shown and shown.count("") == 8  # the batch
    assert {name.split(": ")[0] for name in shown} >= {"cat", "dog"}  # the class of each
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "default-src 'none'" in text
    assert val["histograms"]["longer side"]["counts"] == [4, 1] and val["histograms"]["width : height"]["counts"] == [5]
    assert "val: longer side" in text and "val: width : height" not in text
    assert "2 near duplicates, of the classes cat, dog" in text and "could not be drawn" not in text
    lines = gmf(capsys, "data", photos).out.splitlines()
    assert lines[2] == lines[1].replace("leak", "several classes")
    assert lines[3] == "duplicates: equal files: train/dog/1.png (train), train/dog/same.png (train)"
    assert lines[1] == "leak: near duplicates: train/cat/0.png (train), val/dog/copy.png (val)"


@pytest.mark.parametrize("kind", ["wds", pytest.param("hfds", marks=pytest.mark.slow)])
def test_of_a_stream_the_first_images_are_told(photos, tmp_path, capsys, monkeypatch, kind):
    pytest.importorskip("webdataset")
    monkeypatch.setattr("groupmixformer.tasks.survey.SAMPLED", 5)
    name, root = f"hfds/{photos}", []
    if kind == "wds":
        gmf(capsys, "shards", photos, "--out", tmp_path / "shards")
        name, root = "wds/shards", ["--root", tmp_path]
    found = json.loads(gmf(capsys, "data", name, *root, "--json").out)
    train = found["parts"]["train"]
    assert (train["images"], train["total"]) == (5, 11) and "the first 5 of 11 images" in train["notes"][0]
    assert sum(row["count"] for row in train["classes"]) == 5 and [row["class"] for row in train["classes"]] == ["cat", "dog"]
    assert train["width"]["max"] == 60 and sum(train["channels"].values()) == 5
    assert sum(train["histograms"]["longer side"]["counts"]) == 5
    assert "no sample of the whole" in gmf(capsys, "data", name, *root).out
    assert "for folders and files" in gmf(capsys, "data", name, *root, "--page", tmp_path / "x.html", code=2).err


def test_boxes_and_masks_are_drawn_on_the_images(tmp_path):
    root = write_coco(tmp_path / "coco", 6)
    survey = Survey(root)
    assert survey.result["parts"]["all"]["classes"] == [{"class": "a", "count": 4}, {"class": "b", "count": 2}]
    first, *others = survey.drawn("all")
    name, drawn = first.caption, first.image
    assert len(others) == 5
    plain = np.asarray(Image.open(root / "images" / name).convert("RGB").resize(drawn.size, Image.Resampling.BICUBIC))
    changed = np.argwhere((np.asarray(drawn) != plain).any(axis=2))
    factor = drawn.width / 60
    assert abs(changed[:, 1].min() - 5 * factor) < 8 and changed[:, 1].max() < 40 * factor
    batch = survey.batch(read_recipe(find_task("detection").example_recipe, ["--data", str(root)]))
    assert len(batch) == 6 and batch[0].size == drawn.size


def test_masks_are_shown_by_the_colours_of_their_classes(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    classes = [{"id": 0, "name": "ground", "color": [0, 0, 0]}, {"id": 1, "name": HOSTILE, "color": [255, 0, 0]}]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes}))
    for i in range(3):
        Image.new("RGB", (60, 50), (40 * i, 90, 90)).save(tmp_path / "images" / "train" / f"{i}.png")
        Image.new("L", (60, 50), int(i > 0)).save(tmp_path / "masks" / "train" / f"{i}.png")
    survey = Survey(tmp_path)
    assert [row["count"] for row in survey.result["parts"]["train"]["classes"]] == [3000, 6000]
    (shown,) = (shown.image for shown in survey.drawn("train") if shown.caption == "1.png")
    red = np.asarray(shown)[100, 100]
    assert red[0] > 150 > red[1]
    page = survey.page(read_recipe("camvid", ["--data", str(tmp_path), "--image-size", "32"]))
    assert "could not be drawn" not in page and "<img src=x" not in page and "\x1b" not in page
    assert "&lt;img src=x onerror" in page


def test_names_are_never_markup(tmp_path, capsys):
    name = HOSTILE.replace("\n", "")
    root, page = write_flat(tmp_path / name, {name: 2, "other": 2}), tmp_path / "page.html"
    shutil.copy(root / name / "0.png", root / name / f"{name}.png")
    out = gmf(capsys, "data", root, "--page", page).out
    assert "\x1b" not in out and r"\x1b[31m" in out
    text = page.read_text()
    assert "<img src=x" not in text and "\x1b" not in text and "&lt;img src=x onerror" in text


def test_a_part_that_cannot_be_used_is_told_beside_the_others(photos, tmp_path, capsys):
    shutil.rmtree(photos / "val" / "cat")
    page = tmp_path / "page.html"
    found = json.loads(gmf(capsys, "data", photos, "--page", page, "--json").out)
    assert "expected two or more folders" in found["parts"]["val"]["problem"] and found["parts"]["train"]["images"] == 11
    assert "cannot be used" in page.read_text()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["missing"], 1, "no such file or folder"),
        (["photos", "--task", "detection"], 1, "expected one for detection"),
        (["photos", "--task", "detections"], 1, "the nearest is detection"),
        (["photos", "--recipe", "foldr", "--page", "x.html"], 2, "nearest: folder"),
    ],
)
def test_wrong_usage_is_one_line(photos, tmp_path, monkeypatch, capsys, words, code, expected):
    monkeypatch.chdir(tmp_path)
    error = gmf(capsys, "data", *words, code=code).err
    assert expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_training_begins_with_what_the_data_is(photos, tmp_path, capsys):
    (photos / "val" / "cat" / "broken.jpg").unlink()
    options = ["--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--epochs", "1"]
    told = gmf(capsys, "train", "folder", "--data", photos, "--out", tmp_path / "run", "--model", "test_resnet", *options).err
    assert "training: 11 images, 2 classes, 4 to 7 images a class" in told
    assert "validation: 5 images, 2 classes" in told


@pytest.mark.slow
@pytest.mark.parametrize(("name", "leaks"), [("bccd", 1), ("camvid", 0), ("nuclei", 0)])
def test_real_data(name, leaks, shared, tmp_path, capsys):
    page = tmp_path / "page.html"
    found = json.loads(gmf(capsys, "data", shared(f"data/{name}"), "--page", page, "--json").out)
    assert sum(len(group["parts"]) > 1 for group in found["duplicates"]) == leaks
    assert not any(part["damaged"] for part in found["parts"].values())
    assert 100_000 < page.stat().st_size < 5_000_000
