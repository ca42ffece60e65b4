"""The house: imports go one way between packages, CONTRIBUTING's tables are true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "groupmixformer"

# A package or a module at the top may import those of the rows above its own, and its own package.
LAYERS = [
    {"files", "released", "threads"},
    {"weights"},
    {"data", "ops", "run_folder"},
    {"models", "visual"},
    {"training"},
    {"tasks"},
    {"bench"},
    {"deploy"},  # measures quantised networks with bench
    {"run"},
    {"cli"},
]
# A task knows no other task.
TASKS = ("classification", "detection", "segmentation", "pretraining")


def imported(path):
    """Yield what a file of the package imports of the package, as a tuple of names from the top on."""
    here = path.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            yield from [base] if node.module else [(*base[:-1], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groupmixformer"):
            yield tuple(node.module.split(".")[1:])


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    here = path.relative_to(SOURCE).with_suffix("").parts
    if here == ("__init__",):
        return
    depth = next(i for i, layer in enumerate(LAYERS) if here[0] in layer)
    allowed = {here[0], "__version__"}.union(*LAYERS[:depth])
    assert {name[0] for name in imported(path)} <= allowed
    if here[0] == "tasks":
        others = {name[1] for name in imported(path) if name[0] == "tasks" and len(name) > 1} & set(TASKS)
        assert others <= {here[1]}


def test_the_network_needs_only_torch_and_timm():
    path = SOURCE / "models" / "groupmixformer.py"
    tree = ast.parse(path.read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {name.split(".")[0] for name in modules} <= {"torch", "timm", "re", "collections", "typing"}
    assert {name[0] for name in imported(path)} <= {"models", "ops"}


def test_contributing_has_a_row_for_every_package_and_file():
    rows = set(re.findall(r"^\| `([\w./*]+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    files = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.parent == SOURCE or path.stem != "__init__"}
    packages = {f"{path.parent.relative_to(SOURCE)}/" for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE}
    assert files | packages == {row for row in rows if row.endswith((".py", "/"))}


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^python3 -m venv \.venv .*gmf quickstart$", readme, re.M)) == 1
    assert len(re.findall(r"^python3 -m venv \.venv .*pytest$", readme, re.M)) == 1
