"""The layout that CONTRIBUTING.md describes: imports run downward, functions and modules stay short."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A package imports only from rows before its own, and from itself.
FLOORS = [
    {"redaction", "interrupts"},
    {"errors"},
    {"files", "images"},
    {"config"},
    {"models", "sources", "tracking", "provenance", "stage_inputs"},
    {"preparation", "retrieval"},
    {"adapters", "new_concept"},
    {"training"},
    {"evaluation"},
    {"publishing"},
    {"app"},
    {"cli"},
]
MODULES = sorted((ROOT / "customdiff").rglob("*.py"))
OTHERS = [path for folder in ("stages", "benchmarks", "world") for path in sorted((ROOT / folder).glob("*.py"))]
LONGEST_FUNCTION, LONGEST_MODULE = 60, 400


def package(path: Path) -> str:
    """The first part of a module's path below customdiff/: `training`, or `files` for a module on its own."""
    return path.relative_to(ROOT / "customdiff").with_suffix("").parts[0]


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imported_packages(path: Path) -> set[str]:
    """Packages of the library that a module imports, at any level of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "customdiff":
            _, _, rest = node.module.partition(".")
            found |= {rest.partition(".")[0]} if rest else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    if path.parent == ROOT / "customdiff" and path.name in ("__init__.py", "__main__.py"):
        return
    own = package(path)
    upward = {name for name in imported_packages(path) if name != own and floor(name) >= floor(own)}
    assert upward == set()


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=lambda p: str(p.name))
def test_functions_and_modules_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}
