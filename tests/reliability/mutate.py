"""Mutation testing: small faults are put into a module, one at a time, and the tests should see them. Needs cosmic-ray.

    python tests/reliability/mutate.py models/fuse.py tests/test_fuse.py tests/test_forms.py --sample 200 --out fuse.json

cosmic-ray makes the faults. Its own runner starts a process for each, most of whose time would go into imports; here the tests
run in a process forked from one that has imported them, where a fault in a function takes the place of the function's code, and
what a fault outside functions concerns is imported again. Of the operators that could replace another, one is tried.
Tests run in the order given, until one fails: name the sharpest first.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from datetime import date
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType

import numpy
import pytest
import timm
import torch
import torchvision
from cosmic_ray import plugins
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import MutationVisitor

ROOT = Path(__file__).parents[2]
PACKAGE = "src/groupmixformer"
PAIRS = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul")
COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")


class Positions(Visitor):
    """Finds where an operator can put a fault; keeps the lines."""

    def __init__(self, operator):
        self.operator, self.lines = operator, []

    def visit(self, node):
        self.lines += [start[0] for start, _ in self.operator.mutation_positions(node)]
        return node


def is_wanted(name):
    if "ReplaceBinaryOperator" in name:
        return name.endswith(PAIRS)
    if "ReplaceComparisonOperator" in name:
        return name.endswith(COMPARISONS)
    return "Variable" not in name and "RemoveDecorator" not in name  # the first need arguments; with the second nothing imports


def faults(source):
    """Yield operator, name, line and number of every fault that can be put into a text."""
    for name in filter(is_wanted, plugins.operator_names()):
        operator = plugins.get_operator(name)()
        positions = Positions(operator)
        positions.walk(get_ast(source))
        for occurrence, line in enumerate(positions.lines):
            yield operator, name.removeprefix("core/"), line, occurrence


def parts(code):
    """Yield a code object and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from parts(constant)


def own_code(code):
    """What a code object does, apart from those inside it and from columns of the text."""
    constants = tuple(c for c in code.co_consts if not isinstance(c, CodeType))
    return code.replace(co_consts=constants, co_linetable=b"")


@contextlib.contextmanager
def calls(path):
    """Give the names of a module's functions that are called meanwhile."""
    called = set()

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename == path:
            called.add(frame.f_code.co_qualname)

    sys.setprofile(watch)
    try:
        yield called
    finally:
        sys.setprofile(None)


def changed_functions(path, old, new, called):
    """Return the code of those functions of a module that a new text changes, by name and line.

    None, if it changes something outside functions, or one of those that are called while the module is imported.
    """
    try:
        pairs = list(zip(*(parts(compile(text, path, "exec")) for text in (old, new)), strict=True))
    except (SyntaxError, ValueError):  # of another number of functions
        return None
    if any(before.co_freevars != after.co_freevars for before, after in pairs):
        return None
    outer = {before.co_qualname.partition(".<locals>")[0] for before, after in pairs if own_code(before) != own_code(after)}
    codes = {(code.co_qualname, code.co_firstlineno): code for _, code in pairs if code.co_qualname in outer}
    functions = all(code.co_flags & CO_OPTIMIZED and not code.co_qualname.startswith("<") for code in codes.values())
    return codes if functions and not outer & called else None


def put_in(path, codes):
    """Exchange the code of a module's functions."""
    for function in [o for o in gc.get_objects() if type(o) is FunctionType and o.__code__.co_filename == path]:
        code = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
        function.__code__ = code or function.__code__


def run_tests(*words):
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        return pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *words])


