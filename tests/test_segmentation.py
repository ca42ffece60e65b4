"""Segmenters: networks over any backbone, their training from the command line, what is measured and predicted with them.

As a program, `gmf` with the statistics of BatchNorm frozen: on CPU they are not synchronised, so processes could not agree.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_and_resume import differences
from PIL import Image
from safetensors.torch import load_file
from test_semantic import IDS, NAMES, stored, write_classes, write_pair, write_scenes
from torch import nn

from groupmixformer import GroupMixFormer, load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.run_folder import read_metrics, save_network
from groupmixformer.tasks.backbone import Backbone, open_backbone, start_from
from groupmixformer.tasks.registry import build_task
from groupmixformer.tasks.segmentation.data import IGNORE
from groupmixformer.tasks.segmentation.model import Segmenter, load_segmenter, segment
from groupmixformer.tasks.segmentation.training import SegmentationModule
from groupmixformer.training.recipe import Recipe, read_recipe
from groupmixformer.training.trainer import train

OPTIONS = [
    *("--model", "test_resnet", "--image_size", "64", "--batch_size", "4", "--epochs", "1", "--workers", "0"),
    *("--device", "cpu", "--segmenter.channels", "16", "--schedule.warmup_epochs", "0", "--optimizer.lr", "0.002"),
    *("--channels_last", "false"),  # as a loaded model is: so that what is measured afterwards is the same to the last bit
]
HELD_OUT = 5  # which two processes do not divide


def options(data, out, *more):
    return ["--data", str(data), "--out", str(out), *OPTIONS, *(str(word) for word in more)]


def fit(data, out, *more, resume=False):
    """Train without the command line around it, which evaluates and reports; return the run folder."""
    return train(read_recipe("camvid", options(data, out, *more)), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def refusal(capsys, *argv, code=1):
    """The one line in which a command is refused."""
    result = gmf(capsys, *argv, code=code)
    assert result.out == ""
    (line,) = result.err.strip().splitlines()
    assert "GMF_TRACEBACK" not in line  # the hint of errors that nobody foresaw
    return line


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data"), noise=20, train=9, val=HELD_OUT)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of two epochs by the command line, and what it printed."""
    run, said = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["train", "camvid", *options(data, run, "--epochs", "2", "--workers", "1"), "--json"]) == 0
    return run, json.loads(said.getvalue())


@pytest.fixture(scope="session")
def make(data):
    """Give a function that makes the task of a recipe; fields of the segmenter come as a dictionary."""

    def task(variant="test_resnet", segmenter=(), on=data, **fields):
        settings = {"image_size": 64, "batch_size": 4, "workers": 0, "channels_last": False, **fields}
        recipe = Recipe(str(on), task="segmentation", model=variant, **settings)
        for name, value in {"channels": None, **dict(segmenter)}.items():
            setattr(recipe.segmenter, name, value)
        made = build_task(recipe, 1)
        made.log = lambda *args, **kwargs: None  # there is no trainer
        return made

    return task


class PixelByPixel(nn.Module):
    """Stands for a segmenter: the logits of a pixel depend on that pixel alone."""

    def __init__(self, num_classes=3, image_size=16):
        super().__init__()
        self.num_classes, self.image_size = num_classes, image_size
        self.network = nn.Conv2d(3, num_classes, 1)
        nn.init.normal_(self.network.weight, std=2)

    def forward(self, images):
        return self.network(images)


# Networks

DECODERS = {"upernet": 32, "fpn": 128, "unet": None, "segformer": None}  # with a width
BACKBONES = ["groupmixformer_mobile", "resnet18", "pvt_v2_b0"]
PAIRS = [
    ("upernet", BACKBONES[2]),
    *(pytest.param("upernet", name, marks=pytest.mark.slow) for name in BACKBONES[:2]),
    ("fpn", BACKBONES[0]),
    *(pytest.param("fpn", name, marks=pytest.mark.slow) for name in BACKBONES[1:]),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in itertools.product(("unet", "segformer"), BACKBONES)),
    pytest.param("upernet", "swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
    ("upernet", "coat_lite_tiny"),
    ("deeplabv3plus", "resnet18"),
]


@pytest.mark.parametrize(("decoder", "variant"), PAIRS)
def test_decoders_and_backbones(make, randomise, tmp_path, decoder, variant):
    task = make(variant, {"decoder": decoder, "channels": DECODERS.get(decoder)})
    model = randomise(task.model).train()
    outputs = model(torch.randn(2, 3, 45, 70))
    assert [logits.shape for logits in outputs] == [(2, 3, 45, 70)] * 2
    sum((logits * torch.randn_like(logits)).sum() for logits in outputs).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]

    model.eval()
    task.save(model, tmp_path)
    loaded, config = load_segmenter(tmp_path)
    assert (config["class_names"], config["class_ids"]) == (NAMES, IDS.tolist())
    assert not loaded.training
    with torch.no_grad():
        for size in [(45, 70), (33, 31), (64, 96), (1, 5)]:
            image = torch.randn(1, 3, *size)
            logits = model(image)
            assert logits.shape == (1, 3, *size)
            assert logits.isfinite().all()
            assert torch.equal(logits, loaded(image))


