"""The network against golden values, against a literal reading of the paper, and within timm."""

import copy
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.layers import set_scriptable
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groupmixformer import GroupMixAttention, GroupMixFormer, fuse
from groupmixformer.models.mixers.group_mix import GroupMix

# Dims, depths and ratios that differ between neighbours, so that a mixed-up index shows.
STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 2, 2, 1), "mlp_ratios": (2, 1, 1.5, 3)}
SIZE = (45, 70)  # odd, not square, no multiple of 32
FEATURES = ((10, 12, 18), (20, 6, 9), (40, 3, 5), (30, 2, 3))

# Spec, table "Variants": parameters in M, MACs at 224 in G as fvcore counts them.
VARIANTS = {
    "groupmixformer_mobile": (5.73, 1.35),
    "groupmixformer_tiny": (10.95, 3.72),
    "groupmixformer_small": (22.42, 5.16),
    "groupmixformer_base": (45.83, 17.55),
    "groupmixformer_large": (71.83, 38.25),
    "groupmixformer_large_384": (71.83, None),
}


@pytest.fixture
def model(randomise):
    return randomise(GroupMixFormer(**STAGES, num_classes=6)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE)


def create(**kwargs):
    """Create through timm; the same seed gives the same weights, whatever wraps the network."""
    torch.manual_seed(0)
    return timm.create_model("groupmixformer_mobile", **STAGES, **kwargs).eval()


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


# Golden values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["test", "mobile", "small"])
def test_golden_values(golden, name, dtype, tolerance):
    values = golden(name)
    model = values.model().to(dtype)
    for i, case in enumerate(values.cases):
        with torch.no_grad():
            images = values.images(case).to(dtype)
            last, features = model.forward_intermediates(images)
            assert relative_error(model(images), values.arrays[f"logits_{i}"]) < tolerance
            assert relative_error(model.forward_head(last), values.arrays[f"logits_{i}"]) < tolerance
        assert [list(feature.shape) for feature in features] == case["feature_shapes"]
        for j, feature in enumerate(features):
            assert relative_error(feature.mean((0, 2, 3)), values.arrays[f"feat_{i}_{j}_mean"]) < tolerance
            assert relative_error(feature[0, :, 0, 0], values.arrays[f"feat_{i}_{j}_corner"]) < tolerance


def export(model):
    auto = torch.export.Dim.AUTO  # batch, height and width stay free; torch.export finds their ranges
    dynamic_shapes = ({0: auto, 2: auto, 3: auto},)
    return torch.export.export(model, (torch.randn(2, 3, 69, 45),), dynamic_shapes=dynamic_shapes).module()


# Any size, any legal configuration


@st.composite
def configurations(draw):
    stages = draw(st.integers(1, 4))

    def per_stage(values):
        return draw(st.lists(values, min_size=stages, max_size=stages))

    return {
        "embed_dims": per_stage(st.integers(1, 5).map(lambda i: 10 * i)),
        "depths": per_stage(st.integers(1, 2)),
        "mlp_ratios": per_stage(st.floats(0.5, 4)),
        "num_classes": draw(st.integers(1, 12)),
        "in_chans": draw(st.integers(1, 5)),
    }


