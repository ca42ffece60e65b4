"""The command line as a user meets it: results, exit codes, one-line errors, run folders."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from packaging.requirements import Requirement
from PIL import Image
from sklearn.datasets import load_digits

import groupmixformer
from groupmixformer import load_checkpoint
from groupmixformer.cli.common import COMMANDS, GROUPS, requirements_of_extras
from groupmixformer.cli.main import _subparsers, main, make_parser, parse
from groupmixformer.run_folder import read_metrics
from groupmixformer.training.recipe import RecipeError, read_recipe, shipped, write_recipe

FAST = ["--image_size", "32", "--batch_size", "8", "--workers", "0", "--crop_pct", "1.0"]


@pytest.fixture(scope="session")
def run(photos, tmp_path_factory):
    """A finished run on `photos`."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "folder", "--data", str(photos), "--epochs", "1", "--out", str(folder), *FAST]) == 0
    return folder


def output(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def error(capsys, *argv, code):
    """The single line that a failed command leaves on stderr."""
    result = output(capsys, *argv, code=code)
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_models_lists_the_variants(capsys):
    rows = {row["name"]: row for row in json.loads(output(capsys, "models", "--json").out)["models"]}
    assert set(rows) == set(timm.list_models("groupmixformer*"))
    assert rows["groupmixformer_mobile"]["parameters"] == 5_733_120
    assert rows["groupmixformer_large_384"]["input_size"] == [3, 384, 384]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["modles"], "unknown command modles: did you mean models?"),
        (["bench", "mobile", "--image-size", "64", "64", "64"], "--size 64 64 64: expected a height and a width"),
        (["export", "x", "--format", "tensorrt", "--out", "y"], "litert: did you mean onnx?"),
        (["export", "x", "--format", "torchscript", "--out", "y"], "litert: did you mean pt2?"),
        (["models", "--jsn"], "did you mean --json?"),
        (["predict", "x", "y.png", "--topp", "3"], "did you mean --top?"),
        (["train", "digit"], "nearest: digits"),
        (["train", "digits", "--epoch", "3"], "the nearest is epochs"),
        (["train", "digits", "--optimizer.learning", "3"], "optimizer"),
        (["train", "digits", "--epochs", "many"], '--epochs is "many", expected an integer of at least 1'),
        (["train", "digits", "--print", "--batch-sise=1"], "the nearest is batch_size"),
        (["eval", "x", "--image_sise", "64"], "unknown option --image_sise: did you mean --image-size?"),
        (["bench", "--dtype", "bf17"], "did you mean bf16?"),
        (
            ["export", "x", "--format", "tflite", "--out", "y"],
            "value tflite, expected onnx, pt2, aoti, openvino, executorch, coreml, litert: did you mean litert?",
        ),
        (["train", "digits", "--learning_rate", "1"], "the nearest is optimizer.lr"),
        (["train", "digits", "--pretrained", "x"], "the nearest is checkpoint"),
        (["--versoin"], "did you mean --version?"),
        ([], "expected a command: see gmf --help"),
        (["predict", "x"], "required: IMAGE"),
        (["bench", "--size", "64", "64", "64"], "--size 64 64 64: expected a height and a width"),
    ],
)
def test_wrong_usage_names_the_nearest(capsys, argv, hint):
    assert hint in error(capsys, *argv, code=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_in_groups_and_its_example_parses(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = output(capsys, command, "--help").out
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
    titles = [line[:-1] for line in text.splitlines() if line.startswith(("what it ", "how it "))]
    assert titles == [title for title in GROUPS if title in titles]
    assert titles[-1] == "what it writes"
    assert "--json " in text.split("what it writes:")[1]
    example = COMMANDS[command].example
    assert f"example:\n  {example}\n" in text
    assert parse(shlex.split(example)[1:])[0] == command


def test_every_option_is_in_a_group_and_explained():
    for name, parser in _subparsers(make_parser()).items():
        for action in parser._actions[1:]:  # the first one is --help
            assert action.container.title in GROUPS, (name, action.dest)
            assert action.help, (name, action.dest)


def test_help_of_a_recipe_lists_every_field_with_dashes(capsys):
    assert "nuclei" in output(capsys, "train", "--help").out
    text = output(capsys, "train", "digits", "--help").out
    for field in ("--optimizer.weight-decay", "--augmentation.mixup", "--drop-path-rate", "Stochastic depth"):
        assert field in text
    assert not re.search(r"--[a-z.]*_", text)


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("eval x --image-size 64", "image_size", 64),
        ("eval x --image_size=64", "image_size", 64),
        ("eval x --per_class", "per_class", True),
        ("eval x --slide", "sliding_window", True),
        ("predict x y --sliding_window", "sliding_window", True),
        ("predict x y --score 0.25", "score_threshold", 0.25),
        ("serve x --score-threshold=0.25 --no-fuse", "score_threshold", 0.25),
        ("serve x --no_fuse", "fuse", False),
        ("bench --against a_b.json", "baseline", Path("a_b.json")),
        ("bench mobile --rounds 3", "repeats", 3),
        ("bench --dtype bf16", "precision", "bf16"),
        ("bench --compile", "compile", "default"),
        ("bench --compile max-autotune", "compile", "max-autotune"),
        ("bench --size 64 --size 96", "size", [64, 96]),
        ("quickstart --variant tiny", "model", "tiny"),
        ("explain x y --query 1,2 3,4 --class a_b", "query", [(1, 2), (3, 4)]),
        ("explain x y --class a_b", "wanted_class", "a_b"),
        ("explain x y --stage 1 2", "stage", [1, 2]),
        ("eval x --scales 0.75,1", "scales", (0.75, 1.0)),
    ],
)
def test_options_take_dashes_underscores_and_old_names(typed, name, value):
    assert parse(typed.split())[2][name] == value


