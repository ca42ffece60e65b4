"""Checkpoints of every origin load as the same model, run nothing, and fail in one line that names the file."""

import copy
import itertools
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from groupmixformer import GroupMixFormer, load_checkpoint
from groupmixformer.models.adapters import add_adapters, trained_names
from groupmixformer.models.checkpoint import (
    architecture,
    check_tensors,
    fixed_size,
    load_model,
    model_name,
    read_state_dict,
    save_checkpoint,
)
from groupmixformer.models.groupmixformer import checkpoint_filter_fn
from groupmixformer.weights import checksum

STAGES = {"embed_dims": (10, 20, 40, 30), "depths": (1, 2, 2, 1), "mlp_ratios": (2.5, 1, 1.5, 3)}
IMAGES = torch.randn(2, 3, 64, 45, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(randomise):
    return randomise(GroupMixFormer(**STAGES, num_classes=6)).eval()


def assert_same_model(got, expected):
    assert not got.training
    for (name, tensor), (other_name, other) in zip(got.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(tensor, other), name
    images = torch.randn(1, got.in_chans, 40, 70)
    assert torch.equal(got(images), expected(images))


def assert_fails(path, message=".", error=ValueError):
    with pytest.raises(error, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# Every origin


class Reduced:
    """Pickles as a call of `function`, which unpickling then makes."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def stand_in(patch, module, thing):
    """Let `thing` be pickled as a part of `module`, which need not be installed."""
    thing.__module__, thing.__qualname__ = module, thing.__name__
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module], thing.__name__, thing)


def training_file(weights):
    """Return what the release's training script saves: with yacs, and a metric that is a number of numpy's."""
    CfgNode = type("CfgNode", (dict,), {})

    def scalar(*args):
        raise AssertionError

    def save(path):
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch, "yacs.config", CfgNode)
            config = CfgNode(DATA=CfgNode(SIZES=[224, (1, 2)], NAME="imagenet"), LR=0.1, NONE=None)
            config.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={})
            content = {
                "model": weights,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
                "lr_scheduler": {"t_initial": 3},
                "max_accuracy": np.float64(83.4),
                "epoch": 299,
                "config": config,
            }
            torch.save(content, path)

    def save_with_numpy_1(path):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("numpy", "numpy.core", "numpy.core.multiarray"):
                patch.setitem(sys.modules, name, sys.modules.get(name))
            numpy = sys.modules["numpy"]
            stand_in(patch, "numpy.core.multiarray", scalar)
            patch.setitem(sys.modules, "numpy", numpy)
            torch.save({"model": weights, "max_accuracy": Reduced(scalar, np.dtype("float64"), b"\0" * 8)}, path)

    return save, save_with_numpy_1


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


# File name, and what writes it from the release's weights and the model that has them.
ORIGINS = {
    "release": ("a.pth", lambda path, w, m: torch.save({"model": w}, path)),
    "release, training": ("a.pth", lambda path, w, m: training_file(w)[0](path)),
    "release, training with numpy 1": ("a.pth", lambda path, w, m: training_file(w)[1](path)),
    "release, bare": ("a.pth", lambda path, w, m: torch.save(w, path)),
    "release, before PyTorch 1.6": (
        "a.pth",
        lambda path, w, m: torch.save({"model": w}, path, _use_new_zipfile_serialization=False),
    ),
    "release, safetensors": ("a.safetensors", lambda path, w, m: safetensors.torch.save_file(w, path)),
    "release, DDP": ("a.pth", lambda path, w, m: torch.save({"model": prefixed("module.", w)}, path)),
    "bare": ("a.pt", lambda path, w, m: torch.save(m.state_dict(), path)),
    "safetensors": ("a.safetensors", lambda path, w, m: safetensors.torch.save_file(m.state_dict(), path)),
    "DDP": ("a.bin", lambda path, w, m: torch.save(prefixed("module.", m.state_dict()), path)),
    "compiled": ("a.pt", lambda path, w, m: torch.save(prefixed("_orig_mod.", m.state_dict()), path)),
    "timm": ("a.pth.tar", lambda path, w, m: torch.save({"arch": "x", "state_dict": m.state_dict()}, path)),
    "Lightning": (
        "a.ckpt",
        lambda path, w, m: torch.save({"epoch": 3, "state_dict": prefixed("model.", m.state_dict())}, path),
    ),
    "folder": ("run", lambda path, w, m: save_checkpoint(m, path)),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_every_origin(tmp_path, golden, origin):
    values = golden("test")
    name, write = ORIGINS[origin]
    write(tmp_path / name, values.weights, values.model())
    modules = set(sys.modules)
    loaded = load_checkpoint(tmp_path / name)
    assert not {"yacs.config", "numpy.core.multiarray"} & (set(sys.modules) - modules), "what the file names is not imported"
    assert_same_model(loaded, values.model())
    assert loaded.num_classes == loaded.pretrained_cfg["num_classes"] == values.num_classes
    assert_same_model(load_checkpoint(str(tmp_path / name)), loaded)
    assert read_state_dict(tmp_path / name).keys() == loaded.state_dict().keys()


def test_folder_with_pytorch_weights(tmp_path, small):
    torch.save(small.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_model(load_checkpoint(tmp_path), small)


@pytest.mark.parametrize("variant", ["mobile", "small"])
def test_released_variants(tmp_path, golden, variant):
    values = golden(variant)
    torch.save({"model": values.weights}, tmp_path / "released.pth")
    model = load_checkpoint(tmp_path / "released.pth")
    assert model.pretrained_cfg["architecture"] == f"groupmixformer_{variant}"
    assert sum(parameter.numel() for parameter in model.parameters()) == values.params
    renamed = checkpoint_filter_fn(values.weights)
    assert renamed.keys() == timm.create_model(f"groupmixformer_{variant}").state_dict().keys()
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in model.state_dict().items())


# The architecture, from the tensors


@settings(max_examples=12, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_architecture(data, stages):
    def per_stage(values):
        return data.draw(st.lists(values, min_size=stages, max_size=stages))

    arguments = {
        "embed_dims": per_stage(st.integers(1, 50).map(lambda i: 10 * i)),
        "depths": per_stage(st.integers(1, 4)),
        "mlp_ratios": per_stage(st.sampled_from([2, 2.5, 4]) | st.floats(0.1, 8)),
        "num_classes": data.draw(st.integers(0, 20)),
        "in_chans": data.draw(st.integers(1, 5)),
    }
    expected = GroupMixFormer(**arguments, device="meta").state_dict()
    found = architecture(expected)
    for key in ("embed_dims", "depths", "num_classes", "in_chans"):
        assert found[key] == arguments[key]
    for ratio, hidden, dim in zip(found["mlp_ratios"], arguments["mlp_ratios"], arguments["embed_dims"], strict=True):
        assert math.isclose(ratio, hidden, abs_tol=1 / dim)
    rebuilt = GroupMixFormer(**found, device="meta").state_dict()
    assert {name: tensor.shape for name, tensor in rebuilt.items()} == {name: tensor.shape for name, tensor in expected.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 5},
        {"num_classes": 0},
        {"in_chans": 1},
        {"mlp_ratios": (2.5, 0.7, 1.1, 3)},
        {"embed_dims": (10, 20, 50, 30), "mlp_ratios": (2, 1, 0.59, 3)},  # 29 of 50: int(50 * (29 / 50)) is 28
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_architecture_of_a_file(tmp_path, randomise, arguments, suffix):
    model = randomise(GroupMixFormer(**STAGES | arguments)).eval()
    path = tmp_path / f"a{suffix}"
    torch.save(model.state_dict(), path) if suffix == ".pt" else safetensors.torch.save_file(model.state_dict(), path)
    loaded = load_checkpoint(path)
    assert_same_model(loaded, model)
    assert (loaded.num_classes, loaded.in_chans) == (model.num_classes, model.in_chans)
    assert loaded.pretrained_cfg["input_size"] == (model.in_chans, 224, 224)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("stem.conv1.weight"),
        lambda tensors: tensors.update({"head.fc.weight": torch.ones(())}),
        lambda tensors: tensors.update({"stages.0.patch_embed.pointwise.weight": torch.ones(0, 10, 1, 1)}),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".blocks." in name],
    ],
)
def test_tensors_of_no_architecture(small, change):
    tensors = {"a": torch.ones(1), **small.state_dict()}
    change(tensors)
    first = ", ".join(list(tensors)[:3])
    with pytest.raises(ValueError, match=f"^not a GroupMixFormer: its {len(tensors)} tensors start with {first}; expected"):
        architecture(tensors)


def test_tensors_that_do_not_fit_are_named(small):
    tensors, model = small.state_dict(), torch.nn.Linear(2, 2)
    check_tensors(model.state_dict(), model)
    for count, more in ((3, ""), (4, ", ...")):
        some = dict(list(tensors.items())[:count])
        names = ", ".join(list(some)[:3])
        with pytest.raises(ValueError, match="^" + re.escape(f"surplus tensors: {count} ({names}{more})") + "$"):
            check_tensors(model.state_dict() | some, model)
    for dtype in (torch.int64, torch.complex64):
        wrong = {**model.state_dict(), "bias": torch.ones(2, dtype=dtype)}
        with pytest.raises(ValueError, match=rf"^mistyped tensors: 1 \(bias: {dtype} for torch.float32\)$"):
            check_tensors(wrong, model)
    with pytest.raises(ValueError, match=r"^misshapen tensors: 1 \(bias: \[1\] for \[2\]\)$"):
        check_tensors({**model.state_dict(), "bias": torch.ones(1)}, model)


def test_names_and_sizes_of_models():
    assert (model_name("mobile"), model_name("groupmixformer_tiny"), model_name("resnet18")) == (
        "groupmixformer_mobile",
        "groupmixformer_tiny",
        "resnet18",
    )
    with pytest.raises(ValueError, match=r"^no model groupmixformer_smal, .*: the nearest is groupmixformer_small$"):
        model_name("groupmixformer_smal")
    assert fixed_size("vit_tiny_patch16_224", 64) == {"img_size": 64}
    assert fixed_size("resnet18", 64) == fixed_size("of_another_package", 64) == {}


# Folders: ours, timm's and transformers'


def test_folder(tmp_path, small):
    (tmp_path / "metrics.csv").write_text("epoch,loss\n")
    before = dict(vars(small))
    data_config = {"input_size": (3, 96, 96), "mean": (0.5, 0.4, 0.3), "crop_pct": 0.9}
    save_checkpoint(small, tmp_path, label_names=list("abcdef"), data_config=data_config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "metrics.csv", "model.safetensors"]
    assert vars(small).get("pretrained_cfg") == before.get("pretrained_cfg")
    weights = (tmp_path / "model.safetensors").read_bytes()
    with (tmp_path / "model.safetensors").open("rb") as reader:
        torch.nn.init.ones_(small.norm.bias)
        save_checkpoint(small, tmp_path, label_names=list("abcdef"), data_config=data_config)
        assert reader.read() == weights, "who reads while we save sees the old file, not half of each"
    for again in ("once", "twice"):
        loaded = load_checkpoint(tmp_path)
        assert_same_model(loaded, small)
        cfg = timm.data.resolve_data_config(model=loaded)
        assert (cfg["input_size"], tuple(cfg["mean"]), cfg["crop_pct"]) == tuple(data_config.values()), again
        assert loaded.pretrained_cfg["label_names"] == list("abcdef")
        save_checkpoint(loaded, tmp_path)  # over itself, while its file may still be mapped into memory


@pytest.mark.parametrize("global_pool", ["max", "catavgmax"])
def test_folder_keeps_the_pooling(tmp_path, randomise, global_pool):
    model = randomise(GroupMixFormer(**STAGES, num_classes=6, global_pool=global_pool)).eval()
    save_checkpoint(model, tmp_path)
    assert_same_model(load_checkpoint(tmp_path), model)


def test_folder_of_another_mixer_and_of_other_classes(tmp_path, randomise):
    model = randomise(GroupMixFormer(**STAGES, num_classes=6, mixer="pool")).eval()
    save_checkpoint(model, tmp_path)
    assert_same_model(load_checkpoint(tmp_path), model)
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "model_args": {**content["model_args"], "mixer": "group_mix"}}))
    assert_fails(tmp_path, "as a network with mixer group_mix: missing tensors: .*[^m]$")
    config.write_text(json.dumps({**content, "num_classes": 5}))
    assert_fails(tmp_path, "config.json has num_classes 5, and the weights are for 6")
    del content["model_args"]
    config.write_text(json.dumps(content))
    assert_fails(tmp_path, "and another mixer is named by mixer under model_args of config.json$")


def test_folder_of_a_network_for_one_size(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=48).eval()
    model.model_options = {"img_size": 48, "class_token": True}
    save_checkpoint(model, tmp_path, data_config={"input_size": (3, 48, 48)})
    loaded = load_model(tmp_path)
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(loaded(images), model(images))
    assert loaded.model_options["class_token"] and "img_size" not in loaded.model_options


def test_folder_of_another_network(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    save_checkpoint(model, tmp_path, label_names=list("xyz"))
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.pretrained_cfg["label_names"] == list("xyz")
    assert_fails(tmp_path, "not a GroupMixFormer")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"width_of_doors": 3}}))
    with pytest.raises(ValueError, match=r"cannot be loaded: TypeError: .*width_of_doors"):
        load_model(tmp_path)


@pytest.fixture
def tiny(randomise):
    return randomise(GroupMixFormer(embed_dims=(10,), depths=(1,), mlp_ratios=(1,), num_classes=6)).eval()


@pytest.fixture
def adapted(tmp_path, tiny):
    """Writes the run of a classifier for other classes than its base, which lies beside it, and returns what it should be."""
    base, run = tmp_path / "base", tmp_path / "run"
    save_checkpoint(tiny, base, list("abcdef"), {"mean": (0.5, 0.4, 0.3)})
    stored = {"source": str(base), "checksum": checksum(load_checkpoint(base).state_dict())}

    def write(kind):
        tiny.reset_classifier(4)
        add_adapters(tiny, {"kind": kind, "rank": 2, "alpha": None, "targets": ["qkv"], "base": stored})
        for name in sorted(trained_names(tiny)):
            torch.nn.init.normal_(tiny.get_parameter(name), std=0.2)
        tiny.pretrained_cfg = {**load_checkpoint(base).pretrained_cfg, "problem_type": "multi_label_classification"}
        save_checkpoint(tiny.eval(), run, list("stuv"), {"crop_pct": 0.9})
        config = json.loads((run / "config.json").read_text())
        assert config["adapter"]["base"] == {**stored, "path": "../base"}
        assert safetensors.torch.load_file(run / "model.safetensors").keys() == trained_names(tiny)
        return run, config

    return write


@pytest.mark.parametrize("kind", ["adaptformer", "linear_probe"])
def test_folder_of_adapters_and_its_base(adapted, tiny, kind):
    run, config = adapted(kind)
    loaded = load_checkpoint(run)
    assert_same_model(loaded, tiny)
    assert getattr(loaded, "adapter", {}).keys() == ({"kind", "rank", "alpha", "targets"} if kind == "adaptformer" else set())
    cfg = loaded.pretrained_cfg
    assert (cfg["label_names"], cfg["crop_pct"], tuple(cfg["mean"])) == (list("stuv"), 0.9, (0.5, 0.4, 0.3))
    assert loaded.default_cfg is cfg and cfg["problem_type"] == "multi_label_classification"
    # Names of another number of classes and of the base are not taken; without its path the base is found by its source.
    (run / "config.json").write_text(json.dumps(config | {"label_names": ["s"], "problem_type": "single_label_classification"}))
    cfg = load_checkpoint(run).pretrained_cfg
    assert "label_names" not in cfg and cfg["problem_type"] == "single_label_classification"
    del config["adapter"]["base"]["path"]
    (run / "config.json").write_text(json.dumps(config))
    assert_same_model(load_checkpoint(run), tiny)
    run.with_name("base").rename(run.with_name("other"))
    assert_fails(run, rf"its base .*base \(checksum \w+\) is not at {run.with_name('base')}: put it there", FileNotFoundError)
    config["adapter"]["base"] |= {"source": "x\ny", "path": "../r\n"}  # names that a terminal would take for two lines
    (run / "config.json").write_text(json.dumps(config))
    assert_fails(run, r"its base x\\ny \(checksum \w+\) is not at .*/\.\./r\\n: put it there", FileNotFoundError)


def test_folder_of_lora_is_merged_into_its_base(adapted, tiny):
    run, config = adapted("linear_probe")
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    for name in [name for name in tiny.state_dict() if name.endswith("qkv.weight")]:
        weight = tiny.get_parameter(name)
        up, down = torch.randn(len(weight), 2), torch.randn(2, weight.shape[1])
        layer = name.removesuffix("weight")
        tensors |= {f"{layer}lora_A.default.weight": down, f"{layer}lora_B.default.weight": up}
        weight.data += up @ down * 2  # alpha is twice the rank
    safetensors.torch.save_file(tensors, run / "model.safetensors")
    config["adapter"]["kind"] = "lora"
    (run / "config.json").write_text(json.dumps(config))
    assert_same_model(load_checkpoint(run), tiny)


def test_wrong_adapters(adapted):
    run, config = adapted("adaptformer")
    refusals = [
        ({"num_classes": 5}, "cannot be loaded: .*size mismatch"),
        ({"kind": "lora"}, "its tensors are not those of lora and a classifier"),
        ({"kind": "linear_probe"}, "its tensors are not those of linear_probe and a classifier"),
        ({"rank": 3}, "cannot be loaded: .*size mismatch"),
        ({"checksum": "1\n"}, r"its base .*base has the checksum .*, expected 1\\n: it is another model"),
        ({"path": "."}, "its base .*run needs a base itself"),
    ]
    for change, message in refusals:
        changed = copy.deepcopy(config)
        for place in (changed, changed["adapter"], changed["adapter"]["base"]):
            place |= {key: value for key, value in change.items() if key in place}
        (run / "config.json").write_text(json.dumps(changed))
        assert_fails(run, message)
    (run / "config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    del tensors["head.fc.bias"]
    safetensors.torch.save_file(tensors, run / "model.safetensors")
    assert_fails(run, "its tensors are not those of adaptformer and a classifier")
    del config["adapter"]["base"]
    (run / "config.json").write_text(json.dumps(config | {"architecture": "resnet10t"}))
    with pytest.raises(ValueError, match=r"config\.json: adapter has no base, which only a GroupMixFormer"):
        load_model(run)


def test_timm_reads_our_folder(tmp_path, small):
    save_checkpoint(small, tmp_path)
    name = f"local-dir:{tmp_path}"
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(IMAGES), small(IMAGES))
    features = timm.create_model(name, pretrained=True, features_only=True).eval()(IMAGES)
    for feature, expected in zip(features, small.forward_intermediates(IMAGES, intermediates_only=True), strict=True):
        assert torch.equal(feature, expected)
    other = timm.create_model(name, pretrained=True, num_classes=5).eval()
    assert other(IMAGES).shape == (2, 5)
    assert torch.equal(other.forward_features(IMAGES), small.forward_features(IMAGES))


@pytest.mark.parametrize("origin", ["release", "release, safetensors", "bare"])
def test_timm_reads_a_file(tmp_path, golden, origin):
    values = golden("test")
    model = values.model()
    name, write = ORIGINS[origin]
    write(tmp_path / name, values.weights, model)
    arguments = {**values.arguments, "pretrained": True}
    overlay = {"file": str(tmp_path / name), "num_classes": values.num_classes}

    def create(**kwargs):
        return timm.create_model("groupmixformer_small", pretrained_cfg_overlay=overlay, **arguments | kwargs).eval()

    assert_same_model(create(), model)
    features = create(features_only=True)(IMAGES)
    assert torch.equal(features[-1], model.forward_intermediates(IMAGES, intermediates_only=True)[-1])
    grey = create(num_classes=3, in_chans=1)
    assert grey(IMAGES[:, :1]).shape == (2, 3)
    # timm sums the kernels over the colours, so a grey image gives what it gives as three equal colours.
    expected = model.forward_features(IMAGES[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(IMAGES[:, :1]), expected, rtol=1e-4, atol=1e-4)  # in another order


def test_transformers_reads_our_folder(tmp_path, small):
    transformers = pytest.importorskip("transformers")
    labels = [f"kind {i}" for i in range(6)]
    save_checkpoint(small, tmp_path, label_names=labels, data_config={"input_size": (3, 64, 64), "crop_pct": 0.9})
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(wrapped(IMAGES).logits, small(IMAGES))
    assert wrapped.config.num_labels == 6
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    answer = transformers.pipeline("image-classification", model=str(tmp_path))(image, top_k=6)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=load_checkpoint(tmp_path)))
    expected = small(transform(image)[None]).softmax(1)[0].tolist()
    got = {item["label"]: item["score"] for item in answer}
    assert got == pytest.approx(dict(zip(labels, expected, strict=True)), rel=1e-4)


# What cannot be loaded


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda path: path.touch(), "the file is empty"),
        ("a.safetensors", lambda path: path.touch(), "the file is empty"),
        ("a.pth", lambda path: path.write_text("hello\nworld\n"), "not a readable checkpoint"),
        ("a.pth", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "not a readable checkpoint"),
        ("a.safetensors", lambda path: path.write_text("hello\nworld, this is text\n"), "not a readable checkpoint"),
        ("a.pth", lambda path: torch.save({}, path), "holds no state dict"),
        ("a.pth", lambda path: torch.save([torch.ones(3)], path), "holds no state dict"),
        ("a.pth", lambda path: torch.save({"model": {"a": 1}}, path), "holds no state dict"),
        (
            "a.pth",
            lambda path: torch.save(torch.nn.Linear(2, 2), path),
            "asks to|not a readable checkpoint|holds no state dict",
        ),
        ("a.pth", lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path), "not a GroupMixFormer.*weight, bias"),
        (
            "a.pth",
            lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
            "asks to|not a readable checkpoint|holds no state dict",
        ),
        ("a", lambda path: path.mkdir(), "holds none of model.safetensors, pytorch_model.bin"),
        ("a.pth", lambda path: None, "no such checkpoint file or folder"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_unreadable(tmp_path, name, write, message):
    write(tmp_path / name)
    assert_fails(tmp_path / name, message, (ValueError, FileNotFoundError))


@pytest.mark.parametrize("kept", [1, 100, 0.3, 0.9, -1])
@pytest.mark.parametrize("origin", ["release, training", "release, before PyTorch 1.6", "safetensors"])
def test_truncated(tmp_path, golden, origin, kept):
    values = golden("test")
    name, write = ORIGINS[origin]
    path = tmp_path / name
    write(path, values.weights, values.model())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_fails(path, "not a readable checkpoint")


def touch(path):
    Path(path).touch()


class Restored:
    """Runs code when it is unpickled, though it asks for no call."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        touch(state["path"])


HOSTILE = {
    "os.system": lambda path: Reduced(os.system, f"touch '{path}'"),
    "os.mkdir": lambda path: Reduced(os.mkdir, path),
    "eval": lambda path: Reduced(eval, f"open({path!r}, 'w')"),
    "exec": lambda path: Reduced(exec, f"open({path!r}, 'w')"),
    "a function": lambda path: Reduced(touch, path),
    "a method": lambda path: Reduced(Path(path).touch),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside the model", "as the model", "as a tensor"])
@pytest.mark.parametrize("call", HOSTILE)
def test_hostile_files(tmp_path, golden, call, place, legacy):
    ran, path = tmp_path / "ran", tmp_path / "hostile.pth"
    hostile = HOSTILE[call](str(ran))
    weights = golden("test").weights
    content = {
        "beside the model": {"model": weights, "config": {"a": [hostile]}},
        "as the model": {"model": hostile},
        "as a tensor": {"model": {**weights, "norm4.weight": hostile}},
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_fails(path, r"not a readable checkpoint: it asks to run (?!None)\S+, and only tensors are read")
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the file would have run code"


def test_objects_are_not_restored(tmp_path, golden):
    ran, path = tmp_path / "ran", tmp_path / "hostile.pth"
    values = golden("test")
    torch.save({"model": values.weights, "config": Restored(str(ran))}, path)
    assert_same_model(load_checkpoint(path), values.model())
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the file would have run code"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm4.bias"), r"missing tensors: 1 \(norm\.bias\)"),
        (lambda w: w.update(extra=torch.ones(2)), r"surplus tensors: 1 \(extra\)"),
        (
            lambda w: w.update({"head.weight": torch.ones(7, 3)}),
            r"misshapen tensors: 1 \(head\.fc\.weight: \[7, 3\] for \[7, 120\]\)",
        ),
        (lambda w: [w.pop(name) for name in list(w) if "att.proj" in name], r"missing tensors: 10 \(.*, .*, .*, \.\.\.\)"),
        (
            lambda w: (w.pop("norm4.bias"), w.update({"zz": torch.ones(1), "head.weight": torch.ones(7, 3)})),
            "missing .*norm.*; surplus .*zz.*; misshapen .*head",
        ),
        (
            lambda w: w.update({"patch_embed_layers.1.proj.pointwise_conv.weight": torch.ones(84, 40, 1, 1)}),
            r"\[80\] for \[84\]|\[16\] for \[20\]",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_wrong_tensors(tmp_path, golden, name, change, message):
    weights = dict(golden("test").weights)
    change(weights)
    if name.endswith("pth"):
        torch.save({"model": weights}, tmp_path / name)
    else:
        safetensors.torch.save_file(weights, tmp_path / name)
    assert_fails(tmp_path / name, message)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_wrong_tensor(tmp_path_factory, data):
    weights = GroupMixFormer(**STAGES, num_classes=6).state_dict()
    name = data.draw(st.sampled_from(sorted(weights)))
    shape = data.draw(st.none() | st.lists(st.integers(1, 12), min_size=1, max_size=5))
    assume(shape is None or tuple(shape) != tuple(weights[name].shape))
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.ones(shape)
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    torch.save(weights, path)
    assert_fails(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("head.fc.weight", torch.ones(())),
        ("stages.1.patch_embed.pointwise.weight", torch.ones(0, 3)),
        ("norm.weight", torch.ones(30).to_sparse()),
        (5, torch.ones(3)),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_odd_tensors(tmp_path, small, name, tensor):
    torch.save({**small.state_dict(), name: tensor}, tmp_path / "a.pt")
    assert_fails(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["stages.0.blocks.{}.norm1.weight", "stages.{}.blocks.0.norm1.weight"])
def test_absurd_depths(tmp_path, small, name):
    # A name must not make the reader build or count that many blocks. The number is too large to try.
    torch.save({**small.state_dict(), name.format(10**17): torch.ones(3)}, tmp_path / "a.pt")
    assert_fails(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        b"\xff\xfe{}",
        {"pretrained_cfg": None},
        {"pretrained_cfg": 5},
        {"pretrained_cfg": {"input_size": 3}},
        {"global_pool": "nonsense"},
        {"global_pool": 5},
        {"global_pool": ""},
    ],
)
def test_damaged_configuration(tmp_path, small, content):
    save_checkpoint(small, tmp_path)
    config = tmp_path / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(config.read_text()) | content)
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_fails(tmp_path, r"config\.json")
