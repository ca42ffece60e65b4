"""Several labels for an image: read from CSV files and from objects, learnt, measured, and told wherever a run is used."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.metrics import f1_score, precision_recall_fscore_support
from torchmetrics.functional.classification import multilabel_average_precision

from groupmixformer import GroupMixFormer, load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.data.formats import recognise
from groupmixformer.data.labels import read_labels
from groupmixformer.deploy.demo import Page
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.deploy.routes import application
from groupmixformer.deploy.serve import Limits, Service, served
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.run import Run
from groupmixformer.tasks.classification.data import collate_classification, open_images
from groupmixformer.tasks.classification.multi_label import LabelEvaluation
from groupmixformer.tasks.registry import build_task, find_task
from groupmixformer.tasks.survey import Survey
from groupmixformer.training.recipe import read_recipe

DOCS = Path(__file__).parents[1] / "docs" / "evaluate.md"
COLORS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (50, 60, 240)}
TINY = ["--image-size", "32", "--crop-pct", "1.0", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--epochs", "1"]
TINY += ["--optimizer.lr_batch", "null", "--model", "test_resnet", "--augmentation.label_smoothing", "0"]


def squares(folder, number, start=0):
    """Write images with squares of some colours, in a quarter each; return names and what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for i in range(start, start + number):
        rng = np.random.default_rng(i)
        pixels, there = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8), rng.random(3) < 0.5
        for (name, color), place in zip(COLORS.items(), rng.permutation(4), strict=False):
            if there[list(COLORS).index(name)]:
                y, x = 16 * (place // 2), 16 * (place % 2)
                pixels[y + 2 : y + 14, x + 2 : x + 14] = color
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows[f"{i}.png"] = [name for name, one in zip(COLORS, there, strict=True) if one]
    return rows


def columns(rows, order=("red", "green", "blue"), image="image"):
    lines = [",".join([image, *order]), *(",".join([n, *(str(int(c in found)) for c in order)]) for n, found in rows.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with images/ and labels.csv."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "labels.csv").write_text(columns(squares(folder / "images", 20)))
    return folder


def write(folder, text, name="labels.csv"):
    (folder / name).write_text(text)
    return folder


@pytest.fixture
def few(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    return tmp_path


def read(path, part="all"):
    labels = read_labels(recognise(path, "classification"), part)
    named = {p.rpartition("/")[2]: [labels.class_names[n] for n in numbers] for p, numbers in labels.samples}
    return labels, named


WAYS = {
    "a column of labels": "image,labels\na.jpg,cat dog\nb.jpg,dog\nc.png,\n",
    "semicolons, another order": "labels;filename\ndog, cat;a.jpg\ndog;b.jpg\n;c.png\n",
    "lists of Python, with pandas' index": ",path,tags\n0,a.jpg,\"['cat', 'dog']\"\n1,b.jpg,['dog']\n2,c.png,[]\n",
    "bars, without endings": "Image_ID,label\na,cat|dog\nb,dog\nc,\n",
    "columns": "image,cat,dog\na.jpg,1,1\nb.jpg,0,1.0\nc.png,0,false\n",
    "columns by a name that ends as an image": "picture of,cat,dog\na.jpg,1,1\nb.jpg,0,1\nc.png,0,0\n",
}


@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS)
def test_csv_files_are_read_in_the_ways_that_people_write_them(few, text):
    labels, named = read(write(few, text) / "labels.csv")
    assert labels.several and labels.class_names == ["cat", "dog"] and not labels.skipped
    assert named == {"a.jpg": ["cat", "dog"], "b.jpg": ["dog"], "c.png": []}
    assert "1 image has no label" in labels.notes


def test_rows_of_an_image_are_joined_and_one_label_each_is_ordinary_classification(few):
    labels, named = read(write(few, "image,label\na.jpg,big dog\na.jpg,cat\nb.jpg,cat\n"))
    assert labels.several and named["a.jpg"] == ["big dog", "cat"] and "their labels are joined" in labels.notes[-1]
    write(few, "image,label\na.jpg,big dog\nb.jpg,10\n", "train.csv")
    write(few, "image,label\nc.png,10\nc.png,10\n", "val.csv")
    images = open_images(str(few))
    assert not images.several and images.class_names == ["10", "big dog"]
    assert images.train_source.targets == [1, 0] and images.held_out_source.targets == [0]


REFUSED = {
    "image,labels\na.jpg,cat\nx.jpg,dog\nb.jpg,dog,1\n": "labels.csv: line 4: has 3 values, expected 2: image, labels",
    "image,cat,width\na.jpg,1,640\n": "line 2: width is '640', expected 0 or 1 as in every column beside image",
    "image,cat,dog\na.jpg,1,\n": "line 2: dog is '', expected 0 or 1",
    "image,cat\na.jpg,1\na.jpg,0\n": "line 3: ",
    "image,labels\nx.jpg,cat\n": "none of its 1 images is there, such as 'x.jpg'",
    "image,label\na.jpg,cat\nb.jpg,\n": "line 3: has no label, expected one for each image",
    "image,labels\na.jpg,\n": "its column labels is empty",
    "image,cat,cat\na.jpg,1,1\n": "several columns of the name 'cat'",
    "image,labels\n": "has 1 lines",
    'image,labels\na.jpg,"cat\n': "line 2: not CSV",
    "name,labels\nxx,cat\n": "has the columns name, labels, expected image, and labels or a column for each class",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused_with_its_line(few, text):
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])) as error:
        read(write(few, text) / "labels.csv")
    assert "\n" not in str(error.value)


def test_a_part_has_the_labels_of_training_and_a_typo_names_the_nearest(few):
    write(few, "image,labels\na.jpg,cat dog\nb.jpg,dog Dog\n", "train.csv")
    write(few, "image,labels\nc.png,dog\nnone.png,cat\n", "val.csv")
    labels, _ = read(few, "train")
    assert "labels that differ in case alone are different classes: Dog, dog" in labels.notes
    labels, named = read(few, "val")
    assert labels.class_names == ["cat", "Dog", "dog"] and named == {"c.png": ["dog"]}
    assert labels.skipped == [f"{few / 'val.csv'}: line 3: no image none.png"]
    write(few, "image,labels\nc.png,dgo\n", "val.csv")
    with pytest.raises(ValueError, match="line 2: label 'dgo' is not among those of training: the nearest is 'dog'"):
        read(few, "val")
    write(few, "image,dog\nc.png,1\n", "val.csv")
    with pytest.raises(ValueError, match=r"val.csv: has no column labels, which the training part has"):
        read(few, "val")


def test_roboflows_files_and_data_without_parts_are_recognised(tmp_path, data):
    for part in ("train", "valid"):
        rows = squares(tmp_path / part, 3, start=50)
        (tmp_path / part / "_classes.csv").write_text(columns(rows, image="filename").replace(",", ", "))
    found = recognise(tmp_path)
    assert (found.format, list(found.parts), found.tasks) == ("labels", ["train", "val"], ("classification",))
    assert len(open_images(str(tmp_path)).train_source) == 3
    survey = Survey(tmp_path)
    counts = {row["class"]: row["count"] for row in survey.result["parts"]["train"]["classes"]}
    assert counts == {color: sum(color in found for found in rows.values()) for color in COLORS}
    assert survey.drawn("train")[0].caption.startswith(tuple(COLORS))
    with pytest.raises(ValueError, match="not split, expected a part train: deal it out with --val-share"):
        open_images(str(data))
    recipe = read_recipe("folder", ["--data", str(data), "--val-share", "0.25", *TINY])
    images = open_images(recipe.data, splitter=recipe.splitter)
    assert (len(images.train_source), len(images.held_out_source)) == (15, 5) and images.several
    for number in range(3):  # stratified
        whole = sum(number in found for source in (images.train_source, images.held_out_source) for found in source.targets)
        assert abs(sum(number in found for found in images.held_out_source.targets) - whole / 4) <= 1


def coco(folder, more=()):
    """Annotate two images: a.jpg with two cats and a dog, b.jpg with nothing."""
    images = [{"id": i, "file_name": name, "width": 40, "height": 40} for i, name in enumerate(["a.jpg", "b.jpg"])]
    objects = [{"id": i, "image_id": 0, "category_id": c, "bbox": [1, 1, 20, 20]} for i, c in enumerate((7, 7, 3))]
    names = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 9, "name": "bird"}, *more]
    content = {"images": images, "annotations": objects, "categories": names}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def test_an_image_of_another_part_is_not_taken(few):
    for part in ("train", "val"):
        (few / part).mkdir()
        write(few, "image,labels\n0.jpg,cat\n1.jpg,dog\n", f"{part}.csv")
    for path in ("train/0.jpg", "train/1.jpg", "val/1.jpg"):
        shutil.copy(few / "a.jpg", few / path)
    labels, _ = read(few, "val")
    assert [path for path, _ in labels.samples] == [str(few / "val" / "1.jpg")] and len(labels.skipped) == 1


