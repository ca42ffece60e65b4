"""Models trained side by side: one recipe, one budget, several seeds, equal parameters or multiply-accumulates where wanted.

The folder of a comparison holds `PLAN`, the models as they were matched; an ordinary run folder for each model and seed, which
resumes after a kill, with `OUTCOME` and `PREDICTIONS` of the held-out images beside it once it is done; and `SPEED`.
What follows from them is in `comparison.py`.
"""

import contextlib
import csv
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..files import atomic_write, one_line, read_json, read_text, to_json, write_file, write_rows
from ..models.checkpoint import model_name
from ..run_folder import RECIPE, RunFolder, read_metrics
from ..tasks.classification.data import open_images
from ..tasks.classification.training import create_classifier
from ..tasks.registry import PRECISIONS, build_task, find_task, resolve_device
from ..training.callbacks import Stopped
from ..training.recipe import Recipe, fields_of, read_recipe, write_recipe
from ..training.trainer import train
from ..weights import LOGGER as WEIGHTS_LOGGER
from .matching import costs, match
from .side_by_side import conditions
from .timing import Runner, Settings, measure

PLAN, SPEED, OUTCOME, PREDICTIONS = "compare.json", "speed.json", "outcome.json", "predictions.csv"
OWN = ("model", "seed", "out", "workers", "device")  # fields that may differ between the runs, or when it is continued


@dataclass(frozen=True)
class Candidate:
    """A model of a comparison.

    Attributes:
        name: In tables and figures.
        text: As it was asked for, such as ``mobile:mixer=hilo``.
        model: timm's name.
        options: Of its constructor.
        matched: Which of them were scaled, in words; empty where none was.
        parameters: With the classifier for the data.
        macs: Multiply-accumulates of one image.
    """

    name: str
    text: str
    model: str
    options: dict[str, Any]
    matched: str
    parameters: int
    macs: int


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``mobile:mixer=hilo,depths=1,1,4,1,mixer_options.alpha=0.3`` into timm's name and options of the constructor.

    Raises:
        ValueError: If there is no such model, or an option has no value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in re.split(r",(?=[A-Za-z_][\w.]*=)", rest) if rest else ():
        key, equals, value = part.partition("=")
        try:
            values = yaml.safe_load(f"[{value}]")
        except yaml.YAMLError:
            values = None
        if not (equals and values):
            raise ValueError(f"{text}: got {part!r}, expected options with values, as in mobile:mixer=hilo,depths=1,1,4,1")
        section, _, inner = key.rpartition(".")
        (options.setdefault(section, {}) if section else options)[inner] = values[0] if len(values) == 1 else values
    return model_name(name), options


SPEC: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "match", "out"), (str,)),
    **dict.fromkeys(("epochs", "seeds", "jobs"), (int,)),
    **dict.fromkeys(("fields", "cluster"), (dict,)),
    "models": (list, dict),
}


def read_spec(path: Path) -> dict[str, Any]:
    """Read a comparison from a YAML file: fields of `SPEC`, of which ``models`` is a list, or names with their models.

    Raises:
        ValueError: If it is no YAML file, or a field does not exist or is of another type.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file: {one_line(error)}") from error
    if not isinstance(content, dict) or not content.get("models"):
        raise ValueError(f"{path}: expected fields of a comparison, with models at least")
    for name, value in content.items():
        if name not in SPEC:
            near = get_close_matches(str(name), SPEC, n=1, cutoff=0.0)[0]
            raise ValueError(f"{path}: has no field {name}: the nearest is {near}")
        if not isinstance(value, SPEC[name]) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r}, expected {' or '.join(kind.__name__ for kind in SPEC[name])}")
    models = content["models"]
    content["models"] = {str(k): str(v) for k, v in (models if isinstance(models, dict) else {m: m for m in models}).items()}
    return content


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the settings in words such as ``timeout_min=600``, their values as in YAML.

    Raises:
        ValueError: If one has no value.
    """
    if bad := [word for word in words if not re.fullmatch(r"\w+=.+", word)]:
        raise ValueError(f"got {bad[0]!r}, expected settings with values, as in timeout_min=600")
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


