"""What the commands of gmf share: how a command and its options are declared, results on stdout, progress on stderr."""

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., None])


class UsageError(Exception):
    """Wrong usage: exit 2."""


@dataclass(frozen=True)
class Command:
    """A command of gmf: what its typed function takes is what may be typed.

    Parameters before ``*`` are positional, a ``Sequence`` takes several words, ``*fields`` what the command's options leave.

    Attributes:
        function: Its docstring is the help; its defaults are those of the options.
        example: A line that works, for the help.
        extras: Extras of the package whose libraries the command may import; the first one is needed most often.
    """

    function: Callable[..., None]
    example: str
    extras: tuple[str, ...]


COMMANDS: dict[str, Command] = {}
EXTRAS = ("train", "detection", "segmentation", "data")  # of commands that take models of all tasks


def command(name: str, example: str, *extras: str) -> Callable[[Function], Function]:
    """Make a typed function the command `name`."""

    def register(function: Function) -> Function:
        COMMANDS[name] = Command(function, example, extras or ("train",))
        return function

    return register


@dataclass(frozen=True)
class Option:
    """What an annotation adds to a parameter's type; what is None is said by another annotation, or by the type itself.

    Attributes:
        read: Makes the value out of a word; raises argparse.ArgumentTypeError.
        metavar: The help's word for the value.
        help: For parameters of several commands; of others the docstring tells.
        group: Title in the help.
        bare: Value of the option where no word follows it.
    """

    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    help: str | None = None
    group: str | None = None
    bare: str | None = None


def _number(least: int) -> Callable[[str], int]:
    """Return what reads an option's whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"got {text}, expected a whole number from {least}")
        return int(text)

    return read


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ArgumentTypeError(f"got {text}, expected a number above 0 and up to 1")
    return share


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (math.nan,)
    if not all(0.05 <= scale <= 20 for scale in scales):
        raise ArgumentTypeError(f"got {text}, expected factors from 0.05 to 20, such as 0.75,1,1.25")
    return scales


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or path.is_dir():
        raise ArgumentTypeError(f"got {text}, expected the name of a .png, .svg or .pdf file")
    return path


def _pixel(text: str) -> tuple[int, int]:
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal()):
        raise ArgumentTypeError(f"got {text}, expected a pixel's row and column, such as 120,80")
    return int(row), int(column)


# Titles in the help, in their order.
GROUPS = ("what it reads", "how it works", "how it looks at images", "what it writes")
Reads = Annotated[T, Option(group=GROUPS[0])]
Works = Annotated[T, Option(group=GROUPS[1])]
Looks = Annotated[T, Option(group=GROUPS[2])]
Writes = Annotated[T, Option(group=GROUPS[3])]

Positive = Annotated[int, Option(_number(1), "N")]
NonNegative = Annotated[int, Option(_number(0), "N")]
Side = Annotated[int, Option(_number(32), "N")]
Share = Annotated[float, Option(_share, "X")]
Scales = Annotated[tuple[float, ...], Option(_scales, "X,X...")]
Pixel = Annotated[tuple[int, int], Option(_pixel, "Y,X")]
File = Annotated[Path, Option(Path, "FILE")]
Folder = Annotated[Path, Option(Path, "DIR")]
Figure = Annotated[Path, Option(_figure, "FILE")]
Precision = Literal["fp32", "bf16", "fp16"]

# Options of several commands.
Run = Annotated[Reads[str], Option(help="folder of a run or of gmf convert, checkpoint file, or hf-hub:user/name")]
Images = Annotated[Reads[Sequence[str]], Option(help="files, folders or quoted globs")]
Root = Annotated[Reads[str], Option(metavar="DIR", help="where timm's data sets lie")]
Device = Annotated[Works[str], Option(help="auto, cpu, cuda, ...")]
Host = Annotated[Works[str], Option(help="address to listen on; by default this machine alone")]
Port = Annotated[Works[NonNegative], Option(help="0 takes one that is free")]
ImageSize = Annotated[Looks[Positive | None], Option(help="side of the images; the model's own by default")]
SlidingWindow = Annotated[Looks[bool], Option(help="for segmentation: look through windows of the training size")]
ScalesOption = Annotated[Looks[Scales], Option(help="for segmentation: average over sizes, such as 0.75,1,1.25")]
Flip = Annotated[Looks[bool], Option(help="for segmentation: average with the mirrored image")]
Top = Annotated[Writes[Positive], Option(help="for classification: classes to name")]
ScoreThreshold = Annotated[Writes[Share], Option(help="for detection: least score of an object that is shown")]
Json = Annotated[Writes[bool], Option(help="print one JSON object on stdout")]

# Names that options had before; they are still understood.
OLD_NAMES = {
    "slide": "sliding-window",
    "score": "score-threshold",
    "against": "baseline",
    "rounds": "repeats",
    "dtype": "precision",
    "variant": "model",
}


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a result: one JSON object, or `text`."""
    print(json.dumps(result) if as_json else text, flush=True)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Show a bar on a terminal; the total is the number of items where that is known."""
    from tqdm import tqdm

    return tqdm(items, what, total, disable=None, leave=False)


def requirements_of_extras() -> dict[str, list[Any]]:
    """Return what each extra of the installed package requires, as packaging's Requirement; nothing if it is not installed."""
    from importlib.metadata import PackageNotFoundError, metadata, requires

    from packaging.requirements import Requirement

    try:
        extras = metadata("groupmixformer").get_all("Provides-Extra") or []
        needs = [Requirement(line) for line in requires("groupmixformer") or ()]
    except PackageNotFoundError:
        return {}
    core = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return {
        extra: [need for need in needs if need not in core and need.marker and need.marker.evaluate({"extra": extra})]
        for extra in extras
    }


def torch_device(name: str) -> Any:
    """Return the torch.device of an option, auto being a GPU where there is one."""
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def torch_dtype(precision: str) -> Any:
    """Return the type of autocast, None for float32."""
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


# Options of gmf eval, predict and serve that mean something to some tasks only.
TASK_OPTIONS = {
    "classification": ("test_size", "crop_pct", "crop_mode", "interpolation", "plot", "batch_size", "root", "top", "max_batch"),
    "detection": ("split", "out", "score_threshold"),
    "segmentation": ("split", "out", "sliding_window", "scales", "flip"),
}
# Parameters that were given on the command line, each with the option as it was typed.
GIVEN: ContextVar[dict[str, str]] = ContextVar("GIVEN", default={})  # noqa: B039 - never changed in place


def task_of_run(run: str) -> str:
    """Return the task of the model that is named, and refuse options that it has no use for."""
    from ..models.checkpoint import task_of

    task = task_of(run)
    for name, option in GIVEN.get().items():
        tasks = [other for other, names in TASK_OPTIONS.items() if name in names]
        if tasks and task not in tasks:
            raise UsageError(f"{option} is for {' and '.join(tasks)}, and {run} holds a model for {task}")
    return task


def data_of(run: str) -> tuple[str, str]:
    """Return the data set that a run was trained on, and its root."""
    recipe = Path(run, "recipe.yaml")
    if not recipe.is_file():
        raise ValueError(f"{run}: has no recipe that names a data set: name one with --data")
    from ..training.recipe import read_recipe

    stored = read_recipe(str(recipe))
    return stored.data, stored.root