@settings(max_examples=15, deadline=None)
@given(configurations(), st.integers(32, 100), st.integers(32, 100), st.integers(1, 3))
@example({**STAGES, "num_classes": 2}, 32, 32, 1)
@example({**STAGES, "num_classes": 2}, 33, 99, 2)
def test_any_configuration_and_size(randomise, configuration, height, width, batch):
    torch.manual_seed(0)
    model = randomise(GroupMixFormer(**configuration)).double().eval()
    images = torch.randn(batch, configuration.get("in_chans", 3), height, width, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        features = model.forward_intermediates(images, intermediates_only=True)
        assert logits.shape == (batch, configuration["num_classes"])
        strides = [4 * 2**i for i in range(len(configuration["depths"]))]
        assert [tuple(feature.shape) for feature in features] == [
            (batch, dim, -(-height // stride), -(-width // stride))
            for dim, stride in zip(configuration["embed_dims"], strides, strict=True)
        ]
        assert torch.equal(model(images), logits)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits)
    assert [info["reduction"] for info in model.feature_info] == strides


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (1, 3, 31, 64),
            torch.float32,
            "[1, 3, 31, 64], expected (batch, 3, height, width) with height and width of at least 32",
        ),
        ((1, 3, 64, 16), torch.float32, "[1, 3, 64, 16], expected (batch, 3,"),
        ((3, 64, 64), torch.float32, "[3, 64, 64], expected (batch, 3,"),
        ((1, 1, 3, 64, 64), torch.float32, "[1, 1, 3, 64, 64], expected (batch, 3,"),
        ((2, 1, 64, 64), torch.float32, "[2, 1, 64, 64], expected (batch, 3,"),
        ((1, 64, 64, 3), torch.float32, "[1, 64, 64, 3], expected (batch, 3,"),
        ((1, 3, 64, 64), torch.uint8, "torch.uint8, expected floating point"),
    ],
)
def test_wrong_input(model, shape, dtype, message):
    images = torch.zeros(shape, dtype=dtype)
    for call in (model, model.forward_features, model.forward_intermediates, torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(images)


@pytest.mark.parametrize("shape", [(2, 49, 20), (2, 7, 7, 20), (2, 10, 7, 7)])
def test_wrong_feature_map(shape):
    with pytest.raises(ValueError, match=re.escape(f"got an input of shape {list(shape)}, expected a feature map (batch, 20,")):
        GroupMixAttention(20)(torch.zeros(shape))


@pytest.mark.parametrize("dim", [0, -10, 5, 9])
def test_wrong_width(dim):
    with pytest.raises(ValueError, match=f"got dim={dim}, expected at least 10"):
        GroupMixAttention(dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 2, 1)}, "got 4 embed_dims, 3 depths and 4 mlp_ratios, expected one of each per stage"),
        ({"mlp_ratios": (4,)}, "got 4 embed_dims, 4 depths and 1 mlp_ratios"),
        ({"embed_dims": (), "depths": (), "mlp_ratios": ()}, "got 0 embed_dims, 0 depths and 0 mlp_ratios"),
        ({"embed_dims": (10, 20, 6, 20)}, "got dim=6, expected at least 10"),
    ],
)
def test_wrong_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        GroupMixFormer(**STAGES | change)


# Group-Mix Attention


