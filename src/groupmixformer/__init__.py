"""GroupMixFormer: Group-Mix Attention (arXiv 2311.15157) for timm, PyTorch and the tools around them."""

from .checkpoint import load_checkpoint
from .explain import attention_maps
from .fuse import fuse
from .groupmixformer import GroupMixAttention, GroupMixFormer
from .hub import push_to_hub

__all__ = ["GroupMixAttention", "GroupMixFormer", "attention_maps", "fuse", "load_checkpoint", "push_to_hub"]
__version__ = "0.1.0"
