"""Names before 0.1.0 was released, so that recipes, options and run folders of then still load; aliases of options."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# By section: fields of a recipe, and `network`, the arguments of a detector or segmenter in config.json.
FIELDS: dict[str, dict[str, str]] = {
    "": {
        "variant": "model",
        "accumulate": "grad_accum_steps",
        "bad_limit": "max_unreadable",
        "skip_limit": "max_skipped_steps",
    },
    "detector": {
        "width": "fpn_channels",
        "regions": "rois_per_image",
        "objects": "max_detections",
        "frozen_statistics": "freeze_bn",
    },
    "segmenter": {"auxiliary": "aux_loss_weight", "frozen_statistics": "freeze_bn"},
    "network": {
        "width": "fpn_channels",
        "regions": "rois_per_image",
        "objects": "max_detections",
    },
}
# What other tools call options that everyone types.
ALIASES = {"lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay", "batch": "batch_size", "imgsz": "image_size"}
PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}

# Parts of a checkpoint of training, which Lightning names after classes.
STATE = {"Loaders": "DataModule", "Record": "MetricsCallback", "Patience": "EarlyStopping"}


def rename(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Return fields under the names of today, with those of the sections inside.

    Args:
        values: Fields of a recipe, or of one of its sections, or of a network.
        section: Its name in `FIELDS`.

    Raises:
        ValueError: If a field has both its names.
    """
    names, result = FIELDS.get(section, {}), {}
    for name, value in values.items():
        new = names.get(name, name)
        if new in result or (new != name and new in values):
            raise ValueError(f"{name} is an old name of {new}, and both are given: leave one out")
        if not section and name == "precision" and isinstance(value, str):
            value = PRECISIONS.get(value, value)
        result[new] = rename(value, name) if not section and isinstance(value, dict) and name in FIELDS else value
    return result


def rename_options(words: Sequence[str]) -> list[str]:
    """Return dotted options of a recipe, such as ``--detector.width 64``, under the names of today; aliases are understood."""
    result: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            section, dot, field = ALIASES.get(name, name).rpartition(".")
            name = f"{section}{dot}{FIELDS.get(section, {}).get(field, field)}"
            word = f"--{name}{equals}{PRECISIONS.get(value, value) if name == 'precision' else value}"
        elif result and result[-1] == "--precision":
            word = PRECISIONS.get(word, word)
        result.append(word)
    return result


def rename_state(checkpoint: dict[str, Any]) -> None:
    """Rename the parts of a checkpoint of training in place."""
    for states in (checkpoint, checkpoint.get("callbacks", {})):
        for key in list(states):
            name, brace, arguments = key.partition("{")
            if name in STATE:
                states[STATE[name] + brace + arguments] = states.pop(key)


def join_segments(checkpoint: dict[str, Any], groups: Sequence[Sequence[str]]) -> None:
    """Join in place what an older checkpoint of training holds of each segment, in the optimizer's state too.

    Args:
        checkpoint: Lightning's.
        groups: Names of today's parameters, by the optimizer's groups.

    Raises:
        ValueError: If the optimizer's state does not belong to these parameters.
    """
    import torch  # the names above are read for the help of gmf train, which need not wait for it

    from ..models.groupmixformer import checkpoint_filter_fn, joined_name

    before = list(checkpoint["state_dict"])
    checkpoint["state_dict"] = checkpoint_filter_fn(checkpoint["state_dict"])
    for optimizer in checkpoint["optimizer_states"]:
        state: dict[int, dict[str, Any]] = {}
        number = itertools.count()
        for names, group in zip(groups, optimizer["param_groups"], strict=True):
            parts: dict[str, list[Any]] = {name: [] for name in names}
            # An optimizer numbers parameters in their order, group by group.
            joined = [name for name in map(joined_name, before) if name in parts]
            if len(joined) != len(group["params"]):
                raise ValueError(
                    "the optimizer's state is not of this model's parameters: continue with the version that began"
                )
            for old, name in zip(group["params"], joined, strict=True):
                parts[name].append(optimizer["state"].get(old, {}))
            group["params"] = list(itertools.islice(number, len(names)))
            for new, (first, *others) in zip(group["params"], parts.values(), strict=True):
                state[new] = {
                    key: torch.cat([value, *(other[key] for other in others)]) if others and value.dim() else value
                    for key, value in first.items()
                }
        optimizer["state"] = {new: values for new, values in state.items() if values}
