"""The server with good, bad and slow clients at once: right answers, latency, memory, descriptors.

    python tests/reliability/test_server_soak.py --minutes 15 --out benchmarks/results/reliability-server-DATE.json

Good clients send images one after the other and compare each answer with the model's own. Bad ones send what is refused: each
kind has the statuses that it may get, and none may get another or no answer. Slow ones stop in the middle of a header or a
body, more of them than the server has room for. Each of the three has an address of its own (Linux has all of 127.*), as the
server limits the requests of one. The soak fails if a good client gets anything but its answer, /health is silent for 5 s,
memory or descriptors grow on, or the server writes more than a line a second of each kind.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from groupmixformer import GroupMixFormer
from groupmixformer.data.images import decode
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.tasks.classification.predict import ClassificationPredictor

TINY = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
FILES = 256  # that the server may open
GOOD, BAD, SLOW = 4, 3, 300  # clients
BAD_HOST, SLOW_HOST = "127.0.0.3", "127.0.0.2"
PNG = {"Content-Type": "image/png"}
START = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def content(seed, size=(160, 120)):
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def bomb():
    """A file of 6 kB with 64,000 x 64,000 pixels declared."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "GIF")
    return buffer.getvalue()


# What bad clients send, and the statuses that it may get.
WRONG = {
    "broken image": ({"content": content(0)[:300], "headers": PNG}, {400}),
    "no image": ({"content": bytes(1000), "headers": PNG}, {400}),
    "random bytes": ({"content": random.Random(0).randbytes(50_000), "headers": PNG}, {400}),
    "too many pixels": ({"content": bomb(), "headers": PNG}, {400}),
    "no form": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, {400}),
    "no type": ({"content": b"x"}, {415}),
    "too large": ({"content": bytes(3_000_000), "headers": PNG}, {413}),
    "another host": ({"content": content(1), "headers": {**PNG, "Host": "evil.example"}}, {400}),
}
RAW = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"HTTP/1.1 400"),
    "two lengths": (START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", b"HTTP/1.1 400"),
    "long header": (START + b"X: " + b"a" * 200_000 + b"\r\n\r\n", b"HTTP/1.1 400"),
    "goes away": (START + b"Content-Length: 900\r\n\r\nabc", None),
}


def by_class(classes):
    return [one["probability"] for one in sorted(classes, key=lambda one: one["index"])]