def test_the_second_head_is_for_training_only(make):
    task = make(segmenter={"aux_loss_weight": 0.0})
    assert task.model.auxiliary is None
    assert task.model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    with_head = make().model.eval()
    images = torch.randn(1, 3, 64, 64)
    before = with_head(images)
    nn.init.constant_(with_head.auxiliary[4].bias, 1e6)
    assert torch.equal(with_head(images), before)


def test_an_unknown_decoder_names_the_nearest(data, tmp_path, capsys):
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", "--segmenter.decoder", "uppernet"))
    assert line.startswith("gmf: error: no decoder uppernet, expected one of unet, ")
    assert line.endswith(": the nearest is upernet")


@pytest.mark.parametrize(
    ("decoder", "variant"),
    [
        ("upernet", "vit_tiny_patch16_224"),  # has stride 16 alone
        ("deeplabv3plus", "groupmixformer_mobile"),  # asks for dilated convolutions
        ("pspnet", "resnet18"),  # ends at stride 8
        ("dpt", "groupmixformer_mobile"),  # is for plain ViTs
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_in_one_line(data, tmp_path, capsys, decoder, variant):
    more = ["--segmenter.decoder", decoder, "--segmenter.channels", "16" if decoder == "upernet" else "null"]
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", *more, "--model", variant))
    assert variant in line
    if decoder == "upernet":
        assert "choose a hierarchical model" in line or "any size" in line
    else:
        assert decoder in line
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("decoder", "channels", "words"),
    [("unet", 64, "only upernet and fpn have one width"), ("fpn", 32, "channels")],  # GroupNorm has 32 groups of 16 channels
)
def test_a_width_that_a_decoder_cannot_have_is_refused(data, tmp_path, capsys, decoder, channels, words):
    more = ["--segmenter.decoder", decoder, "--segmenter.channels", channels]
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", *more))
    assert f"got channels {channels}" in line and decoder in line and words in line


def test_images_are_prepared_by_the_shorter_side():
    model = Segmenter(Backbone("test_resnet"), 3, "upernet", 40, channels=16, mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.5))
    for size, expected in [((80, 120), (60, 40)), ((30, 20), (40, 60)), ((40, 40), (40, 40))]:  # width first; height first
        prepared = model.prepare(Image.new("RGB", size, (51, 51, 51)))
        assert prepared.shape == (3, *expected)
        for channel, value in enumerate([0.0, -1.0, -0.8]):
            assert torch.allclose(prepared[channel], torch.tensor(value), atol=1e-5)


def test_images_are_normalised_as_the_backbone_was(make):
    for variant in ("test_resnet", "inception_next_atto"):
        cfg, model = timm.get_pretrained_cfg(variant), make(variant, {"channels": 16}).model
        assert (tuple(model.mean), tuple(model.std)) == (cfg.mean, cfg.std)


