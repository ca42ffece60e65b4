"""Which implementation of an operation may run: how PyTorch runs what is called, and whether Triton's kernels serve a device.

The private calls of PyTorch that tell are here. Where a version of PyTorch lacks one, the answer is the one that leaves
everything to PyTorch's own operators.
"""

import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "ENABLED",
    "INTERPRETED",
    "MAX_SEGMENT_DIM",
    "has_saved_tensor_hooks",
    "is_eager",
    "is_eager_or_compiled",
    "kernels_available",
    "version_of",
]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # not on macOS and Windows
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs the kernels on the CPU
ENABLED = os.environ.get("GROUPMIXFORMER_KERNELS") != "0"
# A wider segment needs more shared memory than the smallest of the GPUs that the kernels are for has: 99 KiB a block.
MAX_SEGMENT_DIM = 128
_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)

_known_devices: dict[torch.device, bool] = {}


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


def version_of(x: Tensor) -> int:
    """Return how often a tensor's memory was changed in place."""
    return x._version


def _runs_on(device: torch.device) -> bool:
    """Tell whether a GPU is new enough and Triton can start kernels, for which it needs a C compiler and Python's headers."""
    if device not in _known_devices:
        if not torch.cuda.is_available():  # the device of a tensor that is not real
            return False
        _known_devices[device] = torch.cuda.get_device_capability(device) >= (8, 0)
        if _known_devices[device]:
            import triton.runtime

            try:
                triton.runtime.driver.active.get_current_target()
            except Exception as error:  # of a compiler, a linker, a driver
                warnings.warn(
                    f"plain PyTorch takes the place of the fused kernels, which Triton cannot start here ({error}): "
                    "install a C compiler and Python's headers, or set GROUPMIXFORMER_KERNELS=0",
                    stacklevel=2,
                )
                _known_devices[device] = False
    return _known_devices[device]


# A compiler takes the answer as a constant: what torch.compiler.assume_constant_result does, but that imports the compiler.
_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_available(x: Any) -> bool:
    """Tell whether Triton's kernels may compute with `x`, and its gradient is not asked for: they have none.

    They serve NVIDIA GPUs from Ampere on in float32, float16 and bfloat16, in eager mode and under torch.compile, unless
    GROUPMIXFORMER_KERNELS=0 is in the environment; with TRITON_INTERPRET=1 also the CPU.
    """
    if not (ENABLED and TRITON_INSTALLED) or torch.is_grad_enabled() or not is_eager_or_compiled():
        return False
    if not isinstance(x, Tensor) or x.dtype not in _KERNEL_TYPES:  # a proxy of torch.fx, float64
        return False
    if x.is_cuda:
        return torch.version.cuda is not None and _runs_on(x.device)
    return INTERPRETED and x.device.type == "cpu"
