"""Reports of runs: what the page says, that its numbers are right, and how it looks in a browser; colours and labels."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from groupmixformer import GroupMixFormer
from groupmixformer.files import write_rows
from groupmixformer.tasks.classification.metrics import Evaluation, per_class
from groupmixformer.tasks.classification.predict import ClassificationResult
from groupmixformer.tasks.classification.report import write_report
from groupmixformer.tasks.detection.metrics import detection_confusion, detection_curves
from groupmixformer.tasks.predictor import no_better_than_one_class
from groupmixformer.visual.charts import bar_chart, line_chart, matrix_chart
from groupmixformer.visual.drawing import SAFE, draw_objects, ink_on, palette, place_labels
from groupmixformer.visual.figures import inline_svg

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 1, 1, 1), "mlp_ratios": (1, 1, 1, 1)}
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
CONFIG["crop_mode"] = "center"


class Page(HTMLParser):
    """What a page holds: its tags, attributes, texts and table rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text, self._cell = [], [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("th", "td")

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1].append(data)
            self._cell = False


class Images:
    def __init__(self, number):
        self.number = number

    def read(self, index):
        return Image.new("RGB", (32, 32), (index % 256, 99, 99)), 0

    def __len__(self):
        return self.number


def run_folder(folder, epochs=3, warmup=1):
    folder.mkdir()
    rows = [
        {"epoch": e, "lr": 0.1 / (e + 1), "loss": 2 - e / 9, "val_loss": 1.5, "val_top1": 0.5, "seconds": 9}
        for e in range(epochs)
    ]
    write_rows(folder / "metrics.csv", rows)
    (folder / "versions.json").write_text('{"torch": "2.14"}')
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"data": "x", "schedule": {"warmup_epochs": warmup}}))
    return folder


def reported(folder, names, true, predicted, **more):
    """Return the page of a classifier that answered `predicted`, and its rows of classes."""
    true, predicted = torch.as_tensor(true), torch.as_tensor(predicted)
    confidence = torch.linspace(0.3, 0.99, len(true))
    metrics = {"top1": (true == predicted).double().mean().item(), "top5": 1.0, "loss": 0.5, "calibration_error": 0.1}
    evaluation = Evaluation(metrics | {"images": len(true)}, predicted, confidence, true, torch.arange(len(true)), [])
    rows = per_class(evaluation, names)
    counts = [row["images"] for row in rows]
    remarks = no_better_than_one_class(int((true == predicted).sum()), counts, names, "images")
    result = {**evaluation.metrics, "per_class": rows}
    measured = ClassificationResult(result, "", "", [], remarks=remarks, evaluation=evaluation)
    model = GroupMixFormer(num_classes=len(names), **STAGES).eval()
    path = write_report(run_folder(folder, **more), model, Images(len(true)), names, measured, CONFIG)
    return path.read_text(), rows


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    random = np.random.default_rng(0)
    true = random.integers(0, 4, 200)
    predicted = np.where(random.random(200) < 0.7, true, random.integers(0, 4, 200))
    names = ["<script>alert(1)</script>", "$x", "c&d", "four"]
    folder = tmp_path_factory.mktemp("report") / "run"
    return folder, *reported(folder, names, true, predicted), true, predicted


def test_no_number_of_a_bar_chart_is_cut_off():
    names = ["n01440764", "n02102040"]
    for most in (0.02, 0.07, 0.2, 0.25, 0.333, 0.5, 1):
        figure = bar_chart(names, [most, most / 2], names, most, xlabel="share (%)")
        figure.draw_without_rendering()
        assert figure.axes[0].get_tightbbox().x1 <= figure.bbox.x1, most


def test_images_that_are_right_are_of_all_classes(tmp_path):
    true = [0] * 14 + [1] * 14
    text, _ = reported(tmp_path / "run", ["first", "second"], true, true)
    right = text.partition("Held-out images it gets right")[2]
    assert [right.count(f'alt="✓ {name} (') for name in ("first", "second")] == [8, 8]


