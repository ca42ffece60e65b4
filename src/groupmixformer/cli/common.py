"""What the commands of gmf do. Results go to stdout, progress to stderr; imports wait for the command that needs them."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
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


def _read_recipe(name: str, options: Sequence[str]) -> Any:
    from ..training.recipe import RecipeError, read_recipe

    try:
        return read_recipe(name, options)
    except RecipeError as error:
        raise UsageError(str(error)) from error


def _train(name: str, options: Sequence[str], resume: bool) -> tuple[dict[str, Any], str]:
    """Train, and on the first process evaluate and report."""
    import time

    recipe = _read_recipe(name, options)
    from ..run import Run
    from ..tasks.registry import build_task
    from ..training.callbacks import Stopped
    from ..training.trainer import is_first_process, train

    start = time.monotonic()
    try:
        folder = train(recipe, build_task, resume)
    except Stopped as stop:
        if is_first_process():
            again = f"gmf train {shlex.quote(str(Path(recipe.out, 'recipe.yaml')))} --resume"
            print(f"gmf: stopped by {stop} and saved: continue with {again}", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None
    if not is_first_process():
        raise SystemExit(0)
    seconds = time.monotonic() - start
    measured, report, examples = Run.open(folder).report(recipe.device, recipe.workers, _progress)
    result = {
        "run": str(folder),
        "report": str(report),
        "examples": [str(path) for path in examples],
        "seconds": round(seconds, 1),
        **measured.result,
        "skipped": measured.skipped,
    }
    text = (
        f"{measured.text}\non {measured.result['images']:,} held-out images after {seconds:.0f} s\n"
        f"run    {folder}\nreport {report}"
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
        from ..training.recipe import fields_of, to_yaml

        recipe = _read_recipe(args.recipe, args.options)
        _show(fields_of(recipe), args.json, to_yaml(recipe).rstrip())
        return
    result, text = _train(args.recipe, args.options, args.resume)
    _show(result, args.json, text)


def _options(args: argparse.Namespace, run: Any, only: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that are given and mean something to some tasks only, and refuse those that `run` has no use for."""
    from ..tasks.registry import BUILT_IN, check_options, find_task

    names = only or {name for task in BUILT_IN for name in find_task(task).options}
    values = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    try:
        check_options(run.folder, given, lambda name: "--" + name.removeprefix("wanted_").replace("_", "-"))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return given


def _open(args: argparse.Namespace, run: Any, options: Mapping[str, Any]) -> Any:
    """Return the model of a run, ready to look at images as `args` say."""
    names = run.definition.predictor_options
    return run.predictor(args.device, args.image_size, **{name: options[name] for name in names if name in options})


def evaluate(args: argparse.Namespace) -> None:
    """Measure a model on a data set."""
    from ..run import Run

    run = Run.open(args.run)
    options = _options(args, run)
    if plot := options.pop("plot", None):
        from ..visual.figures import write_figure  # before the work, in case that matplotlib is missing

        plot.parent.mkdir(parents=True, exist_ok=True)
    data = args.data or (run.recipe.data if run.recipe else None)
    measured = run.evaluate(args.data, args.device, args.image_size, args.precision, args.workers, _progress, **options)
    stored = run.config.get("pretrained_cfg", {})
    if args.test_size and not any(stored.get(key) for key in ("test_input_size", "test_crop_pct")):
        print(f"gmf eval: {args.run} stores no size or crop for tests: its usual ones are used", file=sys.stderr)
    for problem in measured.skipped:
        print(f"gmf eval: skipped {problem}", file=sys.stderr)
    if plot:
        figure = measured.figure()
        assert figure is not None
        write_figure(figure, plot)
    rates = "{images_per_second:.2f} images/s with loading, {model_images_per_second:.2f} the model alone"
    split = {"split": options.get("split", "val")} if "split" in run.definition.data_options else {}
    lines = [
        f"{measured.text}\non {measured.result['images']:,} images{' of '.join(['', *split.values()])}",
        ", ".join(filter(None, [measured.details, args.precision])),
        rates.format(**measured.result),
        *([f"\n{measured.table}"] if args.per_class else []),
    ]
    result = {"run": args.run, "task": run.task, "data": data, **split, **measured.result, "precision": args.precision}
    result |= {"plot": str(plot) if plot else None, "skipped": measured.skipped}
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
    from ..run import Run

    run = Run.open(args.run)
    options = _options(args, run)
    predictor, out = _open(args, run, options), Path(options.get("out", "predictions"))
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    lines: list[str] = []
    paths = find_images(args.images)
    taken = {path.resolve() for path in paths}
    for path, image in _read(paths, "predict", skipped):
        found = predictor.predict(image, str(path))
        images.append({"image": str(path), **found.result})
        lines.append(f"{path}: {found.text}")
        results += found.results
        if found.files:
            images[-1]["files"] = write_prediction(out, path, found.files, taken)
            lines[-1] += f"  ({', '.join(images[-1]['files'])})"
    result: dict[str, Any] = {"run": args.run, "task": run.task, "images": images, "skipped": skipped}
    written = run.definition.write_results(out, results)
    lines += [f"{name.replace('_', ' ')}: {file}" for name, file in written.items()]
    _show(result | written, args.json, "\n".join(lines))


