"""What detectors and segmenters share: a backbone of timm under their own layers, new, from a checkpoint or as it was saved."""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from .checkpoint import architecture, load_model, model_name, read_network, task_of
from .groupmixformer import GroupMixFormer


@functools.cache
def _any_size(name: str) -> dict[str, Any]:
    """Return what makes a model take pictures of any size: Swin and its kin must be told, others need nothing."""
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
    """A backbone by name, so that it can be made again.

    Attributes:
        name: Of timm.
        arguments: Of its constructor, where they are not those of the name: widths, depths and MLP ratios.
    """

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def options(self, drop_path_rate: float = 0.0, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the arguments of ``timm.create_model`` for its features, with `weights` of the whole classifier."""
        options: dict[str, Any] = {**self.arguments, "features_only": True}
        if drop_path_rate:
            options["drop_path_rate"] = drop_path_rate
        if weights is not None:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(weights)}}
        if self.name.startswith("groupmixformer"):
            options["feature_cls"] = "getter"  # keeps the network whole, with its gradient checkpointing and layer groups
        return {**options, **_any_size(self.name)}

    def indices(self, strides: Sequence[int]) -> list[int]:
        """Return timm's indices of the features of these strides.

        Raises:
            ValueError: If the model has no such features.
        """
        try:
            with torch.device("meta"):
                found: Any = timm.create_model(self.name, **self.options()).feature_info
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.name} does not serve as a backbone for pictures of any size: {reason}") from error
        by_stride = dict(zip(found.reduction(), found.out_indices, strict=True))
        if missing := [stride for stride in strides if stride not in by_stride]:
            raise ValueError(
                f"{self.name} has features of strides {found.reduction()}, expected {missing} too: choose a hierarchical "
                "model, such as a groupmixformer, resnet50 or pvt_v2_b2"
            )
        return [by_stride[stride] for stride in strides]


class Dense(nn.Module):
    """A network whose first part is a backbone of timm; `body` gives it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    @abstractmethod
    def body(self) -> Any:
        """The features of timm's model."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone in the backward pass.

        Raises:
            ValueError: If it cannot do that.
        """
        network: Any
        for network in (getattr(self.body, "model", None), self.body):
            if hasattr(network, "set_grad_checkpointing"):
                network.set_grad_checkpointing(enable)
                return
        raise ValueError(f"{self.backbone.name} has no gradient checkpointing: set grad_checkpointing to false")

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of the backbone that its authors do not decay."""
        network = getattr(self.body, "model", self.body)
        names: set[str] = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()
        own = {id(parameter): name for name, parameter in self.named_parameters()}
        return {own[id(parameter)] for name, parameter in network.named_parameters() if name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return, as timm's optimiser asks, what gives the layer of a parameter: the backbone's, or the last for all others."""
        with torch.device("meta"):
            whole: Any = timm.create_model(self.backbone.name, **self.backbone.arguments)
        # The features of a model have its names, with underscores for some of the dots.
        layers = {
            name.replace(".", "_"): layer
            for name, layer in group_parameters(whole, whole.group_matcher(coarse=coarse), reverse=True).items()
        }
        own = {id(parameter): name for name, parameter in self.body.named_parameters()}
        in_body = {name: own[id(p)] for name, p in self.named_parameters() if id(p) in own}
        last = max(layers.values())
        return lambda name: layers.get(in_body.get(name, "").removeprefix("model.").replace(".", "_"), last)


def open_backbone(variant: str, checkpoint: str | None, task: str) -> tuple[Backbone, dict[str, Tensor] | None]:
    """Find the backbone that a recipe asks for.

    Args:
        variant: Its name; that of the checkpoint counts more.
        checkpoint: A classifier that `load_model` reads, or the folder of a run for `task`; none for new weights.
        task: What the network is for.

    Returns:
        The backbone and the classifier's weights, if there is one.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If there is no such model, or the checkpoint cannot be used.
    """
    if not checkpoint:
        return Backbone(model_name(variant)), None
    if task_of(checkpoint) != "classification":
        config, _ = read_network(checkpoint, task)
        return Backbone(**config["network"]["backbone"]), None
    source = load_model(checkpoint)
    weights = source.state_dict()
    cfg = source.pretrained_cfg
    if cfg["input_size"][0] != 3:
        raise ValueError(f"{checkpoint}: made for {cfg['input_size'][0]} channels, expected 3: pictures are read as RGB")
    if not isinstance(source, GroupMixFormer):
        return Backbone(cfg["architecture"]), weights
    found = architecture(weights)
    return Backbone(cfg["architecture"], {key: found[key] for key in ("embed_dims", "depths", "mlp_ratios")}), weights


def start_from(network: Dense, checkpoint: str | None, task: str) -> list[str]:
    """Give a network the weights of a run for the same task, where their shapes agree.

    Returns:
        The names of the parameters that stay new, as those of other classes; nothing if the checkpoint is a classifier's.
    """
    if not checkpoint or task_of(checkpoint) == "classification":
        return []
    _, weights = read_network(checkpoint, task)
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    network.load_state_dict(fitting, strict=False)
    return [name for name, _ in network.named_parameters() if name not in fitting]
