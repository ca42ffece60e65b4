"""Checkpoints: released ones, those of this package and of timm, with the architecture taken from the tensors."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from timm.models._hub import save_config_for_hf
from torch import Tensor

from ..files import atomic_write, printable, to_json
from ..released import find_weights
from ..run_folder import CONFIG, WEIGHTS, RunFolder, one_line
from ..weights import checksum, write_tensors
from .adapters import add_adaptformer, base_name, merged_tensors, trained_names
from .groupmixformer import VARIANTS, GroupMixFormer, checkpoint_filter_fn, default_cfgs
from .mixers.replace import create_model

LOGGER = logging.getLogger(__name__)
# Of config.json: of classifiers that give an image several labels, and of those for other channels than colours.
LABEL_FIELDS = ("problem_type", "best_threshold", "display_channels", "channels_first")


def read_state_dict(path: str | Path | RunFolder) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by this package's parameter names; run nothing that the file contains.

    Args:
        path: As `load_checkpoint` takes it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as a checkpoint, or its values are not finite.
    """
    tensors = RunFolder.of(path).read_weights()
    if all(name.startswith("model.") for name in tensors):  # a LightningModule's
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return checkpoint_filter_fn(tensors)


def mlp_ratio(hidden: int, dim: int) -> float:
    """Return the ratio of which a network of width `dim` makes MLPs of `hidden` units."""
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
        ratios = [mlp_ratio(h, d) for h, d in zip(hidden, embed_dims, strict=True)]
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


def model_arguments(model: GroupMixFormer) -> dict[str, Any]:
    """Return the arguments of `GroupMixFormer` that make a network like `model`; of the mixer, if it is another."""
    mixer = {"mixer": model.mixer, "mixer_options": model.mixer_options}
    return architecture({base_name(name): tensor for name, tensor in model.state_dict().items()}) | (
        mixer if model.mixer_name != "group_mix" else {}
    )


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def check_tensors(state_dict: Mapping[str, Tensor], model: torch.nn.Module) -> None:
    """Compare tensors with those of a model, which may be on the device meta.

    Raises:
        ValueError: If some are missing, surplus, misshapen or of another kind of type; names the first few.
    """
    expected = model.state_dict()
    both = [(name, tensor, expected[name]) for name, tensor in state_dict.items() if name in expected]
    problems = {
        "missing": [name for name in expected if name not in state_dict],
        "surplus": [name for name in state_dict if name not in expected],
        "misshapen": [f"{name}: {list(got.shape)} for {list(own.shape)}" for name, got, own in both if got.shape != own.shape],
        "mistyped": [
            f"{name}: {got.dtype} for {own.dtype}"
            for name, got, own in both
            if got.is_floating_point() != own.is_floating_point() or got.is_complex()
        ],
    }
    if any(problems.values()):
        raise ValueError("; ".join(f"{kind} tensors: {one_line(_few(names))}" for kind, names in problems.items() if names))


