"""The one-way floors: kernels <- workbench <- models <- probes <- case_studies <- app, and no circles between files.

Every import statement counts, wherever it stands: at the top, inside a function, under `if TYPE_CHECKING`, relative or
absolute, and `importlib.import_module("a.literal.name")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

FLOORS = ("kernels", "workbench", "models", "probes", "case_studies", "app")
ROOT = Path(__file__).resolve().parent.parent


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules(root: Path) -> dict[str, Path]:
    """Every Python file of the floors, by dotted module name."""
    return {module_name(path, root): path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))}


def imported_names(path: Path, module: str) -> Iterator[tuple[int, str, str | None]]:
    """(line, absolute module, name taken from it or None) for every import in the file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, base, alias.name
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0]
            literal = isinstance(target, ast.Constant) and isinstance(target.value, str)
            if called in {"import_module", "__import__"} and literal and not target.value.startswith("."):
                yield node.lineno, target.value, None


def floor_violations(root: Path) -> list[str]:
    """One sentence for every import that goes to a floor on the right, or out of the house into `tests`."""
    found = []
    for module, path in find_modules(root).items():
        own = FLOORS.index(module.split(".")[0])
        for line, target, _ in imported_names(path, module):
            top = target.split(".")[0]
            where = f"{path.relative_to(root)}:{line}"
            if top == "tests":
                found.append(f"{where} imports {target}: no floor imports the tests")
            elif top in FLOORS and FLOORS.index(top) > own:
                found.append(f"{where} imports {target}: {FLOORS[own]} may not import {top}")
    return found


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which file imports which, by module name. `from package import module` is an edge to the module."""
    modules = find_modules(root)
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for _, target, name in imported_names(path, module):
            submodule = f"{target}.{name}"
            if name is not None and submodule in modules:
                graph[module].add(submodule)
            elif target in modules:
                graph[module].add(target)
        graph[module].discard(module)
    return graph


def find_circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """A path `[a, b, ..., a]` in which each file imports the next, or None."""
    done: set[str] = set()
    for start in sorted(graph):
        trail: list[str] = []
        stack: list[Iterator[str]] = [iter([start])]
        while stack:
            following = next(stack[-1], None)
            if following is None:
                stack.pop()
                if trail:
                    done.add(trail.pop())
            elif following in trail:
                return [*trail[trail.index(following) :], following]
            elif following not in done:
                trail.append(following)
                stack.append(iter(sorted(graph[following])))
    return None


def pages_importing_torch(root: Path) -> list[str]:
    """The dashboard's page modules stay light: they import no torch, not even inside a function."""
    return [
        f"{path.relative_to(root)}:{line}"
        for module, path in find_modules(root).items()
        if module.startswith("app.pages")
        for line, target, _ in imported_names(path, module)
        if target.split(".")[0] == "torch"
    ]


def write_house(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_imports_point_one_way() -> None:
    assert len(find_modules(ROOT)) > 5, "the walk found almost no files: it looks in the wrong place"
    violations = floor_violations(ROOT)
    assert not violations, "\n".join(violations)


def test_no_two_files_import_each_other_in_a_circle() -> None:
    circle = find_circle(import_graph(ROOT))
    assert circle is None, " -> ".join(circle or [])


def test_pages_import_no_torch() -> None:
    assert pages_importing_torch(ROOT) == []


def test_a_page_that_imports_torch_is_found(tmp_path: Path) -> None:
    page = "def late():\n    from torch import nn"
    house = write_house(tmp_path, {"app/pages/heads.py": page, "app/cli.py": "import torch"})
    assert pages_importing_torch(house) == ["app/pages/heads.py:2"]


@pytest.mark.parametrize(
    "statement",
    [
        "import models.registry",
        "from models import registry",
        "def late():\n    from models.registry import build",
        "if TYPE_CHECKING:\n    import models",
        "import importlib\nimportlib.import_module('models.registry')",
        "from tests.conftest import in_ci",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, statement: str) -> None:
    house = write_house(tmp_path, {"workbench/lab/runs.py": statement, "models/registry.py": ""})
    assert len(floor_violations(house)) == 1


def test_a_relative_import_stays_on_its_floor_and_downward_imports_pass(tmp_path: Path) -> None:
    files = {
        "workbench/lab/runs.py": "from . import factors\nfrom ..instrument import hooks\nimport kernels.scan, torch",
        "workbench/lab/factors.py": "",
        "workbench/instrument/hooks.py": "",
        "kernels/scan.py": "",
    }
    house = write_house(tmp_path, files)
    assert floor_violations(house) == []
    assert import_graph(house)["workbench.lab.runs"] == {
        "workbench.lab.factors",
        "workbench.instrument.hooks",
        "kernels.scan",
    }


@pytest.mark.parametrize(
    "back",
    [
        "import probes.heads",
        "from .heads import score",
        "from . import heads",
        "def late():\n    from probes import heads",
    ],
)
def test_a_circle_is_found(tmp_path: Path, back: str) -> None:
    files = {
        "probes/__init__.py": "",
        "probes/heads.py": "from probes.needs import need",
        "probes/needs.py": "import probes.pairs",
        "probes/pairs.py": back,
    }
    circle = find_circle(import_graph(write_house(tmp_path, files)))
    assert circle is not None and set(circle) == {"probes.heads", "probes.needs", "probes.pairs"}


def test_a_diamond_is_no_circle() -> None:
    assert find_circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) is None
