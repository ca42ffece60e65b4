"""The exported network in 8-bit integers, measured beside the exact one.

Both files run on the same data in the program that they are for, and are timed in turns. A file that is slower or less accurate
is written all the same, and what is lost is said.
"""

import contextlib
import importlib
import io
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..bench.timing import Settings, machine, seconds_of, set_threads
from ..data.channels import AnyImage, Channels
from ..data.images import find_images
from ..files import atomic_write, to_json
from ..models.fuse import fuse
from ..tasks.classification.data import ImageSamples, eval_transform
from ..tasks.classification.metrics import evaluate_classifier
from .export import (
    FORMATS,
    SIZES,
    Exported,
    Outputs,
    export,
    files_of,
    first_line,
    leave_open,
    quietly,
    save_openvino,
    save_program,
    size_on_disk,
    to_program,
)

WAYS = {"static": ("onnx", "openvino"), "weights": ("pt2",), "dynamic": ("pt2",)}  # and the formats that can carry them
PACKAGES = {"onnx": "onnxruntime.quantization", "openvino": "nncf", "pt2": "torchao"}
IMAGES = 128  # to calibrate on
POINTS = 0.01  # of top-1, as a share: losing more is said
BATCH = 16  # timed beside a single image
SETTINGS = Settings()  # of the timing: one CPU thread
KINDS = ("Conv", "Gemm", "MatMul")  # of ONNX


def _draw(number: int, read: Callable[[int], Tensor], name: str) -> tuple[Tensor, list[str]]:
    """Return up to IMAGES readable ones of so many, the same ones each time, and a line for each that could not be read."""
    images: list[Tensor] = []
    problems: list[str] = []
    for index in random.Random(0).sample(range(number), number):
        try:
            images.append(read(index))
        except ValueError as error:
            problems.append(str(error))
        if len(images) == IMAGES:
            break
    if not images:
        raise ValueError(f"{name}: none of {number} images to calibrate on could be read: {problems[0]}")
    return torch.stack(images), problems


def from_folder(folder: str, config: Mapping[str, Any], channels: Channels | None = None) -> tuple[Tensor, list[str]]:
    """Draw images to calibrate on from a folder, however deep they lie.

    Args:
        folder: It needs no classes.
        config: How to resize and crop them.
        channels: How they are read.

    Returns:
        Images (N, C, H, W), N up to IMAGES, and a line for each image drawn that could not be read.

    Raises:
        ValueError: If the folder holds no readable image.
    """
    paths = find_images([folder]) if Path(folder).is_dir() else []
    if paths in ([], [Path(folder)]):
        raise ValueError(f"{folder}: no folder with images, expected one to calibrate on")
    transform, reading = eval_transform(dict(config)), channels or Channels()
    return _draw(len(paths), lambda index: transform(reading.read(paths[index])), folder)


def from_data(images: Any, name: str) -> tuple[Tensor, list[str]]:
    """Draw images to calibrate on from a data set, whose transform is that of evaluations, as `from_folder` does.

    Raises:
        ValueError: If it is a stream, of which no images can be chosen, or has no readable image.
    """
    if not isinstance(images, ImageSamples):
        raise ValueError(f"{name}: is a stream, from which no images can be drawn: name a folder with --calibrate")
    return _draw(len(images), lambda index: images.for_evaluation(images.read(index))[0], name)


def _quantize_onnx(exact: Path, images: Tensor, metadata: Mapping[str, str], path: Path) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images.split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    graph = onnx.load(exact)
    shapes = {weight.name: weight.dims for weight in graph.graph.initializer}
    # Linear layers and dense convolutions. With depthwise convolutions too, more predictions change; with the products of Q, K
    # and V on top, it is not faster.
    layers = [
        node.name
        for node in graph.graph.node
        if node.op_type in KINDS and node.input[1] in shapes and shapes[node.input[1]][1] > 1
    ]
    quantize_static(
        exact,
        path,
        Batches(),
        op_types_to_quantize=list(KINDS),
        nodes_to_quantize=layers,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},  # what follows computes in float32
    )
    written = onnx.load(path)
    onnx.helper.set_model_props(written, dict(metadata))
    onnx.save(written, path)


