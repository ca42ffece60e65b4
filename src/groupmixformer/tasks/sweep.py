"""A sweep: runs by one recipe with fields chosen by Optuna, which learns from their results where to look next."""

import logging
import math
import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import optuna
from lightning.pytorch.callbacks import Callback
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy import URL

from ..files import to_json, write_file, write_rows
from ..run_folder import RECIPE, one_line, read_metrics
from ..training.claim import Claim
from ..training.module import Task
from ..training.recipe import RecipeError, read_recipe, write_recipe
from ..training.trainer import processes
from ..visual.charts import new_axes
from ..visual.figures import BLUE, tip
from ..visual.page import Block, Chart, Table, html_head, html_page, html_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training.recipe import Recipe

LOGGER = logging.getLogger(__name__)
HEARTBEAT = 10  # seconds between signs of life of a process that trains; after three without one its trial is taken over
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of signs of life, there since 2.8
RETRY = RetryHeartbeatStaleTrialCallback(max_retry=9)  # in the same run folder, which continues
FAILED = "failed"  # attribute of a trial whose run failed, with the reason
TrainRun = Callable[["Recipe", Sequence[Callback]], dict[str, Any]]


@dataclass(frozen=True)
class Space:
    """The values of a field that a sweep tries: numbers from `low` to `high`, whole ones or any, or `choices`."""

    field: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Space":
        """Read ``FIELD=LOW..HIGH``, ``FIELD=LOW..HIGH:log`` or ``FIELD=VALUE,VALUE,...``.

        Raises:
            RecipeError: If it is none of these.
        """
        field, _, values = text.partition("=")
        field = field.removeprefix("--").replace("-", "_")
        number = r"[+-]?[\d.]+?(?:e[+-]?\d+)?"
        if span := re.fullmatch(rf"({number})\.\.({number})(:log)?", values, re.IGNORECASE):
            low, high = float(span[1]), float(span[2])
            if not low < high or (span[3] and low <= 0):
                raise RecipeError(f"got {text}, expected a range from a smaller to a greater number, both above 0 with :log")
            return cls(field, low, high, bool(span[3]), whole=span[1].isdecimal() and span[2].isdecimal())
        choices = tuple(filter(None, values.split(",")))
        if not field or len(choices) < 2 or ".." in values:
            raise RecipeError(f"got {text}, expected such as optimizer.lr=1e-4..1e-2:log, epochs=5..20 or model=mobile,tiny")
        return cls(field, choices=choices)

    def suggest(self, trial: optuna.Trial) -> Any:
        """Let Optuna choose a value."""
        if self.low is None or self.high is None:
            return trial.suggest_categorical(self.field, self.choices)
        if self.whole:
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.field, self.low, self.high, log=self.log)

    def option(self, value: Any) -> str:
        """Return the option of `gmf train` that sets the field."""
        return f"--{self.field}={value}"


class _Report(Callback):
    """Tells Optuna the metric after each epoch, and ends a run that does worse than half of the others did by then.

    Raises:
        optuna.TrialPruned: To end it.
    """

    def __init__(self, trial: optuna.Trial, prune: bool) -> None:
        self.trial, self.prune, self.best, self.metric = trial, prune, -1.0, ""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # Not when training starts: of a run that was ended before its report nothing is left to train.
        assert isinstance(pl_module, Task)
        self.metric = pl_module.monitor
        if not self.metric:
            raise ValueError(
                f"runs for {pl_module.recipe.task} have no metric to compare them by: sweep what is trained on them"
            )
        self.trial.set_user_attr("metric", self.metric)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.best = max(self.best, float(trainer.callback_metrics[self.metric]))
        self.trial.report(self.best, trainer.current_epoch)
        if self.prune and trainer.current_epoch + 1 < pl_module.recipe.epochs and self.trial.should_prune():
            raise optuna.TrialPruned


