"""Cross-validation: ordinary runs, each of which holds out a part of its own, and what they have in common."""

import csv
import json
import shutil
import statistics

import pytest
from test_split import TINY, copies, gmf, parts, write_flat

from groupmixformer.tasks.cross_validation import cross_validate, summarise
from groupmixformer.training.recipe import read_recipe


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = write_flat(tmp_path_factory.mktemp("folds"), {"cat": 8, "dog": 10})
    copies(folder / "cat" / "0.png")
    return folder


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_deviations_are_those_of_a_sample():
    found = summarise([{"fold": 1, "run": "a", "top1": 0.5}, {"fold": 2, "run": "b", "top1": 0.7, "other": 1.0}])
    assert found == {"mean": {"top1": pytest.approx(0.6)}, "std": {"top1": pytest.approx(statistics.stdev([0.5, 0.7]))}}


@pytest.mark.parametrize("started", ["by torchrun", "by the recipe"])
def test_folds_of_several_processes_are_refused(flat, tmp_path, monkeypatch, started):
    options = ["--data", str(flat), "--out", str(tmp_path / "cv"), "--folds", "3", *TINY]
    if started == "by torchrun":
        for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    else:
        options += ["--devices", "2"]
    with pytest.raises(ValueError, match="got 3 folds and several processes, expected one: train each fold on its own"):
        cross_validate(read_recipe("folder", options), lambda own, resume: {})
    assert not (tmp_path / "cv").exists()


def test_each_fold_is_trained_by_a_recipe_of_its_own_and_continued_where_it_stopped(flat, tmp_path):
    recipe = read_recipe("folder", ["--data", str(flat), "--out", str(tmp_path / "cv"), "--folds", "3", *TINY])
    trained = []

    def train_run(own, resume):
        trained.append((own.fold, own.out, resume))
        if len(trained) == 2:
            raise SystemExit(143)
        return {"top1": own.fold / 4, "images": 5, "images_per_second": 9.0, "seconds": 1.0, "crop_pct": 0.9}

    with pytest.raises(SystemExit):
        cross_validate(recipe, train_run)
    with pytest.raises(ValueError, match="continue it with --resume"):
        cross_validate(recipe, train_run)
    result, table = cross_validate(recipe, train_run, resume=True)
    folders = [str(tmp_path / "cv" / f"fold-{fold}") for fold in (1, 2, 3)]
    begun = [(1, folders[0], False), (2, folders[1], False)]
    assert trained == [*begun, *((fold, folder, "auto") for fold, folder in enumerate(folders, start=1))]
    assert result["mean"] == {"top1": 0.5} and result["std"] == {"top1": 0.25}
    assert [line.split() for line in table.splitlines()][-3:-1] == [["mean", "0.5000"], ["std", "0.2500"]]
    assert sorted(name for held_out in parts(tmp_path / "cv").values() for name in held_out) == names(flat)


@pytest.mark.slow
def test_each_image_is_held_out_once_and_the_summary_is_that_of_the_runs(flat, tmp_path, capsys):
    data, out = shutil.copytree(flat, tmp_path / "data"), tmp_path / "cv"
    told = json.loads(gmf(capsys, "train", "folder", "--data", data, "--out", out, "--folds", "3", *TINY, "--json").out)
    held_out = [parts(out / f"fold-{fold}")["val"] for fold in (1, 2, 3)]
    assert sorted(name for fold in held_out for name in fold) == names(data)
    family = {name for name in names(data) if name.startswith("cat/0")}
    assert [len(family & set(fold)) for fold in held_out].count(0) == 2
    assert parts(out) == {str(i + 1): fold for i, fold in enumerate(held_out)}

    measured = [json.loads(gmf(capsys, "eval", out / f"fold-{fold}", "--json").out) for fold in (1, 2, 3)]
    assert [row["images"] for row in measured] == [len(fold) for fold in held_out]
    for name in ("top1", "loss"):
        values = [row[name] for row in measured]
        assert told["mean"][name] == pytest.approx(statistics.mean(values))
        assert told["std"][name] == pytest.approx(statistics.stdev(values))
    assert not any("second" in name for name in told["mean"])
    stored = json.loads((out / "summary.json").read_text())
    assert stored == {name: told[name] for name in ("folds", "mean", "std")}
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [row["fold"] for row in rows] == ["1", "2", "3", "mean", "std"]
    assert float(rows[3]["top1"]) == pytest.approx(told["mean"]["top1"])

    error = gmf(capsys, "train", "folder", "--data", data, "--out", out, "--folds", "3", *TINY, code=1).err
    assert "continue it with --resume" in error
    # A fold that is lost is trained again, on the same parts although a file was added; the others stay as they are.
    weights = (out / "fold-1" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "fold-2")
    write_flat(data, {"cat": 1, "dog": 0}, start=900)
    result = gmf(capsys, "train", out / "recipe.yaml", "--resume", "--json")
    again = json.loads(result.out)
    assert parts(out / "fold-2")["val"] == held_out[1] and any("1 images were added" in note for note in again["notes"])
    assert again["mean"]["top1"] == told["mean"]["top1"] and again["mean"]["loss"] == pytest.approx(told["mean"]["loss"])
    assert (out / "fold-1" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--resume"], "holds no cross-validation to resume"),
        (["--devices", "2"], "train each fold on its own, with --fold 1"),
        (["--data", "digits"], "has a training and a held-out part of its own"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused_in_a_line(flat, tmp_path, capsys, options, expected):
    words = ["train", "folder", "--data", flat, "--out", tmp_path / "cv", "--folds", "3", *TINY, *options]
    error = gmf(capsys, *words, code=1).err
    assert expected in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_fold_alone_is_that_of_all(flat, tmp_path, capsys):
    options = ["--data", flat, "--folds", "3", "--seed", "4", *TINY]
    gmf(capsys, "train", "folder", "--out", tmp_path / "alone", "--fold", "2", *options)
    split = parts(tmp_path / "alone")
    assert sorted([*split["train"], *split["val"]]) == names(flat) and len(split["val"]) in (7, 8)