def test_the_categories_of_objects_are_labels(few):
    labels, named = read(coco(few))
    assert labels.class_names == ["dog", "cat", "bird"] and named == {"a.jpg": ["dog", "cat"], "b.jpg": []}
    samples = open_images(str(few), need_train=False).held_out(lambda image: torch.zeros(3, 32, 32))
    assert samples.count_classes() == ([1, 1, 0], "images", [])
    samples.relabel(["cat", "bear", "bird", "dog"], [3, 0, 2])
    _, rows, _ = collate_classification([samples[0], samples[1], samples[-1]])
    assert rows.tolist() == [[1, 0, 0, 1], [0] * 4, [-1] * 4] and samples.labels() is None
    with pytest.raises(ValueError, match="several categories of the name dog"):
        read(coco(few, [{"id": 11, "name": "dog"}]))


def test_folders_of_classes_stay_what_they_are(photos):
    images = open_images(str(photos))
    assert not images.several and images.class_names == ["one", "zero"]


def test_metrics_are_those_of_scikit_learn_and_torchmetrics():
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 5, generator=random), (torch.rand(200, 5, generator=random) < 0.3).float()
    logits += 1.5 * labels
    labels[:, 4] = 0  # of no image
    found = LabelEvaluation.of(logits, labels)
    expected = multilabel_average_precision(logits[:, :4].double(), labels[:, :4].long(), 4)
    assert found.metrics["mAP"] == pytest.approx(expected.item(), rel=1e-6)
    truth, said = labels[:, :4].numpy(), (logits[:, :4] >= 0).numpy()
    assert found.metrics["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))
    everything = (labels.numpy(), (logits >= 0).numpy())
    assert found.metrics["f1_micro"] == pytest.approx(f1_score(*everything, average="micro"))
    scores = {t / 100: f1_score(labels.numpy(), (logits.sigmoid() >= t / 100).numpy(), average="micro") for t in range(1, 100)}
    assert found.metrics["best_f1_micro"] == pytest.approx(max(scores.values()))
    assert scores[found.metrics["best_threshold"]] == pytest.approx(max(scores.values()))
    assert found.metrics["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, labels).item(), rel=1e-5)
    rows = found.per_class(list("abcde"))
    expected = np.transpose(precision_recall_fscore_support(*everything, zero_division=0)[:3])
    assert [[row[key] for key in ("precision", "recall", "f1")] for row in rows[:4]] == [pytest.approx(r) for r in expected[:4]]
    assert rows[4]["images"] == 0 and rows[4]["AP"] is None and rows[4]["f1"] is None
    one = LabelEvaluation.of(logits[:, :1], labels[:, :1])
    assert one.metrics["mAP"] == pytest.approx(one.per_class("a")[0]["AP"])


def test_a_model_that_tells_nothing_is_said_to(data, tmp_path):
    model = GroupMixFormer(embed_dims=(10,), depths=(1,), mlp_ratios=(2,), num_classes=3)
    torch.nn.init.zeros_(model.head.fc.weight)
    torch.nn.init.ones_(model.head.fc.bias)
    config = {"input_size": (3, 32, 32), "problem_type": "multi_label_classification"}
    save_checkpoint(model, tmp_path / "run", list(COLORS), config)
    measured = Run.open(tmp_path / "run").evaluate(str(data), "cpu")
    targets = open_images(str(data), need_train=False).held_out_source.targets
    named = f1_score(np.array([[n in found for n in range(3)] for found in targets]), np.ones((20, 3)), average="micro")
    assert any(line.endswith(f"which has a micro F1 of {named:.2%}") for line in measured.remarks)
    assert any("no better than chance" in line for line in measured.remarks)


def build(data, *options):
    return build_task(read_recipe("folder", ["--data", str(data), "--val-share", "0.25", *TINY, *options]), 1)


def test_losses_are_those_of_the_papers(data):
    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    expected = F.binary_cross_entropy_with_logits(logits, labels * 0.8 + 0.1)
    assert build(data, "--augmentation.label_smoothing", "0.2").label_loss(logits, labels).item() == pytest.approx(
        expected.item()
    )
    p = logits.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    terms = torch.where(labels > 0, (1 - p) * p.log(), shifted**4 * (1 - shifted).log())  # gamma 1 and 4
    asymmetric = build(data, "--loss", "asl").label_loss(logits, labels)
    assert asymmetric.item() == pytest.approx(-terms.sum().item() / 2, rel=1e-5)


def test_mixup_mixes_labels_by_the_shares_of_the_images(data):
    task = build(data, "--augmentation.mixup", "1.0", "--augmentation.label_smoothing", "0.1")
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 8, 8).clone()
    labels = torch.eye(6)[:, :3]
    mixed, shares = task.mix(images, labels)
    whole = mixed[0, 0, 0, 0] / -5 + 1  # image 0 is mixed with image 5
    assert shares[0].tolist() == pytest.approx([whole.item(), 0, 0], abs=1e-5) and 0 < whole < 1


def test_what_does_not_go_together_is_refused_in_a_line(data, photos, tmp_path, capsys):
    def line(*words, code=1):
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        return capsys.readouterr().err.strip().splitlines()[-1]

    start = ["train", "folder", "--out", tmp_path / "run", *TINY, "--data"]
    assert "balance is for one class each" in line(*start, data, "--val-share", "0.25", "--balance", "loss")
    assert "teach features" in line(*start, data, "--val-share", "0.25", "--distill.teacher", "test_resnet")
    assert "loss asl is for several labels" in line(*start, photos, "--loss", "asl")
    assert "expected one class each" in line("shards", data, "--val-share", "0.25", "--out", tmp_path / "shards")
    parted = tmp_path / "parted"
    for part in ("train", "val"):
        write(parted, columns(squares(parted / "images", 2)), f"{part}.csv")
    assert "compared by top-1" in line("compare", "test_resnet", "--data", parted, "--out", tmp_path / "compared")
    model = GroupMixFormer(embed_dims=(10,), depths=(1,), mlp_ratios=(2,), num_classes=2)
    for name, about in (("one", {}), ("several", {"problem_type": "multi_label_classification"})):
        save_checkpoint(model, tmp_path / name, ["one", "zero"], {"input_size": (3, 32, 32), **about})
    image = data / "images" / "0.png"
    assert "gives an image one class: take top, and not" in line("predict", tmp_path / "one", image, "--score-threshold", "0.3")
    assert "gives an image several labels: take score" in line("predict", tmp_path / "several", image, "--top", "2")
    assert "has one class for each image, and the model gives several" in line("eval", tmp_path / "several", "--data", photos)
    assert "has several labels for an image, and the model gives one" in line("eval", tmp_path / "one", "--data", data)
    assert load_checkpoint(tmp_path / "one").pretrained_cfg.get("problem_type") is None


@pytest.mark.slow
def test_labels_that_can_be_learnt_are_and_are_told_wherever_the_run_is_used(tmp_path, capsys, monkeypatch):
    """Coloured squares, on the command line from training to a service, and after a stop in the middle."""

    def gmf(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return json.loads(capsys.readouterr().out)

    data, run = tmp_path / "data", tmp_path / "run"
    for part, number, start in (("train", 96, 0), ("val", 40, 1000)):
        rows = squares(data / "images", number, start)
        text = "image,labels\n" + "".join(f"{name},{'|'.join(found)}\n" for name, found in rows.items())
        write(data, text, f"{part}.csv")
    stages = "{embed_dims: [20, 30], depths: [1, 1], mlp_ratios: [2, 2]}"
    options = ["--data", data, "--out", run, *TINY[:-4], "--model-options", stages, "--model", "small", "--epochs", "3"]
    options += [
        "--optimizer.lr",
        "1e-2",
        "--schedule.warmup-epochs",
        "0",
        "--ema",
        "0.8",
        "--augmentation.color-jitter",
        "null",
    ]
    options += ["--augmentation.label-smoothing", "0"]
    result = gmf("train", "folder", *options, "--json")
    assert result["mAP"] > 0.85 and result["images"] == 40
    assert result["mAP"] == pytest.approx(max(row["val_mAP"] for row in Run.open(run).metrics), abs=1e-6)
    config = json.loads((run / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and 0 < config["best_threshold"] < 1
    assert config["best_threshold"] == pytest.approx(result["best_threshold"], abs=0.02)
    page = (run / "report.html").read_text()
    assert "F1 over the threshold" in page and "AP of each class" in page and "could not be drawn" not in page
    assert gmf("train", run / "recipe.yaml", "--resume", "--epochs", "4", "--json")["images"] == 40
    config = json.loads((run / "config.json").read_text())
    # The same numbers from eval, with classes in another order and missing.
    again = gmf("eval", run, "--json", "--plot", tmp_path / "f1.png")
    section = re.search(r"^## Several labels.*?(?=^## )", DOCS.read_text(), re.M | re.S)[0]
    documented = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert documented <= set(again) and set(again["per_class"][0]) <= set(re.findall(r"`(\w+)`", section))
    assert len(again["per_class"]) == 3 and (tmp_path / "f1.png").is_file()
    other = write(data, columns(squares(data / "images", 12, 1000), ["blue", "red"]), "other.csv") / "other.csv"
    assert {row["class"]: row["images"] for row in gmf("eval", run, "--data", other, "--json")["per_class"]}["green"] == 0
    # Predictions.
    image = data / "images" / "1003.png"
    found = gmf("predict", run, image, "--score-threshold", "0.3", "--json", "--format", "csv", "--out", tmp_path / "out")[
        "images"
    ][0]
    probabilities = found["probabilities"]
    assert {c["class"]: c["probability"] for c in found["classes"]} == {n: p for n, p in probabilities.items() if p >= 0.3}
    with torch.inference_mode():
        predictor = Run.open(run).predictor("cpu")
        pixels = predictor.prepare(Image.open(image).convert("RGB"))[None]
        expected = load_checkpoint(run)(pixels)[0].sigmoid()
    assert probabilities == pytest.approx(dict(zip(config["label_names"], expected.tolist(), strict=True)), abs=1e-4)
    explained = gmf("explain", run, image, "--class", "red", "--out", tmp_path / "explained", "--json")["images"][0]
    assert explained["class"] == "red" and explained["probability"] == pytest.approx(probabilities["red"], abs=1e-4)
    service = Service([served(predictor, "squares", "classification")], Limits())
    with TestClient(application(service)) as client:
        posted = client.post("/predict?score_threshold=0.01", content=image.read_bytes(), headers={"Content-Type": "image/png"})
        assert posted.json()["probabilities"] == pytest.approx(probabilities, abs=1e-4)
        assert client.post("/predict?top=1", content=b"", headers={"Content-Type": "image/png"}).status_code == 422
    assert Page({"run": predictor}).predict("run", str(image)).classes == pytest.approx(probabilities, abs=1e-4)
    # Exported, published, converted and read by others.
    plain = gmf("export", run, "--format", "onnx", "--out", tmp_path / "plain.onnx", "--json")["metadata"]
    assert json.loads(plain["problem_type"]) == config["problem_type"] and "best_threshold" in plain
    whole = gmf("export", run, "--format", "pt2", "--with-preprocessing", "--out", tmp_path / "whole.pt2", "--json")
    assert json.loads(whole["metadata"]["outputs"]) == ["probabilities"]
    exported = torch.export.load(tmp_path / "whole.pt2").module()
    said = exported(torch.from_numpy(np.asarray(Image.open(image).convert("RGB")).copy()))[0]
    assert said.tolist() == pytest.approx(list(probabilities.values()), abs=0.02)
    assert main(["export", str(run), "--format", "onnx", "--int8", "static", "--out", str(tmp_path / "int8.onnx")]) == 1
    folder = Run.open(run).folder
    published = tmp_path / "published"
    published.mkdir()
    card = render_card(read_card_info(folder, find_task("classification").publish(folder, published)), "me/squares", "mit")
    assert "mAP over the labels" in card and "threshold of the best F1" in card and "binary cross entropy" in card
    from transformers import pipeline

    theirs = pipeline("image-classification", model=str(published))(Image.open(image).convert("RGB"), top_k=3)
    assert {one["label"]: one["score"] for one in theirs} == pytest.approx(probabilities, abs=1e-3)
    assert load_model(published).pretrained_cfg["best_threshold"] == config["best_threshold"]
    shutil.rmtree(published)
    # A checkpoint of several labels for one class each.
    for name in ("red", "blue"):
        for part in ("train", "val"):
            squares(tmp_path / "classes" / part / name, 8, 2000)
    gmf("train", "folder", "--data", tmp_path / "classes", *TINY, "--checkpoint", run, "--out", tmp_path / "single", "--json")
    assert "problem_type" not in json.loads((tmp_path / "single" / "config.json").read_text())