def variant_of(arguments: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the registered variant of these widths, depths and ratios, and whether there is one."""
    for name, stages in VARIANTS.items():
        if all(list(stages[key]) == list(arguments[key]) for key in stages):
            return name, True
    return "groupmixformer_small", False


def _open_classifier(source: str | Path | RunFolder, allow_nonfinite: bool = False) -> RunFolder:
    run = RunFolder.of(source, allow_nonfinite)
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
    if Path(variant).exists():
        what = "a name of timm.list_models(), such as mobile: gmf eval measures a run, --checkpoint starts from one"
        raise ValueError(f"got the path {variant}, expected {what}")
    near = get_close_matches(variant, timm.list_models(), n=1, cutoff=0.0)[0]
    raise ValueError(f"no model {variant}, expected a name of timm.list_models(): the nearest is {near}")


def fixed_size(name: str, image_size: int) -> dict[str, Any]:
    """Return what tells a model that is made for one size of image, such as a ViT, which it is."""
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if cfg and cfg.fixed_input_size else {}


def adapt_stem(weights: Mapping[str, Tensor], cfg: Mapping[str, Any], in_chans: int, source: str) -> dict[str, Tensor]:
    """Return weights of a classifier for another number of channels, by timm's rule.

    Args:
        weights: By name.
        cfg: The ``pretrained_cfg`` of the classifier, which names its first layer.
        in_chans: Channels that are wanted.
        source: What an error names.

    Raises:
        ValueError: If it is neither for three channels nor for as many as are wanted, or the first layer is no convolution.
    """
    there = cfg["input_size"][0]
    if there == in_chans:
        return dict(weights)
    name = f"{cfg.get('first_conv')}.weight"
    if there != 3 or name not in weights:
        raise ValueError(
            f"{source}: is made for {there} channels, and cannot be adapted to in_chans {in_chans}, expected 3 or as many"
        )
    return {**weights, name: adapt_input_conv(in_chans, weights[name])}


def downloaded_cfg(variant: str) -> dict[str, Any]:
    """Return what tells timm to load the released weights of a variant from `groupmixformer.released.weights_folder`.

    Raises:
        FileNotFoundError: If they are not there; says where to download them.
        ValueError: If they cannot be read.
    """
    return {"state_dict": read_state_dict(find_weights(variant.removeprefix("groupmixformer_")))}


def _load_adapted(run: RunFolder) -> Any:
    """Load the base of a run that holds adapters and a classifier alone, and put them in: LoRA merged into its weights."""
    adapter = run.config["adapter"]
    if (base := adapter.get("base")) is None:
        raise ValueError(f"{run.path / CONFIG}: adapter has no base, which only a GroupMixFormer with adaptformer does without")
    places = [*([run.path / base["path"]] if "path" in base else []), base["source"]]
    wanted, expected = printable(base["source"]), printable(base["checksum"])
    for place in places:
        try:
            source = RunFolder(place)
            if "base" in source.config.get("adapter", {}):
                raise ValueError(f"{run.path}: its base {printable(str(place))} needs a base itself")
            model = load_model(source)
        except FileNotFoundError:
            continue
        break
    else:
        raise FileNotFoundError(
            f"{run.path}: its base {wanted} (checksum {expected}) is not at {printable(str(places[0]))}: put it there, or "
            f"name its place as source under adapter, base in {run.path / CONFIG}"
        )
    if (found := checksum(model.state_dict())) != base["checksum"]:
        raise ValueError(
            f"{run.path}: its base {printable(str(place))} has the checksum {found}, expected {expected}: it is another model"
        )
    tensors = run.read_weights()
    try:
        model.reset_classifier(run.config["num_classes"])
        if adapter["kind"] == "adaptformer":
            add_adaptformer(model, adapter)
            model.adapter = {name: value for name, value in adapter.items() if name != "base"}
            if tensors.keys() != trained_names(model):
                raise ValueError("its tensors are not those of adaptformer and a classifier")
            model.load_state_dict(tensors, strict=False)
        else:
            model.load_state_dict(merged_tensors(model, tensors, adapter))
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{run.weights}: cannot be loaded: {one_line(error)}") from error
    cfg = model.pretrained_cfg | run.config.get("pretrained_cfg", {})
    cfg = {name: value for name, value in cfg.items() if name not in ("label_names", *LABEL_FIELDS)}  # which are the base's
    cfg |= {key: run.config[key] for key in LABEL_FIELDS if key in run.config}
    if len(names := run.config.get("label_names", ())) == model.num_classes:
        cfg["label_names"] = names
    model.pretrained_cfg = model.default_cfg = cfg
    return model.eval()


def load_checkpoint(path: str | Path | RunFolder, allow_nonfinite: bool = False) -> GroupMixFormer:
    """Load a model from a file or folder, whatever its widths, depths, MLP ratios, classes and input channels.

    Args:
        path: A released checkpoint (also one saved in training), a file of this package, ``.safetensors``, or a folder
            with ``model.safetensors`` such as a run or what `gmf convert` wrote, or a file in it, or such a folder on a hub,
            ``hf-hub:user/name`` or ``hf-hub:user/name@revision``; or a `RunFolder`, which is open already.
        allow_nonfinite: Load weights that hold NaN or infinite values, to study them.

    Returns:
        The model in eval mode on the CPU, in float32. Its ``pretrained_cfg`` holds the image size, mean, standard deviation and
        class names stored in the folder, or ImageNet's.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If it cannot be fetched from a hub.
        ValueError: If it is unreadable or damaged, asks for code to run, is of another network, or has missing, surplus or
            misshapen tensors or values that are not finite, of which it names the first few.
    """
    run = _open_classifier(path, allow_nonfinite)
    config, adapter = run.config, run.config.get("adapter")
    if adapter and "base" in adapter:
        return _load_adapted(run)
    state_dict = read_state_dict(run)
    try:
        arguments = architecture({base_name(name): tensor for name, tensor in state_dict.items()})
        stored = config.get("model_args") or {}
        made = arguments | {key: stored[key] for key in ("mixer", "mixer_options") if key in stored}
        learnt = {"head.global_pool.p": "ggem", "head.global_pool.q.weight": "simpool"}
        pools = [pool for name, pool in learnt.items() if name in state_dict]
        made["global_pool"] = config.get("global_pool", [*pools, "avg"][0])
        if made["num_classes"] and not made["global_pool"]:
            raise ValueError(f"{CONFIG} has global_pool '', expected the pooling of its classifier")
        with torch.device("meta"):
            model: Any = GroupMixFormer(**made)
            if adapter:
                add_adaptformer(model, adapter)
        try:
            check_tensors(state_dict, model)
        except ValueError as error:
            hint = "" if "mixer" in made else ", and another mixer is named by mixer under model_args of config.json"
            raise ValueError(f"as a network with mixer {model.mixer_name}: {error}{hint}") from error
        # Layers of timm's have tables that are not stored, which no empty model holds.
        if "mixer" in made:
            model = GroupMixFormer(**made)
            if adapter:
                add_adaptformer(model, adapter)
        else:
            model = model.to_empty(device="cpu")
        if adapter:
            model.adapter = adapter
        model.load_state_dict(state_dict)
        variant, _ = variant_of(arguments)
        pretrained_cfg = default_cfgs[variant].default.to_dict() | config.get("pretrained_cfg", {})
        pretrained_cfg |= {key: config[key] for key in ("label_names", "label_descriptions", *LABEL_FIELDS) if key in config}
        count = arguments["num_classes"]
        if config.get("num_classes", count) != count:
            raise ValueError(f"{CONFIG} has num_classes {config['num_classes']}, and the weights are for {count}")
        names = pretrained_cfg.pop("label_names", ())
        if len(names) == count:
            pretrained_cfg["label_names"] = names
        elif names:  # transformers keeps those of a classifier that it replaces
            LOGGER.warning("%s: its %s names are not used: it has %s classes", run.path, len(names), count)
        pretrained_cfg |= {"architecture": variant, "num_classes": arguments["num_classes"]}
        pretrained_cfg["input_size"] = (arguments["in_chans"], *pretrained_cfg["input_size"][1:])
    except Exception as error:  # a hostile file can hold anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{run.weights}: cannot be loaded: {kind}{one_line(error)}") from error
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
    if "adapter" in run.config:
        return _load_adapted(run)
    options = run.config.get("model_args", {})
    try:
        if "mixer" in options:
            named = {key: run.config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in run.config}
            cfg = run.config.get("pretrained_cfg", {}) | named
            model: Any = create_model(run.config["architecture"], pretrained_cfg=cfg, **options)
            model.load_state_dict(run.read_weights())
        else:
            # With a first layer of another number of channels, earlier versions of timm would begin with a new one.
            weights = {"state_dict": run.read_weights(), "first_conv": None}
            model = timm.create_model(f"local-dir:{run.path}", pretrained=True, pretrained_cfg_overlay=weights)
            model.pretrained_cfg.pop("state_dict")
    except Exception as error:  # arguments from config.json can make a constructor raise anything
        raise ValueError(f"{run.path}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    model.pretrained_cfg["first_conv"] = run.config.get("pretrained_cfg", {}).get("first_conv")
    model.pretrained_cfg |= {key: run.config[key] for key in LABEL_FIELDS if key in run.config}
    model.model_options = {key: value for key, value in run.config.get("model_args", {}).items() if key != "img_size"}
    return model.eval()


def remade(source: Any, image_size: int, **settings: Any) -> Any:
    """Return a model like one that `load_model` gave, with its weights, made with further settings by timm's names."""
    if isinstance(source, GroupMixFormer):
        model: Any = GroupMixFormer(**model_arguments(source) | settings, global_pool=source.head.global_pool.pool_type)
    else:
        name, options = source.pretrained_cfg["architecture"], source.model_options
        model = create_model(name, **options | settings | fixed_size(name, image_size))
        model.model_options = options
    in_chans = settings.get("in_chans", source.pretrained_cfg["input_size"][0])
    model.load_state_dict(adapt_stem(source.state_dict(), source.pretrained_cfg, in_chans, "the checkpoint"))
    model.pretrained_cfg = source.pretrained_cfg
    return model


def save_checkpoint(
    model: Any,
    folder: str | Path,
    label_names: Iterable[str] = (),
    data_config: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, which `load_checkpoint`, timm's ``local-dir:`` and transformers read.

    The files are written atomically: a reader never sees half a file.

    Args:
        model: A `GroupMixFormer`, or a model that timm made; its ``pretrained_cfg``, if any, is stored.
        folder: Created if need be; other files in it are left alone.
        label_names: Names of the classes, in order.
        data_config: Input size, mean and so on, as timm names them, where they differ from ``pretrained_cfg``.
        more: Further fields of config.json.

    Raises:
        ValueError: If a model that is not ours has AdaptFormer's layers and no base.
    """
    folder = Path(folder)
    original = getattr(model, "pretrained_cfg", None)
    pretrained_cfg = dict(original or {})
    model_args: dict[str, Any] = dict(getattr(model, "model_options", {}))
    if pretrained_cfg.get("fixed_input_size") and data_config:
        model_args["img_size"] = data_config["input_size"][-1]  # as a ViT needs to know
    if isinstance(model, GroupMixFormer):
        arguments = model_arguments(model)
        variant, exact = variant_of(arguments)
        pretrained_cfg = default_cfgs[variant].default.to_dict() | pretrained_cfg | {"architecture": variant}
        stored = ("mixer", "mixer_options") if exact else ("embed_dims", "depths", "mlp_ratios", "mixer", "mixer_options")
        model_args = {key: arguments[key] for key in stored if key in arguments}
        pretrained_cfg["input_size"] = (model.in_chans, *pretrained_cfg["input_size"][1:])
    pretrained_cfg |= dict(data_config or {}) | {"num_classes": model.num_classes}
    before = pretrained_cfg.pop("label_names", None)
    names = list(label_names) or list(before or [])
    labels: dict[str, Any] = ({"label_names": names} if names else {}) | dict(more or {})
    labels |= {key: value for key in LABEL_FIELDS if (value := pretrained_cfg.pop(key, None)) is not None}
    if isinstance(model, GroupMixFormer):
        labels["global_pool"] = model.head.global_pool.pool_type
    adapter, tensors = getattr(model, "adapter", None), model.state_dict()
    if adapter and "base" in adapter:
        kept, source = trained_names(model), adapter["base"]["source"]
        tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
        path = {"path": os.path.relpath(source, folder)} if Path(source).exists() else {}  # the two may be moved together
        adapter = {**adapter, "base": adapter["base"] | path}
    elif adapter and not isinstance(model, GroupMixFormer):
        raise ValueError(f"AdaptFormer in a {type(model).__name__} is not written without its base: use lora, which is merged")
    model.pretrained_cfg = pretrained_cfg
    try:
        with atomic_write(folder / WEIGHTS[0], folder / CONFIG) as temporary:
            write_tensors(tensors, temporary / WEIGHTS[0])
            written = temporary / CONFIG
            save_config_for_hf(model, written, model_config=labels, model_args=model_args or None)  # type: ignore[arg-type]
            config = json.loads(written.read_text())
            config.get("model_args", {}).pop("num_classes", None)  # transformers passes it itself and fails on two
            if adapter:
                config["adapter"] = adapter
            written.write_text(to_json(config, indent=2))
    finally:
        if original is None:
            del model.pretrained_cfg
        else:
            model.pretrained_cfg = original
