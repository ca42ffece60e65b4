"""gmf: the command line. Results go to stdout, progress and errors to stderr; imports wait for the command that needs them."""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class UsageError(Exception):
    """Wrong usage: exit 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option or command that exists."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit 2."""
        given = re.search(r"unrecognized arguments: (\S+)|invalid choice: '([^']*)'", message)
        if given:
            word = (given[1] or given[2]).split("=")[0]
            known = [option for action in self._actions for option in (*action.option_strings, *(action.choices or ()))]
            near = get_close_matches(word, [str(option) for option in known], n=1, cutoff=0.5)
            message = f"unknown {'option' if given[1] else 'value'} {word}"
            message += f": did you mean {near[0]}?" if near else f": see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {message}\n")


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


def _progress(items: Any, what: str, total: int | None = None) -> Any:
    """Show a bar on a terminal; the total is the number of items where that is known."""
    from tqdm import tqdm

    return tqdm(items, what, total, disable=None, leave=False)


def _data_config(model: Any, image_size: int | None = None, test_size: bool = False, **crop: Any) -> dict[str, Any]:
    """Size, crop and colours of the model's input by timm's rules: what is asked for, or else what is stored with the model."""
    from timm.data.config import resolve_data_config

    asked = {"img_size": image_size, "in_chans": model.pretrained_cfg["input_size"][0], **crop}
    config: dict[str, Any] = resolve_data_config(asked, model.pretrained_cfg, use_test_size=test_size)
    return config


def _class_names(model: Any) -> list[str]:
    """Names stored with the model; ImageNet's where there are 1,000 classes; numbers otherwise."""
    cfg = model.pretrained_cfg
    names = list(cfg.get("label_names") or [])
    if not names and model.num_classes == 1000:
        from timm.data import ImageNetInfo

        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(index) for index in range(1000)]
    return names or [str(index) for index in range(model.num_classes)]


def _device(name: str) -> Any:
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def models(args: argparse.Namespace) -> None:
    """List the variants."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from .groupmixformer import PUBLISHED_TOP1

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
    from .checkpoint import load_model
    from .data import eval_loader
    from .evaluation import evaluate
    from .report import save_examples, write_report

    model = load_model(folder).to(_device(device))
    config = _data_config(model)
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


def _train(name: str, options: Sequence[str], resume: bool) -> tuple[dict[str, Any], str]:
    """Train, and on the first process evaluate and report."""
    import time

    from .recipe import RecipeError, read_recipe

    try:
        recipe = read_recipe(name, options)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    from .data import open_images
    from .training import Stopped, is_first_process, train

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
    result = _finish(folder, open_images(recipe.data, recipe.root, need_train=False), time.monotonic() - start, recipe.device)
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
    options = ["--out", out, "--data", args.data, "--variant", args.variant]
    options += ["--epochs", str(args.epochs)] if args.epochs else []
    result, text = _train(recipe, options, resume=False)
    run, examples = shlex.quote(result["run"]), " ".join(shlex.quote(path) for path in result["examples"])
    data = "" if args.data == recipe else f" --data {shlex.quote(args.data)}"
    again = f"gmf train {recipe}{data} --variant {args.variant} --epochs 20 --out {run}-20"
    result["next"] = [f"gmf predict {run} {examples}", again]
    _show(result, args.json, text + "\n\nNext, try\n  " + "\n  ".join(result["next"]))


def train(args: argparse.Namespace) -> None:
    """Train by a recipe."""
    if args.print:
        from .recipe import RecipeError, read_recipe, to_yaml

        try:
            recipe = read_recipe(args.recipe, args.options)
        except RecipeError as error:
            raise UsageError(str(error)) from error
        _show(asdict(recipe), args.json, to_yaml(recipe).rstrip())
        return
    result, text = _train(args.recipe, args.options, args.resume)
    _show(result, args.json, text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure a model on a data set."""
    import torch

    from .checkpoint import load_model
    from .data import eval_loader, open_images
    from .evaluation import evaluate as evaluate_model
    from .evaluation import per_class, reliability

    if args.plot:
        from .report import reliability_diagram, write_figure  # before the work, in case that matplotlib is missing

        args.plot.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.run).to(_device(args.device))
    data, root = args.data, args.root
    if not data:
        recipe = Path(args.run, "recipe.yaml")
        if not recipe.is_file():
            raise ValueError(f"{args.run}: has no recipe that names a data set: name one with --data")
        from .recipe import read_recipe

        stored = read_recipe(str(recipe))
        data, root = stored.data, stored.root
    images = open_images(data, root, need_train=False)
    if len(images.class_names) != model.num_classes:
        raise ValueError(f"{data} has {len(images.class_names)} classes and the model {model.num_classes}, expected the same")
    if args.test_size and not any(model.pretrained_cfg.get(key) for key in ("test_input_size", "test_crop_pct")):
        print(f"gmf eval: {args.run} stores no size or crop for tests: its usual ones are used", file=sys.stderr)
    crop = {"crop_pct": args.crop_pct, "crop_mode": args.crop_mode, "interpolation": args.interpolation}
    config = _data_config(model, args.image_size, args.test_size, **crop)
    loader = eval_loader(images.held_out, config, args.batch_size, args.workers)
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    evaluation = evaluate_model(model, _progress(loader, "evaluating"), dtype)
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
        "batch_size": args.batch_size,
        "plot": str(args.plot) if args.plot else None,
        "per_class": classes,
        "reliability": reliability(evaluation),
    }
    _show(result, args.json, "\n".join(lines))


