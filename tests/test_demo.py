"""The page: the point that was clicked is the one that is asked about, and a browser sees all of it without the network."""

import dataclasses
import functools
import itertools
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from chromium import CHROMIUM, open_tab
from PIL import Image

from groupmixformer import GroupMixFormer, attention_maps
from groupmixformer.cli.main import main
from groupmixformer.deploy.demo import Page, application
from groupmixformer.models.attention_maps import by_group_size
from groupmixformer.models.checkpoint import save_checkpoint, save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.classification.predict import Classes
from groupmixformer.tasks.predictor import Segments
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
    return folder


@pytest.fixture(scope="module")
def segments(tmp_path_factory, randomise):
    """The folder of a segmenter."""
    from groupmixformer.tasks.segmentation.training import Segmenter

    folder, backbone = tmp_path_factory.mktemp("runs") / "ground", Backbone("groupmixformer_mobile", TINY)
    settings = {"num_classes": 3, "decoder": "fpn", "image_size": 64, "channels": 128}
    network = {"backbone": dataclasses.asdict(backbone), **settings}
    config = {"class_names": NAMES[:3], "class_ids": [0, 1, 2], "colors": [[0, 90, 0], [200, 0, 0], [0, 0, 200]]}
    save_network(randomise(Segmenter(backbone, **settings)), folder, {"task": "segmentation", **config, "network": network})
    return folder


@pytest.fixture(scope="module")
def classes(run):
    return Classes(run, CPU)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The file of a wide image."""
    blocks = np.random.default_rng(3).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(blocks).resize((160, 100), Image.Resampling.NEAREST).save(file)
    return file


def test_the_page_shows_what_the_model_says(classes, image):
    page = Page({"trees": (classes, "classification")})
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
    model = Classes(run, CPU)
    model.config |= {"crop_mode": "squash", "crop_pct": 1.0}
    from groupmixformer.tasks.classification.data import eval_transform

    model.transform = eval_transform(model.config)
    shown = Page({"trees": (model, "classification")}).predict("trees", str(image)).shown
    assert not (np.asarray(shown) == MARK).all(axis=2).any()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_point_attends_to_what_the_maps_say(classes, image, stage):
    page, point = Page({"trees": (classes, "classification")}), (0.6, 0.4)
    query = classes.view(Image.open(image)).seen((40, 96))  # of 100 rows and 160 columns
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
    runs = {"trees": (classes, "classification"), "ground": (Segments(segments, CPU, None, None), "segmentation")}
    page = Page(runs)
    with pytest.raises(ValueError, match="does not see this point: it looks at what is inside the orange frame"):
        page.attend("trees", str(image), (0.02, 0.5), 1)
    with pytest.raises(ValueError, match="ground holds a model for segmentation: attention is shown for classifiers with"):
        page.attend("ground", str(image), (0.5, 0.5), 1)
    other = Classes.__new__(Classes)
    other.model, other.class_names = timm.create_model("test_resnet"), NAMES
    with pytest.raises(ValueError, match="other holds ResNet: attention is shown"):
        Page({"other": (other, "classification")}).attend("other", str(image), (0.5, 0.5), 1)
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
        tab.until("document.body.innerText.includes('holds a model for segmentation')")

        tab.click("#file button[aria-label='Clear']")
        tab.until(f"document.querySelector('{field}') !== null")
        tab.upload(field, broken)
        tab.until("document.body.innerText.includes('broken.png: not a readable image: no known format')")
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


@pytest.mark.slow
def test_nothing_but_the_page_is_served(classes):
    from fastapi.testclient import TestClient

    with TestClient(application(Page({"trees": (classes, "classification")}))) as client:
        assert client.get("/").status_code == 200
        assert "fonts.googleapis" not in client.get("/").text and "cdnjs" not in client.get("/").text
        assert client.get("/docs").status_code == 404
        assert client.get("/gradio_api/file=/etc/hostname").status_code == 403
        assert client.get("/gradio_api/runs").status_code == 404
        info = client.get("/gradio_api/info").json()
        assert info["named_endpoints"] == {}
