"""Mixers in the networks of timm."""

import copy

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer import replace_attention
from groupmixformer.models.mixers import MIXERS
from groupmixformer.models.mixers.group_mix import GroupMix

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
    ("name", "match"),
    [
        ("swin_tiny_patch4_window7_224", "parameters"),
        ("vit_tiny_patch16_224", "macs"),
        *(pytest.param(name, match, marks=pytest.mark.slow) for name in MODELS for match in ("parameters", "macs")),
    ],
)
def test_costs_are_matched(name, match):
    model = create(name)
    replaced = replace_attention(model, "group_mix", match=match, image_size=(96, 96))
    if match == "parameters":
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