def predict(args: argparse.Namespace) -> None:
    """Classify pictures."""
    import torch

    from .checkpoint import load_model
    from .data import eval_transform
    from .evaluation import predict as predict_logits
    from .pictures import find_images, read_image

    model = load_model(args.run).to(_device(args.device))
    transform, names = eval_transform(_data_config(model, args.image_size)), _class_names(model)
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    paths = find_images(args.images)
    for path in _progress(paths, "classifying", len(paths)):
        try:
            picture = transform(read_image(path))
        except ValueError as error:
            skipped.append(str(path))
            print(f"gmf predict: skipped {error}", file=sys.stderr)
            continue
        probabilities = next(predict_logits(model, [picture[None]])).softmax(dim=1)[0]
        top = torch.topk(probabilities, min(args.top, len(probabilities)))
        classes = [
            {"class": names[index], "index": index, "probability": probability}
            for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "classes": classes})
    if not results:
        raise ValueError(f"none of {len(paths)} images could be read")
    lines = [f"{r['image']}: " + ", ".join(f"{c['class']} {c['probability']:.1%}" for c in r["classes"]) for r in results]
    _show({"run": args.run, "images": results, "skipped": skipped}, args.json, "\n".join(lines))


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint into a folder that timm and transformers read."""
    from .checkpoint import load_checkpoint, save_checkpoint

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


def shards(args: argparse.Namespace) -> None:
    """Turn a folder of pictures into WebDataset shards."""
    from .data import open_images
    from .shards import write_shards

    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder}: no such folder")
    images = open_images(args.folder)
    splits = {"train": images.train.source.reader.samples, "validation": images.held_out.source.reader.samples}
    settings = {"per_shard": args.images_per_shard, "seed": args.seed, "workers": args.workers, "progress": _progress}
    result = write_shards(Path(args.folder), splits, images.class_names, Path(args.out), **settings)
    for line in result["skipped"]:
        print(f"gmf shards: left out {line}", file=sys.stderr)
    text = (
        f"{args.out}: {result['train']:,} pictures for training and {result['validation']:,} for validation in "
        f"{result['shards']:,} shards of {len(images.class_names)} classes, {result['bytes'] / 1e9:.2f} GB, "
        f"{len(result['skipped'])} unreadable pictures left out"
    )
    _show({"out": args.out, **result}, args.json, text)


def _number(least: int) -> Callable[[str], int]:
    """Return what reads an option's whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, expected a whole number from {least}")
        return int(text)

    return read


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0 and up to 1")
    return share


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, expected the name of a .png, .svg or .pdf file")
    return path