def literal_attention(attention, x):
    """Group-Mix Attention of `x`, step by step as the specification numbers them: per head, per token, unfused."""
    w = attention.state_dict()
    B, D, H, W = x.shape
    width, N = {15: 1, 24: 2, 96: 10}.get(D, D // 10), H * W
    C, L = 2 * width, D - 8 * width

    def hardswish(x):
        return x * (x + 3).clamp(0, 6) / 6

    def conv(x, name):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def batch_norm(x, name, own):
        mean, var = w[f"{name}.running_mean"][own], w[f"{name}.running_var"][own]
        if attention.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        weight, bias = w[f"{name}.weight"][own], w[f"{name}.bias"][own]
        mean, var, weight, bias = (t[:, None, None] for t in (mean, var, weight, bias))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    # 1. One linear layer gives Q, K and V, each cut into five segments.
    tokens = x.flatten(2).transpose(1, 2) @ w["qkv.weight"].T + w["qkv.bias"]  # (B, N, 3D)
    maps = tokens.transpose(1, 2).reshape(B, 3 * D, H, W).split(D, dim=1)  # Q, K, V
    segments = [t.split([C, C, C, C, L], dim=1) for t in maps]
    # 2. Group proxies, with Q, K and V stacked along the batch.
    proxies = []
    for i in range(4):
        stacked = torch.cat([segments[0][i], segments[1][i], segments[2][i]])
        if i > 0:
            stacked = conv(conv(stacked, f"aggregators.depthwise.{i - 1}"), f"aggregators.pointwise.{i - 1}")
        proxies.append(hardswish(batch_norm(stacked, "aggregators.norm", slice(i * C, (i + 1) * C))).split(B))
    q, k, v = (torch.cat([proxy[i] for proxy in proxies], dim=1) for i in range(3))  # (B, 4C, H, W)
    # 3. The branch without attention.
    local = torch.cat([segments[0][4], segments[1][4], segments[2][4]], dim=1)
    local = conv(conv(local, "non_attention.depthwise"), "non_attention.pointwise").permute(0, 2, 3, 1)
    centred = local - local.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    local = hardswish(normed * w["non_attention.norm.weight"] + w["non_attention.norm.bias"]).reshape(B, N, L)
    # 4. to 6. Eight heads of width D/10: factorised attention and the relative position.
    heads = []
    for head in range(8):
        rows = slice(head * width, (head + 1) * width)
        qh, kh, vh = (t[:, rows].flatten(2) for t in (q, k, v))  # (B, D/10, N)
        weights = kh.exp() / kh.exp().sum(2, keepdim=True)
        context = sum(weights[:, :, None, n] * vh[:, None, :, n] for n in range(N))  # (B, D/10, D/10)
        attended = torch.stack([(D / 8) ** -0.5 * torch.einsum("bi,bij->bj", qh[:, :, n], context) for n in range(N)], dim=1)
        k_size, first = (3, 0) if head < 2 else (5, 2) if head < 5 else (7, 5)
        own = slice((head - first) * width, (head - first + 1) * width)
        weight, bias = w[f"position.conv{k_size}.weight"][own], w[f"position.conv{k_size}.bias"][own]
        around = F.conv2d(v[:, rows], weight, bias, padding=k_size // 2, groups=width)
        heads.append(attended + (q[:, rows] * around).flatten(2).transpose(1, 2))  # (B, N, D/10)
    # 7. Heads and the other branch along the channels, projected.
    mixed = torch.cat([*heads, local], dim=2) @ w["proj.weight"].T + w["proj.bias"]
    return mixed.transpose(1, 2).reshape(B, D, H, W)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("dim", "size"), [(10, (3, 5)), (40, (9, 8)), (50, (1, 4)), (20, (1, 1)), (15, (3, 4)), (24, (2, 5)), (96, (4, 3))]
)
def test_attention_is_what_the_specification_says(randomise, dim, size, training):
    attention = randomise(GroupMixAttention(dim)).double().train(training)
    x = torch.randn(3, dim, *size, dtype=torch.float64)
    expected = literal_attention(attention, x)
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_tokens_are_a_map(randomise):
    attention = randomise(GroupMixAttention(64)).double().eval()
    x = torch.randn(2, 35, 64, dtype=torch.float64)
    expected = attention(x.transpose(1, 2).reshape(2, 64, 5, 7)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention(x, (5, 7)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fuse(attention)(x, (5, 7)), expected, rtol=1e-9, atol=1e-9)
    for wrong in (x.transpose(1, 2), x[:, 1:], x.reshape(2, 5, 7, 64)):
        with pytest.raises(ValueError, match=r"expected the tokens of a map of 5 x 7, \(batch, 35, 64\)"):
            attention(wrong, (5, 7))
    with pytest.raises(ValueError, match=r"tokens \(batch, number, 64\) need their map's \(height, width\) as second argument"):
        attention(x)
    other = randomise(GroupMix(64, heads=4, kernel_sizes=(3, 5, 9), aggregator="avg")).double().eval()
    expected = other(x.transpose(1, 2).reshape(2, 64, 5, 7)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(other(x, (5, 7)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_attention_gradients(randomise, training):
    attention = randomise(GroupMixAttention(10)).double().train(training)
    parameters = dict(attention.named_parameters())
    x = torch.randn(2, 10, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return torch.func.functional_call(attention, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)


# Layout and precision


def test_channels_last(model, images):
    logits = model(images)
    assert torch.equal(model(images.contiguous(memory_format=torch.channels_last)), logits)
    for feature in model.forward_intermediates(images, intermediates_only=True):
        assert feature.is_contiguous(memory_format=torch.channels_last)


class Convolutions(TorchDispatchMode):
    """Notes the shapes of maps that a convolution reads in another layout than channels_last."""

    def __init__(self):
        super().__init__()
        self.count, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            _, _, H, W = args[0].shape
            self.count += 1
            step = args[0].stride(3)  # more than the channels where a segment is a slice of a map
            if args[0].stride() != (H * W * step, 1, W * step, step):  # oneDNN wants it even of dimensions of size 1
                self.others.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", [lambda model: model, fuse, lambda model: model.train()])
def test_no_convolution_leaves_channels_last(model, batch, form):
    with Convolutions() as convolutions:
        form(model)(torch.randn(batch, 3, *SIZE))
    assert convolutions.count > 40
    assert not convolutions.others


@pytest.mark.parametrize("strength", [1, 30])  # 30: keys far above what exp() of a half can hold, results still within a half
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("training", [False, True])
def test_attention_in_low_precision(randomise, dtype, tolerance, strength, training):
    attention = randomise(GroupMixAttention(20)).train(training)
    x = (strength * torch.randn(2, 20, 14, 14)).to(dtype)
    expected = attention.double()(x.double())
    got = attention.to(dtype)(x)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [1, 1000])
def test_network_in_low_precision(dtype, strength):
    model = create(num_classes=6).to(dtype)
    logits = model(strength * torch.randn(2, 3, *SIZE, dtype=dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("strength", [1, 1000])
def test_autocast(model, images, strength):
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(strength * images), torch.tensor([1, 4]))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# The variants


def test_registered_variants():
    assert set(timm.list_models("groupmixformer*")) == set(VARIANTS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("base" in name or "large" in name)) for name in VARIANTS]
)
def test_variant(name):
    side = 384 if name.endswith("384") else 224
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name).eval()
        last = model.forward_features(torch.randn(1, 3, side, side))
        assert model.forward_head(last).shape == (1, 1000)
    cfg = model.default_cfg
    parameters, macs = VARIANTS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    # The published counts are fvcore's, which adds norms and pooling to matrix products and convolutions, which PyTorch counts.
    if macs:
        assert counter.get_total_flops() / 2e9 == pytest.approx(macs, rel=0.015)
    assert tuple(last.shape[2:]) == cfg["pool_size"]
    assert cfg["input_size"] == (3, side, side)
    assert cfg["crop_pct"] == (1.0 if side == 384 else 224 / 256)
    assert cfg["interpolation"] == "bicubic"
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert cfg["min_input_size"] == (3, 32, 32)


@pytest.mark.parametrize("name", ["groupmixformer_base", pytest.param("groupmixformer_large", marks=pytest.mark.slow)])
def test_parameters_of_what_is_too_large_to_run_here(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == VARIANTS[name][0]
    assert model.default_cfg["input_size"] == (3, 224, 224)


def test_small_is_the_default():
    with torch.device("meta"):
        default, small = GroupMixFormer().state_dict(), timm.create_model("groupmixformer_small").state_dict()
    assert {name: tensor.shape for name, tensor in default.items()} == {name: tensor.shape for name, tensor in small.items()}


@pytest.mark.parametrize("name", ["mobile", "small"])
def test_exact_parameters(golden, name):
    with torch.device("meta"):
        model = timm.create_model(f"groupmixformer_{name}")
    assert sum(p.numel() for p in model.parameters()) == golden(name).params


# Training


def test_initial_weights():
    model = GroupMixFormer()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, torch.nn.Conv2d):  # PyTorch's default: uniform within 1 / sqrt(fan in)
            bound = (module.in_channels // module.groups * module.kernel_size[0] ** 2) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif "Norm" in type(module).__name__:
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_every_parameter_gets_a_gradient(model, images):
    # In eval mode, as in train mode BN cancels the bias of the convolution before it.
    F.cross_entropy(model.double()(images.double()), torch.tensor([1, 4])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


def test_drop_path_rises_linearly_over_all_blocks():
    model = GroupMixFormer(**STAGES, drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for name in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, name), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0, 0.06, 0.12, 0.18, 0.24, 0.3])


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_gradient_checkpointing(randomise, images, drop_path_rate):
    models = []
    for enable in (False, True):
        model = randomise(GroupMixFormer(**STAGES, num_classes=6, drop_path_rate=drop_path_rate)).train()
        model.set_grad_checkpointing(enable)
        runs = []
        model.stages[2].blocks[1].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        F.cross_entropy(model(images), torch.tensor([1, 4])).backward()
        models.append(model)
        assert len(runs) == 1 + enable
    plain, recomputed = models
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_gradient_checkpointing_keeps_the_running_statistics(randomise, images):
    models = [randomise(GroupMixFormer(**STAGES, num_classes=6)).train() for _ in range(2)]
    models[1].set_grad_checkpointing()
    for model in models:
        model(images).square().sum().backward()
    for (name, plain), recomputed in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(plain, recomputed), name


def test_large_maps_under_torch_func(randomise):
    model = randomise(GroupMixFormer(embed_dims=(20,), depths=(1,), mlp_ratios=(4,), num_classes=6)).eval().double()
    images, parameters = torch.randn(4, 3, 192, 192).double(), dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images,)).square().sum())(parameters)
    expected = torch.autograd.grad(model(images).square().sum(), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected))


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_optimizer_groups(layer_decay):
    model = create(num_classes=6)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert groups[id(parameter)]["weight_decay"] == (0.05 if parameter.dim() > 1 else 0)
    if layer_decay:
        layers = [[block] for stage in model.stages for block in stage.blocks]
        first_blocks = (0, 1, 3, 5)
        for stage, first in zip(model.stages, first_blocks, strict=True):
            layers[first].append(stage.patch_embed)
        layers = [[model.stem], *layers[:-1], [*layers[-1], model.norm], [model.head]]
        scales = [{groups[id(p)]["lr_scale"] for part in layer for p in part.parameters()} for layer in layers]
        assert all(len(scale) == 1 for scale in scales), "a layer has one rate"
        rising = [scale.pop() for scale in scales]
        assert rising == sorted(rising)
        assert len(set(rising)) == len(rising)
        assert rising[-1] == 1