def test_only_what_is_given_reaches_the_command():
    assert parse(["predict", "x", "y", "z"]) == ("predict", ["x", ["y", "z"]], {})
    assert parse(["bench"]) == ("bench", [], {})
    assert parse(["bench", "a", "b"]) == ("bench", [["a", "b"]], {})
    assert parse(["predict", "x", "--flip", "--", "--slide"]) == ("predict", ["x", ["--slide"]], {"flip": True})


def test_fields_of_recipes_take_dashes_and_underscores(capsys):
    dashes = ["--batch-size", "8", "--detector.max-size=500", "--optimizer.weight-decay", "-1", "--out=a-b"]
    underscores = ["--batch_size", "8", "--detector.max_size=500", "--optimizer.weight_decay", "-1", "--out=a-b"]
    recipe = output(capsys, "train", "nuclei", *dashes, "--print").out
    assert recipe == output(capsys, "train", "nuclei", *underscores, "--print").out
    for line in ("batch_size: 8\n", "  max_size: 500\n", "  weight_decay: -1", "out: a-b\n"):
        assert line in recipe


def test_version(capsys):
    assert output(capsys, "--version").out == f"gmf {groupmixformer.__version__}\n"


def test_doctor_knows_extras_by_the_metadata(capsys, monkeypatch):
    needs = {"fast": ["torch>=2", "no-such-library>=3"], "new": ["timm>=999"], "whole": ["numpy"]}
    needs["dev"] = [f"absent{i}" for i in range(40)]
    made = {extra: [Requirement(need) for need in lines] for extra, lines in needs.items()}
    monkeypatch.setattr("groupmixformer.cli.bench.requirements_of_extras", lambda: made)
    result = json.loads(output(capsys, "doctor", "--json").out)
    assert result["versions"]["torch"] == version("torch")
    assert result["versions"]["no-such-library"] is None
    assert result["devices"][0] == "cpu"
    assert result["cpu"]["threads"] == torch.get_num_threads()
    assert len(result["extras"].pop("dev")["missing"]) == 40
    assert result["extras"] == {
        "fast": {"complete": False, "missing": ["no-such-library>=3"], "install": "pip install 'groupmixformer[fast]'"},
        "new": {
            "complete": False,
            "missing": [f"timm>=999 ({timm.__version__} is installed)"],
            "install": "pip install 'groupmixformer[new]'",
        },
        "whole": {"complete": True, "missing": [], "install": None},
    }
    text = output(capsys, "doctor").out
    assert "missing absent0, absent1, 38 more: pip install 'groupmixformer[dev]'\n" in text
    assert "missing no-such-library>=3: pip install 'groupmixformer[fast]'\n" in text
    assert re.search(r"^  whole +complete$", text, re.M)