@dataclass(frozen=True)
class Plan:
    """A comparison: what is trained, and where.

    Attributes:
        folder: Of the comparison.
        recipe: Of all runs, but for the model, the seed and the folder.
        match: ``macs``, ``parameters`` or ``none``.
        models: The first is what the others are matched to and compared with.
        seeds: How many; they begin with the recipe's.
    """

    folder: Path
    recipe: Recipe
    match: str
    models: list[Candidate]
    seeds: int

    def runs(self, model: Candidate) -> list[Recipe]:
        """Return the recipe of each run of a model, by seed."""
        place = self.folder / "runs" / (re.sub(r"[^\w=.,-]+", "-", model.name)[:100].strip(".-") or "model")
        common = replace(self.recipe, model=model.model, model_options=model.options)
        seeds = range(self.recipe.seed, self.recipe.seed + self.seeds)
        return [replace(common, seed=seed, out=str(place / f"seed-{seed}")) for seed in seeds]

    @property
    def all_runs(self) -> list[Recipe]:
        """The recipe of every run, in the order in which they are made: a seed of all models, then the next."""
        return [run for runs in zip(*map(self.runs, self.models), strict=True) for run in runs]


def _common(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in yaml.safe_load(to_json(fields_of(recipe))).items() if name not in OWN}