@pytest.mark.parametrize("variant", ["groupmixformer_mobile", "test_resnet", "pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_layer_decay_slows_the_first_layers_of_the_backbone(make, variant):
    task = make(variant, {"channels": 16})
    task.recipe.optimizer.layer_decay, task.recipe.optimizer.lr = 0.5, 1.0
    task.recipe.schedule.warmup_epochs = 0
    (optimizer,), (schedule,) = task.configure_optimizers()
    schedule["scheduler"].step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    body = {id(p) for p in task.model.features.parameters()}
    assert rates.keys() == {id(p) for p in task.model.parameters()}
    assert {rate for p, rate in rates.items() if p not in body} == {1.0}
    of_body = [rates[id(p)] for p in task.model.features.parameters()]
    assert of_body[0] == min(of_body) <= 0.5**4
    assert max(of_body) < 1 or variant == "groupmixformer_mobile"  # whose last norm counts as its head
    assert len(set(of_body)) >= 4
    whole = timm.create_model(variant)
    layers = timm.models.group_parameters(whole, whole.group_matcher(), reverse=True)
    names = {id(p): n.removeprefix("model.").replace(".", "_") for n, p in task.model.features.named_parameters()}
    of_classifier = {name.replace(".", "_"): layer for name, layer in layers.items()}
    assert {id_: math.log(rates[id_], 0.5) for id_ in body} == {
        id_: pytest.approx(max(layers.values()) - of_classifier[name]) for id_, name in names.items()
    }


def test_what_the_authors_do_not_decay_is_not_decayed(make):
    task = make("swin_tiny_patch4_window7_224", {"channels": 16})
    (optimizer,), _ = task.configure_optimizers()
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    tables = [p for name, p in task.model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12 and all(p.ndim == 2 for p in tables)
    assert all(id(p) in free for p in tables)
    assert all((id(p) in free) == (p.ndim <= 1) for p in task.model.parameters() if not any(p is table for table in tables))


@pytest.mark.parametrize("variant", [pytest.param("groupmixformer_mobile", marks=pytest.mark.slow), "resnet18", "pvt_v2_b0"])
def test_gradient_checkpointing_changes_no_gradient(make, randomise, variant):
    images, results, calls = torch.randn(2, 3, 64, 64), [], []

    def count(*_):
        calls[-1] += 1

    for checkpointing in (False, True):
        model = randomise(make(variant, {"channels": 16}, grad_checkpointing=checkpointing).model).train()
        calls.append(0)
        for module in model.features.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        logits, _ = model(images)
        loss = logits.square().mean()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert calls[1] > 1.4 * calls[0]  # most is computed once more, the first and last stage of timm's features is not
    (loss, expected), (again, found) = results
    assert torch.equal(loss, again)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_a_backbone_without_gradient_checkpointing_says_so(data, tmp_path, capsys):
    more = ["--model", "hrnet_w18_small", "--grad_checkpointing", "true"]
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", *more))
    assert line.endswith("hrnet_w18_small has no gradient checkpointing: set grad_checkpointing to false")


# Weights to start from


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory, randomise):
    """Give the folder and the weights of a classifier by the name of its network."""

    @functools.cache
    def find(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "custom":
            model = GroupMixFormer(num_classes=4, embed_dims=(20, 30, 40, 50), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 1, 3))
        else:
            model = timm.create_model(name, num_classes=7)
        save_checkpoint(randomise(model), folder)
        return folder, {key: value.clone() for key, value in model.state_dict().items()}

    return find


@pytest.mark.parametrize("name", [pytest.param("groupmixformer_mobile", marks=pytest.mark.slow), "resnet18", "custom"])
def test_the_weights_of_a_classifier_arrive_in_the_body(make, classifiers, tmp_path, name):
    folder, weights = classifiers(name)
    task = make("swin_tiny_patch4_window7_224", {"channels": 16}, checkpoint=str(folder))  # the checkpoint's network counts
    body = {key.removeprefix("model."): value for key, value in task.model.features.state_dict().items()}
    assert len(body) > 50
    assert all(torch.equal(value, weights[key]) for key, value in body.items())
    assert not [key for key in weights.keys() - body.keys() if not key.startswith(("fc.", "head.", "norm."))]
    task.save(task.model, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    loaded, _ = load_segmenter(tmp_path)
    assert torch.equal(loaded(images), task.model.eval()(images))


@pytest.fixture(scope="session")
def other_classes(tmp_path_factory):
    """A data set with the images of others and two classes."""
    root = tmp_path_factory.mktemp("other")
    for split, number in (("train", 8), ("val", 2)):
        for i in range(number):
            write_pair(root, split, f"{i}", np.full((40, 50, 3), 20 * i), np.full((40, 50), 3 + 4 * (i % 2)))
    write_classes(root, classes=[{"id": 3, "name": "sky"}, {"id": 7, "name": "road"}])
    return root


@pytest.mark.slow
def test_a_segmenter_starts_from_another(make, trained, other_classes):
    run, _ = trained
    weights = load_file(run / "model.safetensors")
    same = make("resnet18", {"channels": 16}, checkpoint=str(run)).model
    assert same.backbone.name == "test_resnet"
    assert all(torch.equal(value, weights[name]) for name, value in same.state_dict().items())
    assert start_from(same, str(run), "segmentation", NAMES) == []
    heads = ("network.segmentation_head.0", "auxiliary.4")
    assert set(start_from(same, str(run), "segmentation", NAMES[::-1])) == {
        f"{h}.{k}" for h in heads for k in ("weight", "bias")
    }

    task = make("resnet18", {"channels": 16}, on=other_classes, checkpoint=str(run))
    differing = {name for name, value in task.model.state_dict().items() if value.shape != weights[name].shape}
    assert differing == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert all(torch.equal(v, weights[n]) for n, v in task.model.state_dict().items() if n not in differing)
    assert set(start_from(task.model, str(run), "segmentation", task.class_names)) == differing
    assert task.notes[0].startswith(f"{run}: does not fit 4 parameters, which stay new: network.segmentation_head.0.weight, ")


def test_a_folder_of_another_task_is_refused(data, trained, classifiers, tmp_path, capsys):
    detector = tmp_path / "detector"
    save_network(nn.Conv2d(1, 1, 1), detector, {"task": "detection", "class_names": ["a"], "network": {}})
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", "--checkpoint", detector))
    assert line == f"gmf: error: {detector}: holds a model for detection, expected one for segmentation"
    with pytest.raises(ValueError, match="holds a model for detection, expected one for segmentation"):
        open_backbone("mobile", str(detector), "segmentation")
    for load in (load_checkpoint, load_model):
        with pytest.raises(ValueError, match=f"^{trained[0]}: holds a model for segmentation, expected a classifier$"):
            load(trained[0])
    folder, _ = classifiers("resnet18")
    with pytest.raises(ValueError, match=f"^{folder}: holds a model for classification, expected one for segmentation$"):
        load_segmenter(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_segmenter(tmp_path / "nowhere")
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", "--checkpoint", tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000]),
        lambda run: (run / "model.safetensors").unlink(),
        lambda run: (run / "config.json").write_text('{"task": "segmentation"}'),
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace('"upernet"', '"fpn"')),
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("test_resnet", "resnet18")),
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace('"decoder"', '"no field"')),
    ],
    ids=["cut off", "no weights", "no network", "another decoder", "another backbone", "another field"],
)
def test_a_damaged_folder_is_refused_in_one_line(trained, tmp_path, capsys, damage):
    run = shutil.copytree(trained[0], tmp_path / "run")
    damage(run)
    assert refusal(capsys, "eval", run).startswith(f"gmf: error: {run}")


