"""CUDA graphs: the kernels of a network, recorded once for a size of images, then replayed without Python's overhead."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RECORDED = 3  # the call with a size at which it is recorded; those before warm up
MOST = 8  # sizes, as each keeps the memory of a forward pass


def _copy(output: Any) -> Any:
    if isinstance(output, dict):
        return {name: _copy(part) for name, part in output.items()}
    return output.clone() if isinstance(output, Tensor) else [_copy(part) for part in output]


def record(network: Callable[[Tensor], Any], images: Tensor) -> tuple[Tensor, Callable[[], None], Any]:
    """Record a call; return the images that it reads, what replays it, and the output that this writes."""
    graph, images = torch.cuda.CUDAGraph(), images.clone()
    casts = torch.is_autocast_enabled("cuda")
    # Weights that autocast keeps for the next call would not outlive this one.
    with (
        torch.autocast("cuda", torch.get_autocast_dtype("cuda"), casts, cache_enabled=False),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        output = network(images)
    return images, graph.replay, output


def replay_repeated(network: nn.Module) -> None:
    """Have a network record its calls without gradients for images (B, C, H, W) of sizes that come again, and replay them.

    Where that fails, it stays as it is, and a warning says so.

    Args:
        network: In eval mode; gives a tensor, or a list or dictionary of them, and takes no way that depends on values.
    """
    eager: Callable[[Tensor], Any] = network.forward
    calls, recorded, lock = Counter[Any](), dict[Any, Any](), threading.Lock()
    device = next(network.parameters()).device

    def forward(images: Tensor) -> Any:
        nonlocal device
        if torch.is_grad_enabled() or images.device != device:
            return eager(images)
        casts = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        size = (images.shape, images.dtype, casts, torch.is_inference_mode_enabled())
        with lock:
            calls[size] += 1
            if calls[size] >= RECORDED and size not in recorded and len(recorded) < MOST:
                try:
                    recorded[size] = record(eager, images)
                except RuntimeError as error:
                    reason = str(error).partition("\n")[0]
                    logging.getLogger(__name__).warning(f"no CUDA graphs: {reason}")
                    device = torch.device("meta")  # never again
            if size in recorded:
                still, replay, output = recorded[size]
                still.copy_(images)
                replay()
                return _copy(output)
        return eager(images)

    network.forward = forward
