"""The benchmark: every task and mode runs, models take turns, and what it says of them is true."""

import csv
import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer import bench as module
from groupmixformer.bench import Settings, bench, table
from groupmixformer.cli import main

FAST = {"size": (64, 64), "rounds": 2, "seconds": 0.0}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before  # what it was is restored


@pytest.mark.parametrize(
    ("task", "train"),
    [
        ("classification", False),
        ("classification", True),
        ("detection", False),
        pytest.param("detection", True, marks=pytest.mark.slow),
        ("segmentation", False),
        pytest.param("segmentation", True, marks=pytest.mark.slow),
    ],
)
def test_every_task_runs(task, train):
    batch = 2 if train else 1
    result = bench(["resnet18"], Settings(task=task, train=train, batch_size=batch, **FAST | {"rounds": 1}))
    (row,) = result["rows"]
    assert row["images_per_second"] == pytest.approx(1000 * batch / row["milliseconds"])
    assert row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
    assert row["speed_up"] == 1
    assert (row["macs"] is None) == (task == "detection")
    assert (row["of_floor"] is None) == (task == "detection" or train)
    assert f"{task}, {'training step' if train else 'inference'}, batch {batch} of 64 x 64" in table(result)


def test_what_is_counted_is_true():
    result = bench(["mobile", "test_resnet"], Settings(**FAST))
    ours, other = result["rows"]
    assert (ours["model"], other["model"]) == ("groupmixformer_mobile", "test_resnet")
    for row in result["rows"]:
        model = timm.create_model(row["model"]).eval()
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        assert row["macs"] == counter.get_total_flops() // 2
        assert row["floor"] == pytest.approx(1000 * row["macs"] / result["matrix_product"])
        assert row["of_floor"] == pytest.approx(row["floor"] / row["milliseconds"])
    assert other["speed_up"] == pytest.approx(ours["milliseconds"] / other["milliseconds"])
    assert other["speed_up"] > 1  # a hundredth of the multiply-adds
    assert (ours["published_top1"], other["published_top1"]) == (79.6, None)


def test_models_take_turns_and_are_warm(monkeypatch):
    steps = []
    monkeypatch.setattr(module._Runner, "step", lambda self: steps.append(self.name))
    bench(["test_resnet", "test_convnext"], Settings(**FAST))
    warm = ["test_resnet"] * 2 + ["test_convnext"] * 2
    assert steps == warm + ["test_resnet", "test_convnext"] * 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_learns(dtype):
    runner = module._Runner("test_resnet", Settings(train=True, batch_size=2, dtype=dtype, **FAST))
    before = runner.network.fc.weight.clone()
    runner.step()
    assert not torch.equal(runner.network.fc.weight, before)
    assert all(value.grad is None for value in runner.network.parameters())  # the next step starts anew
    assert all(value.dtype == torch.float32 for value in runner.network.parameters())


def test_memory_grows_with_the_batch():
    small, large = (
        bench(["resnet18"], Settings(train=True, batch_size=n, size=(128, 128), rounds=1, seconds=0.0))["rows"][0][
            "peak_memory"
        ]
        for n in (2, 16)
    )
    if small is None:
        pytest.skip("this system does not tell the memory of a process")
    assert large > small + 14  # MiB: the activations of 14 more pictures, of which the first map alone has 1 MiB each


def test_objects_lie_in_their_picture():
    target = module._objects(Settings(task="detection", size=(80, 133)))
    left, top, right, bottom = target["boxes"].unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= 133).all() and (bottom <= 80).all()
    assert (right - left >= 133 / 8).all() and (bottom - top >= 10).all()
    assert target["masks"].flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    ("models", "words"),
    [(["mobil"], "no model mobil, expected"), (["mobile", "groupmixformer_mobile"], "expected each model once")],
)
def test_what_cannot_be_compared_is_refused(models, words):
    with pytest.raises(ValueError, match=words):
        bench(models, Settings(**FAST))


def test_a_model_that_cannot_be_run_is_named(capsys):
    assert main(["bench", "resnet18", "--train", "--size", "32", "--rounds", "1", "--threads", "1"]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("gmf: error: resnet18 cannot be run with these settings: Expected more than 1 value per channel")
    assert "\n" not in line


def test_the_command_prints_json_and_writes_csv(tmp_path, capsys):
    argv = ["bench", "test_resnet", "--size", "48", "64", "--rounds", "1", "--threads", "1", "--json"]
    assert main([*argv, "--csv", str(tmp_path / "made" / "rows.csv")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["size"] == [48, 64]
    assert result["clock"] == "processor time"
    with (tmp_path / "made" / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["milliseconds"]) == result["rows"][0]["milliseconds"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["rows.csv"]
