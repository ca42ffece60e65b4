"""Networks as files for other programs: ONNX, torch.export, AOTInductor, OpenVINO, ExecuTorch, Core ML, LiteRT.

A file is written under another name, opened again by the program that it is for, and compared with the network on random and
real images of several sizes. Only then does it get its name.
"""

import importlib
import importlib.metadata
import io
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._sympy.value_ranges import ValueRanges
from torchvision.transforms import v2

from ..data.channels import AnyImage, ChannelImage, Channels
from ..data.images import find_images
from ..files import atomic_write, to_json
from ..models.fuse import fuse
from ..run_folder import RunFolder

OPSET = 20  # of ONNX: the first with GELU
TOLERANCE = 1e-4  # of the largest difference, relative to the largest value
HALF_TOLERANCE = 1e-2  # the same in float16
SIZES = ((32, 32), (97, 129), (160, 224))  # to compare at, beside the network's own
MANY_WINDOWS = (
    485,
    552,
)  # to trace at where a mixer has windows: several in the last stage too, or their number would be fixed
NAME = "groupmixformer"  # where OpenVINO keeps the metadata

Outputs = Sequence[Tensor]


class Exported(nn.Module):
    """What a file holds: images (batch, channels, height, width), normalised, to a tuple of tensors.

    Args:
        network: A classifier or segmenter, for logits.
        features: Give a classifier's maps of strides 4, 8, 16 and 32 instead.

    Attributes:
        free: Names of the dimensions that the file leaves open, by their place.
        input_name: Of the input.
        layout: What the input is, in words.
    """

    free: ClassVar[dict[int, str]] = {0: "batch", 2: "height", 3: "width"}
    input_name = "images"
    layout = "images: float32, contiguous, (batch, channels, height, width), RGB, from 0 to 1, minus mean, divided by std"

    def __init__(self, network: nn.Module, features: bool = False) -> None:
        super().__init__()
        self.network: Any = network
        self.features = features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits alone, or the maps, the finest first."""
        if self.features:
            return tuple(self.network.forward_intermediates(images, intermediates_only=True))
        return (self.network(images),)

    def samples(self, image: AnyImage, size: tuple[int, int], about: Mapping[str, Any]) -> list[Tensor]:
        """Return inputs to compare at a size: of an image, and random ones."""
        channels = about["input_size"][0]
        return [to_pixels(image, channels, size, about["mean"], about["std"]), torch.randn(3, channels, *size)]

    def sizes(self, input_size: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Return the network's own size and those that every file is tried at."""
        return list(dict.fromkeys([input_size[1:], *SIZES]))


def to_program(network: Any, images: Tensor) -> torch.export.ExportedProgram:
    """Trace an `Exported`, with the dimensions left open that it names."""
    free = dict.fromkeys(network.free, torch.export.Dim.DYNAMIC)
    return leave_open(torch.export.export(network, (images,), dynamic_shapes=(free,)))


