"""What a run tells while it trains: the network, steps inside an epoch, lines of 80 columns; loggers by name."""

import csv
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from PIL import Image

from groupmixformer.cli.main import main
from groupmixformer.files import duration
from groupmixformer.tasks.registry import build_task
from groupmixformer.training import progress
from groupmixformer.training.recipe import RecipeError, read_recipe
from groupmixformer.training.trainer import train

SMALL = ["--image_size", "32", "--crop_pct", "1.0", "--batch_size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(16):
        path = root / ("train", "val")[i % 2] / ("cat", "dog")[i // 8] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 40 + i).convert("RGB").save(path)
    return root


def fit(data, out, *more):
    options = ["--data", str(data), "--out", str(out), *SMALL, "--model", "test_resnet", *more]
    return train(read_recipe("folder", options), build_task)


def test_a_run_tells_what_it_trains_and_how_far_it_is(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    fit(photos, tmp_path / "run", "--epochs", "2", "--grad-accum-steps", "2", "--schedule.warmup_epochs", "1")
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    (model,) = [line for line in lines if line.startswith("model test_resnet")]
    task = build_task(read_recipe("folder", ["--data", str(photos), *SMALL, "--model", "test_resnet"]), 1)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in model and "GMACs at 32 x 32" in model and model.endswith("2 classes")
    steps = [line.split("  ")[:2] for line in lines if "  step " in line]
    assert steps[0] == ["epoch 1/2", "step 0/1"] and steps[-1] == ["epoch 2/2", "step 1/1"]
    assert all(line.endswith(" left in this epoch") for line in lines if "  step " in line)
    ends = [line for line in lines if line.startswith("epoch ") and line.endswith(" left")]
    assert [line.split("  ")[0] for line in ends] == ["epoch 1/2", "epoch 2/2"]
    assert ends[-1].endswith(", 0 s left")


def test_a_run_that_only_warms_up_says_so_before_it_begins(photos, tmp_path, caplog):
    fit(photos, tmp_path / "run", "--epochs", "1", "--loggers=[]")
    assert "is warm-up, in which the learning rate only rises" in caplog.text
    assert not list((tmp_path / "run").glob("events*")) and (tmp_path / "run" / "metrics.csv").is_file()


def test_lines_have_80_columns_and_lose_nothing():
    parts = [f"part {i} of what is told" for i in range(9)]
    made = progress.lines(parts)
    assert made.replace("\n    ", "  ").split("  ") == parts
    assert max(map(len, made.splitlines())) <= 80 and made.count("\n") == 2
    assert progress.lines(["x" * 100]) == "x" * 100
    worst = ["epoch 100/300", "loss 1.4838, val loss 2.2038", "top1 0.3083", "110 min, 119 min left"]
    assert "\n" not in progress.lines(worst)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (97, "97 s"), (120, "2 min"), (5400, "90 min"), (9000, "2 h"), (864_000, "10 days")]
)
def test_times_are_told_in_a_unit_that_suits_them(seconds, told):
    assert duration(seconds) == told


def test_the_bar_on_a_terminal_counts_from_1():
    bar = progress.EpochBar()
    bar._trainer = type("Trainer", (), {"max_epochs": 10})()
    assert bar._get_train_description(0) == "epoch 1/10" and bar._get_train_description(9) == "epoch 10/10"


def test_csv_has_the_steps_beside_our_file(photos, tmp_path):
    run = fit(photos, tmp_path / "run", "--epochs", "1", "--loggers=[csv, tensorboard]", "--log_steps", "1")
    with (run / "steps" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["loss"]]) == 2 and list(run.glob("events*"))
    with (run / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_names_the_extra(name, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {extra: [Requirement(line) for line in lines] for extra, lines in extras.items()}
    monkeypatch.setattr("groupmixformer.cli.main.requirements_of_extras", lambda: known)
    options = ["--data", str(photos), "--out", str(tmp_path / "run"), *SMALL, "--epochs", "1", "--model", "test_resnet"]
    assert main(["train", "folder", *options, "--loggers", f"[{name}]"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"this needs {name}" in line and f"pip install 'groupmixformer[{name}]'" in line


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_get_the_recipe(name, tmp_path, monkeypatch):
    told = {}

    class Fake:
        def __init__(self, *names, **arguments):
            told["names"] = [*names, *arguments.values()]

        def log_hyperparams(self, values):
            told["recipe"] = values

    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(progress, {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name], Fake)
    recipe = read_recipe("digits", [f"--loggers=[{name}]"])
    (logger,) = progress.make_loggers(recipe, tmp_path / "mine")
    assert isinstance(logger, Fake) and told["recipe"]["optimizer"]["lr"] == recipe.optimizer.lr
    assert "mine" in told["names"] and "groupmixformer" in told["names"]


def test_an_unknown_logger_names_the_known_ones():
    with pytest.raises(RecipeError, match="a list of some of tensorboard, csv, wandb, mlflow"):
        read_recipe("digits", ["--loggers=[comet]"])
