"""Commands that turn what there is into files for other programs: export, convert, push and shards."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from .common import (
    EXTRAS,
    Json,
    NonNegative,
    Option,
    Positive,
    Reads,
    Run,
    UsageError,
    Works,
    Writes,
    command,
    data_of,
    progress,
    show,
)

Format = Literal["onnx", "pt2", "aoti", "openvino"]
Way = Literal["static", "weights", "dynamic"]
CORES = os.cpu_count() or 1
OutFolder = Annotated[Writes[str], Option(metavar="DIR", help="folder to write")]


def _say(line: str) -> None:
    print(f"gmf export: {line}", file=sys.stderr)


def _export_detector(run: str, format: Format, out: str, features: bool) -> dict[str, Any]:
    if features:
        raise UsageError(f"--features is for classification, and {run} holds a model for detection")
    if format != "onnx":
        raise ValueError(f"{run}: {format} cannot carry a detector: export it with --format onnx")
    from ..deploy.export import real_image
    from ..deploy.export_detector import export_detector
    from ..tasks.detection.training import load_detector

    detector, stored = load_detector(run)
    return export_detector(detector, out, real_image(Path(run)), stored["class_names"], _say)


def _to_export(run: str, task: str, format: Format, features: bool) -> tuple[Any, dict[str, Any]]:
    """Return the network of a run as it is exported, and what is written beside it."""
    from ..deploy.export import Exported
    from ..models.checkpoint import load_checkpoint
    from ..tasks.classification.predict import class_names, data_config

    if task == "segmentation":
        if features:
            raise UsageError(f"--features is for classification, and {run} holds a model for {task}")
        from ..tasks.segmentation.training import load_segmenter

        segmenter, stored = load_segmenter(run)
        pools = any(getattr(module, "output_size", 1) not in (1, (1, 1)) for module in segmenter.modules())
        if format == "openvino" or (format == "onnx" and pools):  # UPerNet averages over grids of fixed size
            what = "a decoder that pools to a grid, such as UPerNet's" if format == "onnx" else "a segmenter"
            raise ValueError(f"{run}: {format} cannot carry {what} for all sizes: export it with --format pt2")
        about = {"input_size": (3, segmenter.image_size, segmenter.image_size), "classes": stored["class_names"]}
        return Exported(segmenter).eval(), about | {"mean": segmenter.mean, "std": segmenter.std}
    model: Any = load_checkpoint(run)
    about = {key: value for key, value in data_config(model).items() if key in ("input_size", "mean", "std")}
    if features:
        about["names"] = [f"stride{2 ** (stage + 2)}" for stage in range(len(model.stages))]
    return Exported(model, features).eval(), about | {"classes": [] if features else class_names(model)}


@command("export", "gmf export runs/quickstart --format onnx --out digits.onnx", "export", "openvino", "quantization", *EXTRAS)
def export(
    run: Run,
    *,
    data: Reads[str | None] = None,
    calibrate: Annotated[Reads[str | None], Option(metavar="DIR")] = None,
    format: Writes[Format],
    out: Annotated[Writes[str], Option(metavar="FILE")],
    features: Writes[bool] = False,
    int8: Writes[Way | None] = None,
    json: Json = False,
) -> None:
    """Write a model for another program, and compare the file with the model.

    Args:
        data: to measure int8 on: data set, or a folder of class folders; the run's own by default
        calibrate: for static int8: images, in class folders or not; the run's training data by default
        format: docs/export.md tells them apart
        out: file to write: .onnx, .pt2 (pt2, aoti) or .xml (OpenVINO, with a .bin)
        features: a classifier's maps of strides 4, 8, 16 and 32, not the logits
        int8: 8-bit integers, measured beside float32: static for onnx and openvino, weights and dynamic for pt2
    """
    from ..deploy.export import FORMATS, real_image
    from ..deploy.export import export as write_export
    from ..models.checkpoint import task_of

    suffix = FORMATS[format].suffix
    if Path(out).suffix != suffix:
        raise UsageError(f"--out {out}: expected a name that ends in {suffix} for {format}")
    if int8:
        _export_int8(run, format, out, int8, calibrate, data, features, json)
        return
    for option, value in (("calibrate", calibrate), ("data", data)):
        if value:
            raise UsageError(f"--{option} is for --int8")
    task = task_of(run)
    if task == "detection":
        result = _export_detector(run, format, out, features)
        what = f"ONNX, opset {result['opset']}, {result['bytes'] / 1e6:.1f} MB, {result['objects']} objects compared, "
        what += f"{result['strays']} without a counterpart"
    else:
        network, about = _to_export(run, task, format, features)
        result = write_export(network, format, out, real_image(Path(run)), progress=_say, **about)
        what = f"{FORMATS[format].title}, {result['bytes'] / 1e6:.1f} MB"
    text = f"{out}: {what}, largest relative difference "
    text += ", ".join(f"{error:.1e} at {size}" for size, error in result["errors"].items())
    show({"run": run, **result}, json, text)


def _export_int8(
    run: str, format: Format, out: str, way: Way, calibrate: str | None, data: str | None, features: bool, json: bool
) -> None:
    from ..deploy.export import FORMATS, real_image
    from ..deploy.quantize import WAYS, from_data, from_folder, quantize, table
    from ..models.checkpoint import task_of
    from ..tasks.classification.data import eval_loader, open_images
    from ..tasks.classification.predict import data_config

    if format not in WAYS[way]:
        raise UsageError(f"--int8 {way} is for --format {' and '.join(WAYS[way])}, got {format}")
    if calibrate and way != "static":
        raise UsageError(f"--calibrate is for --int8 static: {way} needs no images")
    if features or task_of(run) != "classification":
        raise UsageError("--int8 is for the logits of classifiers, whose accuracy it measures")
    network, about = _to_export(run, "classification", format, features)
    config = data_config(network.network)
    own_data = way == "static" and not calibrate
    if own_data and not Path(run, "recipe.yaml").is_file():
        raise ValueError(f"{run}: has no recipe that names its training data: name a folder of images with --calibrate")
    root = "data"
    if data is None:
        data, root = data_of(run)
    images = open_images(data, root, need_train=False)
    if len(images.class_names) != len(about["classes"]):
        raise ValueError(
            f"{data} has {len(images.class_names)} classes and the model {len(about['classes'])}, expected the same"
        )
    calibration, source = None, calibrate or ""
    skipped: list[str] = []
    if own_data:
        source, root = data_of(run)
        calibration, skipped = from_data(open_images(source, root).train, config, source)
    elif calibrate:
        calibration, skipped = from_folder(source, config)
    result = quantize(
        network,
        format,
        way,
        out,
        real_image(Path(run)),
        eval_loader(images.held_out, config),
        calibration,
        source,
        about,
        _say,
    )
    for problem in (*skipped, *result["skipped"]):
        print(f"gmf export: skipped {problem}", file=sys.stderr)
    text = f"{out}: {FORMATS[format].title}, int8 {way}"
    text += f", calibrated on {result['calibration']['images']} images of {source}" if source else ""
    show({"run": run, **result, "data": data}, json, f"{text}\n{table(result)}")


@command("convert", "gmf convert groupmixformer_small.pth --out small", "train")
def convert(
    file: Reads[str],
    *,
    class_names: Annotated[Reads[str | None], Option(metavar="FILE")] = None,
    image_size: Writes[Positive | None] = None,
    out: OutFolder,
    json: Json = False,
) -> None:
    """Turn a checkpoint into a folder that timm and transformers read.

    Args:
        file: a released .pth or any checkpoint that load_checkpoint reads
        class_names: text file with a class name a line
        image_size: image size to store, such as 384 for large trained at 384
    """
    from ..models.checkpoint import load_checkpoint, save_checkpoint

    model: Any = load_checkpoint(file)
    names = Path(class_names).read_text().splitlines() if class_names else []
    if names and len(names) != model.num_classes:
        raise ValueError(f"{class_names}: holds {len(names)} lines, expected one for each of {model.num_classes} classes")
    config = {"input_size": (model.in_chans, image_size, image_size)} if image_size else {}
    save_checkpoint(model, out, names, config)
    result = {"out": out, "architecture": model.pretrained_cfg["architecture"], "num_classes": model.num_classes}
    show(
        result,
        json,
        f"{out}: {result['architecture']}, {result['num_classes']} classes\n"
        f'timm.create_model("local-dir:{out}", pretrained=True)  # after import groupmixformer',
    )


@command("push", "gmf push runs/quickstart me/digits --license mit --dry-run card", *EXTRAS)
def push(
    run: Run,
    repo_id: Writes[str],
    *,
    license: Writes[str] = "unknown",
    private: Writes[bool] = False,
    revision: Writes[str | None] = None,
    dry_run: Annotated[Writes[str | None], Option(metavar="DIR")] = None,
    json: Json = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with a card.

    Args:
        repo_id: user/name; created if need be
        license: of the weights, such as mit or apache-2.0
        private: make a new repository private
        revision: branch to upload to; main by default
        dry_run: write what would be uploaded to a new folder, and stop
    """
    from ..deploy.hub import push_to_hub, write_folder

    if license == "unknown":
        print("gmf push: the card says that the licence is not known: name that of the weights with --license", file=sys.stderr)
    result = {"run": run, "repo_id": repo_id, "license": license}
    if dry_run:
        files = write_folder(run, dry_run, repo_id, license)
        show(result | {"folder": dry_run, "files": files}, json, f"{dry_run}: {', '.join(files)}; not uploaded")
        return
    url = push_to_hub(run, repo_id, license=license, private=private, revision=revision)
    text = f'{url}\ntimm.create_model("hf-hub:{repo_id}", pretrained=True)  # after import groupmixformer'
    show(result | {"commit": url}, json, text)