# timm's surface


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,), (-2, -1)])
def test_features_only(images, feature_cls, out_indices):
    indices = [i % 4 for i in out_indices]
    features = create(features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    maps = features(images)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert_same(maps, create().forward_intermediates(images, indices=indices, intermediates_only=True))
    assert features.feature_info.channels() == [STAGES["embed_dims"][i] for i in indices]
    assert features.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in indices]


def test_features_of_every_stage_by_default():
    with torch.device("meta"):
        backbone = timm.create_model("groupmixformer_mobile", features_only=True, pretrained=False)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert backbone.feature_info.channels() == [40, 80, 160, 160]
    assert backbone.feature_info.out_indices == (0, 1, 2, 3)


def test_forward_intermediates(model, images):
    last, features = model.forward_intermediates(images)
    assert [tuple(feature.shape[1:]) for feature in features] == list(FEATURES)
    torch.testing.assert_close(last, model.forward_features(images))
    torch.testing.assert_close(last, model.norm(features[-1]))
    assert_same(model.forward_intermediates(images, indices=2, intermediates_only=True), features[-2:])
    assert_same(model.forward_intermediates(images, indices=[0, 3], norm=True, intermediates_only=True), [features[0], last])
    early, maps = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert_same([early, *maps], [features[1], *features[:2]])
    with pytest.raises(AssertionError, match="NLC"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("index", [0, 1, 3])
def test_prune_intermediate_layers(model, images, index):
    last, features = model.forward_intermediates(images, indices=[index])
    assert model.prune_intermediate_layers([index]) == [index]
    assert len(model.stages) == index + 1
    # Only the whole network ends in the final norm.
    torch.testing.assert_close(model(images), last if index == 3 else features[0])
    assert_same(model.forward_intermediates(images, indices=[index], intermediates_only=True), features)
    assert model.num_features == STAGES["embed_dims"][index]


def test_forward_head(model, images):
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled, model.forward_features(images).mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(images))
    assert pooled.shape[1] == model.head_hidden_size == model.num_features == 30


