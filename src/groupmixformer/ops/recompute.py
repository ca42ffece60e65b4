"""Training in less memory: results that cost little are not kept for the backward pass, but computed again there.

Two means. `checkpoint` keeps the input of a whole block and runs the block again. `forget` is for norms and activations: within
a `scope`, neither they nor the layers that read their results keep these, and the backward pass computes them again from what
went in. No convolution and no matrix product runs twice then.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm.models
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import dispatch

__all__ = ["checkpoint", "forget", "scope"]


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


def checkpoint(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module and keep `x` alone; running it again does not move running statistics again."""
    if torch.compiler.is_compiling():  # the compiler recomputes no update of a buffer, and takes no context
        return timm.models.checkpoint(module, x)
    contexts = (nullcontext(), _statistics_kept(module))
    return timm.models.checkpoint(module, x, use_reentrant=False, context_fn=lambda: contexts)


class _Forgotten:
    """The result of a function, computed when it is first asked for; its input may be a view of a forgotten result too."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, source: "_Forgotten | None") -> None:
        self.function, self.source = function, source
        self.x = x.detach() if source is None else None
        self.view = x.size(), x.stride(), x.storage_offset()
        self.computed: Tensor | None = None
        self.autocast: AbstractContextManager[Any] = nullcontext()
        device = x.device.type
        if torch.amp.is_autocast_available(device):
            self.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def result(self) -> Tensor:
        if self.computed is None:
            x = self.x if self.source is None else self.source.result().as_strided(*self.view)
            assert x is not None
            with torch.no_grad(), self.autocast:
                self.computed = self.function(x)
        return self.computed


class _Scope(saved_tensors_hooks):
    """Looks at each tensor that is to be kept for the backward pass, and lets go of those that are forgotten."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        # By the address of its memory, which stays its own as long as the tensor lives.
        self.results: dict[int, tuple[weakref.ref[Tensor], int, _Forgotten]] = {}

    def __enter__(self) -> None:
        super().__enter__()
        _active.scope = self

    def __exit__(self, *args: object) -> None:
        _active.scope = None
        super().__exit__(*args)
        self.results.clear()  # from here on only the backward pass refers to what is to be computed again

    def find(self, tensor: Tensor) -> _Forgotten | None:
        found = self.results.get(tensor.untyped_storage().data_ptr())
        # What a hook has changed in place is no longer what was computed.
        return found[2] if found and found[0]() is not None and dispatch.version_of(tensor) == found[1] else None

    def forget(self, result: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        forgotten = _Forgotten(function, x, self.find(x))
        self.results[result.untyped_storage().data_ptr()] = weakref.ref(result), dispatch.version_of(result), forgotten

    def _pack(self, tensor: Tensor) -> tuple[Any, ...]:
        forgotten = self.find(tensor)
        if forgotten is None:
            return tensor, dispatch.version_of(tensor)
        return forgotten, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: tuple[Any, ...]) -> Tensor:
        if isinstance(packed[0], _Forgotten):
            forgotten, *view = packed
            return forgotten.result().as_strided(*view)
        tensor: Tensor = packed[0]
        version = dispatch.version_of(tensor)
        if version != packed[1]:  # PyTorch looks only at what it keeps itself
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} needed for the gradient was modified in place: it is at version "
                f"{version}, expected {packed[1]}. Take the gradient before the optimizer's step or another change"
            )
        return tensor


class _Active(threading.local):
    scope: _Scope | None = None


_active = _Active()


def _is_large(x: Tensor) -> bool:
    # The bookkeeping takes tens of microseconds, behind which a large tensor hides.
    return x.device.type != "meta" and x.numel() >= (2**15 if x.device.type == "cpu" else 2**21)


def scope(x: Tensor) -> AbstractContextManager[None]:
    """Return the context within which `forget` has an effect, for modules that read `x`.

    It has none where maps are small, where there is no gradient to come, where a compiler chooses for itself, and under
    `torch.func`. Nor within other hooks on saved tensors, such as those of `checkpoint`, which decide then.
    """
    if (
        not dispatch.is_eager()
        or not torch.is_grad_enabled()
        or not isinstance(x, Tensor)  # a proxy of torch.fx
        or not _is_large(x)
        or _active.scope is not None
        or dispatch.has_saved_tensor_hooks()
    ):
        return nullcontext()
    return _Scope()


def forget(result: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Tell that `result` is what a cheap function gives for `x`: of a large one in a `scope`, `x` alone is kept."""
    if torch.compiler.is_compiling() or _active.scope is None or not isinstance(x, Tensor):  # a proxy of torch.fx
        return
    if _is_large(x) and x.requires_grad:
        _active.scope.forget(result, function, x)
