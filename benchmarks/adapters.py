"""What fine-tuning with adapters trains and takes: parameters, bytes of their file, peak memory of a training step on a CPU."""

import argparse
import os
from pathlib import Path

import peft  # noqa: F401 - its memory counts for none of the kinds
import timm
import torch
from timm.optim import create_optimizer_v2

import groupmixformer  # noqa: F401
from groupmixformer.models.adapters import add_adapters, freeze_statistics

TARGETS = ["qkv", "proj", "fc1", "fc2"]


def peak():
    """The largest memory that this process had, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure(name, kind, batch_size):
    model = timm.create_model(name, num_classes=10).train()
    if kind != "none":
        add_adapters(model, {"kind": kind, "rank": 8, "alpha": None, "targets": TARGETS})
        freeze_statistics(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    images, start = torch.randn(batch_size, 3, 224, 224), peak()
    for _ in range(2):
        model(images).logsumexp(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{name} {kind}: {trained:,} trained, {4 * trained / 1e6:.2f} MB, {peak() - start:.0f} MiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="groupmixformer_mobile")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("none", "lora", "adaptformer", "linear_probe"):
        if os.fork() == 0:  # a process for each, whose memory begins where this one's is
            measure(options.model, kind, options.batch_size)
            os._exit(0)
        os.wait()
