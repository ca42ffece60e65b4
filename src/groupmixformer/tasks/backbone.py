"""What detectors and segmenters share: a backbone of timm under their own layers, new, from a checkpoint or as it was saved."""

import contextlib
import dataclasses
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import adapt_input_conv, group_parameters
from torch import Tensor, nn

from ..data.images import ARRAY_SUFFIXES
from ..data.samples import Samples
from ..files import Fields
from ..models.checkpoint import adapt_stem, check_tensors, load_model, model_arguments, model_name
from ..models.groupmixformer import GroupMixFormer, checkpoint_filter_fn
from ..models.mixers.replace import is_put_in
from ..run_folder import CONFIG, MAX_SIDE, RunFolder
from ..training.old_names import rename

if TYPE_CHECKING:  # which brings jsonargparse
    from ..training.recipe import Recipe


@functools.cache
def _any_size(name: str) -> dict[str, Any]:
    """Return what makes a model take images of any size: Swin and its kin must be told, others need nothing."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size:
        try:
            with torch.device("meta"):
                timm.create_model(name, strict_img_size=False)
        except TypeError:
            return {}
        return {"strict_img_size": False}
    return {}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone by name, so that it can be built again.

    Attributes:
        name: Of timm.
        arguments: Of its constructor, where they are not those of the name: widths, depths and MLP ratios.
        in_chans: Channels of its images.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_chans: int = 3

    def options(self, drop_path_rate: float = 0.0, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the arguments of ``timm.create_model`` for its features, with `weights` of the whole classifier."""
        options: dict[str, Any] = {**self.arguments, "features_only": True}
        if self.in_chans != 3:
            options["in_chans"] = self.in_chans
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        if weights is not None:
            adapted = {"first_conv": None, "input_size": (self.in_chans, 224, 224)} if self.in_chans != 3 else {}
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights), **adapted}}
        if self.name.startswith("groupmixformer"):
            options["feature_cls"] = "getter"  # keeps the network whole, with its gradient checkpointing and layer groups
        return {**options, **_any_size(self.name)}

    def indices(self, strides: Sequence[int]) -> list[int]:
        """Return timm's indices of the features of these strides.

        Raises:
            ValueError: If the model has no such features.
        """
        if is_put_in(self.name, self.arguments):
            raise ValueError(f"{self.name} with a mixer is only a classifier: leave the mixer out, or choose a groupmixformer")
        with torch.device("meta"):
            try:
                features: Any = take_any_size(timm.create_model(self.name, **self.options()).eval())
                by_stride = dict(zip(features.feature_info.reduction(), features.feature_info.out_indices, strict=True))
                if not set(strides) - set(by_stride):
                    features(torch.empty(1, self.in_chans, 64, 96))
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"{self.name} does not serve as a backbone for images of any size: {reason}") from error
        if missing := [stride for stride in strides if stride not in by_stride]:
            raise ValueError(
                f"{self.name} has features of strides {list(features.feature_info.reduction())}, expected {missing} too: "
                "choose a hierarchical model, such as a groupmixformer, resnet50 or pvt_v2_b2"
            )
        return [by_stride[stride] for stride in strides]


def _flat(name: str) -> str:
    """Make names of a model and of its features alike, which have underscores for some of the dots."""
    return name.replace(".", "_")


def take_any_size(features: nn.Module) -> nn.Module:
    """Tell embeddings that are made for one size of image, such as CoaT's, the size of each that comes."""
    for module in features.modules():
        if isinstance(module, PatchEmbed) and module.strict_img_size and hasattr(module, "set_input_size"):
            module.register_forward_pre_hook(lambda module, inputs: module.set_input_size(tuple(inputs[0].shape[-2:])))
    return features


class Features(nn.Module):
    """The maps of a backbone, of the given strides."""

    def __init__(self, backbone: Backbone, strides: Sequence[int], **options: Any) -> None:
        super().__init__()
        options = {**backbone.options(**options), "out_indices": backbone.indices(strides)}
        self.body: Any = take_any_size(timm.create_model(backbone.name, **options))
        self.permuted = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # as Swin's are

    def maps(self, images: Tensor) -> list[Tensor]:
        """From images (B, C, H, W) to maps (B, C, h, w), the finest first."""
        features: list[Tensor] = self.body(images)
        return [feature.permute(0, 3, 1, 2) for feature in features] if self.permuted else features


