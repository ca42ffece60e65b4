"""Cross-validation: a run for each part of the data, which it holds out, and what they have in common."""

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..files import to_json, write_file, write_rows
from ..run_folder import RECIPE, SPLIT, write_versions
from .registry import build_task

if TYPE_CHECKING:  # which brings jsonargparse
    from ..training.recipe import Recipe

LOGGER = logging.getLogger(__name__)
SUMMARY = "summary.json"
Resume = bool | Literal["auto"]


def cross_validate(
    recipe: "Recipe", train_run: Callable[["Recipe", Resume], dict[str, Any]], resume: Resume = False
) -> tuple[dict[str, Any], str]:
    """Train a run for each fold, in fold-1, fold-2, ... of the recipe's folder, and summarise what was measured.

    The folder holds besides recipe.yaml, split.json with the images of each fold, summary.json and summary.csv.

    Args:
        recipe: With `folds`, and without `fold`.
        train_run: Trains a run by its recipe, or continues it, and returns what was measured on its held-out part.
        resume: Continue where an earlier call stopped; ``auto`` begins where there is nothing to continue.

    Returns:
        For each fold its run and metrics, their means and standard deviations (n - 1); and the same as a table.

    Raises:
        ValueError: If there is something where it should begin, nothing where it should continue, or a run is not measured.
    """
    from ..training.recipe import write_recipe
    from ..training.trainer import processes

    assert recipe.folds is not None
    out, number = Path(recipe.out), recipe.folds
    recipes = [replace(recipe, fold=fold, out=str(out / f"fold-{fold}")) for fold in range(1, number + 1)]
    devices, nodes = processes(recipe)
    if devices * nodes > 1:
        raise ValueError(
            f"got {number} folds and several processes, expected one: train each fold on its own, with --fold 1 ..."
        )
    stored = out / SPLIT
    if stored.exists() and not resume:
        raise ValueError(f"{out}: holds a cross-validation already: continue it with --resume, or choose another --out")
    if not stored.exists():
        if resume is True:
            raise ValueError(f"{out}: holds no cross-validation to resume: --auto-resume begins one where there is none")
        splitter = recipes[0].splitter
        build_task(recipes[0], 1)
        if splitter is None or splitter.dealt is None:
            raise ValueError(f"{recipe.data}: has a training and a held-out part of its own: leave out folds")
        write_recipe(recipe, out / RECIPE)
        write_versions(out)
        splitter.dealt.write(stored)
        for note in splitter.notes:
            LOGGER.warning(note)
    again, measured = f"gmf train {shlex.quote(str(out / RECIPE))} --resume", []
    for fold, own in enumerate(recipes, start=1):
        try:
            result = train_run(own, "auto" if resume else False)
        except SystemExit:  # after a signal, as a run says
            LOGGER.warning(f"all folds go on with {again}")
            raise
        found = {name: value for name, value in result.items() if isinstance(value, float) and "second" not in name}
        settings = vars(recipe)  # crop_pct is told with the metrics, and loss is a metric although a field has its name
        metrics = {name: value for name, value in found.items() if not isinstance(settings.get(name), float)}
        if not metrics:
            raise ValueError(f"{own.out}: could not be measured: continue with {again}")
        measured.append({"fold": fold, "run": own.out, **metrics})
    summary: dict[str, Any] = {"folds": measured, **summarise(measured)}
    write_file(out / SUMMARY, to_json(summary, indent=1))
    rows = [{"fold": row["fold"], **{name: row[name] for name in summary["mean"]}} for row in measured]
    rows += [{"fold": name, **summary[name]} for name in ("mean", "std")]
    write_rows(out / "summary.csv", rows)
    return {"run": str(out), **summary}, f"{_table(rows)}\nsummary {out / SUMMARY}"


def summarise(measured: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation (n - 1) of each metric over the folds."""
    names = [name for name in measured[0] if name not in ("fold", "run") and all(name in row for row in measured)]
    values = {name: np.array([row[name] for row in measured]) for name in names}
    return {
        "mean": {name: float(value.mean()) for name, value in values.items()},
        "std": {name: float(value.std(ddof=1)) for name, value in values.items()},
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    cells = [
        names,
        *([f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
