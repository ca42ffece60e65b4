"""The house: imports go one way, the file table is true, nothing heavy is imported early."""

import ast
import re
from pathlib import Path

import pytest
from conftest import EXHAUSTIVE, SLOW

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "groupmixformer"

# A module may import modules of the rows above its own. Tasks never import each other.
LAYERS = [
    {"modes"},
    {"kernels", "recompute", "onednn", "files"},
    {"groupmixformer", "figures"},
    {"checkpoint", "explain", "fuse", "recipe", "evaluation", "pictures", "seeding", "published"},
    {"sources", "samples", "backbone", "speed", "hub"},
    {"streaming", "coco", "semantic"},
    {"data", "drawing"},
    {"shards", "loading", "inference"},
    {"task"},
    {"classification", "detection", "segmentation"},
    {"training"},
    {"report"},
    {"scenes", "bench", "export", "serve", "demo"},
    {"export_detector", "explanations", "quantize"},
    {"commands"},
    {"cli"},
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groupmixformer"):
            yield node.module.removeprefix("groupmixformer.")


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    if path.stem == "__init__":
        assert set(imported(path)) <= {"groupmixformer", "checkpoint", "explain", "fuse", "hub"}
        return
    depth = next(i for i, layer in enumerate(LAYERS) if path.stem in layer)
    allowed = set().union(*LAYERS[:depth])
    assert set(imported(path)) <= allowed


def test_the_network_needs_only_torch_and_timm():
    tree = ast.parse((SOURCE / "groupmixformer.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in modules} <= {"torch", "timm", "re", "collections", "typing"}
    assert set(imported(SOURCE / "groupmixformer.py")) == {"kernels", "modes", "onednn", "recompute"}


def test_contributing_has_a_row_for_every_file():
    rows = set(re.findall(r"^\| `([\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    files = {path.name for path in SOURCE.glob("*.py")}
    assert files == {row for row in rows if row.endswith(".py")}


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^python3 -m venv \.venv .*gmf quickstart$", readme, re.M)) == 1
    assert len(re.findall(r"^python3 -m venv \.venv .*pytest$", readme, re.M)) == 1


def test_slow_and_exhaustive_tests_exist():
    for name in SLOW + EXHAUSTIVE:
        file, _, test = name.partition("::")
        functions = re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.M)
        assert any(function.startswith(test.partition("[")[0]) for function in functions), name
