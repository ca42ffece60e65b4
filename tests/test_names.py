"""Names of classes and files as people give them: in figures, drawings, pages, cards and whole runs of every task."""

import json
import logging
import os
import re
import stat
import warnings
from html.parser import HTMLParser

import huggingface_hub
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image
from shapes import write_split

from groupmixformer.cli.main import main
from groupmixformer.data.shards import write_shards
from groupmixformer.deploy.model_card import CardInfo, markdown, render_card
from groupmixformer.files import write_rows
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run import Run
from groupmixformer.tasks.predictor import EvalResult, Predictor, class_table
from groupmixformer.tasks.registry import NetworkInfo, find_task
from groupmixformer.visual import fonts
from groupmixformer.visual.charts import matrix_chart
from groupmixformer.visual.drawing import draw_objects, draw_segments, palette
from groupmixformer.visual.figures import Row, drawn, overlay_figure, write_figure
from groupmixformer.visual.page import Chart, Gallery, Shown, Table, write_page

HOSTILE = [
    "under $5",
    "$x_{$",
    "<script>alert(1)</script>",
    "a\nb",
    "\x1b[31m",
    "[bold]x[/bold]",
    "a,b",
    "'; --",
    "a|b",
    "![x](http://a.b/c.png) `y` **z**",
    "名前",
    "кот",
    "😀",
    "שלום",
    "\u202egpj",
    "---\nlicense: x",
    "{0} %s {name}",
    "n" * 300,
]


@pytest.fixture(autouse=True)
def _no_warnings():
    """A glyph that is missing, a formula that cannot be read: matplotlib warns of them or raises."""
    fonts._note.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="matplotlib|PIL")
        warnings.filterwarnings("error", message=".*[Gg]lyph")
        yield


def confusion(names):
    return matrix_chart(np.eye(len(names), dtype=int), names, normalised=False)


def overlay(names):
    rows = [Row(np.zeros((8, 8, 3)), name, relevance=np.zeros((8, 8))) for name in names[:3]]
    return overlay_figure(rows, names[3], f"relevance:\n{names[1]}")


def legend(names):
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names[:6]):
        axes.plot([0, 1], [0, i], label=name)
    axes.legend()
    return figure


@pytest.mark.parametrize("figure", [overlay, legend])
@pytest.mark.parametrize("form", ["png", "svg"])
def test_names_in_figures_are_no_formulas_and_no_markup(figure, form):
    content = drawn(figure(HOSTILE), form)
    assert len(content) > 1000
    if form == "svg":
        assert b"<script" not in content


def test_tick_labels_are_what_was_given():
    figure = confusion(HOSTILE)
    drawn(figure)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:2] == ["under $5", "$x_{$"]
    assert labels[3:5] == [r"a\nb", r"\x1b[31m"]
    assert labels[HOSTILE.index("кот")] == "кот"
    long = labels[HOSTILE.index("n" * 300)]
    assert len(long) == 20 and long.endswith("…")
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())


