"""What is chosen for speed: threads, compiled blocks, CUDA graphs, the inference form; and a loader that is too slow."""

import functools
import json
import logging
import time
from collections import Counter

import pytest
import torch
from kill_and_resume import differences
from torch import nn

from groupmixformer import GroupMixFormer, Run
from groupmixformer import threads as threads_module
from groupmixformer.cli.main import main
from groupmixformer.data.samples import Samples
from groupmixformer.models.checkpoint import load_model, save_checkpoint
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks import graphs
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.threads import ThreadChoice
from groupmixformer.training.module import compile_blocks
from groupmixformer.training.pace import workers_needed
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.trainer import train

SHALLOW = {"embed_dims": [20, 30, 40, 50], "depths": [1] * 4, "mlp_ratios": [2] * 4}
OPTIONS = ["--image-size", "32", "--crop-pct", "1.0", "--workers", "0", "--device", "cpu", "--batch-size", "8"]


def fit(data, out, *more, resume=False):
    """Train a tiny ResNet for an epoch of three steps, if not said otherwise."""
    words = ["--data", str(data), "--out", str(out), *OPTIONS, "--model", "test_resnet", "--epochs", "1", *more]
    return train(read_recipe("folder", words), build_task, resume)


# Threads


@pytest.fixture
def four_threads(monkeypatch):
    """Have PyTorch say that it has four threads, and compute in one: more are slow where tests share the cores."""
    number = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda wanted: number.__setitem__(0, wanted))


def drive(choice, steps, **seconds):
    """Give a choice steps of so many seconds by their threads, such as n2=0.5; return the threads of each."""
    numbers = []
    for _ in range(steps):
        choice.use()
        numbers.append(torch.get_num_threads())
        choice.took(seconds[f"n{numbers[-1]}"])
    return numbers


def test_the_fastest_number_of_threads_is_chosen(four_threads, capsys):
    choice = ThreadChoice()
    assert drive(choice, 14, n4=8.0, n2=1.0, n1=2.0) == [4, 2, 1, 4, 2, 1, 2, 1, 2, 1, 2, 2, 2, 2]  # 4 is hopeless
    line = "threads: 2 of 4 (a step takes 8.0 times as long with 4, 2.0 times as long with 1); --threads N fixes the number\n"
    assert capsys.readouterr().err == line


def test_threads_are_measured_again_when_steps_stay_slow(four_threads, capsys):
    choice = ThreadChoice()
    drive(choice, 30, n4=1.0, n2=1.5, n1=2.0)
    assert choice.number == 4 and "threads: 4 of 4 " in capsys.readouterr().err
    assert drive(choice, 1, n4=9.0) + drive(choice, 5, n4=1.0) == [4] * 6  # one slow step is nothing
    assert drive(choice, 2, n4=9.0) == [4, 4]
    numbers = drive(choice, 12, n4=9.0, n2=5.0, n1=2.0)
    assert numbers[:6] == [4, 2, 1, 4, 2, 1] and numbers[-1] == choice.number == 1
    assert "threads: 1 of 4 " in capsys.readouterr().err


def test_fewer_threads_are_measured_again_after_a_while(four_threads, monkeypatch, capsys):
    choice, now = ThreadChoice(), time.monotonic()
    drive(choice, 20, n4=9.0, n2=9.0, n1=1.0)
    monkeypatch.setattr(threads_module.time, "monotonic", lambda: now + 2 * threads_module.AGAIN)
    assert drive(choice, 2, n1=1.0, n4=0.5) == [1, 4]
    drive(choice, 20, n4=0.5, n2=0.7, n1=1.0)
    assert choice.number == 4  # where it stays, however long
    monkeypatch.setattr(threads_module.time, "monotonic", lambda: now + 9 * threads_module.AGAIN)
    assert drive(choice, 3, n4=0.5) == [4] * 3
    assert capsys.readouterr().err.count("\n") == 2


def test_a_choice_goes_on_from_its_state(four_threads):
    first, seconds = ThreadChoice(), {"n4": 3.0, "n2": 2.0, "n1": 1.0}
    whole = drive(ThreadChoice(), 14, **seconds)
    torch.set_num_threads(4)
    before = drive(first, 5, **seconds)
    torch.set_num_threads(4)
    second = ThreadChoice()
    second.load_state_dict(first.state_dict())
    assert before + drive(second, 9, **seconds) == whole
    torch.set_num_threads(2)  # another machine
    other = ThreadChoice()
    other.load_state_dict(second.state_dict())
    assert drive(other, 4, **seconds) == [2, 1, 2, 1]