def test_the_page_is_whole_and_asks_for_nothing(page):
    folder, text, *_ = page
    found = Page(text)
    assert "could not be drawn" not in text
    for name, value in found.attributes:
        assert name not in ("src", "href", "xlink:href", "action") or value.startswith(("data:image/", "#")), (name, value)
        assert not name.startswith("on")
    assert not re.search(r"url\((?!#)|@import", text)
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    script = re.search("<script>(.*?)</script></body>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    assert found.tags.count("script") == 1, "names of classes are no markup"
    assert "<script>alert(1)</script> found: " in found.text
    assert ("name", "viewport") in found.attributes
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "parts of several charts do not share an id"
    assert len(text) < 1_000_000
    pictures = {path.name for path in (folder / "report").iterdir()}
    charts = {"loss.png", "metric.png", "rate.png", "confusion.png", "confusion-counts.png", "calibration.png", "attention.png"}
    assert pictures == charts


def test_the_result_comes_first_and_versions_and_recipe_last(page):
    text = page[1]
    order = ["<h1>", 'class="tiles"', 'class="gallery"', "How the training went", "Confusion", "Calibration", "<details>"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.rindex("<svg ") < text.index("<details>")
    assert text.count("<details>") == 2 and "<details open" not in text


def test_precision_recall_and_f1_are_scikit_learns(page):
    _, text, rows, true, predicted = page
    precision, recall, f1, images = precision_recall_fscore_support(true, predicted, labels=range(4))
    for row, p, r, f, n in zip(rows, precision, recall, f1, images, strict=True):
        assert (row["precision"], row["top1"], row["f1"], row["images"]) == (p, r, f, n)
    shown = {cells[0]: cells[1:] for cells in Page(text).rows if len(cells) == 5}
    for name, p, r, f, n in zip(("<script>alert(1)</script>", "$x", "c&d", "four"), precision, recall, f1, images, strict=True):
        assert shown[name] == [str(n), f"{p:.2%}", f"{r:.2%}", f"{f:.2%}"]
    assert shown["mean"] == ["200", f"{precision.mean():.2%}", f"{recall.mean():.2%}", f"{f1.mean():.2%}"]
    worst_first = [cells[0] for cells in Page(text).rows if len(cells) == 5][1:-1]
    assert worst_first == sorted(worst_first, key=lambda name: float(shown[name][-1][:-1]))


def test_classes_without_images_have_no_numbers():
    found = Evaluation({}, torch.tensor([0, 2]), torch.ones(2), torch.tensor([0, 1]), torch.arange(2), [])
    rows = per_class(found, ["a", "b", "c"])
    assert [(row["top1"], row["precision"], row["f1"]) for row in rows] == [(1, 1, 1), (0, None, 0), (None, None, None)]


def test_a_trivial_model_and_a_warm_up_without_end_are_said_in_words(page, tmp_path):
    names = ["cat", "dog", "cow", "hen", "ant", "bee"]
    true = [0] * 6 + [1] * 3 + [2]
    text, _ = reported(tmp_path / "run", names, true, [0] * 10, epochs=3, warmup=3)
    assert "No better than always answering cat, the largest class: that is right for 60.00% of the held-out images" in text
    assert "The run never left its warm-up: it was trained for 3 of 3 epochs of warm-up" in text
    assert "<dt>top-5</dt>" in text
    assert 'class="remarks"' not in page[1]
    assert "top-5" not in page[1], "of four classes it is always 100 %"
    assert no_better_than_one_class(7, [6, 3, 1], names, "images") == []
    assert no_better_than_one_class(5, [10, 0], names, "images") == [], "of one class alone it means nothing"


def test_parts_of_charts_tell_their_values():
    counts = np.array([[8, 2], [0, 10]])
    svg = inline_svg(matrix_chart(counts, ["a<b", "c"], normalised=True), "matrix")
    titles = re.findall("<title>(.*?)</title>", svg, re.S)
    assert sorted(titles) == [
        "a&lt;b found: 8 images, 80.0% of the class",
        "a&lt;b taken for c: 2 images, 20.0% of the class",
        "c found: 10 images, 100.0% of the class",
    ]
    figure = line_chart([1, 2, 3], {"x": [1, 2, 4], "y": [3, float("nan"), 5]}, xlabel="epoch", ylabel="loss")
    svg = inline_svg(figure, "lines")
    assert re.findall("<title>(.*?)</title>", svg, re.S) == ["epoch 1\nx: 1\ny: 3", "epoch 2\nx: 2", "epoch 3\nx: 4\ny: 5"]
    assert "#0072b2" not in svg and svg.count("var(--blue)") >= 1 and svg.count("var(--orange)") >= 1
    long = line_chart(range(1, 1001), {"x": range(1000)}, xlabel="epoch", ylabel="loss")
    assert inline_svg(long, "long").count("<title>") == 100


def test_a_matrix_of_many_classes_is_one_image():
    svg = inline_svg(matrix_chart(np.eye(500), [str(i) for i in range(500)], normalised=True), "many")
    assert svg.count("<image ") == 1 and "<title>" not in svg and len(svg) < 100_000


# Detection

BOXES = {"a": [0, 0, 10, 10], "b": [20, 0, 10, 10], "far": [60, 60, 10, 10], "crowd": [40, 40, 20, 20]}


def scene():
    """Three objects of two classes and a crowd in two images; found are one twice, one of a wrong class, two elsewhere."""

    def annotation(number, image, category, box, crowd=0):
        area = BOXES[box][2] * BOXES[box][3]
        ids = {"id": number, "image_id": image, "category_id": category}
        return {**ids, "bbox": BOXES[box], "area": area, "iscrowd": crowd}

    truth = {
        "images": [{"id": i, "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            *(annotation(1, 1, 3, "a"), annotation(2, 1, 7, "b"), annotation(3, 2, 3, "a")),
            annotation(4, 1, 3, "crowd", crowd=1),
        ],
    }
    found = [(1, 3, "a", 0.9), (1, 3, "a", 0.8), (1, 3, "b", 0.7), (1, 3, "crowd", 0.6), (2, 7, "far", 0.2)]
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, (i, c, BOXES[box], score), strict=True)) for i, c, box, score in found]


