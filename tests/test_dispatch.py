"""How PyTorch runs what is called is told apart."""

import pytest
import torch
from torch.autograd import forward_ad

from groupmixformer.ops import dispatch

SEEN = []


class Asking(torch.nn.Module):
    """Notes what is said while it runs."""

    def forward(self, x):
        SEEN.append((dispatch.is_eager(), dispatch.is_eager_or_compiled()))
        return 2 * x


def call(module, x):
    module(x)


def differentiate(module, x):
    module(x.requires_grad_()).sum().backward()


def compile_it(module, x):
    torch.compile(module, backend="eager")(x)


def trace(module, x):
    torch.jit.trace(module, (x,), check_trace=False)


def export(module, x):
    torch.export.export(module, (x,), strict=False)


def along(module, x):
    with forward_ad.dual_level():
        module(forward_ad.make_dual(x, x))


def transform(module, x):
    torch.func.vmap(module)(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (call, (True, True)),
        (differentiate, (True, True)),
        (compile_it, (False, True)),
        (trace, (False, False)),
        (export, (False, False)),
        (along, (False, False)),
        (transform, (False, False)),
    ],
)
def test_ways_to_run(way, expected):
    SEEN.clear()
    way(Asking(), torch.randn(2))
    assert set(SEEN) == {expected}
    call(Asking(), torch.randn(2))
    assert SEEN[-1] == (True, True)


def test_hooks_on_saved_tensors_are_seen():
    assert not dispatch.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert dispatch.has_saved_tensor_hooks()
