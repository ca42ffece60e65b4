"""Weights that users download, and what is known of the variants without building them."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import groupmixformer
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import model_name
from groupmixformer.released import VARIANTS, find_weights
from groupmixformer.training.recipe import read_recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GMF_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def mobile(folder):
    """A network whose weights were put where downloads are looked for, in a form of training checkpoints."""
    torch.manual_seed(0)
    model = timm.create_model("groupmixformer_mobile").eval()
    torch.save({"model": model.state_dict(), "epoch": 1}, folder / "GroupMixFormer-mobile_224.pth")
    return model


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * ("l" in v or v == "base")) for v in VARIANTS])
def test_the_table_is_what_is_counted(variant):
    with torch.device("meta"):
        model = timm.create_model(model_name(variant)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    known = VARIANTS[variant]
    assert known.parameters == sum(p.numel() for p in model.parameters())
    assert known.macs == counter.get_total_flops() // 2
    assert [3, known.image_size, known.image_size] == list(model.pretrained_cfg["input_size"])


def test_every_way_finds_the_file(mobile, tmp_path, capsys):
    images = torch.randn(1, 3, 32, 32)
    made = timm.create_model("groupmixformer_mobile", pretrained=True).eval()
    assert "state_dict" not in made.pretrained_cfg  # it would be kept in memory twice
    for model in (
        made,
        groupmixformer.load_checkpoint("mobile"),
        groupmixformer.Run.open("groupmixformer_mobile").predictor().model,
    ):
        torch.testing.assert_close(model(images), mobile(images), atol=1e-4, rtol=1e-4)
    ten = timm.create_model("groupmixformer_mobile", pretrained=True, num_classes=10)
    assert torch.equal(ten.stem.conv1.weight, mobile.stem.conv1.weight)
    assert main(["convert", "mobile", "--out", str(tmp_path / "converted")]) == 0
    assert torch.equal(groupmixformer.load_checkpoint(tmp_path / "converted")(images), mobile(images))


def test_a_file_of_that_name_counts_more(mobile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = timm.create_model("groupmixformer_mobile", num_classes=3)
    groupmixformer.models.checkpoint.save_checkpoint(other, "mobile")
    assert groupmixformer.load_checkpoint("mobile").num_classes == 3
    released = timm.create_model("groupmixformer_mobile", pretrained=True)  # names the variant, never a path
    assert torch.equal(released.head.fc.weight, mobile.head.fc.weight)


@pytest.mark.parametrize(
    ("names", "variant", "found"),
    [
        (["groupmixformer_large.pth", "groupmixformer_large_384.pth"], "large", "groupmixformer_large.pth"),
        (["groupmixformer_large.pth", "groupmixformer_large_384.pth"], "large_384", "groupmixformer_large_384.pth"),
        (["my-smaller-net.pth", "GMF-Small.safetensors"], "small", "GMF-Small.safetensors"),
        (["groupmixformer_base.txt", "base.bin"], "base", "base.bin"),
    ],
)
def test_names_of_files(folder, names, variant, found):
    for name in names:
        save_file({"x": torch.ones(1)}, folder / name)
    assert find_weights(variant) == folder / found


def test_two_files_of_one_variant_are_refused(folder):
    for name in ("tiny.pth", "groupmixformer_tiny.pth"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"groupmixformer_tiny\.pth, tiny\.pth are all named as tiny"):
        find_weights("tiny")


def test_where_to_download_is_said(folder, capsys, tmp_path):
    said = rf"no weights of small in {folder}: download them with a browser from https://\S+ .*groupmixformer_small\.pth"
    with pytest.raises(FileNotFoundError, match=said):
        timm.create_model("groupmixformer_small", pretrained=True)
    assert main(["convert", "small", "--out", str(tmp_path / "out")]) == 1
    assert VARIANTS["small"].page in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"seem never to have been public .* links those of mobile"):
        timm.create_model("groupmixformer_large", pretrained=True)


def test_damaged_weights_are_refused(folder):
    (folder / "mobile.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"mobile\.pth"):
        timm.create_model("groupmixformer_mobile", pretrained=True)


def test_a_recipe_starts_from_them(mobile):
    from groupmixformer.tasks.registry import build_task

    task = build_task(read_recipe("digits", ["--checkpoint", "mobile"]), world_size=1)
    assert torch.equal(task.model.stem.conv1.weight, mobile.stem.conv1.weight)


def test_what_needs_no_network_imports_no_torch():
    argvs = [["models"], ["--help"], ["predict", "--help"], ["export", "x", "--format", "y"]]
    code = f"""import sys; sys.argv = ["gmf"]
from groupmixformer.cli.main import main
print([main(argv) for argv in {argvs}], "torch" in sys.modules, file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 2] False"
