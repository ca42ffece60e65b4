"""Commands that train: quickstart and train."""

import itertools
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from .common import EXTRAS, Json, Option, Positive, Reads, UsageError, Works, Writes, command, progress, show, torch_device

OPTION = r"(?<=^--)[A-Za-z][^=\s]*"  # the name in a word such as --batch-size or --optimizer.lr=1e-4


def _finish(folder: Path, images: Any, seconds: float, device: str) -> dict[str, Any]:
    """Evaluate the run's best model, write the report and say where things are."""
    from ..models.checkpoint import load_model
    from ..tasks.classification.data import eval_loader
    from ..tasks.classification.metrics import evaluate
    from ..tasks.classification.predict import data_config
    from ..tasks.classification.report import save_examples, write_report

    model = load_model(folder).to(torch_device(device))
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
    scenes = made(folder, torch_device(recipe.device), None, None)
    images = scenes.open(recipe.data, "val")
    measured = scenes.evaluate(images, recipe.workers, progress)
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
    from ..training.trainer import Stopped, is_first_process, train

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


@command("quickstart", "gmf quickstart --out runs/first", "train", "data")
def quickstart(
    *,
    data: Reads[str] = "digits",
    model: Works[str] = "mobile",
    epochs: Works[Positive | None] = None,
    out: Annotated[Writes[str | None], Option(metavar="DIR")] = None,
    json: Json = False,
) -> None:
    """Train, evaluate, report, and name the next commands.

    Args:
        data: digits, a folder with train/ and val/, torch/..., hfds/...
        model: mobile, tiny, small, base, large or a model of timm
        epochs: epochs; the recipe's by default
        out: folder of the run; runs/quickstart, or the next that is free, by default
    """
    from ..training.recipe import Recipe

    field = "--model" if hasattr(Recipe, "model") else "--variant"
    recipe = "digits" if data == "digits" else "folder"
    if out is None:
        names = (f"runs/quickstart{f'-{i}' * (i > 1)}" for i in itertools.count(1))
        out = next(name for name in names if not Path(name).exists())
    options = ["--out", out, "--data", data, field, model]
    options += ["--epochs", str(epochs)] if epochs else []
    result, text = _train(recipe, options, resume=False)
    run, examples = shlex.quote(result["run"]), " ".join(shlex.quote(path) for path in result["examples"])
    own_data = "" if data == recipe else f" --data {shlex.quote(data)}"
    again = f"gmf train {recipe}{own_data} {field} {model} --epochs 20 --out {run}-20"
    result["next"] = [f"gmf predict {run} {examples}", again]
    show(result, json, text + "\n\nNext, try\n  " + "\n  ".join(result["next"]))


@command(
    "train",
    "gmf train folder --data photos --epochs 20 --optimizer.lr 5e-4",
    *EXTRAS,
)
def train(
    recipe: Reads[str], *fields: str, print: Writes[bool] = False, resume: Works[bool] = False, json: Json = False
) -> None:
    """Train by a recipe.

    Every field of the recipe is an option too: gmf train RECIPE --help lists them.

    Args:
        recipe: a shipped recipe or a YAML file, such as the recipe.yaml of a run
        fields: options of the recipe, such as ``--batch-size 8 --optimizer.lr=1e-4``
        print: show the resolved recipe and stop
        resume: continue the run in the recipe's out folder
    """
    options = [re.sub(OPTION, lambda name: name[0].replace("-", "_"), word) for word in fields]
    if print:
        from ..training.recipe import RecipeError, fields_of, read_recipe, to_yaml

        try:
            resolved = read_recipe(recipe, options)
        except RecipeError as error:
            raise UsageError(str(error)) from error
        show(fields_of(resolved), json, to_yaml(resolved).rstrip())
        return
    result, text = _train(recipe, options, resume)
    show(result, json, text)


def train_help(with_fields: bool) -> str:
    """Return what the help of gmf train adds: all fields of a recipe, or the names of the shipped ones."""
    from ..training.recipe import parser, shipped

    if with_fields:
        fields = re.sub(r"(?<=--)[a-z][\w.]*", lambda field: field[0].replace("_", "-"), parser().format_help())
        return f"\n{fields}"
    names = f"recipes: {', '.join(shipped())}"
    return f"\n{textwrap.fill(names, 98, subsequent_indent='  ', break_on_hyphens=False)}\n"