def leave_open(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Take back conditions that a program does not depend on, which PyTorch states whenever it traces or rewrites one."""
    # Where it works out memory formats it takes for granted that a map is not 1 x 1, which it is for images of 32 x 32. Nothing
    # else depends on that: the comparison at that size holds without.
    program._guards_code = []
    for symbol, values in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(1 if values.lower <= 2 else 32, values.upper)
    return program


def save_program(program: torch.export.ExportedProgram, metadata: Mapping[str, str], path: Path) -> None:
    """Write a program with what is said about it, and without the paths of the source files that it was traced from."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("from_node", None)
    torch.export.save(program, path, extra_files=dict(metadata))


def _write_onnx(network: Any, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[network.input_name],
        output_names=names,
        dynamic_shapes=(network.free,),
        verbose=False,
        optimize=False,
    )
    assert program is not None
    _tidy(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # where in which source file it comes from: a fifth of the size of mobile
    program.model.metadata_props.update(metadata)
    program.save(path)


def _tidy(model: Any) -> None:
    """Fold constants and join what is there twice. PyTorch's optimiser also rewrites, as programs do when they load a file."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    passes.InlinePass()(model)
    optimizer.fold_constants(model)
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)


def _to_half(path: Path) -> None:
    """Turn an ONNX file into float16, but for its inputs and outputs."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _load_onnx(path: Path) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _write_pt2(network: nn.Module, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    save_program(to_program(network, images), metadata, path)


def _load_pt2(path: Path) -> Callable[[Tensor], Outputs]:
    return torch.export.load(path).module()


def _write_aoti(network: nn.Module, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    settings = {"aot_inductor.metadata": dict(metadata)}
    torch._inductor.aoti_compile_and_package(to_program(network, images), package_path=str(path), inductor_configs=settings)


def _load_aoti(path: Path) -> Callable[[Tensor], Outputs]:
    return torch._inductor.aoti_load_package(str(path))


def save_openvino(model: Any, metadata: Mapping[str, str], path: Path) -> None:
    """Write a model of OpenVINO in float32, with what is said about it."""
    import openvino

    for key, value in metadata.items():
        model.set_rt_info(value, [NAME, key])
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_openvino(network: Any, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    import openvino

    model = openvino.convert_model(to_program(network, images))
    model.inputs[0].tensor.set_names({network.input_name})
    for output, name in zip(model.outputs, names, strict=True):
        output.tensor.set_names({name})
    save_openvino(model, metadata, path)


def _load_openvino(path: Path) -> Callable[[Tensor], Outputs]:
    import openvino

    # Where the processor has bf16, that is what OpenVINO computes in unless it is told not to.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.compile_model(path, "CPU", settings)
    return lambda images: [torch.from_numpy(output.copy()) for output in model(images.numpy()).values()]


def _write_executorch(
    network: nn.Module, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path
) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(network, (images,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata))
    lowered.to_executorch().save(str(path))


def _load_executorch(path: Path) -> Callable[[Tensor], Outputs]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: [output.clone() for output in method.execute([images])]


def _write_coreml(network: nn.Module, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    import coremltools

    program = torch.export.export(network, (images,)).run_decompositions({})
    with redirect_stderr(io.StringIO()):  # whose bars are no use in a log
        model = coremltools.convert(
            program,
            convert_to="mlprogram",
            outputs=[coremltools.TensorType(name) for name in names],
            compute_precision=coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS17,
            skip_model_load=True,
        )
    model.user_defined_metadata.update(metadata)
    model.save(str(path))


def _load_coreml(path: Path) -> Callable[[Tensor], Outputs]:
    import coremltools

    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    description = model.get_spec().description
    name = description.input[0].name

    def run(images: Tensor) -> Outputs:
        found = model.predict({name: images.numpy()})
        return [torch.from_numpy(found[output.name]) for output in description.output]

    return run


def _write_litert(network: nn.Module, images: Tensor, names: Sequence[str], metadata: Mapping[str, str], path: Path) -> None:
    import litert_torch

    with redirect_stdout(io.StringIO()):  # where it tells its steps
        litert_torch.convert(network, (images,)).export(str(path))
    with zipfile.ZipFile(path, "a") as archive:  # behind the model, where LiteRT's readers look for further files
        for name, text in metadata.items():
            archive.writestr(name, text)


def _load_litert(path: Path) -> Callable[[Tensor], Outputs]:
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path), num_threads=torch.get_num_threads()).get_signature_runner()
    name = next(iter(run.get_input_details()))
    return lambda images: [torch.from_numpy(output.copy()) for output in run(**{name: images.numpy()}).values()]


@dataclass(frozen=True)
class Format:
    """How a file is written and read.

    Attributes:
        title: What it is called.
        suffix: How its name must end.
        write: Takes the network, images to trace it with, names of the outputs, metadata and the path.
        load: Takes the path and gives what computes the outputs, in as many threads as PyTorch has then.
        packages: What must be installed.
        data: How the names of further files end that belong to it.
        fixed: Whether the file takes one image of the network's own size, and no others.
        fused: Whether the network is written in its inference form.
        runs: Whether this machine can run the file, and not only read it.
    """

    title: str
    suffix: str
    write: Callable[[nn.Module, Tensor, Sequence[str], Mapping[str, str], Path], None]
    load: Callable[[Path], Callable[[Tensor], Outputs]]
    packages: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    fixed: bool = False
    fused: bool = True
    runs: bool = True


FORMATS = {
    "onnx": Format(f"ONNX, opset {OPSET}", ".onnx", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": Format("torch.export program", ".pt2", _write_pt2, _load_pt2),
    "aoti": Format("AOTInductor package", ".pt2", _write_aoti, _load_aoti),
    "openvino": Format("OpenVINO IR", ".xml", _write_openvino, _load_openvino, ("openvino",), (".bin",)),
    "executorch": Format("ExecuTorch, XNNPACK", ".pte", _write_executorch, _load_executorch, ("executorch",), fixed=True),
    "coreml": Format(
        *("Core ML program", ".mlpackage", _write_coreml, _load_coreml, ("coremltools",)),
        fixed=True,
        runs=sys.platform == "darwin",
    ),
    "litert": Format(  # litert-torch 0.10 makes another function of the inference form
        *("LiteRT", ".tflite", _write_litert, _load_litert, ("litert_torch", "ai_edge_litert")),
        fixed=True,
        fused=False,
    ),
}


def real_image(run: RunFolder, channels: Channels | None = None) -> AnyImage:
    """Return an image of the examples in the folder of a run, read with these channels, or a photograph of scikit-learn's."""
    for path in find_images([str(run.examples)]) if run.examples.is_dir() else []:
        return (channels or Channels()).read(path)
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def with_channels(image: AnyImage, channels: int) -> Tensor:
    """Return an image (channels, H, W), of colours in 0 to 1; a colour image in grey for other than three channels."""
    if isinstance(image, ChannelImage):
        return image.tensor
    pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
    return pixels if channels == 3 else pixels.mean(dim=0, keepdim=True).expand(channels, -1, -1)


def to_pixels(image: AnyImage, channels: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an image as normalised images (1, channels, *size)."""
    pixels = v2.functional.resize(with_channels(image, channels), list(size), antialias=True)
    return v2.functional.normalize(pixels, list(mean), list(std))[None].contiguous()  # AOTInductor takes that for granted


def _difference(got: Outputs, expected: Outputs) -> float:
    """Return the largest difference relative to the largest value of each output; infinity for other shapes and NaN."""
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        error = (one - other).abs().max() / other.abs().max() if one.shape == other.shape else torch.tensor(torch.inf)
        worst = max(worst, torch.nan_to_num(error, nan=torch.inf).item())
    return worst


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what the exporters say about their own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def files_of(path: Path, target: Format) -> list[Path]:
    """Return the files that belong to an exported one, and it as the last."""
    return [path.with_suffix(suffix) for suffix in (*target.data, target.suffix)]


def size_on_disk(path: Path, target: Format) -> int:
    """Return the bytes of a file, or of a folder, and those that belong to it."""
    return sum(part.stat().st_size for file in files_of(path, target) for part in (file, *file.rglob("*")) if part.is_file())


@torch.no_grad()
def export(
    network: Exported,
    format: str,
    path: str | Path,
    image: AnyImage,
    input_size: tuple[int, int, int],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str] = ("logits",),
    more: Mapping[str, Any] | None = None,
    half: bool = False,
    check: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the inference form of a network, for any batch, height and width where the format can have them, and compare.

    Args:
        network: In eval mode. It is left as it is.
        format: One of `FORMATS`.
        path: The file; its folder is created if need be.
        image: A real one to compare on.
        input_size: Channels, height and width that the network is used at.
        classes: Their names, in order.
        mean: Of the pixels, by channel.
        std: Their standard deviation.
        names: Of the outputs.
        more: Is told with the file besides.
        half: Store and compute in float16, for ONNX; inputs and outputs stay float32.
        check: Compare the file with the network. Without, it is written and not run.
        progress: Is told what is done.

    Returns:
        file, format, bytes (of all its files), opset for ONNX, metadata, tolerance, and errors: by size, the largest difference
        relative to the largest value; none without a check, or where the file cannot be run on this machine.

    Raises:
        ValueError: If the name or the network does not fit the format, or the file is not the same function; then nothing is
            left of it, and an earlier file of that name is kept.
        ModuleNotFoundError: If a package that the format needs is missing.
        OSError: If the file cannot be written.
    """
    path, target = Path(path), FORMATS[format]
    if path.suffix != target.suffix:
        raise ValueError(f"{path}: expected a name that ends in {target.suffix} for {format}")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: a folder that is there already: remove it, or choose another name")
    for package in target.packages:
        importlib.import_module(package)
    if half and format != "onnx":
        raise ValueError(f"float16 is for onnx, got {format}: its runtime chooses the type itself")
    if target.fixed and network.free != Exported.free:
        raise ValueError(f"{format} takes images of one size: export without preprocessing, or in another format")
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    about = {"input_size": input_size, "mean": mean, "std": std}
    metadata = {
        "classes": to_json(list(classes)),
        "mean": to_json(list(mean)),
        "std": to_json(list(std)),
        "input_size": to_json(list(input_size)),
        "layout": network.layout if input_size[0] == 3 else network.layout.replace(", RGB", ""),
        "outputs": to_json(list(names)),
        "version": importlib.metadata.version(NAME),
        **{name: to_json(value) for name, value in (more or {}).items()},
    }

    def samples(size: tuple[int, int]) -> list[Tensor]:
        made = network.samples(image, size, about)
        return [images[:1] for images in made] if target.fixed else made

    with atomic_write(*files_of(path, target)) as folder, quietly():
        written = folder / path.name
        progress(f"writing {target.title}")
        form = fuse(network) if target.fused else network
        try:
            windows = getattr(network.network, "mixer_name", "group_mix") != "group_mix"
            size = input_size[1:] if target.fixed else MANY_WINDOWS if windows else SIZES[1]
            target.write(form, samples(size)[1], names, metadata, written)
            if half:
                _to_half(written)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{format} cannot carry this network ({first_line(error)})") from error
        errors = {}
        try:
            run = target.load(written) if check else network
            sizes = [input_size[1:]] if target.fixed else network.sizes(input_size)
            for size in sizes if check and target.runs else ():
                progress(f"comparing at {size[0]} x {size[1]}")
                pairs = [(run(images), network(images)) for images in samples(size)]
                errors[f"{size[0]}x{size[1]}"] = max(_difference(got, expected) for got, expected in pairs)
        except Exception as error:
            raise ValueError(f"{path}: the written file does not run, so it is removed ({first_line(error)})") from error
        if max(errors.values(), default=0) > tolerance:
            found = ", ".join(f"{error:.1e} at {size}" for size, error in errors.items())
            raise ValueError(f"{path}: the file differs from the model by {found}, above {tolerance:g}, so it is removed")
        size_of_all = size_on_disk(written, target)
    result = {"file": str(path), "format": format, "bytes": size_of_all, "errors": errors, "tolerance": tolerance}
    return result | ({"opset": OPSET} if format == "onnx" else {}) | {"metadata": metadata}
