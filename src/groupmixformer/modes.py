"""How PyTorch runs what is called: at once, or into a graph; with gradients as usual, or by the rules of `torch.func`."""

import torch
from torch.autograd import forward_ad

__all__ = ["is_at_once", "is_exporting", "is_transformed"]


def is_exporting() -> bool:
    """Tell whether `torch.export` runs, whose graphs keep PyTorch's own operators."""
    flag: bool = torch.compiler._is_exporting_flag  # of is_exporting() itself older compilers think that it is always true
    return flag


def is_transformed() -> bool:
    """Tell whether `torch.func` or forward-mode differentiation is at work. A compiler cannot be asked."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_at_once() -> bool:
    """Tell whether operators run as they are called, and their gradients are the usual ones."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting() or is_transformed())