def test_extras_are_those_of_pyproject():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = requirements_of_extras()
    for extra in ("train", "data", "serve"):
        assert {need.name for need in found[extra]} == {Requirement(line).name for line in extras[extra]}
    assert {extra for command in COMMANDS.values() for extra in command.extras} <= set(extras)


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("train", "lightning.pytorch", "train"),
        ("train", "faster_coco_eval", "detection"),
        ("predict", "segmentation_models_pytorch", "segmentation"),
        ("eval", "datasets", "data"),
        ("eval", "sklearn.metrics", "train"),
        ("serve", "starlette", "serve"),
        ("demo", "gradio", "demo"),
        ("demo", "fastapi", "demo"),
        ("export", "openvino", "openvino"),
    ],
)
def test_the_extra_to_install_is_the_commands(capsys, monkeypatch, command, module, extra):
    def function():
        """Need a library."""
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setitem(COMMANDS, command, dataclasses.replace(COMMANDS[command], function=function))
    assert error(capsys, command, code=1) == f"gmf: error: this needs {module}: pip install 'groupmixformer[{extra}]'"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(capsys, shell):
    pytest.importorskip("shtab")
    script = output(capsys, "--print-completion", shell).out
    for word in ("predict", "doctor", "sliding-window", "bf16"):
        assert word in script
    if shell == "bash" and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    line = error(capsys, "--print-completion", "zsh", code=2)
    assert line == "gmf: error: --print-completion needs shtab: pip install 'groupmixformer[cli]'"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_round_trips(name, tmp_path):
    own = {
        "classification": ["--augmentation.scale=[0.5,0.75]", "--augmentation.color_jitter=null"],
        "detection": ["--detector.sizes=[96,128]", "--detector.vflip=0.25"],
        "segmentation": ["--segmenter.scale=[0.5,0.75]", "--segmenter.channels=null"],
        "pretraining": ["--pretrain.scale=[0.5,0.75]", "--pretrain.method=dino"],
    }
    task = read_recipe(name).task
    recipe = read_recipe(name, ["--optimizer.lr", "0.25", *own[task]])
    assert recipe.optimizer.lr == 0.25
    if task == "classification":
        assert recipe.augmentation.scale == (0.5, 0.75)
        assert recipe.augmentation.color_jitter is None
    elif task == "detection":
        assert (recipe.detector.sizes, recipe.detector.vflip) == ([96, 128], 0.25)
    elif task == "pretraining":
        assert (recipe.pretrain.scale, recipe.pretrain.method) == ((0.5, 0.75), "dino")
    else:
        assert (recipe.segmenter.scale, recipe.segmenter.channels) == ((0.5, 0.75), None)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert shipped()[name].read_text().startswith(f"# gmf train {name}")