def test_a_fixed_number_and_a_single_thread_are_left_alone(four_threads, capsys):
    fixed, chosen = ThreadChoice(2), ThreadChoice()
    drive(chosen, 20, n4=1.0, n2=2.0, n1=3.0)
    capsys.readouterr()
    fixed.load_state_dict(chosen.state_dict())
    assert drive(fixed, 9, n2=1.0) == [2] * 9
    torch.set_num_threads(1)
    assert drive(ThreadChoice(), 9, n1=1.0) == [1] * 9
    assert capsys.readouterr().err == ""


def test_calls_of_a_network_are_compared_by_the_size_of_their_images(four_threads, monkeypatch):
    choice, network, clock = ThreadChoice(), nn.Identity(), [0.0]
    monkeypatch.setattr(threads_module.time, "perf_counter", lambda: clock[0])
    choice.watch(network)
    taken = []
    monkeypatch.setattr(choice, "took", taken.append)
    network.register_forward_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 6.0))
    network(torch.zeros(2, 3, 4, 5))
    network([torch.zeros(3, 4, 5), torch.zeros(3, 2, 5)])
    assert taken == [6.0 / 120, 6.0 / 90]


def test_a_run_chooses_threads_and_a_resumed_one_takes_them(photos, tmp_path, four_threads, monkeypatch, capsys):
    numbers, real = [], ThreadChoice.took

    def took(self, seconds):
        numbers.append(torch.get_num_threads())
        real(self, float(torch.get_num_threads()))  # one thread is the fastest

    monkeypatch.setattr(ThreadChoice, "took", took)
    run = fit(photos, tmp_path / "run", "--epochs", "2", "--batch-size", "2", "--grad-accum-steps", "2")
    assert numbers == [4, 2, 1] * 2 + [2, 1] * 2 + [1] * 2  # twelve batches, six steps an epoch; four were hopeless
    assert [row["threads"] for row in read_metrics(run)] == [1, 1]
    assert capsys.readouterr().err.count("threads: 1 of 4 ") == 1
    numbers.clear()
    assert torch.get_num_threads() == 4
    fit(photos, run, "--epochs", "3", "--batch-size", "2", "--grad-accum-steps", "2", resume=True)
    assert numbers == [1] * 6 and "threads: " not in capsys.readouterr().err


@pytest.mark.parametrize(("more", "expected"), [(["--threads", "2"], 2), (["--deterministic", "true"], 4)])
def test_a_run_whose_threads_are_not_chosen(photos, tmp_path, four_threads, monkeypatch, capsys, more, expected):
    seen = set()
    real = ClassificationModule.training_step

    def training_step(self, batch, batch_idx):
        seen.add(torch.get_num_threads())
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", training_step)
    try:
        fit(photos, tmp_path / "run", "--batch-size", "2", *more)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {expected} and "threads: " not in capsys.readouterr().err


# The loader


@pytest.mark.parametrize(("workers", "wait", "step", "needed"), [(0, 3.0, 1.0, 3), (0, 0.5, 1.0, 1), (2, 1.0, 1.0, 4)])
def test_workers_that_suffice(workers, wait, step, needed):
    assert workers_needed(workers, wait, step) == needed


def test_a_slow_loader_is_named_once(photos, tmp_path, monkeypatch, capsys):
    real = Samples.__getitem__

    def slow(self, index):
        time.sleep(0.1)
        return real(self, index)

    fit(photos, tmp_path / "fast", "--batch-size", "2")
    monkeypatch.setattr(Samples, "__getitem__", slow)
    capsys.readouterr()
    run = fit(photos, tmp_path / "run", "--batch-size", "2", "--epochs", "2")
    text = capsys.readouterr().err
    assert text.count("the loader bounds this run") == 1 and " would suffice" in text and "--workers " in text
    shares = [row["waiting"] for row in read_metrics(run)]
    assert all(0.1 < share < 1 for share in shares) and min(shares) > read_metrics(tmp_path / "fast")[0]["waiting"]


