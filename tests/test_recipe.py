"""Values of recipes: one line with the file, the field, what came and what is expected, in YAML, in options and in Python."""

import json
from pathlib import Path

import pytest

from groupmixformer.cli.main import main
from groupmixformer.training.recipe import Optimizer, Recipe, RecipeError, read_history, read_recipe, shipped

WRONG = {
    "batch_size: abc": 'batch_size is "abc", expected an integer of at least 1',
    "batch_size: 3.5": "batch_size is 3.5, expected an integer of at least 1",
    "batch_size: 0": "batch_size is 0, expected an integer of at least 1",
    "image_size: true": "image_size is true, expected an integer of at least 1",
    "epochs: null": "epochs is null, expected an integer of at least 1",
    "ema: abc": 'ema is "abc", expected a number from 0 to 1 or null',
    "crop_pct: 87.5": "crop_pct is 87.5, expected a number from 0.01 to 1",
    "precision: fp8": 'precision is "fp8", expected one of auto, fp32, bf16, fp16',
    "optimizer: 3": "optimizer is 3, expected fields, such as name, lr, lr_batch",
    "optimizer: null": "optimizer is null, expected fields, such as name, lr, lr_batch",
    "optimizer: {lr: fast}": 'optimizer.lr is "fast", expected a number of at least 0',
    "optimizer: {lr: .nan}": "optimizer.lr is NaN, expected a number of at least 0",
    "optimizer: {name: 5}": "optimizer.name is 5, expected a text",
    "augmentation: {scale: [1]}": "augmentation.scale is [1], expected a list of 2 numbers",
    "schedule: {milestones: [a]}": 'schedule.milestones is ["a"], expected a list of integers',
    "task_options: 3": "task_options is 3, expected fields",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_value_in_a_file_is_named_in_a_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: digits\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(str(path))
    assert str(caught.value) == f"{path}: {WRONG[text]}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--batch-size", "abc"], '--batch_size is "abc", expected an integer of at least 1'),
        (["--batch-size=0"], "--batch_size is 0, expected an integer of at least 1"),
        (["--optimizer.lr=fast"], '--optimizer.lr is "fast", expected a number of at least 0'),
        (["--optimizer.lr", "-1"], '--optimizer.lr is "-1", expected a number of at least 0'),
        (["--precision", "fp8"], '--precision is "fp8", expected one of auto, fp32, bf16, fp16'),
    ],
)
def test_a_wrong_value_of_an_option_is_named_in_a_line(capsys, option, expected):
    assert main(["train", "digits", *option]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"gmf: error: {expected}".partition(" is ")[0])
    assert line.endswith(expected.partition(", ")[2])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Recipe(3), "data is 3, expected a text"),
        (lambda: Recipe("digits", batch_size="4"), 'batch_size is "4", expected an integer of at least 1'),
        (lambda: Recipe("digits", optimizer={"lr": 1}), 'optimizer is {"lr": 1}, expected fields, such as name, lr, lr_batch'),
        (lambda: Optimizer(lr=float("inf")), "lr is Infinity, expected a number of at least 0"),
    ],
)
def test_python_is_told_the_same(make, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        make()
    assert str(caught.value) == expected


def test_every_shipped_recipe_is_right():
    for name in shipped():
        assert read_recipe(name, ["--data", "x"] if name == "folder" else [])


def test_a_byte_order_mark_and_the_home_folder_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffdata: ~/photos\nout: ~/runs/a\ncheckpoint: ~/old\noptimizer: {lr: 1e-3}\n", encoding="utf-8")
    recipe = read_recipe(str(path))
    assert (recipe.data, recipe.out, recipe.checkpoint) == tuple(f"{tmp_path}/{name}" for name in ("photos", "runs/a", "old"))
    assert recipe.optimizer.lr == 1e-3
    assert main(["train", str(path), "--root=~/r", "--print", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["root"] == f"{tmp_path}/r"
    assert Recipe("wds/x", root="https://host//x").root == "https://host//x"


def test_a_history_that_no_run_wrote_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: digits\nhistory: 3\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: history is 3, expected what a run writes: leave it out"):
        read_history(Path(tmp_path / "recipe.yaml"))
