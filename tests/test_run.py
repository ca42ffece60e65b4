"""`Run`, as a notebook uses it, for each kind of path and task; what it reads and imports; a task from another package."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from pkgutil import resolve_name

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import groupmixformer
from groupmixformer import GroupMixFormer, Run, run_folder
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import RunFolder, save_network
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.registry import TaskSpec, find_task, task_names

TINY = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
NAMES = ["ash", "birch", "cedar"]
SMALL = ["--image_size", "32", "--batch_size", "8", "--workers", "0"]
TASKS = ["classification", "detection", "segmentation"]
SLOW_TASKS = ["classification", *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, randomise):
    """A folder with a network for each task."""
    from groupmixformer.tasks.detection.model import Detector
    from groupmixformer.tasks.segmentation.model import Segmenter

    folder, backbone = tmp_path_factory.mktemp("runs"), Backbone("groupmixformer_mobile", TINY)
    save_checkpoint(
        randomise(GroupMixFormer(num_classes=3, **TINY)), folder / "classification", NAMES, {"input_size": (3, 64, 64)}
    )

    def save(task, network, settings, **config):
        network_config = {"backbone": dataclasses.asdict(backbone), **settings}
        save_network(
            randomise(network), folder / task, {"task": task, "class_names": NAMES, **config, "network": network_config}
        )

    settings = {"num_classes": 3, "architecture": "mask_rcnn", "image_size": 64, "max_size": 96}
    settings |= {"fpn_channels": 32, "max_detections": 5}
    save("detection", Detector(backbone, **settings), settings, category_ids=[3, 4, 7])
    settings = {"num_classes": 3, "decoder": "fpn", "image_size": 64, "channels": 64}
    colors = [[0, 90, 0], [200, 0, 0], [0, 0, 200]]
    save("segmentation", Segmenter(backbone, **settings), settings, class_ids=[0, 1, 2], colors=colors)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 72), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def counted(monkeypatch):
    """How often config.json was parsed."""
    parsed, real = [], run_folder._read_config
    monkeypatch.setattr(run_folder, "_read_config", lambda path: parsed.append(path) or real(path))
    return parsed


# Using it


@pytest.mark.parametrize("task", TASKS)
def test_predictions_have_the_coordinates_that_people_see(runs, image, tmp_path, task):
    with Image.open(image) as upright:
        stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x112] = 6  # lies on its side
    stored.save(tmp_path / image.name, exif=exif)
    options = {"score_threshold": 0.0} if task == "detection" else {}
    seen, turned = Run.open(runs / task).predict([image, tmp_path / image.name], device="cpu", **options)
    assert turned == seen
    assert seen.files or task == "classification"


@pytest.mark.parametrize("task", SLOW_TASKS)
def test_a_notebook(runs, image, counted, task):
    run = Run.open(runs / task)
    assert (run.path, run.task, run.class_names) == (runs / task, task, NAMES)
    assert run.config.get("task", "classification") == task
    assert (run.recipe, run.metrics, run.versions) == (None, [], {})
    found = run.predict(image)
    assert {"classification": "classes", "detection": "objects", "segmentation": "shares"}[task] in found.result
    assert bool(found.files) == (task != "classification")
    # Whatever an image comes as, it is the same image.
    opened = Image.open(image)
    for other in (str(image), opened, np.asarray(opened)):
        assert run.predict(other).result == found.result
    assert [one.result for one in run.predict([image, opened])] == [found.result] * 2
    assert run.predictor() is run.predictor() and run.predictor(image_size=32) is not run.predictor()
    network = run.load()
    assert isinstance(network, torch.nn.Module) and not network.training and network is not run.load()
    explained = run.explain(image, queries=[(20, 30)], stages=[1])
    assert explained.result["queries"] == [[20, 30]] and list(explained.files) == ["-explained.png", "-explained.npz"]
    assert len(counted) == 1  # for all that


def test_a_trained_run(photos, tmp_path, image):
    assert main(["train", "folder", "--data", str(photos), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]) == 0
    run = Run.open(tmp_path / "run")
    assert run.recipe.epochs == 1 and run.recipe.data == str(photos)
    assert [row["epoch"] for row in run.metrics] == [0] and "torch" in run.versions
    measured = run.evaluate(batch_size=4)
    assert measured.result["top1"] == pytest.approx(run.metrics[0]["val_top1"]) and measured.result["batch_size"] == 4
    assert measured.result["images"] == run.evaluate(str(photos / "val"), device="cpu", image_size=48).result["images"]
    assert sorted(path.name for path in run.folder.examples.iterdir())


@pytest.mark.slow
def test_a_run_is_exported(runs, tmp_path):
    result = Run.open(runs / "classification").export("pt2", tmp_path / "run.pt2")
    assert result["errors"] and (tmp_path / "run.pt2").is_file()


def test_options_of_a_task(runs, image):
    assert len(Run.open(runs / "classification").predict(image, top=2).result["classes"]) == 2
    objects = Run.open(runs / "detection").predict(image, score_threshold=0.01).result["objects"]
    assert len(objects) >= len(Run.open(runs / "detection").predict(image, score_threshold=0.9).result["objects"])
    with pytest.raises(ValueError, match=r"^top is for classification, and .*detection holds a model for detection$"):
        Run.open(runs / "detection").predict(image, top=2)
    with pytest.raises(ValueError, match=r"^no option tops, expected some of batch_size, crop_mode"):
        Run.open(runs / "classification").predict(image, tops=2)
    with pytest.raises(
        ValueError, match=r"^batch_size is no option of predict, expected some of top, score_threshold, test_size"
    ):
        Run.open(runs / "classification").predict(image, batch_size=2)
    with pytest.raises(ValueError, match=r"^top is no option of explain, expected some of wanted_class$"):
        Run.open(runs / "classification").explain(image, top=2)
    with pytest.raises(ValueError, match="has no recipe that names a data set"):
        Run.open(runs / "classification").evaluate()


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint file or folder"):
        Run.open(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"task": "detecton"}')
    with pytest.raises(ValueError, match=r"no task detecton, expected one of .*: the nearest is detection$"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: not JSON"):  # named once
        Run.open(tmp_path)
    with pytest.raises(ValueError, match=r"got an array of float64 of shape \(4, 4\), expected uint8"):
        groupmixformer.run.open_image(np.zeros((4, 4)))


# Kinds of paths


def test_a_checkpoint_file(runs, image, tmp_path):
    alone = shutil.copyfile(runs / "classification" / "model.safetensors", tmp_path / "model.safetensors")
    run = Run.open(alone)
    assert (run.task, run.config, run.class_names) == ("classification", {}, ["0", "1", "2"])
    assert len(run.predict(image).result["classes"]) == 3


@pytest.mark.parametrize("task", SLOW_TASKS)
def test_a_hub_is_asked_once(runs, image, monkeypatch, counted, task):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(runs / task)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = Run.open("hf-hub:me/trees@v2")
    assert run.path == runs / task and run.predict(image).text
    run.load()
    assert asked == [("me/trees", "v2")] and len(counted) == 1


@pytest.mark.parametrize("command", ["predict", "eval", "explain", pytest.param("export", marks=pytest.mark.slow)])
def test_a_command_asks_a_hub_once_and_parses_each_file_once(runs, image, monkeypatch, tmp_path, command):
    """Not only config.json, and wherever it may be parsed."""
    asked, read = [], []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(runs / "classification")

    def read_text(path, *args, **kwargs):
        read.append(path)
        return real(path, *args, **kwargs)

    for split in ("train", "val"):
        for name in NAMES:
            (tmp_path / "trees" / split / name).mkdir(parents=True)
            shutil.copy(image, tmp_path / "trees" / split / name)
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {
        "predict": [image],
        "eval": ["--data", tmp_path / "trees"],
        "explain": [image, "--out", tmp_path],
        "export": ["--format", "pt2", "--out", tmp_path / "a.pt2"],
    }[command]
    assert main([command, "hf-hub:me/trees", *map(str, options)]) == 0
    assert asked == [("me/trees", None)]
    assert [path for path in read if path.parent == runs / "classification"] == [runs / "classification" / "config.json"]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("command", ["predict", "explain"])
def test_commands_parse_the_config_of_other_tasks_once(runs, image, counted, tmp_path, task, command):
    assert main([command, str(runs / task), str(image), "--out", str(tmp_path)]) == 0
    assert counted == [runs / task / "config.json"]


def test_what_the_folder_holds_is_given_to_every_loader(runs, counted):
    folder = RunFolder(runs / "classification")
    assert RunFolder.of(folder) is folder
    groupmixformer.load_checkpoint(folder)
    groupmixformer.load_checkpoint(folder)
    assert len(counted) == 1


# What is imported


def fresh(script, *argv):
    """Run a script in a new process; return the modules that it imported."""
    script = f"import sys\n{textwrap.dedent(script)}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


TRAINING = {"lightning", "torchmetrics", "jsonargparse", "tensorboard", "sklearn"}


@pytest.mark.slow
@pytest.mark.parametrize("task", SLOW_TASKS)
def test_inference_imports_nothing_of_training(runs, image, task):
    load = {"detection": "load_detector", "segmentation": "load_segmenter"}.get(task, "load_checkpoint")
    imported = fresh(
        f"""
        import groupmixformer
        groupmixformer.{load}(sys.argv[1])
        assert "matplotlib" not in sys.modules
        groupmixformer.Run.open(sys.argv[1]).predict(sys.argv[2])
        """,
        runs / task,
        image,
    )
    assert not imported & TRAINING
    assert task != "classification" or "matplotlib" not in imported  # which brings the font that names are drawn in


def test_the_package_alone_is_light():
    imported = fresh("import groupmixformer; groupmixformer.Run")
    assert not imported & {*TRAINING, "matplotlib", "segmentation_models_pytorch", "faster_coco_eval", "fastapi", "onnx"}


# A task from another package

BRIGHTNESS = '''
import torch
from PIL import Image
from torch import nn
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as F

from groupmixformer.data.images import find_images, read_image
from groupmixformer.data.samples import Samples
from groupmixformer.run_folder import save_network
from groupmixformer.tasks.predictor import EvalResult, Predicted, Predictor, Stopwatch
from groupmixformer.tasks.registry import TaskSpec


class Photos(Samples):
    """Images with the mean of their pixels."""

    def __init__(self, folder, seed=0):
        self.paths, self.seed, self.class_names = find_images([folder]), seed, ["brightness"]

    def __len__(self):
        return len(self.paths)

    def read(self, index):
        return read_image(self.paths[index])

    def for_training(self, content):
        pixels = to_pixels(content)
        return pixels, pixels.mean()

    def for_evaluation(self, content):
        return self.for_training(content or Image.new("RGB", (8, 8)))


def to_pixels(image):
    return F.to_dtype(F.pil_to_tensor(image.resize((8, 8))), torch.float32, scale=True)


class Brightness(TaskSpec):
    name = "brightness"
    predictor_class = "brightness:BrightnessPredictor"

    def build_task(self, recipe, world_size):
        from groupmixformer.training.loaders import DataModule
        from groupmixformer.training.module import Task

        class Module(Task):
            monitor = "val_score"

            def training_step(self, batch, batch_idx):
                images, values, problems = batch
                loss = (self.model(images)[:, 0] - values).square().mean()
                self.log_loss(loss, len(images))
                return loss

            def validation_step(self, batch, batch_idx):
                images, values, _ = batch
                error = (self.model(images)[:, 0] - values).square().mean()
                self.log_dict({"val_score": 1 - error, "val_images": float(len(images))}, batch_size=len(images))

            def save(self, model, folder):
                save_network(model, folder, {"task": "brightness", "class_names": ["brightness"], "network": {"side": 8}})

        train, held_out = Photos(recipe.data + "/train", recipe.seed), Photos(recipe.data + "/val")
        loaders = DataModule(train, held_out, recipe.batch_size, recipe.workers, recipe.seed, collate)
        return Module(recipe, network(recipe.task_options["bias"]), loaders, ["brightness"], world_size)


def collate(samples):
    return default_collate([sample[:2] for sample in samples]) + [[]]


def network(bias):
    linear = nn.Linear(3 * 8 * 8, 1, bias=bias)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), linear)


class BrightnessPredictor(Predictor):
    metric = ("val_score", "score")

    def load(self, run, image_size):
        config, weights = run.read_network("brightness")
        self.class_names = config["class_names"]
        model = network("1.bias" in weights)
        model.load_state_dict(weights)
        return model.eval(), config

    def predict(self, image, name=""):
        with torch.inference_mode():
            value = self.model(to_pixels(image)[None].to(self.device)).item()
        return Predicted({"brightness": value}, f"brightness {value:.2f}", {}, [])

    def open_data(self, data):
        return Photos(data + "/val")

    def evaluate(self, images, workers=0, progress=lambda items, _: items):
        watch, error = Stopwatch(), 0.0
        for index in progress(range(len(images)), "evaluating"):
            image = images.read(index)
            with watch:
                error += (self.predict(image).result["brightness"] - to_pixels(image).mean().item()) ** 2 / len(images)
        result = {"score": 1 - error, "images": len(images), **watch.rates(len(images))}
        return EvalResult(result, f"score {1 - error:.4f}", "", [])
'''


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """Install a package that brings a task; give a recipe for it."""
    site = tmp_path / "site"
    (site / "brightness-1.0.dist-info").mkdir(parents=True)
    (site / "brightness.py").write_text(BRIGHTNESS)
    (site / "brightness-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    (site / "brightness-1.0.dist-info" / "entry_points.txt").write_text(
        "[groupmixformer.tasks]\nbrightness = brightness:Brightness\nbroken = brightness:Photos\n"
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    recipe = tmp_path / "brightness.yaml"
    recipe.write_text("task: brightness\ndata: photos\nepochs: 8\nbatch_size: 8\nworkers: 0\ntask_options: {bias: true}\n")
    yield recipe
    find_task.cache_clear()
    sys.modules.pop("brightness", None)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def test_a_task_of_another_package(brightness, photos, tmp_path, capsys):
    assert task_names() == [*TASKS, "pretraining", "brightness", "broken"]
    printed = gmf(capsys, "train", brightness, "--print").out
    assert "task: brightness" in printed and "bias: true" in printed and "detector" not in printed
    out = tmp_path / "run"
    options = ["--data", photos, "--out", out, "--optimizer.lr", "0.02", "--optimizer.weight_decay", "0", "--json"]
    trained = json.loads(gmf(capsys, "train", brightness, *options).out)
    assert trained["score"] > 0.98 and (out / "report.html").is_file()
    measured = json.loads(gmf(capsys, "eval", out, "--json").out)
    assert measured["task"] == "brightness" and measured["score"] == pytest.approx(trained["score"])
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    Image.new("RGB", (20, 30), (200,) * 3).save(light)
    Image.new("RGB", (30, 20), (40,) * 3).save(dark)
    found = json.loads(gmf(capsys, "predict", out, light, dark, "--json").out)["images"]
    assert found[0]["brightness"] > found[1]["brightness"] + 0.2
    assert Run.open(out).predict(dark).result == {"brightness": found[1]["brightness"]}
    assert Run.open(out).recipe.task_options == {"bias": True}
    for command, more, words, code in (
        ("predict", [light, "--top", "3"], "--top is for classification, and", 2),
        ("explain", [light], "holds a model for brightness, which has no explanations", 1),
        ("export", ["--format", "onnx", "--out", tmp_path / "x.onnx"], "for brightness, which cannot be exported", 1),
    ):
        assert words in gmf(capsys, command, out, *more, code=code).err
    assert "gmf bench has no network for brightness" in gmf(capsys, "bench", "resnet18", "--task", "brightness", code=1).err
    assert "no task britness, expected one of classification, " in gmf(capsys, "bench", "--task", "britness", code=2).err
    files = json.loads(gmf(capsys, "push", out, "me/light", "--dry-run", tmp_path / "card", "--json").out)["files"]
    assert files == ["README.md", "config.json", "model.safetensors", "recipe.yaml"]
    assert 'Run.open("hf-hub:me/light")' in (tmp_path / "card" / "README.md").read_text()


def test_fields_of_other_tasks_are_refused(brightness, tmp_path, capsys):
    brightness.write_text(brightness.read_text().replace("task: brightness", "task: britness"))
    said = gmf(capsys, "train", brightness, "--out", tmp_path / "run", code=2).err
    assert "no task britness, expected one of classification, " in said and "the nearest is brightness" in said
    said = gmf(capsys, "train", "digits", "--task_options", '{"bias": true}', "--print", code=2).err
    assert "task_options is a field for tasks of other packages, and the recipe's task is classification" in said
    with pytest.raises(ValueError, match=r"the task broken is brightness:Photos, expected a subclass of .*TaskSpec$"):
        find_task("broken")


def test_what_every_task_of_ours_says(runs):
    for name in TASKS:
        task = find_task(name)
        assert isinstance(task, TaskSpec) and task.name == name and task.hub_metrics
        for place in (task.module_class, task.predictor_class, task.explainer_class):
            assert isinstance(resolve_name(place), type)
