"""Files of weights: read without running code or trusting what they say of their sizes, checked, written with a checksum.

A pickle gets no class and no function but those below, which keep what they are given: tensors are described, and made when
the description has been compared with the bytes that are there. A class from elsewhere, such as the configuration in a file
of the release's training script, is never imported, and an empty dictionary takes its place. In a zip archive (PyTorch since
1.6) every member is compared with its CRC; what is stored as it is, and not compressed, is mapped into memory.
"""

import io
import logging
import math
import mmap
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from .files import one_line

LOGGER = logging.getLogger(__name__)
CHECKSUM = "crc32"  # in the metadata of our safetensors, beside what timm and transformers put there
EXPANSION = "GROUPMIXFORMER_CHECKPOINT_GB"  # environment variable: memory that a file may take beyond its size
MAX_OPERATIONS = 1_000_000  # of a pickle; each takes 250 bytes at most, and a checkpoint of training has some 100,000
MAX_HEADER = 16 << 20  # of safetensors, in bytes; a tensor takes about 100
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch before 1.6
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)} | {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class _Refused(Exception):
    """Why a file is not read."""


class _NoTensors(Exception):
    """A file that was read and holds no weights."""


class _NeverCalled(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(f"it asks to run {cls.__name__}, and only tensors are read from a checkpoint")


class _Inert:
    """Stands for a value that is not needed, such as a metric that is a number of numpy's: keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class _View(NamedTuple):
    """A tensor, as a pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, storages: Mapping[str, Any]) -> Tensor:
        """Make it, of the bytes of its storage."""
        key, dtype, count = self.storage
        if len(storages[key]) != count * dtype.itemsize:
            raise _Refused(f"its storage {key} has {len(storages[key]):,} bytes, expected {count * dtype.itemsize:,}")
        if math.prod(self.shape) > count:
            raise _Refused(f"a tensor has {math.prod(self.shape):,} numbers, and {count:,} are stored for it")
        whole = torch.frombuffer(storages[key], dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return whole.as_strided(self.shape, self.stride, self.offset)  # which checks the bounds


def _view(
    storage: Any, offset: Any, shape: Any, stride: Any, gradient: Any = None, hooks: Any = None, dtype: Any = None
) -> _View:
    if not isinstance(storage, _Storage):
        raise _Refused("it describes a tensor without a storage")
    if not all(type(number) is int for number in (offset, *shape, *stride)):
        raise _Refused("it describes a tensor by other things than numbers")
    if isinstance(dtype, torch.dtype):  # of a storage of bytes
        storage = _Storage(storage.key, dtype, storage.numel // dtype.itemsize)
    return _View(storage, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle._Unpickler):  # that in C takes memory by the numbers in a file
    """Reads a pickle to plain values, and tensors to `_View`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}
        self.known: dict[str, Any] = {  # of this file: a pickle may set attributes of what it gets
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch._utils._rebuild_tensor": lambda *args: _view(*args),
            "torch._utils._rebuild_tensor_v2": lambda *args: _view(*args[:4]),
            "torch._utils._rebuild_tensor_v3": lambda *args: _view(*args[:7]),
            "torch._utils._rebuild_parameter": lambda data, *args: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *args: data,
            "torch._tensor._rebuild_from_type_v2": self.rebuild,
        }
        inert: tuple[str, ...] = (
            "_codecs.encode",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            "torch.Size",
        )
        inert += ("torch.device", "torch.serialization._get_layout", "builtins.set", "__builtin__.set", "collections.Counter")
        self.known |= {name: type("_Inert", (_Inert,), {}) for name in inert}

    def rebuild(self, make: Any, kind: Any, args: Any, state: Any) -> Any:
        if not any(make is function for function in self.known.values()) or make == self.rebuild:
            raise _Refused("it describes a tensor in a way that is not known")
        return make(*args)

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a class or a function; never the thing itself."""
        full = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        if full not in self.known:
            self.known[full] = _NeverCalled(full, (), {"__new__": lambda cls, *args: OrderedDict()})
        return self.known[full]

    def persistent_load(self, saved: Any) -> _Storage:
        """Return a storage, as it is described."""
        _, dtype, key, _, count, *view = saved
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or count < 0 or any(view):
            raise _Refused(f"it describes a storage as {saved}, which is not known")
        return self.storages.setdefault(str(key), _Storage(str(key), dtype, count))


def _unpickle(file: Any) -> tuple[Any, dict[str, _Storage]]:
    """Read a pickle from where a file stands, with the storages that it names; look through it before anything is made."""
    start = file.tell()
    for number, (operation, _, _) in enumerate(pickletools.genops(file)):
        if operation.proto > 2 or operation.name.startswith("EXT"):
            raise _Refused(f"its pickle uses {operation.name}, which torch.save does not")
        if number > MAX_OPERATIONS:
            raise _Refused(f"its pickle has more than {MAX_OPERATIONS:,} operations, which no checkpoint needs")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


def _check_memory(needed: int, path: Path) -> None:
    extra, size = float(os.environ.get(EXPANSION) or 1), path.stat().st_size
    if needed > size + extra * 1e9:
        raise _Refused(
            f"its {size:,} bytes unfold to {needed:,}, expected at most {extra:g} GB more than the file: if you trust it, "
            f"raise the environment variable {EXPANSION}"
        )


def _read_zip(path: Path, content: mmap.mmap) -> tuple[Any, Mapping[str, Any]]:
    """Return what a zip archive holds, and the bytes of its storages."""
    members: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        _check_memory(sum(entry.file_size for entry in entries), path)
        for entry in entries:
            name = entry.filename.partition("/")[2]
            if name in members:
                raise _Refused(f"it holds {name} twice")
            if entry.compress_type == zipfile.ZIP_STORED:
                start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
                data: Any = memoryview(content)[start : start + entry.file_size]
                if len(data) != entry.compress_size or zlib.crc32(data) != entry.CRC:
                    raise _Refused(f"it is damaged: the checksum of its part {name} differs: copy or download it again")
                members[name] = bytearray(data) if start % 8 else data  # numbers must be aligned
            else:
                members[name] = bytearray(archive.read(entry))  # which compares the checksum too
    order = bytes(members.get("byteorder", b"little")).decode("ascii", "replace")
    if order != sys.byteorder:
        raise _Refused(f"its numbers are written in the byte order {order}, expected {sys.byteorder}")
    loaded, storages = _unpickle(io.BytesIO(members["data.pkl"]))
    return loaded, {key: members[f"data/{key}"] for key in storages}


def _read_legacy(content: mmap.mmap) -> tuple[Any, Mapping[str, Any]]:
    """Return what a file of the format before PyTorch 1.6 holds: five pickles, then the storages."""
    if _unpickle(content)[0] != LEGACY_MAGIC:
        raise _Refused("it is no checkpoint of PyTorch")
    for _ in ("version", "system"):
        _unpickle(content)
    loaded, storages = _unpickle(content)
    keys, found = _unpickle(content)[0], dict[str, Any]()
    for key in keys:
        _, dtype, count = storages[str(key)]
        start = content.tell() + 8
        found[str(key)] = bytearray(memoryview(content)[start : start + count * dtype.itemsize])
        if content.read(8) != count.to_bytes(8, "little") or len(found[str(key)]) != count * dtype.itemsize:
            raise _Refused(f"its storage {key} is not of the size that it declares")
        content.seek(start + len(found[str(key)]))
    if found.keys() != storages.keys() or content.read(1):
        raise _Refused("it holds fewer or more storages than it declares")
    return loaded, found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise _Refused(f"its header of {header:,} bytes is too long, expected at most {MAX_HEADER:,}")
    with safetensors.safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get(CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    if stored and stored != checksum(tensors):
        raise _Refused("it is damaged: the checksum of its tensors differs from the one that it was saved with")
    return tensors


def _named(loaded: Any, path: Path) -> dict[str, Any]:
    """Find the tensors by name in what a pickle holds; of a run's state the EMA weights, if there are any."""
    outer = loaded
    for wrapper in ("model", "state_dict"):  # the release; Lightning and timm
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            outer, loaded = loaded, loaded[wrapper]
    if not (
        isinstance(loaded, Mapping) and all(isinstance(k, str) and isinstance(v, _View) for k, v in loaded.items()) and loaded
    ):
        raise _NoTensors(
            "holds no state dict, expected tensors by name, alone or under 'model' or 'state_dict': is it another kind of file?"
        )
    if "pytorch-lightning_version" in outer:
        averaged = any(name.startswith("average.module.") for name in loaded)  # as `training.module.Task` has them
        prefix, kind = ("average.module.", "EMA weights") if averaged else ("model.", "weights")
        ours = {name.removeprefix(prefix): view for name, view in loaded.items() if name.startswith(prefix)}
        loaded = ours or loaded  # another LightningModule may be the network itself
        LOGGER.warning("%s: took the %s after step %s", path, kind, outer.get("global_step"))
    return clean_state_dict(dict(loaded))  # drops 'module.' and '_orig_mod.'


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a write to it leaves the file as it is
    is_zip = content[:4] == b"PK\3\4"
    loaded, storages = _read_zip(path, content) if is_zip else _read_legacy(content)
    if not is_zip:
        LOGGER.warning("%s: has no checksum (it is of a PyTorch before 1.6): save it with gmf convert", path)
    tensors = {name: view.tensor(storages) for name, view in _named(loaded, path).items()}
    _check_memory(sum(tensor.nbytes for tensor in tensors.values()), path)  # which may share a storage
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ValueError: If there are; names the first tensors, each with how many.
    """
    bad = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.detach() if tensor.element_size() > 1 else tensor.float()  # 8 bits cannot be summed
        if not values.sum().isfinite() and (count := int((~values.isfinite()).sum())):  # the sum is 8 times as fast
            bad.append(f"{one_line(name)} ({count:,} of {tensor.numel():,})")
    if bad:
        few = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold NaN or infinite values: {few}: training diverged, or the file "
            "is damaged; to study it all the same, pass allow_nonfinite=True (--allow-nonfinite)"
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of names, types, shapes and values, as hexadecimal digits."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def read_tensors(path: Path, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a file by their names in it; run nothing that the file contains.

    Args:
        path: A ``.safetensors`` file, or a pickle of PyTorch's, such as ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``.
        allow_nonfinite: Read weights that hold NaN or infinite values.

    Returns:
        On the CPU. Those of a zip archive may be mapped from the file: changing them does not change it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as a checkpoint, is damaged, or takes more memory than it should.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, expected a checkpoint: copy or download it again")
    try:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except _NoTensors as error:
        raise ValueError(f"{path}: {error}") from error
    except _Refused as error:
        raise ValueError(f"{path}: not a readable checkpoint: {one_line(error)}") from error
    except Exception as error:  # a hostile file can make the readers raise anything
        reason = one_line(error).split(". ")[0]
        kind = f"it is damaged or of another kind ({type(error).__name__}: {reason}): copy or download it again"
        raise ValueError(f"{path}: not a readable checkpoint: {kind}") from error
    if not allow_nonfinite:
        check_finite(tensors, path)
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors with a checksum, for `read_tensors`, timm and transformers; into a folder of `files.atomic_write`."""
    # A copy of each: safetensors refuses other memory formats, and shared memory, such as CoaT's position encodings.
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    safetensors.torch.save_file(copies, path, metadata={"format": "pt", CHECKSUM: checksum(copies)})
