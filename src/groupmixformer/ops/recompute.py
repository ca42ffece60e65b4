"""Training in less memory: results that cost little are not kept for the backward pass, but made again.

Two means. `checkpoint` keeps the input of a whole block and runs the block again. `run` is for norms and activations: within a
`scope` their results are kept by nobody, neither by the module itself nor by the layer that reads them, and the backward pass
makes them again of what went in. No convolution and no matrix product runs twice then.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm.models
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from . import dispatch as modes

__all__ = ["checkpoint", "run", "scope"]


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@contextlib.contextmanager
def _statistics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
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


def checkpoint(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run `modules` in turn and keep `x` alone; recomputing them moves no running statistics again."""
    if torch.compiler.is_compiling():  # the compiler recomputes no update of a buffer, and takes no context
        return timm.models.checkpoint(_run, modules, x)
    return timm.models.checkpoint(
        _run, modules, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(modules))
    )


class _Forgotten:
    """Results of modules in turn, made when they are first asked for."""

    def __init__(self, modules: Sequence[nn.Module], x: Tensor) -> None:
        self.modules, self.x = modules, x.detach()
        self.results: list[Tensor] = []
        device = x.device.type
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(device):
            self.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def __getitem__(self, index: int) -> Tensor:
        if not self.results:
            with torch.no_grad(), self.autocast, _statistics_kept(self.modules):
                x = self.x
                for module in self.modules:
                    x = module(x)
                    self.results.append(x)
        return self.results[index]


class _Scope(saved_tensors_hooks):
    """Looks at each tensor that is to be kept for the backward pass, and lets go of those that `run` has made."""

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        # By the address of a storage, which stays its own as long as a weak reference is held.
        self.made: dict[int, tuple[StorageWeakRef, int, _Forgotten, int]] = {}

    def __enter__(self) -> None:
        super().__enter__()
        _active.scope = self

    def __exit__(self, *args: object) -> None:
        _active.scope = None
        super().__exit__(*args)
        self.made.clear()  # from here on only the backward pass holds what is to be made again

    def run(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        forgotten = _Forgotten(modules, x)
        for index, module in enumerate(modules):
            x = module(x)
            reference = StorageWeakRef(x.untyped_storage())
            self.made[reference.cdata] = reference, x._version, forgotten, index
        return x

    def _pack(self, tensor: Tensor) -> tuple[Any, ...]:
        found = self.made.get(tensor.untyped_storage()._cdata)
        if found is None or tensor._version != found[1]:  # what a hook has changed in place is no longer what was made
            return tensor, tensor._version
        *_, forgotten, index = found
        return forgotten, index, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: tuple[Any, ...]) -> Tensor:
        if isinstance(packed[0], _Forgotten):
            forgotten, index, *view = packed
            return forgotten[index].as_strided(*view)
        tensor: Tensor = packed[0]
        if tensor._version != packed[1]:  # PyTorch looks only at what it keeps itself
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} needed for the gradient was modified in place: it is at version "
                f"{tensor._version}, expected {packed[1]}. Take the gradient before the optimizer's step or another change"
            )
        return tensor


class _Active(threading.local):
    scope: _Scope | None = None


_active = _Active()


def scope() -> AbstractContextManager[None]:
    """Return the context within which `run` keeps nothing of large tensors.

    It does nothing where there is no gradient to come, where a compiler chooses for itself, and under `torch.func`. Nor within
    other hooks on saved tensors, such as those of `checkpoint`, which decide then.
    """
    if (
        not modes.is_at_once()
        or not torch.is_grad_enabled()
        or _active.scope is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        return nullcontext()
    return _Scope()


def run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Run `modules`, which cost little, in turn; of a large `x` in a `scope` the backward pass keeps `x` alone."""
    if torch.compiler.is_compiling() or _active.scope is None or not isinstance(x, Tensor):  # a proxy of torch.fx
        return _run(modules, x)
    # The bookkeeping takes tens of microseconds, behind which a large tensor hides. Synchronised BN would talk to the other
    # processes twice.
    large = x.numel() >= (2**15 if x.device.type == "cpu" else 2**21)
    if large and x.requires_grad and not any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        return _active.scope.run(modules, x)
    return _run(modules, x)
