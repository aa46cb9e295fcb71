"""dvc.yaml tells the truth: a stage's dependencies contain every file of this project that its script imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PACKAGES = ("customdiff", "stages", "world")


def module_files(name: str) -> list[Path]:
    """Files that an import of `name` runs: the module, and the `__init__` of each package on the way to it."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return []
    found = []
    for end in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:end])
        found += [each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()]
    return found


def walk_run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`, which never runs."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from walk_run(child)


def imported(path: Path) -> set[Path]:
    """Files of this project that a file needs: its imports, at module level or in a function, and its templates."""
    text = path.read_text(encoding="utf-8")
    found: set[Path] = set((path.parent / "templates").glob("*") if '"templates"' in text else ())
    for node in walk_run(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found.update(file for name in names for file in module_files(name))
    return found


def closure(script: Path) -> set[str]:
    """A script, and every file of this project that it imports directly or indirectly, relative to the root."""
    seen, waiting = set(), [script]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += imported(path) if path.suffix == ".py" else []
    return {path.relative_to(ROOT).as_posix() for path in seen}


def stages(folder: str) -> list[tuple[str, Path, set[str]]]:
    """Name, script and dependencies, relative to the root, of each stage of a dvc.yaml."""
    found = []
    for name, stage in yaml.safe_load((ROOT / folder / "dvc.yaml").read_text())["stages"].items():
        stage = stage.get("do", stage)
        words = stage["cmd"].split()
        at = words.index("python")
        module = words[at + 2].replace(".", "/") + ".py" if words[at + 1] == "-m" else words[at + 1]
        deps = {Path(folder, dep).as_posix() for dep in stage.get("deps", [])}
        found.append((name, ROOT / module, {str(Path(dep)) for dep in deps}))
    return found


def missing(files: set[str], deps: set[str]) -> list[str]:
    """Files that are not dependencies, and not inside one."""
    return sorted(file for file in files if not any(parent in deps for parent in (file, *map(str, Path(file).parents))))


def stage_id(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("name", "script", "deps"), [*stages("."), *stages("world")], ids=stage_id)
def test_a_stage_depends_on_all_code_that_it_imports(name, script, deps):
    assert missing(closure(script), deps) == []


@pytest.mark.parametrize(("name", "script", "deps"), [*stages("."), *stages("world")], ids=stage_id)
def test_a_stage_depends_on_no_code_that_it_does_not_import(name, script, deps):
    files = closure(script)
    code = {dep for dep in deps if dep.endswith(".py") or dep.startswith(("customdiff", "stages"))}
    assert {dep for dep in code if not any(file == dep or file.startswith(f"{dep}/") for file in files)} == set()


def test_the_closure_follows_imports_inside_functions_and_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("test_dvc_yaml.ROOT", tmp_path)
    for path, text in {
        "stages/one.py": "import os\ndef main():\n    from customdiff.a import b\n",
        "customdiff/__init__.py": "",
        "customdiff/a/__init__.py": "from customdiff.c import x\n",
        "customdiff/a/b.py": "",
        "customdiff/c.py": "",
        "customdiff/d.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    files = closure(tmp_path / "stages/one.py")
    assert files == {
        "stages/one.py",
        "customdiff/__init__.py",
        "customdiff/a/__init__.py",
        "customdiff/a/b.py",
        "customdiff/c.py",
    }
    assert missing(files, {"stages/one.py", "customdiff/a", "customdiff/__init__.py"}) == ["customdiff/c.py"]


def test_train_and_evaluate_can_come_from_the_run_cache():
    """DVC saves no run of a stage with a persistent output, or with an output in Git that is no metric."""
    for name in ("index-pool", "train", "evaluate"):
        outs = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][name]["outs"]
        assert all(isinstance(out, str) for out in outs), name
