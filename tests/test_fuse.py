"""The fused form: the plain model's function in every form that it is used in, from a model that stays as it was."""

import collections
import copy
import io
import pickle

import pytest
import timm
import torch
from test_groupmixformer import SIZE, STAGES, export, relative_error
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from groupmixformer import GroupMixAttention, GroupMixFormer, fuse
from groupmixformer.models.fuse import _fold_norms
from groupmixformer.models.groupmixformer import VARIANTS, Block, SeparableConv, Stem
from groupmixformer.ops import onednn
from groupmixformer.tasks.backbone import Backbone
from groupmixformer.tasks.detection.model import Detector
from groupmixformer.tasks.segmentation.model import Segmenter

FOLDED = {"Stem": 1, "SeparableConv": 4, "Block": 6}  # of STAGES
SHALLOW = {"embed_dims": [20], "depths": [1], "mlp_ratios": [2], "num_classes": 6}  # quick to compile

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="needs oneDNN and AVX2")
needs_bfloat16 = pytest.mark.skipif(not onednn.BFLOAT16_AVAILABLE, reason="this processor has no bfloat16 for oneDNN")
either_product = pytest.mark.parametrize(
    "large", [pytest.param(0, marks=needs_onednn, id="oneDNN"), pytest.param(onednn._LARGE, id="by size")]
)


@pytest.fixture
def model(randomise):
    return randomise(GroupMixFormer(**STAGES, num_classes=6)).eval()


@pytest.fixture
def shallow(randomise):
    return randomise(GroupMixFormer(**SHALLOW)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE)


@pytest.fixture
def all_large(monkeypatch):
    """Let every product count as large."""
    monkeypatch.setattr(onednn, "_LARGE", 0)


def assert_equal(got, expected, tolerance=1e-5):
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < tolerance


