"""Commands that turn what there is into files for other programs: export, convert, push and shards."""

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from .common import (
    EXTRAS,
    AllowNonfinite,
    Json,
    NonNegative,
    Option,
    PathText,
    Positive,
    Reads,
    RunPath,
    Share,
    UsageError,
    Works,
    Writes,
    command,
    note,
    open_run,
    progress,
    show,
    tell,
)

Format = Literal["onnx", "pt2", "aoti", "openvino", "executorch", "coreml", "litert"]
Way = Literal["static", "weights", "dynamic"]
RUNTIMES = ("export", "openvino", "executorch", "coreml", "litert")
CORES = os.cpu_count() or 1
OutFolder = Annotated[Writes[PathText], Option(metavar="DIR", help="folder to write")]


@command("export", "gmf export runs/quickstart --format onnx --out digits.onnx", *RUNTIMES, "quantization", *EXTRAS)
def export(
    run: RunPath,
    *,
    allow_nonfinite: AllowNonfinite = False,
    data: Reads[PathText | None] = None,
    calibrate: Annotated[Reads[PathText | None], Option(metavar="DIR")] = None,
    format: Annotated[Writes[Format | None], Option(metavar="FORMAT")] = None,
    out: Annotated[Writes[PathText], Option(metavar="FILE")],
    features: Writes[bool] = False,
    with_preprocessing: Writes[bool] = False,
    half: Writes[bool] = False,
    check: Writes[bool] = True,
    int8: Writes[Way | None] = None,
    json: Json = False,
) -> None:
    """Write a model for another program, and compare the file with the model.

    Args:
        data: to measure int8 on: data set, or a folder of class folders; the run's own by default
        calibrate: for static int8: images, in class folders or not; the run's training data by default
        format: onnx, pt2 (torch.export), aoti, openvino, executorch, coreml or litert, which docs/export.md tells apart; by
            default that of the ending of FILE
        out: file to write: .onnx, .pt2 (pt2, aoti), .xml (OpenVINO, with a .bin), .pte, .mlpackage or .tflite
        features: a classifier's maps of strides 4, 8, 16 and 32, not the logits
        with_preprocessing: of a classifier: from an image, uint8 (height, width, 3), to probabilities
        half: in float16, for onnx
        check: run the file and compare it with the model (default: yes)
        int8: 8-bit integers, measured beside float32: static for onnx and openvino, weights and dynamic for pt2
    """
    from ..deploy.export import FORMATS
    from ..deploy.quantize import WAYS, table

    endings: dict[str, str] = {target.suffix: name for name, target in reversed(FORMATS.items())}  # .pt2 is torch.export's
    chosen = format or endings.get(Path(out).suffix, "")
    if not chosen:
        raise UsageError(f"--out {out}: expected a name that ends in {', '.join(sorted(endings))}, or --format")
    target = FORMATS[chosen]
    if Path(out).suffix != target.suffix:
        raise UsageError(f"--out {out}: expected a name that ends in {target.suffix} for {chosen}")
    opened, _ = open_run(run, {}, "features", "int8", "with_preprocessing", allow_nonfinite=allow_nonfinite)
    if int8 and chosen not in WAYS[int8]:
        raise UsageError(f"--int8 {int8} is for --format {' and '.join(WAYS[int8])}, got {chosen}")
    if int8 and (features or with_preprocessing or half or not check):
        raise UsageError("--int8 is for the logits of classifiers, whose accuracy it measures: give no other form with it")
    if features and with_preprocessing:
        raise UsageError("--features and --with-preprocessing: expected one of them")
    if half and chosen != "onnx":
        raise UsageError(f"--half is for --format onnx, got {chosen}")
    if int8 and calibrate and int8 != "static":
        raise UsageError(f"--calibrate is for --int8 static: {int8} needs no images")
    for option, value in (("calibrate", calibrate), ("data", data)):
        if value and not int8:
            raise UsageError(f"--{option} is for --int8")
    result = opened.export(
        chosen,
        out,
        features=features,
        with_preprocessing=with_preprocessing,
        half=half,
        check=check,
        int8=int8,
        calibrate=calibrate,
        data=data,
        progress=lambda line: print(f"gmf export: {line}", file=sys.stderr),
    )
    if int8:
        tell(result["notes"], result["skipped"])
        text = f"{out}: {target.title}, int8 {int8}"
        if calibration := result["calibration"]:
            text += f", calibrated on {calibration['images']} images of {calibration['data']}"
        text += f"\n{table(result)}"
    else:
        title = f"ONNX, opset {result['opset']}" if "opset" in result else target.title
        text = f"{out}: {title}, {result['bytes'] / 1e6:.1f} MB"
        if "objects" in result:
            text += f", {result['objects']} objects compared, {result['strays']} without a counterpart"
        differences = ", ".join(f"{error:.1e} at {size}" for size, error in result["errors"].items())
        text += f", largest relative difference {differences}" if differences else ", not compared with the model"
        text += f": a {target.title} cannot be run on this machine" if check and not target.runs else ""
        if "rounding" in result:
            text += f"; probabilities within {result['rounding']:.1e} of gmf predict's"
    show({"run": run, **result}, json, text)


