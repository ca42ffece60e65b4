"""gmf: the command line."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from . import common as commands


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


def _scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(0.05 <= scale <= 20 for scale in scales):
        raise argparse.ArgumentTypeError(f"got {text}, expected factors from 0.05 to 20, such as 0.75,1,1.25")
    return scales


def _figure(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf") or path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, expected the name of a .png, .svg or .pdf file")
    return path


def _pixel(text: str) -> tuple[int, int]:
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text}, expected a pixel's row and column, such as 120,80")
    return int(row), int(column)


def _parser() -> Parser:
    parser = Parser(prog="gmf", description="GroupMixFormer: train, evaluate and use vision models with Group-Mix Attention.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function: Callable[[argparse.Namespace], None], name: str, example: str) -> Parser:
        added = subparsers.add_parser(
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
        added.add_argument("run", metavar="RUN", help="folder of a run or of gmf convert, checkpoint file, or hf-hub:user/name")
        added.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
        added.add_argument("--image-size", type=_number(1), help="side of the images; the model's own by default")

    def looks(added: Parser) -> None:
        added.add_argument(
            "--sliding-window",
            "--slide",
            action="store_true",
            help="for segmentation: look through windows of the training size",
        )
        added.add_argument("--scales", type=_scales, help="for segmentation: average over sizes, such as 0.75,1,1.25")
        added.add_argument("--flip", action="store_true", help="for segmentation: average with the mirrored image")

    added = command(commands.quickstart, "quickstart", "gmf quickstart --out runs/first")
    added.add_argument("--out", help="folder of the run; runs/quickstart, or the next that is free, by default")
    added.add_argument("--data", default="digits", help="digits (default), a folder with train/ and val/, torch/..., hfds/...")
    added.add_argument("--variant", default="mobile", help="mobile (default), tiny, small, base, large or a model of timm")
    added.add_argument("--epochs", type=int, help="epochs; the recipe's by default")

    command(commands.models, "models", "gmf models --json")

    added = command(commands.train, "train", "gmf train folder --data photos --epochs 20 --optimizer.lr 5e-4")
    added.add_argument("recipe", metavar="RECIPE", help="a shipped recipe or a YAML file")
    added.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    added.add_argument("--resume", action="store_true", help="continue the run in the recipe's out folder")

    added = command(commands.evaluate, "eval", "gmf eval runs/quickstart --json")
    uses_run(added)
    added.add_argument("--data", help="data set, or a folder of class folders; the run's own by default")
    added.add_argument("--root", help="where timm's data sets lie (default: data)")
    added.add_argument("--split", help="for detection and segmentation: the part of the data (default: val)")
    added.add_argument("--test-size", action="store_true", help="take size and crop that the model stores for tests, if any")
    added.add_argument("--crop-pct", type=_share, help="share of the resized image that is kept; the model's own by default")
    added.add_argument("--crop-mode", choices=("center", "squash", "border"), help="timm's crops; the model's own by default")
    added.add_argument(
        "--interpolation",
        choices=("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos"),
        help="how to resize; the model's own by default",
    )
    added.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    added.add_argument("--batch-size", type=_number(1), help="for classification: images at once (default: 64)")
    added.add_argument("--workers", type=_number(0), default=0, help="processes that load images (default: %(default)s)")
    added.add_argument("--per-class", action="store_true", help="show the accuracy of every class, the worst first")
    looks(added)
    added.add_argument("--plot", type=_figure, metavar="FILE", help="write a reliability diagram (.png, .svg or .pdf)")

    added = command(commands.predict, "predict", "gmf predict runs/quickstart 'photos/*.jpg' --top 3")
    uses_run(added)
    added.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or quoted globs")
    added.add_argument("--top", type=_number(1), help="for classification: classes to show (default: 5)")
    added.add_argument("--out", help="for detection and segmentation: folder of the drawn images (default: predictions)")
    added.add_argument(
        "--score-threshold", "--score", type=_share, help="for detection: least score of an object that is drawn (default: 0.5)"
    )
    looks(added)

    added = command(commands.explain, "explain", "gmf explain runs/quickstart photo.jpg --query 120,80 40,200 --stage 1 2")
    uses_run(added)
    added.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders or quoted globs")
    added.add_argument(
        "--query",
        type=_pixel,
        nargs="+",
        action="extend",
        metavar="Y,X",
        help="pixels of the image whose attention is shown; by default the most relevant one",
    )
    added.add_argument(
        "--stage",
        type=int,
        choices=range(4),
        nargs="+",
        action="extend",
        metavar="N",
        help="stages 0 to 3 of the attention, the last also of the relevance; by default the deepest that suit the size",
    )
    added.add_argument(
        "--class",
        dest="wanted_class",
        metavar="CLASS",
        help="name or number of the class to explain; by default the likeliest, for segments that at the query or the largest",
    )
    added.add_argument(
        "--object",
        dest="wanted_object",
        type=_number(0),
        metavar="N",
        help="for detection: the object to explain, 0 the best; by default the nearest to the query, or the best",
    )
    added.add_argument("--out", default="explanations", help="folder of the figures and arrays (default: %(default)s)")
    added.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="of the figures (default: %(default)s)")

    added = command(commands.serve, "serve", "gmf serve runs/quickstart --port 8000")
    uses_run(added)
    added.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    added.add_argument("--port", type=_number(0), default=8000, help="0 takes one that is free (default: %(default)s)")
    added.add_argument("--max-batch", type=_number(1), help="for classification: images looked at together (default: 16)")
    added.add_argument("--queue", type=_number(1), default=64, help="requests taken in at once (default: %(default)s)")
    added.add_argument("--max-megabytes", type=_number(1), default=20, help="size of a request (default: %(default)s)")
    added.add_argument("--top", type=_number(1), help="for classification: classes to name (default: 5)")
    added.add_argument(
        "--score-threshold",
        "--score",
        type=_share,
        help="for detection: least score of an object that is listed (default: 0.5)",
    )
    looks(added)
    added.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True, help="the inference form (default: yes)")

    added = command(commands.demo, "demo", "gmf demo runs/quickstart")
    added.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, checkpoint file, or folder of gmf convert")
    added.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    added.add_argument("--port", type=_number(0), default=7860, help="0 takes one that is free (default: %(default)s)")
    added.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")

    added = command(commands.bench, "bench", "gmf bench small coat_lite_small swin_tiny_patch4_window7_224 --batch-size 4")
    added.add_argument(
        "models", metavar="MODEL", nargs="*", default=["mobile", "tiny", "small"], help="variants, models of timm"
    )
    added.add_argument("--task", choices=("classification", "detection", "segmentation"), default="classification")
    added.add_argument("--train", action="store_true", help="a training step instead of inference")
    added.add_argument("--batch-size", type=_number(1), default=1, help="images at once (default: %(default)s)")
    added.add_argument(
        "--size", type=_number(32), nargs="+", help="height and width; by default 224, 800 1333 or 512, by the task"
    )
    added.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    added.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "max-autotune", "reduce-overhead"),
        metavar="MODE",
        help="with torch.compile: default, max-autotune or reduce-overhead (CUDA graphs); weights are frozen on a CPU",
    )
    added.add_argument("--fuse", action="store_true", help="GroupMixFormers in their inference form, others as they are")
    added.add_argument(
        "--contiguous", action="store_true", help="other models than ours in contiguous, not channels_last memory"
    )
    added.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    added.add_argument("--threads", type=_number(1), help="CPU threads; PyTorch's own number by default")
    added.add_argument("--rounds", type=_number(1), default=7, help="measurements of each model (default: %(default)s)")
    added.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV too")
    added.add_argument(
        "--plot", type=_figure, metavar="FILE", help="draw published accuracy against speed (.png, .svg or .pdf)"
    )
    added.add_argument("--against", type=Path, metavar="FILE", help="an earlier result, saved with --json, to compare with")

    added = command(commands.export, "export", "gmf export runs/quickstart --format onnx --out digits.onnx")
    added.add_argument("run", metavar="RUN", help="folder of a run, checkpoint file, or folder that gmf convert wrote")
    added.add_argument(
        "--format",
        required=True,
        choices=("onnx", "pt2", "aoti", "openvino"),
        help="docs/export.md tells them apart",
    )
    added.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="file to write: .onnx, .pt2 (pt2, aoti) or .xml (OpenVINO, with a .bin)",
    )
    added.add_argument("--features", action="store_true", help="a classifier's maps of strides 4, 8, 16 and 32, not the logits")
    added.add_argument(
        "--int8",
        choices=("static", "weights", "dynamic"),
        help="in 8-bit integers, measured beside float32: static for onnx and openvino, weights and dynamic for pt2",
    )
    added.add_argument(
        "--calibrate",
        metavar="FOLDER",
        help="for static: images, in class folders or not; the run's training data by default",
    )
    added.add_argument("--data", help="to measure int8 on: data set, or a folder of class folders; the run's own by default")

    added = command(commands.convert, "convert", "gmf convert groupmixformer_small.pth --out small")
    added.add_argument("file", metavar="FILE", help="a released .pth or any checkpoint that load_checkpoint reads")
    added.add_argument("--out", required=True, help="folder to write")
    added.add_argument("--class-names", help="text file with a class name a line")
    added.add_argument("--image-size", type=int, help="image size to store, such as 384 for large trained at 384")

    added = command(commands.push, "push", "gmf push runs/quickstart me/digits --license mit --dry-run card")
    added.add_argument("run", metavar="RUN", help="folder of a run, checkpoint file, or folder that gmf convert wrote")
    added.add_argument("repo_id", metavar="REPO_ID", help="user/name; created if need be")
    added.add_argument("--license", default="unknown", help="of the weights, such as mit or apache-2.0 (default: %(default)s)")
    added.add_argument("--private", action="store_true", help="make a new repository private")
    added.add_argument("--revision", help="branch to upload to (default: main)")
    added.add_argument("--dry-run", metavar="DIR", help="write what would be uploaded to a new folder, and stop")

    added = command(commands.shards, "shards", "gmf shards photos --out shards")
    added.add_argument("folder", metavar="FOLDER", help="holds train/ and val/, each with one folder of images per class")
    added.add_argument("--out", required=True, help="folder to write")
    added.add_argument("--images-per-shard", type=_number(1), default=1000, help="images in a file (default: %(default)s)")
    added.add_argument("--seed", type=_number(0), default=0, help="of the order for training (default: %(default)s)")
    added.add_argument("--workers", type=_number(1), default=os.cpu_count() or 1, help="threads; one for each core by default")
    return parser


def _train_help() -> str:
    from ..training.recipe import parser, shipped

    return f"recipes: {', '.join(shipped())}\n\n{parser().format_help()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if it failed, 2 for wrong usage, 128 + a signal's number if it was stopped by one (130: Ctrl-C).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    try:
        if argv[:1] == ["train"] and {"-h", "--help"} & set(argv):
            print(f"{subparsers.choices['train'].format_help()}\n{_train_help()}", end="")
            return 0
        args, rest = parser.parse_known_args(argv)
        if rest and args.command != "train":
            subparsers.choices[args.command].error(f"unrecognized arguments: {rest[0]}")
        args.options = rest
        args.function(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    except commands.UsageError as error:
        print(f"gmf: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gmf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extras = dict.fromkeys(("datasets", "webdataset", "fsspec", "pyarrow"), "data")
        extras |= {"faster_coco_eval": "detection", "segmentation_models_pytorch": "segmentation"}
        extras |= dict.fromkeys(("fastapi", "uvicorn", "starlette", "python_multipart"), "serve") | {"gradio": "demo"}
        extras |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export") | {"openvino": "openvino"}
        extras |= dict.fromkeys(("nncf", "torchao"), "quantization")
        extra = extras.get((error.name or "").split(".")[0], "train")
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
