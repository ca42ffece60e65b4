"""Mixers in the networks of timm."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer import replace_attention
from groupmixformer.bench.matching import costs, match
from groupmixformer.cli.main import main
from groupmixformer.models.checkpoint import load_model, remade, save_checkpoint
from groupmixformer.models.mixers import MIXERS
from groupmixformer.models.mixers.group_mix import GroupMix
from groupmixformer.models.mixers.hilo import HiLo
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.classification.training import create_classifier
from groupmixformer.training.recipe import Recipe

SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4), "img_size": 96, "strict_img_size": False}
PVT = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 96, "dynamic_img_size": True}
MODELS = {
    "swin_tiny_patch4_window7_224": SWIN,
    "pvt_v2_b0": PVT,
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
}


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **MODELS[name], **options).eval()


def macs(model, side):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", MODELS)
def test_all_but_the_attention_stays(name):
    model = create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    replaced = replace_attention(model)
    torch.testing.assert_close(model.state_dict(), before)
    kept = {key: value for key, value in before.items() if ".attn." not in key}
    after = {key: value for key, value in replaced.state_dict().items() if ".attn." not in key}
    torch.testing.assert_close(after, kept)
    assert sum(
        isinstance(module, GroupMix) or type(module).__name__ == "GroupMixAttention" for module in replaced.modules()
    ) == (2 if "patch16" in name else 5)
    for size in ((96, 96), (96, 128), (64, 96)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            y = replaced(images)
            torch.testing.assert_close(replaced(images[:1]), y[:1])
            torch.testing.assert_close(copy.deepcopy(replaced)(images), y)
            assert y.shape == (2, 3) and not torch.allclose(y, model(images))
    replaced.train()(images).square().sum().backward()
    assert [key for key, p in replaced.named_parameters() if p.grad is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name not in ("group_mix", "strip", "conv", "pool")])
def test_other_mixers_in_swin(mixer):
    model = replace_attention(create("swin_tiny_patch4_window7_224"), mixer)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).isfinite().all()


def test_the_same_attention_put_back_is_the_same_network():
    """Swin's attention as the mixer `window`, with its weights, changes nothing where maps are whole windows."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN | {"img_size": 224, "num_heads": (1, 1, 2, 4)}).eval()
    replaced = replace_attention(model, "window", {"head_dim": 32})
    names = {key: key.replace(".attn.", ".attn.attn.", 1) for key in model.state_dict()}
    replaced.load_state_dict({names[key]: value for key, value in model.state_dict().items()})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(replaced(images), model(images))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "parameters"),
        ("vit_tiny_patch16_224", "macs"),
        *(pytest.param(name, kind, marks=pytest.mark.slow) for name in MODELS for kind in ("parameters", "macs")),
    ],
)
def test_costs_are_matched(name, kind):
    model = create(name)
    replaced = replace_attention(model, "group_mix", match=kind, image_size=(96, 96))
    if kind == "parameters":
        got, expected = (sum(p.numel() for p in network.parameters()) for network in (replaced, model))
    else:
        got, expected = macs(replaced, 96), macs(model, 96)
    assert got == pytest.approx(expected, rel=0.02)
    old, new = (dict(network.named_parameters()) for network in (model, replaced))
    key = next(key for key in old if key.endswith("mlp.fc2.weight"))
    width = min(old[key].shape[1], new[key].shape[1])
    torch.testing.assert_close(new[key][:, :width], old[key][:, :width])


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(ValueError, match="got a ResNet, expected a Swin, PVTv2, ViT or DeiT of timm"):
        replace_attention(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="the nearest is hilo"):
        replace_attention(create("pvt_v2_b0"), "hilow")
    with pytest.raises(ValueError, match="expected parameters, macs or none"):
        replace_attention(create("pvt_v2_b0"), match="speed")
    model = replace_attention(create("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="got a mask of attention"):
        model(torch.randn(1, 3, 96, 96), attn_mask=torch.zeros(1, 1, 37, 37))


@pytest.mark.parametrize("name", MODELS)
def test_a_mixer_is_an_option_of_the_model_and_of_its_checkpoint(name, tmp_path):
    options = {key: value for key, value in MODELS[name].items() if key != "img_size"} | {"mixer": "hilo"}
    recipe = Recipe(data="digits", model=name, image_size=96, model_options=options | {"mixer_options": {"alpha": 0.5}})
    model = create_classifier(recipe, list("abc")).eval()
    assert sum(isinstance(module, HiLo) for module in model.modules()) == (2 if "patch16" in name else 5)
    save_checkpoint(model, tmp_path, ["a", "b", "c"], {"input_size": (3, 96, 96)})
    loaded = load_model(tmp_path)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(loaded(images), expected)
        assert torch.equal(remade(loaded, 96, num_classes=3).eval()(images), expected)
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"] and loaded.model_options["mixer"] == "hilo"


def test_options_of_a_mixer_in_another_network_are_checked():
    recipe = Recipe(data="digits", model="pvt_v2_b0", model_options={"mixer": "hilow"})
    with pytest.raises(ValueError, match="the nearest is hilo"):
        create_classifier(recipe, list("abc"))
    recipe = Recipe(data="digits", model="pvt_v2_b0", model_options={"mixer_options": {"alpha": 0.5}})
    with pytest.raises(ValueError, match="pvt_v2_b0 cannot be made with model_options"):
        create_classifier(recipe, list("abc"))
    recipe = Recipe(data="digits", model="resnet18", model_options={"mixer": "hilo"})
    with pytest.raises(ValueError, match="got a ResNet, expected a Swin"):
        create_classifier(recipe, list("abc"))
    with pytest.raises(ValueError, match="pvt_v2_b0 with a mixer is only a classifier"):
        Backbone("pvt_v2_b0", {"mixer": "hilo"}).indices([8])


def test_other_networks_keep_their_widths_when_they_are_matched():
    recipe = Recipe(data="digits", model="pvt_v2_b0", model_options=PVT, image_size=64)
    target = costs(recipe, list("abc"))["macs"]
    mixed = replace(recipe, model_options=PVT | {"mixer": "group_mix"})
    scaled, _ = match(mixed, list("abc"), "macs", target)
    assert list(scaled) == ["mlp_ratios"]
    matched = replace(recipe, model_options=mixed.model_options | scaled)
    assert costs(matched, list("abc"))["macs"] == pytest.approx(target, rel=0.02)


@pytest.mark.slow
def test_a_run_of_swin_with_group_mix_is_trained_continued_and_evaluated(tmp_path):
    out = tmp_path / "run"
    options = '{"mixer": "group_mix", "embed_dim": 20, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "window_size": 4}'
    words = ["--model", "swin_tiny_patch4_window7_224", "--model-options", options, "--image-size", "32", "--out", str(out)]
    assert main(["train", "digits", *words, "--epochs", "1"]) == 0
    assert main(["train", "digits", *words, "--epochs", "2", "--auto-resume"]) == 0
    assert len(read_metrics(out)) == 2
    assert main(["eval", str(out), "--data", "digits"]) == 0
    model = load_model(out)
    assert any(type(module).__name__ == "GroupMixAttention" for module in model.modules())
