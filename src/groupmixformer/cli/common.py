"""What the commands of gmf share: how a command and its options are declared, results on stdout, progress on stderr."""

import logging
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from ..files import printable, to_json

if TYPE_CHECKING:  # importing it takes a second
    from ..run import Run

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
EXTRAS = ("train", "detection", "segmentation", "data", "tiff", "transformers")  # of commands for models of all tasks


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
        name: Of the option, if that is not the parameter's.
    """

    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    help: str | None = None
    group: str | None = None
    bare: str | None = None
    name: str | None = None


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


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _figure(text: str) -> Path:
    path = _path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or path.is_dir():
        raise ArgumentTypeError(f"got {text}, expected the name of a .png, .svg or .pdf file")
    return path


def _pixel(text: str) -> tuple[int, int]:
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal()):
        raise ArgumentTypeError(f"got {text}, expected a pixel's row and column, such as 120,80")
    return int(row), int(column)


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s]+", text):  # as browsers send it: any other never matches
        raise ArgumentTypeError(f"got {text}, expected scheme and name without a path, such as https://lab.example, or '*'")
    return text


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
Origin = Annotated[str, Option(_origin, "ORIGIN")]
Pixel = Annotated[tuple[int, int], Option(_pixel, "Y,X")]
# A shell expands ~ only at the beginning of a word, and not in --out=~/runs.
PathText = Annotated[str, Option(os.path.expanduser)]
File = Annotated[Path, Option(_path, "FILE")]
Folder = Annotated[Path, Option(_path, "DIR")]
Figure = Annotated[Path, Option(_figure, "FILE")]
Precision = Literal["fp32", "bf16", "fp16"]

# Options of several commands.
RunPath = Annotated[Reads[PathText], Option(help="folder of a run or of gmf convert, checkpoint file, or hf-hub:user/name")]
Images = Annotated[Reads[Sequence[PathText]], Option(help="files, folders or quoted globs")]
AllowNonfinite = Annotated[Reads[bool], Option(help="load weights that hold NaN or infinite values, to study them")]
Root = Annotated[Reads[PathText], Option(metavar="DIR", help="where timm's data sets lie")]
Device = Annotated[Works[str], Option(help="auto, cpu, cuda, ...")]
Threads = Annotated[
    Works[Positive | None], Option(help="CPU threads of the model; by default measured to be fast, again when images take long")
]
Fuse = Annotated[
    Works[bool], Option(help="take the inference form of a GroupMixFormer, and on CUDA, CUDA graphs (default: yes)")
]
Host = Annotated[Works[str], Option(help="address to listen on; by default this machine alone")]
Port = Annotated[Works[NonNegative], Option(help="0 takes one that is free")]
AllowedHosts = Annotated[
    Works[Sequence[str]],
    Option(metavar="NAME", help="names by which it may be called, beside localhost and --host: '*.example.com', '*' for any"),
]
AccessLog = Annotated[Writes[bool], Option(help="print a JSON object on stdout for each request")]
ImageSize = Annotated[Looks[Positive | None], Option(help="side of the images; the model's own by default")]
SlidingWindow = Annotated[Looks[bool], Option(help="for segmentation: look through windows of the training size")]
ScalesOption = Annotated[Looks[Scales], Option(help="for segmentation: average over sizes, such as 0.75,1,1.25")]
Flip = Annotated[Looks[bool], Option(help="for segmentation: average with the mirrored image")]
Top = Annotated[Writes[Positive], Option(help="for classification: classes to name")]
ScoreThreshold = Annotated[Writes[Share], Option(help="for detection and several labels: least score of what is shown")]
Tile = Annotated[Looks[Side | None], Option(help="for detection: look through windows of N pixels too, for large images")]
Json = Annotated[Writes[bool], Option(help="print one JSON object on stdout")]

# Names that options had before, or have in other tools; they are understood.
OLD_NAMES = {
    "batch": "batch-size",
    "imgsz": "image-size",
    "conf": "score-threshold",
    "slide": "sliding-window",
    "score": "score-threshold",
    "against": "baseline",
    "rounds": "repeats",
    "dtype": "precision",
    "variant": "model",
    "image-size": "size",  # where there is no such option
}
# What is named otherwise in other tools, and is hinted at: TensorRT reads ONNX, and of TorchScript torch.export is the heir.
OTHER_VALUES = {"torchscript": "pt2", "tensorrt": "onnx", "engine": "onnx", "tflite": "litert", "mlmodel": "coreml"}


class Notes(logging.Handler):
    """While it is entered, prints what the package warns of, such as images that were left out, and keeps it for `--json`.

    Args:
        command: Stands before each line.
    """

    def __init__(self, command: str) -> None:
        super().__init__(logging.WARNING)
        self.command, self.texts, self.more = command, list[str](), 0

    def __enter__(self) -> None:
        LOGGER.addHandler(self)

    def __exit__(self, *_: object) -> None:
        LOGGER.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a note."""
        text = record.getMessage()
        if len(self.texts) < MOST_NOTES:
            self.texts.append(text)
        else:
            self.more += 1
        print(f"gmf {self.command}: {printable(text)}", file=sys.stderr, flush=True)


LOGGER = logging.getLogger("groupmixformer")
MOST_NOTES = 10_000  # that are kept: a server takes them for months
note = LOGGER.warning


def tell(notes: Iterable[str], skipped: Iterable[str]) -> None:
    """Note what is said of data, and what was skipped of it."""
    for line in [*notes, *(f"skipped {problem}" for problem in skipped)]:
        note(line)


def show(result: dict[str, Any], as_json: bool, text: str, with_notes: bool = True) -> None:
    """Print a result: one JSON object, with the notes that were taken, or `text`, whose lines are made printable."""
    handlers = [handler for handler in LOGGER.handlers if isinstance(handler, Notes)]
    taken = [text for handler in handlers for text in handler.texts]
    taken += [f"and {handler.more:,} more, which were printed" for handler in handlers if handler.more]
    result |= {"notes": taken} if with_notes else {}
    print(to_json(result) if as_json else "\n".join(map(printable, text.split("\n"))), flush=True)


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


# Parameters that were given on the command line, each with the option as it was typed.
GIVEN: ContextVar[dict[str, str]] = ContextVar("GIVEN", default={})  # noqa: B039 - never changed in place


def open_run(
    path: str, options: Mapping[str, Any], *others: str, allow_nonfinite: bool = False
) -> tuple["Run", dict[str, Any]]:
    """Open the run that a command is given, and refuse options that mean nothing to its task.

    Args:
        path: As `Run.open` takes it.
        options: Parameters of the command that some tasks only know, with their values.
        others: Further ones, by name.
        allow_nonfinite: As `Run.open` takes it.

    Returns:
        The run, and of the options those that were given and are known to its task.
    """
    from ..run import Run
    from ..tasks.registry import check_options

    run, given = Run.open(path, allow_nonfinite), GIVEN.get()
    try:
        check_options(run.folder, [name for name in (*options, *others) if name in given], given.__getitem__)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return run, {name: value for name, value in options.items() if name in given}