# Pixels that do not count


def scrambled(images, labels):
    """The images with other pixels where the labels are IGNORE."""
    return torch.where((labels == IGNORE)[:, None], torch.randn_like(images) * 3, images)


def test_ignored_pixels_change_no_loss_and_no_gradient(make):
    task = make(segmenter={"aux_loss_weight": 0.0})
    images, labels = torch.randn(3, 3, 20, 24), torch.randint(0, 3, (3, 20, 24))
    labels[0, :9], labels[1], labels[2, :, 5:7] = IGNORE, IGNORE, IGNORE
    task.model = PixelByPixel()
    found = []
    for shown in (images, scrambled(images, labels)):
        task.model.zero_grad()
        loss = task.training_step((shown, labels, []), 0)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in task.model.parameters())])
    assert not torch.equal(images, scrambled(images, labels))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    counted = labels != IGNORE
    expected = F.cross_entropy(task.model(images).movedim(1, 3)[counted], labels[counted])  # the mean over those that count
    assert found[0][0].item() == pytest.approx(expected.item(), rel=1e-5)
    other = labels.clone()
    other[2, 0, 0] = (labels[2, 0, 0] + 1) % 3
    assert task.training_step((images, other, []), 0) != found[0][0]


def test_the_loss_is_that_of_both_heads(make, randomise):
    task = make(segmenter={"aux_loss_weight": 0.3, "channels": 16})
    randomise(task.model).train()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    labels[:, 40:] = IGNORE
    torch.manual_seed(1)  # of the dropout
    main_logits, second = task.model(images)
    torch.manual_seed(1)
    loss = task.training_step((images, labels, []), 0)
    expected = [F.cross_entropy(logits, labels, ignore_index=IGNORE) for logits in (main_logits, second)]
    assert loss.item() == pytest.approx((expected[0] + 0.3 * expected[1]).item(), rel=1e-5)


def test_a_batch_with_nothing_to_learn_from_has_no_gradient(make):
    task = make(segmenter={"channels": 16})
    task.model.train()
    loss = task.training_step((torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), IGNORE), []), 0)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in task.model.parameters())


def test_ignored_pixels_and_blanks_change_no_metric(make):
    task = make()
    task.model = PixelByPixel().eval()
    images = [torch.randn(3, 20, 24), torch.randn(3, 15, 13)]
    labels = [torch.randint(0, 3, image.shape[1:]) for image in images]
    for mask in labels:
        mask[:, 4:9] = IGNORE
    changed = [scrambled(p[None], m[None])[0] for p, m in zip(images, labels, strict=True)]
    blank = (torch.zeros(3, 32, 32), torch.zeros(0, 0, dtype=torch.int64))
    found = []
    for shown, true in [(images, labels), (changed, labels), ([*images, blank[0]], [*labels, blank[1]])]:
        task.validation_step((shown, true, []), 0)
        found.append((task.confusion.compute().tolist(), task.val_images.compute().item()))
        task.confusion.reset()
        task.val_images.reset()
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 2
    assert sum(map(sum, found[0][0])) == sum((mask != IGNORE).sum().item() for mask in labels)
    predicted = [task.model(image[None])[0].argmax(0) for image in images]
    right = sum((p == m).sum().item() for p, m in zip(predicted, labels, strict=True))
    assert sum(found[0][0][i][i] for i in range(3)) == right


# One image


def same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="session")
def network(randomise):
    model = Segmenter(Backbone("test_resnet"), 3, "upernet", 64, channels=16)
    return randomise(model).eval()


@pytest.mark.parametrize("size", [(45, 71), (64, 96), (33, 20)])
def test_a_whole_image_gets_the_classes_of_the_network(network, size):
    image = torch.randn(3, *size)
    found = segment(network, image, size)
    with torch.no_grad():
        logits = network(image[None])
    assert found.shape == (3, *size)
    same(found, logits.softmax(1)[0])
    assert torch.equal(found.argmax(0), logits[0].argmax(0))
    assert len(found.argmax(0).unique()) > 1
    other = (size[0] * 2 - 5, size[1] + 8)
    resized = F.interpolate(logits, other, mode="bilinear").softmax(1)[0]
    same(segment(network, image, other), resized)


def test_one_window_is_the_whole_image(network):
    image = torch.randn(3, 45, 61)
    assert torch.equal(segment(network, image, (45, 61), sliding_window=True), segment(network, image, (45, 61)))
    image = torch.randn(3, 45, 101)
    assert not torch.allclose(
        segment(network, image, (45, 101), sliding_window=True), segment(network, image, (45, 101)), atol=1e-3
    )


