"""The maps are the attention: what they give to V, plus the position part, is what the module computes."""

import re

import pytest
import timm
import torch

from groupmixformer import GroupMixFormer, attention_maps, fuse
from groupmixformer.explain import GROUP_SIZES, by_group_size

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 2, 2, 1), "mlp_ratios": (2, 1, 1.5, 3), "num_classes": 6}


@pytest.fixture
def model(randomise):
    return randomise(GroupMixFormer(**STAGES)).eval()


@pytest.mark.parametrize(
    ("stage", "block", "query"), [(0, 0, (44, 69)), (1, 0, (0, 0)), (1, -1, (9, 33)), (2, 1, (40, 5)), (3, -1, (31, 32))]
)
def test_maps_reproduce_the_attention(model, stage, block, query):
    model.double()
    images = torch.randn(2, 3, 45, 70, dtype=torch.float64)
    attention = model.stages[stage].blocks[block].attn
    seen = {}
    attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    attention.proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    with torch.no_grad():
        model(images)
        maps = attention_maps(model, images, query, stage=stage, block=block)
        proxies, _ = attention.group_proxies(seen["x"])
    B, D, H, W = seen["x"].shape
    stride = 4 * 2**stage
    assert maps.shape == (B, 8, H, W) == (B, 8, -(-45 // stride), -(-70 // stride))
    y, x = query[0] // stride, query[1] // stride
    queries, _, values = (
        torch.cat(part, dim=1) for part in zip(*(proxy.chunk(3) for proxy in proxies), strict=True)
    )  # (B, 4C, H, W)
    attended = torch.einsum("bhyx,bhcyx->bhc", maps, values.unflatten(1, (8, D // 10))).flatten(1)  # (B, 4C)
    convolutions = [attention.position.conv3, attention.position.conv5, attention.position.conv7]
    parts = values.split([conv.in_channels for conv in convolutions], dim=1)
    around = torch.cat([conv(part) for conv, part in zip(convolutions, parts, strict=True)], dim=1)
    expected = attended + (queries * around)[:, :, y, x]
    got = seen["mixed"].reshape(B, H * W, D)[:, y * W + x, : 4 * D // 5]
    torch.testing.assert_close(got, expected)


def test_defaults_are_the_last_block_of_stage_2(model):
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(attention_maps(model, images, query=(20, 40)), attention_maps(model, images, (20, 40), stage=2, block=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, "got stage 4, expected 0 to 3"),
        ({"stage": -1}, "got stage -1, expected 0 to 3"),
        ({"stage": 1, "block": 2}, "got block 2, expected 0 to 1 in stage 1"),
        ({"stage": 1, "block": -3}, "got block -3, expected 0 to 1 in stage 1"),
        ({"query": (45, 0)}, "got query (45, 0), expected a pixel (y, x) inside (45, 70)"),
        ({"query": (0, 70)}, "got query (0, 70), expected a pixel"),
        ({"query": (-1, 0)}, "got query (-1, 0), expected a pixel"),
        ({"images": torch.zeros(1, 3, 16, 16)}, "at least 32"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_maps(model, **{"images": torch.zeros(1, 3, 45, 70), "query": (0, 0), **arguments})


def test_wrong_model(model):
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"in training mode.*call model\.eval\(\)"):
        attention_maps(model.train(), images, (0, 0))
    with pytest.raises(ValueError, match="got a fused model, expected the one that it was made from"):
        attention_maps(fuse(model.eval()), images, (0, 0))
    with pytest.raises(ValueError, match="got a model ResNet, expected a GroupMixFormer"):
        attention_maps(timm.create_model("resnet10t").eval(), images, (0, 0))


def test_by_group_size():
    maps = torch.randn(2, 8, 5, 7)
    shown = by_group_size(maps, (5, 7))
    assert shown.shape == (2, 4, 5, 7)
    for i, size in enumerate((1, 3, 5, 7)):
        heads = [head for head in range(8) if GROUP_SIZES[head] == size]
        strength = maps[:, heads].abs().mean(1)
        torch.testing.assert_close(shown[:, i], strength / strength.amax((1, 2), keepdim=True))
    enlarged = by_group_size(maps, (45, 70))
    assert enlarged.shape == (2, 4, 45, 70)
    assert 0 <= enlarged.min() <= enlarged.max() <= 1
    assert not by_group_size(torch.zeros(1, 8, 2, 2), (4, 4)).any()
