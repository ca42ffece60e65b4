"""Fuzzing of the reader of weights with atheris, which is not among the requirements; by hand, not in CI:

    pip install atheris
    python tests/reliability/fuzz_checkpoint.py -max_total_time=3600 -rss_limit_mb=4096 CORPUS_FOLDER

The first byte of an input says what the rest is: a file as it is, safetensors, or the pickle inside an archive with a checksum
that is right. A line of a ValueError is the only answer allowed beside tensors, whose bytes are all there.
"""

import io
import logging
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["groupmixformer.weights", "pickle", "pickletools", "zipfile"]):
    import pickle  # noqa: F401
    import pickletools  # noqa: F401

    import safetensors.torch
    import torch

    from groupmixformer import weights

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16), "c": torch.nn.Parameter(torch.ones(1))}


def archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("a/data.pkl", pickled)
        for key in "012":
            target.writestr(f"a/data/{key}", bytes(24 >> int(key)))
    return file.getvalue()


def seeds(folder: Path) -> None:
    """Write files to start from."""
    folder.mkdir(exist_ok=True)
    new, old = io.BytesIO(), io.BytesIO()
    torch.save(TENSORS, new)
    torch.save({"state_dict": TENSORS, "epoch": 1}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(new) as target:
        pickled = target.read(next(name for name in target.namelist() if name.endswith("data.pkl")))
    plain = {name: tensor.detach() for name, tensor in TENSORS.items()}
    for number, content in enumerate((new.getvalue(), old.getvalue(), safetensors.torch.save(plain), pickled)):
        (folder / f"seed{number}").write_bytes(bytes([max(0, number - 1)]) + content)


def test_one_input(data: bytes) -> None:
    kind, content = (data[0] % 3, data[1:]) if data else (0, b"")
    path = FOLDER / ("a.safetensors" if kind == 1 else "a.pth")
    path.write_bytes(archive(content) if kind == 2 else content)
    try:
        tensors = weights.read_tensors(path)
    except ValueError as error:
        if "\n" in str(error) or str(path) not in str(error):
            raise AssertionError(str(error)) from error
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content) + 1e9
        for tensor in tensors.values():
            tensor.clone()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if len(sys.argv) > 1 and not sys.argv[-1].startswith("-"):
        seeds(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