def memory(process):
    """Resident megabytes and open descriptors."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len([*Path(f"/proc/{process}/fd").iterdir()])


class Soak:
    """The clients, and what they count."""

    def __init__(self, address, expected):
        self.address, self.expected = address, expected
        self.port = int(address.rpartition(":")[2])
        self.end = threading.Event()
        self.seconds, self.health = [], []  # (when, how long)
        self.counts, self.failures = Counter(), []

    def fail(self, what):
        self.counts["failed"] += 1
        if len(self.failures) < 20:
            self.failures.append(what)

    def good(self, number):
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self.end.wait(0.02):
                number = (number + 1) % len(self.expected)
                start = time.monotonic()
                try:
                    answer = client.post("/predict", content=content(number), headers=PNG)
                except httpx.TransportError as error:
                    self.fail(f"good: {type(error).__name__}: {error}")
                    continue
                self.seconds.append((start, time.monotonic() - start))
                found = answer.json().get("classes") if answer.status_code == 200 else None
                right = found is not None and np.allclose(by_class(found), self.expected[number], atol=1e-3)
                self.counts["good"] += 1
                if not right:
                    self.fail(f"good: {answer.status_code} {answer.text[:200]}")

    def bad(self, number):
        pick, transport = random.Random(number), httpx.HTTPTransport(local_address=BAD_HOST)
        client, source = httpx.Client(transport=transport, timeout=60), {"timeout": 60, "source_address": (BAD_HOST, 0)}
        while not self.end.wait(0.05):
            name = pick.choice([*WRONG, *RAW])
            try:
                if name in WRONG:
                    request, allowed = WRONG[name]
                    answer = client.post(f"{self.address}/predict", **request)
                    right = answer.status_code in allowed and "\n" not in answer.json()["error"]
                else:
                    sent, expected = RAW[name]
                    with socket.create_connection(("127.0.0.1", self.port), **source) as opened:
                        with contextlib.suppress(ConnectionError):  # of a long header the rest is not read
                            opened.sendall(sent)
                        right = expected is None or opened.recv(12) == expected or name == "long header"
            except (OSError, httpx.TransportError, ValueError) as error:
                if name == "long header":
                    continue
                self.fail(f"{name}: {type(error).__name__}: {error}")
                continue
            self.counts[f"bad: {name}"] += 1
            if not right:
                self.fail(f"{name}: got {answer.status_code if name in WRONG else 'another answer'}")

    def slow(self):
        """Hold as many connections as there are slow clients; whoever is cut comes again."""
        pick, held = random.Random(0), []
        ways = (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", START + b"Content-Length: 100000\r\n\r\nabc")
        while not self.end.wait(0.5):
            for one in held[:]:
                one.setblocking(False)
                try:
                    if one.recv(65536):
                        one.send(b"a")  # a byte now and then
                        continue
                except BlockingIOError:
                    with contextlib.suppress(OSError):
                        one.send(b"a")
                    continue
                except OSError:
                    pass
                held.remove(one)
                one.close()
                self.counts["slow: cut"] += 1
            for _ in range(min(SLOW - len(held), 20)):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", self.port), 5, (SLOW_HOST, 0)))
                    # Bodies take a place in the queue for 30 s, so there are fewer of those.
                    held[-1].sendall(pick.choices(ways, (5, 20, 1))[0])
                    self.counts["slow: opened"] += 1
        for one in held:
            one.close()

    def look(self):
        while not self.end.wait(1):
            start = time.monotonic()
            try:
                assert httpx.get(f"{self.address}/health", timeout=5).json()["ready"]
            except (httpx.TransportError, AssertionError) as error:
                self.fail(f"health: {type(error).__name__}")
            self.health.append((start, time.monotonic() - start))


def percentiles(seconds):
    if not seconds:  # a third of a short soak on a busy machine
        return {}
    found = np.percentile([1000 * value for _, value in seconds], [50, 99, 100]).round(1).tolist()
    return dict(zip(("p50_ms", "p99_ms", "slowest_ms"), found, strict=True))


def soak(folder, minutes):
    """Start a server, let the clients at it, and return what was counted."""
    torch.manual_seed(0)
    network = GroupMixFormer(num_classes=8, **TINY)
    for weight in network.parameters():  # fresh ones are near zero, and all images would have one answer
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    save_checkpoint(network, folder / "run", list("abcdefgh"), {"input_size": (3, 64, 64)})
    model = ClassificationPredictor(folder / "run", torch.device("cpu"), top=8)
    expected = [by_class(model.predict(decode(content(seed), "")).result["classes"]) for seed in range(16)]
    assert min(np.abs(np.subtract(a, b)).max() for a, b in itertools.combinations(expected, 2)) > 5e-3
    options = ["--port", "0", "--max-megabytes", "2", "--top", "8"]
    command = [sys.executable, "-m", "groupmixformer.cli.main", "serve", str(folder / "run"), *options]
    environment, log = {**os.environ, "OMP_NUM_THREADS": "1"}, folder / "log"

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

    with (
        log.open("w") as file,
        subprocess.Popen(command, stderr=file, stdout=file, env=environment, preexec_fn=limit) as process,
    ):
        try:
            while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            soaking = Soak(address[0], expected)
            work = [(soaking.good, (i,)) for i in range(GOOD)] + [(soaking.bad, (i,)) for i in range(BAD)]
            threads = [threading.Thread(target=f, args=a) for f, a in [*work, (soaking.slow, ()), (soaking.look, ())]]
            for thread in threads:
                thread.start()
            start, samples = time.monotonic(), []
            while time.monotonic() < start + 60 * minutes:
                time.sleep(1)
                samples.append(memory(process.pid))
            soaking.end.set()
            for thread in threads:
                thread.join(120)
            seconds = time.monotonic() - start
            time.sleep(12)  # what is still open has had its time
            after = memory(process.pid)
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
    third = len(samples) // 3
    megabytes = [np.mean([one[0] for one in part]) for part in (samples[third : 2 * third], samples[2 * third :])]
    lines = log.read_text().splitlines()
    for name, wrong in {
        f"memory grew from {megabytes[0]:.0f} to {megabytes[1]:.0f} MB": megabytes[1] > 1.1 * megabytes[0],
        f"{max(one[1] for one in samples)} descriptors of {FILES}": max(one[1] for one in samples) >= FILES,
        f"{after[1]} descriptors afterwards": after[1] > samples[0][1] + 5 and after[1] > 60,
        f"{len(lines)} lines of log in {seconds:.0f} s, such as {lines[-1]}": len(lines) > 2 * seconds + 5,
        "too few good answers": soaking.counts["good"] < 60 * minutes,
    }.items():
        if wrong:
            soaking.fail(name)
    return {
        "minutes": minutes,
        "counts": dict(sorted(soaking.counts.items())),
        "failures": soaking.failures,
        "good": percentiles(soaking.seconds),
        "good_first_third": percentiles([one for one in soaking.seconds if one[0] < start + 20 * minutes]),
        "good_last_third": percentiles([one for one in soaking.seconds if one[0] > start + 40 * minutes]),
        "health": percentiles(soaking.health),
        "megabytes": {
            "first": round(samples[0][0], 1),
            "middle_third": round(megabytes[0], 1),
            "last_third": round(megabytes[1], 1),
            "most": round(max(one[0] for one in samples), 1),
            "afterwards": round(after[0], 1),
        },
        "descriptors": {"limit": FILES, "most": max(one[1] for one in samples), "afterwards": after[1]},
        "lines_of_log": len(lines),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads memory and descriptors from /proc")
def test_good_clients_are_served_among_bad_and_slow_ones(tmp_path):
    result = soak(tmp_path, 0.5)
    assert result["failures"] == [], result
    assert {name for name in result["counts"] if name.startswith("bad")} == {f"bad: {name}" for name in {**WRONG, **RAW}}
    assert result["counts"]["slow: cut"] > SLOW / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), args.minutes)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load average {before:.2f} before"
    stamp = {
        "command": f"python tests/reliability/test_server_soak.py --minutes {args.minutes:g}",
        "date": f"{date.today()}",
        "machine": machine,
    }
    text = json.dumps({**stamp, **result}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
