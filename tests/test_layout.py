"""Packages import only packages above them, without circles, and no module is too small to be one.

`ORDER` is the one place where the order stands; docs/design.md shows the same, and a test here compares the two.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "batchvl"

ORDER = (
    "_version",
    "errors",
    "types",
    "concurrency",
    "shapes",
    "config",
    "hardware",
    "ipc",
    "storage",
    "prompts",
    "manifest",
    "fetching",
    "images",
    "engines",
    "serving",
    "results",
    "runner",
    "validation",
    "doctor",
    "demo",
    "cli",
    "__main__",
)
"""The packages and modules of `batchvl`, each of which imports only those before it."""

FORBIDDEN = {("results", "serving")}
"""Imports that the order would allow and the design does not."""

MANIFEST_READERS = ("batchvl.results.merging.", "batchvl.results.watch")
"""The modules of `results` that may read a manifest."""

SHORTEST = 40
"""Lines of a module, unless it is a package's `__init__` or one of the exceptions."""
SHORT = {"batchvl._version", "batchvl.__main__"}


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    """Return the path of every module under `root`, by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], *, at_runtime: bool) -> Iterator[str]:
    """Yield the modules of the package that a module imports.

    Args:
        name: Dotted name of the module.
        path: Its file.
        known: All modules, from `modules`.
        at_runtime: Leave out imports under `if TYPE_CHECKING`, and those inside functions.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(_top_level(tree.body)) if at_runtime else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in known:
                    yield whole
                elif source in known:
                    yield source


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _top_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _top_level([*node.body, *node.orelse, *node.finalbody])
        else:
            yield node


def room(module: str) -> str:
    """Return the entry of `ORDER` that a module belongs to; "" is the package `batchvl` itself.

    >>> room("batchvl.fetching.fetch"), room("batchvl")
    ('fetching', '')
    """
    return module.partition(".")[2].partition(".")[0]


MODULES = modules()


def upward(known: dict[str, Path]) -> list[str]:
    """Return every import that runs against `ORDER`, as "module -> module"."""
    found = []
    for name, path in known.items():
        if not room(name):
            continue  # batchvl/__init__.py re-exports the public functions lazily
        for target in imports(name, path, known, at_runtime=False):
            here, there = room(name), room(target)
            against = there == "" or ORDER.index(there) > ORDER.index(here) or (here, there) in FORBIDDEN
            stray = here == "results" and there == "manifest" and not name.startswith(MANIFEST_READERS)
            if against or stray:
                found.append(f"{name} -> {target}")
    return found


def test_every_package_has_its_place() -> None:
    assert {room(name) for name in MODULES} - {""} == set(ORDER)


def test_imports_only_run_down_the_order() -> None:
    assert upward(MODULES) == []


def test_modules_do_not_import_in_circles() -> None:
    graph = {name: set(imports(name, path, MODULES, at_runtime=True)) - {name} for name, path in MODULES.items()}
    for name in graph:  # a package's face imports its modules; these import other modules, not the face
        graph[name] -= {parent for parent in MODULES if name.startswith(f"{parent}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_an_upward_import_and_a_circle_would_be_found(tmp_path: Path) -> None:
    """The checks above can fail."""
    for file, text in {
        "__init__.py": "",
        "errors.py": "def late():\n    from .cli import main\n",
        "cli.py": "from . import errors\n",
        "results/__init__.py": "from ..manifest import Manifest\n",
        "manifest.py": "class Manifest: ...\n",
    }.items():
        (tmp_path / "batchvl" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "batchvl" / file).write_text(text)
    found = upward(modules(tmp_path / "batchvl"))
    assert found == ["batchvl.errors -> batchvl.cli", "batchvl.results -> batchvl.manifest"]


def test_no_module_is_only_a_name() -> None:
    short = {
        name: lines
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and name not in SHORT
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) < SHORTEST
    }
    assert short == {}


def test_the_design_page_shows_the_same_order() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("## Packages")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `([\w/.]+)`", table, re.MULTILINE)
    assert [name.removesuffix("/").removesuffix(".py") for name in shown] == list(ORDER)


def test_the_row_page_names_files_that_exist() -> None:
    """A newcomer follows a row through at most 25 files, each of which is there."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walk = page.partition("## Follow a row")[2].partition("\n## ")[0]
    files = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", walk)
    assert 10 <= len(set(files)) <= 25
    assert [file for file in files if not (PACKAGE / file).is_file()] == []
