"""The service: right answers to many at once, limits that hold, and a server that outlives what is sent to it."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.data.images import decode
from groupmixformer.deploy import serve
from groupmixformer.deploy.routes import application
from groupmixformer.deploy.serve import Limits, Service, served
from groupmixformer.deploy.server import listen, server
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.classification.predict import ClassificationPredictor
from groupmixformer.tasks.detection.predict import DetectionPredictor
from groupmixformer.tasks.segmentation.predict import SegmentationPredictor

TINY = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
NAMES = ["ash", "birch", "cedar", "date", "elm", "fir", "gorse", "holly"]
CPU = torch.device("cpu")
PNG = {"Content-Type": "image/png"}


def image(seed, size=(48, 40), form="PNG"):
    """The content of a file with coloured blocks, another for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory, randomise):
    """The folder of a classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    save_checkpoint(randomise(GroupMixFormer(num_classes=8, **TINY)), folder, NAMES, {"input_size": (3, 32, 32)})
    return folder


@pytest.fixture(scope="module")
def classes(run):
    return ClassificationPredictor(run, CPU)


@contextlib.contextmanager
def serving(model, task="classification", limits=None):
    """A server in a thread: its address."""
    made = model if isinstance(model, Service) else Service([served(model, "tested", task)], limits or Limits())
    for one in made.models.values():
        one.warm_up()
    listening, address = listen("127.0.0.1", 0)
    running = server(application(made), listening)
    thread = threading.Thread(target=running.run, args=([listening],))
    thread.start()
    try:
        yield address
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(classes):
    with serving(classes) as found:
        yield found


def held(classes, limits):
    """A service whose model waits until it is let go."""
    usual, gate = served(classes, "tested", "classification"), threading.Event()
    gate.set()

    def look(images):
        assert gate.wait(20)
        return usual.look(images)

    return Service([dataclasses.replace(usual, look=look)], limits), gate


def refused(answer):
    """What an error says; it has the id that the header has, and nothing else."""
    found = answer.json()
    assert set(found) == {"error", "request_id"} and found["request_id"] == answer.headers["x-request-id"]
    return found["error"]


def metric(address, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{address}/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(answer, expected):
    assert [c["class"] for c in answer["classes"]] == [c["class"] for c in expected["classes"]]
    probabilities = [[c["probability"] for c in one["classes"]] for one in (answer, expected)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_an_answer_is_what_the_model_says(address, classes, form):
    content = image(1, form=form)
    expected = classes.predict(decode(content, "")).result
    answers = [
        httpx.post(f"{address}/predict", content=content, headers={"Content-Type": f"image/{form.lower()}"}),
        httpx.post(f"{address}/predict", content=content, headers={"Content-Type": "application/octet-stream"}),
        httpx.post(f"{address}/predict", files={"file": ("a b.png", content)}),
        httpx.post(f"{address}/predict", content=iter([content[:100], content[100:]]), headers=PNG),  # of unknown length
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = answer.json()
        same(found, expected)
        assert (found["model"], found["task"]) == ("tested", "classification")
        assert 0 < found["milliseconds"] < 20_000


def test_everybody_gets_the_answer_to_their_own_image(classes):
    contents = [image(seed) for seed in range(48)]
    expected = [classes.predict(decode(content, "")).result for content in contents]
    assert len({tuple(c["probability"] for c in one["classes"]) for one in expected}) == 48
    made, gate = held(classes, Limits(batch=6))
    with serving(made) as address, ThreadPoolExecutor(16) as clients, httpx.Client() as client:
        gate.clear()
        answers = [clients.submit(client.post, f"{address}/predict", content=content, headers=PNG) for content in contents]
        until(lambda: metric(address, "gmf_queue_length") == 16)
        gate.set()
        for answer, truth in zip(answers, expected, strict=True):
            same(answer.result().json(), truth)
        images, batches = metric(address, "gmf_batch_images_sum"), metric(address, "gmf_batch_images_count")
        assert images == 48
        assert 48 / 6 <= batches <= 24
        assert metric(address, 'gmf_batch_images_bucket{le="8"}') == batches  # none is over the limit of 6
        assert metric(address, 'gmf_requests_total{status="200"}') == metric(address, "gmf_request_seconds_count") == 48


def test_one_client_does_not_wait_for_others(address, monkeypatch):
    monkeypatch.setattr(serve, "GATHER_SECONDS", 10.0)
    with httpx.Client() as client:
        for seed in range(3):
            assert client.post(f"{address}/predict", content=image(seed), headers=PNG).json()["milliseconds"] < 5000


def test_a_full_queue_turns_away(classes):
    made, gate = held(classes, Limits(queue=3))
    with serving(made) as address, ThreadPoolExecutor(3) as clients:
        gate.clear()
        waiting = [clients.submit(httpx.post, f"{address}/predict", content=image(i), headers=PNG) for i in range(3)]
        until(lambda: metric(address, "gmf_queue_length") == 3)
        answer = httpx.post(f"{address}/predict", content=image(3), headers=PNG)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert refused(answer) == "3 images are waiting already: try again later"
        gate.set()
        assert [one.result().status_code for one in waiting] == [200] * 3
        assert httpx.post(f"{address}/predict", content=image(3), headers=PNG).status_code == 200
        assert metric(address, 'gmf_requests_total{status="503"}') == 1
        assert metric(address, "gmf_queue_length") == 0


def test_one_client_leaves_room_for_others(classes):
    made, gate = held(classes, Limits(queue=4, per_client=2))
    other = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"))
    with serving(made) as address, ThreadPoolExecutor(3) as clients:
        gate.clear()
        waiting = [clients.submit(httpx.post, f"{address}/predict", content=image(i), headers=PNG) for i in range(2)]
        until(lambda: metric(address, "gmf_queue_length") == 2)
        answer = httpx.post(f"{address}/predict", content=image(3), headers=PNG)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert refused(answer) == "2 images of 127.0.0.1 are waiting already: try again later"
        waiting.append(clients.submit(other.post, f"{address}/predict", content=image(3), headers=PNG))
        until(lambda: metric(address, "gmf_queue_length") == 3)
        gate.set()
        assert [one.result().status_code for one in waiting] == [200] * 3
        assert httpx.post(f"{address}/predict", content=image(3), headers=PNG).status_code == 200
        assert made._clients == {}


def test_stopping_answers_what_was_taken_in(classes):
    made, gate = held(classes, Limits())
    with ThreadPoolExecutor(4) as clients:
        with serving(made) as address:
            gate.clear()
            waiting = [clients.submit(httpx.post, f"{address}/predict", content=image(i), headers=PNG) for i in range(4)]
            until(lambda: metric(address, "gmf_queue_length") == 4)
            threading.Timer(0.5, gate.set).start()
        assert [one.result().status_code for one in waiting] == [200] * 4
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_a_large_body_is_refused_before_it_is_read(classes):
    with serving(classes, limits=Limits(megabytes=1)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:  # announced, and not sent
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99000000\r\n\r\n"
            )
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 413")
        parts = (bytes(100_000) for _ in range(11))  # not announced
        answer = httpx.post(f"{address}/predict", content=parts, headers=PNG)
        assert (answer.status_code, refused(answer)) == (413, "the request is over 1 MB")
        for _ in range(3):  # whoever sends all before reading gets the answer too: no reset takes it away
            sender = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
            sender.request("POST", "/predict", bytes(30_000_000), PNG)
            assert sender.getresponse().status == 413
        assert httpx.post(f"{address}/predict", content=image(0), headers=PNG).status_code == 200


def test_a_slow_client_does_not_hold_its_place(classes, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with serving(classes, limits=Limits(queue=1)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 900\r\n\r\nabc"
            )
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=20) as client:  # goes away in the middle
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 900\r\n\r\nabc"
            )
        until(lambda: metric(address, "gmf_queue_length") == 0)
        assert httpx.post(f"{address}/predict", content=image(0), headers=PNG).status_code == 200


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "image: not a readable image: no known format"),
        (b"<svg></svg>", "image: not a readable image: no known format"),
        (image(0, (400, 300))[:500], "image: not a readable image: "),
        (
            image(0, (500, 1)),
            "image: not a readable image: 500 x 1 pixels, expected at most 64 million and no side over 50 ",
        ),
        (image(0, (9000, 7200), "GIF"), "image: not a readable image: 9000 x 7200 pixels, expected at most 64 million"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image: not a readable image: no known format"),
    ],
    ids=["empty", "text", "truncated", "ribbon", "huge", "postscript"],
)
def test_a_broken_image_is_refused_in_a_line(address, content, line):
    for answer in (
        httpx.post(f"{address}/predict", content=content, headers=PNG),
        httpx.post(f"{address}/predict", files={"file": ("a.png", content)}),
    ):
        assert answer.status_code == 400
        assert refused(answer).startswith(line)
        assert "\n" not in refused(answer)
    assert httpx.get(f"{address}/health").json()["ready"]
    assert httpx.post(f"{address}/predict", content=image(0), headers=PNG).status_code == 200


def test_wrong_requests_are_told_what_is_expected(address):
    answer = httpx.post(f"{address}/predict", data={"url": "x"})
    assert answer.status_code == 415
    assert "got Content-Type application/x-www-form-urlencoded, expected an image as the body" in answer.json()["error"]
    assert httpx.post(f"{address}/predict", content=b"").status_code == 415
    answer = httpx.post(f"{address}/predict", files={"file": (None, "text")})
    assert (answer.status_code, answer.json()["error"][:25]) == (400, "got a form without a file")
    answer = httpx.post(f"{address}/predict", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert answer.status_code == 400 and answer.json()["error"]
    assert httpx.get(f"{address}/predict").status_code == 405


def test_the_server_outlives_a_model_that_fails(classes, caplog):
    usual = served(classes, "tested", "classification")
    broken = []

    def look(images):
        if broken:
            raise RuntimeError(broken.pop())
        return usual.look(images)

    with serving(Service([dataclasses.replace(usual, look=look)], Limits())) as address:
        broken.append("out of memory\nand more")
        answer = httpx.post(f"{address}/predict", content=image(0), headers=PNG)
        assert (answer.status_code, refused(answer)) == (500, "the model failed: RuntimeError")
        logged = f"request {answer.json()['request_id']}: the model failed: RuntimeError: out of memory"
        assert caplog.messages[-1] == logged
        assert httpx.post(f"{address}/predict", content=image(0), headers=PNG).status_code == 200


@pytest.fixture(scope="module")
def segments(tmp_path_factory, randomise):
    from groupmixformer.tasks.segmentation.model import Segmenter

    folder, backbone = tmp_path_factory.mktemp("segmenter"), Backbone("groupmixformer_mobile", TINY)
    settings = {"num_classes": 3, "decoder": "fpn", "image_size": 64, "channels": 128}
    network = {"backbone": dataclasses.asdict(backbone), **settings}
    config = {"task": "segmentation", "class_names": NAMES[:3], "class_ids": [0, 5, 2], "colors": [[9, 9, 9]] * 3}
    save_network(randomise(Segmenter(backbone, **settings)), folder, {**config, "network": network})
    return SegmentationPredictor(folder, CPU, None, None)


def detector(folder, architecture):
    from groupmixformer.tasks.detection.model import Detector

    backbone = Backbone("groupmixformer_mobile", TINY)
    settings = {"num_classes": 2, "architecture": architecture, "image_size": 64, "max_size": 96, "fpn_channels": 16}
    network = {"backbone": dataclasses.asdict(backbone), **settings}
    torch.manual_seed(0)
    config = {"task": "detection", "class_names": NAMES[:2], "category_ids": [1, 2], "network": network}
    save_network(Detector(backbone, **settings), folder, config)
    return DetectionPredictor(folder, CPU, score_threshold=0.2)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return detector(tmp_path_factory.mktemp("boxes"), "faster_rcnn")


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    return detector(tmp_path_factory.mktemp("masks"), "mask_rcnn")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("segments", "segmentation"), ("objects", "detection"), ("masks", "detection")])
def test_other_tasks_are_served_one_at_a_time(kind, task, request):
    model = request.getfixturevalue(kind)
    contents = [image(seed, (64, 70)) for seed in range(4)]
    with serving(model, task) as address, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda c: httpx.post(f"{address}/predict", content=c, headers=PNG), contents))
        for answer, content in zip(answers, contents, strict=True):
            found, given = model.predict(decode(content, "")), answer.json()
            assert next(iter(found.result.values())), "nothing was found, which tests nothing"
            if kind == "segments":
                mask = Image.open(io.BytesIO(base64.b64decode(given.pop("mask"))))
                assert np.array_equal(np.asarray(mask), np.asarray(Image.open(io.BytesIO(found.files["-mask.png"]))))
                assert {name: (np.asarray(mask) == number).mean() for name, number in given.pop("numbers").items()} == {
                    name: pytest.approx(share) for name, share in given["shares"].items()
                }
            if kind == "masks":
                given_masks = [thing.pop("mask") for thing in given["objects"]]
                assert given_masks == [one["segmentation"] for one in found.results if one["score"] >= 0.2]
            assert {key: value for key, value in given.items() if key in found.result} == found.result
            assert set(given) == {*found.result, "model", "task", "milliseconds"}
        assert metric(address, "gmf_batch_images_sum") == metric(address, "gmf_batch_images_count") == 4
        answer = httpx.post(f"{address}/predict", content=b"broken", headers=PNG)
        assert (answer.status_code, answer.json()["error"]) == (400, "image: not a readable image: no known format")


def test_large_images_are_refused_where_planes_of_their_size_are_filled(classes, segments, objects):
    assert classes.max_pixels == objects.max_pixels == segments.max_pixels == 64_000_000
    many = SegmentationPredictor.__new__(SegmentationPredictor)
    many.class_names = ["name"] * 150
    assert many.max_pixels == 6_666_666


def test_the_command_says_where_it_listens_and_what_is_wrong(run, capsys):
    taken, address = listen("127.0.0.1", 0)
    port = address.rpartition(":")[2]
    with taken:
        assert main(["serve", str(run), "--port", port]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"gmf: error: cannot listen on 127.0.0.1 port {port}: ") and line.count("\n") == 1
    assert main(["serve", str(run), "--host", "nowhere.invalid", "--port", "0"]) == 1
    assert main(["serve", str(run), "--sliding-window"]) == 2
    for origin in ("lab.example", "https://lab.example/", "https://lab.example/page"):  # none of which a browser sends
        assert main(["serve", "x", "--cors-origin", origin]) == 2
        assert f"got {origin}, expected scheme and name without a path" in capsys.readouterr().err
    assert main(["serve", "nothing-here", "--port", "0", "--cors-origin", "https://lab.example:8443", "*"]) == 1
    assert "nothing-here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_stopped(run, classes, stop):
    command = [sys.executable, "-m", "groupmixformer.cli.main", "serve", str(run), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background ignore it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heard) as process:
        try:
            line = process.stderr.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
            assert "(classification, fused)" in line
            content = image(5)
            answer = httpx.post(f"{address}/predict", content=content, headers=PNG)
            same(answer.json(), classes.predict(decode(content, "")).result)
            process.send_signal(signal.SIGHUP)
            assert re.match(f"gmf serve: {run.name}: loaded again, weights ", process.stderr.readline())
            process.send_signal(stop)
            assert process.wait(20) == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[stop]
            assert process.stderr.read() == ("gmf: interrupted\n" if stop == signal.SIGINT else "")
        finally:
            process.kill()


def test_an_answer_without_finite_numbers_is_json_that_any_parser_reads():
    made = serve.Model("tested", "none", bytes, lambda images: [{"score": float("nan")} for _ in images])
    with serving(Service([made], Limits())) as address:
        answer = httpx.post(f"{address}/predict", content=image(1), headers=PNG)
    assert answer.status_code == 200
    assert json.loads(answer.text, parse_constant=pytest.fail)["score"] is None