def _parser() -> Parser:
    parser = Parser(prog="gmf", description="GroupMixFormer: train, evaluate and use vision models with Group-Mix Attention.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function: Callable[[argparse.Namespace], None], name: str, example: str) -> Parser:
        added = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(function=function)
        added.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return added

    def uses_run(added: Parser) -> None:
        added.add_argument("run", metavar="RUN", help="folder of a run, checkpoint file, or folder that gmf convert wrote")
        added.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
        added.add_argument("--image-size", type=_number(1), help="side of the images; the model's own by default")

    added = command(quickstart, "quickstart", "gmf quickstart --out runs/first")
    added.add_argument("--out", help="folder of the run; runs/quickstart, or the next that is free, by default")
    added.add_argument("--data", default="digits", help="digits (default), a folder with train/ and val/, torch/..., hfds/...")
    added.add_argument("--variant", default="mobile", help="mobile (default), tiny, small, base, large or a model of timm")
    added.add_argument("--epochs", type=int, help="epochs; the recipe's by default")

    command(models, "models", "gmf models --json")

    added = command(train, "train", "gmf train folder --data photos --epochs 20 --optimizer.lr 5e-4")
    added.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a YAML file")
    added.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    added.add_argument("--resume", action="store_true", help="continue the run in the recipe's out folder")

    added = command(evaluate, "eval", "gmf eval runs/quickstart --json")
    uses_run(added)
    added.add_argument("--data", help="data set, or a folder of class folders; the run's own by default")
    added.add_argument("--root", default="data", help="where timm's data sets lie (default: %(default)s)")
    added.add_argument("--test-size", action="store_true", help="take size and crop that the model stores for tests, if any")
    added.add_argument("--crop-pct", type=_share, help="share of the resized picture that is kept; the model's own by default")
    added.add_argument("--crop-mode", choices=("center", "squash", "border"), help="timm's crops; the model's own by default")
    added.add_argument(
        "--interpolation",
        choices=("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"),
        help="how to resize; the model's own by default",
    )
    added.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    added.add_argument("--batch-size", type=_number(1), default=64, help="images at once (default: %(default)s)")
    added.add_argument("--workers", type=_number(0), default=0, help="processes that load images (default: %(default)s)")
    added.add_argument("--per-class", action="store_true", help="show the accuracy of every class, the worst first")
    added.add_argument("--plot", type=_figure, metavar="FILE", help="write a reliability diagram (.png, .svg or .pdf)")

    added = command(predict, "predict", "gmf predict runs/quickstart 'photos/*.jpg' --top 3")
    uses_run(added)
    added.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or quoted globs")
    added.add_argument("--top", type=int, default=5, help="classes to show (default: %(default)s)")

    added = command(convert, "convert", "gmf convert groupmixformer_small.pth --out small")
    added.add_argument("file", metavar="FILE", help="a released .pth or any checkpoint that load_checkpoint reads")
    added.add_argument("--out", required=True, help="folder to write")
    added.add_argument("--class-names", help="text file with a class name a line")
    added.add_argument("--image-size", type=int, help="image size to store, such as 384 for large trained at 384")

    added = command(shards, "shards", "gmf shards photos --out shards")
    added.add_argument("folder", metavar="FOLDER", help="holds train/ and val/, each with one folder of pictures per class")
    added.add_argument("--out", required=True, help="folder to write")
    added.add_argument("--images-per-shard", type=_number(1), default=1000, help="pictures in a file (default: %(default)s)")
    added.add_argument("--seed", type=_number(0), default=0, help="of the order for training (default: %(default)s)")
    added.add_argument("--workers", type=_number(1), default=os.cpu_count() or 1, help="threads; one for each core by default")
    return parser


def _train_help() -> str:
    from .recipe import parser, shipped

    return f"recipes: {', '.join(shipped())}\n\n{parser().format_help()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if it failed, 2 for wrong usage, 128 + a signal's number if it was stopped by one (130: Ctrl-C).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and args.command != "train":
            commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            commands.choices[args.command].error(f"unrecognized arguments: {rest[0]}")
        args.options = rest
        args.function(args)
    except SystemExit as stop:
        if argv[:1] == ["train"] and not stop.code and {"-h", "--help"} & set(argv):
            print("\n" + _train_help(), end="")
        return int(stop.code or 0)
    except UsageError as error:
        print(f"gmf: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gmf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = "data" if error.name in ("datasets", "webdataset", "fsspec", "pyarrow") else "train"
        print(f"gmf: error: this needs {error.name}: pip install 'groupmixformer[{extra}]'", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("GMF_TRACEBACK"):
            raise
        text = str(error)
        if "Original Traceback" in text:  # PyTorch's form of what a loader's worker raises
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        known = isinstance(error, ValueError | OSError)
        hint = "" if known else f" ({type(error).__name__}; GMF_TRACEBACK=1 shows where)"
        print(f"gmf: error: {' '.join(text.split())}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