class BackboneModel(nn.Module):
    """A network whose first part is a backbone of timm; `features` gives it.

    Attributes:
        class_layers: Names, or parts of them, of the layers that have outputs for each class.
    """

    class_layers: tuple[str, ...] = ()

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.frozen_statistics = False

    @property
    @abstractmethod
    def features(self) -> Any:
        """The features of timm's model."""

    def freeze_statistics(self) -> None:
        """Let the backbone's BatchNorm normalise in training as it does later; its weights still learn."""
        self.frozen_statistics = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, which frozen statistics do not follow."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.features.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone in the backward pass.

        Raises:
            ValueError: If it cannot do that.
        """
        network: Any
        for network in (getattr(self.features, "model", None), self.features):
            if hasattr(network, "set_grad_checkpointing"):
                with contextlib.suppress(AssertionError):  # timm's way to say that it cannot
                    network.set_grad_checkpointing(enable)
                    return
        raise ValueError(f"{self.backbone.name} has no gradient checkpointing: set grad_checkpointing to false")

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of the backbone that its authors do not decay."""
        whole = self._whole()
        kept = {_flat(name) for name in whole.no_weight_decay()} if hasattr(whole, "no_weight_decay") else set()
        return {name for name, in_features in self._names_in_features().items() if in_features in kept}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return, as timm's optimiser asks, what gives the layer of a parameter: the backbone's, or the last for all others."""
        whole, in_features = self._whole(), self._names_in_features()
        grouped = group_parameters(whole, whole.group_matcher(coarse=coarse), reverse=True)
        layers: dict[str, int] = {_flat(name): layer for name, layer in grouped.items()}
        last = max(layers.values())
        return lambda name: layers.get(in_features.get(name, ""), last)

    def _whole(self) -> Any:
        """Return the classifier that the backbone is of, without its weights, for what timm knows of it alone."""
        with torch.device("meta"):
            return timm.create_model(self.backbone.name, **self.backbone.arguments)

    def _names_in_features(self) -> dict[str, str]:
        """Return for the parameters of the backbone their names in the classifier."""
        own = {id(parameter): name for name, parameter in self.features.named_parameters()}
        return {name: _flat(own[id(p)].removeprefix("model.")) for name, p in self.named_parameters() if id(p) in own}


Network = TypeVar("Network", bound=BackboneModel)


def pixel_statistics(recipe: "Recipe", cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean and std of the channels, by name: the recipe's, or those that a model is used to; for grey, their mean.

    Raises:
        ValueError: If they are not known.
    """
    if recipe.mean:
        return {"mean": recipe.mean, "std": recipe.std}
    found = {key: [float(value) for value in cfg[key]] for key in ("mean", "std") if cfg.get(key)}
    if all(len(values) == recipe.in_chans for values in found.values()) and (found or recipe.in_chans == 3):
        return found
    if recipe.in_chans == 1 and found:
        return {key: [sum(values) / len(values)] for key, values in found.items()}
    command = f"gmf data {recipe.data} --statistics --in-chans {recipe.in_chans}"
    raise ValueError(f"in_chans is {recipe.in_chans}, whose mean and std are not known: {command} prints them for the recipe")


def colours_left_out(recipe: "Recipe", images: Any, asked: Sequence[str]) -> list[str]:
    """Say which fields of a recipe change colours that its images do not have."""
    arrays = isinstance(images, Samples) and any(path.suffix.lower() in ARRAY_SUFFIXES for path in images.files()[:1])
    if not asked or (recipe.in_chans == 3 and not arrays):
        return []
    kind = "arrays" if recipe.in_chans == 3 else f"{recipe.in_chans} channel{'s' * (recipe.in_chans > 1)}"
    return [f"{' and '.join(asked)} would change colours, and is left out for {kind}: other augmentation is done"]


def shown_channels(recipe: "Recipe") -> dict[str, Any]:
    """Return what config.json says of channels beside their mean and std."""
    stored = {"display_channels": recipe.display_channels or None, "channels_first": recipe.channels_first}
    return {name: value for name, value in stored.items() if value is not None}


def open_backbone(
    variant: str, checkpoint: str | None, task: str, model_options: Mapping[str, Any] | None = None, in_chans: int = 3
) -> tuple[Backbone, dict[str, Tensor] | None, dict[str, list[float]]]:
    """Find the backbone that a recipe asks for.

    Args:
        variant: Its name; that of the checkpoint counts more.
        checkpoint: A classifier that `load_model` reads, or the folder of a run for `task`; none for new weights.
        task: What the network is for.
        model_options: Further arguments of the backbone's constructor; not with a checkpoint.
        in_chans: Channels of the images; a checkpoint for three is adapted.

    Returns:
        The backbone, the classifier's weights, if there is one, and mean and std of the pixels that it is used to.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If there is no such model, or the checkpoint cannot be used.
    """

    def colors(cfg: Mapping[str, Any] | None) -> dict[str, list[float]]:
        return {key: list(cfg[key]) for key in ("mean", "std") if key in cfg} if cfg else {}

    if not checkpoint:
        name = model_name(variant)
        known = timm.get_pretrained_cfg(name)
        return Backbone(name, dict(model_options or {}), in_chans), None, colors(known.to_dict() if known else None)
    if model_options:
        raise ValueError("got model_options and a checkpoint, expected one of them: a checkpoint has its own architecture")
    run = RunFolder.of(checkpoint)
    if not run.holds_classifier:
        config, weights = run.read_network(task)
        fields = Fields(config["network"], f"{run.path / CONFIG}: network")
        backbone = dataclasses.replace(_read_backbone(fields, weights), in_chans=in_chans)
        return backbone, None, colors(config["network"])
    source = load_model(run)
    if hasattr(source, "adapter"):
        raise ValueError(f"{checkpoint}: has AdaptFormer's layers, which cannot be merged: begin from its base")
    cfg = source.pretrained_cfg
    weights = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.global_pool.")}
    weights = adapt_stem(weights, cfg, in_chans, checkpoint)
    arguments = model_arguments(source) if isinstance(source, GroupMixFormer) else dict(source.model_options)
    for key in ("num_classes", "in_chans", "global_pool"):  # of a classifier, and what a library that makes the backbone sets
        arguments.pop(key, None)
    return Backbone(cfg["architecture"], arguments, in_chans), weights, colors(cfg)