class Seen(PixelByPixel):
    """Remembers where it has looked, by images that hold rows and columns; the first logit is the number of the look."""

    def __init__(self, window):
        super().__init__(num_classes=2, image_size=window)
        self.looks = []

    def forward(self, images):
        self.looks.append((slice(*self.span(images[0, 0, :, 0])), slice(*self.span(images[0, 1, 0]))))
        logits = torch.zeros(1, 2, *images.shape[2:])
        logits[:, 0] = len(self.looks) / 10
        return logits

    @staticmethod
    def span(line):
        return int(line[0]), int(line[-1]) + 1


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 40), width=st.integers(1, 40), window=st.integers(1, 20))
def test_windows_cover_every_pixel_and_overlap(height, width, window):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    model = Seen(window)
    found = segment(model, torch.stack([rows, columns, rows]).float(), (height, width), sliding_window=True)
    summed, count = np.zeros((height, width)), np.zeros((height, width))
    for i, part in enumerate(model.looks, 1):
        summed[part] += i / 10
        count[part] += 1
    assert count.min() >= 1
    assert len(set(map(str, model.looks))) == len(model.looks)  # none twice
    for axis, length in enumerate((height, width)):
        spans = sorted({(part[axis].start, part[axis].stop) for part in model.looks})
        assert all(stop - begin == min(length, window) for begin, stop in spans)
        overlaps = [first[1] - second[0] for first, second in itertools.pairwise(spans)]
        assert all(overlap >= window // 3 for overlap in overlaps)
    logits = torch.tensor(summed / count)  # averaged where windows overlap
    same(found[0].double(), logits.sigmoid())


@pytest.mark.parametrize("size", [(29, 43), (16, 17), (5, 90)])
def test_windows_give_what_the_whole_gives_pixel_by_pixel(size):
    model, image = PixelByPixel(), torch.randn(3, *size)
    same(segment(model, image, size, sliding_window=True), segment(model, image, size))
    same(segment(model, image, (31, 31), sliding_window=True), segment(model, image, (31, 31)))


def test_a_flip_averages_with_the_mirrored_image(network):
    symmetric, image = PixelByPixel(), torch.randn(3, 33, 47)
    same(segment(symmetric, image, (33, 47), flip=True), segment(symmetric, image, (33, 47)))
    for slide in (False, True):
        ask = functools.partial(segment, network, size=(50, 71), sliding_window=slide)
        image = torch.randn(3, 65, 97)
        plain, mirrored = ask(image), ask(image.flip(2)).flip(2)
        assert not torch.allclose(plain, mirrored, atol=1e-3)
        same(ask(image, flip=True), (plain + mirrored) / 2)


def test_several_sizes_are_averaged(network):
    image, size = torch.randn(3, 61, 83), (37, 51)
    found = segment(network, image, size, scales=(0.75, 1.0, 1.3))
    each = []
    for factor, sides in [(0.75, (46, 62)), (1.0, (61, 83)), (1.3, (79, 108))]:
        scaled = F.interpolate(image[None], sides, mode="bilinear", antialias=True) if factor != 1 else image[None]
        with torch.no_grad():
            each.append(F.interpolate(network(scaled), size, mode="bilinear").softmax(1)[0])
    same(found, sum(each) / 3)
    same(found.sum(0), torch.ones(size))
    assert found.dtype == torch.float32
    together = segment(network, image, size, scales=(0.75, 1.0, 1.3), flip=True, sliding_window=True)
    same(together.sum(0), torch.ones(size))
    assert not torch.allclose(together, found, atol=1e-3)
    assert segment(network, torch.randn(3, 3, 5), (3, 5), scales=(0.05,)).isfinite().all()


# The command line


def brute_force(pairs):
    """mIoU, accuracy and the IoUs of pairs of masks with the numbers of the files, pixel by pixel."""
    true, predicted = (np.concatenate([masks[i].ravel() for masks in pairs]) for i in (0, 1))
    predicted, true = predicted[true != 255], true[true != 255]
    ious = []
    for number in IDS:
        union = ((true == number) | (predicted == number)).sum()
        ious.append(((true == number) & (predicted == number)).sum() / union if union else None)
    return np.mean([value for value in ious if value is not None]), (true == predicted).mean(), ious


def test_a_run_leaves_what_is_needed(data, trained):
    run, result = trained
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["val_images"] for row in rows] == [HELD_OUT] * 2
    assert all(math.isfinite(row["loss"]) and 0 <= row["val_mIoU"] <= 1 and 0 <= row["val_accuracy"] <= 1 for row in rows)
    assert max(row["val_mIoU"] for row in rows) == pytest.approx(result["mIoU"], abs=1e-6)
    with (run / "metrics.csv").open() as file:
        assert {"val_mIoU", "val_accuracy", "val_images"} <= set(next(csv.reader(file)))
    assert (result["run"], result["report"]) == (str(run), str(run / "report.html"))
    page = (run / "report.html").read_text()
    assert f"mIoU {result['mIoU']:.2%} on {HELD_OUT} held-out images" in page
    assert page.count("<img") == 2 * (1 + min(6, HELD_OUT)) and "could not be drawn" not in page
    assert (result["images"], result["skipped"]) == (HELD_OUT, [])
    assert [(row["class"], row["index"]) for row in result["per_class"]] == list(zip(NAMES, range(3), strict=True))
    model, config = load_segmenter(run)
    assert (config["class_names"], config["class_ids"]) == (NAMES, IDS.tolist())
    assert (model.num_classes, model.image_size) == (3, 64)


