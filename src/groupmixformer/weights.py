"""Files of weights: read without running code or trusting what they say of their sizes, checked, written with a checksum.

Pickles are read by PyTorch with ``weights_only=True``, which runs nothing but what makes tensors. It believes what a file says
of its sizes, though, maps compressed bytes as if they were numbers, and compares no checksum of what it maps. So a file is
looked through first: the operations of its pickle, which are not run, and the parts of its zip archive (PyTorch since 1.6).
A class from elsewhere, such as the configuration in a file of the release's training script, is never imported, and an empty
dictionary takes its place.
"""

import io
import logging
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

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
ELEMENT_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2} | {
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")  # into and from a pickle's memory


class _Refused(Exception):
    """Why a file is not read."""


class _NoTensors(Exception):
    """A file that was read and holds no weights."""


class _NeverCalled(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise pickle.UnpicklingError(f"asks to call {cls.__name__}, which is refused")


class _Inert:
    """Stands for a value that is not needed, such as a metric that is a number of numpy's: keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str) -> type:
    """Return what PyTorch's restricted unpickler shall take for `name`: a class whose objects are empty dictionaries."""
    if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"):
        return _Inert
    return _NeverCalled(name, (), {"__new__": lambda cls, *args: OrderedDict()})


def _look_through(pickled: bytes | IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the operations of a pickle with their arguments, without running them.

    Operations that `torch.save` does not use are refused, and more of them than any checkpoint needs.
    """
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        if operation.proto > 2 or operation.name.startswith("EXT"):
            raise _Refused(f"its pickle uses {operation.name}, which torch.save does not")
        if number > MAX_OPERATIONS:
            raise _Refused(f"its pickle has more than {MAX_OPERATIONS:,} operations, which no checkpoint needs")
        if operation.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise _Refused("it asks for memory that holds no tensor")
        yield operation.name, argument


def _declared_sizes(pickled: bytes | IO[bytes]) -> dict[str, int]:
    """Return the bytes of each storage, by its key, that a pickle declares.

    A storage is constants in a tuple: "storage", its type, key, device, number of elements, before PyTorch 1.6 also None. Those
    that were used before are taken from the pickle's memory.
    """
    sizes: dict[str, int] = {}
    memory: dict[int, Any] = {}
    last: list[tuple[bool, Any]] = []  # whether a constant, and the constant or the operation that made something else
    for name, argument in _look_through(pickled):
        if name in PUTS:
            memory[int(argument)] = last[-1] if last else (False, name)
        elif name in GETS:
            last.append(memory.get(int(argument), (False, name)))
        elif name == "BINPERSID":
            if last[-2:-1] == [(False, "NONE")]:
                del last[-2]
            match last[-7:]:
                case [
                    (False, "MARK"),
                    (True, "storage"),
                    (True, str(kind)),
                    (True, str(key)),
                    _,
                    (True, int(count)),
                    (False, "TUPLE"),
                ]:
                    kind = kind.rpartition(" ")[2].removesuffix("Storage")
                    size = count * ELEMENT_SIZES.get(kind, 1)  # others count bytes
                case _:
                    raise _Refused("it describes a storage in a way that torch.save does not")
            if sizes.setdefault(key, size) != size:
                raise _Refused(f"it describes the storage {key} twice")
            last.append((False, name))
        else:
            last.append((argument is not None, name if argument is None else argument))
        del last[:-9]
    return sizes


def _check_memory(needed: int, path: Path) -> None:
    extra, size = float(os.environ.get(EXPANSION) or 1), path.stat().st_size
    if needed > size + extra * 1e9:
        raise _Refused(
            f"its {size:,} bytes unfold to {needed:,}, expected at most {extra:g} GB more than the file: if you trust it, "
            f"raise the environment variable {EXPANSION}"
        )


def _checked_zip(path: Path) -> tuple[Path | IO[bytes], dict[str, int]]:
    """Compare the parts of a zip archive with their checksums, and their sizes with those that its pickle declares.

    Returns:
        The file, which may be mapped, or, if parts are compressed, the same archive in memory, with none that is; and the bytes
        of each storage.
    """
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        parts = {entry.filename.partition("/")[2]: entry for entry in entries}
        _check_memory(sum(entry.file_size for entry in entries), path)
        if len(parts) < len(entries):
            raise _Refused("it holds a part twice")
        plain = io.BytesIO()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in parts.values())
        with zipfile.ZipFile(plain, "w") as unfolded:
            for name, entry in parts.items():
                try:
                    with archive.open(entry) as part:  # compares the checksum at the end
                        while stored and part.read(1 << 20):
                            pass
                        if not stored:
                            unfolded.writestr(entry.filename, part.read())
                except zipfile.BadZipFile:
                    raise _Refused(
                        f"it is damaged: the checksum of its part {name} differs: copy or download it again"
                    ) from None
        sizes = _declared_sizes(archive.read(parts["data.pkl"]))
        for key, size in sizes.items():
            entry = parts[f"data/{key}"]
            if entry.file_size != size:
                raise _Refused(f"its storage {key} has {entry.file_size:,} bytes, expected {size:,}")
        plain.seek(0)
    return path if stored else plain, sizes


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
        isinstance(loaded, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()) and loaded
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
    source: Path | IO[bytes] = path
    unknown = list[str]()
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_zip:
            source, sizes = _checked_zip(path)
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            if not isinstance(source, Path):
                source.seek(0)
        else:  # before PyTorch 1.6: pickles of a magic number, a version, the system, the tensors, the keys; then the storages
            _, _, _, sizes, _ = [_declared_sizes(file) for _ in range(5)]
            LOGGER.warning("%s: has no checksum (it is of a PyTorch before 1.6): save it with gmf convert", path)
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]):
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip and source is path)
    tensors = _named(loaded, path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise _Refused(f"its tensor {name} is sparse, expected a dense one")
        stored = tensor.untyped_storage().nbytes()
        if tensor.nbytes > stored or stored not in {
            0,
            *sizes.values(),
        }:  # PyTorch makes a storage longer where a shape asks for it
            raise _Refused(f"its tensor {name} has {tensor.numel():,} numbers, more than are stored for it")
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
        if asked := re.search(r"GLOBAL (\S+)|asks to call (\S+),", str(error)):
            kind = f"it asks to run {asked[1] or asked[2]}, and only tensors are read from a checkpoint"
            raise ValueError(f"{path}: not a readable checkpoint: {one_line(kind)}") from error
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