def _largest(value: Any) -> float:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def _read_backbone(network: Fields, weights: Mapping[str, Tensor]) -> Backbone:
    """Read which backbone a network has.

    Args:
        network: Where config.json says how to make it.
        weights: Of the network, which limit what may be made.

    Raises:
        ValueError: If config.json does not say it in the way of `Backbone`, or says something absurd.
    """
    backbone = network.object("backbone")
    arguments = backbone.object("arguments", Fields({}, ""))
    for name, high in (("embed_dims", 1 << 16), ("depths", len(weights))):
        arguments.integers(name, low=1, high=high, default=None)
    arguments.numbers("mlp_ratios", low=0, high=100, default=None)
    for name, value in arguments.values.items():  # what a recipe's model_options may be
        if name in inspect.signature(timm.create_model).parameters or _largest(value) > 1 << 16:
            raise ValueError(f"{arguments.where}: has {name}={value!r}, expected arguments of the model, no number above 65536")
    try:
        return Backbone(model_name(backbone.text("name")), arguments.values, backbone.integer("in_chans", 1, 4096, default=3))
    except ValueError as error:
        raise ValueError(f"{backbone.where}: {error}") from error


def _check_arguments(network: Fields, make: Callable[..., Any], classes: int) -> None:
    """Check what config.json says of a network against the types of the constructor's arguments."""
    if network.integer("num_classes", 1) != classes:
        raise ValueError(f"{network.where}: num_classes is {network.values['num_classes']}, and class_names has {classes}")
    channels = network.object("backbone").integer("in_chans", 1, 4096, default=3)
    readers: dict[Any, Callable[..., Any]] = {
        int: lambda name, **rest: network.integer(name, 1, MAX_SIDE if name.endswith("size") else 1 << 16, **rest),
        float: lambda name, **rest: network.number(name, 0.01, 1000, **rest),
        bool: network.flag,
        str: network.text,
        Sequence[int]: lambda name, **rest: network.integers(name, None, 1, MAX_SIDE, **rest),
        Sequence[float]: lambda name, **rest: network.numbers(name, channels, **rest),
    }
    for name, parameter in inspect.signature(make).parameters.items():
        if name in network and name != "backbone":
            kind = parameter.annotation
            if kind == int | None:
                readers[int](name, default=None)
            elif kind in readers:
                readers[kind](name)


def start_from(network: BackboneModel, checkpoint: str | None, task: str, class_names: Sequence[str]) -> list[str]:
    """Give a network the weights of a run for the same task, where their shapes agree, and for the classes their names too.

    Returns:
        The names of the parameters that stay new, as those of other classes; nothing if the checkpoint is a classifier's.
    """
    if not checkpoint or (run := RunFolder.of(checkpoint)).holds_classifier:
        return []
    config, weights = run.read_network(task)
    weights, own = checkpoint_filter_fn(weights), network.state_dict()
    if config["class_names"] != list(class_names):
        weights = {name: w for name, w in weights.items() if not any(layer in name for layer in network.class_layers)}
    stems = [
        name
        for name, tensor in weights.items()
        if name in own and tensor.ndim == 4 and tensor.shape[1] == 3 != own[name].shape[1]
    ]
    if network.backbone.in_chans != 3:
        weights |= {name: adapt_input_conv(network.backbone.in_chans, weights[name]) for name in stems}
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    network.load_state_dict(fitting, strict=False)
    return [name for name, _ in network.named_parameters() if name not in fitting]


def load_network(folder: str | Path | RunFolder, task: str, make: Callable[..., Network]) -> tuple[Network, dict[str, Any]]:
    """Load a network that was saved with how to make it.

    Args:
        folder: Of a run.
        task: What the network is for.
        make: Takes a `Backbone` and what is stored.

    Returns:
        The network in eval mode, and all that is stored with it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds something else or is damaged.
    """
    run = RunFolder.of(folder)
    config, weights = run.read_network(task)
    weights = checkpoint_filter_fn(weights)
    network = Fields(rename(config["network"], "network"), f"{run.path / CONFIG}: network")
    _check_arguments(network, make, len(config["class_names"]))
    backbone = _read_backbone(network, weights)
    arguments = {name: value for name, value in network.values.items() if name != "backbone"}
    try:
        with torch.device("meta"):  # which takes no memory, whatever config.json says
            check_tensors(weights, make(backbone, **arguments))
        model = make(backbone, **arguments)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{run.weights}: cannot be loaded: {' '.join(str(error).split())}") from error
    return model.eval(), config