def explain(args: argparse.Namespace) -> None:
    """Show what positions of images attend to, and what speaks for a class, an object or a segment."""
    from ..data.images import find_images
    from ..files import write_prediction
    from ..run import Run

    run = Run.open(args.run)
    options = _options(args, run, only=("wanted_class", "wanted_object"))
    explainer = run.explainer(args.device, args.image_size, **options)
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
    _show({"run": args.run, "task": run.task, "images": images, "skipped": skipped}, args.json, "\n".join(lines))


def serve(args: argparse.Namespace) -> None:
    """Answer over HTTP: POST an image, get JSON."""
    from ..deploy.serve import Limits, application, listen, server, service
    from ..models.fuse import fuse
    from ..models.groupmixformer import GroupMixFormer
    from ..run import Run

    run = Run.open(args.run)
    options = _options(args, run)
    listening, address = listen(args.host, args.port)
    with listening:
        predictor = _open(args, run, options)
        fused = args.fuse and any(isinstance(module, GroupMixFormer) for module in predictor.model.modules())
        if fused:
            predictor.model = fuse(predictor.model)
        limits = Limits(args.max_batch or Limits.batch, args.queue, args.max_megabytes)
        serving = service(predictor, limits)
        serving.warm_up()
        name = Path(args.run).resolve().name
        if args.json:
            print(json.dumps({"address": address, "model": name, "task": run.task}), flush=True)
        print(
            f"gmf serve: {name} ({run.task}{', fused' * fused}) at {address}: POST an image to /predict",
            file=sys.stderr,
            flush=True,
        )
        server(application(serving, name, run.task)).run([listening])


def demo(args: argparse.Namespace) -> None:
    """Open a local page: drop an image, see what is found, click a point and see what it attends to."""
    from PIL import Image

    from ..deploy.demo import Page, application
    from ..deploy.serve import listen, server
    from ..run import Run

    listening, address = listen(args.host, args.port)
    with listening:
        predictors, examples = {}, []
        for name in args.runs:
            run = Run.open(name)
            predictors[name] = run.predictor(args.device)
            predictors[name].predict(Image.new("RGB", (64, 64)))  # the first image takes longer
            examples += sorted(str(path) for path in run.folder.examples.glob("*.png"))
        app = application(Page(predictors), examples)
        if args.json:
            print(json.dumps({"address": address, "runs": args.runs}), flush=True)
        print(f"gmf demo: open {address} in a browser; Ctrl-C ends it", file=sys.stderr, flush=True)
        server(app, patience=1).run([listening])  # a page that is open keeps its connection


def bench(args: argparse.Namespace) -> None:
    """Measure speed and memory of models side by side."""
    import torch

    from ..bench.published import accuracy_against_speed, at_published_size
    from ..bench.side_by_side import bench as measure
    from ..bench.side_by_side import headline, read_earlier, table
    from ..bench.timing import Settings
    from ..files import write_rows
    from ..models.checkpoint import model_name
    from ..tasks.registry import find_task

    settings = Settings(
        task=args.task,
        train=args.train,
        batch_size=args.batch_size,
        size=tuple(args.size * 2 if len(args.size) == 1 else args.size) if args.size else find_task(args.task).bench_size,
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


def export(args: argparse.Namespace) -> None:
    """Write a model for another program, and compare the file with the model."""
    from ..deploy.export import FORMATS
    from ..run import Run

    target = FORMATS[args.format]
    if Path(args.out).suffix != target.suffix:
        raise UsageError(f"--out {args.out}: expected a name that ends in {target.suffix} for {args.format}")
    run = Run.open(args.run)
    _options(args, run, only=("features", "int8"))
    if args.int8:
        from ..deploy.quantize import WAYS, table

        if args.format not in WAYS[args.int8]:
            raise UsageError(f"--int8 {args.int8} is for --format {' and '.join(WAYS[args.int8])}, got {args.format}")
        if args.calibrate and args.int8 != "static":
            raise UsageError(f"--calibrate is for --int8 static: {args.int8} needs no images")
        if args.features:
            raise UsageError("--int8 is for the logits of classifiers, whose accuracy it measures")
    for option in ("calibrate", "data"):
        if getattr(args, option) and not args.int8:
            raise UsageError(f"--{option} is for --int8")
    result = run.export(
        args.format,
        args.out,
        features=args.features,
        int8=args.int8,
        calibrate=args.calibrate,
        data=args.data,
        progress=lambda line: print(f"gmf export: {line}", file=sys.stderr),
    )
    if args.int8:
        for problem in result["skipped"]:
            print(f"gmf export: skipped {problem}", file=sys.stderr)
        text = f"{args.out}: {target.title}, int8 {args.int8}"
        if calibration := result["calibration"]:
            text += f", calibrated on {calibration['images']} images of {calibration['data']}"
        text += f"\n{table(result)}"
    else:
        title = f"ONNX, opset {result['opset']}" if "opset" in result else target.title
        text = f"{args.out}: {title}, {result['bytes'] / 1e6:.1f} MB"
        if "objects" in result:
            text += f", {result['objects']} objects compared, {result['strays']} without a counterpart"
        text += ", largest relative difference "
        text += ", ".join(f"{error:.1e} at {size}" for size, error in result["errors"].items())
    _show({"run": args.run, **result}, args.json, text)


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
    splits = {"train": images.train_source.reader.samples, "validation": images.held_out_source.reader.samples}
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
