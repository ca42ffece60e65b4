"""What the backward pass computes again is what was there, and it is not kept meanwhile."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from groupmixformer import GroupMixFormer
from groupmixformer.models.layers import BatchNorm2d, Hardswish, LayerNorm2d
from groupmixformer.ops import recompute

MAP = (2, 16, 40, 40)  # above the size from which it pays


class Act(Hardswish):
    """Counts how often it is computed."""

    runs = 0

    def forward(self, x):
        y = self.again(x)
        recompute.forget(y, self.again, x)
        return y

    def again(self, x):
        self.runs += 1
        return F.hardswish(x)


class Net(nn.Module):
    """Convolution, norm and activation, and a convolution that reads them."""

    def __init__(self, norm=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm, self.act = norm or BatchNorm2d(16), Act()

    @property
    def runs(self):
        return self.act.runs

    def forward(self, x):
        with recompute.scope(x):
            return self.last(self.act(self.norm(self.first(x))))


def gradients(net, x, **kwargs):
    return torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()], **kwargs)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(MAP).requires_grad_()


@pytest.fixture
def keeping(monkeypatch):
    """A means to turn recomputation off."""
    return lambda: monkeypatch.setattr(recompute, "forget", lambda *_: None)


def bytes_left(call):
    """Run, and return what it gives and the bytes that stay allocated, that included. Garbage counts as left."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = call()
    finally:
        gc.enable()
    return result, sum(event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("training", [False, True])
def test_same_gradients_and_statistics(net, x, keeping, training):
    other = copy.deepcopy(net)
    found = gradients(net.train(training), x)
    assert net.runs == 2
    keeping()
    expected = gradients(other.train(training), x)
    assert other.runs == 1
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, net.buffers(), other.buffers()))


def test_second_derivatives(net, x, keeping):
    net.double()
    x = x.detach().double().requires_grad_()
    found = []
    for _ in range(2):
        first = gradients(net, x, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *net.parameters()]))
        keeping()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_can_be_kept(net, x):
    loss = net(x).square().sum()
    first = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, [x, *net.parameters()])))


def test_autocast_is_that_of_the_forward_pass(x, keeping):
    net, found = Net(LayerNorm2d(16)), []  # a norm that gives float32 under autocast, whatever it gets
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).square().sum()
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
        keeping()
    assert all(map(torch.equal, *found))


def test_a_tensor_changed_in_place_is_noticed(net, x):
    loss = net(x).square().sum()
    with torch.no_grad():
        net.last.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"a tensor \[16, 16, 1, 1\] needed for the gradient was modified in place"):
        loss.backward()


def test_a_result_changed_in_place_is_kept(net, x, keeping):
    def changed():
        with recompute.scope(x):
            y = net.act(net.norm(net.first(x))).mul_(2)
            return torch.autograd.grad(net.last(y).square().sum(), [x, *net.parameters()])

    found = changed()
    keeping()
    assert all(map(torch.equal, found, changed()))


def test_a_part_of_a_forgotten_result_goes_on(net, keeping):
    x = torch.randn(3, 16, 48, 48).requires_grad_()

    def through_a_part():
        with recompute.scope(x):
            y = net.act(net.norm(net.first(x))).transpose(2, 3)[1:]
            return torch.autograd.grad(net.last(net.act(y)).square().sum(), [x, *net.parameters()])

    found = through_a_part()
    keeping()
    assert all(map(torch.equal, found, through_a_part()))


def test_small_maps_are_kept(net):
    gradients(net, torch.randn(1, 16, 8, 8).requires_grad_())
    assert net.runs == 1


def test_synchronised_norms_are_kept():
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    assert type(synchronised.norm) is nn.SyncBatchNorm  # whose statistics would have to be exchanged again


def test_other_hooks_decide(net, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = net(x).square().sum()
    assert len(kept) > 5
    loss.backward()
    assert net.runs == 1
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().sum().backward()
    assert net.runs == 3


def test_derivatives_in_a_direction_keep_all(net, x):
    with forward_ad.dual_level():
        net(forward_ad.make_dual(x, torch.ones_like(x))).sum().backward()
    assert net.runs == 1


def test_a_scope_ends_with_an_error(net, x):
    with pytest.raises(RuntimeError), recompute.scope(x):
        net.first(torch.zeros(1))
    gradients(net, x)
    assert net.runs == 2


def test_a_scope_within_a_scope(net, x):
    with recompute.scope(x):
        inner = net(x)
    inner.square().sum().backward()
    assert net.runs == 2


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_keeps_less(randomise, keeping, checkpointing, training):
    images, labels = torch.randn(4, 3, 192, 192).requires_grad_(), torch.tensor([1, 4, 0, 2])
    found = []
    for _ in range(2):
        model = randomise(GroupMixFormer(embed_dims=(40, 20), depths=(2, 1), mlp_ratios=(4, 4), num_classes=6)).train(training)
        model.set_grad_checkpointing(checkpointing)
        leaves = [images, *model.parameters()]
        torch.autograd.grad(F.cross_entropy(model(images), labels), leaves)
        loss, kept = bytes_left(lambda model=model: F.cross_entropy(model(images), labels))
        found.append((torch.autograd.grad(loss, leaves), list(model.buffers()), kept))
        keeping()
    (gradients, buffers, kept), (expected, expected_buffers, all_kept) = found
    assert all(map(torch.equal, gradients, expected))
    assert all(map(torch.equal, buffers, expected_buffers))
    assert checkpointing or kept < 0.75 * all_kept


def test_nothing_is_left_after_a_step(randomise):
    model = randomise(GroupMixFormer(embed_dims=(40,), depths=(1,), mlp_ratios=(4,), num_classes=6)).train()
    images = torch.randn(4, 3, 192, 192)

    def step():
        model(images).square().sum().backward()
        model.zero_grad()

    step()
    _, left = bytes_left(step)
    assert abs(left) < 2**16
