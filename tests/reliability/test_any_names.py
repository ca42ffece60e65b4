"""Names of classes and files drawn from every script and every kind of markup, through all that shows or writes them.

    python tests/reliability/test_any_names.py --count 2000 --out names.json

An attempt draws names and puts them through one sink: a figure, a drawing, a page, a card, JSON, CSV, a terminal. Right means
that the text comes out as `printable` has it (exactly, where it is data), and that nothing of it was taken for markup.
"""

import csv
import io
import json
import re
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from campaign import main, run

from groupmixformer.cli.common import show
from groupmixformer.deploy.model_card import markdown
from groupmixformer.files import printable, short, to_json, write_rows
from groupmixformer.visual.drawing import draw_objects, draw_segments, palette
from groupmixformer.visual.figures import Row, drawn, overlay_figure
from groupmixformer.visual.page import Table, write_page

MARKUP = [*"$\\_^{}%&#~<>\"'`*[]()|!:;=-+/@,.0 \n\r\t\x1b\x00\x07\x7f\x85\u2028\u202e\u2066\ufeff\u200d\ud800\udcff"]
WORDS = [
    "$x_{$",
    r"\frac",
    "<script>",
    "</pre>",
    "&amp;",
    "[bold]",
    "\x1b[2J",
    "```",
    "---\n",
    "![a](http://b)",
    "{0}",
    "%s",
    "| a |",
]
RANGES = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x3040, 0x3100), (0x4E00, 0x9FFF)]
RANGES += [(0xAC00, 0xD7A4), (0x1F300, 0x1FAFF), (0x0, 0x110000)]


def name(rng):
    """Draw a text of up to 300 characters: markup, scripts, anything."""
    parts = []
    for _ in range(rng.integers(1, 12)):
        kind = rng.integers(3)
        if kind == 0:
            parts.append(MARKUP[rng.integers(len(MARKUP))])
        elif kind == 1:
            parts.append(WORDS[rng.integers(len(WORDS))])
        else:
            low, high = RANGES[rng.integers(len(RANGES))]
            parts.append("".join(map(chr, rng.integers(low, high, rng.integers(1, 6)))))
    text = "".join(parts)
    return text * 30 if rng.random() < 0.05 else text


def figure(rng):
    names = [name(rng) for _ in range(3)]
    made = Figure(figsize=(9, 4), layout="constrained")
    axes = made.subplots()
    axes.barh(range(3), range(3), label=short(names[0]))
    axes.set_yticks(range(3), [short(text) for text in names])
    axes.set(title=short(names[1]), xlabel=short(names[2]))
    axes.legend()
    form = ("png", "svg", "pdf")[rng.integers(3)]
    content = drawn(made, form)
    assert not any(text.get_parse_math() for text in axes.get_yticklabels())
    if form == "svg":
        import xml.etree.ElementTree as ET

        assert "script" not in "".join(element.tag for element in ET.fromstring(content).iter())
    drawn(overlay_figure([Row(np.zeros((8, 8, 3)), short(names[0]))], short(names[1])), "png")


def drawing(rng):
    names = [name(rng) for _ in range(3)]
    image, boxes = Image.new("RGB", (64, 48)), torch.tensor([[2.0, 2, 30, 30]] * 3)
    draw_objects(image, {"boxes": boxes, "labels": torch.arange(1, 4), "scores": torch.ones(3)}, names)
    page = draw_segments(image, torch.arange(48 * 64).reshape(48, 64) % 3, names, palette(3))
    assert page.width < 2500


class Tags(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [key for key, _ in attrs]))

    def handle_data(self, data):
        self.text.append(data)


def page(rng):
    names = [name(rng) for _ in range(3)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "metrics.csv", [{"epoch": 0, "loss": 1.0, "seconds": 1.0}])
        (folder / "versions.json").write_text(to_json({names[0]: names[1]}))
        (folder / "recipe.yaml").write_text("data: x\n")
        sections = {names[0]: [names[1], Table(names, [names])]}
        content = write_page(folder, names[0], {names[1]: names[2]}, sections, names).read_text()
    parsed = Tags()
    parsed.feed(content)
    own = (
        "html head meta title style body main section h1 h2 p pre dl div dt dd ul li table thead tbody tr th td details summary"
    )
    assert {tag for tag, _ in parsed.tags} == {*own.split(), "script"}
    keys = {"lang", "charset", "name", "content", "http-equiv", "class", "id", "role", "hidden"}
    assert {key for _, found in parsed.tags for key in found} == keys
    assert printable(names[2]) in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2066]", content)


def card(rng):
    from markdown_it import MarkdownIt

    text = name(rng)
    parsed = Tags()
    parsed.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"Classes: {markdown(text)}, end."))
    assert parsed.tags == [("p", [])], parsed.tags
    shown = "".join(parsed.text).strip()
    assert shown == f"Classes: {printable(text)}, end.", (shown, text)


def data(rng):
    rows = [{"class": name(rng), "value": float(rng.choice([0.5, np.nan, np.inf]))} for _ in range(3)]
    assert [row["class"] for row in json.loads(to_json(rows), parse_constant=float.fromhex)] == [row["class"] for row in rows]
    texts = [row["class"].encode(errors="backslashreplace").decode().replace("\x00", "") for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.csv"), [{"class": text, "n": 1} for text in texts])
        with Path(folder, "rows.csv").open(newline="", encoding="utf-8") as file:
            assert [row["class"] for row in csv.DictReader(file)] == texts


def terminal(rng):
    names = [name(rng) for _ in range(3)]
    encoding = ("ascii", "cp1252", "utf-8", "gb18030")[rng.integers(4)]
    buffer, before = io.BytesIO(), sys.stdout
    sys.stdout = io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", newline="\n")
    try:
        show({}, False, "\n".join(map(printable, names)))
        sys.stdout.flush()
        sys.stdout.detach()  # closing it would close the buffer
    finally:
        sys.stdout = before
    lines = buffer.getvalue().decode(encoding).removesuffix("\n").split("\n")
    assert len(lines) == 3
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", "".join(lines))


SINKS = (figure, drawing, page, card, data, terminal)


def attempt(rng):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph|.*collapsed")
        try:
            SINKS[rng.integers(len(SINKS))](rng)
        except Exception as error:  # no name is refused
            raise AssertionError(f"{type(error).__name__}: {error}") from error
    return "right"


def test_any_name_is_shown_as_it_is():
    result = run(attempt, 24)
    assert result["failures"] == []


if __name__ == "__main__":
    main({"names": (attempt, 2000)})
