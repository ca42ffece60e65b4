"""Models of equal cost: the width and the MLPs of one scaled to the parameters or multiply-accumulates of another."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models.checkpoint import model_name
from ..models.mixers.replace import is_put_in
from ..tasks.classification.training import create_classifier
from ..training.recipe import Recipe

WIDTHS, HIDDEN = ("embed_dims", "embed_dim", "dims"), ("mlp_ratios", "mlp_ratio")  # names that timm's models have for them
UNITS = (8, 10)  # widths are multiples of one of them: 10 suits Group-Mix Attention, 8 most others
TOLERANCE = 0.02
FINEST, TRIALS = 1.03, 12  # ratio of a width to the next one that is tried; how many are


def costs(recipe: Recipe, class_names: Sequence[str]) -> dict[str, int]:
    """Return parameters and macs, the multiply-accumulates of one image, of a recipe's model; nothing is computed."""
    size = (1, 3, recipe.image_size, recipe.image_size)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_classifier(recipe, class_names).eval()
        model(torch.empty(size))
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def _arguments(recipe: Recipe, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what the constructor of a recipe's model gets, which timm keeps in the function of the variant."""
    given: dict[str, Any] = {}
    with torch.device("meta"):
        kind: Any = type(create_classifier(recipe, class_names))
        real = kind.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(real).bind(self, *args, **kwargs)
            bound.apply_defaults()
            given.update(bound.arguments)
            real(self, *args, **kwargs)

        with mock.patch.object(kind, "__init__", noted):
            create_classifier(recipe, class_names)
    return given


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(item) for item in value] if isinstance(value, list | tuple) else change(value)


def _rounded(dims: Any, factor: float, unit: int) -> Any:
    return _each(dims, lambda dim: max(unit, round(dim * factor / unit) * unit))


def _square(dims: Any) -> float:
    return sum(d * d for d in dims) if isinstance(dims, list | tuple) else dims * dims


def _told(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in options.items())


def match(recipe: Recipe, class_names: Sequence[str], kind: str, target: int) -> tuple[dict[str, Any], str]:
    """Scale the width of a recipe's model to a cost, and the MLPs' hidden width by what the rounding of the width leaves.

    Where a mixer is put into another network than a GroupMixFormer, all but its MLPs stays as it is.

    Args:
        recipe: Names the model, its options and the size of the images.
        class_names: Of the data.
        kind: ``parameters`` or ``macs``.
        target: What they should be, to 2 %.

    Returns:
        Options for the model's constructor, and what was scaled, in words.

    Raises:
        ValueError: If the model has neither, or they do not reach the target.
    """
    arguments = _arguments(recipe, class_names)
    stays = is_put_in(model_name(recipe.model), recipe.model_options)
    width = None if stays else next((name for name in WIDTHS if arguments.get(name)), None)
    hidden = next((name for name in HIDDEN if arguments.get(name)), None)

    def cost(options: Mapping[str, Any]) -> int | None:
        try:
            return costs(replace(recipe, model_options={**recipe.model_options, **options}), class_names)[kind]
        except (RuntimeError, ValueError, AssertionError):  # a width that the model cannot have
            return None

    full = cost({})
    assert full is not None
    options: dict[str, Any] = {}
    reached = full
    if width and abs(full / target - 1) > TOLERANCE / 2:
        factors = [(target / full) ** 0.5 * FINEST**i for i in range(-10, 11)]
        candidates = [_rounded(arguments[width], factor, unit) for unit in UNITS for factor in factors]
        widths = {str(dims): dims for dims in candidates}
        best = arguments[width]
        enough = TOLERANCE * (2 if hidden else 0.5)
        for _ in range(TRIALS):
            if not widths or abs(reached / target - 1) < enough:
                break
            scale = reached / _square(best)  # a cost is nearly that of products of widths with widths
            name = min(widths, key=lambda name: abs(scale * _square(widths[name]) / target - 1))
            trial = widths.pop(name)
            at = cost({width: trial})
            if at and abs(at / target - 1) < abs(reached / target - 1):
                options, reached, best = {width: trial}, at, trial
    if hidden and abs(reached / target - 1) > TOLERANCE / 10:
        slope = (cost({**options, hidden: _each(arguments[hidden], lambda r: r * 2)}) or reached) - reached
        ratio = 1 + (target - reached) / slope if slope else 0
        if 0.25 <= ratio <= 4:
            options = {**options, hidden: _each(arguments[hidden], lambda r: round(r * ratio, 3))}
            reached = cost(options) or 0
    if abs(reached / target - 1) > TOLERANCE:
        unscaled = "it has neither a width nor an MLP ratio that can be scaled so"
        scaled = f"{_told(options)} gives {reached:,}" if options else unscaled
        raise ValueError(f"{recipe.model}: cannot be brought from {full:,} to {target:,} {kind}: {scaled}: leave out --match")
    return options, _told(options)
