"""Requests a second and their latency: `gmf serve` on loopback beside the same model called image by image.

python benchmarks/serve.py [--clients 1 4 16] [--seconds 20]   # writes benchmarks/results/serve-DATE.json

The server is a process of its own, as users start it; each client of this process sends a JPEG, waits for the answer and sends
the next. `calls`, measured first and last, are those of a program without a server: decode, transform, model, in a loop, with
the fused model that the server has and as many threads. Weights are random: speed does not depend on them. Processor time (of
the server alone; Linux) moves less than the rest where other programs run.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import timm
import torch
from PIL import Image

import groupmixformer
from groupmixformer.bench.side_by_side import conditions
from groupmixformer.bench.timing import Settings
from groupmixformer.data.images import decode
from groupmixformer.files import write_file
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.tasks.classification.predict import ClassificationPredictor


def photographs(number: int) -> list[bytes]:
    """JPEG files of 500 x 375 pixels, a usual size in ImageNet."""
    found = []
    for seed in range(number):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(seconds: list[float], wall: float, processor: float, errors: int) -> dict[str, Any]:
    milliseconds = [1000 * value for value in seconds]
    return {
        "requests": len(seconds),
        "errors": errors,
        "requests_per_second": round(len(seconds) / wall, 2),
        "p50": round(float(np.percentile(milliseconds, 50)), 1),
        "p99": round(float(np.percentile(milliseconds, 99)), 1),
        "processor_milliseconds": round(1000 * processor / len(seconds), 1),
    }


def repeat(look: Callable[[bytes], bool], images: list[bytes], seconds: float) -> tuple[list[float], int]:
    """Look at one image after the other; return the seconds of each, and how many answers were wrong."""
    found, errors, start = [], 0, time.perf_counter()
    while (begun := time.perf_counter()) - start < seconds:
        errors += not look(images[len(found) % len(images)])
        found.append(time.perf_counter() - begun)
    return found, errors


@contextmanager
def server(run: Path, threads: int, *options: str) -> Any:
    command = [sys.executable, "-m", "groupmixformer.cli.main", "serve", str(run), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr
        try:
            line = process.stderr.readline()
            address = re.search(r"http://\S+(?=:\s)", line)
            if not address:
                raise RuntimeError(line + process.stderr.read())
            yield address[0], process.pid
        finally:
            process.terminate()


def images_in_a_batch(address: str) -> tuple[float, float]:
    text = httpx.get(f"{address}/metrics").text
    return tuple(float(re.search(rf"gmf_batch_images_{name} (\S+)", text)[1]) for name in ("sum", "count"))  # type: ignore


def load(address: str, process: int, clients: int, images: list[bytes], expected: list[str], seconds: float) -> dict[str, Any]:
    begin = threading.Barrier(clients)
    before = images_in_a_batch(address)

    def work(number: int) -> tuple[list[float], int]:
        with httpx.Client(timeout=60) as client:

            def look(content: bytes) -> bool:
                answer = client.post(f"{address}/predict", content=content, headers={"Content-Type": "image/jpeg"})
                return answer.status_code == 200 and answer.json()["classes"][0]["class"] == expected[images.index(content)]

            mine = images[number % len(images) :] + images[: number % len(images)]
            look(mine[0])
            begin.wait()
            return repeat(look, mine, seconds)

    used = processor_seconds(process)
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(work, range(clients)))
    after, used = images_in_a_batch(address), processor_seconds(process) - used
    wall, errors = max(sum(one) for one, _ in results), sum(wrong for _, wrong in results)
    # Each client's first request warms up: it counts for the processor's time alone.
    used *= (requests := sum(len(one) for one, _ in results)) / (requests + clients)
    row = summary([s for one, _ in results for s in one], wall, used, errors)
    return {"clients": clients, **row, "images_in_a_batch": round((after[0] - before[0]) / (after[1] - before[1]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobile", help="a variant (default: mobile)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = photographs(16)
    found = conditions(Settings(threads=args.threads)) | {"clock": "wall"}
    found["versions"] |= {"groupmixformer": groupmixformer.__version__}
    beside = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    result: dict[str, Any] = {**found, "load_average_before": beside, "model": args.model, "size": 224, "rows": []}

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch, args.model)
        torch.manual_seed(0)
        save_checkpoint(timm.create_model(f"groupmixformer_{args.model}"), run)
        model = ClassificationPredictor(run, torch.device("cpu"))
        model.model = groupmixformer.fuse(model.model)
        expected = [model.predict(decode(content, "")).result["classes"][0]["class"] for content in images]

        def calls() -> None:
            used = time.process_time()
            seconds, errors = repeat(lambda c: bool(model.predict(decode(c, "")).result), images, args.seconds)
            add({"how": "calls", **summary(seconds, sum(seconds), time.process_time() - used, errors)})

        calls()
        for batch in (1, 16):
            with server(run, args.threads, "--max-batch", str(batch)) as (address, process):
                for clients in args.clients:
                    row = load(address, process, clients, images, expected, args.seconds)
                    add({"how": f"served, batches up to {batch}", **row})
        calls()
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / f"serve-{found['date']}.json", (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