def test_the_recipe_of_a_run_has_no_fields_of_other_tasks(trained):
    fields = yaml.safe_load((trained[0] / "recipe.yaml").read_text())
    assert fields["task"] == "segmentation"
    assert fields["segmenter"]["channels"] == 16
    assert not {"detector", "augmentation", "crop_pct"} & fields.keys()


HOW = {"whole": [], "slide": ["--sliding-window"], "scales": ["--scales", "0.75,1.25"], "flip": ["--flip"]}
HOW |= {"all": ["--sliding-window", "--scales", "0.75,1.25", "--flip"], "workers": ["--workers", "1"]}


@pytest.mark.parametrize("how", ["all", *(pytest.param(how, marks=pytest.mark.slow) for how in HOW if how != "all")])
def test_eval_measures_what_predict_writes(data, trained, tmp_path, capsys, how):
    run, _ = trained
    result = json.loads(gmf(capsys, "eval", run, *HOW[how], "--json").out)
    if how in ("whole", "workers"):
        assert result["mIoU"] == pytest.approx(max(row["val_mIoU"] for row in read_metrics(run)), abs=1e-6)
    looks = [] if how == "workers" else HOW[how]
    gmf(capsys, "predict", run, data / "images" / "val", *looks, "--out", tmp_path)
    masks = sorted((data / "masks" / "val").iterdir())
    pairs = [(stored(mask), stored(tmp_path / f"{mask.stem}-mask.png")) for mask in masks]
    assert len(pairs) == result["images"] == HELD_OUT
    miou, accuracy, ious = brute_force(pairs)
    assert (result["mIoU"], result["accuracy"]) == (pytest.approx(miou), pytest.approx(accuracy))
    assert [row["IoU"] for row in result["per_class"]] == [None if iou is None else pytest.approx(iou) for iou in ious]
    assert (result["sliding_window"], result["flip"]) == ("--sliding-window" in looks, "--flip" in looks)
    assert result["scales"] == ([0.75, 1.25] if "--scales" in looks else [1.0])
    assert (result["task"], result["split"], result["data"]) == ("segmentation", "val", str(data))


@pytest.mark.slow
def test_each_way_to_look_gives_another_result(data, trained, tmp_path, capsys):
    images, shares = data / "images" / "val", set()
    for how in ("whole", "slide", "scales", "flip", "all"):
        said = json.loads(gmf(capsys, "predict", trained[0], images, "--out", tmp_path, "--json", *HOW[how]).out)
        shares.add(str([image["shares"] for image in said["images"]]))
    assert len(shares) == 5


def test_eval_of_another_split_and_size(data, trained, capsys):
    run, whole = trained
    result = json.loads(gmf(capsys, "eval", run, "--split", "train", "--json").out)
    assert (result["images"], result["split"]) == (9, "train")
    smaller = json.loads(gmf(capsys, "eval", run, "--image-size", "48", "--data", data, "--json").out)
    assert smaller["images"] == HELD_OUT
    assert smaller["accuracy"] != whole["accuracy"]
    text = gmf(capsys, "eval", run, "--per-class").out
    assert text.startswith(f"mIoU {whole['mIoU']:.2%}  accuracy {whole['accuracy']:.2%}")
    assert f"on {HELD_OUT} images of val" in text
    ranked = [line.split()[0] for line in text.splitlines()[-3:]]
    iou = {row["class"]: row["IoU"] for row in whole["per_class"]}
    assert ranked == sorted(NAMES, key=lambda name: iou[name])


def test_half_precision_measures_nearly_the_same(trained, capsys):
    run, whole = trained
    result = json.loads(gmf(capsys, "eval", run, "--precision", "bf16", "--json").out)
    assert result["precision"] == "bf16"
    assert result["accuracy"] == pytest.approx(whole["accuracy"], abs=0.05)
    assert result["accuracy"] != whole["accuracy"]


