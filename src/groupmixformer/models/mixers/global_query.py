"""Queries of the whole image for the keys of a window: GC ViT's."""

from typing import TYPE_CHECKING, Any, Final

import timm.models
import torch
from timm.models.gcvit import FeatureBlock, WindowAttentionGlobal
from torch import Tensor, nn

from ..groupmixformer import Block
from ..layers import Blocks
from .base import Mixer, OptTensor, additive, average_to, by_stage, heads_of, merge, multi_head, partition


class GlobalQuery(Mixer):
    """Windows of 7; in odd blocks the queries are not the window's but the image's: GC ViT (arXiv 2206.09959).

    The section on global queries: those of an image are made once a stage from its input, by timm's `FeatureBlock` and average
    pooling to one window, and every window shares them: `GlobalQueryBlocks` passes them on. A mixer that stands alone makes
    them of its own input. The layers are timm's, whose window of 14 in the third stage is 7 here. Padded keys are masked,
    where timm takes multiples alone.

    Cost per token: 4D^2 + 98D with queries of its own, 3D^2 + 98D with global ones. Making these costs D^2 + 9D a token, a
    quarter of that at each further of 3, 2, 1, 0 reductions, and D^2/2 an image each; the block at depth 1 does it.
    """

    def __init__(self, dim: int, *, stage: int = 0, depth: int = 0, window: int = 7, head_dim: int = 32, **dd: Any) -> None:
        super().__init__()
        self.dim, self.window, self.levels = dim, window, by_stage((3, 2, 1, 0), stage)
        self.use_global = depth % 2 == 1
        self.attn = WindowAttentionGlobal(dim, heads_of(dim, head_dim), (window, window), self.use_global, **dd)
        # That of the first block that needs it serves all of its stage.
        self.query = FeatureBlock(dim, self.levels, **dd) if depth == 1 else nn.Identity()

    def _macs(self, height: int, width: int) -> float:
        D = self.dim
        total = height * width * ((3 if self.use_global else 4) * D**2 + 2 * self.window**2 * D)
        if not isinstance(self.query, nn.Identity):
            for _ in range(max(1, self.levels)):
                total += height * width * (D**2 + 9 * D) + D**2 // 2
                height, width = (height + 1) // 2, (width + 1) // 2
        return total

    def make_query(self, x: Tensor) -> Tensor:
        """Return the global queries (B, T, D) for the input of a stage (B, D, H, W)."""
        return average_to(self.query(x), self.window).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, query: OptTensor = None) -> Tensor:
        """Return (B, D, H, W); `query` (B, T, D) are the global queries, by default made of `x`."""
        _, _, H, W = x.shape
        windows, real, seen = partition(x.permute(0, 2, 3, 1), self.window, self.window)
        if self.use_global:
            if query is None:
                query = self.make_query(x)
            q = query[:, None].expand(-1, real.shape[0], -1, -1).flatten(0, 1)  # (B * n, T, D), image by image
            k, v = self.attn.qkv(windows).chunk(2, dim=2)
        else:
            q, k, v = self.attn.qkv(windows).chunk(3, dim=2)
        windows = multi_head(q, k, v, self.attn.num_heads, additive(self.attn.rel_pos.get_bias(), seen))
        return merge(self.attn.proj(windows), self.window, self.window, H, W).permute(0, 3, 1, 2)


class GlobalQueryBlock(Block):
    """A block whose mixer is given the global queries of its stage. (B, D, H, W) -> same."""

    def forward(self, x: Tensor, query: OptTensor = None) -> Tensor:
        """Return (B, D, H, W)."""
        x = x + self.cpe(x)
        x = x + self.drop_path1(self.attn(self.norm1(x), query))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class GlobalQueryBlocks(Blocks):
    """The blocks of a stage, all with the global queries that are made of its input. (B, D, H, W) -> same."""

    needs_query: Final[bool]

    if TYPE_CHECKING:  # TorchScript refuses comments on types

        def __getitem__(self, idx: Any) -> Any: ...

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.needs_query = len(blocks) > 1  # a single block has local queries

    def forward(self, input: Tensor) -> Tensor:
        """Return what the last block gives."""
        x = input
        query: OptTensor = None
        if self.needs_query:
            query = self[1].attn.make_query(x)
        for block in self:
            if torch.jit.is_scripting():
                x = block(x, query)
            elif self.grad_checkpointing:
                x = timm.models.checkpoint(block, x, query, use_reentrant=False)
            else:
                x = block(x, query)
        return x