def passes(words, seconds, prepare=lambda: None):
    """Run tests in a process forked from this one, after `prepare`; what runs longer than `seconds` does not pass."""
    child = os.fork()
    if not child:
        os.setsid()
        code = 1
        try:
            prepare()
            code = run_tests(*words)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def control(words):
    """Run tests without a fault, which must pass; return how long they may take with one."""
    start = time.monotonic()
    if not passes(words, 900):
        print("the tests do not pass without a fault", flush=True)
        sys.exit(1)
    print(f"without a fault: {time.monotonic() - start:.0f} s", flush=True)
    return 3 * (time.monotonic() - start) + 30


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help=f"file in {PACKAGE}")
    parser.add_argument("tests", nargs="+", help="tests that should see its faults")
    parser.add_argument("--only", default="", help="which of them, as pytest's -k")
    parser.add_argument("--sample", type=int, default=200, help="number of faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="instead of drawing: the faults that no test saw, of this earlier result")
    parser.add_argument("--minutes", type=float, default=600, help="stop after these")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written as it goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tests = [*args.tests, "-k", args.only]
    source = (ROOT / PACKAGE / args.module).read_text()
    found = list(faults(source))
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, timm, numpy)}
    machine = {"date": f"{date.today()}", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions}
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "main")
        shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        Path(folder, "shared").symlink_to(ROOT.parent / "shared")
        start = time.monotonic()
        os.chdir(repository)
        sys.path.insert(0, str(repository / "src"))
        os.environ |= {"PYTHONPATH": str(repository / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        path, loaded = repository / PACKAGE / args.module, Path(folder, "loaded")

        def look():
            with calls(str(path)) as called:
                run_tests("--collect-only", *tests)
            loaded.write_text(json.dumps([sorted(called), list(sys.modules)]))

        if not passes(["--collect-only", *tests], 900, look):
            sys.exit("the tests cannot be imported")
        sys.dont_write_bytecode = True
        called, modules = json.loads(loaded.read_text())
        own = {file.stem for file in (ROOT / "tests").rglob("*.py")} | {"groupmixformer", "tests"}
        for name in modules:
            if name.partition(".")[0] not in own:
                with contextlib.suppress(Exception):  # parts of others that cannot be imported alone
                    importlib.import_module(name)
        result = {
            "command": f"mutate.py {' '.join(sys.argv[1:])}",
            **machine,
            "possible": len(found),
            "killed": 0,
            "survived": [],
        }
        drawn = random.Random(args.seed).sample(found, min(args.sample, len(found)))
        if args.again:
            before = json.loads(args.again.read_text())
            left = {(fault["operator"], fault["number"]) for fault in before["survived"]}
            drawn = [fault for fault in found if (fault[1], fault[3]) in left]
            result["killed"] = before["killed"]
        args.out.write_text(json.dumps(result))
        inside, outside = [], []
        for operator, name, line, occurrence in drawn:
            text = MutationVisitor.mutate_code(source, operator, occurrence)
            codes = changed_functions(str(path), source, text, set(called))
            (inside if codes else outside).append((name, line, occurrence, text, codes or {}))

        def try_all(rows, imported):
            result = json.loads(args.out.read_text())
            path.write_text(source)
            if imported:
                run_tests("--collect-only", *tests)
            limit = control(tests)
            for name, line, occurrence, text, codes in rows:
                if time.monotonic() - start > 60 * args.minutes:
                    break
                path.write_text(text)
                if passes(tests, limit, lambda codes=codes: put_in(str(path), codes)):
                    pairs = zip(source.splitlines(), text.splitlines(), strict=False)
                    old, new = next(((old.strip(), new.strip()) for old, new in pairs if old != new), ("", ""))
                    result["survived"].append({"operator": name, "number": occurrence, "line": line, "old": old, "new": new})
                    print(f"{line}: {name}\n  - {old}\n  + {new}", flush=True)
                else:
                    result["killed"] += 1
                args.out.write_text(json.dumps(result, indent=1))

        for rows, imported in ((inside, True), (outside, False)):
            if not rows:
                continue
            child = os.fork()  # the second must not find what the first imports
            if not child:
                code = 1
                try:
                    try_all(rows, imported)
                    code = 0
                finally:
                    os._exit(code)
            if os.waitpid(child, 0)[1]:
                sys.exit(1)
    result = json.loads(args.out.read_text())
    killed, survived = result["killed"], result["survived"]
    print(f"{args.module}: {killed} of {killed + len(survived)} killed, of {len(found)} possible")


if __name__ == "__main__":
    main()