@pytest.mark.parametrize(
    ("num_classes", "global_pool", "shape"),
    [
        (5, None, (2, 5)),
        (5, "max", (2, 5)),
        (5, "avgmax", (2, 5)),
        (5, "catavgmax", (2, 5)),
        (0, None, (2, 30)),
        (0, "catavgmax", (2, 60)),
        (0, "", (2, *FEATURES[-1])),
    ],
)
def test_classifier_and_pooling(images, num_classes, global_pool, shape):
    created = create(num_classes=num_classes, **({} if global_pool is None else {"global_pool": global_pool}))
    reset = create(num_classes=6)
    reset.reset_classifier(num_classes, global_pool)
    for model in (created, reset):
        assert model(images).shape == shape
        assert model.num_classes == num_classes
        assert model.head_hidden_size == (60 if global_pool == "catavgmax" else 30)
        assert isinstance(model.get_classifier(), torch.nn.Linear if num_classes else torch.nn.Identity)
        features = model.forward_features(images)
        pooled = {
            "max": features.amax((2, 3)),
            "avgmax": (features.mean((2, 3)) + features.amax((2, 3))) / 2,
            "catavgmax": torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1),
            "": features,
        }.get(global_pool, features.mean((2, 3)))
        torch.testing.assert_close(model(images), model.get_classifier()(pooled))


