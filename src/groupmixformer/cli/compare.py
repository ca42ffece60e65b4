"""The command compare."""

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .common import GIVEN, Folder, Json, Option, Positive, Reads, UsageError, Works, Writes, command, note, progress, show
from .train import resolve_recipe

if TYPE_CHECKING:
    from ..bench.compare import Plan

EXAMPLE = "gmf compare mobile mobile:mixer=hilo pvt_v2_b0 --recipe folder --data photos --match macs"


def _train(plan: "Plan", jobs: int, cluster: dict[str, Any] | None) -> dict[str, str]:
    """Make the runs and tell how far they are; return the reasons of those that failed."""
    from tqdm import tqdm

    from ..bench.compare import is_done, train_all

    alone = jobs == 1 and cluster is None  # then Lightning shows the bar of a run
    bar, runs, failed = None, -1, dict[str, str]()
    for state in train_all(plan, jobs, cluster):
        failed = state.failed
        if not alone and sys.stderr.isatty():
            bar = bar or tqdm(total=state.all_epochs, initial=state.epochs, unit="epoch")
            bar.update(state.epochs - bar.n)
        elif state.runs != runs:
            left = "" if state.seconds_left is None else f", about {state.seconds_left / 60:.0f} min left"
            done = f"{state.runs} of {state.all_runs} runs and {state.epochs} of {state.all_epochs} epochs done"
            coming = next((run.out for run in plan.all_runs if not is_done(run) and run.out not in failed), "")
            then = f", next {coming}" if alone and coming else ""
            print(f"gmf compare: {done}{left}{then}", file=sys.stderr, flush=True)
        runs = state.runs
    if bar:
        bar.close()
    return failed


@command("compare", EXAMPLE, "train", "cluster")
def compare(
    models: Reads[Sequence[str]] = (),
    *fields: str,
    recipe: Reads[str] = "digits",
    epochs: Works[Positive | None] = None,
    seeds: Works[Positive] = 3,
    match: Works[Literal["none", "macs", "parameters"]] = "none",
    also: Annotated[
        Works[Sequence[Literal["robustness", "shift", "resolution", "heads", "faithfulness"]]], Option(metavar="MEASURE")
    ] = (),
    jobs: Works[Positive] = 1,
    cluster: Annotated[Works[Sequence[str]], Option(metavar="NAME=VALUE")] = (),
    out: Writes[Folder] = Path("runs/compare"),
    show_only: Annotated[Reads[Folder | None], Option(name="show")] = None,
    json: Json = False,
) -> None:
    """Train models side by side by one recipe and set their results against each other.

    Given again, it continues; further models and seeds join what the folder holds.
    Every field of the recipe is an option too: gmf train RECIPE --help lists them.

    Args:
        models: variants or models of timm, with options of their constructors: mobile:mixer=hilo,depths=1,1,4,1; or a YAML file
            with the fields models, recipe, fields, epochs, seeds, match, out, jobs and cluster
        fields: options of the recipe, such as ``--batch-size 8 --optimizer.lr=1e-4``
        recipe: a shipped recipe or a YAML file
        epochs: of each run; the recipe's by default
        seeds: runs of each model
        match: scale the width and the MLPs of the others to the first model's multiply-accumulates or parameters
        also: of the trained models: robustness (top-1 under corruptions at 5 levels), shift (share of shifted images that keep
            their class), resolution (top-1 at other sizes), heads (how alike they are), faithfulness (of maps by group size)
        jobs: runs at a time
        cluster: run the jobs by submitit, with its settings: cluster=slurm slurm_partition=gpu timeout_min=600
        out: folder of the comparison
        show_only: draw tables and figures of a comparison again, as far as its runs are done; train nothing
    """
    from ..bench.beyond import measure_beyond
    from ..bench.compare import is_done, make_plan, measure_speed, parse_settings, read_plan, read_spec
    from ..bench.comparison import compare as put_together
    from ..bench.comparison import headline, remarks, text_table, write_comparison

    words = [models] if isinstance(models, str) else list(models)  # the first of `fields` where no model is named
    failed: dict[str, str] = {}
    if show_only:
        if words or fields or set(GIVEN.get()) - {"show_only", "also", "json"}:
            raise UsageError("--show draws what a folder holds and takes no other option but --also and --json")
        plan = read_plan(show_only)
        if plan is None:
            raise ValueError(f"{show_only}: holds no comparison: gmf compare MODEL... --out {show_only} makes one")
    else:
        if not words or words[0].startswith("--"):
            raise UsageError("expected models, such as mobile mobile:mixer=hilo, or a YAML file")
        spec: dict[str, Any] = {"models": {word: word for word in words}}
        if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
            spec = read_spec(Path(words[0]))
        elif len({*words}) < len(words):
            raise UsageError("expected each model once")
        settings: dict[str, Any] = {
            "recipe": recipe,
            "seeds": seeds,
            "match": match,
            "jobs": jobs,
            "out": out,
            "epochs": epochs,
        }
        chosen = settings | spec | {name: value for name, value in settings.items() if name in GIVEN.get()}
        own = [f"--{k}={v if isinstance(v, str) else json_module.dumps(v)}" for k, v in spec.get("fields", {}).items()]
        own += [f"--epochs={chosen['epochs']}"] if chosen["epochs"] else []
        nodes = parse_settings(cluster) if cluster else spec.get("cluster")
        resolved = resolve_recipe(chosen["recipe"], [*own, *fields])
        plan = make_plan(Path(chosen["out"]), resolved, spec["models"], chosen["match"], chosen["seeds"])
        failed = _train(plan, chosen["jobs"], nodes)
        measure_speed(plan, progress)
    if also:
        for run in progress([run for run in plan.all_runs if is_done(run)], "further measures"):
            measure_beyond(run, also)
    result = put_together(plan)
    files = write_comparison(plan, result)
    result |= {"failed": failed, "files": [str(path) for path in files]}
    for line in remarks(result):
        note(line)
    show(result, json, f"{headline(result)}\n\n{text_table(result)}\n\npage  {files[0]}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(plan.all_runs)} runs failed: {next(iter(failed.values()))}: give it again")
