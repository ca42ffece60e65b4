"""gmf compare: runs that are stopped and continued, matched costs, statistics with known answers, tables that can be read."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer import GroupMixFormer, Run, attention_maps
from groupmixformer.bench import compare as comparing
from groupmixformer.bench.beyond import CORRUPTIONS, MEASURES, cka, head_features, measure_beyond
from groupmixformer.bench.compare import (
    OUTCOME,
    PREDICTIONS,
    Candidate,
    Plan,
    make_plan,
    parse_model,
    parse_settings,
    read_spec,
    train_all,
)
from groupmixformer.bench.comparison import cells, compare, holm, paired_bootstrap, pareto, write_comparison
from groupmixformer.bench.faithfulness import curve, faithfulness, taken_from, with_random_weights
from groupmixformer.bench.matching import costs, match
from groupmixformer.bench.timing import Settings
from groupmixformer.cli.main import main
from groupmixformer.run_folder import RunFolder, read_metrics
from groupmixformer.training.callbacks import CheckpointCallback
from groupmixformer.training.recipe import Recipe, read_recipe, write_recipe

TINY = ["--model-options.depths", "[1,1,1,1]", "--model-options.embed-dims", "[10,10,20,20]", "--image-size", "32"]
TINY += ["--workers", "0", "--batch-size", "8", "--drop-path-rate", "0"]
NAMES = list("0123456789")
EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "evidence"


def command(photos, out, *more):
    models = ["mobile", "mobile:mixer=pool"]
    options = ["--recipe", "folder", "--epochs", "2", "--seeds", "2", "--match", "macs", "--out", str(out), "--json"]
    return ["compare", *models, *options, *more, "--data", str(photos), *TINY]


@pytest.fixture
def quick(monkeypatch):
    real = comparing.measure
    monkeypatch.setattr(comparing, "measure", lambda builds, *_: real(builds, Settings(rounds=1, seconds=0)))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_stopped_inside_and_between_runs_it_continues_and_does_nothing_twice(photos, tmp_path, capsys, monkeypatch):
    out, trained, stop = tmp_path / "out", [], {"before run": 4}
    real, save = comparing.train, CheckpointCallback.on_train_epoch_end

    def train(recipe, *arguments):
        if len(trained) + 1 == stop.get("before run"):
            raise KeyboardInterrupt
        trained.append(f"{Path(recipe.out).parent.name} {recipe.seed}")
        return real(recipe, *arguments)

    def end_of_epoch(self, trainer, module):
        if len(trained) == stop.get("in run"):
            signal.raise_signal(signal.SIGINT)
        save(self, trainer, module)

    monkeypatch.setattr(comparing, "train", train)
    monkeypatch.setattr(CheckpointCallback, "on_train_epoch_end", end_of_epoch)
    stop["in run"] = 2
    assert main(command(photos, out)) == 130
    del stop["in run"]
    assert trained == ["mobile 0", "mobile-mixer=pool 0"]
    (first,) = out.glob(f"runs/*/*/{PREDICTIONS}")
    written = first.stat().st_mtime_ns
    assert main(command(photos, out)) == 130  # continues the second, and is stopped before the fourth call
    assert trained == ["mobile 0", "mobile-mixer=pool 0", "mobile-mixer=pool 0"]
    stop.clear()
    capsys.readouterr()
    assert main(command(photos, out)) == 0
    assert trained[3:] == ["mobile 1", "mobile-mixer=pool 1"]
    assert first.stat().st_mtime_ns == written
    captured = capsys.readouterr()
    assert "2 of 4 runs and 4 of 8 epochs done" in captured.err and "min left" in captured.err
    result = json.loads(captured.out)
    for run in out.glob("runs/*/*"):
        assert [row["epoch"] for row in Run.open(run).metrics] == [0, 1]
    capsys.readouterr()
    assert main([*command(photos, out), "--also", "resolution", "shift", "heads", "faithfulness"]) == 0
    assert len(trained) == 5
    result = json.loads(capsys.readouterr().out)

    # Figures of the table, from the runs.
    for row in result["models"]:
        folder = "mobile" + "-mixer=pool" * row["model"].endswith("pool")
        found = [Run.open(out / "runs" / folder / f"seed-{i}/checkpoints/last.ckpt").evaluate().result["top1"] for i in (0, 1)]
        assert list(row["by_seed"].values()) == found
        assert row["top1"] == pytest.approx(sum(found) / 2)
        assert row["top1_sd"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
        assert row["inference_images_per_second"] > 0 and row["training_images_per_second"] > 0
        assert row["top1_at_32"] == pytest.approx(row["top1"])  # the size of the training
        assert 0 <= row["shift_consistency"] <= 1 and "top1_at_64" in row
        assert (row["head_similarity"] is None) == ("pool" in row["model"])
        assert ("deletion_3" in row) == ("pool" not in row["model"]) and 0 < row["insertion_relevance"] < 1
    first, second = result["models"]
    assert abs(second["macs"] / first["macs"] - 1) < 0.02 and "embed_dims" in second["matched"]
    (pair,) = result["pairs"]
    assert pair["difference"] == pytest.approx(second["top1"] - first["top1"])
    assert pair["n"] == 2 and pair["images"] == 16 and pair["p_holm"] == pair["p"]

    # Shown again, further models and seeds, another recipe.
    capsys.readouterr()
    assert main(["compare", "--show", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "files": 0} == {**result, "files": 0}
    assert main(["compare", "mobile", "--epochs", "3", "--out", str(out)]) == 1
    assert "epochs 2, not 3" in capsys.readouterr().err
    assert len(trained) == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_no_run_goes_on_when_the_comparison_is_ended(photos, tmp_path, number):
    words = [sys.executable, "-m", "groupmixformer.cli.main", *command(photos, tmp_path, "--jobs", "2"), "--epochs", "2000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, start_new_session=True, env=environment, stderr=subprocess.PIPE) as process:
        runs = [tmp_path / "runs" / name / "seed-0" for name in ("mobile", "mobile-mixer=pool")]
        wait_until(lambda: all((run / "metrics.csv").is_file() for run in runs))
        process.send_signal(number)
        process.wait()
        wait_until(lambda: not group_exists(process.pid))
    for run in runs:
        assert RunFolder(run / "checkpoints/last.ckpt").weights.is_file()
        assert len(read_metrics(run)) < 2000


def wait_until(done, seconds=120):
    start = time.monotonic()
    while not done():
        assert time.monotonic() < start + seconds
        time.sleep(0.2)


def group_exists(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_several_at_a_time_and_as_jobs_of_submitit(photos, tmp_path):
    pytest.importorskip("submitit")
    recipe = read_recipe("folder", ["--data", str(photos), "--epochs", "1", *TINY])
    tops = []
    for kind, cluster in (
        ("alone", None),
        ("pool", None),
        ("debug", {"cluster": "debug"}),
        ("local", {"cluster": "local", "timeout_min": 10}),
    ):
        plan = make_plan(tmp_path / kind, recipe, {"a": "mobile"}, "none", 2)
        states = list(train_all(plan, 2 if kind == "pool" else 1, cluster))
        assert (states[-1].runs, states[-1].failed) == (2, {})
        tops.append(compare(plan)["models"][0]["by_seed"])
    assert tops == tops[:1] * 4


@pytest.mark.parametrize(
    ("model", "options", "kind"),
    [
        ("groupmixformer_mobile", {"mixer": "none", "depths": (1, 1, 4, 1)}, "macs"),
        pytest.param("deit_tiny_patch16_224", {}, "parameters", marks=pytest.mark.slow),
        pytest.param("convnext_atto", {}, "macs", marks=pytest.mark.slow),
    ],
)
def test_models_are_scaled_to_the_costs_of_another(model, options, kind):
    recipe = Recipe(data="digits", model="groupmixformer_mobile", model_options={"depths": (1, 1, 4, 1)}, image_size=64)
    target = costs(recipe, NAMES)[kind]
    other = replace(recipe, model=model, model_options=options)
    scaled, told = match(other, NAMES, kind, target)
    size = {"img_size": 64} if "deit" in model else {}
    network = timm.create_model(model, num_classes=10, **size, **options | scaled).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    reached = {"macs": counter.get_total_flops() / 2, "parameters": sum(p.numel() for p in network.parameters())}
    assert abs(reached[kind] / target - 1) <= 0.02
    assert all(name in told for name in scaled) and scaled


def test_what_cannot_be_scaled_is_refused():
    recipe = Recipe(data="digits", model="resnet10t", image_size=32)
    with pytest.raises(ValueError, match=r"resnet10t: cannot be brought from [\d,]+ to 5,000 macs: it has neither a width"):
        match(recipe, NAMES, "macs", 5000)


LEDGER = ["groups", "swin", "pvt", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("options", "mixers"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEDGER)
def test_comparisons_of_the_ledger_can_be_asked_for(name):
    path = EVIDENCE / f"{name}.yaml"
    spec = read_spec(path)
    recipe = read_recipe(spec["recipe"], [f"--{name}={json.dumps(value)}" for name, value in spec["fields"].items()])
    for text in spec["models"].values():
        model, options = parse_model(text)
        found = costs(replace(recipe, model=model, model_options=recipe.model_options | options), NAMES)
        assert 20e6 < found["macs"] < 80e6, text
    page = (EVIDENCE.parent.parent / "docs" / "evidence.md").read_text()
    assert f"gmf compare benchmarks/evidence/{path.name}" in page


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([]) == []


def test_bootstrap_on_known_answers():
    rng = np.random.default_rng(0)
    first = rng.random((3, 400)) < 0.6
    assert paired_bootstrap(first, first) == (0, 0, 1)
    other = first.copy()
    other[:, :60] = True  # better on some images, worse on none
    low, high, p = paired_bootstrap(first, other)
    assert low > 0 and p == pytest.approx(2e-4)
    assert paired_bootstrap(other, first) == pytest.approx((-high, -low, p), abs=0.01)
    # SciPy draws the images themselves.
    noisy = rng.random((3, 400)) < 0.63
    difference = noisy.mean(0) - first.mean(0)
    reference = scipy.stats.bootstrap((difference,), np.mean, n_resamples=9999, method="percentile", random_state=1)
    low, high, p = paired_bootstrap(first, noisy)
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.004)
    drawn = reference.bootstrap_distribution
    assert p == pytest.approx(2 * min((drawn <= 0).mean(), (drawn >= 0).mean()), abs=0.02)


def test_bootstrap_finds_nothing_as_often_as_it_should():
    rng = np.random.default_rng(0)
    found = [paired_bootstrap(*(rng.random((2, 1, 200)) < 0.5), seed=i)[2] < 0.05 for i in range(200)]
    assert 0.015 < np.mean(found) < 0.09


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_the_level_and_are_the_same_for_every_model(name):
    pixels = F.interpolate(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bilinear")
    pixels = (pixels * 200 + 20).byte()
    apply, strengths = CORRUPTIONS[name]
    changed = [apply(pixels, strength) for strength in strengths]
    assert all(image.shape == pixels.shape and image.dtype == torch.uint8 for image in changed)
    distances = [(image.float() - pixels).square().mean().item() for image in changed]
    assert distances[4] > distances[2] > distances[0] > 0
    assert torch.equal(changed[2], apply(pixels, strengths[2]))


def test_similarity_of_heads():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2000, 4, generator=rng, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))[0]
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert cka(x, y) < 0.02
    assert cka(x, torch.ones_like(x)) == 0


@pytest.mark.parametrize(("mixer", "width"), [("group_mix", 2), ("factorised", 5), ("pool", None)])
def test_heads_are_those_before_the_projection(mixer, width):
    dim = 40 if mixer == "factorised" else 20
    model = GroupMixFormer(embed_dims=(dim,), depths=(2,), mlp_ratios=(1,), mixer=mixer, num_classes=2).eval()
    found = head_features(model, torch.randn(3, 3, 32, 32))
    assert [tuple(heads.shape) for heads in found] == [(8, 3 * 64, width)] * (2 if width else 0)
    if mixer == "group_mix":  # without the last head's weights nothing of it is left
        attention = model.stages[0].blocks[0].attn
        with torch.no_grad():
            attention.aggregators.norm.weight[-2:] = 0
            attention.aggregators.norm.bias[-2:] = 0
        assert head_features(model, torch.randn(3, 3, 32, 32))[0][:7].abs().sum() > 0
        assert head_features(model, torch.randn(3, 3, 32, 32))[0][7].abs().sum() == 0


def test_a_map_that_points_at_what_counts_is_faithful():
    """The class is what the second of four quarters shows: a map of it deletes at once and inserts at once."""
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :32, 32:] = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(16, 16)  # blurred, it is all the same

    def probabilities(images):
        sure = images[:, 0, :32, 32:].std(dim=(1, 2)).mul(2).clamp(max=1)
        return torch.stack([1 - sure, sure], dim=1)

    classes = torch.ones(3, dtype=torch.int64)
    importance = torch.arange(4.0).view(1, 2, 2).repeat(3, 1, 1)
    right, wrong = importance.clone(), importance.clone()
    right[:, 0, 1], wrong[:, 0, 1] = 9, -9
    areas = {
        (name, remove): curve(probabilities, pixels, tried, classes, remove)
        for name, tried in (("right", right), ("wrong", wrong))
        for remove in (True, False)
    }
    assert all(area.shape == (3,) for area in areas.values())
    # Whole at the first of eleven steps, from the fourth of which (3 of 10 parts of 4 places) the first place is gone.
    assert areas["right", True] == pytest.approx(torch.full((3,), 0.05), abs=0.02)
    assert areas["right", False] == pytest.approx(torch.full((3,), 0.95), abs=0.02)
    assert areas["wrong", True] == pytest.approx(torch.full((3,), 0.75), abs=0.06)
    assert areas["wrong", False] == pytest.approx(torch.full((3,), 0.25), abs=0.06)


def test_maps_of_a_classifier_are_measured():
    torch.manual_seed(0)
    model = GroupMixFormer(embed_dims=(20, 20), depths=(1, 1), mlp_ratios=(1, 1), num_classes=3).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = torch.randn(4, 3, 64, 64)
    taken = taken_from(model, pixels, 1)
    one_by_one = [attention_maps(model, pixels, (y, x), 1).abs() for y in range(0, 64, 8) for x in range(0, 64, 8)]
    torch.testing.assert_close(taken, torch.stack(one_by_one).mean(0).unflatten(1, (4, 2)).mean(2))

    def probabilities(images):
        with torch.inference_mode():
            return model(images).softmax(dim=1)

    found = faithfulness(model, probabilities, pixels)
    maps = ("1", "3", "5", "7", "relevance", "random")
    assert set(found) == {f"{kind}_{name}" for kind in ("deletion", "insertion") for name in maps} | {
        f"randomised_{name}" for name in maps[:4]
    }
    assert all(0 < found[f"{kind}_{name}"] < 1 for kind in ("deletion", "insertion") for name in maps)
    torch.manual_seed(1)
    other = taken_from(with_random_weights(model), pixels, 1)
    torch.manual_seed(1)
    again = faithfulness(model, probabilities, pixels)
    for place, name in enumerate(maps[:4]):
        pairs = zip(taken.detach()[:, place].flatten(1), other.detach()[:, place].flatten(1), strict=True)
        expected = [spearmanr(*pair).statistic for pair in pairs]
        assert again[f"randomised_{name}"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    other = GroupMixFormer(embed_dims=(20, 20), depths=(1, 1), mlp_ratios=(1, 1), num_classes=3, mixer="pool").eval()
    assert set(faithfulness(other, probabilities, pixels)) == {f"{k}_{n}" for k in ("deletion", "insertion") for n in maps[4:]}


def test_further_measures_are_made_once(made, monkeypatch):
    monkeypatch.setitem(MEASURES, "shift", lambda run: {"shift_consistency": run.seed / 4})
    for run in made.all_runs:
        measure_beyond(run, ["shift"])
    monkeypatch.setitem(MEASURES, "shift", None)
    measure_beyond(made.all_runs[0], ["shift"])
    assert [row["shift_consistency"] for row in compare(made)["models"]] == [0.125, 0.125]
    head, *_ = cells(compare(made))
    assert "shift consistency %" in head


def test_pareto_front():
    assert pareto([1, 2, 3, 2, None], [0.5, 0.7, 0.6, 0.7, 0.9]) == [True, True, False, True, False]


def test_models_are_named_with_options():
    name, options = parse_model(
        "mobile:mixer=group_mix,depths=1,1,4,1,mixer_options.kernel_sizes=3,3,3,mixer_options.position=false"
    )
    assert name == "groupmixformer_mobile"
    assert options == {
        "mixer": "group_mix",
        "depths": [1, 1, 4, 1],
        "mixer_options": {"kernel_sizes": [3, 3, 3], "position": False},
    }
    assert parse_model("pvt_v2_b0") == ("pvt_v2_b0", {})
    for text, reason in (
        ("mobile:mixer", "expected options with values"),
        ("mobil", "nearest is"),
        ("mobile:depths=", "values"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_model(text)


def test_settings_of_a_cluster_have_types():
    words = ["cluster=slurm", "timeout_min=600", "slurm_partition=gpu"]
    assert parse_settings(words) == {"cluster": "slurm", "timeout_min": 600, "slurm_partition": "gpu"}


@pytest.mark.parametrize(
    ("words", "reason", "code"),
    [
        ([], "expected models", 2),
        (["mobile", "mobile"], "each model once", 2),
        (["mobile", "--epoch", "3"], "has no field epoch", 2),
        (["mobile", "--recipe", "nuclei"], "expected one for classification", 1),
        (["mobile", "--checkpoint", "x.pth"], "compared from random weights", 1),
        (["mobile", "--val-share", "0.2"], "a held-out part of its own", 1),
        (["mobile:mixer=hilow"], "the nearest is hilo", 1),
        (["--show", "nothing"], "holds no comparison", 1),
        (["mobile", "--show", "nothing"], "takes no other option", 2),
        (["mobile", "--cluster", "slurm"], "got 'slurm', expected settings with values", 1),
        (["missing.yaml"], "missing.yaml", 1),
    ],
)
def test_wrong_usage_is_told_in_a_line(words, reason, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: [mobile]\nepoch: 3", "has no field epoch: the nearest is epochs"),
        ("models: [mobile]\nepochs: many", "epochs is 'many', expected int"),
        ("recipe: digits", "with models at least"),
        ("- mobile", "expected fields of a comparison"),
    ],
)
def test_wrong_fields_of_a_file_are_named(text, reason, tmp_path, capsys):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert main(["compare", str(path)]) == 1
    assert reason in capsys.readouterr().err


def test_a_file_gives_what_options_give_and_options_go_first(photos, tmp_path, monkeypatch):
    path, seen = tmp_path / "spec.yaml", []
    path.write_text(
        "models: {ours: mobile}\nrecipe: folder\nseeds: 2\nepochs: 4\nfields: {image_size: 32, optimizer.lr: 0.5}\n"
    )
    monkeypatch.setattr(comparing, "make_plan", lambda *arguments: seen.append(arguments) or exit(7))
    assert main(["compare", str(path), "--seeds", "5", "--data", str(photos), "--out", str(tmp_path / "out")]) == 7
    ((folder, recipe, models, kind, seeds),) = seen
    assert (folder, models, kind, seeds) == (tmp_path / "out", {"ours": "mobile"}, "none", 5)
    assert (recipe.image_size, recipe.optimizer.lr, recipe.epochs, recipe.data) == (32, 0.5, 4, str(photos))


ODD = r"<b>&_$x^2$|`*\textbf{}%#~"


@pytest.fixture
def made(tmp_path):
    """A comparison whose runs are made up: of 10 images, the models get 6 and 8 right with one seed, 5 and 9 with the other."""
    models = [Candidate(name, name, "mobile", {}, "", 1000, 2000) for name in ("first", ODD)]
    plan = Plan(tmp_path / "out", Recipe(data="digits", epochs=1), "none", models, 2)
    plan.folder.mkdir()
    write_recipe(plan.recipe, plan.folder / "recipe.yaml")
    for run, right in zip(plan.all_runs, (6, 8, 5, 9), strict=True):
        folder = Path(run.out)
        folder.mkdir(parents=True)
        lines = [f"{i},1,{int(i < right)},0.5\n" for i in range(10)]
        (folder / PREDICTIONS).write_text("position,true,predicted,confidence\n" + "".join(lines))
        metrics = {"top1": right / 10, "top5": 1.0, "loss": 1.0, "calibration_error": 0.1, "images": 10, "skipped": 0}
        (folder / OUTCOME).write_text(json.dumps(metrics))
        (folder / "metrics.csv").write_text(f"epoch,val_top1,seconds\n0,{right / 10},3\n")
    return plan


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_every_format_is_read_and_names_are_no_markup(made):
    result = compare(made)
    files = {path.name: path.read_text() for path in write_comparison(made, result)}
    assert set(files) == {"index.html", "result.json", "table.md", "table.tex", "models.csv", "pairs.csv"}
    assert json.loads(files["result.json"]) == json.loads(json.dumps(result))
    ours, other = csv.DictReader(io.StringIO(files["models.csv"]))
    assert (ours["model"], other["model"], float(ours["top1"])) == ("first", ODD, 0.55)
    assert float(other["top1"]) == pytest.approx(0.85)
    assert float(other["top1_sd"]) == pytest.approx(0.05 * 2**0.5)
    (pair,) = csv.DictReader(io.StringIO(files["pairs.csv"]))
    assert float(pair["difference"]) == pytest.approx(0.3)
    assert [float(x) for x in pair["by_seed"].split()] == pytest.approx([0.2, 0.4])

    page = Page(files["index.html"])
    assert "b" not in page.tags and page.tags.count("svg") == 3  # without measured times
    assert "<details><summary>Recipe" in files["index.html"] and "1.05" not in page.texts  # of one epoch
    assert "img" not in page.tags and files["index.html"].count("var(--ink)") > 20  # in the colours of a dark page too
    assert ODD in page.texts and "85.00" in page.texts
    assert not re.search("https?:", re.sub('xmlns(:xlink)?="[^"]*"', "", files["index.html"]))

    table = [line for line in files["table.md"].splitlines() if line.startswith("|")]
    assert len(table) == 4 and {len(re.split(r"(?<!\\)\|", line)) for line in table} == {15}
    assert "\\<b\\>" in table[2]

    lines = files["table.tex"].splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 2 and all(len(re.split(r"(?<!\\)&", line)) == 13 for line in body)
    assert not re.search(r"(?<!\\)[_$#%^~]", "".join(body)) and r"\textbackslash{}textbf\{\}" in body[0]


def test_models_that_learnt_nothing_are_named(made, capsys, monkeypatch):
    """One class for all ten images: whoever always answers it is always right."""
    monkeypatch.setattr(comparing, "read_plan", lambda _: made)
    assert main(["compare", "--show", str(made.folder)]) == 0
    told = "no model is better than always answering the largest class, which is right for 100.00%"
    assert told in capsys.readouterr().err and told in (made.folder / "index.html").read_text()
    for run in made.all_runs[1::2]:  # a second class, which one model finds
        lines = [f"{i},{int(i < 5)},{int(i < 6)},0.5\n" for i in range(10)]
        (Path(run.out) / PREDICTIONS).write_text("position,true,predicted,confidence\n" + "".join(lines))
    for run in made.all_runs[::2]:
        lines = [f"{i},{int(i < 5)},0,0.5\n" for i in range(10)]
        (Path(run.out) / PREDICTIONS).write_text("position,true,predicted,confidence\n" + "".join(lines))
        (Path(run.out) / OUTCOME).write_text((Path(run.out) / OUTCOME).read_text().replace('"top1": 0.6', '"top1": 0.5'))
    assert main(["compare", "--show", str(made.folder)]) == 0
    assert "first: not better than always answering the largest class, which is right for 50.00%" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others(made, monkeypatch, capsys):
    runs, called = made.all_runs, []
    for run in runs[1:3]:
        (Path(run.out) / OUTCOME).unlink()

    def train_and_evaluate(run):
        called.append(run.out)
        if run.out == runs[1].out:
            raise ValueError("the loss is not finite")
        (Path(run.out) / OUTCOME).write_text((Path(runs[0].out) / OUTCOME).read_text())

    monkeypatch.setattr(comparing, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(comparing, "make_plan", lambda *_: made)
    monkeypatch.setattr(comparing, "measure_speed", lambda *_: None)
    assert main(["compare", "mobile", "--json"]) == 1
    assert called == [runs[1].out, runs[2].out]
    captured = capsys.readouterr()
    assert "1 of 4 runs failed: ValueError: the loss is not finite" in captured.err
    assert [row["n"] for row in json.loads(captured.out)["models"]] == [2, 1]


def test_runs_that_are_missing_are_gaps(made):
    (Path(made.all_runs[3].out) / OUTCOME).unlink()
    (Path(made.all_runs[0].out) / OUTCOME).unlink()
    result = compare(made)  # no seed that both have
    assert [row["n"] for row in result["models"]] == [1, 1] and result["pairs"][0]["p"] is None
    write_comparison(made, result)
