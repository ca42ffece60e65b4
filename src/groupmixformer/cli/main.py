"""gmf: a parser made from the commands' typed functions, the call, and errors in one line."""

import argparse
import collections.abc
import inspect
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .. import __version__
from ..files import printable
from .common import COMMANDS, GIVEN, GROUPS, OLD_NAMES, OTHER_VALUES, Command, Notes, Option, UsageError, requirements_of_extras
from .train import train_help

# Importing registers the commands, in the order of the help.
# isort: off
from . import train, data, inference, export, bench, compare  # noqa: F401

# isort: on

COMPLETION = """gmf COMMAND --help explains a command, with an example. Options may have underscores in place of dashes.

completion of commands, options and files by the Tab key, by the line of your shell:
  gmf --print-completion bash > ~/.local/share/bash-completion/completions/gmf
  gmf --print-completion zsh > ~/.zfunc/_gmf
  gmf --print-completion fish > ~/.config/fish/completions/gmf.fish
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option or command that exists."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit 2."""
        if given := re.search(r"unrecognized arguments: (\S+)", message):
            word = given[1].split("=")[0]
            message = f"unknown option {word}{self._hint(word, self._option_string_actions)}"
        elif given := re.search(r"argument (\S+): invalid choice: '([^']*)'", message):
            action = next(a for a in self._actions if given[1] in (*a.option_strings, a.metavar, a.dest))
            choices = [str(choice) for choice in action.choices or ()]
            of_commands = isinstance(action, argparse._SubParsersAction)
            known = f"command {given[2]}" if of_commands else f"value {given[2]}, expected {', '.join(choices)}"
            message = f"unknown {known}{self._hint(given[2], choices)}"
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def _hint(self, word: str, known: Iterable[str]) -> str:
        other = {OTHER_VALUES.get(word)} & {*known}
        near = [*other] or get_close_matches(word.replace("_", "-"), known, n=1, cutoff=0.5)
        return f": did you mean {near[0]}?" if near else f": see {self.prog} --help"


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError as error:
            raise UsageError("--print-completion needs shtab: pip install 'groupmixformer[cli]'") from error
        for command in _subparsers(parser).values():
            for action in command._actions:
                if action.metavar in ("RUN", "IMAGE", "RECIPE", "FILE"):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
                elif action.metavar in ("FOLDER", "DIR"):
                    action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _details(hint: Any) -> tuple[Any, Option, bool]:
    """Return the type of a word, what annotations say of it, and whether there may be several words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, option, several = _details(inner[0])
        for outer in inner[1:]:
            option = Option(**vars(option) | {key: value for key, value in vars(outer).items() if value is not None})
        return kind, option, several
    if origin in (Union, UnionType):  # with None
        return _details(inner[0])
    if origin is collections.abc.Sequence:
        return (*_details(inner[0])[:2], True)
    return hint, Option(), False


def _add(parser: Parser, groups: dict[str, Any], parameter: inspect.Parameter, hint: Any, told: str) -> None:
    """Add a parameter of a command's function to the command's parser."""
    kind, option, several = _details(hint)
    positional, default = parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter.default
    required = default is parameter.empty
    name = option.name or parameter.name.replace("_", "-")
    text = told or option.help or ""
    if not required and default is not None and not isinstance(default, bool) and default != ():
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    # Defaults are left to the function: only what is given is passed on.
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction if default is True else "store_true"
    else:
        choices = get_args(kind) if get_origin(kind) is Literal else None
        metavar = option.metavar or (None if choices else name.upper().replace("-", "_"))
        settings |= {"type": type(choices[0]) if choices else option.read or kind, "choices": choices, "metavar": metavar}
        if several:
            settings["nargs"] = "+" if required or not positional else "*"
            settings["metavar"] = metavar.removesuffix("S") if metavar else None
        elif option.bare:
            settings |= {"nargs": "?", "const": option.bare}
    if positional:
        groups[option.group or ""].add_argument(parameter.name, **settings)
        return
    settings |= {"dest": parameter.name, "required": required} | ({"action": "extend"} if several else {})
    groups[option.group or ""].add_argument(f"--{name}", **settings)


def _add_command(subparsers: Any, name: str, command: Command) -> None:
    text, _, arguments = (inspect.getdoc(command.function) or "").partition("\n\nArgs:\n")
    told = {key: " ".join(value.split()) for key, value in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", arguments, re.M)}
    parser = subparsers.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    hints = get_type_hints(command.function, include_extras=True)
    for parameter in inspect.signature(command.function).parameters.values():
        if parameter.kind is not parameter.VAR_POSITIONAL:
            _add(parser, groups, parameter, hints[parameter.name], told.get(parameter.name, ""))
    actions = [action for action in parser._actions if action.required]
    words = [parser._get_formatter()._format_args(action, action.metavar or action.dest) for action in actions]
    shown = [" ".join([*action.option_strings, word]) for action, word in zip(actions, words, strict=True)]
    parser.usage = " ".join([f"gmf {name}", *shown, "[OPTION ...]"]).replace("%", "%%")


def make_parser() -> Parser:
    """Return the parser of all commands; what is not given is left out of its result."""
    description = "GroupMixFormer: train, evaluate and use vision models with Group-Mix Attention."
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="gmf", description=description, epilog=COMPLETION, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gmf {__version__}", help="show the version and stop")
    shells = ("bash", "zsh", "fish")
    text = "print what a shell needs to complete commands, options and files, and stop"
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=shells, default=argparse.SUPPRESS, help=text)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        _add_command(subparsers, name, command)
    return parser


def parse(argv: Sequence[str]) -> tuple[str, list[Any], dict[str, Any]]:
    """Return the command in `argv` and the arguments for its function; sets GIVEN.

    Raises:
        SystemExit: For wrong usage, and where help or the version was asked for.
    """
    parser, words, given = make_parser(), list(argv), {}
    command = _subparsers(parser).get(words[0]) if words else None
    if command:
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            typed, equals, value = word.partition("=")
            dashed = typed.replace("_", "-")
            for option in (dashed, f"--{OLD_NAMES.get(dashed[2:])}"):
                if typed.startswith("--") and (action := command._option_string_actions.get(option)):
                    words[i] = option + equals + value
                    given[action.dest] = typed
                    break
    namespace, rest = parser.parse_known_args(words)
    values = vars(namespace)
    if (name := values.pop("command")) is None:
        parser.error(f"unrecognized arguments: {rest[0]}" if rest else "expected a command: see gmf --help")
    parameters = inspect.signature(COMMANDS[name].function).parameters.values()
    if rest and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        _subparsers(parser)[name].error(f"unrecognized arguments: {rest[0]}")
    GIVEN.set(given)
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return name, [*(values.pop(key) for key in names if key in values), *rest], values


def _install(module: str, extras: Sequence[str]) -> str:
    """Return the command that installs a missing library: by the first of a command's extras that requires it."""
    wanted = module.partition(".")[0].replace("_", "-")
    known = requirements_of_extras()
    extra = next((extra for extra in extras if wanted in (need.name for need in known.get(extra, ()))), extras[0])
    return f"pip install 'groupmixformer[{extra}]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if it failed, 2 for wrong usage, 128 + a signal's number if it was stopped by one (130: Ctrl-C).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack characters of a class or a file
            stream.reconfigure(errors="backslashreplace")
    try:
        if argv[:1] == ["train"] and {"-h", "--help"} & set(argv):
            name = "train"
            recipes = [word for word in argv[1:] if not word.startswith("-")]
            print(_subparsers(make_parser())["train"].format_help() + train_help(bool(recipes)), end="")
            return 0
        name, arguments, options = parse(argv)
        with Notes(name):
            COMMANDS[name].function(*arguments, **options)
    except SystemExit as stop:
        return int(stop.code or 0)
    except UsageError as error:
        print(f"gmf: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gmf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        install = _install(error.name or "", COMMANDS[name].extras)
        print(f"gmf: error: this needs {error.name}: {install}", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("GMF_TRACEBACK"):
            raise
        text = str(error)
        if "Original Traceback" in text:  # PyTorch's form of what a loader's worker raises
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        known = isinstance(error, ValueError | OSError)
        hint = "" if known else f" ({type(error).__name__}; GMF_TRACEBACK=1 shows where)"
        print(f"gmf: error: {printable(' '.join(text.split()))}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
