"""gmf: the command line. Results go to stdout, progress and errors to stderr; imports wait for the command that needs them."""

import argparse
import itertools
import json
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


def _progress(items: Any, what: str, total: int) -> Any:
    """Show a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(items, what, total, disable=None, leave=False)


def _data_config(model: Any, image_size: int | None = None) -> dict[str, Any]:
    from timm.data.config import resolve_data_config

    config: dict[str, Any] = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    if image_size:
        config["input_size"] = (config["input_size"][0], image_size, image_size)
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


def _finish(folder: Path, images: Any, seconds: float) -> dict[str, Any]:
    """Evaluate the run's best model, write the report and say where things are."""
    from .checkpoint import load_model
    from .data import eval_loader
    from .evaluation import evaluate
    from .report import save_examples, write_report

    model = load_model(folder)
    config = _data_config(model)
    metrics, logits, true = evaluate(model, eval_loader(images.held_out, config))
    report = write_report(folder, model, images.held_out, images.class_names, metrics, logits, true, config)
    examples = save_examples(folder, images.held_out, images.class_names)
    return {
        "run": str(folder),
        "report": str(report),
        "examples": [str(path) for path in examples],
        "seconds": round(seconds, 1),
        **metrics,
    }


def _train(name: str, options: Sequence[str], resume: bool) -> tuple[dict[str, Any], str]:
    import time

    from .recipe import RecipeError, read_recipe

    try:
        recipe = read_recipe(name, options)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    from .data import open_images
    from .training import train

    start = time.monotonic()
    folder = train(recipe, resume)
    result = _finish(folder, open_images(recipe.data, recipe.root), time.monotonic() - start)
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
    from .checkpoint import load_model
    from .data import eval_loader, open_images
    from .evaluation import evaluate as evaluate_model

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
    loader = eval_loader(images.held_out, _data_config(model, args.image_size), args.batch_size, args.workers)
    metrics, _, _ = evaluate_model(model, _progress(loader, "evaluating", len(loader)))
    text = (
        f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}  on {metrics['images']:,} images"
    )
    _show({"run": args.run, "data": data, **metrics}, args.json, text)


def predict(args: argparse.Namespace) -> None:
    """Classify pictures."""
    import torch

    from .checkpoint import load_model
    from .data import eval_transform, find_images, read_image
    from .evaluation import predict as predict_logits

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
        added.add_argument("--image-size", type=int, help="side of the images; the model's own by default")

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
    added.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    added.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")

    added = command(predict, "predict", "gmf predict runs/quickstart 'photos/*.jpg' --top 3")
    uses_run(added)
    added.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or quoted globs")
    added.add_argument("--top", type=int, default=5, help="classes to show (default: %(default)s)")

    added = command(convert, "convert", "gmf convert groupmixformer_small.pth --out small")
    added.add_argument("file", metavar="FILE", help="a released .pth or any checkpoint that load_checkpoint reads")
    added.add_argument("--out", required=True, help="folder to write")
    added.add_argument("--class-names", help="text file with a class name a line")
    added.add_argument("--image-size", type=int, help="image size to store, such as 384 for large trained at 384")
    return parser


def _train_help() -> str:
    from .recipe import parser, shipped

    return f"recipes: {', '.join(shipped())}\n\n{parser().format_help()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if it failed, 2 for wrong usage, 130 if it was interrupted.
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
        print(f"gmf: error: this needs {error.name}: pip install 'groupmixformer[train]'", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("GMF_TRACEBACK"):
            raise
        known = isinstance(error, ValueError | OSError)
        hint = "" if known else f" ({type(error).__name__}; GMF_TRACEBACK=1 shows where)"
        print(f"gmf: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
