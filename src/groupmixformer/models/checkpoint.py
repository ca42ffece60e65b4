"""Checkpoints: released ones, those of this package and of timm, read safely, with the architecture taken from the tensors.

Nothing that a file asks to run is run. Files are read with ``weights_only=True`` or safetensors. A checkpoint that the
release's training script saved also holds a pickled configuration object; its class is never imported and its place is
taken by an empty dictionary.
"""

import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor

from ..files import atomic_write, to_json
from ..run_folder import CONFIG, WEIGHTS, RunFolder, one_line
from .groupmixformer import VARIANTS, GroupMixFormer, checkpoint_filter_fn, default_cfgs


class _NeverCalled(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise pickle.UnpicklingError(f"asks to call {cls.__name__}, which is refused")


class _Inert:
    """Stands for a number of numpy's, say a metric: keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str) -> type:
    """Return what the restricted unpickler shall take for `name`: a class whose objects are empty dictionaries."""
    if name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"):
        return _Inert
    return _NeverCalled(name, (), {"__new__": lambda cls, *args: OrderedDict()})


def _load_pickle(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        mmap = True
    except ValueError:  # the format before PyTorch 1.6, or not a checkpoint: the loader tells
        unknown, mmap = [], False
    with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _named_tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("model", "state_dict"):  # the release; Lightning and timm
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    named = isinstance(loaded, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    if not named or not loaded:
        raise ValueError(
            f"{path}: holds no state dict, expected tensors by name, alone or under 'model' or 'state_dict': "
            "is it another kind of file?"
        )
    state_dict = clean_state_dict(dict(loaded))  # drops 'module.' and '_orig_mod.'
    if all(name.startswith("model.") for name in state_dict):  # a LightningModule's
        state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
    return checkpoint_filter_fn(state_dict)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by this package's parameter names; run nothing that the file contains.

    Args:
        path: A ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.safetensors`` file, or a folder with one of `WEIGHTS`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: the folder holds none of {', '.join(WEIGHTS)}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file or folder")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty, expected a checkpoint: copy or download it again")
    try:
        loaded = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except Exception as error:  # a hostile file can make the readers raise anything
        asked = re.search(r"GLOBAL (\S+)|asks to call (\S+),", str(error))
        if asked:
            reason = f"it asks to run {asked[1] or asked[2]}, and only tensors are read from a checkpoint"
        else:
            reason = f"it is damaged or of another kind ({type(error).__name__}: {one_line(error).split('. ')[0]})"
        raise ValueError(f"{path}: not a readable checkpoint: {reason}") from error
    return _named_tensors(loaded, path)


def _mlp_ratio(hidden: int, dim: int) -> float:
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of `GroupMixFormer` from the names and shapes of its tensors.

    Returns:
        `embed_dims`, `depths`, `mlp_ratios`, `num_classes` (0 without a classifier) and `in_chans`.

    Raises:
        ValueError: If the tensors are not those of a GroupMixFormer.
    """
    numbers: dict[int, set[int]] = {}
    for name in state_dict:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            numbers.setdefault(int(match[1]), set()).add(int(match[2]))
    try:
        in_chans = state_dict["stem.conv1.weight"].shape[1]
        embed_dims = [state_dict[f"stages.{i}.patch_embed.pointwise.weight"].shape[0] for i in range(len(numbers))]
        hidden = [state_dict[f"stages.{i}.blocks.0.mlp.fc1.weight"].shape[0] for i in range(len(numbers))]
        depths = [len(numbers[i]) for i in range(len(numbers))]
        num_classes = state_dict["head.fc.weight"].shape[0] if "head.fc.weight" in state_dict else 0
        ratios = [_mlp_ratio(h, d) for h, d in zip(hidden, embed_dims, strict=True)]
    except (KeyError, IndexError, ZeroDivisionError):
        depths = []
    if not depths:
        raise ValueError(
            f"not a GroupMixFormer: its {len(state_dict)} tensors start with {', '.join(list(state_dict)[:3])}; "
            "expected the names of the release or of this package"
        )
    return {
        "embed_dims": embed_dims,
        "depths": depths,
        "mlp_ratios": ratios,
        "num_classes": num_classes,
        "in_chans": in_chans,
    }


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _check_tensors(state_dict: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state_dict.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "surplus": [name for name in found if name not in expected],
        "misshapen": [
            f"{name}: {shape} for {expected[name]}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ],
    }
    if any(problems.values()):
        raise ValueError("; ".join(f"{kind} tensors: {_few(names)}" for kind, names in problems.items() if names))


def variant_of(arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the registered variant of these widths, depths and ratios, and whether there is one."""
    for name, stages in VARIANTS.items():
        if all(list(stages[key]) == list(arguments[key]) for key in stages):
            return name, True
    return "groupmixformer_small", False


def _open_classifier(source: str | Path | RunFolder) -> RunFolder:
    run = RunFolder.of(source)
    if not run.holds_classifier:
        raise ValueError(f"{run.path}: holds a model for {run.task}, expected a classifier")
    return run


def model_name(variant: str) -> str:
    """Return timm's name of a variant (mobile, tiny, ...) or of any other model of timm.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    for name in (f"groupmixformer_{variant}", variant):
        if timm.is_model(name):
            return name
    near = get_close_matches(variant, timm.list_models(), n=1, cutoff=0.0)[0]
    raise ValueError(f"no model {variant}, expected a name of timm.list_models(): the nearest is {near}")


def load_checkpoint(path: str | Path | RunFolder) -> GroupMixFormer:
    """Load a model from a file or folder, whatever its widths, depths, MLP ratios, classes and input channels.

    Args:
        path: A released checkpoint (also one saved in training), a file of this package, ``.safetensors``, or a folder
            with ``model.safetensors`` such as a run or what `gmf convert` wrote, or such a folder on a hub,
            ``hf-hub:user/name`` or ``hf-hub:user/name@revision``; or a `RunFolder`, which is open already.

    Returns:
        The model in eval mode on the CPU, in float32. Its ``pretrained_cfg`` holds the image size, mean, standard deviation and
        class names stored in the folder, or ImageNet's.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If it cannot be fetched from a hub.
        ValueError: If it is unreadable, asks for code to run, is of another network, or has missing, surplus or
            misshapen tensors, of which it names the first few.
    """
    run = _open_classifier(path)
    path, config = run.path, run.config
    state_dict = read_state_dict(path)
    try:
        arguments = architecture(state_dict)
        with torch.device("meta"):
            model: Any = GroupMixFormer(**arguments, global_pool=config.get("global_pool", "avg"))
        _check_tensors(state_dict, model)
        model.to_empty(device="cpu")
        model.load_state_dict(state_dict)
        variant, _ = variant_of(arguments)
        pretrained_cfg = default_cfgs[variant].default.to_dict() | config.get("pretrained_cfg", {})
        pretrained_cfg |= {key: config[key] for key in ("label_names", "label_descriptions") if key in config}
        if len(pretrained_cfg.get("label_names") or ()) != arguments["num_classes"]:
            pretrained_cfg.pop("label_names", None)  # transformers keeps those of a classifier that it replaces
        pretrained_cfg |= {"architecture": variant, "num_classes": arguments["num_classes"]}
        pretrained_cfg["input_size"] = (arguments["in_chans"], *pretrained_cfg["input_size"][1:])
    except Exception as error:  # a hostile file can hold anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: cannot be loaded: {kind}{one_line(error)}") from error
    model.pretrained_cfg = model.default_cfg = pretrained_cfg
    return model.eval()


def load_model(path: str | Path | RunFolder) -> Any:
    """Load a `GroupMixFormer` as `load_checkpoint` does, or another timm model from the folder of a run of ours.

    Returns:
        The model in eval mode with its ``pretrained_cfg``.
    """
    run = _open_classifier(path)
    if run.config.get("architecture", "groupmixformer").startswith("groupmixformer"):
        return load_checkpoint(run)
    return timm.create_model(f"local-dir:{run.path}", pretrained=True).eval()


def _plain_tensors(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Copy what safetensors refuses: tensors in other memory formats, and shared ones, such as CoaT's position encodings."""
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.clone(memory_format=torch.contiguous_format)


def save_checkpoint(
    model: Any,
    folder: str | Path,
    label_names: Iterable[str] = (),
    data_config: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, which `load_checkpoint`, timm's ``local-dir:`` and transformers read.

    The files are written atomically: a reader never sees half a file.

    Args:
        model: A `GroupMixFormer`, or a model that timm made; its ``pretrained_cfg``, if any, is stored.
        folder: Created if need be; other files in it are left alone.
        label_names: Names of the classes, in order.
        data_config: Input size, mean and so on, as timm names them, where they differ from ``pretrained_cfg``.
    """
    folder = Path(folder)
    original = getattr(model, "pretrained_cfg", None)
    pretrained_cfg = dict(original or {})
    model_args: dict[str, Any] | None = None
    if pretrained_cfg.get("fixed_input_size") and data_config:
        model_args = {"img_size": data_config["input_size"][-1]}  # as a ViT needs to know
    if isinstance(model, GroupMixFormer):
        arguments = architecture(model.state_dict())
        variant, exact = variant_of(arguments)
        pretrained_cfg = default_cfgs[variant].default.to_dict() | pretrained_cfg | {"architecture": variant}
        model_args = None if exact else {key: arguments[key] for key in ("embed_dims", "depths", "mlp_ratios")}
        pretrained_cfg["input_size"] = (model.in_chans, *pretrained_cfg["input_size"][1:])
    pretrained_cfg |= dict(data_config or {}) | {"num_classes": model.num_classes}
    names = list(label_names) or list(pretrained_cfg.pop("label_names", None) or [])
    labels: dict[str, Any] = {"label_names": names} if names else {}
    if isinstance(model, GroupMixFormer):
        labels["global_pool"] = model.head.global_pool.pool_type
    model.pretrained_cfg = pretrained_cfg
    hook = model.register_state_dict_post_hook(_plain_tensors)
    try:
        with atomic_write(folder / WEIGHTS[0], folder / CONFIG) as temporary:
            save_for_hf(model, str(temporary), model_config=labels, model_args=model_args, safe_serialization=True)
            written = temporary / CONFIG
            config = json.loads(written.read_text())
            config.get("model_args", {}).pop("num_classes", None)  # transformers passes it itself and fails on two
            written.write_text(to_json(config, 2))
    finally:
        hook.remove()
        if original is None:
            del model.pretrained_cfg
        else:
            model.pretrained_cfg = original