def test_grey_images():
    model = create(in_chans=1)
    assert model(torch.randn(1, 1, *SIZE)).shape == (1, 1000)


def test_symbolic_trace(model, images):
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images), model(images))
    torch.testing.assert_close(traced(images[:1, :, :33, :64]), model(images[:1, :, :33, :64]))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(randomise, images):
    with set_scriptable(True):
        model = randomise(create(num_classes=6))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images))
    with pytest.raises(torch.jit.Error, match="at least 32"):
        scripted(images[..., :31])


def test_meta_device():
    model = GroupMixFormer(**STAGES, num_classes=6, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.randn(2, 3, *SIZE, device="meta")).shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_created_in_a_type(dtype):
    model = GroupMixFormer(**STAGES, num_classes=6, dtype=dtype)
    model.reset_classifier(4)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.slow
def test_import_is_light():
    heavy = {"lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "tensorboard", "transformers"}
    command = f"import sys, groupmixformer; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_gradients_of_each_sample_by_torch_func(randomise):
    model = randomise(GroupMixFormer(embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(2, 2), num_classes=3)).double().eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    images = torch.randn(3, 3, 33, 40).double()

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.func.grad(loss)(parameters, image)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[i], expected[name])


def adapt(linear):
    """A low-rank adapter in a linear layer's place, as peft puts it there."""

    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down = linear, nn.Linear(linear.in_features, 2, bias=False)
            self.up = nn.Linear(2, linear.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    return LoRA().to(linear.weight)


@pytest.mark.parametrize("training", [False, True])
def test_adapters_and_hooks_take_part(randomise, training):
    model = randomise(GroupMixFormer(embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(2, 2), num_classes=3)).double()
    images = torch.randn(2, 3, 64, 64).double()
    plain, called = copy.deepcopy(model.train(training))(images), set()
    for name, module in list(model.named_modules()):
        if name.endswith(("qkv", "proj", "fc1", "fc2")):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, adapt(module))
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
    adapted = model.train(training)(images)
    assert (adapted - plain).norm() > 1e-3 * plain.norm()
    containers = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert called == {name for name, _ in model.named_modules()} - containers
    adapted.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for n, parameter in model.named_parameters() if "up." in n)


def test_no_images():
    model = GroupMixFormer(embed_dims=(10, 20), depths=(1, 1), mlp_ratios=(1, 1), num_classes=3).eval()
    assert model(torch.zeros(0, 3, 32, 40)).shape == fuse(model)(torch.zeros(0, 3, 32, 40)).shape == (0, 3)
