"""What the commands of gmf do. Results go to stdout, progress to stderr; imports wait for the command that needs them."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Wrong usage: exit 2."""


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


def _progress(items: Any, what: str, total: int | None = None) -> Any:
    """Show a bar on a terminal; the total is the number of items where that is known."""
    from tqdm import tqdm

    return tqdm(items, what, total, disable=None, leave=False)


def _device(name: str) -> Any:
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def models(args: argparse.Namespace) -> None:
    """List the variants."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..bench.published import PUBLISHED_TOP1

    rows = []
    for name in timm.list_models("groupmixformer*"):
        with torch.device("meta"):
            model: Any = timm.create_model(name).eval()
            size = model.pretrained_cfg["input_size"]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, *size))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(
            {
                "name": name,
                "parameters": parameters,
                "macs": counter.get_total_flops() // 2,
                "input_size": list(size),
                "published_top1": PUBLISHED_TOP1[name],
            }
        )
    rows.sort(key=lambda row: row["macs"])
    table = [f"{'name':27}{'parameters':>12}{'MACs':>10}{'input':>8}{'published top-1':>17}"]
    table += [
        f"{r['name']:27}{r['parameters'] / 1e6:>10.2f} M{r['macs'] / 1e9:>8.2f} G{r['input_size'][1]:>8}"
        f"{r['published_top1']:>15.1f} %"
        for r in rows
    ]
    _show({"models": rows}, args.json, "\n".join(table))


def _finish(folder: Path, images: Any, seconds: float, device: str) -> dict[str, Any]:
    """Evaluate the run's best model, write the report and say where things are."""
    from ..models.checkpoint import load_model
    from ..tasks.classification.data import eval_loader
    from ..tasks.classification.metrics import evaluate
    from ..tasks.classification.predict import data_config
    from ..tasks.classification.report import save_examples, write_report

    model = load_model(folder).to(_device(device))
    config = data_config(model)
    evaluation = evaluate(model, eval_loader(images.held_out, config))
    report = write_report(folder, model.cpu(), images.held_out, images.class_names, evaluation, config)
    examples = save_examples(folder, images.held_out, images.class_names)
    return {
        "run": str(folder),
        "report": str(report),
        "examples": [str(path) for path in examples],
        "seconds": round(seconds, 1),
        **evaluation.metrics,
        "skipped": evaluation.problems,
    }


def _finish_scenes(folder: Path, recipe: Any, seconds: float) -> tuple[dict[str, Any], str]:
    """Measure the run's best detector or segmenter and write the report."""
    from ..tasks.predictor import Objects, Segments

    made = Objects if recipe.task == "detection" else Segments
    scenes = made(folder, _device(recipe.device), None, None)
    images = scenes.open(recipe.data, "val")
    measured = scenes.evaluate(images, recipe.workers, _progress)
    report = scenes.report(folder, images, measured)
    result = {"run": str(folder), "report": str(report), "seconds": round(seconds, 1), **measured.result}
    text = (
        f"{measured.text}\non {measured.result['images']:,} held-out images after {seconds:.0f} s\n"
        f"run    {folder}\nreport {report}"
    )
    return result | {"skipped": measured.skipped}, text


