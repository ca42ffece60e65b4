"""What the tests share: the golden values, weights that anyone can rebuild, and settings that make runs repeatable."""

import functools
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported; no test may need the network

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from groupmixformer import GroupMixFormer, fuse
from groupmixformer.models.groupmixformer import checkpoint_filter_fn

# One thread: results must not depend on the machine, and OpenMP's barriers make many small operations up to 100 times slower
# when workers of pytest-xdist or other programs share the cores.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"  # data and larger golden values beside a development checkout


def rebuild_weights(shapes):
    """Return a tensor for every name and shape by the rule of the golden values: random, but the same everywhere."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.array(100)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("running_mean", "bias")):
            value = rng.normal(0, 0.1, shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.as_tensor(value.astype("int64" if value.ndim == 0 else "float32"))
    return weights


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared():
    """Give the path of something under ../shared, or skip the test."""

    def find(name):
        if not (SHARED / name).exists():
            pytest.skip(f"needs {SHARED / name}, which comes with a development checkout")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def write_digits():
    """Give a function that writes scikit-learn's digits 0, 1, ... as a folder of images, with so many of each class."""

    def write(root, names, train, val, size=(40, 36)):
        images, labels = load_digits(return_X_y=True)
        for digit, name in enumerate(names):
            chosen = images[labels == digit][: train + val].reshape(-1, 8, 8) * 15.9
            for i, pixels in enumerate(chosen):
                folder = root / ("train" if i < train else "val") / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).resize(size).save(folder / f"{i}.png")
        return root

    return write


@pytest.fixture(scope="session")
def photos(write_digits, tmp_path_factory):
    """Two classes of real images, scikit-learn's zeros and ones, as an image folder."""
    return write_digits(tmp_path_factory.mktemp("photos"), ["zero", "one"], train=12, val=8)


@pytest.fixture(scope="session")
def randomise():
    """Give a module the weights of `rebuild_weights`: a fresh module's are near zero and would hide errors."""

    def apply(module):
        module.load_state_dict(rebuild_weights({name: tensor.shape for name, tensor in module.state_dict().items()}))
        return module

    return apply


@pytest.fixture(scope="session")
def golden(shared):
    """Load golden values by name; `test` ships with the package, `mobile` and `small` are skipped where they are missing."""

    @functools.cache
    def load(name):
        folder = GOLDEN if (GOLDEN / f"{name}.json").is_file() else shared(f"golden/{name}.json").parent
        content = json.loads((folder / f"{name}.json").read_text())
        config = content["config"]
        arguments = {
            "embed_dims": config["embedding_dims"],
            "depths": config["serial_depths"],
            "mlp_ratios": config["mlp_ratios"],
            "num_classes": content["num_classes"],
        }
        weights = rebuild_weights(dict(content["keys"]))  # by the release's names

        def model():
            built = GroupMixFormer(**arguments)
            built.load_state_dict(checkpoint_filter_fn(weights))
            return built.eval()

        def images(case):
            values = np.random.default_rng(case["seed"]).normal(0, 1, case["shape"])
            return torch.as_tensor(values.astype("float32"))

        with np.load(folder / f"{name}.npz") as arrays:
            values = {key: torch.as_tensor(array) for key, array in arrays.items()}
        return SimpleNamespace(
            arguments=arguments, weights=weights, model=model, images=images, arrays=values, **{**content, "config": config}
        )

    return load


