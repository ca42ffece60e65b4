"""Settings found before a run: the learning rate, the batch size, and fields by a sweep."""

import json
import math
from pathlib import Path

import pytest
from test_split import gmf

from groupmixformer.run import Run
from groupmixformer.tasks.registry import build_task
from groupmixformer.tasks.sweep import Space, open_study, sweep
from groupmixformer.training.recipe import RecipeError, read_recipe
from groupmixformer.training.tuning import find_rate, try_batch_sizes

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SMALL = [
    "--model-options={depths: [1, 1, 1, 1], embed_dims: [10, 20, 20, 20]}",
    "--workers=0",
    "--batch-size=32",
    "--threads=1",
]


def test_a_range_test_raises_the_rate_of_each_group_and_finds_where_the_loss_is_least(tmp_path):
    used = []

    def build(recipe, processes):
        task = build_task(recipe, processes)
        step = task.optimizer_step

        def optimizer_step(*args, **options):
            used.append([group["lr"] for group in args[2].param_groups])
            scales = [group["lr_scale"] for group in args[2].param_groups]
            assert used[-1] == pytest.approx([max(used[-1]) * scale for scale in scales]) and len({*scales}) > 3
            step(*args, **options)

        task.optimizer_step = optimizer_step
        return task

    options = [*SMALL, "--optimizer.layer-decay=0.8", "--optimizer.lr-batch=16", "--grad-accum-steps=2", "--ema=null"]
    recipe = read_recipe("digits", [*options, f"--out={tmp_path / 'run'}"])
    found = find_rate(recipe, build, low=1e-5, high=3.0, steps=12)
    assert len(used) >= len(found.rates) > 6  # it may stop before the last
    assert [max(rates) for rates in used][: len(found.rates)] == pytest.approx([rate * 64 / 16 for rate in found.rates])
    assert found.rates[0] == pytest.approx(1e-5) and found.rates[-1] <= 3.0 + 1e-9
    best = found.rates[found.smoothed.index(min(found.smoothed))]
    assert found.suggestion == pytest.approx(best / 10, rel=0.1)
    assert not (tmp_path / "run").exists()
    page = found.write(tmp_path / "run")
    assert f"Learning rate {found.suggestion:.1e}" in page.read_text() and "mathdefault" not in page.read_text()
    assert json.loads((tmp_path / "run" / "find-lr.json").read_text())["suggestion"] == found.suggestion


def test_the_first_loss_of_a_range_test_is_that_of_training(tmp_path):
    found = find_rate(
        read_recipe("digits", [*SMALL, "--augmentation.label-smoothing=0", "--grad-accum-steps=2"]), build_task, steps=3
    )
    assert found.losses[0] == pytest.approx(math.log(10), abs=0.35) and found.smoothed[0] == pytest.approx(found.losses[0])


@pytest.mark.slow
def test_batch_sizes_are_tried_up_to_the_training_set_or_the_memory(tmp_path, monkeypatch):
    recipe = read_recipe("digits", SMALL)
    rows = list(try_batch_sizes(recipe, build_task))
    sizes = [row.batch_size for row in rows]
    assert sizes == [2**i for i in range(1, len(sizes) + 1)] and sizes[-1] <= 1437
    assert all(row.images_per_second > 0 for row in rows) and rows[-1].memory >= rows[0].memory

    def build(recipe, processes):
        if recipe.batch_size > 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return build_task(recipe, processes)

    assert [row.batch_size for row in try_batch_sizes(recipe, build)] == [2, 4]


def test_settings_are_looked_for_by_one_process():
    with pytest.raises(ValueError, match="--devices 1"):
        find_rate(read_recipe("digits", ["--devices=2"]), build_task)
    with pytest.raises(ValueError, match="2 processes, expected one"):
        sweep("digits", ["--devices=2"], [Space.parse("epochs=1..2")], 1, Path("never"), lambda *_: pytest.fail("begun"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=1e-4..1e-2:log", Space("optimizer.lr", 1e-4, 1e-2, True)),
        ("schedule.warmup_epochs=0.5..3", Space("schedule.warmup_epochs", 0.5, 3.0)),
        ("--optimizer.weight-decay=0..0.1", Space("optimizer.weight_decay", 0.0, 0.1)),
        ("epochs=5..20", Space("epochs", 5.0, 20.0, whole=True)),
        ("model=mobile,tiny", Space("model", choices=("mobile", "tiny"))),
    ],
)
def test_fields_of_a_sweep_are_ranges_or_choices(text, expected):
    assert Space.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["optimizer.lr", "optimizer.lr=1e-3", "optimizer.lr=2..1", "optimizer.lr=0..1:log", "=a,b", "lr=a..b"]
)
def test_other_words_are_refused(text):
    with pytest.raises(RecipeError, match="expected"):
        Space.parse(text)


