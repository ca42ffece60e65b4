"""How PyTorch runs what is called: eagerly or into a graph, with gradients as usual or by the rules of `torch.func`.

The private calls of PyTorch that tell are here. Where a version of PyTorch lacks one, the answer is the one that leaves
everything to PyTorch's own operators.
"""

import torch
from torch.autograd import forward_ad

__all__ = ["has_saved_tensor_hooks", "is_eager", "is_eager_or_compiled"]


def is_eager_or_compiled() -> bool:
    """Tell whether operators of our own may run: not in graphs for other programs, nor for derivatives of another kind."""
    try:
        # Of torch.compiler.is_exporting() itself older compilers think that it is always true.
        if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
            return False
        if torch.compiler.is_compiling():  # a compiler cannot be asked about torch.func
            return True
        return torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0
    except AttributeError:
        return False


def is_eager() -> bool:
    """Tell whether operators run as they are called, and their gradients are the usual ones."""
    return not torch.compiler.is_compiling() and is_eager_or_compiled()


def has_saved_tensor_hooks() -> bool:
    """Tell whether hooks such as those of `torch.utils.checkpoint` decide what is kept for the backward pass."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    except AttributeError:
        return True
