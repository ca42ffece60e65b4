"""Fine-tuning few parameters of a model of timm, whose others stay: LoRA, AdaptFormer, the classifier alone.

LoRA (Hu et al., 2021, arXiv 2106.09685) adds a product of two small matrices to the weight of a linear layer; peft trains it.
AdaptFormer (Chen et al., 2022, arXiv 2205.13535) puts a bottleneck beside each MLP; without the paper's dropout. Both begin as
the model is without them. The statistics of BatchNorm stay, and so do the norms' weights.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .groupmixformer import Mlp


class AdaptFormer(nn.Module):
    """An MLP and, beside it, a bottleneck with ReLU, whose result is scaled and added; same shapes as the MLP.

    Args:
        mlp: With linear layers fc1 and fc2; over the channels of maps (B, D, H, W) if it is ours, else of (..., D).
        rank: Width of the bottleneck.
        scale: Of what it adds.
    """

    def __init__(self, mlp: Any, rank: int, scale: float) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": mlp.fc1.weight.device, "dtype": mlp.fc1.weight.dtype}
        self.base_layer, self.scale, self.of_maps = mlp, scale, isinstance(mlp, Mlp)
        self.down = nn.Linear(mlp.fc1.in_features, rank, **dd)
        self.up = nn.Linear(rank, mlp.fc2.out_features, **dd)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the MLP gives, adapted."""
        y = x.permute(0, 2, 3, 1) if self.of_maps else x
        y = self.up(F.relu(self.down(y))) * self.scale
        return self.base_layer(x) + (y.permute(0, 3, 1, 2) if self.of_maps else y)


def base_name(name: str) -> str:
    """Return the name that a tensor has in the model without adapters."""
    return re.sub(r"\.base_layer\b", "", name)


def _linear_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    found = [name for name in linear if name.rpartition(".")[2] in targets]
    missing = set(targets) - {name.rpartition(".")[2] for name in found}
    if missing:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(f"{type(model).__name__} has no linear layers {', '.join(sorted(missing))}: it has {there}")
    return found


def lora_scale(adapter: Mapping[str, Any]) -> float:
    """Return what LoRA's products are multiplied by: alpha, twice the rank by default, over the rank."""
    return (adapter["alpha"] or 2 * adapter["rank"]) / adapter["rank"]


def add_adaptformer(model: nn.Module, adapter: Mapping[str, Any]) -> None:
    """Put a bottleneck beside each MLP of a model, whose scale is alpha, 0.1 by default."""
    found = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    if not found or any(type(getattr(model.get_submodule(name), "fc1", None)) is not nn.Linear for name in found):
        raise ValueError(f"{type(model).__name__} has no MLPs of linear layers fc1 and fc2, which adaptformer is for: use lora")
    for name in found:
        model.set_submodule(name, AdaptFormer(model.get_submodule(name), adapter["rank"], adapter["alpha"] or 0.1))


def add_adapters(model: Any, adapter: Mapping[str, Any]) -> None:
    """Freeze a classifier but for its last layer, and put in adapters; it is changed.

    Args:
        model: A `GroupMixFormer` or another model of timm.
        adapter: ``kind`` (lora, adaptformer or linear_probe), ``rank``, ``alpha`` or None, and ``targets``, the names of the
            linear layers for lora; in ``base``, what the model is. Becomes the model's attribute `adapter`.

    Raises:
        ValueError: If the model has no such layers.
        ModuleNotFoundError: If peft is missing, for lora.
    """
    model.requires_grad_(False)
    if adapter["kind"] == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        names, rank = _linear_layers(model, adapter["targets"]), adapter["rank"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=lora_scale(adapter) * rank, target_modules=names), model)
    elif adapter["kind"] == "adaptformer":
        add_adaptformer(model, adapter)
    model.adapter = dict(adapter)
    for name in trained_names(model):
        model.get_parameter(name).requires_grad_(True)


def trained_names(model: Any) -> set[str]:
    """Return the names of the parameters of adapters and of the classifier."""
    layers = [model.get_classifier()]
    for module in model.modules():
        layers += [module.down, module.up] if isinstance(module, AdaptFormer) else []
    trained = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in trained or ".lora_" in name}


def freeze_statistics(model: nn.Module) -> None:
    """Let the BatchNorm of a model in training normalise as in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def merge_lora(model: nn.Module) -> None:
    """Put linear layers in the place of those that peft adapted, with the products in their weights."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())


def merged_tensors(model: nn.Module, tensors: Mapping[str, Tensor], adapter: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a model with those of LoRA and the classifier that were trained on it; needs no peft.

    Raises:
        ValueError: If these are not the tensors of such adapters.
    """
    layers = _linear_layers(model, adapter["targets"]) if adapter["kind"] == "lora" else []
    pairs = {name: (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight") for name in layers}
    expected = trained_names(model) | {name for pair in pairs.values() for name in pair}
    if tensors.keys() != expected:
        different = sorted(tensors.keys() ^ expected)
        raise ValueError(f"its tensors are not those of {adapter['kind']} and a classifier: {', '.join(different[:3])}")
    merged = model.state_dict() | {name: tensors[name] for name in trained_names(model)}
    for name, (down, up) in pairs.items():
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + tensors[up] @ tensors[down] * lora_scale(adapter)
    return merged
