"""Nested widths of the MLPs: the first hidden units of each are a smaller network inside the large one.

MatFormer (Devvrit et al., 2023, arXiv 2310.07707, Sec. 3) trains a network at several widths of its MLPs, one drawn for each
step; afterwards any of them is cut out. The attention and everything else is shared.
"""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .checkpoint import mlp_ratio, model_arguments
from .groupmixformer import GroupMixFormer, Mlp


def sliced_weights(model: nn.Module, width: float) -> dict[str, Tensor]:
    """Return the weights of the MLPs at a width, views of those of the model, by their names in it.

    Args:
        model: A `GroupMixFormer`.
        width: Share of the hidden units that are kept, the first ones, from above 0 to 1.

    Raises:
        ValueError: If the width is none, or the model is not a GroupMixFormer.
    """
    if not isinstance(model, GroupMixFormer):
        raise ValueError(f"widths are nested in a GroupMixFormer, and this is a {type(model).__name__}")
    if not 0 < width <= 1:
        raise ValueError(f"got width {width}, expected a share of the MLPs' hidden units above 0 and up to 1")
    sliced: dict[str, Tensor] = {}
    for name, mlp in model.named_modules():
        if isinstance(mlp, Mlp):
            hidden = max(1, round(mlp.fc1.out_features * width))
            sliced[f"{name}.fc1.weight"] = mlp.fc1.weight[:hidden]
            sliced[f"{name}.fc1.bias"] = mlp.fc1.bias[:hidden]
            sliced[f"{name}.fc2.weight"] = mlp.fc2.weight[:, :hidden]
    return sliced


def forward_at(model: nn.Module, images: Tensor, width: float) -> Any:
    """Return what a model gives at a width of its MLPs; gradients reach the weights that take part."""
    return model(images) if width == 1 else functional_call(model, sliced_weights(model, width), (images,))


def extract(model: Any, width: float) -> GroupMixFormer:
    """Cut out the network of a width, an ordinary one with smaller `mlp_ratios`.

    Args:
        model: A `GroupMixFormer`; it is not changed.
        width: As for `sliced_weights`.

    Returns:
        A network of its own, in eval mode, which computes what `model` does at that width.

    Raises:
        ValueError: As `sliced_weights` does, or if the model has adapters.
    """
    if getattr(model, "adapter", None):
        raise ValueError("got a model with adapters, expected one without: write it whole first (gmf convert)")
    weights = model.state_dict() | {name: tensor.detach() for name, tensor in sliced_weights(model, width).items()}
    arguments = model_arguments(model)
    ratios = [
        mlp_ratio(weights[f"stages.{i}.blocks.0.mlp.fc1.weight"].shape[0], dim) for i, dim in enumerate(arguments["embed_dims"])
    ]
    smaller = GroupMixFormer(**arguments | {"mlp_ratios": ratios}, global_pool=model.head.global_pool.pool_type)
    smaller.load_state_dict(weights)
    smaller.pretrained_cfg = dict(model.pretrained_cfg)  # type: ignore[assignment]
    return smaller.eval()
