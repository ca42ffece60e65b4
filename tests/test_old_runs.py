"""Run folders and recipes that commit 265a602 wrote, before many names changed: data/README.md says how they were made."""

import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from groupmixformer import Run
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.detection.data import to_tensor
from groupmixformer.tasks.detection.model import load_detector
from groupmixformer.tasks.registry import build_task
from groupmixformer.tasks.segmentation.model import load_segmenter, segment
from groupmixformer.training.old_names import FIELDS, PRECISIONS
from groupmixformer.training.recipe import RecipeError, fields_of, read_recipe
from groupmixformer.training.trainer import train

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())  # by the code of then
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # of another version of PyTorch on another machine


@pytest.fixture
def image():
    return Image.open(DATA / "image.png").convert("RGB")


def test_a_classifier_predicts_the_same(image):
    classes = Run.open(DATA / "classification").predict(image, device="cpu", top=10).result["classes"]
    expected = EXPECTED["classification"]["classes"]
    assert [c["class"] for c in classes] == [c["class"] for c in expected]
    assert [c["probability"] for c in classes] == pytest.approx([c["probability"] for c in expected], rel=1e-3, abs=1e-4)


def test_a_detector_finds_the_same(image):
    model, config = load_detector(DATA / "detection")
    assert (config["class_names"], config["category_ids"]) == (["square", "disc"], [3, 7])
    assert model.network.detections_per_img == 20
    model.network.score_thresh = 0.0
    with torch.inference_mode():
        (found,) = model([to_tensor(image)])
    for name, expected in EXPECTED["detection"].items():
        torch.testing.assert_close(found[name][:5], torch.tensor(expected), **TOLERANCE)


def test_a_segmenter_finds_the_same(image):
    model, config = load_segmenter(DATA / "segmentation")
    assert config["class_names"] == ["sky", "road", "car"]
    with torch.inference_mode():
        found = segment(model, model.prepare(image), (image.height, image.width))
    expected = EXPECTED["segmentation"]
    torch.testing.assert_close(found[:, ::12, ::16], torch.tensor(expected["probabilities"]), **TOLERANCE)
    assert found.argmax(dim=0).flatten().bincount(minlength=3).tolist() == pytest.approx(expected["pixels"], abs=5)


def test_a_run_that_was_stopped_inside_an_epoch_ends_as_it_would_have_then(tmp_path):
    run = shutil.copytree(DATA / "classification", tmp_path / "run")
    with lzma.open(run / "checkpoints" / "last.ckpt.xz") as packed:
        (run / "checkpoints" / "last.ckpt").write_bytes(packed.read())
    before = read_metrics(run)
    assert [row["epoch"] for row in before] == [0, 1, 2, 3]
    train(read_recipe(str(run / "recipe.yaml"), ["--out", str(run), "--checkpoint", str(run)]), build_task, resume=True)
    rows = read_metrics(run)
    assert rows[:4] == before
    for row, expected in zip(rows, EXPECTED["metrics"], strict=True):
        # Sums in another order than then: of 360 images, one may change its class.
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, **({"abs": 1.01 / 360} if name == "val_top1" else {"rel": 3e-3})), name
    # The state of the callbacks was found under their old names: the time adds up, and the patience was in use.
    assert rows[4]["seconds"] > before[3]["seconds"]
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["callbacks"]["MetricsCallback"]["best"] == pytest.approx(rows[5]["val_top1"])
    (stopping,) = [value for key, value in state["callbacks"].items() if key.startswith("EarlyStopping")]
    assert (stopping["patience"], stopping["wait_count"]) == (3, 0)


SETTINGS = {
    "detection": {
        "model": "test_convnext",
        "grad_accum_steps": 4,
        "max_unreadable": 0.25,
        "max_skipped_steps": 7,
        "precision": "bf16",
        "detector.fpn_channels": 64,
        "detector.rois_per_image": 128,
        "detector.max_detections": 30,
        "detector.freeze_bn": True,
    },
    "segmentation": {
        "model": "small",
        "precision": "fp16",
        "segmenter.aux_loss_weight": 0.25,
        "segmenter.freeze_bn": True,
    },
}


