"""Pre-training without labels: what is masked and counted, the teacher, resuming, and what is done with the checkpoint."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from kill_and_resume import differences
from lightning.pytorch.callbacks import Callback
from PIL import Image

import groupmixformer
from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.models.checkpoint import load_model
from groupmixformer.run import Run
from groupmixformer.tasks.backbone import open_backbone
from groupmixformer.tasks.pretraining.data import UnlabelledImages, draw_mask, find_images
from groupmixformer.tasks.pretraining.model import MaskedImageModel, create_backbone
from groupmixformer.tasks.pretraining.training import SimMIMModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import PretrainSettings, RecipeError, read_recipe
from groupmixformer.training.trainer import train

STAGES = {"embed_dims": (10, 20, 20, 30), "depths": (1,) * 4, "mlp_ratios": (2,) * 4}
TINY = ["--image-size", "64", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--epochs", "2", "--loggers", "[]"]
TINY += [
    "--pretrain.mask-patch",
    "16",
    "--pretrain.local-size",
    "32",
    "--pretrain.outputs",
    "16",
    "--pretrain.local-crops",
    "2",
]
OURS = ["--model-options", "{embed_dims: [10, 20, 20, 30], depths: [1, 1, 1, 1], mlp_ratios: [2, 2, 2, 2]}"]
DINO = ["--pretrain.method", "dino", "--pretrain.momentum", "0.9"]
CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}


def recipe(data, out="runs/x", *more, model=OURS):
    return read_recipe("pretrain", ["--data", str(data), "--out", str(out), *TINY, *model, *map(str, more)])


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def last_line(result):
    return result.err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MaskedImageModel(GroupMixFormer(**STAGES, num_classes=0), 64, 16).eval()


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretraining") / "run"
    assert main(["train", "pretrain", "--data", str(photos), "--out", str(out), *TINY, *OURS, "--ema", "0.9"]) == 0
    return out


# What is masked


@pytest.mark.parametrize(("side", "share", "masked"), [(6, 0.6, 22), (4, 0.5, 8), (2, 0.01, 1), (2, 0.99, 3)])
def test_a_mask_covers_the_stated_share(side, share, masked):
    assert draw_mask(side, share).shape == (side, side) and int(draw_mask(side, share).sum()) == masked
    torch.manual_seed(1)
    assert sum(draw_mask(6, 0.5).float() for _ in range(400)).sub(200).abs().max() < 50  # all patches alike


def test_masked_pixels_alone_count_and_are_not_seen(network):
    images, mask = torch.randn(2, 3, 64, 64), torch.stack([draw_mask(4, 0.5), draw_mask(4, 0.25)])
    hidden = network.of_pixels(mask)
    assert hidden.shape == (2, 1, 64, 64) and torch.equal(hidden[:, 0, ::16, ::16], mask)
    with torch.no_grad():
        predicted, losses = network(images, mask), network.losses(images, mask)
        other = torch.where(hidden, torch.randn_like(images), images)
        assert torch.equal(network(other, mask), predicted)  # nothing of the masked pixels reaches the network
        assert not torch.allclose(network(torch.where(hidden, images, 0.0), mask), predicted)
    for image, shown, covered, loss in zip(images, predicted, hidden, losses, strict=True):
        errors = (shown - image).abs()[covered.expand(3, -1, -1)]
        torch.testing.assert_close(loss, errors.mean())
    # Other targets for pixels that are seen: the network is asked for its prediction of the same input.
    network.hide, hide = lambda *_: hide(images, mask), network.hide
    with torch.no_grad():
        torch.testing.assert_close(network.losses(torch.where(hidden, images, 9.0), mask), losses)
        assert (network.losses(torch.where(hidden, 9.0, images), mask) > losses).all()
    del network.hide
    assert network.token.requires_grad and network.head[0].weight.requires_grad


@pytest.mark.slow
def test_a_few_images_are_learnt():
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4), size=64, mode="bicubic")
    mask = torch.stack([draw_mask(4, 0.5) for _ in images])
    model = MaskedImageModel(GroupMixFormer(**STAGES, num_classes=0), 64, 16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = model.losses(images, mask).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_samples_are_the_same_again_and_masks_of_held_out_images_stay(photos):
    images = UnlabelledImages(*find_images(recipe(photos), None)[:1], recipe(photos), CONFIG)
    (image, mask), problem = images[0, 3]
    (again, other), _ = images[0, 3]
    assert torch.equal(image, again) and torch.equal(mask, other) and not problem
    assert not torch.equal(images[1, 3][0][0], image)
    assert torch.equal(images[3][1], images[3][1]) and images[3][2] is True
    assert any(not torch.equal(images[3][1], images[i][1]) for i in range(4))
    assert images[-1][2] is False


def test_where_images_come_from(photos, tmp_path):
    train_images, held_out, notes = find_images(recipe(photos), None)
    assert {path.relative_to(photos).parts[0] for path in train_images} == {"train"} and len(held_out) == 16 and not notes
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    for i in range(45):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save((deep if i % 2 else tmp_path / "a") / f"{i}.png")
    (tmp_path / "a" / "notes.txt").touch()
    train_images, held_out, notes = find_images(recipe(tmp_path), None)
    assert (len(train_images), len(held_out)) == (43, 2) and not set(train_images) & set(held_out)
    assert notes == ["files left out: 1 .txt", "2 of 45 are held out (--val-share chooses another share)"]
    assert find_images(recipe(tmp_path), None)[1] == held_out
    divided = recipe(tmp_path, tmp_path / "run", "--val-share", "0.2")
    train_images, held_out, _ = find_images(divided, divided.splitter)
    assert len(train_images) + len(held_out) == 45 and len(held_out) >= 5


# Wrong input


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere"], "nowhere: no such folder, expected one with images, in any nesting"),
        (["--data", "."], "holds 0 images, expected two or more"),
        (["--image-size", "72"], "got image_size 72 and pretrain.mask_patch 16, expected a multiple of the patch"),
        (["--image-size", "24"], "got image_size 24, expected 32 or more"),
        (["--patience", "3"], "patience compares runs or epochs by a metric, which pre-training does not have"),
        (["--ema", "0.9", *DINO], "method dino saves its teacher, which is an average itself: set ema to null"),
        (["--optimizer.layer_decay", "0.8"], "optimizer.layer_decay is for layers that are trained already: set it to null"),
        (["--strategy", "fsdp"], "strategy fsdp is not for pre-training: use ddp"),
        (["--model-options", "{embed_dim: 3}"], "cannot be made with model_options"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(photos, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=expected.replace(".", r"\.")) as caught:
        build_task(recipe(photos, "run", *options), 1)
    assert "\n" not in str(caught.value)


def test_wrong_values_are_refused_with_what_is_expected():
    for name, value, expected in (
        ("method", "mae", 'method is "mae", expected one of simmim, dino'),
        ("local_size", 16, "local_size is 16, expected an integer of at least 32"),
        ("mask_share", 1.5, "mask_share is 1.5, expected a number from 0.01 to 0.99"),
    ):
        with pytest.raises(RecipeError, match=expected):
            PretrainSettings(**{name: value})


# The run and its checkpoint


@pytest.mark.slow
def test_a_run_is_a_checkpoint_for_every_task(run, photos, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    assert (config["task"], config["method"], config["num_classes"]) == ("pretraining", "simmim", 0)
    page = (run / "report.html").read_text()
    assert page.count("whole, masked, filled in") == 12 and "could not be drawn" not in page  # alt and caption
    rows = Run.open(run).metrics
    assert len(rows) == 2 and all(0 < row["val_loss"] < 5 and row["val_images"] == 16 for row in rows)
    # The weights are those of the averaged backbone of the last epoch.
    model, state = (
        groupmixformer.load_checkpoint(run),
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"],
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"average.module.backbone.{name}"]), name
    assert timm.create_model(f"local-dir:{run}", pretrained=True, num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    for command in (["eval", run], ["predict", run, next(photos.rglob("*.png"))]):
        line = last_line(gmf(capsys, *command, code=1))
        assert line.startswith(
            f"gmf: error: {run}: holds a backbone pre-trained without labels, which has no classes: train it"
        )
    tuned = [
        "--checkpoint",
        run,
        "--data",
        photos,
        "--out",
        tmp_path / "tuned",
        *TINY[:6],
        "--batch-size",
        "8",
        "--epochs",
        "1",
    ]
    unmoved = ["--optimizer.lr", "0", "--schedule.min_lr", "0", "--schedule.warmup_lr", "0"]
    told = gmf(capsys, "train", "finetune", *tuned, *unmoved)
    assert f"{run}: a pre-trained backbone: its own head is left out, what comes after it is new" in told.err
    weights = groupmixformer.load_checkpoint(tmp_path / "tuned").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.named_parameters() if not name.startswith("head."))
    backbone, weights, _ = open_backbone("mobile", str(run), "detection")
    assert backbone.arguments["depths"] == [1, 1, 1, 1] and weights.keys() == model.state_dict().keys()
    card = render_card(
        read_card_info(Run.open(run).folder, Run.open(run).definition.publish(Run.open(run).folder, tmp_path)), "me/x", "mit"
    )
    assert "pre-trained by | simmim" in card and "image-feature-extraction" in card
    assert (
        "label_names" not in create_backbone(recipe(photos, "x", "--checkpoint", tmp_path / "tuned", model=[])).pretrained_cfg
    )
    again = create_backbone(recipe(photos, "run", "--checkpoint", run, model=[]))
    assert torch.equal(again.state_dict()["norm.weight"], model.state_dict()["norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simmim", "dino"])
def test_a_resumed_run_equals_an_uninterrupted_one(photos, tmp_path, capsys, method):
    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                raise RuntimeError("stopped")

    more = ["--ema", "0.9"] if method == "simmim" else DINO
    train(recipe(photos, tmp_path / "whole", *more), build_task)
    with pytest.raises(RuntimeError, match="stopped"):
        train(recipe(photos, tmp_path / "other", *more, "--save-minutes", "0"), build_task, watchers=[Stop()])
    train(recipe(photos, tmp_path / "other", *more), build_task, resume=True)
    assert differences(tmp_path / "whole", tmp_path / "other") == []


class Teacher(Callback):
    """Compares the teacher after each step with what the momentum makes of it."""

    steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [parameter.clone() for parameter in pl_module.teacher.parameters()]
        self.centre = pl_module.loss.center.clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        momentum = 1 - 0.1 * (math.cos(math.pi * self.steps / 5) + 1) / 2  # 0.9 in the first of 6 steps, 1 in the last
        self.steps += 1
        pairs = zip(pl_module.teacher.parameters(), self.before, pl_module.model.parameters(), strict=True)
        for teacher, before, student in pairs:
            torch.testing.assert_close(teacher, momentum * before + (1 - momentum) * student, rtol=1e-4, atol=1e-6)
            assert not teacher.requires_grad
        assert not torch.equal(pl_module.loss.center, self.centre)
        last = pl_module.model.head.last_layer.weight_v
        same = torch.equal(last, self.first) if hasattr(self, "first") else True
        assert same == (trainer.current_epoch == 0)  # the last layer learns from the second epoch on
        self.first = last.clone()


@pytest.mark.slow
def test_the_teacher_is_the_average_of_the_network(photos, tmp_path, capsys):
    teacher = Teacher()
    out = train(recipe(photos, tmp_path / "run", *DINO, "--optimizer.weight_decay", "0"), build_task, watchers=[teacher])
    assert teacher.steps == 6
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    saved = groupmixformer.load_checkpoint(out).state_dict()
    assert all(torch.equal(tensor, state[f"teacher.backbone.{name}"]) for name, tensor in saved.items())
    measured, report, _ = Run.open(out).report("cpu")
    assert measured.result["information"] >= 0 and 0 <= measured.result["knn_top1"] <= 1
    page = report.read_text()
    assert page.count("then the nearest, of ") == 12 and "could not be drawn" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_other_backbones(photos, tmp_path, name):
    for more in ([], [*DINO, "--pretrain.local-crops", "0"]):
        task = build_task(recipe(photos, tmp_path / "run", *more, model=["--model", name]), 1)
        images = task.loaders.train
        batch = task.loaders.collate([images[0, i] for i in range(4)])
        task.log = lambda *_, **__: None
        task.training_step(batch, 0).backward()
        unreached = [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
        task.save(task.evaluated, tmp_path / "saved")
        saved, own = load_model(tmp_path / "saved").state_dict(), task.evaluated.backbone.state_dict()
        assert saved.keys() == own.keys() and all(torch.equal(saved[key], own[key]) for key in own)
        assert unreached == [] and isinstance(task, SimMIMModule) == (not more)
