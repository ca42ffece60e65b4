"""Eager fp32 inference and training on one CPU thread, beside birder's groupmixformer_s, alternating in one run.

python benchmarks/cpu_eager.py [--batch 4] [--repeats 9]   # needs birder; writes benchmarks/results/cpu_eager-DATE.json

birder computes as the authors' release does, so it stands for the release. Speed only: the numbers that the model must compute
are checked in tests/.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import birder
import timm
import torch
from birder.model_registry import registry

import groupmixformer


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = {"mobile": "mobile", "tiny": "t", "small": "s", "base": "b"}
    rows = []
    for ours, theirs in pairs.items():
        models = {
            "birder": registry.net_factory(f"groupmixformer_{theirs}", 1000, 3, size=(224, 224)),
            "groupmixformer": timm.create_model(f"groupmixformer_{ours}"),
        }
        images = torch.randn(args.batch, 3, 224, 224)
        for mode in ("inference", "training"):
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(args.repeats + 1):  # the first warms up
                for name, model in models.items():
                    model.train(mode == "training")
                    start = time.process_time()
                    with torch.inference_mode(mode == "inference"):
                        out = model(images)
                    if mode == "training":
                        out.square().mean().backward()
                        model.zero_grad()
                    if repeat:
                        seconds[name].append(time.process_time() - start)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            spread = {name: (min(values), max(values)) for name, values in seconds.items()}
            rows.append(
                {
                    "variant": ours,
                    "mode": mode,
                    "batch": args.batch,
                    "ms": {name: round(1000 * value, 1) for name, value in median.items()},
                    "ms_spread": {name: [round(1000 * v, 1) for v in value] for name, value in spread.items()},
                    "ratio": round(median["birder"] / median["groupmixformer"], 3),
                }
            )
            print(rows[-1], flush=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "date": today,
        "machine": f"{cpu_name()}, one thread, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "birder": birder.__version__,
            "groupmixformer": groupmixformer.__version__,
        },
        "rows": rows,
    }
    args.out.mkdir(exist_ok=True)
    (args.out / f"cpu_eager-{today}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