def test_predict_writes_masks_and_overlays(data, trained, tmp_path, capsys):
    places = [data / "images" / split / "scene0.png" for split in ("train", "val")]
    tiny = tmp_path / "tiny.jpg"
    Image.new("RGB", (9, 5), "red").save(tiny)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    result = gmf(capsys, "predict", trained[0], *places, tiny, tmp_path / "bad.png", "--out", out, "--json")
    assert f"skipped {tmp_path / 'bad.png'}: not a readable image" in result.err
    said = json.loads(result.out)
    assert said["skipped"] == [str(tmp_path / "bad.png")]
    names = ["scene0", "scene0-2", "tiny"]  # two images have one name
    assert sorted(file.name for file in out.iterdir()) == sorted(
        f"{n}-{kind}.png" for n in names for kind in ("mask", "overlay")
    )
    colors = dict(zip(IDS.tolist(), json.loads((trained[0] / "config.json").read_text())["colors"], strict=True))
    for image, name, path in zip(said["images"], names, [*places, tiny], strict=True):
        assert image["image"] == str(path)
        assert image["files"] == [str(out / f"{name}-overlay.png"), str(out / f"{name}-mask.png")]
        mask, overlay = (Image.open(out / f"{name}-{kind}.png") for kind in ("mask", "overlay"))
        photo = Image.open(path)
        assert (mask.mode, mask.size) == ("P", photo.size)
        pixels = np.asarray(mask)
        assert set(np.unique(pixels).tolist()) <= set(IDS.tolist())
        shown = np.asarray(mask.convert("RGB"))
        assert all((shown[pixels == number] == color).all() for number, color in colors.items())
        shares = {NAMES[i]: (pixels == number).mean() for i, number in enumerate(IDS) if (pixels == number).any()}
        assert image["shares"] == pytest.approx(shares)
        assert list(image["shares"].values()) == sorted(image["shares"].values(), reverse=True)
        assert overlay.height >= 480 and overlay.width / overlay.height > photo.width / photo.height  # with the legend


@pytest.mark.parametrize("argv", [["--detector.fpn-channels", "64"], ["--augmentation.mixup", "0.8"], ["--crop_pct", "0.9"]])
def test_settings_of_other_tasks_are_refused(data, tmp_path, capsys, argv):
    line = refusal(capsys, "train", "camvid", *options(data, tmp_path / "run", *argv), code=2)
    assert f"{argv[0][2:].replace('-', '_')} is a field for " in line and line.endswith("the recipe's task is segmentation")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "argv", "task"),
    [
        *[("eval", argv, "classification") for argv in (["--crop-pct", "0.9"], ["--crop-mode", "center"], ["--test-size"])],
        *[("eval", argv, "classification") for argv in (["--batch-size", "4"], ["--plot", "a.png"], ["--root", "data"])],
        ("eval", ["--interpolation", "bicubic"], "classification"),
        ("predict", ["--top", "3"], "classification"),
        ("predict", ["--score-threshold", "0.3"], "classification and detection"),
    ],
)
def test_options_of_other_tasks_are_refused(trained, tmp_path, capsys, monkeypatch, command, argv, task):
    monkeypatch.chdir(tmp_path)
    images = ["image.png"] if command == "predict" else []
    line = refusal(capsys, command, trained[0], *images, *argv, code=2)
    assert line == f"gmf: error: {argv[0]} is for {task}, and {trained[0]} holds a model for segmentation"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--sliding-window"], ["--flip"], ["--scales", "0.5,1"], ["--split", "val"]])
def test_options_of_segmentation_are_refused_for_classifiers(classifiers, capsys, argv):
    folder, _ = classifiers("resnet18")
    line = refusal(capsys, "eval", folder, *argv, code=2)
    assert line.startswith(f"gmf: error: {argv[0]} is for ") and line.endswith("holds a model for classification")


@pytest.mark.parametrize("scales", ["", "0", "1,x", "nan", "30"])
def test_scales_that_make_no_sense_are_refused(trained, capsys, scales):
    assert f"got {scales}, expected factors from 0.05 to 20" in refusal(capsys, "eval", trained[0], "--scales", scales, code=2)


def test_eval_matches_classes_by_name(trained, data, other_classes, tmp_path, capsys):
    run, result = trained
    shutil.copytree(data, tmp_path / "data")
    listed = tmp_path / "data" / "classes.json"
    content = json.loads(listed.read_text())
    content["classes"].reverse()
    listed.write_text(json.dumps(content))
    other = json.loads(gmf(capsys, "eval", run, "--data", tmp_path / "data", "--json").out)
    assert (other["mIoU"], other["per_class"]) == (result["mIoU"], result["per_class"])
    assert other["notes"] == [f"the 3 classes of {tmp_path / 'data'} are matched by name"]
    part = json.loads(gmf(capsys, "eval", run, "--data", other_classes, "--json").out)
    assert part["notes"] == [f"the 2 classes of {other_classes} are matched by name; 1 of the model's have no image: car"]
    assert [row["class"] for row in part["per_class"]] == NAMES
    content["classes"][0]["name"] = "bus"
    listed.write_text(json.dumps(content))
    line = refusal(capsys, "eval", run, "--data", tmp_path / "data")
    assert "has other classes than the model: only the data has bus; only the model has car; expected classes" in line
    assert "expected a part test; found train in " in refusal(capsys, "eval", trained[0], "--split", "test")


def renumber(path):
    pixels = stored(path).copy()
    pixels[0, 0] = 9
    Image.fromarray(pixels).save(path)