# Compiled blocks


def compiling_with(monkeypatch, backend):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def test_blocks_of_a_stage_share_a_graph_whatever_their_stochastic_depth(monkeypatch):
    graphs_made = []

    def backend(graph, inputs):
        graphs_made.append(graph)
        return graph

    compiling_with(monkeypatch, backend)
    network = GroupMixFormer(embed_dims=[20], depths=[4], mlp_ratios=[2], num_classes=3, drop_path_rate=0.3).train()
    names, images = list(network.state_dict()), torch.randn(2, 3, 32, 32)
    compile_blocks(network)
    assert list(network.state_dict()) == names
    network(images).sum().backward()
    assert len(graphs_made) == 2  # the first block's depth is fixed
    network.eval()(torch.randn(1, 3, 64, 64))  # without a graph
    assert len(graphs_made) == 2


def test_stochastic_depth_of_compiled_blocks_keeps_the_mean(monkeypatch):
    compiling_with(monkeypatch, "eager")
    network = GroupMixFormer(embed_dims=[20], depths=[2], mlp_ratios=[2], num_classes=3, drop_path_rate=0.25)
    compile_blocks(network)
    path = network.stages[0].blocks[1].drop_path1
    ones = torch.ones(4000, 2, 3)
    dropped = path.train()(ones)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert dropped[:, 0, 0].mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(path.eval()(ones), ones)


@pytest.fixture(scope="module")
def eager_run(photos, tmp_path_factory):
    return fit(photos, tmp_path_factory.mktemp("eager") / "run", *ours("false"))


def ours(word):
    options = {"embed_dims": [20], "depths": [2], "mlp_ratios": [2]}
    return ["--model", "mobile", "--model_options", json.dumps(options), "--drop-path-rate", "0", "--compile", word]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_a_compiled_run_learns_the_same(photos, eager_run, tmp_path, monkeypatch, caplog, backend):
    compiling_with(monkeypatch, backend)
    run = fit(photos, tmp_path / "run", *ours("true"))
    assert "torch.compile failed" not in caplog.text
    assert read_metrics(run)[0]["loss"] == pytest.approx(read_metrics(eager_run)[0]["loss"], rel=1e-4)
    model, expected = load_model(run), load_model(eager_run)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), expected.state_dict()[name].float(), atol=2e-3), name  # AdamW's signs
    fit(photos, run, *ours("false"), "--epochs", "2", resume=True)  # and goes on eager