@pytest.fixture
def font_of_names(tmp_path):
    """A font with the characters of one name, each a square."""
    characters = {ord(c): f"u{ord(c):04X}" for c in "名前"}
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *characters.values()])
    builder.setupCharacterMap(characters)
    builder.setupGlyf(dict.fromkeys([".notdef", *characters.values()], pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *characters.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares-sans.ttf")
    return str(tmp_path / "squares-sans.ttf")


def test_a_font_that_is_installed_draws_what_it_has(font_of_names, monkeypatch, caplog):
    fonts._fonts_for.cache_clear()
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [font_of_names, "gone.ttf"])
    try:
        figure = legend(["名前", "кот 名"])
        drawn(figure)
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["名前", "кот 名"]
        assert fonts.best_font(["名前"]) == font_of_names
        assert caplog.messages == []
    finally:
        fonts._fonts_for.cache_clear()


def test_characters_without_a_font_are_escapes_and_one_note_names_the_font(monkeypatch, caplog):
    fonts._fonts_for.cache_clear()
    monkeypatch.setattr(fonts, "findSystemFonts", list)
    try:
        with caplog.at_level(logging.WARNING):
            figure = legend(["名前 кот", "前"])
            drawn(figure)
            drawn(legend(["名"]))
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [r"\u540d\u524d кот", r"\u524d"]
        (note,) = caplog.messages
        assert "install Noto Sans CJK" in note
    finally:
        fonts._fonts_for.cache_clear()


def test_names_are_drawn_on_images():
    image, names = Image.new("RGB", (64, 48)), HOSTILE
    boxes = torch.tensor([[4.0, 4, 40, 40]]).repeat(len(names), 1)
    labels = torch.arange(1, len(names) + 1)
    drawn = draw_objects(image, {"boxes": boxes, "labels": labels, "scores": torch.ones(len(names))}, names)
    assert drawn.size == (640, 480)
    segments = torch.arange(48 * 64).reshape(48, 64) % len(names)
    page = draw_segments(image, segments, names, palette(len(names)))
    assert page.width < 2000, "a name of 300 characters is cut"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "<b>run & more"
    folder.mkdir()
    write_rows(folder / "metrics.csv", [{"epoch": 0, "loss": 1.0, "val_loss": 1.0, "val_mIoU": 0.5, "seconds": 1.0}])
    (folder / "versions.json").write_text('{"torch": "<i>2"}')
    (folder / "recipe.yaml").write_text("data: </pre><script>\n")
    return folder


def failing():
    raise RuntimeError("no glyph\nfor <b>")


def test_a_page_has_no_markup_but_its_own_and_lacks_only_what_fails(run_folder, caplog):
    tiles = dict.fromkeys(HOSTILE, HOSTILE[2])
    images = Gallery("images", lambda: [Shown(Image.new("RGB", (9, 9)), name, right=False) for name in HOSTILE])
    told = lambda: matrix_chart(np.eye(len(HOSTILE), dtype=int), HOSTILE, normalised=True)  # noqa: E731
    good = Chart("good", "<u>", lambda: legend(HOSTILE))
    sections = {"": [images], "Bad <u>": [Chart("bad", "Bad", failing), good], "More": [Chart("told", "", told), HOSTILE[2]]}
    sections["Table"] = [Table(HOSTILE, [HOSTILE])]
    path = write_page(run_folder, HOSTILE[2], tiles, sections, HOSTILE)
    page = path.read_text()
    parsed = Tags()
    parsed.feed(page)
    own = (
        "html head meta title style body main section h1 h2 p pre dl div dt dd ul li table thead tbody tr th td details summary"
    )
    svg = "svg g path text use defs clippath rect title"
    assert set(parsed.tags) == {*own.split(), *svg.split(), "figure", "figcaption", "img", "script"}
    assert parsed.tags.count("script") == 1
    assert parsed.text.count("<script>alert(1)</script>") > len(HOSTILE)
    assert "bad could not be drawn: RuntimeError: no glyph for <b>" in parsed.text
    assert (run_folder / "report" / "good.png").is_file()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)
    assert any("bad could not be drawn" in message for message in caplog.messages)


class Reported(Predictor):
    """A predictor of whom only the report is asked."""

    metric = ("val_mIoU", "mIoU")

    def __init__(self):
        pass

    def load(self, run, image_size):
        raise NotImplementedError

    predict = open_data = evaluate = load


def test_the_report_of_every_task_takes_any_names(run_folder, tmp_path):
    classes = [{"class": name, "index": i, "mIoU": i / 20} for i, name in enumerate([*HOSTILE, HOSTILE[0]])]
    result = {"mIoU": float("nan"), "images": 3, "per_class": classes}
    path = Reported().report(run_folder, [], EvalResult(result, "", "", []))
    assert "could not be drawn" not in path.read_text()
    table = class_table(classes, "mIoU")
    assert len(table.splitlines()) == len(classes) + 1 and max(map(len, table.splitlines())) < 60


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    run = Run.open(_saved(tmp_path / "run", ["a", "b"]))
    predictor = run.predictor("cpu")
    monkeypatch.setattr(type(run.definition), "reporter", lambda *_: predictor)
    monkeypatch.setattr(Run, "_data", lambda self, data: ("photos", {}))
    monkeypatch.setattr(predictor, "open_data", lambda data: None)
    monkeypatch.setattr(predictor, "evaluate", lambda *_: EvalResult({"top1": 0.5}, "", "", []))
    monkeypatch.setattr(predictor, "report", lambda *_: failing())
    measured, report, examples = run.report()
    assert (measured.result, report, examples) == ({"top1": 0.5}, None, [])
    assert "the run is complete, but not its report: RuntimeError: no glyph for <b>" in caplog.text