@command("shards", "gmf shards photos --out shards", "data")
def shards(
    folder: Reads[str],
    *,
    seed: Works[NonNegative] = 0,
    workers: Works[Positive] = CORES,
    images_per_shard: Writes[Positive] = 1000,
    out: OutFolder,
    json: Json = False,
) -> None:
    """Turn a folder of images into WebDataset shards.

    Args:
        folder: holds train/ and val/, each with one folder of images per class
        seed: of the order for training
        workers: threads, one for each core
        images_per_shard: images in a file
    """
    from ..data.shards import write_shards
    from ..tasks.classification.data import open_images

    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    images = open_images(folder)
    splits = {"train": images.train.source.reader.samples, "validation": images.held_out.source.reader.samples}
    settings: dict[str, Any] = {"per_shard": images_per_shard, "seed": seed, "workers": workers, "progress": progress}
    result = write_shards(Path(folder), splits, images.class_names, Path(out), **settings)
    for line in result["skipped"]:
        print(f"gmf shards: left out {line}", file=sys.stderr)
    text = (
        f"{out}: {result['train']:,} images for training and {result['validation']:,} for validation in "
        f"{result['shards']:,} shards of {len(images.class_names)} classes, {result['bytes'] / 1e9:.2f} GB, "
        f"{len(result['skipped'])} unreadable images left out"
    )
    show({"out": out, **result}, json, text)