def read_plan(folder: Path) -> Plan | None:
    """Read the plan of a comparison; none where there is none.

    Raises:
        ValueError: If it is not what `make_plan` writes.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        models = [Candidate(**model) for model in content["models"]]
        return Plan(folder, read_recipe(str(folder / RECIPE)), content["match"], models, int(content["seeds"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a comparison that gmf compare wrote: {one_line(error)}") from error


def make_plan(folder: Path, recipe: Recipe, texts: Mapping[str, str], kind: str, seeds: int) -> Plan:
    """Match the models and write the plan; what the folder compares already stays, and further models and seeds join it.

    Args:
        folder: Of the comparison.
        recipe: Of all runs; its model_options are those of all models.
        texts: Each model as `parse_model` takes it, by its name in tables.
        kind: ``macs``, ``parameters`` or ``none``.
        seeds: How many.

    Raises:
        ValueError: If a model does not exist or cannot be matched, or the folder holds a comparison by another recipe.
    """
    if recipe.task != "classification":
        raise ValueError(f"got a recipe for {recipe.task}, expected one for classification")
    if recipe.checkpoint:
        raise ValueError("got a recipe with a checkpoint, expected none: models are compared from random weights")
    if recipe.val_share or recipe.folds:
        raise ValueError("got val_share or folds, expected data with a held-out part of its own, which all seeds share")
    earlier = read_plan(folder)
    if earlier:
        then, now = ({**_common(r), "seed": r.seed, "match": k} for r, k in ((earlier.recipe, earlier.match), (recipe, kind)))
        if changed := [f"{name} {then.get(name)}, not {now.get(name)}" for name in now if then.get(name) != now.get(name)]:
            raise ValueError(f"{folder}: holds a comparison with {'; '.join(changed)}: choose another folder with --out")
    models = list(earlier.models) if earlier else []
    images = open_images(recipe.data, recipe.root, recipe.download)
    if images.several:
        raise ValueError(
            f"{recipe.data}: its images have several labels, expected one class each: models are compared by top-1"
        )
    class_names = images.class_names
    for name, text in texts.items():
        same = next((model for model in models if model.name == name), None)
        if same and same.text != text:
            raise ValueError(f"{folder}: {name} is {same.text} there, not {text}: choose another name")
        if same:
            continue
        model, options = parse_model(text)
        options, matched = {**recipe.model_options, **options}, ""
        chosen = replace(recipe, model=model, model_options=options)
        if kind != "none" and models:
            scaled, matched = match(chosen, class_names, kind, asdict(models[0])[kind])
            chosen = replace(chosen, model_options=options | scaled)
        models.append(Candidate(name, text, model, chosen.model_options, matched, **costs(chosen, class_names)))
    plan = Plan(folder, recipe, kind, models, max(seeds, earlier.seeds if earlier else 0))
    if len({run.out for run in plan.all_runs}) < len(plan.all_runs):
        raise ValueError("got two models whose names give the same folder, expected names that differ in letters or digits")
    content = {"match": kind, "seeds": plan.seeds, "models": [asdict(model) for model in models]}
    write_recipe(recipe, folder / RECIPE)
    write_file(folder / PLAN, to_json(content, indent=2))
    return plan


def is_done(run: Recipe) -> bool:
    """Whether a run was trained to its end and evaluated."""
    return (Path(run.out) / OUTCOME).is_file()


def open_last(run: Recipe, image_size: int | None = None) -> Any:
    """Return what looks at images with the weights of the last epoch, which were not chosen by the held-out images."""
    checkpoint, device = RunFolder(run.last_checkpoint), resolve_device(run.device)
    dtype = PRECISIONS.get(run.precision)  # with auto, measured in float32
    WEIGHTS_LOGGER.disabled = True  # it would say that these are weights of a checkpoint
    try:
        return find_task(run.task).predictor(checkpoint, device, image_size, dtype)
    finally:
        WEIGHTS_LOGGER.disabled = False


def train_and_evaluate(run: Recipe) -> None:
    """Train, or continue, and evaluate the weights of the last epoch.

    Raises:
        KeyboardInterrupt: If a signal stopped it, after it was saved.
        ValueError: If it cannot be trained.
    """
    folder = Path(run.out)
    try:
        train(run, build_task, "auto")
    except Stopped as stop:
        raise KeyboardInterrupt from stop
    predictor = open_last(run)
    found = predictor.evaluate(predictor.open_data(run.data, root=run.root), run.workers).evaluation
    rows = [
        {"position": position, "true": true, "predicted": predicted, "confidence": confidence}
        for position, true, predicted, confidence in zip(
            *(tensor.tolist() for tensor in (found.positions, found.true, found.predicted, found.confidence)), strict=True
        )
    ]
    measured = {name: found.metrics[name] for name in ("top1", "top5", "loss", "calibration_error", "images", "skipped")}
    with atomic_write(folder / PREDICTIONS, folder / OUTCOME) as temporary:
        write_rows(temporary / PREDICTIONS, rows)
        (temporary / OUTCOME).write_text(to_json(measured, indent=2))


def read_predictions(run: Recipe) -> list[tuple[int, str, str]]:
    """Return the position of each held-out image of a run that is done, its class, and that which was found."""
    with (Path(run.out) / PREDICTIONS).open(newline="") as file:
        return [(int(row["position"]), row["true"], row["predicted"]) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class State:
    """How far the runs of a comparison are.

    Attributes:
        runs: Done.
        all_runs: Of the plan.
        epochs: Done, of all runs.
        all_epochs: Of the plan.
        seconds_left: By the speed so far; none before the first epoch.
        failed: Reasons by the folder of the run.
    """

    runs: int
    all_runs: int
    epochs: int
    all_epochs: int
    seconds_left: float | None
    failed: dict[str, str]


def _epochs(run: Recipe) -> int:
    return run.epochs if is_done(run) else min(run.epochs, len(read_metrics(Path(run.out))))


def _end_with_parent() -> None:
    """Wait until the process that gives the runs is gone, however it went, and stop: a run in training saves itself first."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def _start_worker(places: Any, threads: int) -> None:
    """Give a process its share of the machine."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if place := places.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    torch.set_num_threads(threads)


def _pool(jobs: int, device: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    devices = [""]
    if resolve_device(device).type == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    for job in range(jobs):
        places.put(devices[job % len(devices)])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(places, threads))


def _cluster(folder: Path, jobs: int, settings: Mapping[str, Any]) -> Any:
    import submitit

    given = dict(settings)
    executor = submitit.AutoExecutor(folder / "jobs", given.pop("cluster", None))
    most = {"slurm_array_parallelism": jobs} if executor.cluster == "slurm" else {}
    executor.update_parameters(**most | given)
    return executor


def train_all(plan: Plan, jobs: int = 1, cluster: Mapping[str, Any] | None = None) -> Iterator[State]:
    """Make the runs that are not done.

    Args:
        plan: Names them.
        jobs: At a time; 1 trains in this process.
        cluster: Settings of submitit's `AutoExecutor`, such as slurm_partition and timeout_min, and ``cluster``, which it is;
            none for this machine.

    Yields:
        How far they are, once at first, then after each run, or with several at a time, after each epoch.
    """
    runs, failed = plan.all_runs, dict[str, str]()
    waiting = [run for run in runs if not is_done(run)]
    start, before = time.monotonic(), sum(map(_epochs, runs))

    def state() -> State:
        done, total = sum(map(_epochs, runs)), sum(run.epochs for run in runs)
        left = (time.monotonic() - start) * (total - done) / (done - before) if done > before else None
        return State(sum(map(is_done, runs)), len(runs), done, total, left, dict(failed))

    def note(run: Recipe, error: BaseException) -> None:
        failed[run.out] = f"{type(error).__name__}: {one_line(error)}"
        logging.getLogger(__name__).warning(f"{run.out}: {failed[run.out]}")

    yield state()
    if jobs == 1 and cluster is None:
        for run in waiting:
            try:
                train_and_evaluate(run)
            except (ValueError, OSError, RuntimeError) as error:  # the others can still be trained
                note(run, error)
            yield state()
        return
    executor: Any = _pool(jobs, plan.recipe.device) if cluster is None else _cluster(plan.folder, jobs, cluster)
    array = contextlib.nullcontext() if cluster is None else executor.batch()  # limits the jobs at a time on SLURM
    with array:
        futures = {executor.submit(train_and_evaluate, run): run for run in waiting}
    try:
        last = state()
        while futures:
            for future in [future for future in futures if future.done()]:
                run = futures.pop(future)
                if raised := future.exception():
                    note(run, raised)
            now = state()
            if (now.runs, now.epochs, now.failed) != (last.runs, last.epochs, last.failed):
                yield now
                last = now
            time.sleep(0.5)
    finally:
        for future in futures:
            future.cancel()
        if cluster is None:
            executor.shutdown(cancel_futures=True)


def measure_speed(plan: Plan, progress: Any) -> None:
    """Measure the models side by side in one run, training and inference, and write `SPEED`; not again for the same models."""
    path, recipe = plan.folder / SPEED, plan.recipe
    names = [model.name for model in plan.models]
    if path.is_file() and [row["model"] for row in read_json(path)["inference"]] == names:
        return
    classes = open_images(recipe.data, recipe.root, recipe.download).class_names

    def build(model: Candidate, settings: Settings) -> Runner:
        torch.manual_seed(0)
        runner = Runner(create_classifier(plan.runs(model)[0], classes), settings)
        runner.targets = runner.targets % len(classes) if settings.train else runner.targets  # those of ImageNet
        return runner

    content: dict[str, Any] = {}
    for kind in ("inference", "training"):
        settings = Settings(
            train=kind == "training",
            batch_size=recipe.batch_size,
            size=(recipe.image_size, recipe.image_size),
            dtype="fp32" if recipe.precision == "auto" else recipe.precision,  # as it is measured in `open_last`
            channels_last=recipe.channels_last,
            device=str(resolve_device(recipe.device)),
            threads=torch.get_num_threads(),
        )
        builds = {model.name: partial(build, model, settings) for model in plan.models}
        content |= conditions(settings) | {kind: measure(builds, settings, progress)}
    write_file(path, to_json(content | {"batch_size": recipe.batch_size}, indent=2))