def test_a_sweep_refuses_unknown_fields_and_values_before_the_first_run(tmp_path):
    for text, problem in (("optimizer.rate=1..2", "no field"), ("epochs=0..3", "epochs"), ("device=cpu,1", None)):
        if problem:
            with pytest.raises(RecipeError, match=problem):
                sweep("digits", [], [Space.parse(text)], 2, tmp_path / "s", lambda *_: pytest.fail("a run was begun"))
    assert not (tmp_path / "s").exists()


class Interrupted(BaseException):
    """What ends a process."""


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_ended_and_finds_the_best(tmp_path):
    out, trained = tmp_path / "sweep", []

    def train_run(recipe, watchers):
        folder = Path(recipe.out)
        trained.append((folder.name, recipe.optimizer.lr, recipe.epochs))
        folder.mkdir(exist_ok=True)
        if len(trained) == 2:
            raise Interrupted
        if len(trained) == 4:
            raise ValueError("the loss is not finite")
        (folder / "metrics.csv").write_text(f"epoch,val_top1\n0,{1 - abs(math.log10(recipe.optimizer.lr) + 3) / 4}\n1,0.1\n")
        (report,) = watchers
        report.metric = "val_top1"
        report.trial.set_user_attr("metric", "val_top1")
        return {}

    given = (
        "digits",
        ["--seed=3"],
        [Space.parse("optimizer.lr=1e-5..1e-1:log"), Space.parse("epochs=2..4")],
        6,
        out,
        train_run,
    )
    with pytest.raises(Interrupted):
        sweep(*given)
    result = sweep(*given)
    # The one that was interrupted is continued in its folder with its values, and counts once; the one that failed counts too.
    assert [name for name, *_ in trained] == ["trial-0", "trial-1", *(name for name, *_ in trained[2:])]
    assert [row for row in trained if row[0] == "trial-1"] == [trained[1]] * 2
    assert len(result["trials"]) == 6 and [row["state"] for row in result["trials"]].count("fail") == 1
    best = max((row for row in result["trials"] if row["value"] is not None), key=lambda row: row["value"])
    assert result["best"] == best and abs(math.log10(best["optimizer.lr"]) + 3) < 1.5
    assert f"--optimizer.lr={best['optimizer.lr']}" in result["command"] and "--seed=3" in result["command"]
    assert all(isinstance(row["epochs"], int) and 2 <= row["epochs"] <= 4 for row in result["trials"])
    assert (
        json.loads((out / "sweep.json").read_text())["best"] == best and "mathdefault" not in (out / "sweep.html").read_text()
    )
    count = len(trained)
    assert sweep(*given)["best"] == best and len(trained) == count  # nothing is done again
    with pytest.raises(ValueError, match="other fields"):
        sweep("digits", [], [Space.parse("epochs=2..5")], 6, out, train_run)


@pytest.mark.slow
def test_a_sweep_trains_ordinary_runs(tmp_path, capsys, monkeypatch):
    words = (
        "sweep",
        "digits",
        *SMALL,
        "--epochs=1",
        "--try",
        "optimizer.lr=1e-8,3e-3",
        "--batch-size=128",
        "--trials",
        "3",
        "--out",
        tmp_path / "s",
    )
    with monkeypatch.context() as patch:  # the process ends when the run is trained and not yet measured
        patch.setattr(Run, "report", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            gmf(capsys, *words)
    found = json.loads(gmf(capsys, *words, "--json").out)
    assert [Path(row["run"]).name for row in found["trials"]].count("trial-0") == 1
    assert found["metric"] == "val_top1" and found["best"]["value"] == max(row["value"] for row in found["trials"])
    assert len(found["trials"]) == 3 and "fail" not in {row["state"] for row in found["trials"]}
    measured = json.loads(gmf(capsys, "eval", found["best"]["run"], "--json").out)
    assert measured["top1"] == pytest.approx(found["best"]["value"], abs=2e-3)
    assert len(open_study(tmp_path / "s", None, 0).trials) == 4  # one of them continues the first
    error = gmf(capsys, "sweep", "digits", "--try", "optimizer.lr=1", code=2).err
    assert "optimizer.lr=1e-4..1e-2:log" in error and len(error.splitlines()) == 1
