"""Learning with less: teachers, adapters, poolings."""

import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from kill_and_resume import differences

from groupmixformer import GroupMixFormer
from groupmixformer.cli.main import main
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run import Run
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.trainer import train

STAGES = {"embed_dims": (20, 30), "depths": (1, 1), "mlp_ratios": (2, 2)}
TINY = ["--image-size", "32", "--crop-pct", "1.0", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--epochs", "1"]
TINY += ["--optimizer.lr_batch", "null", "--model", "test_resnet"]


def recipe(data, out, *more):
    return read_recipe("folder", ["--data", str(data), "--out", str(out), *TINY, *map(str, more)])


def fit(data, out, *more, resume=False):
    return train(recipe(data, out, *more), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def last_line(result):
    return result.err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def teacher(randomise, tmp_path_factory):
    """A run's folder: its classes are those of `photos` in another order, with one more, and its colours are others."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    model = randomise(GroupMixFormer(**STAGES, num_classes=3)).eval()
    save_checkpoint(model, folder, ["zero", "two", "one"], {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)})
    return folder


@pytest.fixture
def interrupt(monkeypatch):
    """Give a function that stops the next run before a step."""
    real = ClassificationModule.training_step

    def at(step):
        def training_step(self, batch, batch_idx):
            if batch_idx == step:
                monkeypatch.setattr(ClassificationModule, "training_step", real)
                raise KeyboardInterrupt
            return real(self, batch, batch_idx)

        monkeypatch.setattr(ClassificationModule, "training_step", training_step)

    return at


def batch_of(task):
    images, classes = zip(*(task.loaders.train[0, index, 0][:2] for index in range(4)), strict=True)
    return torch.stack(images), torch.tensor(classes), []


def test_the_loss_is_that_of_labels_and_of_the_teachers_probabilities_matched_by_name(photos, teacher, tmp_path):
    task = build_task(
        recipe(photos, tmp_path, "--distill.teacher", teacher, "--distill.weight", 3, "--distill.temperature", 4), 1
    )
    task.log = task.log_loss = lambda *args, **options: None
    task.on_fit_start()
    batch = batch_of(task)
    images, classes, _ = batch
    with torch.no_grad():
        task.eval()
        loss, logits = task.training_step(batch, 0), task.model(images)
        mean, std = (torch.tensor(task.config[name]).view(3, 1, 1) for name in ("mean", "std"))
        own, own_std = torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1), torch.tensor((0.3, 0.2, 0.1)).view(3, 1, 1)
        known = Run.open(teacher).load()((images * std + mean - own) / own_std)
    order = [["zero", "two", "one"].index(name) for name in task.class_names]
    taught = F.kl_div((logits / 4).log_softmax(1), (known[:, order] / 4).softmax(1), reduction="batchmean") * 16
    assert loss.item() == pytest.approx((F.cross_entropy(logits, classes, label_smoothing=0.1) + 3 * taught).item(), rel=1e-4)
    assert order != [0, 1] and not any("teacher" in name for name in task.state_dict())
    task.train()
    assert not any(module.training for module in task.distillation[0].teacher.modules())
    assert not any(p.requires_grad for p in task.distillation[0].teacher.parameters())


def test_features_of_another_width_are_taught_and_a_stopped_run_ends_as_a_whole_one(
    photos, teacher, tmp_path, interrupt, capsys, caplog
):
    options = ["--distill.teacher", teacher, "--distill.kind", "features", "--ema", "0.9", "--epochs", "2"]
    whole = fit(photos, tmp_path / "whole", *options)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        fit(photos, tmp_path / "run", *options, "--save-minutes", 0)
    run = fit(photos, tmp_path / "run", *options, "--save-minutes", 0, resume=True)
    assert differences(whole, run) == []
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    learnt = state["projection.weight"]
    assert learnt.shape == (30, timm.create_model("test_resnet").num_features)
    torch.manual_seed(0)
    begun = build_task(recipe(photos, tmp_path, *options), 1)
    assert not torch.equal(learnt, begun.projection.weight) and not any("teacher" in name for name in state)
    # Another teacher in the same place is named.
    other = shutil.copytree(teacher, tmp_path / "teacher")
    again = fit(photos, tmp_path / "again", "--distill.teacher", other)
    save_checkpoint(GroupMixFormer(**STAGES, num_classes=3), other, ["zero", "two", "one"])
    fit(photos, again, "--distill.teacher", other, "--epochs", "2", resume=True)
    assert "teacher: " in [record.message for record in caplog.records if "changed from there" in record.message][-1]
    # What a run learnt from is told where it is shown, without the teacher.
    shutil.rmtree(other)
    Run.open(again).report()
    assert f"Teacher: {other} (logits, weight 1 beside 1 of the labels, temperature 2)." in (again / "report.html").read_text()
    network = Run.open(again).definition.publish(Run.open(again).folder, tmp_path / "published")
    card = render_card(read_card_info(Run.open(again).folder, network), "me/it", "mit")
    assert "with `teacher` as teacher (logits)" in card and str(tmp_path) not in card
    assert gmf(capsys, "train", again / "recipe.yaml", "--resume", code=1).err.strip().splitlines()[-1] == (
        f"gmf: error: distill.teacher {other}: no such run, checkpoint file or model of timm"
    )


def test_a_teacher_that_cannot_teach_is_named_in_a_line(photos, teacher, tmp_path, capsys, monkeypatch):
    def line(*more):
        return last_line(gmf(capsys, "train", "folder", "--data", photos, "--out", tmp_path / "run", *TINY, *more, code=1))

    other, nameless = tmp_path / "other", tmp_path / "nameless"
    save_checkpoint(GroupMixFormer(**STAGES, num_classes=2), other, ["zero", "three"])
    save_checkpoint(GroupMixFormer(**STAGES, num_classes=5), nameless)
    assert "only the data has one; only the model has three" in line("--distill.teacher", other)
    assert "has 5 classes without names and the data 2" in line("--distill.teacher", nameless)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "distill.teacher resnet9000: no such" in line("--distill.teacher", "resnet9000")
    assert "for segmentation, and" not in line("--distill.teacher", "groupmixformer_small")
    result = gmf(capsys, "train", "folder", "--data", photos, *TINY, "--distill.temperature", "0", code=2)
    assert last_line(result).endswith("distill.temperature is 0.0, expected a number from 0.01 to 1000")


def test_a_model_of_timm_teaches_by_its_name(photos, tmp_path, monkeypatch):
    real, asked = timm.create_model, []

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return real(name, **options, **({"num_classes": 2} if pretrained else {}))

    monkeypatch.setattr(timm, "create_model", create_model)
    task = build_task(recipe(photos, tmp_path, "--distill.teacher", "test_vit", "--distill.label_weight", 0), 1)
    assert ("test_vit", True) in asked and task.distillation[0].task_loss_weight == 0
