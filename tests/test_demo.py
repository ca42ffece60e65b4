"""The page: the point that was clicked is the one that is asked about, and a browser sees all of it without the network."""

import dataclasses
import functools
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch
from chromium import CHROMIUM, open_tab
from PIL import Image

from groupmixformer import GroupMixFormer, attention_maps
from groupmixformer.cli.main import main
from groupmixformer.deploy import demo
from groupmixformer.deploy.demo import Page, application
from groupmixformer.models.attention_maps import by_group_size
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.classification.predict import ClassificationPredictor
from groupmixformer.tasks.segmentation.predict import SegmentationPredictor
from groupmixformer.visual.figures import GROUPS, ORANGE

TINY = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
NAMES = ["ash", "birch", "crane", "crane", "elm", "fir"]
CPU = torch.device("cpu")
MARK = tuple(int(ORANGE[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture(scope="module")
def run(tmp_path_factory, randomise):
    """The folder of a classifier of 64 x 64 pixels that sees the middle 80 %."""
    folder = tmp_path_factory.mktemp("runs") / "trees"
    config = {"input_size": (3, 64, 64), "crop_pct": 0.8}
    save_checkpoint(randomise(GroupMixFormer(num_classes=6, **TINY)), folder, NAMES, config)
    (folder / "examples").mkdir()
    Image.new("RGB", (90, 90), "red").save(folder / "examples" / "red.png")
    return folder


@pytest.fixture(scope="module")
def segments(tmp_path_factory, randomise):
    """The folder of a segmenter."""
    from groupmixformer.tasks.segmentation.model import Segmenter

    folder, backbone = tmp_path_factory.mktemp("runs") / "ground", Backbone("groupmixformer_mobile", TINY)
    settings = {"num_classes": 3, "decoder": "fpn", "image_size": 64, "channels": 128}
    network = {"backbone": dataclasses.asdict(backbone), **settings}
    config = {"class_names": NAMES[:3], "class_ids": [0, 1, 2], "colors": [[0, 90, 0], [200, 0, 0], [0, 0, 200]]}
    save_network(randomise(Segmenter(backbone, **settings)), folder, {"task": "segmentation", **config, "network": network})
    return folder


@pytest.fixture(scope="module")
def classes(run):
    return ClassificationPredictor(run, CPU)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The file of a wide image."""
    blocks = np.random.default_rng(3).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(blocks).resize((160, 100), Image.Resampling.NEAREST).save(file)
    return file


def test_the_page_shows_what_the_model_says(classes, image):
    page = Page({"trees": classes})
    seen, expected = page.predict("trees", str(image)), classes.predict(Image.open(image)).result["classes"]
    assert list(seen.classes.values()) == [one["probability"] for one in expected]
    for name, one in zip(seen.classes, expected, strict=True):  # two classes have the same name
        assert name in (one["class"], f"crane ({one['index']})")
    assert (seen.drawn, seen.shown.size) == (None, (640, 400))
    assert seen.milliseconds > 0
    frame = np.argwhere((np.asarray(seen.shown) == MARK).all(axis=2))
    # 64 of 80 resized rows are seen, and as many columns of 128.
    assert frame.min(axis=0) == pytest.approx([40, 160], abs=5) and frame.max(axis=0) == pytest.approx([360, 480], abs=5)


def test_no_frame_where_all_is_seen(run, image):
    model = ClassificationPredictor(run, CPU)
    model.config |= {"crop_mode": "squash", "crop_pct": 1.0}
    from groupmixformer.tasks.classification.data import eval_transform

    model.transform = eval_transform(model.config)
    shown = Page({"trees": model}).predict("trees", str(image)).shown
    assert not (np.asarray(shown) == MARK).all(axis=2).any()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_point_attends_to_what_the_maps_say(classes, image, stage):
    page, point = Page({"trees": classes}), (0.6, 0.4)
    query = classes.view(Image.open(image)).to_input((40, 96))  # of 100 rows and 160 columns
    images, names = zip(*page.attend("trees", str(image), point, stage), strict=True)
    assert names == GROUPS
    tensor = classes.transform(Image.open(image))
    with torch.no_grad():
        strengths = by_group_size(attention_maps(classes.model, tensor[None], query, stage), (64, 64))[0]
    for shown, strength in zip(images, strengths, strict=True):
        pixels = np.asarray(shown)
        mark = np.argwhere((pixels == MARK).all(axis=2))
        assert (mark.min(axis=0) + mark.max(axis=0)) / 2 == pytest.approx([10 * q + 5 for q in query], abs=1)
        # Viridis becomes greener and redder with the strength, on grey of the image.
        away = [q for q in itertools.product(range(64), repeat=2) if max(abs(q[0] - query[0]), abs(q[1] - query[1])) > 4]
        strongest, weakest = (pick(away, key=lambda q: strength[q].item()) for pick in (max, min))
        spread = (pixels.max(axis=2).astype(int) - pixels.min(axis=2))[
            [10 * q[0] + 5 for q in (strongest, weakest)], [10 * q[1] + 5 for q in (strongest, weakest)]
        ]
        assert strength[strongest] > strength[weakest] and spread[0] > 40
    other = page.attend("trees", str(image), (0.4, 0.6), stage)
    assert any(a.tobytes() != b[0].tobytes() for a, b in zip(images, other, strict=True))


def test_what_has_no_maps_says_so(classes, segments, image):
    runs = {"trees": classes, "ground": SegmentationPredictor(segments, CPU, None, None)}
    page = Page(runs)
    with pytest.raises(ValueError, match="does not see this point: it looks at what is inside the orange frame"):
        page.attend("trees", str(image), (0.02, 0.5), 1)
    with pytest.raises(ValueError, match="ground holds a Segmenter: attention is shown for classifiers with"):
        page.attend("ground", str(image), (0.5, 0.5), 1)
    other = ClassificationPredictor.__new__(ClassificationPredictor)
    other.model, other.class_names = timm.create_model("test_resnet"), NAMES
    with pytest.raises(ValueError, match="other holds a ResNet: attention is shown"):
        Page({"other": other}).attend("other", str(image), (0.5, 0.5), 1)
    seen = page.predict("ground", str(image))
    assert seen.classes is None and seen.drawn.height == 480 and "%" in seen.text
    broken = image.parent / "broken.png"
    broken.write_bytes(image.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"^broken\.png: not a readable image: "):
        page.predict("trees", str(broken))


def test_the_command_says_what_is_wrong(capsys):
    assert main(["demo", "nothing-here", "--port", "0"]) == 1
    assert "nothing-here" in capsys.readouterr().err
    assert main(["demo"]) == 2


WATCH = """
import os, sys

def note(event, args):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        address = args[0] if event == "socket.getaddrinfo" else args[1]
        host = address[0] if isinstance(address, tuple) else address
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {host}\\n")

sys.addaudithook(note)
"""


@pytest.fixture
def started(run, segments, tmp_path):
    """A `gmf demo` of two runs in a process of its own that notes whom it speaks to: its address and the file of notes."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    notes, temporary = tmp_path / "notes", str(tmp_path / "gradio")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "WATCHED": str(notes),
        "GRADIO_TEMP_DIR": temporary,
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "groupmixformer.cli.main", "demo", str(run), str(segments), "--port", "0"]
    log = tmp_path / "log"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background ignore it
    with (
        log.open("w") as file,
        subprocess.Popen(command, stderr=file, stdout=file, env=environment, preexec_fn=heard) as process,
    ):
        try:
            while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert process.poll() is None, log.read_text()
            yield address[0], notes
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert re.fullmatch(r"gmf demo: open \S+ in a browser; Ctrl-C ends it\ngmf: interrupted\n", log.read_text())
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser(started, run, segments, image, tmp_path):
    address, notes = started
    broken, large = tmp_path / "<b>broken.png", tmp_path / "large.png"
    broken.write_bytes(b"nothing")
    large.write_bytes(bytes(21_000_000))
    with open_tab(address, tmp_path) as tab:
        field = "#file input[type=file]"
        tab.until(f"document.querySelector('{field}') !== null")
        tab.upload(field, image)
        tab.until("document.querySelector('#shown img')?.naturalWidth == 640")
        tab.until("/ash|birch|crane/.test(document.querySelector('#classes').innerText)")
        assert re.search(r"\d+ ms", tab.run("document.querySelector('#said').innerText"))

        tab.click("#shown img")
        tab.until("[...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth == 640).length == 4")
        captions = tab.run("document.querySelector('#maps').innerText")
        assert all(name in captions for name in GROUPS)
        before = tab.run("document.querySelector('#maps img').src")
        tab.click("#stage label:nth-of-type(1) input")
        tab.until(f"document.querySelector('#maps img')?.naturalWidth && document.querySelector('#maps img').src != '{before}'")
        tab.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert shot.width > 1100 and len(shot.convert("RGB").getcolors(2**24)) > 1000
        tab.click("#shown img", across=0.05)
        tab.until("document.body.innerText.includes('does not see this point')")

        tab.click("#run input")
        tab.until("document.querySelectorAll('[role=option]').length == 2")
        tab.click("[role=option]:nth-of-type(2)")
        tab.until("document.querySelector('#drawn img')?.naturalHeight == 480")
        tab.until("/crane \\d/.test(document.querySelector('#said').innerText)")
        tab.click("#shown img")
        tab.until("document.body.innerText.includes('holds a Segmenter')")

        tab.click("#file button[aria-label='Clear']")
        tab.until(f"document.querySelector('{field}') !== null")
        tab.upload(field, broken)
        tab.until("document.body.innerText.includes('broken.png: not a readable image: no known format')")
        tab.click("#samples img")  # the run's example
        tab.until("/red\\s*.png/.test(document.querySelector('#file').innerText)")
        tab.until("document.querySelector('#shown img')?.naturalHeight == 640")  # of the uploads none is square
        tab.click("#file button[aria-label='Clear']")
        tab.until(f"document.querySelector('{field}') !== null")
        tab.upload(field, large)
        tab.until("document.body.innerText.includes('maximum allowed size')")

        assert "Traceback" not in tab.text()
        assert tab.said == []
        outside = [url for url in tab.requested if not url.startswith((f"{address}/", "data:", "blob:"))]
        assert outside == [] and len(tab.requested) > 20
    spoken = set(notes.read_text().splitlines())
    assert "socket.bind 127.0.0.1" in spoken
    assert {line.split()[1] for line in spoken} <= {"127.0.0.1", "localhost", "::1", "None"}, spoken


# What of these elements reaches out of the window, out of what clips it, or is wider than its place.
CLIPPED = """
selectors => [...document.querySelectorAll(selectors)].filter(element => {
    const box = element.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const out = (left, right) => box.left < left - 1 || box.right > right + 1;
    let clipped = box.width < 1 || box.height < 1 || out(0, wide) || element.scrollWidth > element.clientWidth + 1;
    for (let around = element.parentElement; around; around = around.parentElement) {
        const {left, right, top, bottom} = around.getBoundingClientRect();
        const cuts = around !== document.documentElement && getComputedStyle(around).overflow !== "visible";
        clipped ||= cuts && (out(left, right) || box.top < top - 1 || box.bottom > bottom + 1);
    }
    return clipped;
}).map(element => element.outerHTML.slice(0, 100))
"""
# The lowest contrast of texts with what is behind them, as WCAG 2 defines it.
CONTRAST = """
selectors => Math.min(...[...document.querySelectorAll(selectors)].map(element => {
    const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    let behind = element;
    while (/, 0\\)|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const lights = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
}))
"""
# The colour of an image at shares of its width and height.
PIXEL = """
(selector, across, down) => {
    const image = document.querySelector(selector), canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    return [...pen.getImageData(across * canvas.width, down * canvas.height, 1, 1).data].slice(0, 3);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_page_fits_every_screen_in_the_light_and_in_the_dark(started, tmp_path):
    address, _ = started
    with open_tab("about:blank", tmp_path) as tab:
        for width, height, scheme, rows in ((360, 780, "light", 2), (1280, 800, "dark", 1), (1920, 1080, "light", 1)):
            tab.size(width, height, scheme)
            tab.call("Page.navigate", url=address)
            tab.until("document.querySelector('#samples img')?.naturalWidth == 90")
            assert tab.run("document.querySelectorAll('#samples img').length") == 1
            assert tab.run("document.querySelector('#samples img').getBoundingClientRect().width") in range(48, 97)
            tab.click("#samples img")
            tab.until("document.querySelector('#shown img')?.naturalWidth == 640")
            tab.until("/ms/.test(document.querySelector('#said').innerText)")
            pixel = f"({PIXEL})('#shown img', 0.4, 0.6)"
            tab.until(f"{pixel}[0] > 245 && {pixel}[1] < 10")
            tab.click("#shown img", 0.4, 0.6)
            tab.until("[...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth == 640).length == 4")
            tab.until(f"Math.abs({pixel}[1] - {MARK[1]}) < 20")
            tab.screenshot(tmp_path / f"{width}.png")

            things = "#about, #samples img, #shown img, #classes, #stage label, #maps figure, #maps img, #maps figcaption"
            assert tab.run(f"({CLIPPED})({json.dumps(things)})") == []
            assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            left, right = tab.run(
                "(({left, right}) => [left, document.documentElement.clientWidth - right])"
                "(document.querySelector('main').getBoundingClientRect())"
            )
            assert left == pytest.approx(right, abs=2)
            places = tab.run("[...document.querySelectorAll('#maps figure')].map(f => f.getBoundingClientRect().top)")
            assert len(set(places)) == rows
            names = tab.run("[...document.querySelectorAll('#maps figcaption')].map(one => one.innerText)")
            assert tuple(names) == GROUPS
            texts = "#about h1, #about p, #said p, #stage label span, #maps figcaption, #classes dt, #shown label"
            assert tab.run(f"({CONTRAST})({json.dumps(texts)})") >= 4.5
            behind = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (int(re.findall(r"\d+", behind)[0]) < 60) == (scheme == "dark")


META = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def hostile(image, tmp_path):
    """Paths of files that were not uploaded: a function of the folder of uploads that puts a link there."""
    other = tmp_path / "other.png"
    other.write_bytes(image.read_bytes())

    def paths(folder):
        link, circle = folder / "link.png", folder / "circle.png"
        link.symlink_to(other)
        circle.symlink_to(circle)
        up = "../" * 20
        made_up = [
            f"{folder}/../{other.parent.name}/x.png",
            f"{folder}/{up}{other}",
            str(link),
            str(circle),
            f"{folder}x/a.png",
        ]
        strange = [
            "\0",
            "a" * 5000,
            7,
            None,
            [str(other)],
            {"path": str(other)},
            "https://example.com/a.png",
            f"file://{other}",
        ]
        return [str(other), os.path.relpath(other), "pyproject.toml", f"{up}etc/hostname", *made_up, *strange]

    return paths


def test_the_page_opens_no_file_outside_its_folder(classes, image, tmp_path, hostile):
    folder = tmp_path / "uploads"
    folder.mkdir()
    page = Page({"trees": classes}, folder)
    for path in hostile(folder):
        if isinstance(path, str):
            with pytest.raises(ValueError, match=r"(?s)^[^/]*: not uploaded$"):
                page.predict("trees", path)
            with pytest.raises(ValueError, match="not uploaded"):
                page.attend("trees", path, (0.5, 0.5), 1)
    (folder / "deep").mkdir()
    own = folder / "deep" / "own.png"
    own.write_bytes(image.read_bytes())
    (folder / "alias.png").symlink_to(own)
    for path in (own, folder / "deep" / ".." / "alias.png"):
        assert page.predict("trees", str(path)).classes == Page({"trees": classes}).predict("trees", str(image)).classes


def test_requests_name_uploaded_files_only(tmp_path, hostile):
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    folder, passed = tmp_path / "uploads", []
    folder.mkdir()

    async def gradio(scope, receive, send):
        passed.append(await demo.Request(scope, receive).body())
        await PlainTextResponse("taken")(scope, receive, send)

    client, join = TestClient(demo._Gate(gradio, folder)), "/gradio_api/queue/join"
    for path in hostile(folder):
        for asked in ({"data": [[{"deep": {"path": path}}]]}, {"data": {"path": path, **META}}, {"event_data": {"path": path}}):
            urls = [join, f"{join}/", "/gradio_api/run/predict", "/gradio_api/run/see/"]
            assert [client.post(url, json=asked).status_code for url in urls] == [403] * 4, asked
    del passed[:]

    def twice(first, second):
        return f'{{"path": {json.dumps(first)}, "path": {json.dumps(second)}}}'

    assert client.post(join, content=twice(f"{folder}/a", "/etc/hostname")).status_code == 403
    for wrong in (b"", b"{", b"\xff", b"[" * 100_000, b'{"path": 1e999999'):
        assert client.post(join, content=wrong).status_code == 400
    assert passed == []
    good = {"data": ["trees", {"path": f"{folder}/a/b.png", "url": "http://x/y", **META}], "fn_index": 0}
    assert client.post(join, json=good).text == "taken" and json.loads(passed.pop()) == good
    assert client.post(join, content=twice("/etc/hostname", f"{folder}/a")).text == "taken"
    assert json.loads(passed.pop()) == {"path": f"{folder}/a"}

    for endpoint in (
        "api/see",
        "run",
        "call/see",
        "call/v2/see",
        "process_recording",
        "vibe-edit",
        "stream/1",
    ):
        assert client.post(f"/gradio_api/{endpoint}", json=good).status_code == 404
    assert client.post("/login").status_code == client.put("/").status_code == client.delete("/").status_code == 404
    for url in ("file=http://127.0.0.1:1/a.png", "file=https://example.com", "proxy=http://127.0.0.1:1/", "file=file:///etc"):
        assert client.get(f"/gradio_api/{url}").status_code == 404
    assert passed == []
    assert client.get("/gradio_api/file=/tmp/a").text == client.post("/gradio_api/upload", content=bytes(20_000_000)).text
    assert client.post(join, content=bytes(22_000_000)).status_code == 413


@pytest.mark.slow
def test_an_upload_of_any_size_is_not_taken(classes):
    from fastapi.testclient import TestClient

    with TestClient(application(Page({"trees": classes}))) as client:
        many = [("files", (f"{i}.png", bytes(1_000_000))) for i in range(22)]
        assert client.post("/gradio_api/upload", files=many).status_code == 413
        assert len(client.post("/gradio_api/upload", files=many[:3]).json()) == 3
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert len(list(folder.rglob("*.png"))) == 3
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


FILES = {"file", "image", "gallery", "imageeditor", "uploadbutton", "video", "audio", "multimodaltextbox", "chatbot", "html"}


def ask(client, number, data, event=None):
    """Ask gradio for a function of the page by its number: what it answers, or why the request was refused."""
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None, "event_data": event}
    answer = client.post("/gradio_api/queue/join", json=body)
    if answer.status_code != 200:
        return None, answer
    stream = client.get("/gradio_api/queue/data", params={"session_hash": session})
    messages = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    return next(message for message in messages if message["msg"] == "process_completed"), stream


@pytest.mark.slow
@pytest.mark.parametrize("gate", [True, False], ids=["behind the gate", "gradio alone"])
def test_only_uploads_and_examples_are_drawn(classes, image, hostile, tmp_path, monkeypatch, gate):
    """The leak of a mounted application, end to end: every function, every input, every kind of path."""
    from fastapi.testclient import TestClient

    if not gate:

        async def open_gate(self, scope, receive):
            return receive

        monkeypatch.setattr(demo._Gate, "_check", open_gate)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.2)
    local = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "first.png").write_bytes(image.read_bytes())
    (examples / "secret.png").write_bytes(image.read_bytes())
    app = application(Page({"trees": classes}), [str(examples / "first.png")])
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    with TestClient(app) as client:
        config = client.get("/config").json()
        kinds = {one["id"]: one["type"] for one in config["components"]}
        inputs = {one["id"]: [kinds[i] for i in one["inputs"]] for one in config["dependencies"]}
        assert {kind for each in inputs.values() for kind in each} & FILES == {"file"}  # others are not tested below
        usual = {"dropdown": "trees", "radio": 2, "state": None, "dataset": 0}
        event = {"index": [3, 3], "value": None}

        def drawn(message):
            return [client.get(url).status_code for url in re.findall(r"/gradio_api/file=[^\"']+", json.dumps(message))]

        paths = [*hostile(folder), str(examples / "secret.png"), local]
        bad = [{"path": path, **META} for path in paths]
        bad += [{"path": paths[0]}, {"path": paths[0], "url": local, **META}, {"path": paths[0], "is_stream": True, **META}]
        for number, each in inputs.items():
            for place in range(len(each)):
                for value in bad:
                    data = [value if i == place else usual.get(kind) for i, kind in enumerate(each)]
                    message, answer = ask(client, number, data, event)
                    name = {one["id"]: one["api_name"] for one in config["dependencies"]}[number]
                    run = client.post(f"/gradio_api/run/{name}", json={"data": data, "fn_index": number, "event_data": event})
                    assert run.status_code == 403 if gate else drawn(run.text) == []
                    if gate:
                        assert answer.status_code == 403, (number, place, value)
                    elif each[place] == "file":
                        assert not message["success"], (number, place, value)
                    else:
                        assert drawn(message) == []  # what is not a file's input takes no file
        assert sorted(path.name for path in folder.rglob("*.png") if not path.is_symlink()) == ["first.png"]  # none was copied

        uploaded = client.post("/gradio_api/upload", files={"files": ("mine.png", image.read_bytes())}).json()[0]
        see = next(number for number, each in inputs.items() if each == ["dropdown", "file"])
        load = next(number for number, each in inputs.items() if each == ["dataset"])
        example = ask(client, load, [0])[0]["output"]["data"][0]
        for beyond in (1, -2, True, "0", {"path": paths[0]}):  # there is one
            message, _ = ask(client, load, [beyond])
            assert message is None or not message["success"] or message["output"]["data"][0]["path"] == example["path"]
        assert Path(example["path"]).read_bytes() == image.read_bytes()
        for path in (uploaded, example["path"]):
            message, _ = ask(client, see, ["trees", {"path": path, "url": local, **META}])
            assert message["success"] and message["output"]["data"][2]["value"]["label"] in [*NAMES, "crane (2)", "crane (3)"]
            assert drawn(message) == [200]
        assert client.get(f"/gradio_api/file={examples / 'secret.png'}").status_code == 403
        assert client.get(f"/gradio_api/file={folder / 'link.png'}").status_code == 403
    with pytest.raises(TimeoutError):
        listening.accept()  # no URL was loaded
    listening.close()


@pytest.mark.slow
def test_the_command_draws_only_what_was_uploaded(started, run, image, tmp_path):
    address, _ = started
    secret = tmp_path / "secret.png"
    secret.write_bytes(image.read_bytes())
    with httpx.Client(base_url=address, timeout=60) as client:
        functions = client.get("/config").json()["dependencies"]
        see = next(one["id"] for one in functions if one["api_name"] == "see")
        message, answer = ask(client, see, [str(run), {"path": str(secret), **META}])
        assert (message, answer.status_code) == (None, 403)
        assert client.get("/gradio_api/file=http://127.0.0.1:1/a.png").status_code == 404
        uploaded = client.post("/gradio_api/upload", files={"files": ("mine.png", image.read_bytes())}).json()[0]
        message, _ = ask(client, see, [str(run), {"path": uploaded, **META}])
        assert message["success"] and client.get(message["output"]["data"][1]["value"]["url"]).status_code == 200
        answer = client.get("/", headers={"Host": "evil.example"})  # as after DNS rebinding
        assert answer.status_code == 400 and "evil.example" in answer.json()["error"]


@pytest.mark.slow
def test_runs_of_the_same_data_show_each_example_once(classes, tmp_path):
    from fastapi.testclient import TestClient

    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
    app = application(Page({"trees": classes}), [str(tmp_path / f"{name}.png") for name in "abc"])
    with TestClient(app) as client:
        parts = client.get("/config").json()["components"]
    (samples,) = [part["props"]["samples"] for part in parts if part["type"] == "dataset"]
    assert len(samples) == 2


@pytest.mark.slow
def test_nothing_but_the_page_is_served(classes):
    from fastapi.testclient import TestClient

    with TestClient(application(Page({"trees": classes}))) as client:
        assert client.get("/").status_code == 200
        assert "fonts.googleapis" not in client.get("/").text and "cdnjs" not in client.get("/").text
        assert client.get("/docs").status_code == 404
        assert client.get("/gradio_api/file=/etc/hostname").status_code == 403
        assert client.get("/gradio_api/runs").status_code == 404
        info = client.get("/gradio_api/info").json()
        assert info["named_endpoints"] == {}
