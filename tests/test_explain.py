"""Applied to V, the maps and the local part are what the attention computes; relevance is where a score comes from."""

import re

import pytest
import timm
import torch
from torch import nn

from groupmixformer import GroupMixFormer, attention_maps, fuse
from groupmixformer.models.attention_maps import (
    GROUP_SIZES,
    attend,
    by_group_size,
    class_relevance,
    overlays,
    relevance,
    suited_stage,
)

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 2, 2, 1), "mlp_ratios": (2, 1, 1.5, 3), "num_classes": 6}


@pytest.fixture
def model(randomise):
    return randomise(GroupMixFormer(**STAGES)).eval()


@pytest.mark.parametrize(
    ("stage", "block", "query"), [(0, 0, (44, 69)), (1, 0, (0, 0)), (1, -1, (9, 33)), (2, 1, (40, 5)), (3, -1, (31, 32))]
)
def test_maps_and_local_part_reproduce_the_attention(model, stage, block, query):
    """Per segment, of a size that no stride divides, at corners too, from the values V alone."""
    model.double()
    images = torch.randn(2, 3, 45, 70, dtype=torch.float64)
    attention = model.stages[stage].blocks[block].attn
    seen = {}
    attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    attention.proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    other = (20, 20)
    with torch.no_grad():
        model(images)
        implied = attend(model, images, [other, query], [stage], block)[stage]
        proxies, _ = attention.group_proxies(seen["x"])
        assert torch.equal(attention_maps(model, images, query, stage, block), implied.maps[:, 1])
    B, D, H, W = seen["x"].shape
    stride = 4 * 2**stage
    assert implied.maps.shape == (B, 2, 8, H, W) == (B, 2, 8, -(-45 // stride), -(-70 // stride))
    assert implied.local.shape == (B, 2, 8, D // 10, 7, 7)
    assert implied.constant.shape == (B, 2, 8, D // 10)
    values = proxies.chunk(3)[2].unflatten(1, (8, D // 10))  # (B, 8, D/10, H, W)
    around = nn.functional.pad(values.flatten(1, 2), (3, 3, 3, 3)).unflatten(1, (8, D // 10))
    for i, (row, column) in enumerate((other, query)):
        y, x = row // stride, column // stride
        attended = torch.einsum("bhyx,bhcyx->bhc", implied.maps[:, i], values)
        local = (implied.local[:, i] * around[..., y : y + 7, x : x + 7]).sum(dim=(3, 4)) + implied.constant[:, i]
        got = seen["mixed"].reshape(B, H * W, D)[:, y * W + x, : 4 * D // 5].unflatten(1, (4, D // 5))
        assert local.norm() > 0.01 * attended.norm()  # leaving it out would show
        for segment, expected in enumerate((attended + local).unflatten(1, (4, 2)).flatten(2).unbind(1)):
            assert (got[:, segment] - expected).norm() <= 1e-9 * expected.norm()


def test_kernels_that_are_smaller_have_zeros_around(model):
    local = attend(model, torch.randn(1, 3, 45, 70), [(9, 33)], [1])[1].local[0, 0]  # (8, D/10, 7, 7)
    reach = [1 + 2 * (local[head].abs().sum(dim=0).nonzero() - 3).abs().max().item() for head in range(8)]
    assert reach == [3, 3, 5, 5, 5, 7, 7, 7]


def test_several_stages_and_queries_take_one_run(model):
    images, queries = torch.randn(2, 3, 45, 70), [(0, 0), (20, 60), (44, 69)]
    runs = []
    model.stages[1].blocks[0].register_forward_hook(lambda *_: runs.append(1))
    found = attend(model, images, queries, [3, 0, 1])
    assert (sorted(found), len(runs)) == ([0, 1, 3], 1)
    for stage, implied in found.items():
        for i, query in enumerate(queries):
            torch.testing.assert_close(implied.maps[:, i], attention_maps(model, images, query, stage))


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


@pytest.mark.parametrize(("size", "stage"), [((32, 32), 1), ((64, 200), 2), ((224, 224), 2), ((16, 16), 0), ((15, 99), 0)])
def test_the_suited_stage_has_four_tokens_along_each_side(size, stage):
    assert suited_stage(size, range(3)) == stage
    assert suited_stage((224, 224), (1, 3, 2)) == 3
    assert suited_stage((32, 32), (2, 3)) == 2


def test_overlays_of_one_image(model):
    image = torch.randn(3, 64, 80)
    found = overlays(model, image, (20, 40))
    assert found.shape == (4, 64, 80) and not found.requires_grad
    assert 0 <= found.min() <= found.max() <= 1
    with torch.no_grad():
        expected = by_group_size(attention_maps(model, image[None], (20, 40), stage=2), (64, 80))[0]
    torch.testing.assert_close(found, expected)
    assert not torch.equal(overlays(model, image, (20, 40), stage=0), found)


class Corner(nn.Module):
    """A classifier that sees one corner of the map only: the others of 6 classes are never spoken for."""

    def forward(self, x, pre_logits=False):
        corner = x[:, :, :1, -2:].square().mean(dim=(1, 2, 3))
        return torch.stack([corner, -corner, *[0 * corner] * 4], dim=1)


def test_relevance_is_where_the_class_score_comes_from(model):
    model.head = Corner()
    images = torch.randn(3, 3, 128, 160)  # maps of 4 x 5 at the end
    found, logits = class_relevance(model, images, [0, 0, 0])
    assert (found.shape, logits.shape) == ((3, 128, 160), (3, 6))
    torch.testing.assert_close(logits, model(images).detach())
    assert found.min() == 0
    for each in found:
        assert each.max() == 1
        row, column = divmod(int(each.argmax()), 160)
        assert row < 32 and column >= 96
        assert not each[64:].any() and not each[:, :64].any()  # a token and a half away
    against, _ = class_relevance(model, images, [1, 1, 4])
    assert not against.any()


def test_relevance_on_the_last_stage_is_textbook_grad_cam(model):
    images = torch.randn(2, 3, 128, 160)
    found, logits = class_relevance(model, images)
    for i, image in enumerate(images):
        features = model.stages(model.stem(image[None])).detach().requires_grad_()
        score = model.head(model.norm(features))[0, logits[i].argmax()]
        score.backward()
        weights = features.grad.mean(dim=(2, 3), keepdim=True)
        cam = (weights * features).sum(dim=1, keepdim=True).relu()
        cam = nn.functional.interpolate(cam, (128, 160), mode="bilinear")[0, 0].detach()
        torch.testing.assert_close(found[i], cam / cam.max(), atol=1e-5, rtol=1e-4)


def test_each_class_and_stage_has_its_relevance(model):
    images = torch.randn(1, 3, 130, 161)
    maps = [class_relevance(model, images, [label], stage)[0] for label in (0, 1) for stage in range(4)]
    for i, one in enumerate(maps):
        assert one.shape == (1, 130, 161) and 0 <= one.min() <= one.max() == 1
        assert all(not torch.equal(one, other) for other in maps[:i])
    assert torch.equal(class_relevance(model, images, [0])[0], maps[3])


def test_relevance_is_not_negative_and_zero_stays_zero():
    features = torch.rand(1, 3, 4, 4).requires_grad_()
    size = (30, 41)
    assert relevance(features[:, :, 0, 0].sum(), features, size)[0, 0, 0] == 1
    mixed = relevance(features[:, :, 0, 0].sum() - features[:, :, 3, 3].sum(), features, size)[0]
    assert (mixed[0, 0], mixed[-1, -1], mixed.min()) == (1, 0, 0)
    nothing = relevance(-features.sum(), features, size)
    assert nothing.shape == (1, *size) and not nothing.any()
    assert relevance(features[:, :, 0, 0].sum(), features, size, (20, 21)).shape == (1, 20, 21)
    with pytest.raises(ValueError, match="not computed from"):
        relevance(torch.rand(2).requires_grad_().sum(), features, size)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_relevance_of_other_backbones(name):
    network = timm.create_model(name, num_classes=3).eval()
    found, logits = class_relevance(network, torch.randn(2, 3, 128, 160), [0, 2])
    assert found.shape == (2, 128, 160) and logits.shape == (2, 3)
    assert 0 <= found.min() <= found.max() <= 1


def test_what_has_no_relevance_says_so(model):
    images = torch.randn(1, 3, 160, 160)
    with pytest.raises(ValueError, match="training mode"):
        class_relevance(model.train(), images)
    with pytest.raises(ValueError, match="got stage 4, expected one of 0, 1, 2, 3"):
        class_relevance(model.eval(), images, stage=4)
    with pytest.raises(ValueError, match="cannot be shown"):
        class_relevance(timm.create_model("test_vit").eval(), images)
    with pytest.raises(ValueError, match="Sequential has no feature maps whose relevance could be shown"):
        class_relevance(nn.Sequential(nn.Flatten()).eval(), images)