def _saved(folder, names):
    from groupmixformer import GroupMixFormer

    stages = {"embed_dims": (10, 20, 40, 30), "depths": (1, 1, 1, 1), "mlp_ratios": (1, 1, 1, 1)}
    save_checkpoint(GroupMixFormer(num_classes=len(names), **stages), folder, names, {"input_size": (3, 32, 32)})
    return folder


def test_a_card_shows_names_as_they_are():
    md = pytest.importorskip("markdown_it")
    network = NetworkInfo("`x`", "A network", False, HOSTILE, {"a|b": "c|d\n|e|"}, "")
    recipe = {"data": "```\n<b>$x", "checkpoint": "a`b", "out": "```\n# x"}
    best = {"epoch": 0.0, "val_top1": 0.5}
    card = render_card(CardInfo(find_task("classification"), network, recipe, best, 1, {"device": "<i>"}), "me/x", "mit")
    body = huggingface_hub.ModelCard(card)
    assert body.data.license == "mit" and body.data.eval_results[0].dataset_name.startswith("```\n<b>$x")
    rendered = md.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(body.text)
    parsed = Tags()
    parsed.feed(rendered)
    own = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert set(parsed.tags) == own
    for name in HOSTILE[:-2]:
        assert markdown(name) and (fonts.printable(name) in parsed.text), name
    assert rendered.count("<tr>") == 5, "two heads, a metric and two properties"
    assert "\x1b" not in card and "\u202e" not in card