def test_without_a_compiler_a_run_goes_on_eager(photos, eager_run, tmp_path, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here\nand more lines")

    compiling_with(monkeypatch, broken)
    with caplog.at_level(logging.WARNING):
        run = fit(photos, tmp_path / "run", *ours("true"))
    said = [record.getMessage() for record in caplog.records if "torch.compile failed" in record.getMessage()]
    assert len(said) == 1 and "no C++ compiler here" in said[0] and "\n" not in said[0]
    assert differences(eager_run, run) == []


def test_on_a_cpu_auto_is_eager_in_float32(photos, tmp_path):
    recipe = read_recipe("folder", ["--data", str(photos), "--out", str(tmp_path / "run"), *OPTIONS])
    assert (recipe.precision, recipe.compile, recipe.threads) == ("auto", "auto", "auto")
    stored = read_recipe(str(fit(photos, tmp_path / "run") / "recipe.yaml"))
    assert (stored.precision, stored.compile, stored.threads) == ("fp32", False, "auto")


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_on_cuda_auto_is_bf16_where_the_gpu_has_it(monkeypatch, tmp_path, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    seen = []

    def build(recipe, world_size):
        seen.append(recipe.precision)
        raise ValueError("enough")

    for device, precision in (("auto", expected), ("cuda", expected), ("cpu", "fp32")):
        recipe = read_recipe("digits", ["--out", str(tmp_path / device), "--device", device])
        with pytest.raises(ValueError, match="enough"):
            train(recipe, build)
        assert seen.pop() == precision and recipe.precision == "auto"


# CUDA graphs, with a recorder that runs on any device


@pytest.fixture
def recorded(monkeypatch):
    """Let functions be recorded on a CPU; count the recordings by size."""
    sizes = Counter()

    def record(network, images):
        sizes[tuple(images.shape)] += 1
        images = images.clone()
        output = network(images)

        def replay():
            parts = (output, network(images)) if isinstance(output, torch.Tensor) else ()
            for old, new in [parts] if parts else zip(output, network(images), strict=True):
                old.copy_(new)

        return images, replay, output

    monkeypatch.setattr(graphs, "record", record)
    return sizes


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, images):
        self.calls += 1
        return [images * self.weight, images + self.weight]


@torch.no_grad()
def test_sizes_that_come_again_are_replayed(recorded):
    network = Twice()
    graphs.replay_repeated(network)
    results = []
    for value in range(6):
        images = torch.full((1, 3, 4, 4), float(value))
        results.append(network(images))
        network(torch.zeros(value + 1, 3, 2, 2))  # comes once
    assert recorded == {(1, 3, 4, 4): 1}
    for value, (product, total) in enumerate(results):  # none was overwritten by the next
        assert (product == 2 * value).all() and (total == value + 2).all()
    with torch.enable_grad():
        assert network(torch.ones(1, 3, 4, 4))[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():  # another mode is recorded apart
        for _ in range(3):
            network(torch.ones(1, 3, 4, 4))
    assert recorded == {(1, 3, 4, 4): 2}


@torch.no_grad()
def test_so_many_sizes_are_recorded_and_no_more(recorded):
    network = Twice()
    graphs.replay_repeated(network)
    for side in range(1, graphs.MOST + 3):
        for _ in range(4):
            assert network(torch.ones(1, 1, side, side))[0].shape[-1] == side
    assert len(recorded) == graphs.MOST


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@torch.no_grad()
def test_where_nothing_can_be_recorded_the_network_stays_as_it_is(caplog):
    network = Twice()
    graphs.replay_repeated(network)
    for _ in range(5):
        assert (network(torch.ones(1, 1, 2, 2))[0] == 2).all()
    assert caplog.text.count("no CUDA graphs: ") == 1 and network.calls == 5


# The inference form


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, randomise):
    folder = tmp_path_factory.mktemp("small") / "run"
    model = randomise(GroupMixFormer(num_classes=2, **SHALLOW))
    save_checkpoint(model, folder, ["one", "zero"], {"input_size": (3, 64, 64)})
    return folder


def test_predictors_are_fused_if_not_asked_otherwise(small_run, photos):
    run, image = Run.open(small_run), next(photos.rglob("*.png"))
    plain, fused = run.predictor("cpu", fuse=False), run.predictor("cpu")
    assert (plain.fused, fused.fused, hasattr(fused.model, "folded")) == (False, True, True)
    assert fused.predict(*[run_image(image)]).result["classes"] == [
        {**one, "probability": pytest.approx(one["probability"], abs=1e-6)}
        for one in plain.predict(run_image(image)).result["classes"]
    ]
    before = torch.get_num_threads()
    run.predict(image, device="cpu", threads=2)
    assert torch.get_num_threads() == 2 or before == 2
    torch.set_num_threads(before)


def run_image(path):
    from groupmixformer.run import open_image

    return open_image(path)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eval_and_predict_give_the_same_fused(small_run, photos, capsys, precision):
    def gmf(*argv):
        assert main([*map(str, argv), "--device", "cpu", "--threads", "1", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    measured = [gmf("eval", small_run, "--data", photos, "--precision", precision, word) for word in ("--fuse", "--no-fuse")]
    assert measured[0]["top1"] == measured[1]["top1"]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-5 if precision == "fp32" else 0.02)
    assert measured[0]["loss"] != measured[1]["loss"]  # rounding: they were not the same network
    image = next(photos.rglob("*.png"))
    found = [gmf("predict", small_run, image, word)["images"][0]["classes"] for word in ("--fuse", "--no-fuse")]
    assert [one["class"] for one in found[0]] == [one["class"] for one in found[1]]


@pytest.mark.parametrize("command", ["eval", "predict", "serve"])
def test_threads_are_a_whole_number_from_one(command, capsys):
    assert main([command, "runs/x", *["photo.jpg"] * (command == "predict"), "--threads", "0"]) == 2
    assert "got 0, expected a whole number from 1" in capsys.readouterr().err
