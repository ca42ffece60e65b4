"""Commands that train: quickstart and train."""

import itertools
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .common import (
    EXTRAS,
    Folder,
    Json,
    Option,
    PathText,
    Positive,
    Reads,
    UsageError,
    Works,
    Writes,
    command,
    progress,
    show,
    tell,
)

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from ..training.recipe import Recipe


def resolve_recipe(name: str, options: Sequence[str]) -> "Recipe":
    """Read a recipe and its options; an error in them is wrong usage."""
    from ..training.recipe import RecipeError, read_recipe

    try:
        return read_recipe(name, options)
    except RecipeError as error:
        raise UsageError(str(error)) from error


def _train(name: str, options: Sequence[str], resume: "bool | Literal['auto']") -> tuple[dict[str, Any], str]:
    """Train a run, or one for each fold."""
    path = Path(name)
    own = path.name == "recipe.yaml" and (path.parent / "versions.json").is_file()  # a run's, which may have been moved
    if resume and own and not any(option.partition("=")[0] == "--out" for option in options):
        options = ["--out", str(path.parent), *options]
    recipe = resolve_recipe(name, options)
    if recipe.folds and not recipe.fold:
        from ..tasks.cross_validation import cross_validate

        return cross_validate(recipe, lambda own, resume: _train_run(own, resume)[0], resume)
    return _train_run(recipe, resume)


def _train_run(
    recipe: "Recipe", resume: "bool | Literal['auto']", watchers: "Sequence[Callback]" = ()
) -> tuple[dict[str, Any], str]:
    """Train, and on the first process evaluate and report."""
    import time

    import torch

    from ..run import Run
    from ..run_folder import RECIPE, one_line, read_metrics
    from ..tasks.registry import build_task
    from ..training.callbacks import Stopped
    from ..training.trainer import is_first_process, train

    start, again = time.monotonic(), f"gmf train {shlex.quote(str(Path(recipe.out, RECIPE)))} --resume"
    try:
        folder = train(recipe, build_task, resume, watchers)
    except Stopped as stop:
        if is_first_process():
            print(f"gmf: stopped by {stop} and saved: continue with {again}", file=sys.stderr)
        raise SystemExit(128 + stop.number) from None
    if not is_first_process():
        raise SystemExit(0)
    seconds, threads = time.monotonic() - start, torch.get_num_threads()
    try:
        for row in read_metrics(folder)[-1:]:
            torch.set_num_threads(int(row.get("threads", threads)))  # as it was trained
        measured, report, examples = Run.open(folder).report(recipe.device, recipe.workers, progress)
    except Exception as error:  # the run is whole without its report
        if os.environ.get("GMF_TRACEBACK"):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        logging.getLogger(__name__).warning(
            f"{folder}: the run is complete, but could not be measured: {reason}: {again} does it"
        )
        text = f"trained in {seconds:.0f} s\nrun    {folder}"
        return {"run": str(folder), "report": None, "examples": [], "seconds": round(seconds, 1)}, text
    finally:
        torch.set_num_threads(threads)
    tell([*measured.notes, *measured.remarks], measured.skipped)
    if report is None:
        logging.getLogger(__name__).warning(f"{folder}: {again} writes the report")
    result = {
        "run": str(folder),
        "report": str(report) if report else None,
        "examples": [str(path) for path in examples],
        "seconds": round(seconds, 1),
        **measured.result,
        "skipped": measured.skipped,
    }
    text = f"{measured.text}\non {measured.result['images']:,} held-out images after {seconds:.0f} s\nrun    {folder}" + (
        f"\nreport {report}" if report else ""
    )
    return result, text


def _find_lr(recipe: "Recipe") -> tuple[dict[str, Any], str]:
    from ..tasks.registry import build_task
    from ..training.tuning import find_rate

    found = find_rate(recipe, build_task)
    page = found.write(Path(recipe.out))
    span = f"after {len(found.rates)} steps from {found.rates[0]:.0e} to {found.rates[-1]:.2g}"
    text = f"--optimizer.lr {found.suggestion:g}\n{span}"
    return {"optimizer.lr": found.suggestion, "steps": len(found.rates), "page": str(page)}, f"{text}\npage   {page}"


def _find_batch_size(recipe: "Recipe") -> tuple[dict[str, Any], str]:
    from ..tasks.registry import build_task
    from ..training.tuning import try_batch_sizes

    rows = []
    for row in try_batch_sizes(recipe, build_task):
        rows.append(row)
        told = f"batch_size {row.batch_size:5}  {row.images_per_second:9.1f} images/s  {row.memory:8,.0f} MiB"
        print(told, file=sys.stderr, flush=True)
    fastest = max(rows, key=lambda row: row.images_per_second)
    result = {"batch_size": fastest.batch_size, "largest": rows[-1].batch_size, "tried": [vars(row) for row in rows]}
    text = f"--batch-size {fastest.batch_size}\nis the fastest; the largest that was tried and fits is {rows[-1].batch_size}"
    return result, text


