"""The benchmark: every task, mode and form runs, models take turns, and what it says of them is true."""

import csv
import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer.bench import timing as speed
from groupmixformer.bench.published import PEERS_TOP1, accuracy_against_speed, at_published_size, published_top1
from groupmixformer.bench.side_by_side import bench, create_network, headline, read_earlier, table
from groupmixformer.bench.timing import Runner, Settings, measure
from groupmixformer.cli.main import main
from groupmixformer.tasks.registry import find_task

FAST = {"size": (64, 64), "rounds": 2, "seconds": 0.0}
COMMAND = ["bench", "test_resnet", "--size", "48", "64", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 0.01)


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
        pytest.param("segmentation", False, marks=pytest.mark.slow),
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


class Recorder(nn.Module):
    """Notes under its name how many images come in."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls, self.head = name, calls, nn.Linear(3, 2)

    def forward(self, x):
        self.calls.append((self.name, len(x)))
        return self.head(x.mean(dim=(2, 3)))


def test_models_take_turns_and_are_warm(monkeypatch):
    monkeypatch.setattr(speed, "LATENCY_STEPS", 4)
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 60.0)
    calls, settings = [], Settings(**FAST)
    rows = measure({name: lambda name=name: Runner(Recorder(name, calls), settings) for name in "ab"}, settings)
    # A step to warm up and one for the memory; then in every round a step and half of those for the latency.
    assert calls == [(name, 1) for name in "aabb"] + [(name, 1) for name in "aaabbb"] * 2
    assert [(row["model"], row["latency_steps"], row["latency_p99"]) for row in rows] == [("a", 4, None), ("b", 4, None)]


def test_forms_of_one_network_are_set_side_by_side():
    settings = Settings(**FAST)
    network = create_network("test_resnet", settings)
    forms = {"eager": settings, "bf16": dataclasses.replace(settings, dtype="bf16", batch_size=2)}
    builds = {label: lambda form=form: Runner(create_network("test_resnet", form), form) for label, form in forms.items()}
    eager, bf16 = measure(builds, settings)
    assert (eager["model"], eager["speed_up"], bf16["model"]) == ("eager", 1.0, "bf16")
    assert bf16["images_per_second"] == pytest.approx(2000 / bf16["milliseconds"])
    assert bf16["speed_up"] == pytest.approx(2 * eager["milliseconds"] / bf16["milliseconds"])
    assert eager["parameters"] == bf16["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.slow
def test_latency_is_of_one_image_and_has_its_percentiles(monkeypatch):
    settings = Settings(size=(32, 32), rounds=3, seconds=0.0)
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 60.0)
    (row,) = bench(["test_resnet"], settings)["rows"]
    assert row["latency_steps"] == speed.LATENCY_STEPS
    assert 0 < row["latency_p50"] <= row["latency_p99"]
    monkeypatch.setattr(speed, "LATENCY_SECONDS", 1e-9)  # slower than this is every model: one step is all
    result = bench(["test_resnet"], settings)
    (row,) = result["rows"]
    assert (row["latency_steps"], row["latency_p99"]) == (1, None)
    line = table(result).splitlines()[2].split()
    assert line[-2:] == ["-", "1"]
    assert "latency of a single image in wall-clock time over n steps" in table(result)
    for other in ({"train": True, "size": (64, 64), "batch_size": 2}, {"batch_size": 2}):
        result = bench(["test_resnet"], dataclasses.replace(settings, **other))
        assert result["rows"][0]["latency_p50"] is result["rows"][0]["latency_steps"] is None
        assert "p50" not in table(result)


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param("detection", marks=pytest.mark.slow), "segmentation"])
def test_detectors_and_segmenters_are_fused(task):
    settings = Settings(task=task, fuse=True, size=(64, 64))
    runner = Runner(create_network("groupmixformer_mobile", settings), settings)
    assert runner.fused
    assert runner.network.folded["Block"] == 22
    runner.step()


@pytest.mark.slow
def test_others_are_not_fused_and_the_table_says_so():
    result = bench(["mobile", "test_resnet"], Settings(fuse=True, **FAST | {"rounds": 1}))
    assert [row["fused"] for row in result["rows"]] == [True, False]
    assert "fp32, GroupMixFormers fused;" in headline(result)
    assert table(result).splitlines()[-1] == "not fused, as no GroupMixFormer: test_resnet"


def test_the_fused_form_says_the_same(randomise):
    settings = Settings(**FAST)
    network = randomise(create_network("groupmixformer_mobile", settings))
    plain, fused = Runner(network, settings), Runner(network, dataclasses.replace(settings, fuse=True))
    assert plain.parameters == fused.parameters
    images = torch.randn(2, 3, 64, 64)
    expected = plain.forward(images)
    torch.testing.assert_close(fused.forward(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_learns(dtype):
    settings = Settings(train=True, batch_size=2, dtype=dtype, **FAST)
    runner = Runner(create_network("test_resnet", settings), settings)
    before = runner.network.fc.weight.clone()
    runner.step()
    assert not torch.equal(runner.network.fc.weight, before)
    assert all(value.grad is None for value in runner.network.parameters())  # the next step starts anew
    assert all(value.dtype == torch.float32 for value in runner.network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", pytest.param("max-autotune", marks=pytest.mark.exhaustive), "reduce-overhead"])
def test_compiled_weights_are_frozen_and_the_result_is_the_same(mode):
    settings = Settings(batch_size=2, compile=mode, size=(32, 32))
    network = create_network("test_resnet", settings)
    eager = Runner(network, dataclasses.replace(settings, compile=None))
    expected = eager.forward(eager.inputs)
    runner = Runner(network, settings)
    runner.inputs = eager.inputs
    runner.warm_up()
    with torch.no_grad():
        network.fc.weight.zero_()
    torch.testing.assert_close(runner.forward(runner.inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "fuse"),
    [
        pytest.param("mobile", "classification", True, marks=pytest.mark.exhaustive),
        ("test_resnet", "detection", False),
    ],
)
def test_compiled_models_are_measured(model, task, fuse):
    result = bench([model], Settings(task=task, compile="default", fuse=fuse, **FAST))
    assert "compiled (default)" in headline(result)
    assert result["rows"][0]["fused"] == fuse


@pytest.mark.slow
def test_memory_grows_with_the_batch():
    small, large = (
        bench(["resnet18"], Settings(train=True, batch_size=n, size=(128, 128), rounds=1, seconds=0.0))["rows"][0][
            "peak_memory"
        ]
        for n in (2, 16)
    )
    if small is None:
        pytest.skip("this system does not tell the memory of a process")
    assert large > small + 14  # MiB: the activations of 14 more images, of which the first map alone has 1 MiB each


def test_objects_lie_in_their_image():
    _, (target,) = find_task("detection").bench_batch(torch.zeros(1, 3, 80, 133), train=True)
    left, top, right, bottom = target["boxes"].unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= 133).all() and (bottom <= 80).all()
    assert (right - left >= 133 / 8).all() and (bottom - top >= 10).all()
    assert target["masks"].flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["mobil"], "no model mobil, expected"),
        (["."], r"got the path \., expected a name of timm"),
        (["mobile", "groupmixformer_mobile"], "expected each model once"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, words):
    with pytest.raises(ValueError, match=words):
        bench(models, Settings(**FAST))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["mobile", "--fuse", "--train"], 1, "the fused form is for inference alone"),
        (["resnet18", "test_resnet", "--fuse"], 1, "got resnet18, test_resnet, expected a GroupMixFormer"),
        (["mobile", "--compile", "fast"], 2, "unknown value fast"),
        (["mobile", "--plot", "speed.txt"], 2, "expected the name of a .png, .svg or .pdf file"),
        (
            ["mobile", "--plot", "speed.svg", "--size", "64"],
            1,
            "no accuracy of groupmixformer_mobile for classification at 64 x",
        ),
        (["resnet18", "--plot", "speed.svg"], 1, "no accuracy of resnet18 for classification at 224 x 224 is known"),
        (["mobile", "--plot", "speed.svg", "--task", "detection", "--size", "224"], 1, "for detection at 224 x 224 is known"),
        (["mobile", "--against", "missing.json"], 1, "missing.json"),
    ],
)
def test_wrong_usage_is_one_line(options, code, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options]) == code
    line = capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_run_is_named(capsys):
    assert main(["bench", "resnet18", "--train", "--size", "32", "--rounds", "1", "--threads", "1"]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("gmf: error: resnet18 cannot be run with these settings: Expected more than 1 value per channel")
    assert "\n" not in line


def test_the_command_prints_json_and_writes_csv(tmp_path, capsys):
    assert main([*COMMAND, "--json", "--csv", str(tmp_path / "made" / "rows.csv")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["size"] == [48, 64]
    assert result["clock"] == "processor time"
    with (tmp_path / "made" / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    for key in ("milliseconds", "latency_p50"):
        assert float(row[key]) == result["rows"][0][key]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["rows.csv"]


@pytest.mark.slow
def test_an_earlier_result_is_compared_with(tmp_path, capsys):
    assert main([*COMMAND, "--json"]) == 0
    earlier = json.loads(capsys.readouterr().out)
    assert earlier["rows"][0]["change"] is None
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps(earlier))
    assert main(["bench", "test_resnet", "test_convnext", *COMMAND[2:], "--against", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    known, new = result["rows"]
    assert known["change"] == pytest.approx(earlier["rows"][0]["milliseconds"] / known["milliseconds"])
    assert new["change"] is None
    assert table(result).splitlines()[2].endswith(f"{known['change']:.2f}x")
    assert table(result).splitlines()[3].endswith("-")

    settings = Settings(**earlier["settings"] | {"size": (48, 64)})
    assert list(read_earlier(file, settings)) == ["test_resnet"]
    earlier |= {"machine": "Difference Engine", "versions": {"torch": "1.0"}}
    file.write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="cannot be compared with") as error:
        read_earlier(file, dataclasses.replace(settings, dtype="bf16"))
    here = f"dtype fp32 there and bf16 here; machine Difference Engine there and {speed.machine(settings)} here; "
    assert str(error.value).endswith(f"{here}torch 1.0 there and {torch.__version__} here")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "expected a result of gmf bench"), ("[]", "expected a result"), ("x", "expected a result"), (None, "has none of")],
)
def test_a_file_that_does_not_help_is_refused(content, words, tmp_path, capsys):
    file = tmp_path / "earlier.json"
    if content is None:
        main([*COMMAND, "--json"])
        content = capsys.readouterr().out.replace('"test_resnet"', '"another"')
    file.write_text(content)
    assert main([*COMMAND, "--against", str(file)]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"gmf: error: {file}")
    assert words in line
    assert "\n" not in line


def test_accuracies_are_of_models_that_exist():
    assert set(PEERS_TOP1) <= set(timm.list_models())
    assert published_top1("groupmixformer_small") == 83.4
    assert published_top1("coat_lite_small") == 81.9
    assert published_top1("resnet18") is None
    names = ["groupmixformer_large", "groupmixformer_large_384", "resnet18", "resnet50"]
    assert at_published_size(names, "classification", (224, 224)) == ["groupmixformer_large", "resnet50"]
    assert at_published_size(names, "classification", (384, 384)) == ["groupmixformer_large_384"]


@pytest.mark.slow
def test_accuracy_is_drawn_against_speed(tmp_path, capsys):
    file = tmp_path / "made" / "speed.svg"
    argv = ["bench", "mobile", "resnet18", "coat_lite_tiny", "--rounds", "1", "--threads", "1", "--plot", str(file)]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "not in the plot, as no accuracy at this size is known: resnet18" in captured.err
    drawn = file.read_text()
    assert "<!-- groupmixformer_mobile -->" in drawn
    assert "<!-- coat_lite_tiny -->" in drawn
    assert "resnet18" not in drawn
    assert captured.out.splitlines()[0][:40] in drawn  # the title names the settings
    assert [path.name for path in file.parent.iterdir()] == ["speed.svg"]


def test_labels_make_room_for_each_other():
    names = [
        "groupmixformer_small",
        "coat_lite_small",
        "gcvit_tiny",
        "pvt_v2_b2",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
    ]
    rows = [
        {"model": name, "images_per_second": 9 + 0.1 * i, "published_top1": published_top1(name)}
        for i, name in enumerate(names)
    ]
    figure = accuracy_against_speed(rows, "title")
    labels = figure.axes[0].texts
    assert sorted(label.get_text() for label in labels) == sorted(names)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.fixture(scope="module")
def scaling():
    path = Path(__file__).parents[1] / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.slow
def test_time_and_memory_are_measured_against_the_side(scaling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "too_large", lambda done, side, rounds: "large" if side > 64 else None)
    scaling.main(["--sides", "96", "64", "--rounds", "1", "--out", str(tmp_path)])
    drawn, written = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (drawn.suffix, written.suffix) == (".svg", ".json")
    result = json.loads(written.read_text())
    models = ["groupmixformer_mobile", "vit_tiny_patch16_224, fused", "vit_tiny_patch16_224, explicit"]
    points = {(row["model"], row["mode"], row["side"]) for row in result["rows"]}
    assert points == set(itertools.product(models, scaling.MODES, (64,)))
    left_out = {(point["model"], point["mode"], point["side"], point["reason"]) for point in result["skipped"]}
    assert left_out == set(itertools.product(models, scaling.MODES, (96,), ("large",)))
    assert [row["milliseconds"] for row in result["exponents_in_tokens"]] == [None] * 6  # of one side
    assert "groupmixformer_mobile, training, 96: left out, large" in capsys.readouterr().out


def test_explicit_attention_is_explicit(scaling):
    settings = Settings(size=(32, 32))
    for fused in (False, True):
        blocks = scaling.build(scaling.VIT, fused, settings).network.blocks
        assert all(block.attn.fused_attn == fused for block in blocks)
    assert create_network(scaling.VIT, settings).blocks[0].attn.fused_attn  # as it was


def test_growth_is_that_of_the_last_four_sides(scaling):
    rows = [{"side": side, "milliseconds": float(side**2), "peak_memory": side**4 / 1e6} for side in (64, 96, 128, 192)]
    rows.insert(0, {"side": 32, "milliseconds": 9999.0, "peak_memory": None})
    assert scaling.exponent(rows, "milliseconds") == pytest.approx(1)
    assert scaling.exponent(rows, "peak_memory") == pytest.approx(2)
    curves = {(label, mode): rows for label in "abc" for mode in scaling.MODES}
    time, memory = scaling.draw(curves, "title").axes
    assert "a, inference: tokens$^{1.00}$" in [text.get_text() for text in time.get_legend().get_texts()]
    assert "c, training: tokens$^{2.00}$" in [text.get_text() for text in memory.get_legend().get_texts()]
    assert [len(axes.lines[0].get_xdata()) for axes in (time, memory)] == [5, 4]


def test_points_that_do_not_fit_are_known_before(scaling, monkeypatch):
    assert scaling.extrapolate({128: 3.0}, 256) == pytest.approx(48)  # one point: the square of the pixels
    assert scaling.extrapolate({64: 1.0, 128: 4.0}, 256) == pytest.approx(16)
    assert scaling.extrapolate({64: 1.0, 128: 16.0}, 256) == pytest.approx(256)
    assert scaling.extrapolate({64: 4.0, 128: 4.0}, 256) == pytest.approx(16)  # never less than linear
    done = [{"side": side, "milliseconds": side**2, "peak_memory": side**2 / 16} for side in (64, 128)]
    monkeypatch.setattr(scaling, "available_memory", lambda: 4916.0)
    assert scaling.too_large(done, 256, rounds=1) is None
    assert scaling.too_large(done, 256, rounds=2) == "takes about 328 s, the limit is 300"
    monkeypatch.setattr(scaling, "available_memory", lambda: 1000.0)
    assert scaling.too_large(done, 256, rounds=1) == "needs about 4,915 MiB, 1,000 are available"
    assert scaling.too_large([], 256, rounds=1) is None