def _train(name: str, options: Sequence[str], resume: bool) -> tuple[dict[str, Any], str]:
    """Train, and on the first process evaluate and report."""
    import time

    from ..training.recipe import RecipeError, read_recipe

    try:
        recipe = read_recipe(name, options)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    from ..tasks.classification.data import open_images
    from ..training.callbacks import Stopped
    from ..training.trainer import is_first_process, train

    start = time.monotonic()
    try:
        folder = train(recipe, resume)
    except Stopped as stop:
        if is_first_process():
            again = f"gmf train {shlex.quote(str(Path(recipe.out, 'recipe.yaml')))} --resume"
            print(f"gmf: stopped by {stop} and saved: continue with {again}", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None
    if not is_first_process():
        raise SystemExit(0)
    seconds = time.monotonic() - start
    if recipe.task != "classification":
        return _finish_scenes(folder, recipe, seconds)
    result = _finish(folder, open_images(recipe.data, recipe.root, need_train=False), seconds, recipe.device)
    text = (
        f"top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  loss {result['loss']:.4f}  "
        f"on {result['images']:,} held-out images after {result['seconds']:.0f} s\n"
        f"run    {result['run']}\nreport {result['report']}"
    )
    return result, text


def quickstart(args: argparse.Namespace) -> None:
    """Train, evaluate, report, and name the next commands."""
    recipe = "digits" if args.data == "digits" else "folder"
    out = args.out or next(name for i in itertools.count(1) if not Path(name := f"runs/quickstart{f'-{i}' * (i > 1)}").exists())
    options = ["--out", out, "--data", args.data, "--model", args.variant]
    options += ["--epochs", str(args.epochs)] if args.epochs else []
    result, text = _train(recipe, options, resume=False)
    run, examples = shlex.quote(result["run"]), " ".join(shlex.quote(path) for path in result["examples"])
    data = "" if args.data == recipe else f" --data {shlex.quote(args.data)}"
    again = f"gmf train {recipe}{data} --model {args.variant} --epochs 20 --out {run}-20"
    result["next"] = [f"gmf predict {run} {examples}", again]
    _show(result, args.json, text + "\n\nNext, try\n  " + "\n  ".join(result["next"]))


def train(args: argparse.Namespace) -> None:
    """Train by a recipe."""
    if args.print:
        from ..training.recipe import RecipeError, fields_of, read_recipe, to_yaml

        try:
            recipe = read_recipe(args.recipe, args.options)
        except RecipeError as error:
            raise UsageError(str(error)) from error
        _show(fields_of(recipe), args.json, to_yaml(recipe).rstrip())
        return
    result, text = _train(args.recipe, args.options, args.resume)
    _show(result, args.json, text)


# Options of gmf eval, predict and serve that mean something to some tasks only.
OPTIONS = {
    "classification": ("test_size", "crop_pct", "crop_mode", "interpolation", "plot", "batch_size", "root", "top", "max_batch"),
    "detection": ("split", "out", "score"),
    "segmentation": ("split", "out", "slide", "scales", "flip"),
}


def _task(args: argparse.Namespace) -> str:
    """Return the task of the model that is named, and refuse options that it has no use for."""
    from ..models.checkpoint import task_of

    task = task_of(args.run)
    for option in {name for names in OPTIONS.values() for name in names} - {*OPTIONS[task]}:
        if getattr(args, option, None) not in (None, False):
            tasks = " and ".join(other for other, names in OPTIONS.items() if option in names)
            raise UsageError(f"--{option.replace('_', '-')} is for {tasks}, and {args.run} holds a model for {task}")
    return task


def _precision(name: str) -> Any:
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _data_of(run: str) -> tuple[str, str]:
    """Return the data set that a run was trained on, and its root."""
    recipe = Path(run, "recipe.yaml")
    if not recipe.is_file():
        raise ValueError(f"{run}: has no recipe that names a data set: name one with --data")
    from ..training.recipe import read_recipe

    stored = read_recipe(str(recipe))
    return stored.data, stored.root


def _open(run: str, args: argparse.Namespace, task: str, precision: str = "fp32") -> Any:
    """Return the model of a run, ready to look at images as `args` say: its `predict` takes one."""
    if task == "classification":
        from ..tasks.classification.predict import Classes

        return Classes(run, _device(args.device), args.image_size, args.top or 5)
    from ..tasks.predictor import Objects, Segments

    settings = (run, _device(args.device), args.image_size, _precision(precision))
    if task == "detection":
        return Objects(*settings)
    return Segments(*settings, slide=args.slide, scales=args.scales or [1.0], flip=args.flip)


def _evaluate_scenes(args: argparse.Namespace, task: str) -> None:
    scenes = _open(args.run, args, task, args.precision)
    data, split = args.data or _data_of(args.run)[0], args.split or "val"
    measured = scenes.evaluate(scenes.open(data, split), args.workers, _progress)
    for problem in measured.skipped:
        print(f"gmf eval: skipped {problem}", file=sys.stderr)
    rates = "{images_per_second:.2f} images/s with loading, {model_images_per_second:.2f} the model alone"
    text = f"{measured.text}\non {measured.result['images']:,} images of {split}\n{rates.format(**measured.result)}"
    result = {"run": args.run, "task": task, "data": data, "split": split, **measured.result, "precision": args.precision}
    _show(result | {"skipped": measured.skipped}, args.json, f"{text}\n\n{measured.table}" if args.per_class else text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure a model on a data set."""
    task = _task(args)
    if task != "classification":
        _evaluate_scenes(args, task)
        return

    from ..models.checkpoint import load_model
    from ..tasks.classification.data import eval_loader, open_images
    from ..tasks.classification.metrics import evaluate as evaluate_model
    from ..tasks.classification.metrics import per_class, reliability
    from ..tasks.classification.predict import data_config

    if args.plot:
        from ..tasks.classification.report import reliability_diagram  # before the work, in case that matplotlib is missing
        from ..visual.figures import write_figure

        args.plot.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.run).to(_device(args.device))
    data, root = (args.data, args.root or "data") if args.data else _data_of(args.run)
    images = open_images(data, root, need_train=False)
    if len(images.class_names) != model.num_classes:
        raise ValueError(f"{data} has {len(images.class_names)} classes and the model {model.num_classes}, expected the same")
    if args.test_size and not any(model.pretrained_cfg.get(key) for key in ("test_input_size", "test_crop_pct")):
        print(f"gmf eval: {args.run} stores no size or crop for tests: its usual ones are used", file=sys.stderr)
    crop = {"crop_pct": args.crop_pct, "crop_mode": args.crop_mode, "interpolation": args.interpolation}
    config = data_config(model, args.image_size, args.test_size, **crop)
    batch_size = args.batch_size or 64
    loader = eval_loader(images.held_out, config, batch_size, args.workers)
    evaluation = evaluate_model(model, _progress(loader, "evaluating"), _precision(args.precision))
    for problem in evaluation.problems:
        print(f"gmf eval: skipped {problem}", file=sys.stderr)
    if args.plot:
        write_figure(reliability_diagram(evaluation), args.plot)

    metrics, classes = evaluation.metrics, per_class(evaluation, images.class_names)
    height, width = config["input_size"][1:]
    lines = [
        f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}  "
        f"calibration error {metrics['calibration_error']:.2%}  on {metrics['images']:,} images",
        f"{height} x {width}, crop {config['crop_pct']:g} {config['crop_mode']}, {config['interpolation']}, {args.precision}",
        f"{metrics['images_per_second']:.1f} images/s with loading, {metrics['model_images_per_second']:.1f} the model alone",
    ]
    if args.per_class:
        # Worst first; classes without images, which have no accuracy, last.
        ranked = sorted(classes, key=lambda row: (row["top1"] is None, row["top1"]))
        length = max(len(name) for name in ("class", *images.class_names))
        lines += [f"\n{'class':{length}}{'images':>8}{'top-1':>9}"]
        lines += [
            f"{row['class']:{length}}{row['images']:>8,}{'-' if row['top1'] is None else format(row['top1'], '.2%'):>9}"
            for row in ranked
        ]
    result = {
        "run": args.run,
        "data": data,
        **metrics,
        "skipped": evaluation.problems,
        **{key: config[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")},
        "precision": args.precision,
        "device": str(next(model.parameters()).device),
        "batch_size": batch_size,
        "plot": str(args.plot) if args.plot else None,
        "per_class": classes,
        "reliability": reliability(evaluation),
    }
    _show(result, args.json, "\n".join(lines))


def _read(paths: Sequence[Path], command: str, skipped: list[str]) -> Iterator[tuple[Path, Any]]:
    """Read images one by one, with their paths; those that cannot be read are reported and added to `skipped`."""
    from ..data.images import read_image

    for path in _progress(paths, command, len(paths)):
        try:
            image = read_image(path)
        except ValueError as error:
            skipped.append(str(path))
            print(f"gmf {command}: skipped {error}", file=sys.stderr)
            continue
        yield path, image
    if len(skipped) == len(paths):
        raise ValueError(f"none of {len(paths)} images could be read")


def predict(args: argparse.Namespace) -> None:
    """Classify images, or find objects or segments in them."""
    from ..data.images import find_images
    from ..files import write_prediction

    task = _task(args)
    model, out = _open(args.run, args, task), Path(args.out or "predictions")
    images: list[dict[str, Any]] = []
    coco: list[dict[str, Any]] = []
    skipped: list[str] = []
    lines: list[str] = []
    paths = find_images(args.images)
    taken = {path.resolve() for path in paths}
    for path, image in _read(paths, "predict", skipped):
        found = model.predict(image, str(path), 0.5 if args.score is None else args.score)
        images.append({"image": str(path), **found.result})
        lines.append(f"{path}: {found.text}")
        coco += found.results
        if found.files:
            images[-1]["files"] = write_prediction(out, path, found.files, taken)
            lines[-1] += f"  ({', '.join(images[-1]['files'])})"
    result: dict[str, Any] = {"run": args.run, "task": task, "images": images, "skipped": skipped}
    if task == "detection":
        from ..tasks.predictor import write_results

        result["coco_results"] = write_results(out, coco)
        lines.append(f"COCO results: {result['coco_results']}")
    _show(result, args.json, "\n".join(lines))


def explain(args: argparse.Namespace) -> None:
    """Show what positions of images attend to, and what speaks for a class, an object or a segment."""
    from ..models.checkpoint import task_of

    task = task_of(args.run)
    for option, value, tasks in (
        ("--class", args.wanted_class, ("classification", "segmentation")),
        ("--object", args.wanted_object, ("detection",)),
    ):
        if value is not None and task not in tasks:
            raise UsageError(f"{option} is for {' and '.join(tasks)}, and {args.run} holds a model for {task}")
    from ..data.images import find_images
    from ..files import write_prediction
    from ..tasks.explainer import open_explainer

    explainer = open_explainer(args.run, _device(args.device), args.image_size, args.wanted_class, args.wanted_object)
    images: list[dict[str, Any]] = []
    skipped: list[str] = []
    lines: list[str] = []
    paths = find_images(args.images)
    taken = {path.resolve() for path in paths}
    for path, image in _read(paths, "explain", skipped):
        try:
            found = explainer.explain(image, args.query or (), args.stage or (), args.format)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        figure, arrays = write_prediction(Path(args.out), path, found.files, taken)
        images.append({"image": str(path), **found.result, "figure": figure, "arrays": arrays})
        lines.append(f"{path}: {found.text}  ({figure}, {arrays})")
    _show({"run": args.run, "task": task, "images": images, "skipped": skipped}, args.json, "\n".join(lines))


def serve(args: argparse.Namespace) -> None:
    """Answer over HTTP: POST an image, get JSON."""
    from ..deploy.serve import Limits, application, listen, server, service
    from ..models.fuse import fuse
    from ..models.groupmixformer import GroupMixFormer

    task = _task(args)
    listening, address = listen(args.host, args.port)
    with listening:
        model = _open(args.run, args, task)
        fused = args.fuse and any(isinstance(module, GroupMixFormer) for module in model.model.modules())
        if fused:
            model.model = fuse(model.model)
        limits = Limits(args.max_batch or Limits.batch, args.queue, args.max_megabytes)
        serving = service(model, task, limits, 0.5 if args.score is None else args.score)
        serving.warm_up()
        name = Path(args.run).resolve().name
        if args.json:
            print(json.dumps({"address": address, "model": name, "task": task}), flush=True)
        print(
            f"gmf serve: {name} ({task}{', fused' * fused}) at {address}: POST an image to /predict",
            file=sys.stderr,
            flush=True,
        )
        server(application(serving, name, task)).run([listening])


def demo(args: argparse.Namespace) -> None:
    """Open a local page: drop an image, see what is found, click a point and see what it attends to."""
    from PIL import Image

    from ..deploy.demo import Page, application
    from ..deploy.serve import listen, server
    from ..models.checkpoint import task_of

    listening, address = listen(args.host, args.port)
    with listening:
        runs, examples = {}, []
        for run in args.runs:
            task = task_of(run)
            runs[run] = (_open(run, args, task), task)
            runs[run][0].predict(Image.new("RGB", (64, 64)))  # the first image takes longer
            examples += sorted(str(path) for path in Path(run, "examples").glob("*.png"))
        app = application(Page(runs), examples)
        if args.json:
            print(json.dumps({"address": address, "runs": args.runs}), flush=True)
        print(f"gmf demo: open {address} in a browser; Ctrl-C ends it", file=sys.stderr, flush=True)
        server(app, patience=1).run([listening])  # a page that is open keeps its connection


def bench(args: argparse.Namespace) -> None:
    """Measure speed and memory of models side by side."""
    import torch

    from ..bench.published import accuracy_against_speed, at_published_size
    from ..bench.side_by_side import SIZES, headline, read_earlier, table
    from ..bench.side_by_side import bench as measure
    from ..bench.timing import Settings
    from ..files import write_rows
    from ..models.checkpoint import model_name

    settings = Settings(
        task=args.task,
        train=args.train,
        batch_size=args.batch_size,
        size=tuple(args.size * 2 if len(args.size) == 1 else args.size) if args.size else SIZES[args.task],
        dtype=args.dtype,
        compile=args.compile,
        fuse=args.fuse,
        channels_last=not args.contiguous,
        device=str(_device(args.device)),
        threads=args.threads or torch.get_num_threads(),
        rounds=args.rounds,
    )
    earlier = read_earlier(args.against, settings) if args.against else {}
    names = [model_name(model) for model in args.models]
    if args.against and not set(names) & set(earlier):
        raise ValueError(f"{args.against} has none of {', '.join(names)}")
    if args.plot:
        from ..visual.figures import write_figure  # before the work, in case that matplotlib is missing

        plotted = at_published_size(names, settings.task, settings.size)
        args.plot.parent.mkdir(parents=True, exist_ok=True)
    result = measure(args.models, settings, _progress, earlier)
    if args.plot:
        write_figure(
            accuracy_against_speed([row for row in result["rows"] if row["model"] in plotted], headline(result)), args.plot
        )
        if left := [name for name in names if name not in plotted]:
            print(f"gmf bench: not in the plot, as no accuracy at this size is known: {', '.join(left)}", file=sys.stderr)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        write_rows(args.csv, result["rows"])
    _show(result, args.json, table(result))


def _export_detector(args: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    if args.features:
        raise UsageError(f"--features is for classification, and {args.run} holds a model for detection")
    if args.format != "onnx":
        raise ValueError(f"{args.run}: {args.format} cannot carry a detector: export it with --format onnx")
    from ..deploy.export import real_image
    from ..deploy.export_detector import export_detector
    from ..tasks.detection.training import load_detector

    detector, stored = load_detector(args.run)
    return export_detector(detector, args.out, real_image(Path(args.run)), stored["class_names"], progress)


def _to_export(args: argparse.Namespace, task: str) -> tuple[Any, dict[str, Any]]:
    """Return the network of a run as it is exported, and what is written beside it."""
    from ..deploy.export import Exported
    from ..models.checkpoint import load_checkpoint
    from ..tasks.classification.predict import class_names, data_config

    if task == "segmentation":
        if args.features:
            raise UsageError(f"--features is for classification, and {args.run} holds a model for {task}")
        from ..tasks.segmentation.training import load_segmenter

        segmenter, stored = load_segmenter(args.run)
        pools = any(getattr(module, "output_size", 1) not in (1, (1, 1)) for module in segmenter.modules())
        if args.format == "openvino" or (args.format == "onnx" and pools):  # UPerNet averages over grids of fixed size
            what = "a decoder that pools to a grid, such as UPerNet's" if args.format == "onnx" else "a segmenter"
            raise ValueError(f"{args.run}: {args.format} cannot carry {what} for all sizes: export it with --format pt2")
        about = {"input_size": (3, segmenter.image_size, segmenter.image_size), "classes": stored["class_names"]}
        return Exported(segmenter).eval(), about | {"mean": segmenter.mean, "std": segmenter.std}
    model: Any = load_checkpoint(args.run)
    about = {key: value for key, value in data_config(model).items() if key in ("input_size", "mean", "std")}
    if args.features:
        about["names"] = [f"stride{2 ** (stage + 2)}" for stage in range(len(model.stages))]
    return Exported(model, args.features).eval(), about | {"classes": [] if args.features else class_names(model)}


def export(args: argparse.Namespace) -> None:
    """Write a model for another program, and compare the file with the model."""
    from ..deploy.export import FORMATS, real_image
    from ..deploy.export import export as write_export
    from ..models.checkpoint import task_of

    suffix = FORMATS[args.format].suffix
    if Path(args.out).suffix != suffix:
        raise UsageError(f"--out {args.out}: expected a name that ends in {suffix} for {args.format}")
    if args.int8:
        _export_int8(args)
        return
    for option in ("calibrate", "data"):
        if getattr(args, option):
            raise UsageError(f"--{option} is for --int8")

    def progress(line: str) -> None:
        print(f"gmf export: {line}", file=sys.stderr)

    task = task_of(args.run)
    if task == "detection":
        result = _export_detector(args, progress)
        what = f"ONNX, opset {result['opset']}, {result['bytes'] / 1e6:.1f} MB, {result['objects']} objects compared, "
        what += f"{result['strays']} without a counterpart"
    else:
        network, about = _to_export(args, task)
        result = write_export(network, args.format, args.out, real_image(Path(args.run)), progress=progress, **about)
        what = f"{FORMATS[args.format].title}, {result['bytes'] / 1e6:.1f} MB"
    text = f"{args.out}: {what}, largest relative difference "
    text += ", ".join(f"{error:.1e} at {size}" for size, error in result["errors"].items())
    _show({"run": args.run, **result}, args.json, text)


def _export_int8(args: argparse.Namespace) -> None:
    from ..deploy.export import FORMATS, real_image
    from ..deploy.quantize import WAYS, from_data, from_folder, quantize, table
    from ..models.checkpoint import task_of
    from ..tasks.classification.data import eval_loader, open_images
    from ..tasks.classification.predict import data_config

    if args.format not in WAYS[args.int8]:
        raise UsageError(f"--int8 {args.int8} is for --format {' and '.join(WAYS[args.int8])}, got {args.format}")
    if args.calibrate and args.int8 != "static":
        raise UsageError(f"--calibrate is for --int8 static: {args.int8} needs no images")
    if args.features or task_of(args.run) != "classification":
        raise UsageError("--int8 is for the logits of classifiers, whose accuracy it measures")
    network, about = _to_export(args, "classification")
    config = data_config(network.network)
    own_data = args.int8 == "static" and not args.calibrate
    if own_data and not Path(args.run, "recipe.yaml").is_file():
        raise ValueError(f"{args.run}: has no recipe that names its training data: name a folder of images with --calibrate")
    data, root = (args.data, "data") if args.data else _data_of(args.run)
    images = open_images(data, root, need_train=False)
    if len(images.class_names) != len(about["classes"]):
        raise ValueError(
            f"{data} has {len(images.class_names)} classes and the model {len(about['classes'])}, expected the same"
        )
    calibration, source = None, args.calibrate or ""
    skipped: list[str] = []
    if own_data:
        source, root = _data_of(args.run)
        calibration, skipped = from_data(open_images(source, root).train, config, source)
    elif args.calibrate:
        calibration, skipped = from_folder(source, config)
    result = quantize(
        network,
        args.format,
        args.int8,
        args.out,
        real_image(Path(args.run)),
        eval_loader(images.held_out, config),
        calibration,
        source,
        about,
        lambda line: print(f"gmf export: {line}", file=sys.stderr),
    )
    for problem in (*skipped, *result["skipped"]):
        print(f"gmf export: skipped {problem}", file=sys.stderr)
    text = f"{args.out}: {FORMATS[args.format].title}, int8 {args.int8}"
    text += f", calibrated on {result['calibration']['images']} images of {source}" if source else ""
    _show({"run": args.run, **result, "data": data}, args.json, f"{text}\n{table(result)}")


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint into a folder that timm and transformers read."""
    from ..models.checkpoint import load_checkpoint, save_checkpoint

    model: Any = load_checkpoint(args.file)
    names = Path(args.class_names).read_text().splitlines() if args.class_names else []
    if names and len(names) != model.num_classes:
        raise ValueError(f"{args.class_names}: holds {len(names)} lines, expected one for each of {model.num_classes} classes")
    config = {"input_size": (model.in_chans, args.image_size, args.image_size)} if args.image_size else {}
    save_checkpoint(model, args.out, names, config)
    result = {"out": args.out, "architecture": model.pretrained_cfg["architecture"], "num_classes": model.num_classes}
    _show(
        result,
        args.json,
        f"{args.out}: {result['architecture']}, {result['num_classes']} classes\n"
        f'timm.create_model("local-dir:{args.out}", pretrained=True)  # after import groupmixformer',
    )


def push(args: argparse.Namespace) -> None:
    """Upload a model to the Hugging Face Hub, with a card."""
    from ..deploy.hub import push_to_hub, write_folder

    if args.license == "unknown":
        print("gmf push: the card says that the licence is not known: name that of the weights with --license", file=sys.stderr)
    result = {"run": args.run, "repo_id": args.repo_id, "license": args.license}
    if args.dry_run:
        files = write_folder(args.run, args.dry_run, args.repo_id, args.license)
        _show(result | {"folder": args.dry_run, "files": files}, args.json, f"{args.dry_run}: {', '.join(files)}; not uploaded")
        return
    url = push_to_hub(args.run, args.repo_id, license=args.license, private=args.private, revision=args.revision)
    text = f'{url}\ntimm.create_model("hf-hub:{args.repo_id}", pretrained=True)  # after import groupmixformer'
    _show(result | {"commit": url}, args.json, text)


def shards(args: argparse.Namespace) -> None:
    """Turn a folder of images into WebDataset shards."""
    from ..data.shards import write_shards
    from ..tasks.classification.data import open_images

    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    images = open_images(args.folder)
    splits = {"train": images.train.source.reader.samples, "validation": images.held_out.source.reader.samples}
    settings = {"per_shard": args.images_per_shard, "seed": args.seed, "workers": args.workers, "progress": _progress}
    result = write_shards(Path(args.folder), splits, images.class_names, Path(args.out), **settings)
    for line in result["skipped"]:
        print(f"gmf shards: left out {line}", file=sys.stderr)
    text = (
        f"{args.out}: {result['train']:,} images for training and {result['validation']:,} for validation in "
        f"{result['shards']:,} shards of {len(images.class_names)} classes, {result['bytes'] / 1e9:.2f} GB, "
        f"{len(result['skipped'])} unreadable images left out"
    )
    _show({"out": args.out, **result}, args.json, text)