@command("quickstart", "gmf quickstart --out runs/first", "train", "data")
def quickstart(
    *,
    data: Reads[PathText] = "digits",
    model: Works[str] = "mobile",
    epochs: Works[Positive | None] = None,
    out: Annotated[Writes[PathText | None], Option(metavar="DIR")] = None,
    json: Json = False,
) -> None:
    """Train, evaluate, report, and name the next commands.

    Args:
        data: digits, a folder with train/ and val/, torch/..., hfds/...
        model: mobile, tiny, small, base, large or a model of timm
        epochs: epochs; the recipe's by default
        out: folder of the run; runs/quickstart, or the next that is free, by default
    """
    recipe = "digits" if data == "digits" else "folder"
    if out is None:
        names = (f"runs/quickstart{f'-{i}' * (i > 1)}" for i in itertools.count(1))
        out = next(name for name in names if not Path(name).exists())
    options = ["--out", out, "--data", data, "--model", model]
    options += ["--epochs", str(epochs)] if epochs else []
    result, text = _train(recipe, options, resume=False)
    run, examples = shlex.quote(result["run"]), " ".join(shlex.quote(path) for path in result["examples"])
    own_data = "" if data == recipe else f" --data {shlex.quote(data)}"
    again = f"gmf train {recipe}{own_data} --model {model} --epochs 20 --out {run}-20"
    result["next"] = [*([f"gmf predict {run} {examples}"] if examples else []), again]
    show(result, json, text + "\n\nNext, try\n  " + "\n  ".join(result["next"]))


@command(
    "train",
    "gmf train folder --data photos --epochs 20 --optimizer.lr 5e-4",
    *EXTRAS,
    "wandb",
    "mlflow",
    "adapters",
    "pretrain",
)
def train(
    recipe: Reads[str],
    *fields: str,
    print: Writes[bool] = False,
    resume: Works[bool] = False,
    auto_resume: Works[bool] = False,
    find_lr: Works[bool] = False,
    find_batch_size: Works[bool] = False,
    json: Json = False,
) -> None:
    """Train by a recipe.

    Every field of the recipe is an option too: gmf train RECIPE --help lists them.

    Args:
        recipe: a shipped recipe or a YAML file, such as the recipe.yaml of a run
        fields: options of the recipe, such as ``--batch-size 8 --optimizer.lr=1e-4``
        print: show the resolved recipe and stop
        resume: continue the run in the recipe's out folder, or in the folder where the recipe.yaml of a run lies
        auto_resume: continue it if it has a checkpoint, or else begin it: for jobs that are started again and again
        find_lr: do not train, but find a learning rate by a range test of 100 steps, with a page in the recipe's out folder
        find_batch_size: do not train, but try which batches fit and how fast they are
    """
    if find_lr or find_batch_size:
        if find_lr and find_batch_size:
            raise UsageError("expected one of --find-lr and --find-batch-size: the one depends on the other")
        found, text = (_find_lr if find_lr else _find_batch_size)(resolve_recipe(recipe, fields))
        show(found, json, text)
        return
    if print:
        from ..training.recipe import fields_of, to_yaml

        resolved = resolve_recipe(recipe, fields)
        show(fields_of(resolved), json, to_yaml(resolved).rstrip(), with_notes=False)  # a recipe has no such field
        return
    result, text = _train(recipe, fields, "auto" if auto_resume else resume)
    show(result, json, text)


@command("sweep", "gmf sweep folder --data photos --epochs 10 --try optimizer.lr=1e-4..1e-2:log --trials 20", "sweep", *EXTRAS)
def sweep(
    recipe: Reads[str],
    *fields: str,
    try_fields: Annotated[Works[Sequence[str]], Option(metavar="FIELD=VALUES", name="try")],
    trials: Works[Positive] = 20,
    prune: Works[bool] = True,
    storage: Annotated[Works[str | None], Option(metavar="URL")] = None,
    out: Writes[Folder] = Path("runs/sweep"),
    json: Json = False,
) -> None:
    """Train runs with fields of a recipe that Optuna chooses, and say which were best.

    Given again, it continues; given in several terminals, they share the work.
    Every field of the recipe is an option too: gmf train RECIPE --help lists them.

    Args:
        recipe: a shipped recipe or a YAML file
        fields: options of the recipe, such as ``--batch-size 8 --data photos``
        try_fields: fields to choose: optimizer.lr=1e-4..1e-2:log epochs=5..20 model=mobile,tiny
        trials: runs to be done in the end, those of before included
        prune: end runs early that do worse after an epoch than half of the others did
        storage: where several machines meet, as a URL of SQLAlchemy; a file in the folder by default
        out: folder of the sweep
    """
    from ..tasks.sweep import Space, sweep
    from ..training.recipe import RecipeError

    def train_run(own: "Recipe", watchers: "Sequence[Callback]") -> dict[str, Any]:
        return _train_run(own, "auto", watchers)[0]

    try:
        result = sweep(recipe, fields, [Space.parse(text) for text in try_fields], trials, out, train_run, storage, prune)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    best = result["best"]
    shown = [
        f"{value:>10.4f}  trial {n}"
        for n, value in sorted(((r["trial"], r["value"]) for r in result["trials"] if r["value"]), key=lambda row: -row[1])[:5]
    ]
    lines = [f"{result['metric']} {best['value']:.4f} by", f"  {result['command']}", *shown, f"page   {out / 'sweep.html'}"]
    show(result, json, "\n".join(lines))


def train_help(with_fields: bool) -> str:
    """Return what the help of gmf train adds: all fields of a recipe, or the names of the shipped ones."""
    from ..training.recipe import parser, shipped

    if with_fields:
        return f"\n{parser().format_help()}"
    names = f"recipes: {', '.join(shipped())}"
    return f"\n{textwrap.fill(names, 98, subsequent_indent='  ', break_on_hyphens=False)}\n"
