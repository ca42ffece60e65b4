"""Learning with less: teachers, adapters, poolings."""

import copy
import json
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from kill_and_resume import differences

from groupmixformer import GroupMixFormer, fuse, load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.models.adapters import add_adapters, trained_names
from groupmixformer.models.checkpoint import load_model, save_checkpoint
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


@pytest.mark.slow
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


# Adapters


@pytest.fixture(scope="module")
def base(randomise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    save_checkpoint(randomise(GroupMixFormer(**STAGES, num_classes=4)).eval(), folder)
    return folder


def adapted(model, randomise, **adapter):
    """The model with adapters whose weights are not zero."""
    chosen = {"kind": "lora", "rank": 4, "alpha": None, "targets": ["qkv", "proj", "fc1", "fc2"], **adapter}
    model = copy.deepcopy(model)
    add_adapters(model, chosen)
    for name in sorted(trained_names(model)):
        torch.nn.init.normal_(model.get_parameter(name), std=0.2)
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
def test_adapters_begin_as_the_model_and_are_fused_with_it(base, randomise, kind):
    plain, images = load_checkpoint(base), torch.randn(2, 3, 64, 48)
    begun = copy.deepcopy(plain)
    add_adapters(begun, {"kind": kind, "rank": 4, "alpha": None, "targets": ["qkv", "fc1"]})
    torch.testing.assert_close(begun.eval()(images), plain(images))
    assert all(torch.equal(begun.state_dict()[name], t) for name, t in plain.state_dict().items() if name in begun.state_dict())
    model = adapted(plain, randomise, kind=kind)
    with torch.no_grad():
        found = model(images)
        assert (found - plain(images)).norm() > 0.1 * found.norm()
        torch.testing.assert_close(fuse(model)(images), found, rtol=1e-3, atol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == trained_names(model) >= {"head.fc.weight", "head.fc.bias"}
    assert not any("norm" in name or "aggregators" in name for name in trained)


def test_adaptformer_is_the_bottleneck_of_the_paper_beside_the_mlp(base, randomise):
    model = adapted(load_checkpoint(base), randomise, kind="adaptformer", alpha=0.5)
    mlp, x = model.stages[1].blocks[0].mlp, torch.randn(2, 30, 5, 6)
    tokens = x.flatten(2).transpose(1, 2)
    beside = (tokens @ mlp.down.weight.T + mlp.down.bias).relu() @ mlp.up.weight.T + mlp.up.bias
    torch.testing.assert_close(mlp(x), mlp.base_layer(x) + 0.5 * beside.transpose(1, 2).view(2, 30, 5, 6))


@pytest.mark.parametrize("kind", ["lora", "adaptformer", "linear_probe"])
def test_a_run_with_adapters_is_small_and_opens_with_its_base(photos, base, tmp_path, interrupt, kind):
    home = tmp_path / "home"
    shutil.copytree(base, home / "base")
    options = ["--checkpoint", home / "base", "--adapter.kind", kind, "--adapter.rank", 2, "--ema", 0.5]
    options += ["--save-minutes", 0, "--epochs", 2]
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        fit(photos, home / "run", *options)
    run = fit(photos, home / "run", *options, resume=True)
    if kind == "lora":  # the others differ in nothing that is saved
        assert differences(fit(photos, tmp_path / "whole", *options), run) == []
    task = build_task(recipe(photos, tmp_path, *options), 1)
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    names = trained_names(task.model)
    assert {name.removeprefix("model.") for name in stored if name.startswith("model.")} == names
    config = json.loads((run / "config.json").read_text())
    assert config["adapter"]["base"]["path"] == "../base" and (run / "model.safetensors").stat().st_size < 20_000
    # What is frozen is the base's to the bit; the rest has learnt.
    model, plain = load_checkpoint(run), load_checkpoint(home / "base")
    free = ("qkv", "proj", "fc1", "fc2") if kind == "lora" else ()
    for name, tensor in plain.state_dict().items():
        name = name.replace(".mlp.", ".mlp.base_layer.") if kind == "adaptformer" else name
        if not name.startswith("head.fc") and not any(f".{layer}.weight" in name for layer in free):
            assert torch.equal(model.state_dict()[name], tensor), name
    changed = model.state_dict()["stages.0.blocks.0.attn.qkv.weight"] - plain.state_dict()["stages.0.blocks.0.attn.qkv.weight"]
    assert bool(changed.any()) == (kind == "lora") and torch.linalg.matrix_rank(changed, atol=1e-6) <= 2
    assert model.pretrained_cfg["label_names"] == task.class_names
    images = torch.randn(1, 3, 32, 32)
    logits = model(images)
    # The pair may be moved; a published run needs no base.
    moved = home.rename(tmp_path / "moved") / "run"
    torch.testing.assert_close(load_checkpoint(moved)(images), logits)
    published = tmp_path / "published"
    published.mkdir()
    network = Run.open(moved).definition.publish(Run.open(moved).folder, published)
    torch.testing.assert_close(load_checkpoint(published)(images), logits)
    assert ("timm.create_model" in network.use) == (kind != "adaptformer")
    # Another base, or none, is refused in a line.
    save_checkpoint(GroupMixFormer(**STAGES, num_classes=4), tmp_path / "moved" / "base")
    with pytest.raises(ValueError, match=r"base .* has the checksum \w+, expected \w+: it is another model"):
        load_checkpoint(moved)
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(FileNotFoundError, match=r"its base .*base \(checksum \w+\) is not at .*/base: put it there"):
        load_checkpoint(moved)


@pytest.mark.slow
def test_adaptformer_is_exported_as_it_is(base, randomise, tmp_path):
    save_checkpoint(adapted(load_checkpoint(base), randomise, kind="adaptformer"), tmp_path / "run")
    result = Run.open(tmp_path / "run").export("pt2", tmp_path / "it.pt2")  # which is compared with the model
    assert (tmp_path / "it.pt2").exists() and result


def test_lora_of_a_model_of_timm(photos, tmp_path):
    torch.manual_seed(0)
    first = fit(photos, tmp_path / "first", "--model", "test_vit")
    run = fit(photos, tmp_path / "run", "--checkpoint", first, "--adapter.kind", "lora", "--optimizer.lr", "0.1")
    model, plain = load_model(run), load_model(first)
    changed = {n for n, tensor in plain.state_dict().items() if not torch.equal(tensor, model.state_dict()[n])}
    assert {name.rsplit(".", 2)[-2] for name in changed} <= {"qkv", "proj", "fc1", "fc2", "head"} and len(changed) > 4


def test_adapters_that_cannot_be_are_refused_in_a_line(photos, base, tmp_path):
    with pytest.raises(ValueError, match="adapter lora is for a trained model: name one with --checkpoint"):
        build_task(recipe(photos, tmp_path, "--adapter.kind", "lora"), 1)
    wrong = ["--checkpoint", base, "--adapter.kind", "lora", "--adapter.targets", "[query]"]
    with pytest.raises(ValueError, match="GroupMixFormer has no linear layers query: it has fc, fc1, fc2, proj, qkv"):
        build_task(recipe(photos, tmp_path, *wrong), 1)
    run = fit(photos, tmp_path / "run", "--checkpoint", base, "--adapter.kind", "linear_probe")
    with pytest.raises(ValueError, match="has adapters itself: write it whole first"):
        build_task(recipe(photos, tmp_path, "--checkpoint", run, "--adapter.kind", "lora"), 1)
    config = json.loads((run / "config.json").read_text())
    config["adapter"]["base"]["path"] = "."
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs a base itself"):
        load_checkpoint(run)


# Poolings


@pytest.mark.parametrize("pool", ["ggem", "simpool"])
def test_poolings_are_by_name_and_kept(tmp_path, randomise, pool):
    model = randomise(timm.create_model("groupmixformer_mobile", global_pool=pool, num_classes=3, **STAGES)).eval()
    if pool == "ggem":
        torch.nn.init.uniform_(model.head.global_pool.p, 1, 4)
    images = torch.randn(2, 3, 64, 32)
    logits, maps = model(images), model.forward_features(images)
    save_checkpoint(model, tmp_path / "run", ["a", "b", "c"])
    torch.testing.assert_close(load_checkpoint(tmp_path / "run")(images), logits)
    (tmp_path / "run" / "config.json").unlink()
    torch.testing.assert_close(load_checkpoint(tmp_path / "run" / "model.safetensors")(images), logits)
    torch.testing.assert_close(fuse(model)(images), logits, rtol=1e-3, atol=1e-4)
    before = copy.deepcopy(model.head.global_pool.state_dict())
    model.reset_classifier(5)
    assert all(torch.equal(model.head.global_pool.state_dict()[name], tensor) for name, tensor in before.items())
    if pool == "ggem":
        p = model.head.global_pool.p.detach()
        expected = [(maps[:, c].clamp(min=1e-6) ** p[c // 3]).mean((1, 2)) ** (1 / p[c // 3]) for c in range(30)]
        torch.testing.assert_close(model.forward_head(maps, pre_logits=True), torch.stack(expected, 1))
