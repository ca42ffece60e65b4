"""GroupMixFormer: Group-Mix Attention (arXiv 2311.15157) for timm, PyTorch and the tools around them."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deploy.hub import push_to_hub
    from .models.attention_maps import attention_maps
    from .models.checkpoint import load_checkpoint
    from .models.fuse import fuse
    from .models.groupmixformer import GroupMixAttention, GroupMixFormer
    from .models.mixers.replace import replace_attention
    from .run import Run
    from .tasks.detection.model import load_detector
    from .tasks.segmentation.model import load_segmenter

__all__ = [
    "GroupMixAttention",
    "GroupMixFormer",
    "Run",
    "attention_maps",
    "fuse",
    "load_checkpoint",
    "load_detector",
    "load_segmenter",
    "push_to_hub",
    "replace_attention",
]
__version__ = "0.1.0"

# Imported when they are asked for: not everyone needs them all, and segmentation_models_pytorch is an extra.
_PLACES = {
    "GroupMixAttention": "models.groupmixformer",
    "GroupMixFormer": "models.groupmixformer",
    "Run": "run",
    "attention_maps": "models.attention_maps",
    "fuse": "models.fuse",
    "load_checkpoint": "models.checkpoint",
    "load_detector": "tasks.detection.model",
    "load_segmenter": "tasks.segmentation.model",
    "push_to_hub": "deploy.hub",
    "replace_attention": "models.mixers.replace",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    found = globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    return found


# This registers the variants with timm. It takes seconds, so gmf waits until it has understood what to do.
if Path(*sys.argv[:1]).stem != "gmf":
    import_module(".models.groupmixformer", __name__)
