"""What the checks of `groupmixformer.weights` cost, on 100 matrices of 512 x 512 in float32 (105 MB), one thread.

python benchmarks/reading_weights.py
"""

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from groupmixformer.weights import check_finite, checksum, read_tensors, write_tensors


def best(call: Callable[[], object], repeats: int = 15) -> float:
    """Return the least of several times, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(512, 512) for i in range(100)}
    with tempfile.TemporaryDirectory() as folder:
        pickled, plain = Path(folder, "a.pth"), Path(folder, "a.safetensors")
        torch.save({"model": tensors}, pickled)
        write_tensors(tensors, plain)
        calls: dict[str, Callable[[], object]] = {
            "torch.load(mmap=True)": lambda: torch.load(pickled, mmap=True, weights_only=True),
            "read_tensors(.pth)": lambda: read_tensors(pickled),
            "safetensors.torch.load_file": lambda: safetensors.torch.load_file(plain),
            "read_tensors(.safetensors)": lambda: read_tensors(plain),
            "of these: CRC-32 of the tensors": lambda: checksum(tensors),
            "of these: finite": lambda: check_finite(tensors, plain),
            "SHA-256 of the tensors": lambda: [hashlib.sha256(tensor.numpy().data).digest() for tensor in tensors.values()],
        }
        for name, call in calls.items():
            print(f"{name:34} {best(call):7.1f} ms")


if __name__ == "__main__":
    main()