@pytest.fixture(scope="session")
def as_released():
    """Give tensors by the release's names, from ours: the inverse of the package's own table, written apart from it."""

    def apart(tensors):
        """Undo what the package stores together: the norms of the four segments."""
        for name, tensor in tensors.items():
            convolution = re.fullmatch(r"(.*aggregators)\.(depthwise|pointwise)\.(\d)\.weight", name)
            norm = re.fullmatch(r"(.*aggregators)\.norm\.(\w+)", name)
            if convolution:
                yield f"{convolution[1]}.{int(convolution[3]) + 1}.{convolution[2]}.weight", tensor
            elif norm:
                parts = tensor.chunk(4) if tensor.dim() else [tensor] * 4
                yield from ((f"{norm[1]}.{i}.norm.{norm[2]}", part.clone()) for i, part in enumerate(parts))
            else:
                yield name, tensor

    def rename(tensors):
        replacements = (
            (r"^stem\.conv", "conv_stem.proj"),
            (r"^stem\.", "conv_stem."),
            (r"^stages\.(\d+)\.patch_embed\.norm", r"patch_embed_layers.\1.norm"),
            (r"^stages\.(\d+)\.patch_embed\.", r"patch_embed_layers.\1.proj."),
            (r"^stages\.(\d+)\.blocks\.", r"groupmixformer_backbone.\1.gma_stage."),
            (r"\.cpe\.", ".cpe.proj."),
            (r"\.attn\.aggregators\.(\d)\.norm", r".att.aggregator.norm\1"),
            (r"\.attn\.aggregators\.", ".att.aggregator.agg"),
            (r"\.attn\.non_attention\.norm", ".att.aggregator.agg0.norm"),
            (r"\.attn\.non_attention\.", ".att.aggregator.agg0.conv."),
            (r"\.attn\.position\.conv3", ".att.crpe.conv_list.0"),
            (r"\.attn\.position\.conv5", ".att.crpe.conv_list.1"),
            (r"\.attn\.position\.conv7", ".att.crpe.conv_list.2"),
            (r"\.attn\.", ".att."),
            (r"\.depthwise\.", ".conv1."),
            (r"\.pointwise\.", ".pointwise_conv."),
            (r"^norm\.", "norm4."),
            (r"^head\.fc\.", "head."),
        )
        renamed = {}
        for name, tensor in apart(tensors):
            for pattern, theirs in replacements:
                name = re.sub(pattern, theirs, name)
            renamed[name] = tensor
        return renamed

    return rename


class Form(NamedTuple):
    """A way to run a network: `build(model, images)` gives what is called with images, of that size or of any."""

    build: Callable
    any_size: bool = True


def exported(model, images):
    return torch.export.export(model, (images,)).module()


def exported_for_any_size(model, images):
    auto = torch.export.Dim.AUTO  # batch, height and width stay free; torch.export finds their ranges
    example = torch.randn(2, 3, 69, 45, dtype=images.dtype)
    return torch.export.export(model, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()


def compiled(model, images, **options):
    torch._dynamo.reset()  # graphs of tests before count towards its limit
    return torch.compile(model, fullgraph=True, **options)


# What PyTorch makes of a model, in the order of what it costs. TorchScript and torch.fx take the plain network only.
BUILDS = {
    "eager": Form(lambda model, images: model),
    "traced": Form(lambda model, images: torch.jit.trace(model, images, check_trace=False)),
    "exported": Form(exported, any_size=False),
    "compiled": Form(functools.partial(compiled, backend="aot_eager", dynamic=False), any_size=False),
    "exported for any size": Form(exported_for_any_size),
    "compiled for any size": Form(functools.partial(compiled, backend="aot_eager", dynamic=True)),
    "compiled by inductor": Form(functools.partial(compiled, dynamic=False), any_size=False),
    "frozen by inductor": Form(functools.partial(compiled, dynamic=False, options={"freezing": True}), any_size=False),
}
FORMS = {
    **BUILDS,
    "symbolically traced": Form(lambda model, images: torch.fx.symbolic_trace(model)),
    "scripted": Form(lambda model, images: torch.jit.script(model)),
    **{
        f"fused, {name}": Form(lambda model, images, build=form.build: build(fuse(model), images), form.any_size)
        for name, form in BUILDS.items()
    },
}
SLOW_FORMS = {name for name in FORMS if any(word in name for word in ("any size", "compiled", "inductor"))}
EXHAUSTIVE_FORMS = {
    "compiled for any size",
    "frozen by inductor",
    "fused, compiled for any size",
    "fused, compiled by inductor",
}


def marks(name):
    return [pytest.mark.slow] * (name in SLOW_FORMS) + [pytest.mark.exhaustive] * (name in EXHAUSTIVE_FORMS)


@pytest.fixture(params=[pytest.param(name, marks=marks(name)) for name in FORMS])
def form(request):
    """Every form in turn, or by name: `@pytest.mark.parametrize("form", ["eager", "fused, eager"], indirect=True)`."""
    return FORMS[request.param]
