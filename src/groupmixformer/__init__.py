"""GroupMixFormer: Group-Mix Attention (arXiv 2311.15157) for timm, PyTorch and the tools around them."""

from .deploy.hub import push_to_hub
from .models.attention_maps import attention_maps
from .models.checkpoint import load_checkpoint
from .models.fuse import fuse
from .models.groupmixformer import GroupMixAttention, GroupMixFormer

__all__ = ["GroupMixAttention", "GroupMixFormer", "attention_maps", "fuse", "load_checkpoint", "push_to_hub"]
__version__ = "0.1.0"