def _quantize_openvino(exact: Path, images: Tensor, metadata: Mapping[str, str], path: Path) -> None:
    import nncf
    import openvino

    batches = nncf.Dataset([batch.numpy() for batch in images.split(1)])
    model = openvino.Core().read_model(exact)
    # With other sizes than those of the calibration OpenVINO (2026.4) fails at int8, so they are fixed.
    model.reshape([-1, *images.shape[1:]])
    model = nncf.quantize(
        model,
        batches,
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    save_openvino(model, metadata, path)


def _quantize_pt2(network: nn.Module, way: str, metadata: Mapping[str, str], images: Tensor, path: Path) -> None:
    """Write all linear layers of the fused network, the pointwise convolutions among them, with weights of 8 bits."""
    from torch._inductor.decomposition import decompositions
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    config = {"weights": Int8WeightOnlyConfig, "dynamic": Int8DynamicActivationInt8WeightConfig}[way]
    fused = fuse(network)
    quantize_(fused, config(set_inductor_config=False))
    program = to_program(unwrap_tensor_subclass(fused), images)
    if way == "dynamic":  # in PyTorch's own operators, so that the file runs without torchao
        own = {operator: function for operator, function in decompositions.items() if operator.namespace == "torchao"}
        program = leave_open(program.run_decompositions(own))
    save_program(program, metadata, path)


def _try(network: Exported, path: Path, format: str, out: Path, image: AnyImage, about: Mapping[str, Any]) -> None:
    """Run a file at every size that exported files are compared at; for OpenVINO, at the model's own.

    Raises:
        ValueError: If it does not run, or gives something else than finite logits.
    """
    classes = len(about["classes"])
    try:
        run = FORMATS[format].load(path)
        for size in network.sizes(about["input_size"])[: 1 if format == "openvino" else None]:
            for images in network.samples(image, size, about):
                (logits,) = run(images)
                assert logits.shape == (len(images), classes) and logits.isfinite().all(), f"no logits at {size}"
    except Exception as error:
        raise ValueError(f"{out}: the int8 file does not run, so it is removed ({first_line(error)})") from error


class _Opened(nn.Module):
    """A file as `evaluate` takes a classifier."""

    def __init__(self, run: Callable[[Tensor], Outputs]) -> None:
        super().__init__()
        # No module, as those of torch.export refuse eval().
        self.run: Callable[[Tensor], Tensor] = lambda images: run(images)[0]
        self.device = nn.Parameter(torch.empty(0))  # tells where it runs: on the CPU

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def verdict(exact: Mapping[str, Any], int8: Mapping[str, Any]) -> list[str]:
    """Say in lines what speaks against the int8 form; none if nothing does.

    Args:
        exact: The row of `quantize` of the float32 form.
        int8: That of the int8 form.
    """
    lines = []
    loss = round(exact["top1"] - int8["top1"], 9)
    if loss > POINTS:
        lines.append(f"int8 loses {100 * loss:.1f} points of top-1, more than {100 * POINTS:g}")
    for key, what in (("milliseconds", "on one image"), (f"milliseconds_{BATCH}", f"on {BATCH} images")):
        if int8[key] > exact[key]:
            lines.append(f"int8 is slower {what}: {int8[key]:.1f} ms instead of {exact[key]:.1f}")
    if int8["bytes"] > exact["bytes"]:
        lines.append(f"int8 is larger: {int8['bytes'] / 1e6:.1f} MB instead of {exact['bytes'] / 1e6:.1f}")
    return lines


def _measure(
    paths: Mapping[str, Path], format: str, size: Sequence[int], held_out: DataLoader[Any], progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each file, the exact one first, and a line for each image that could not be read."""
    target, settings = FORMATS[format], SETTINGS
    rows: list[dict[str, Any]] = []
    with set_threads(settings.threads):
        opened = {form: target.load(path) for form, path in paths.items()}
        expected = None
        for form, run in opened.items():
            progress(f"evaluating {form}")
            found = evaluate_classifier(_Opened(run).eval(), held_out)
            expected = found.predicted if expected is None else expected
            agreement = (found.predicted == expected).double().mean().item()
            row: dict[str, Any] = {
                "form": form,
                "top1": found.metrics["top1"],
                "agreement": agreement,
                "images": found.metrics["images"],
            }
            rows.append({**row, "bytes": size_on_disk(paths[form], target)})
        progress("timing")
        for key, batch in (("milliseconds", 1), (f"milliseconds_{BATCH}", BATCH)):
            images = torch.randn(batch, *size)
            seconds: dict[str, list[float]] = {form: [] for form in opened}
            for run in opened.values():
                run(images)
            for _ in range(settings.rounds):
                for form, run in opened.items():
                    seconds[form].append(seconds_of(lambda: run(images), settings, settings.seconds))  # noqa: B023
            for measured in rows:
                measured[key] = 1000 * statistics.median(seconds[measured["form"]])
    return rows, found.problems


@torch.no_grad()
def quantize(
    network: Exported,
    format: str,
    way: str,
    path: str | Path,
    image: AnyImage,
    held_out: DataLoader[Any],
    calibration: Tensor | None,
    calibrated_on: str,
    about: Mapping[str, Any],
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a classifier in 8-bit integers, and measure it beside the exact file of the same format.

    Args:
        network: In eval mode, giving logits. It is left as it is.
        format: onnx or openvino for static, pt2 for weights and dynamic.
        way: static (weights and activations, whose ranges come from images), weights, or dynamic (weights, and activations by
            the range that they have).
        path: The file.
        image: A real one to try the file on.
        held_out: Batches to measure the accuracy on.
        calibration: For static, images (N, C, H, W).
        calibrated_on: Where they come from, to be told with the file.
        about: input_size, classes, mean and std, as `export` takes them.
        progress: Is told what is done.

    Returns:
        file, format, int8 (the way), calibration (data and images; none where it needs none), rows for the forms float32 and
        int8 (top1 and agreement with float32's predictions as shares; images; bytes; processor time in milliseconds for one
        image and, as milliseconds_16, for 16 at once, medians of rounds in turns), verdict, threads, machine, skipped (a line
        for each image that could not be read) and metadata.

    Raises:
        ValueError: If the format cannot carry the network, or the file does not run; then nothing is left of it.
        ModuleNotFoundError: If a package is missing.
        OSError: If the file cannot be written.
    """
    path, target = Path(path), FORMATS[format]
    assert format in WAYS[way] and (calibration is not None) == (way == "static")
    importlib.import_module(PACKAGES[format])
    with atomic_write(*files_of(path, target)) as folder:
        exact, written = folder / "float32" / path.name, folder / path.name
        metadata = export(network, format, exact, image, **about, progress=progress)["metadata"]
        name = Path(calibrated_on).resolve().name if Path(calibrated_on).exists() else calibrated_on  # not whose disk it is on
        source = {"data": name, "images": len(calibration)} if calibration is not None else None
        metadata = metadata | {"int8": to_json({"way": way, "calibration": source})}
        progress(f"writing 8-bit integers: {way}")
        with quietly(), contextlib.redirect_stdout(io.StringIO()):  # where nncf draws its bars
            try:
                if calibration is None:
                    _quantize_pt2(network, way, metadata, torch.randn(2, about["input_size"][0], *SIZES[1]), written)
                else:
                    {"onnx": _quantize_onnx, "openvino": _quantize_openvino}[format](exact, calibration, metadata, written)
            except OSError:
                raise
            except Exception as error:
                raise ValueError(f"{format} cannot carry this network as int8 {way} ({first_line(error)})") from error
            _try(network, written, format, path, image, about)
            rows, skipped = _measure({"float32": exact, "int8": written}, format, about["input_size"], held_out, progress)
    result = {"file": str(path), "format": format, "int8": way, "calibration": source, "rows": rows, "verdict": verdict(*rows)}
    return result | {"threads": SETTINGS.threads, "machine": machine(SETTINGS), "skipped": skipped, "metadata": metadata}


def table(result: Mapping[str, Any]) -> str:
    """Show what `quantize` measured, and its verdict."""
    lines = [f"{'':8}{'top-1':>9}{'as float32':>12}{'size':>10}{'1 image':>12}{f'{BATCH} images':>13}"]
    for row in result["rows"]:
        times = (row["milliseconds"], row[f"milliseconds_{BATCH}"])
        lines.append(
            f"{row['form']:8}{row['top1']:>9.2%}{row['agreement']:>12.2%}{row['bytes'] / 1e6:>7.1f} MB"
            f"{times[0]:>9.1f} ms{times[1]:>10.1f} ms"
        )
    lines.append(f"on {result['rows'][0]['images']:,} images; processor time, {result['machine']}")
    return "\n".join([*lines, *result["verdict"]])