def setting(recipe, name):
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


def flat(values, prefix=""):
    for name, value in values.items():
        yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


@pytest.mark.parametrize("task", SETTINGS)
@pytest.mark.parametrize("form", ["file", "--name value", "--name=value"])
def test_old_names_in_recipes_and_options_mean_the_same(tmp_path, task, form):
    old = dict(flat(yaml.safe_load((DATA / f"{task}.yaml").read_text())))
    if form == "file":
        recipe = read_recipe(str(DATA / f"{task}.yaml"))
    else:
        (tmp_path / "recipe.yaml").write_text(f"task: {task}\ndata: shapes\n")
        named = {name: value for name, value in old.items() if name not in ("task", "data")}
        pairs = [[f"--{name}={value}"] if "=" in form else [f"--{name}", str(value)] for name, value in named.items()]
        recipe = read_recipe(str(tmp_path / "recipe.yaml"), [word for pair in pairs for word in pair])
    assert {name: setting(recipe, name) for name in SETTINGS[task]} == SETTINGS[task]


def test_the_files_above_hold_every_name_that_changed():
    used = {name for task in SETTINGS for name, _ in flat(yaml.safe_load((DATA / f"{task}.yaml").read_text()))}
    sections = {section: names for section, names in FIELDS.items() if section != "network"}
    assert {f"{section}.{name}".lstrip(".") for section, names in sections.items() for name in names} <= used
    values = {yaml.safe_load(path.read_text())["precision"] for path in DATA.rglob("*.yaml")}
    assert values == set(PRECISIONS)
    network = json.loads((DATA / "detection" / "config.json").read_text())["network"]
    assert set(FIELDS["network"]) <= set(network)


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_the_recipe_of_an_old_run_is_read_whole(task):
    run = Run.open(DATA / task)
    recipe = run.recipe
    assert run.task == recipe.task == task
    old = yaml.safe_load((DATA / task / "recipe.yaml").read_text())
    since = {"val_share", "folds", "fold", "threads", "balance", "distill", "adapter", "loggers", "loss", "elastic"}
    since |= {"in_chans", "mean", "std", "display_channels", "channels_first", "detector.queries", "segmenter.queries"}
    kept = [name for name, _ in flat(fields_of(recipe)) if not {name, name.partition(".")[0]} & since]
    assert len(kept) == len(list(flat(old)))
    assert (recipe.grad_accum_steps, recipe.max_unreadable, recipe.max_skipped_steps) == (2, 0.01, 5)
    assert recipe.precision == "fp32"


@pytest.mark.parametrize("extra", ["model: mobile", "grad_accum_steps: 1", "detector: {width: 8, fpn_channels: 8}"])
def test_a_field_under_both_its_names_is_refused(tmp_path, extra):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: shapes\ntask: detection\nvariant: small\naccumulate: 1\n{extra}\n")
    with pytest.raises(RecipeError, match=r"^\S+: \w+ is an old name of \w+, and both are given: leave one out$"):
        read_recipe(str(path))


def test_dashes_and_underscores_are_the_same_in_options(tmp_path):
    words = ["--batch-size=8", "--optimizer.weight-decay", "0.5", "--augmentation.random_erasing", "0.1", "--out", "a-b_c"]
    recipe = read_recipe("digits", words)
    assert (recipe.batch_size, recipe.optimizer.weight_decay, recipe.augmentation.random_erasing) == (8, 0.5, 0.1)
    assert recipe.out == "a-b_c"
    with pytest.raises(RecipeError, match="no field batch_sise: the nearest is batch_size"):
        read_recipe("digits", ["--batch-sise", "8"])