@command("convert", "gmf convert groupmixformer_small.pth --out small", "train")
def convert(
    file: Reads[PathText],
    *,
    allow_nonfinite: AllowNonfinite = False,
    class_names: Annotated[Reads[PathText | None], Option(metavar="FILE")] = None,
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
    from ..files import read_text
    from ..models.checkpoint import load_checkpoint, save_checkpoint

    model: Any = load_checkpoint(file, allow_nonfinite)
    names = read_text(Path(class_names)).splitlines() if class_names else []
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


@command("extract", "gmf extract runs/elastic --width 0.5 --out runs/half", "train")
def extract(
    run: RunPath,
    *,
    width: Annotated[Works[Sequence[Share]], Option(metavar="X")] = (),
    images: Works[NonNegative] = 512,
    threads: Works[Positive] = 1,
    out: OutFolder,
    json: Json = False,
) -> None:
    """Cut smaller classifiers out of one that was trained with elastic, and measure them.

    Each is a checkpoint for every command, in width-0.5 and so on of the folder.

    Args:
        width: shares of the hidden units of its MLPs; those that it was trained with by default
        images: training images on which the statistics of BatchNorm are estimated again for each width; 0 keeps them
        threads: CPU threads with which speed is measured
    """
    from ..bench.timing import Runner, Settings, measure
    from ..files import to_json, write_file
    from ..models.checkpoint import save_checkpoint
    from ..run import Run
    from ..run_folder import RECIPE, SPLIT
    from ..tasks.classification.widths import cut
    from ..training.progress import macs_of

    source = Run.open(run)
    recipe, model = source.recipe, source.load()
    if recipe is None:
        raise ValueError(f"{run}: has no recipe that names its data, by which widths are measured: expected a run folder")
    trained = recipe.elastic
    widths = sorted({*(width or trained)})
    if not widths:
        raise ValueError(f"{run}: was not trained with elastic: train with --elastic '[0.25, 0.5, 1]', or name a --width")
    if others := [x for x in widths if x not in trained and x != 1]:
        note(f"{run}: was not trained at width {others[0]:g}, so expect little of it")
    rows, networks = list[dict[str, Any]](), dict[str, Any]()
    for share in widths:
        smaller, taken = cut(model, share, recipe, source.path / SPLIT, images)
        folder = Path(out) / f"width-{share:g}"
        save_checkpoint(smaller, folder)
        for name in (RECIPE, SPLIT):  # the held-out images are the same
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, folder / name)
        measured = Run.open(folder).evaluate(progress=progress)
        channels, _, side = smaller.pretrained_cfg["input_size"]
        found: dict[str, Any] = {name: measured.result[name] for name in ("top1", "mAP") if name in measured.result}
        rows.append({"width": share, "run": str(folder), "images": taken, **found, "macs": macs_of(smaller, side, channels)})
        networks[str(share)] = smaller
    settings = Settings(size=(side, side), threads=threads, rounds=5)
    builds = {name: partial(Runner, network, settings) for name, network in networks.items()}
    timed = measure(builds, settings, progress)
    for row, speed in zip(rows, timed, strict=True):
        row |= {"parameters": speed["parameters"], "milliseconds": speed["milliseconds"]}
    write_file(Path(out) / "widths.json", to_json(rows, indent=1))
    metric = next(iter(found))
    lines = [f"{'width':>6}  {metric:>7}  parameters    MACs  one image"]
    lines += [
        f"{row['width']:6g}  {row[metric]:7.4f}  {row['parameters'] / 1e6:8.2f} M  {row['macs'] / 1e9:4.2f} G"
        f"  {row['milliseconds']:6.1f} ms"
        for row in rows
    ]
    show({"widths": rows}, json, "\n".join(lines))


