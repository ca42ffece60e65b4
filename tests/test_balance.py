"""Classes of unequal numbers: shown equally often, or weighted in the loss."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from test_split import TINY, fit, gmf, write_flat

from groupmixformer.tasks.classification.training import class_weights
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.loaders import TrainSampler
from groupmixformer.training.recipe import read_recipe


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    write_flat(folder / "train", {"cat": 3, "dog": 13})
    write_flat(folder / "val", {"cat": 2, "dog": 2}, start=100)
    return folder


def build(data, *options):
    return build_task(read_recipe("folder", ["--data", str(data), *TINY, *options]), 1)


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 3),
    skip=st.integers(0, 20),
)
def test_classes_are_shown_equally_often_and_no_sample_twice_on_all_processes(labels, batch_size, world_size, epoch, skip):
    def deal(number, rank, size, skip=0):
        order = TrainSampler(len(labels), size, 3, rank, number, labels)
        order.set_epoch(epoch)
        order.skip = skip
        return list(order)

    whole = deal(1, 0, 1)
    assert len(whole) == len(labels) and len(set(whole)) == len(whole)
    shown = Counter(labels[index] for _, index, _ in whole)
    assert max(shown.values()) - min(shown.values()) <= 1 and set(shown) == set(labels)
    for label in shown:  # none is shown again before all were
        times = Counter(index for _, index, _ in whole if labels[index] == label)
        copies = [times[index] for index, own in enumerate(labels) if own == label]
        assert max(copies) - min(copies) <= 1
    dealt = [sample for rank in range(world_size) for sample in deal(world_size, rank, batch_size)]
    assert len(set(dealt)) == len(dealt) and set(dealt) <= set(whole)
    assert deal(1, 0, 1, min(skip, len(labels) - 1)) == whole[min(skip, len(labels) - 1) :]


def test_other_images_of_a_large_class_are_shown_in_other_epochs():
    order, labels = TrainSampler(100, 1, 0, labels=[0] * 95 + [1] * 5), set()
    for epoch in range(10):
        order.set_epoch(epoch)
        labels |= {index for _, index, _ in order}
    assert labels == set(range(100))


def test_a_copy_is_augmented_otherwise_and_the_same_way_each_time(uneven):
    samples = build(uneven, "--balance", "sampling").loaders.train
    first, copy, again = samples[0, 1, 0][0], samples[0, 1, 1][0], samples[0, 1, 1][0]
    assert torch.equal(copy, again) and not torch.equal(first, copy)


def test_weights_are_those_of_scikit_learn(uneven):
    labels = [0] * 3 + [1] * 13 + [3] * 4
    weights = class_weights(labels, 4)
    assert weights[[0, 1, 3]].tolist() == pytest.approx(
        compute_class_weight("balanced", classes=np.unique(labels), y=labels).tolist()
    )
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize("mixup", ["0.0", "0.8"])
def test_the_loss_of_a_batch_is_weighted_by_class(uneven, mixup):
    module = build(uneven, "--balance", "loss", "--augmentation.mixup", mixup, "--augmentation.label_smoothing", "0.1")
    images, classes = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 1])
    module.model.eval()
    module.log_loss = lambda *_: None
    if module.mixup:
        module.mixup = lambda images, classes: (images, targets)
    targets = F.one_hot(classes, 2) * 0.9 + 0.05
    weights = torch.tensor([16 / 6, 16 / 26])
    loss = module.training_step((images, classes, []), 0)
    expected = -(module.model(images).log_softmax(1) * targets * weights).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "class_weights" not in module.state_dict()


def test_a_resumed_run_ends_as_an_uninterrupted_one(uneven, tmp_path):
    options = ["--balance", "sampling", "--augmentation.color_jitter", "0.4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    fit(uneven, whole, *options, "--epochs", "2")
    fit(uneven, parted, *options)
    fit(uneven, parted, *options, "--epochs", "2", resume=True)
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parted)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_options_that_mean_nothing_are_refused(uneven, tmp_path, capsys):
    error = gmf(capsys, "train", "folder", "--data", uneven, "--balance", "weights", code=2).err
    assert "balance" in error and "loss" in error and "sampling" in error and error.count("\n") == 1
    error = gmf(capsys, "train", "bccd", "--data", uneven, "--balance", "loss", code=2).err
    assert "balance is a field for classification" in error