def _own(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_ordinary_permissions(tmp_path, capsys, run_folder):
    """Whoever may read the folder may read what is in it; safetensors alone would write 0600."""
    before = os.umask(0o022)
    try:
        folder = _saved(tmp_path / "run", ["a", "b"])
        Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
        assert main(["push", str(folder), "me/x", "--dry-run", str(tmp_path / "card")]) == 0, capsys.readouterr().err
        assert main(["convert", str(folder), "--out", str(tmp_path / "converted")]) == 0, capsys.readouterr().err
        write_figure(legend(HOSTILE), tmp_path / "plot.svg")
        write_page(run_folder, "", {}, {"x": [Chart("x", "x", lambda: legend(HOSTILE))]})
        write_shards(
            tmp_path, {"train": [(str(tmp_path / "image.png"), 0)]}, ["a"], tmp_path / "shards", 10, 0, 1, lambda a, *_: a
        )
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    check_permissions(tmp_path)


def check_permissions(folder):
    assert {path.name: oct(_own(path)) for path in folder.rglob("*") if path.is_file() and _own(path) != 0o644} == {}
    assert {path.name: oct(_own(path)) for path in folder.rglob("*") if path.is_dir() and _own(path) != 0o755} == {}


def gmf(capsys, *argv):
    """Run a command as a user would; what it prints is JSON, in ASCII, and stderr does nothing to a terminal."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.out.isascii() and not re.search("[\x00-\x08\x0b-\x1f\u202e]", said.err)
    assert "lyph" not in said.err
    text = main([*map(str, argv)]) if argv[0] not in ("train", "push") else 0
    assert text == 0 and not re.search("[\x00-\x08\x0b-\x1f\u202e]", capsys.readouterr().out)
    return json.loads(said.out, parse_constant=pytest.fail)


FILE = "$x_{$ <b>名\n.png"


def check_run(capsys, tmp_path, run, names):
    """Report, predict, explain, card and eval of a run whose classes have hostile names."""
    assert "could not be drawn" not in (run / "report.html").read_text()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / FILE)
    config = json.loads((run / "config.json").read_text())
    assert sorted(config.get("class_names") or config["label_names"]) == sorted(names)
    where = ["--out", tmp_path / "predicted"] if "class_names" in config else []
    (found,) = gmf(capsys, "predict", run, tmp_path / FILE, *where)["images"]
    assert found["image"] == str(tmp_path / FILE)
    gmf(capsys, "explain", run, tmp_path / FILE, "--out", tmp_path / "explained", "--format", "svg")
    gmf(capsys, "push", run, "me/x", "--dry-run", tmp_path / "card")
    assert huggingface_hub.ModelCard.load(tmp_path / "card" / "README.md").data.pipeline_tag
    measured = gmf(capsys, "eval", run, "--per-class")
    assert {row["class"] for row in measured["per_class"]} == set(names)
    assert isinstance(measured["notes"], list)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", pytest.param("openvino", marks=pytest.mark.exhaustive)])
def test_exports_have_ordinary_permissions(format, tmp_path, capsys):
    before = os.umask(0o022)
    try:
        folder, suffix = _saved(tmp_path / "run", ["a", "b"]), {"openvino": "xml"}.get(format, "pt2")
        out = tmp_path / "out" / f"a.{suffix}"
        assert main(["export", str(folder), "--format", format, "--out", str(out)]) == 0, capsys.readouterr().err
    finally:
        os.umask(before)
    check_permissions(tmp_path)


FAST = ["--epochs", "1", "--workers", "0", "--device", "cpu"]
SMALL = ["--image-size", "64", "--batch-size", "2", "--channels-last", "false"]


@pytest.mark.slow
def test_a_classifier_of_any_names(tmp_path, capsys):
    names = sorted([name.replace("/", "_")[:80] for name in HOSTILE])
    for split, number in (("train", 2), ("val", 1)):
        for i, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for j in range(number):
                Image.new("RGB", (40, 40), (10 * i, 5 * j, 99)).save(tmp_path / "data" / split / name / f"{j}.png")
    small = ["--image-size", "32", "--batch-size", "8", "--crop-pct", "1.0"]
    result = gmf(capsys, "train", "folder", "--data", tmp_path / "data", "--out", tmp_path / "run", *small, *FAST)
    assert len(set(result["examples"])) == 3
    found = check_run(capsys, tmp_path, tmp_path / "run", names)
    assert {row["class"] for row in found["classes"]} <= set(names)


@pytest.mark.slow
def test_a_detector_of_any_names(tmp_path, capsys):
    categories = [{"id": 3, "name": HOSTILE[1]}, {"id": 7, "name": HOSTILE[2]}]
    categories += [{"id": 10 + i, "name": name} for i, name in enumerate(HOSTILE[3:])]
    for split, number in (("train", 4), ("val", 2)):
        write_split(tmp_path / "data", split, number, categories=categories)
    detector = ["--model", "test_convnext", "--detector.max_size", "96", "--detector.fpn-channels", "32"]
    detector += ["--detector.rois-per-image", "32", "--detector.max-detections", "20"]
    gmf(capsys, "train", "nuclei", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL, *detector, *FAST)
    check_run(capsys, tmp_path, tmp_path / "run", HOSTILE[1:])


@pytest.mark.slow
def test_a_segmenter_of_any_names(tmp_path, capsys):
    rng = np.random.default_rng(0)
    classes = [{"id": i, "name": name} for i, name in enumerate(HOSTILE)]
    for split, number in (("train", 4), ("val", 2)):
        for i in range(number):
            for kind, pixels in (("images", (64, 64, 3)), ("masks", (64, 64))):
                (tmp_path / "data" / kind / split).mkdir(parents=True, exist_ok=True)
                values = rng.integers(0, 255 if kind == "images" else len(HOSTILE), pixels, dtype=np.uint8)
                Image.fromarray(values).save(tmp_path / "data" / kind / split / f"{i}.png")
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255}))
    model = ["--model", "test_resnet", "--segmenter.channels", "16"]
    gmf(capsys, "train", "camvid", "--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL, *model, *FAST)
    found = check_run(capsys, tmp_path, tmp_path / "run", HOSTILE)
    assert set(found["shares"]) <= set(HOSTILE)