@command("push", "gmf push runs/quickstart me/digits --license mit --dry-run card", *EXTRAS)
def push(
    run: RunPath,
    repo_id: Writes[str],
    *,
    allow_nonfinite: AllowNonfinite = False,
    license: Writes[str] = "unknown",
    private: Writes[bool] = False,
    revision: Writes[str | None] = None,
    dry_run: Annotated[Writes[PathText | None], Option(metavar="DIR")] = None,
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
    from ..run_folder import RunFolder

    opened = RunFolder(run, allow_nonfinite)
    if license == "unknown":
        note("the card says that the licence is not known: name that of the weights with --license")
    result = {"run": run, "repo_id": repo_id, "license": license}
    if dry_run:
        files = write_folder(opened, dry_run, repo_id, license)
        show(result | {"folder": dry_run, "files": files}, json, f"{dry_run}: {', '.join(files)}; not uploaded")
        return
    url = push_to_hub(opened, repo_id, license=license, private=private, revision=revision)
    text = f'{url}\ntimm.create_model("hf-hub:{repo_id}", pretrained=True)  # after import groupmixformer'
    show(result | {"commit": url}, json, text)


@command("shards", "gmf shards photos --out shards", "data", "train")
def shards(
    folder: Reads[PathText],
    *,
    val_share: Reads[Share | None] = None,
    seed: Works[NonNegative] = 0,
    workers: Works[Positive] = CORES,
    images_per_shard: Writes[Positive] = 1000,
    out: OutFolder,
    json: Json = False,
) -> None:
    """Turn a folder of images into WebDataset shards.

    Args:
        folder: holds train/ and val/, each with one folder of images per class
        val_share: share of the images to hold out, where there are folders of classes alone
        seed: of the order for training, and of what is held out
        workers: threads, one for each core
        images_per_shard: images in a file
    """
    from ..data.shards import write_shards
    from ..data.split import Splitter
    from ..tasks.classification.data import open_images

    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    splitter = Splitter(val_share, seed=seed) if val_share else None
    images = open_images(folder, splitter=splitter)
    if images.several:
        raise ValueError(f"{folder}: its images have several labels, expected one class each")
    if splitter and not splitter.split:
        raise ValueError(f"{folder}: has a training and a held-out part of its own: leave out --val-share")
    for line in splitter.notes if splitter else ():
        note(line)
    splits = {"train": images.train_source.samples, "validation": images.held_out_source.samples}
    settings: dict[str, Any] = {"per_shard": images_per_shard, "seed": seed, "workers": workers, "progress": progress}
    result = write_shards(Path(folder), splits, images.class_names, Path(out), **settings)
    for line in result["skipped"]:
        note(f"left out {line}")
    text = (
        f"{out}: {result['train']:,} images for training and {result['validation']:,} for validation in "
        f"{result['shards']:,} shards of {len(images.class_names)} classes, {result['bytes'] / 1e9:.2f} GB, "
        f"{len(result['skipped'])} unreadable images left out"
    )
    show({"out": out, **result}, json, text)
