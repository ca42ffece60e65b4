"""Mutation testing: small faults are put into a module, one at a time, and the tests should see them. Needs cosmic-ray.

    python tests/reliability/mutate.py models/fuse.py tests/test_fuse.py tests/test_forms.py --sample 200 --out fuse.json

cosmic-ray makes the faults. Its own runner starts a process for each, most of whose time would go into importing torch; here
the tests run in a process forked from one that has imported it. Of the operators that could replace another, one is tried.
"""

import argparse
import contextlib
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
from pathlib import Path

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


def tests_pass(repository, tests, seconds):
    """Run tests in a process forked from this one; what runs longer than `seconds` does not pass."""
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(repository)
        sys.path.insert(0, str(repository / "src"))
        os.environ |= {"PYTHONPATH": str(repository / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        os._exit(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", help=f"file in {PACKAGE}")
    parser.add_argument("tests", nargs="+", help="tests that should see its faults")
    parser.add_argument("--sample", type=int, default=200, help="number of faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="stop after these")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written as it goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = (ROOT / PACKAGE / args.module).read_text()
    found = list(faults(source))
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, timm, numpy)}
    machine = {"date": f"{date.today()}", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions}
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "main")
        shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        Path(folder, "shared").symlink_to(ROOT.parent / "shared")
        start = time.monotonic()
        if not tests_pass(repository, args.tests, 900):
            sys.exit("the tests do not pass without a fault")
        limit = 3 * (time.monotonic() - start) + 30
        killed, survived = 0, []
        for operator, name, line, occurrence in random.Random(args.seed).sample(found, min(args.sample, len(found))):
            if time.monotonic() - start > 60 * args.minutes:
                break
            text = MutationVisitor.mutate_code(source, operator, occurrence)
            (repository / PACKAGE / args.module).write_text(text)
            if tests_pass(repository, args.tests, limit):
                pairs = zip(source.splitlines(), text.splitlines(), strict=False)
                old, new = next(((old, new) for old, new in pairs if old != new), ("", ""))
                survived.append({"operator": name, "line": line, "old": old.strip(), "new": new.strip()})
                print(f"{line}: {name}\n  - {old.strip()}\n  + {new.strip()}", flush=True)
            else:
                killed += 1
            result = {"command": f"mutate.py {' '.join(sys.argv[1:])}", **machine, "possible": len(found)}
            args.out.write_text(json.dumps({**result, "killed": killed, "survived": survived}, indent=1))
    print(f"{args.module}: {killed} of {killed + len(survived)} killed, of {len(found)} possible")


if __name__ == "__main__":
    main()