@pytest.mark.slow
def test_images_that_cannot_be_used_are_counted_and_named(data, tmp_path, capsys):
    spoilt = shutil.copytree(data, tmp_path / "data")
    masks = spoilt / "masks"
    renumber(masks / "train" / "scene3.png")
    renumber(masks / "val" / "scene1.png")
    (masks / "train" / "scene5.png").unlink()
    argv = ["train", "camvid", *options(spoilt, tmp_path / "run", "--epochs", "2", "--json")]
    lines = gmf(capsys, *argv, code=1).err.strip().splitlines()
    assert lines[-1].startswith("gmf: error: 2 of 9 training images cannot be used, more than max_unreadable (0.10%) allows: ")
    assert f"scene5.png: has no mask {masks / 'train' / 'scene5.png'}" in lines[-1]

    result = gmf(capsys, *argv, "--max-unreadable", "0.3")
    assert f"1 training images left out: {spoilt / 'images' / 'train' / 'scene5.png'}: has no mask" in result.err
    no_class = "holds the number 9, which is of no class"
    rows = read_metrics(tmp_path / "run")
    assert [(row["unreadable"], row["val_images"]) for row in rows] == [(1, HELD_OUT - 1)] * 2
    assert (tmp_path / "run" / "unreadable.txt").read_text() == f"{masks / 'train' / 'scene3.png'}: {no_class}\n"
    said = json.loads(result.out)
    assert (said["images"], said["skipped"]) == (HELD_OUT - 1, [f"{masks / 'val' / 'scene1.png'}: {no_class}"])

    (masks / "train" / "scene5.png").write_bytes((masks / "train" / "scene3.png").read_bytes())
    shutil.copy(spoilt / "images" / "train" / "scene3.png", spoilt / "images" / "train" / "scene5.png")
    line = gmf(
        capsys, "train", "camvid", *options(spoilt, tmp_path / "again", "--max-unreadable", "0.12"), code=1
    ).err.splitlines()[-1]
    assert "2 of 9 training images cannot be used, more than max_unreadable (12.00%) allows: " in line
    assert no_class in line


def test_averaged_weights_are_measured_and_kept(data, tmp_path, capsys):
    run = fit(data, tmp_path / "run", "--ema", "0.5", "--epochs", "2")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept, rows = load_file(run / "model.safetensors"), read_metrics(run)
    if rows[1]["val_mIoU"] > rows[0]["val_mIoU"]:
        assert all(torch.equal(value, state[f"average.module.{name}"]) for name, value in kept.items())
    result = json.loads(gmf(capsys, "eval", run, "--json").out)
    assert result["mIoU"] == pytest.approx(max(row["val_mIoU"] for row in rows), abs=1e-6)


# Stopping and continuing, several processes

LONG = [
    *("--model", "test_efficientnet", "--batch_size", "2", "--epochs", "2", "--grad-accum-steps", "2", "--ema", "0.9"),
    *("--drop_path_rate", "0.2"),
]


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been(data, tmp_path, capsys, monkeypatch):
    whole = fit(data, tmp_path / "whole", *LONG)
    run, waiting = tmp_path / "run", [(0, 1), (1, 0)]
    real = SegmentationModule.training_step

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) in waiting:
            waiting.remove((self.current_epoch, batch_idx))
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", training_step)
    for place in [(0, 2), (1, 2)]:  # an epoch has 4 batches in 2 steps
        result = gmf(capsys, "train", "camvid", *options(data, run, *LONG), "--auto-resume", code=128 + signal.SIGTERM)
        assert f"continue with gmf train {run}/recipe.yaml --resume" in result.err
        last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert (last["epoch"], last["DataModule"]["done"]) == place
    fit(data, run, *LONG, resume=True)
    assert not waiting
    assert differences(whole, run) == []


def frozen_step(task, batch, batch_idx, step=SegmentationModule.training_step):
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return step(task, batch, batch_idx)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_measure_what_one_does(data, tmp_path, monkeypatch):
    still = ["--optimizer.lr", "0", "--schedule.min_lr", "0", "--schedule.warmup_lr", "0"]
    monkeypatch.setattr(SegmentationModule, "training_step", frozen_step)
    one = fit(data, tmp_path / "one", *still, "--batch_size", "8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    argv = ["train", "camvid", *options(data, tmp_path / "two", *still), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *argv], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    first, second = load_file(one / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    (expected,), (found,) = read_metrics(one), read_metrics(tmp_path / "two")
    names = ("val_mIoU", "val_accuracy", "val_images")
    assert [found[name] for name in names] == [expected[name] for name in names]
    assert found["val_images"] == HELD_OUT
    assert found["step"] == expected["step"] == 1
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)  # each process averages over the pixels that it counts
    result = json.loads(done.stdout)  # of one process alone
    assert result["mIoU"] == pytest.approx(found["val_mIoU"], abs=1e-6)


@pytest.mark.slow
def test_regions_are_learnt(tmp_path):
    data = write_scenes(tmp_path / "data", noise=30, side=40, train=24, val=8)
    more = ["--epochs", "6", "--optimizer.lr", "0.005", "--segmenter.channels", "32", "--segmenter.photometric", "false"]
    rows = read_metrics(fit(data, tmp_path / "run", *more))
    assert rows[-1]["val_mIoU"] > 0.9
    assert rows[-1]["loss"] < rows[0]["loss"] / 2


if __name__ == "__main__":
    SegmentationModule.training_step = frozen_step
    sys.exit(main(sys.argv[1:]))