def test_print_shows_the_resolved_recipe(capsys):
    argv = ["train", "digits", "--optimizer.lr", "0.5", "--print"]
    assert "lr: 0.5" in output(capsys, *argv).out
    assert json.loads(output(capsys, *argv, "--json").out)["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize("text", ["- a list", "data: [", "epoch: 3", "data: x\noptimizer: {momentum: 3}", "\x00"])
def test_a_broken_recipe_is_refused(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        read_recipe(str(tmp_path / "mine.yaml"))


def test_a_run_folder_holds_everything(run, photos, capsys):
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "versions.json", "metrics.csv", "model.safetensors", "config.json", "report.html"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert not [name for name in names if name.endswith(".part")]
    assert read_recipe(str(run / "recipe.yaml")).data == str(photos)
    assert {"loss.png", "confusion.png"} <= {path.name for path in (run / "report").iterdir()}
    measured = json.loads(output(capsys, "eval", run, "--json").out)
    assert measured["images"] == 16
    assert measured["top1"] == pytest.approx(max(row["val_top1"] for row in read_metrics(run)))
    config = json.loads((run / "config.json").read_text())
    assert config["label_names"] == ["one", "zero"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_a_run_is_not_overwritten_but_resumed(run, photos, capsys, tmp_path):
    argv = ["train", "folder", "--data", photos, "--out", run, *FAST]
    assert "holds a run already" in error(capsys, *argv, code=1)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    output(capsys, *argv[: -len(FAST) - 1], copy, *FAST, "--epochs", "3", "--resume")
    assert [row["epoch"] for row in read_metrics(copy)] == [0, 1, 2]
    assert read_metrics(copy)[0] == read_metrics(run)[0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(run, photos, capsys, tmp_path):
    output(capsys, "train", run / "recipe.yaml", "--out", tmp_path / "again")
    again, first = load_checkpoint(tmp_path / "again").state_dict(), load_checkpoint(run).state_dict()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_predict_reads_files_folders_and_globs(run, photos, capsys):
    ones = sorted((photos / "val" / "one").iterdir())
    result = json.loads(output(capsys, "predict", run, ones[0], photos / "val", f"{photos}/val/*/1?.png", "--json").out)
    assert result["images"][0]["image"] == str(ones[0])
    assert len(result["images"]) == 16  # each once
    classes = result["images"][0]["classes"]
    assert {row["class"] for row in classes} == {"one", "zero"}
    assert sum(row["probability"] for row in classes) == pytest.approx(1, abs=1e-5)
    assert str(ones[0]) in output(capsys, "predict", run, ones[0], "--top", "1").out


def test_predict_skips_what_it_cannot_read(run, photos, capsys, tmp_path):
    good = next((photos / "val" / "one").iterdir())
    bad = {"empty.png": b"", "text.jpg": b"not an image", "half.png": good.read_bytes()[:60]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "photos"
    shutil.copytree(photos / "val", folder)
    (folder / "one" / "dangling.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(folder / "one" / "fifo.jpg")
    (folder / "one" / "._x.png").write_bytes(b"left")
    (folder / "one" / "notes.txt").write_text("text")
    given = [*(tmp_path / name for name in bad), tmp_path / "gone.png", good, folder]
    result = output(capsys, "predict", run, *given, "--json")  # exit 0
    found = json.loads(result.out)
    assert len(found["images"]) == 1 + len(list(photos.glob("val/*/*")))
    assert len(found["skipped"]) == 6
    assert "files left out: 1 .txt, 1 hidden or of the system" in found["notes"]
    for name in (*bad, "gone.png", "dangling.png", "fifo.jpg"):
        assert name in result.err
    nothing = output(capsys, "predict", run, *(tmp_path / name for name in bad), code=1)
    assert "none of 3 images could be read" in nothing.err


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_predict_reads_every_kind_of_image(run, capsys, tmp_path, mode):
    pixels = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40)
    image = Image.fromarray(pixels * 30) if mode == "I;16" else Image.fromarray((pixels % 256).astype(np.uint8)).convert(mode)
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    assert json.loads(output(capsys, "predict", run, path, "--json").out)["images"]


@pytest.mark.slow
def test_finetuning_starts_from_a_checkpoint_with_a_new_classifier(run, photos, capsys, tmp_path):
    three = tmp_path / "three"
    shutil.copytree(photos, three)
    for split in ("train", "val"):
        shutil.copytree(three / split / "one", three / split / "uno")
    options = ["--data", three, "--checkpoint", run, "--epochs", "1", "--optimizer.lr", "0", "--schedule.warmup_lr", "0"]
    options += ["--schedule.min_lr", "0", "--augmentation.mixup", "0.8", "--augmentation.cutmix", "1.0"]
    output(capsys, "train", "finetune", *options, "--out", tmp_path / "tuned", *FAST)
    tuned, first = load_checkpoint(tmp_path / "tuned"), load_checkpoint(run)
    assert tuned.num_classes == 3
    weight = "stages.2.blocks.3.attn.qkv.weight"
    assert torch.equal(tuned.state_dict()[weight], first.state_dict()[weight])  # at a learning rate of 0


def test_other_timm_models_train_the_same_way(photos, capsys, tmp_path):
    argv = ["train", "folder", "--data", photos, "--variant", "test_resnet", "--epochs", "1", "--out", tmp_path / "run", *FAST]
    result = json.loads(output(capsys, *argv, "--json").out)
    assert json.loads(output(capsys, "eval", tmp_path / "run", "--json").out)["top1"] == result["top1"]


def test_convert_writes_what_timm_reads(run, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("uno\nzero\n")
    argv = ["convert", run / "model.safetensors", "--out", tmp_path / "out", "--class-names", tmp_path / "names.txt"]
    output(capsys, *argv, "--image-size", "48")
    images = torch.randn(1, 3, 48, 48)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), load_checkpoint(run)(images))
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert model.pretrained_cfg["label_names"] == ["uno", "zero"]


def broken_folder(photos, root, how):
    shutil.copytree(photos, root)
    if how == "no val":
        shutil.rmtree(root / "val")
    elif how == "no train":
        shutil.rmtree(root / "train")
    elif how == "another class":
        (root / "val" / "one").rename(root / "val" / "two")
    elif how == "an empty class":
        for path in (root / "train" / "one").iterdir():
            path.unlink()
    elif how == "one class":
        shutil.rmtree(root / "train" / "one")
        shutil.rmtree(root / "val" / "one")


@pytest.mark.parametrize("how", ["no val", "no train", "another class", "an empty class", "one class"])
def test_a_broken_data_folder_is_refused_before_training(photos, capsys, tmp_path, how):
    broken_folder(photos, tmp_path / "data", how)
    line = error(capsys, "train", "folder", "--data", tmp_path / "data", "--out", tmp_path / "run", code=1)
    assert str(tmp_path / "data") in line
    assert "expected" in line


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["eval", "nowhere"], "nowhere: no such checkpoint"),
        (["predict", "nowhere", "x.png"], "nowhere: no such checkpoint"),
        (["convert", "nowhere.pth", "--out", "x"], "nowhere.pth: no such checkpoint"),
        (["train", "digits", "--data", "nothing", "--out", "{tmp}/a"], "no data set nothing"),
        (["train", "digits", "--variant", "groupmixformer_smal", "--out", "{tmp}/b"], "the nearest is groupmixformer_small"),
        (["train", "digits", "--batch_size", "9999", "--out", "{tmp}/c"], "lower batch_size"),
        (["train", "digits", "--out", "/dev/null/x"], "/dev/null"),
        (["train", "digits", "--augmentation.mixup", "1", "--batch_size", "7", "--out", "{tmp}/e"], "expected an even one"),
        (["train", "finetune", "--checkpoint", "gone.pth", "--data", "digits", "--out", "{tmp}/d"], "gone.pth"),
    ],
)
def test_a_failed_job_says_why_in_one_line(capsys, tmp_path, argv, hint):
    assert hint in error(capsys, *(word.format(tmp=tmp_path) for word in argv), code=1)


def test_eval_takes_a_folder_of_classes_and_timms_data_sets(run, photos, capsys):
    whole = json.loads(output(capsys, "eval", run, "--json").out)
    for argv in (["--data", photos / "val"], ["--data", "torch/folder", "--root", photos]):
        measured = json.loads(output(capsys, "eval", run, *argv, "--json").out)
        assert {key: measured[key] for key in ("top1", "top5", "loss", "images")} == pytest.approx(
            {key: whole[key] for key in ("top1", "top5", "loss", "images")}
        )


def idx(path, array):
    """Write the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.slow
def test_data_sets_of_torchvision_and_hugging_face_train(capsys, tmp_path, photos):
    """Local copies: the digits as MNIST's files, which are grey, and an image folder by Hugging Face's reader."""
    images, labels = load_digits(return_X_y=True)
    for split, chosen in (("train", slice(0, 60)), ("t10k", slice(60, 89))):
        raw = tmp_path / "MNIST" / "raw"
        idx(raw / f"{split}-images-idx3-ubyte", images[chosen].reshape(-1, 8, 8) * 15.9)
        idx(raw / f"{split}-labels-idx1-ubyte", labels[chosen])
    (tmp_path / "hf").mkdir()
    shutil.copytree(photos / "train", tmp_path / "hf" / "train")
    shutil.copytree(photos / "val", tmp_path / "hf" / "validation")
    sets = {
        "torch/mnist": ["--root", tmp_path],
        f"hfds/{tmp_path / 'hf'}": ["--root", tmp_path / "cache"],
        f"hfids/{tmp_path / 'hf'}": [],
    }
    for i, (data, options) in enumerate(sets.items()):
        out = tmp_path / f"run-{i}"
        argv = ["train", "folder", "--data", data, *options, "--variant", "test_resnet", "--epochs", "1", "--out", out, *FAST]
        result = json.loads(output(capsys, *argv, "--json").out)
        assert result["images"] == (29 if data == "torch/mnist" else 16)
        names = json.loads((out / "config.json").read_text())["label_names"]
        assert names == (torchvision.datasets.MNIST.classes if data == "torch/mnist" else ["one", "zero"])
        again = json.loads(output(capsys, "eval", out, "--json").out)
        assert (again["top1"], again["images"]) == (result["top1"], result["images"])


def test_the_quickstart_takes_a_free_folder(monkeypatch, tmp_path, capsys, photos):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text("data: digits")  # a run that must not be touched
    argv = ["quickstart", "--data", photos, "--variant", "test_resnet", "--epochs", "1", "--json"]
    assert "lower batch_size" in error(capsys, *argv, code=1)  # 24 images
    assert (tmp_path / "runs" / "quickstart-2").is_dir()
    assert [path.name for path in (tmp_path / "runs" / "quickstart").iterdir()] == ["recipe.yaml"]


def test_eval_refuses_other_classes(run, capsys):
    assert "digits: has other classes than the model: only the data has 0, 1, 2, 3, 4, ... (10); only the model has" in error(
        capsys, "eval", run, "--data", "digits", code=1
    )


@pytest.mark.slow
def test_the_installed_command_leaves_stdout_to_the_result(run, photos):
    argv = [sys.executable, "-m", "groupmixformer.cli.main", "eval", str(run), "--json"]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["images"] == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import groupmixformer", ["lightning", "torchmetrics", "matplotlib", "sklearn", "jsonargparse", "transformers"]),
        pytest.param(
            "from groupmixformer.cli.main import main; main(['predict', 'nowhere', 'x'])",
            ["lightning", "matplotlib", "jsonargparse"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import groupmixformer.tasks.classification.metrics, groupmixformer.data",
            ["lightning", "matplotlib"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_light_things_import_nothing_heavy(statement, unwanted):
    script = f"import sys; {statement}; print([name for name in {unwanted} if name in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip().splitlines()[-1] == "[]"