def test_f1_over_the_least_score_and_precision_over_recall():
    truth, results = scene()
    curves = detection_curves(truth, results, "bbox")

    def f1(right, found, objects):
        return 2 * right / (found + objects)

    for threshold, cat, overall in [
        (0.0, f1(1, 3, 2), f1(1, 4, 3)),
        (0.5, f1(1, 3, 2), f1(1, 3, 3)),  # the crowd counts for nothing
        (0.75, f1(1, 2, 2), f1(1, 2, 3)),
        (0.85, f1(1, 1, 2), f1(1, 1, 3)),
        (0.95, 0, 0),
    ]:
        place = round(100 * threshold)
        assert curves.thresholds[place] == pytest.approx(threshold)
        assert (curves.f1[0, place], curves.f1[-1, place]) == pytest.approx((cat, overall))
    assert (curves.f1[1] == 0).all()
    assert 0.8 < curves.best <= 0.9
    assert curves.precision.shape == (3, 101) and curves.precision[0, 50] == 1 and curves.precision[0, 51] == 0
    np.testing.assert_allclose(curves.precision[-1], curves.precision[:2].mean(axis=0))


def test_what_is_confused_with_what_and_with_the_background():
    truth, results = scene()
    assert detection_confusion(truth, results, "bbox", 0.5).tolist() == [[1, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert detection_confusion(truth, results, "bbox", 0.1).tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert detection_confusion(truth, results, "bbox", 0.95).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]


# Drawing


def overlaps(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


@pytest.mark.parametrize("seed", range(5))
def test_labels_do_not_cover_each_other_and_stay_inside(seed):
    random = np.random.default_rng(seed)
    corners, extents = random.uniform(0, 500, (60, 2)), random.uniform(2, 200, (60, 2))
    boxes = np.hstack([corners, corners + extents]).tolist()
    sizes = [(int(w), 20) for w in random.integers(20, 150, 60)]
    places = place_labels(boxes, sizes, (640, 480))
    plates = [(*place, *size) for place, size in zip(places, sizes, strict=True) if place]
    assert len(plates) > 15
    assert not any(overlaps(a, b) for a, b in itertools.combinations(plates, 2))
    assert all(x >= 0 and y >= 0 and x + w <= 640 and y + h <= 480 for x, y, w, h in plates)
    for place, size, (_, top, _, bottom) in zip(places, sizes, boxes, strict=True):
        if place:
            assert top - 2 * size[1] - 1 <= place[1] <= bottom + size[1] + 1, "near its box"


def test_a_label_stands_on_its_box_where_there_is_place():
    box = [100, 100, 200, 200]
    assert place_labels([box, box, box], [(50, 20)] * 3, (640, 480)) == [(100, 80), (150, 80), (100, 200)]
    assert place_labels([[0, 0, 640, 480]], [(50, 20)], (640, 480)) == [(0, 0)]
    assert place_labels([[0, 0, 9, 9]] * 9, [(640, 480)] * 9, (640, 480)) == [(0, 0), *[None] * 8]


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def linear(color):
    share = np.asarray(color) / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    first, second = (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05 for color in (a, b))
    return max(first, second) / min(first, second)


@pytest.mark.parametrize("color", palette(60))
def test_a_label_can_be_read_on_its_plate(color):
    assert contrast(color, {"black": [0, 0, 0], "white": [255] * 3}[ink_on(color)]) >= 4.5


# What is seen without the cones for long, middle and short waves: Machado, Oliveira and Fernandes (2009), severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", ["protanopia", "deuteranopia"])
def test_the_colour_blind_can_tell_classes_apart(kind):
    seen = [np.clip(np.array(BLINDNESS[kind]) @ linear(rgb(color)), 0, 1) ** (1 / 2.2) for color in SAFE]
    apart = {pair: np.abs(seen[pair[0]] - seen[pair[1]]).max() for pair in itertools.combinations(range(len(SAFE)), 2)}
    assert min(apart.values()) > 0.1, min(apart.items(), key=lambda item: item[1])
    assert [list(rgb(color)) for color in SAFE] == palette(7)


@pytest.mark.parametrize("side", [480, 1920])
def test_lines_and_labels_grow_with_the_image(side):
    objects = {"boxes": torch.tensor([[0.25, 0.25, 0.75, 0.75]]) * side, "labels": torch.tensor([1])}
    drawn = np.asarray(draw_objects(Image.new("RGB", (side, side), "white"), objects, ["a"]))
    column = (drawn[:, int(0.7 * side)] == palette(1)[0]).all(axis=1)
    assert column.sum() == 2 * max(2, round(side / 240))  # the upper and the lower edge, far from the label
    plate = (drawn[: side // 4, int(0.25 * side) + 2] == palette(1)[0]).all(axis=1).sum()
    assert plate == round(1.4 * round(side / 36))


# The browser


@pytest.mark.slow
@pytest.mark.skipif(chromium.CHROMIUM is None, reason="needs Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    with chromium.open_tab("about:blank", tmp_path) as tab:
        for width in (390, 1200):
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 400)
            tab.call("Page.navigate", url=(page[0] / "report.html").as_uri())
            tab.until("document.readyState === 'complete'")
            assert tab.run("document.documentElement.scrollWidth") <= width, "the page itself is not scrolled sideways"
            small = (
                "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height).filter(h => h && h < 7)"
            )
            assert tab.run(f"{small}.length") == 0
            backgrounds = []
            for scheme in ("light", "dark"):
                tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                backgrounds.append(tab.run("getComputedStyle(document.body).backgroundColor"))
                tab.screenshot(tmp_path / f"{scheme}-{width}.png")
            assert backgrounds == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
        tab.run("document.querySelector('.tip .column').scrollIntoView({block: 'center'})")
        place = tab.run("(({x, y, width, height}) => ({x: x + width / 2, y: y + height / 2}))"
                        "(document.querySelector('.tip .column').getBoundingClientRect())")  # fmt: skip
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        assert tab.until("document.getElementById('tip').innerText", 10).startswith("epoch 1\ntraining (augmented): 2")
        assert not tab.said
        assert not [address for address in tab.requested if not address.startswith(("file:", "data:", "about:"))]
