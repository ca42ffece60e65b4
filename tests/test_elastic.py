"""Nested widths of the MLPs: what is cut out computes what the large network does at that width."""

import json
from pathlib import Path

import pytest
import timm
import torch
from test_split import gmf

import groupmixformer
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.models.elastic import extract, forward_at, sliced_weights
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.training.recipe import RecipeError, read_recipe

TINY = {"embed_dims": (20, 20, 40, 40), "depths": (1, 1, 2, 1), "num_classes": 5}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("groupmixformer_mobile", **TINY).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


@pytest.mark.parametrize("width", [0.25, 0.3, 1])
def test_a_width_that_is_cut_out_computes_what_the_large_network_does(model, width):
    images = torch.randn(2, 3, 45, 64, dtype=torch.float64)
    smaller = extract(model, width).double()
    smaller.load_state_dict(model.state_dict() | sliced_weights(model, width))  # in float64
    with torch.no_grad():
        assert torch.allclose(smaller(images), forward_at(model, images, width), atol=1e-12)
        if width < 1:
            assert not torch.allclose(smaller(images), model(images), atol=1e-3)
    hidden = [round(4 * dim * width) for dim in TINY["embed_dims"]]
    assert [smaller.get_parameter(f"stages.{i}.blocks.0.mlp.fc1.weight").shape[0] for i in range(4)] == hidden


def test_gradients_of_a_width_are_those_of_the_network_that_is_cut_out(model):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    smaller = extract(model, 0.5).double().train()
    smaller.load_state_dict(model.state_dict() | sliced_weights(model, 0.5))
    smaller(images).square().mean().backward()
    forward_at(model.train(), images, 0.5).square().mean().backward()
    for name, parameter in smaller.named_parameters():
        whole = model.get_parameter(name).grad
        part = whole[tuple(slice(n) for n in parameter.shape)]
        assert torch.allclose(part, parameter.grad, atol=1e-10), name
        assert whole.abs().sum() == pytest.approx(part.abs().sum().item())  # nothing reaches the others


def test_a_width_survives_saving_and_fusing(model, tmp_path):
    smaller = extract(model, 0.25)
    save_checkpoint(smaller, tmp_path / "small")
    again = groupmixformer.load_checkpoint(tmp_path / "small")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = forward_at(model.float(), images, 0.25)
        for network in (again, groupmixformer.fuse(again)):
            assert torch.allclose(network(images), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--elastic=[0.5]"], "the greatest is 1"),
        (["--elastic=[0,1]"], "above 0"),
        (["--elastic=[0.5,1]", "--grad-checkpointing=true"], "grad_checkpointing"),
        (["--elastic=[0.5,1]", "--model=pvt_v2_b0"], "PyramidVisionTransformerV2"),
    ],
)
def test_what_does_not_go_with_widths_is_said(options, problem):
    with pytest.raises((RecipeError, ValueError), match=problem):
        ClassificationModule.from_recipe(read_recipe("digits", options), 1)


@pytest.mark.slow
def test_widths_are_trained_together_and_cut_out_by_the_command(tmp_path, capsys):
    small = ["--model-options={depths: [1, 1, 1, 1], embed_dims: [20, 20, 40, 40]}", "--workers=0", "--threads=1"]
    out, cut = tmp_path / "run", tmp_path / "cut"
    gmf(capsys, "train", "digits", "--elastic=[0.25,1]", "--epochs=3", "--optimizer.lr=5e-3", *small, "--out", out)
    rows = json.loads(gmf(capsys, "extract", out, "--out", cut, "--json").out)["widths"]
    assert [row["width"] for row in rows] == [0.25, 1] and rows[0]["macs"] < rows[1]["macs"]
    assert rows[0]["parameters"] < rows[1]["parameters"] and [row["images"] for row in rows] == [512, 512]
    assert all(row["top1"] > 0.5 for row in rows)  # a width that was not trained with the others is near chance
    assert json.loads((cut / "widths.json").read_text()) == rows
    measured = json.loads(gmf(capsys, "eval", cut / "width-0.25", "--json").out)
    assert measured["top1"] == rows[0]["top1"]
    whole = json.loads(gmf(capsys, "eval", out, "--json").out)
    kept = json.loads(gmf(capsys, "extract", out, "--width", "1", "--images", "0", "--out", tmp_path / "kept", "--json").out)
    assert kept["widths"][0]["top1"] == whole["top1"]
    told = gmf(capsys, "extract", out, "--width", "0.5", "--out", tmp_path / "half").err
    assert "not trained at width 0.5" in told
    assert Path(tmp_path / "half" / "width-0.5" / "model.safetensors").is_file()
