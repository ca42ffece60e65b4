"""Names before 0.1.0 was released, so that recipes, options and run folders of then still load."""

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
    """Return dotted options of a recipe, such as ``--detector.width 64``, under the names of today."""
    result: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            section, dot, field = name.rpartition(".")
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