class Operators(TorchDispatchMode):
    """Counts what is called, by namespace and name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **kwargs or {})


# Golden values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["test", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobile", "small"))])
def test_golden_values(golden, name, dtype, tolerance):
    values = golden(name)
    fused = fuse(values.model().to(dtype))
    for i, case in enumerate(values.cases):
        with torch.no_grad():
            last, features = fused.forward_intermediates(values.images(case).to(dtype))
            assert relative_error(fused.forward_head(last), values.arrays[f"logits_{i}"]) < tolerance
        assert [list(feature.shape) for feature in features] == case["feature_shapes"]
        for j, feature in enumerate(features):
            assert relative_error(feature.mean((0, 2, 3)), values.arrays[f"feat_{i}_{j}_mean"]) < tolerance
            assert relative_error(feature[0, :, 0, 0], values.arrays[f"feat_{i}_{j}_corner"]) < tolerance


@pytest.mark.slow
@either_product
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(export, id="export"),
        pytest.param(
            lambda fused: torch.compile(fused, fullgraph=True, backend="aot_eager"),
            id="no graph break",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(lambda fused: torch.compile(fused, fullgraph=True), id="compile", marks=pytest.mark.exhaustive),
    ],
)
def test_golden_values_compiled(golden, monkeypatch, compiled, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    values = golden("test")
    fused = compiled(fuse(values.model()))
    for i, case in enumerate(values.cases):
        with torch.no_grad():
            assert relative_error(fused(values.images(case)), values.arrays[f"logits_{i}"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "large"),
    [
        pytest.param(0, onednn._LARGE, id="first size-by size", marks=pytest.mark.exhaustive),
        pytest.param(0, 0, id="first size-oneDNN", marks=[needs_onednn, pytest.mark.exhaustive]),
        pytest.param(1, onednn._LARGE, id="second size-by size", marks=pytest.mark.exhaustive),
        pytest.param(1, 0, id="second size-oneDNN", marks=[needs_onednn, pytest.mark.exhaustive]),
    ],
)
def test_golden_values_frozen_by_inductor(golden, monkeypatch, case, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    values = golden("test")
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        fused = torch.compile(fuse(values.model()), fullgraph=True, dynamic=False)  # each size its own: docs/speed.md
        assert relative_error(fused(values.images(values.cases[case])), values.arrays[f"logits_{case}"]) < 1e-4


# Every variant, any size, any configuration


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            pytest.param(name, (47, 33), marks=[pytest.mark.exhaustive] * ("base" in name or "large" in name))
            for name in VARIANTS
        ),
        ("groupmixformer_mobile", (65, 97)),
    ],
)
def test_each_variant_is_the_same_function(randomise, name, size):
    model = randomise(timm.create_model(name, num_classes=5)).eval()
    images = torch.randn(1, 3, *size)
    single, double = fuse(model), fuse(model.double())
    with torch.no_grad():
        expected = model(images.double())
        assert relative_error(double(images.double()), expected) < 1e-12
        assert relative_error(single(images), expected) < 1e-5


@pytest.mark.parametrize("size", [(32, 32), (33, 99)])
@pytest.mark.parametrize("change", [{}, {"in_chans": 1}, {"embed_dims": [50], "depths": [3], "mlp_ratios": [0.5]}], ids=str)
def test_any_configuration_and_size(randomise, change, size):
    model = randomise(GroupMixFormer(**{**STAGES, "drop_path_rate": 0.2, **change})).double().eval()
    images = torch.randn(2, change.get("in_chans", 3), *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fuse(model)(images), model(images)) < 1e-12
        assert fuse(model)(images[:0]).shape == (0, 1000)


def test_wrong_input(model):
    for images in (torch.zeros(1, 3, 31, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="got an input of") as plain:
            model(images)
        with pytest.raises(ValueError, match="got an input of") as fused:
            fuse(model)(images)
        assert str(fused.value) == str(plain.value)


# Large products


def as_sliced(images):
    return torch.cat([images, images], dim=3)[:, :, ::1, : images.shape[3]]


LAYOUTS = {
    "contiguous": lambda images: images,
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "transposed": lambda images: images.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": as_sliced,
    "every other pixel": lambda images: images.repeat_interleave(2, dim=3)[..., ::2],
    "requires grad": lambda images: images.clone().requires_grad_(),
}


@either_product
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(shallow, monkeypatch, layout, batch, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    images = torch.randn(batch, 3, *SIZE)
    fused, expected = fuse(shallow), shallow.double().forward_intermediates(images.double())
    last, features = fused.forward_intermediates(LAYOUTS[layout](images))
    assert_equal([last, *features], [expected[0], *expected[1]])
    for feature in features:
        assert feature.is_contiguous(memory_format=torch.channels_last)


@either_product
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dim", "size"), [(10, (1, 1)), (20, (7, 5)), (50, (1, 6))])
def test_an_attention_alone(randomise, monkeypatch, dim, size, layout, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    attention = randomise(GroupMixAttention(dim)).eval()
    x = torch.randn(3, dim, *size)
    fused = fuse(attention)
    assert fused.folded == {"GroupMixAttention": 1}
    assert_equal([fused(LAYOUTS[layout](x))], [attention.double()(x.double())])
    assert relative_error(fuse(attention)(x.double()), attention(x.double())) < 1e-13
    for wrong in (x[0], x[:, :-1]):
        with pytest.raises(ValueError, match="expected a feature map"):
            fused(wrong)


@needs_onednn
@pytest.mark.parametrize(
    ("side", "change", "products"),
    [
        pytest.param(16, lambda x: x, 6, id="five segments and the projection"),
        pytest.param(32, lambda x: x, 9, id="and three groups"),
        pytest.param(32, lambda x: x.bfloat16(), 9 * onednn.BFLOAT16_AVAILABLE, id="bfloat16"),
        pytest.param(32, lambda x: x.half(), 0, id="float16"),
        pytest.param(4, lambda x: x, 0, id="small"),
        pytest.param(32, lambda x: x.double(), 0, id="float64"),
        pytest.param(32, lambda x: x.requires_grad_(), 0, id="gradient"),
    ],
)
def test_large_products_are_those_of_onednn(randomise, side, change, products):
    x = change(torch.randn(1, 160, side, side))
    fused = fuse(randomise(GroupMixAttention(160)).eval().to(x.dtype))
    with Operators() as seen:
        fused(x)
    assert all(layer.weight.t().is_contiguous() for layer in (fused.attn.proj, *fused.attn.qkv, *fused.attn.pointwise))
    assert seen.calls["mkldnn::_linear_pointwise"] == products


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_every_activation_is_folded_into_large_products(model, images, all_large, dtype):
    with Operators() as seen, torch.no_grad():
        fuse(model).to(dtype)(images.to(dtype))
    assert seen.calls["mkldnn::_linear_pointwise"] == 4 + 6 * (5 + 3 + 1 + 2)  # embeddings; segments, groups, projection, MLP
    assert not seen.calls["aten::gelu"]


def as_it_is(fused):
    return fused


def compiled(fused, dynamic=False):
    return torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.parametrize(
    ("form", "large"),
    [
        pytest.param(as_it_is, 0, id="as_it_is-oneDNN", marks=needs_onednn),
        pytest.param(as_it_is, onednn._LARGE, id="as_it_is-by size"),
        pytest.param(compiled, 0, id="compiled-oneDNN", marks=[needs_onednn, pytest.mark.slow]),
        pytest.param(compiled, onednn._LARGE, id="compiled-by size", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_gradients_of_the_images(model, images, monkeypatch, form, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    gradients = []
    for network in (form(fuse(model)), model):
        wanted = images.clone().requires_grad_()
        network(wanted).square().sum().backward()
        gradients.append(wanted.grad)
    assert relative_error(gradients[0], gradients[1].double()) < 1e-4


@either_product
def test_derivatives_in_a_direction(shallow, images, monkeypatch, large):
    """Forward-mode differentiation, where no tensor says that it requires a gradient."""
    monkeypatch.setattr(onednn, "_LARGE", large)
    direction = torch.randn_like(images)
    _, expected = torch.func.jvp(shallow, (images,), (direction,))
    _, got = torch.func.jvp(fuse(shallow), (images,), (direction,))
    assert relative_error(got, expected.double()) < 1e-4


# Graphs


OTHER_SHAPES = ((1, 3, 40, 99), (3, 3, 64, 33))


@pytest.mark.slow
@needs_onednn
def test_an_exported_graph_holds_operators_of_pytorch_alone(shallow, images, all_large):
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fuse(shallow), (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    others = {t.__module__ for t in targets if not isinstance(t, torch._ops.OpOverload)}
    assert others <= {"_operator", "math", "torch"}  # arithmetic of sizes
    for shape in OTHER_SHAPES:
        views = torch.randn(shape)
        assert_equal([program.module()(views)], [shallow(views)])


@pytest.mark.slow
@needs_onednn
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_traced_graph_holds_operators_of_pytorch_alone(model, images, all_large):
    traced = torch.jit.trace(fuse(model), images)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} == {"aten", "prim"}
    assert_equal([traced(images)], [model(images)])


@either_product
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_compiled_graph(shallow, images, monkeypatch, dynamic, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    form = compiled(fuse(shallow), dynamic)
    with torch.no_grad():
        for views in (images, *map(torch.randn, OTHER_SHAPES if dynamic else ())):
            assert_equal([form(views)], [shallow(views)])


# Low precision


@either_product
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_the_plain_models(golden, monkeypatch, dtype, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    values = golden("test")
    double, low, fused = values.model().double(), values.model().to(dtype), fuse(values.model()).to(dtype)
    errors = collections.defaultdict(list)
    for seed in range(3):
        images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = double.forward_features(images.double())
            for name, network in (("plain", low), ("fused", fused)):
                got = network.forward_features(images.to(dtype))
                assert got.dtype == dtype
                errors[name].append(relative_error(got, expected))
    assert sum(errors["fused"]) < 2 * sum(errors["plain"]), dict(errors)


@either_product
def test_autocast_is_no_worse_than_the_plain_models(model, images, monkeypatch, large):
    monkeypatch.setattr(onednn, "_LARGE", large)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
        with torch.autocast("cpu", torch.bfloat16), Operators() as seen:
            got, plain = fuse(model)(images), model(images)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, expected) < 2 * relative_error(plain, expected)
    assert not seen.calls["mkldnn::_linear_pointwise"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_activations_stay_finite(dtype):
    torch.manual_seed(0)
    fused = fuse(timm.create_model("groupmixformer_mobile", **STAGES, num_classes=6).eval()).to(dtype)
    for strength in (1, 1000):
        assert fused(strength * torch.randn(2, 3, *SIZE, dtype=dtype)).isfinite().all()


# What is given and what comes back


def detector(architecture="mask_rcnn"):
    backbone = Backbone("groupmixformer_mobile", dict(STAGES))
    limits = {"max_size": 96, "rois_per_image": 16, "max_detections": 20}
    made = Detector(backbone, 2, architecture, image_size=64, fpn_channels=32, **limits)
    if hasattr(made.network, "score_thresh"):
        made.network.score_thresh = 0.0  # a new RetinaNet's scores are near 0.01
    return made.eval()


def segmenter(decoder="fpn"):
    channels = 64 if decoder in ("fpn", "upernet") else None
    return Segmenter(Backbone("groupmixformer_mobile", dict(STAGES)), 3, decoder, image_size=64, channels=channels).eval()


def features(**options):
    return timm.create_model("groupmixformer_mobile", **STAGES, features_only=True, **options).eval()


MODELS = {
    "network": lambda: GroupMixFormer(**STAGES, num_classes=6),
    "attention": lambda: GroupMixAttention(20),
    "features": features,
    "detector": detector,
    "segmenter": segmenter,
}


def observe(model):
    modules = dict(model.named_modules(remove_duplicate=False))
    return (
        {name: (type(module), module.training, id(module), list(module._forward_hooks)) for name, module in modules.items()},
        {name: (id(p), p.requires_grad, p.data_ptr(), p.dtype) for name, p in model.named_parameters(remove_duplicate=False)},
        {name: (id(b), b.data_ptr()) for name, b in model.named_buffers(remove_duplicate=False)},
    )


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_stays_as_it_is(randomise, kind):
    model = randomise(MODELS[kind]()).eval()
    if kind != "attention":  # which is folded itself, and then has none
        model.register_forward_hook(lambda *_: None)
    next(model.parameters()).requires_grad_(False)
    before, weights = observe(model), copy.deepcopy(model.state_dict())
    fused = fuse(model)
    assert observe(model) == before
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    # Nothing of one is in the other.
    tensors = [{t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, fused)]
    assert not tensors[0] & tensors[1]
    assert not set(model.modules()) & set(fused.modules())


@pytest.mark.parametrize("kind", ["network", "attention"])
def test_the_model_can_change_afterwards(randomise, kind):
    model = randomise(MODELS[kind]()).eval()
    x = torch.randn(2, 20, 7, 5) if kind == "attention" else torch.randn(2, 3, *SIZE)
    fused, plain = fuse(model), model(x).detach()
    expected = fused(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fused(x), expected)
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_need_no_gradients_and_training_is_refused(randomise, kind):
    fused = fuse(randomise(MODELS[kind]()).eval())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(module.training for module in fused.modules())
    assert fused.eval() is fused.train(False) is fused
    for call in (fused.train, lambda: fused.train(True)):
        with pytest.raises(ValueError, match=r"^a fused model is for inference: train the model .* fuse it again$"):
            call()


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (lambda: GroupMixFormer(**STAGES), FOLDED),
        (lambda: timm.create_model("groupmixformer_mobile"), {"Stem": 1, "SeparableConv": 4, "Block": 22}),
        (lambda: GroupMixAttention(10), {"GroupMixAttention": 1}),
        (lambda: Block(10, 2), {"Block": 1}),
        (lambda: SeparableConv(10, 20, 3, 2), {"SeparableConv": 1}),
        (lambda: Stem(3, 10), {"Stem": 1}),
        (lambda: features(out_indices=(0, 1), feature_cls="list"), {"Stem": 1, "SeparableConv": 2, "Block": 3}),
        (detector, FOLDED),
        (segmenter, FOLDED),
        (lambda: nn.ModuleList([GroupMixFormer(**STAGES), GroupMixAttention(10)]), {**FOLDED, "GroupMixAttention": 1}),
        (lambda: nn.ModuleDict({"a": Block(10, 2), "b": nn.Sequential(Block(10, 1))}), {"Block": 2}),
    ],
)
def test_it_says_what_it_folded(make, folded):
    assert fuse(make().eval()).folded == folded


@torch.no_grad()
def test_a_convolution_of_a_mixer_without_a_norm_stays():
    part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    part[3].running_mean.fill_(0.3)
    x = torch.randn(2, 4, 5, 5)
    expected, first = part(x), part[0]
    assert _fold_norms(nn.ModuleList([part]))
    assert part[0] is first and isinstance(part[3], nn.Identity)
    assert_equal([part(x)], [expected])
    assert not _fold_norms(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU()))


def test_tokens_of_an_attention(randomise):
    attention, tokens = randomise(GroupMixAttention(20)).eval(), torch.randn(2, 35, 20)
    with torch.no_grad():
        got, expected = fuse(attention)(tokens, (7, 5)), attention(tokens, (7, 5))
    assert got.shape == expected.shape == tokens.shape
    assert_equal([got], [expected])


def test_layers_tell_their_sizes(model):
    for layer in fuse(model).modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape == (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def saved_and_loaded(fused, load):
    stored = io.BytesIO()
    torch.save(fused, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES = {
    "deepcopy": lambda fused, other: copy.deepcopy(fused),
    "pickle": lambda fused, other: pickle.loads(pickle.dumps(fused)),
    "torch.save": saved_and_loaded,
    "state_dict": lambda fused, other: other.load_state_dict(fused.state_dict()) and other,
}


@pytest.mark.parametrize("how", COPIES)
def test_it_can_be_copied_and_stored(model, images, how):
    fused, other = fuse(model), fuse(GroupMixFormer(**STAGES, num_classes=6).eval())
    copied = COPIES[how](fused, other)
    copied = other if how == "state_dict" else copied
    assert torch.equal(copied(images), fused(images))
    assert copied.folded == FOLDED


def test_it_can_be_converted(model, images):
    fused = fuse(model)
    expected = fused(images)
    assert relative_error(copy.deepcopy(fused).double()(images.double()), expected.double()) < 1e-5
    assert torch.equal(copy.deepcopy(fused).double().float()(images), expected)
    assert_equal([copy.deepcopy(fused).to(memory_format=torch.channels_last)(images)], [expected])
    assert copy.deepcopy(fused).to("meta")(images.to("meta")).shape == expected.shape


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupMixFormer(**STAGES), r"training mode, .*: call model\.eval\(\) first$"),
        (lambda: GroupMixAttention(10), r"training mode, .*: call model\.eval\(\) first$"),
        (lambda: torch.compile(GroupMixAttention(10).eval()), "fuse the model that was compiled, and compile the result$"),
        (lambda: nn.Linear(3, 4).eval(), "^Linear holds no GroupMixFormer or GroupMixAttention"),
        (lambda: timm.create_model("test_resnet").eval(), "^ResNet holds no GroupMixFormer"),
        (lambda: fuse(GroupMixAttention(10).eval()), "fused already$"),
        (lambda: fuse(GroupMixFormer(**STAGES).eval()), "fused already$"),
        (lambda: features(feature_cls="fx"), "^FeatureGraphNet holds no GroupMixFormer"),
        (lambda: torch.fx.symbolic_trace(GroupMixFormer(**STAGES)).eval(), "holds no GroupMixFormer"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        fuse(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["stem.norm1", "stages.1.blocks.0.attn.aggregators.norm", "head.drop", "norm"])
def test_a_part_in_training_mode_is_refused(model, name):
    model.get_submodule(name).train()
    with pytest.raises(ValueError, match="is in training mode"):
        fuse(model)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_any_kind_is_refused_and_named(kind):
    block, attention = Block(10, 2).eval(), GroupMixAttention(10).eval()
    for module, name, model in ((block.attn.proj, "attn.proj", block), (attention, "GroupMixAttention", attention)):
        getattr(module, f"register_{kind}_hook")(lambda *_: None)
        with pytest.raises(ValueError, match=f"^got a hook on {name}, which folding would lose"):
            fuse(model)


# timm's surface


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
@pytest.mark.parametrize("out_indices", [(0, 2), (-2, -1)])
def test_features_only(randomise, images, feature_cls, out_indices):
    plain = randomise(features(feature_cls=feature_cls, out_indices=out_indices))
    maps = [network(images) for network in (fuse(plain), plain)]
    assert_equal(*(list(m.values()) if isinstance(m, dict) else m for m in maps))
    assert fuse(plain).feature_info.channels() == plain.feature_info.channels()


def test_forward_intermediates(model, images):
    fused = fuse(model)
    for options in ({"indices": 2}, {"indices": [0, 3], "norm": True}, {"indices": [0, 1], "stop_early": True}):
        got, expected = fused.forward_intermediates(images, **options), model.forward_intermediates(images, **options)
        assert_equal([got[0], *got[1]], [expected[0], *expected[1]])


def test_forward_head(model, images):
    fused = fuse(model)
    last = fused.forward_features(images)
    assert_equal([last], [model.forward_features(images)])
    assert_equal([fused.forward_head(last)], [model(images)])
    assert_equal([fused.forward_head(last, pre_logits=True)], [model.forward_head(last, pre_logits=True)])
    assert fused.get_classifier().out_features == fused.num_classes == 6


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("prune_first", [False, True])
def test_prune_intermediate_layers(model, images, index, prune_first):
    fused = copy.deepcopy(model) if prune_first else fuse(model)
    for network in (fused, model):
        assert network.prune_intermediate_layers([index]) == [index]
    fused = fuse(fused.eval()) if prune_first else fused  # pruning makes new modules, in training mode
    assert len(fused.stages) == index + 1
    assert_equal([fused(images)], [model(images)])


@pytest.mark.parametrize(
    ("num_classes", "global_pool"),
    [(4, "avg"), (4, "max"), (4, "avgmax"), (4, "catavgmax"), (0, "avg"), (0, "catavgmax"), (0, "")],
)
def test_classifier_and_pooling(randomise, images, num_classes, global_pool):
    head = {"num_classes": num_classes, "global_pool": global_pool}
    plain = randomise(timm.create_model("groupmixformer_mobile", **STAGES, **head)).eval()
    expected = plain(images)
    assert_equal([fuse(plain)(images)], [expected])
    # The classifier of a fused model can be replaced.
    reset = randomise(GroupMixFormer(**STAGES, num_classes=9)).eval()
    reset.load_state_dict({name: t for name, t in plain.state_dict().items() if "head" not in name}, strict=False)
    reset = fuse(reset)
    reset.reset_classifier(num_classes, global_pool)
    assert not reset.head.training
    reset.head.load_state_dict(plain.head.state_dict())
    assert_equal([reset(images)], [expected])


# Inside other networks


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["mask_rcnn", *(pytest.param(a, marks=pytest.mark.slow) for a in ("retinanet", "faster_rcnn"))]
)
def test_a_detector_finds_the_same(randomise, architecture):
    model = detector(architecture)
    randomise(model.features)
    fused = fuse(model.double())
    images = [torch.rand(3, 67, 51, dtype=torch.float64), torch.rand(3, 40, 90, dtype=torch.float64)]
    with torch.no_grad():
        found, expected = fused(images), model(images)
        batch = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        assert_equal(list(fused.network.backbone(batch).values()), list(model.network.backbone(batch).values()), 1e-12)
    assert sum(len(one["boxes"]) for one in expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.pop("labels"), other.pop("labels"))
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decoder", ["fpn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("upernet", "unet"))])
def test_a_segmenter_says_the_same(randomise, decoder):
    model = segmenter(decoder)
    randomise(model.features)
    images = torch.randn(2, 3, 67, 51)
    with torch.no_grad():
        assert_equal([fuse(model)(images)], [model(images)])


class Twice(nn.Module):
    """One module under two names, and a network beside it."""

    def __init__(self, shared, other):
        super().__init__()
        self.first, self.second, self.nested, self.none, self.other = shared, shared, nn.Sequential(shared), None, other

    def forward(self, x):
        return self.other(self.nested(self.second(self.first(x))))


@pytest.mark.parametrize("kind", [GroupMixAttention, lambda dim: Block(dim, 2), lambda dim: SeparableConv(dim, dim, 3)])
def test_a_module_that_is_used_twice_is_folded_once(randomise, kind):
    model = randomise(Twice(kind(20), kind(20))).double().eval()
    x = torch.randn(2, 20, 7, 5, dtype=torch.float64)
    fused = fuse(model)
    assert relative_error(fused(x), model(x)) < 1e-12
    assert list(fused.folded.values()) == [2]
    assert fused.first is fused.second is fused.nested[0]


def test_a_network_that_is_used_twice_is_folded_once(model, images):
    fused = fuse(nn.ModuleDict({"a": model, "b": nn.Sequential(model), "c": nn.ModuleList([model, model])}).eval())
    assert fused.folded == FOLDED
    for network in (fused["a"], fused["b"], *fused["c"]):
        assert_equal([network(images)], [model(images)])


def test_a_detector_with_frozen_statistics(randomise):
    model = detector()
    randomise(model.features)
    model.freeze_statistics()
    with pytest.raises(ValueError, match="is in training mode"):
        fuse(model.train())
    batch = torch.randn(2, 3, 64, 96)
    pyramids = [network.network.backbone(batch) for network in (fuse(model.eval()), model)]
    assert_equal(*(list(pyramid.values()) for pyramid in pyramids))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(nn.SyncBatchNorm.convert_sync_batchnorm, id="SyncBatchNorm"),
        pytest.param(lambda model: model.set_grad_checkpointing() or model, id="gradient checkpointing"),
        pytest.param(lambda model: model.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda model: model.requires_grad_(False), id="no gradients"),
        pytest.param(lambda model: model.compile(backend="eager") or model, id="compiled in place"),
    ],
)
def test_models_in_other_states(model, images, change):
    expected = copy.deepcopy(model)(images)
    changed = change(model)
    assert not any(module.training for module in changed.modules())
    assert_equal([fuse(changed)(images)], [expected])
    assert relative_error(fuse(changed)(images.clone().requires_grad_()), expected.double()) < 1e-5


# What is not as the network makes it


def tied(block):
    """Two modules with the same parameters."""
    other = copy.deepcopy(block)
    for name, parameter in block.named_parameters():
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, parameter)
    return nn.Sequential(block, other)


class Bound(nn.Module):
    """Calls a method that was looked up before, as in `self.encode = network.forward_features`."""

    def __init__(self, block):
        super().__init__()
        self.block, self.encode = block, block.forward

    def forward(self, x):
        return self.encode(x)


def hooked(block):
    block.attn.register_forward_hook(lambda module, inputs, output: 2 * output)
    return block


class Doubled(Block):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(block):
    made = Doubled(20, 2)
    made.load_state_dict(block.state_dict())
    return made


class Adapted(nn.Linear):
    """A linear layer with an addition, as adapters have it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.extra = nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return super().forward(x) + self.extra(x)


def adapted(block):
    block.mlp.fc2 = Adapted(block.mlp.fc2)
    return block


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(tied, id="tied parameters"),
        pytest.param(lambda block: nn.Sequential(torch.compile(block, backend="eager")), id="a compiled part"),
        pytest.param(Bound, id="a bound method"),
        pytest.param(hooked, id="a hook that changes the output"),
        pytest.param(doubled, id="a subclass"),
        pytest.param(adapted, id="an adapter"),
        pytest.param(freeze_batch_norm_2d, id="BatchNorm frozen by timm"),
    ],
)
def test_what_is_not_plain_is_fused_rightly_or_refused(randomise, change):
    model = change(randomise(Block(20, 2)).eval()).eval()
    x = torch.randn(2, 20, 7, 5)
    try:
        fused = fuse(model)
    except ValueError:
        return
    with torch.no_grad():
        assert_equal([fused(x)], [model(x)])