def open_study(out: Path, storage: str | None, seed: int) -> optuna.Study:
    """Open the study of a sweep in its folder, or elsewhere so that several machines share it; make it if it is not there."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a run that fails is told in a line
    out.mkdir(parents=True, exist_ok=True)
    kept = RDBStorage(
        storage or URL.create("sqlite", database=str(out / "sweep.db")).render_as_string(),
        heartbeat_interval=HEARTBEAT,
        grace_period=3 * HEARTBEAT,
        heartbeat_stale_trial_callback=RETRY,
    )
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    study = optuna.create_study(study_name=out.name, storage=kept, pruner=pruner, direction="maximize", load_if_exists=True)
    # A process that joins or continues must not draw the values of the first again.
    study.sampler = optuna.samplers.TPESampler(seed=None if study.trials else seed, multivariate=True)
    return study


def sweep(
    name: str,
    options: Sequence[str],
    spaces: Sequence[Space],
    trials: int,
    out: Path,
    train_run: TrainRun,
    storage: str | None = None,
    prune: bool = True,
) -> dict[str, Any]:
    """Train runs by a recipe with fields that Optuna chooses, until so many are done in the sweep by all that work on it.

    Each is an ordinary run, in trial-0, trial-1, ... of the folder. Given again, it goes on; a trial whose process ended is
    continued by the next that has been free for half a minute.

    Args:
        name: Of a shipped recipe, or its file.
        options: Its other fields.
        spaces: Fields that are chosen.
        trials: That are done at the end, those of before included.
        out: Folder of the sweep.
        train_run: Trains a run by its recipe with further callbacks, or continues it, and returns what was measured.
        storage: Of Optuna, as a URL of SQLAlchemy; by default a file in the folder.
        prune: Whether runs end early that do worse after an epoch than half of the others did.

    Returns:
        The best trial, and all of them.

    Raises:
        ValueError: If a field does not exist or a value does not fit, the recipe asks for several processes, the folder is
            that of another sweep, or no run could be finished.
    """
    for space in spaces:  # all values are checked before the first run
        ends = [int(end or 0) if space.whole else end for end in (space.low, space.high)]
        for value in space.choices or ends:
            read_recipe(name, [*options, space.option(value)])
    base = read_recipe(name, [*options, f"--out={out}"])
    devices, nodes = processes(base)
    if devices * nodes > 1:
        raise ValueError(f"got {devices * nodes} processes, expected one: give the command several times instead")
    study = open_study(out, storage, base.seed)
    about = {"recipe": name, "options": list(options), "spaces": [vars(space) for space in spaces]}
    before = study.user_attrs.get("about")
    if before is not None and to_json(before) != to_json(about):
        raise ValueError(f"{out}: holds a sweep of other fields: {to_json(before)[:200]}: choose another --out")
    study.set_user_attr("about", about)
    write_recipe(base, out / RECIPE)

    def objective(trial: optuna.Trial) -> float:
        chosen = [space.option(space.suggest(trial)) for space in spaces]
        before = RETRY.retried_trial_number(study.trials[trial.number])
        trial.set_user_attr("run", f"trial-{trial.number if before is None else before}")
        folder, report = out / trial.user_attrs["run"], _Report(trial, prune)
        LOGGER.warning(f"trial {len(_finished(study)) + 1} of {trials}, {folder}: {' '.join(chosen)}")
        try:
            train_run(read_recipe(name, [*options, *chosen, f"--out={folder}"]), [report])
        except ValueError as error:
            trial.set_user_attr(FAILED, one_line(error))
            LOGGER.warning(f"{folder}: failed: {one_line(error)}")
            raise
        return max(report.best, *(row[report.metric] for row in read_metrics(folder)))

    def enough(study: optuna.Study, _: Any = None) -> None:
        if len(_finished(study)) >= trials:
            study.stop()

    if len(_finished(study)) < trials:
        _take_over(study, out)
        study.optimize(objective, callbacks=[enough], catch=(ValueError,))
    return _write(study, out, [name, *options])


def _finished(study: optuna.Study) -> list[Any]:
    """Return the trials that count; those that another one has continued do not."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [trial for trial in ended if trial.state != TrialState.FAIL or FAILED in trial.user_attrs]


def _take_over(study: optuna.Study, out: Path) -> None:
    """Let trials whose processes have ended be continued at once, where their run folders tell that they have."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = out / trial.user_attrs.get("run", "")
        try:
            if folder == out or not folder.is_dir():
                continue
            with Claim(folder):
                study.tell(trial.number, state=TrialState.FAIL)
        except ValueError:  # it is claimed: the process lives
            continue
        RETRY(study, study.trials[trial.number])


def _write(study: optuna.Study, out: Path, words: Sequence[str]) -> dict[str, Any]:
    """Write sweep.json, sweep.csv and sweep.html; return what the first holds.

    Raises:
        ValueError: If no trial was completed.
    """
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value
            if trial.state == TrialState.COMPLETE
            else max(trial.intermediate_values.values(), default=None),
            **trial.params,
            "run": str(out / trial.user_attrs["run"]),
        }
        for trial in _finished(study)
    ]
    completed = [row for row in rows if row["state"] == "complete"]
    if not completed:
        reasons = [trial.user_attrs.get(FAILED) for trial in _finished(study)]
        raise ValueError(
            f"{out}: none of {len(rows)} trials was completed: {next(filter(None, reasons), 'all were ended early')}"
        )
    best = max(completed, key=lambda row: row["value"])
    params = study.trials[best["trial"]].params
    metric = study.trials[best["trial"]].user_attrs["metric"]
    command = shlex.join(["gmf", "train", *words, *(f"--{name}={value}" for name, value in params.items())])
    importance = {}
    if len(completed) > 3 and len(params) > 1:
        importance = optuna.importance.get_param_importances(study)
    result = {"metric": metric, "best": best, "command": command, "importance": importance, "trials": rows}
    write_file(out / "sweep.json", to_json(result, indent=1))
    write_rows(out / "sweep.csv", rows)
    tiles = {metric: f"{best['value']:.4f}", "trials": len(rows), "ended early": sum(row["state"] == "pruned" for row in rows)}
    head = html_head(f"Sweep {out.name}", f"Best: {metric} {best['value']:.4f}", tiles, [f"Again: {command}"])
    charts: list[Block] = [Chart(f"sweep-{i}", name, partial(_scatter, rows, name, metric)) for i, name in enumerate(params)]
    ranked = sorted(rows, key=lambda row: -math.inf if row["value"] is None else row["value"], reverse=True)
    table = Table(list(ranked[0]), [["" if cell is None else _shown(cell) for cell in row.values()] for row in ranked])
    write_file(
        out / "sweep.html", html_page(f"Sweep {out.name}", head + html_section("", charts) + html_section("Trials", [table]))
    )
    return result


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scatter(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> "Figure":
    """Draw the metric over a field; trials that ended early are hollow."""
    rows = [row for row in rows if row["value"] is not None]
    values = [row[name] for row in rows]
    wide = all(isinstance(value, float) and value > 0 for value in values) and max(values) > 20 * min(values)
    scale: dict[str, Any] = {"xscale": "log"} if wide else {}
    figure, axes = new_axes(xlabel=name, ylabel=metric, **scale)
    for row in rows:
        done = row["state"] == "complete"
        (point,) = axes.plot([row[name]], [row["value"]], "o", color=BLUE, fillstyle="full" if done else "none")
        tip(point, f"trial {row['trial']}: {name} {_shown(row[name])}, {metric} {row['value']:.4f}")
    return figure
