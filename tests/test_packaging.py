"""What an installed copy of the workbench consists of: packages, data files, pinned versions, the console script."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.test_floors import FLOORS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files_of_the_floors() -> list[Path]:
    """Every file under a floor, relative to the project, without caches and hidden files."""
    found = [path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.is_file()]
    return [path for path in found if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)]


def is_packaged(path: Path) -> bool:
    """Whether setuptools puts the file into a wheel, by the two settings of pyproject.toml."""
    settings = PROJECT["tool"]["setuptools"]
    package = ".".join(path.parent.parts)
    if not any(fnmatch(package, pattern) for pattern in settings["packages"]["find"]["include"]):
        return False
    return path.suffix == ".py" or any(fnmatch(path.name, pattern) for pattern in settings["package-data"]["*"])


def constraints() -> dict[str, str]:
    """Version specifier by normalised project name, from constraints.txt."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)([<>=!~].+)", line)
            assert match, f"constraints.txt holds a line that is no constraint: {line!r}"
            pins[normalised(match[1])] = match[2]
    return pins


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names() -> list[str]:
    groups = PROJECT["dependency-groups"]
    extras = [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    lines = [*PROJECT["project"]["dependencies"], *extras, *groups["test"], *groups["lint"]]
    return [normalised(re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]) for line in lines]


def test_every_file_of_the_floors_reaches_a_wheel() -> None:
    files = files_of_the_floors()
    assert files
    left_out = [str(path) for path in files if not is_packaged(path)]
    assert not left_out, f"name their suffix in [tool.setuptools.package-data]: {left_out}"


def test_a_file_of_an_unknown_kind_is_noticed() -> None:
    assert not is_packaged(Path("models/shipped/tiny.pickle"))
    assert not is_packaged(Path("tests/test_floors.py"))
    assert is_packaged(Path("workbench/lab/data/catalogue.csv"))


def test_no_folder_shadows_an_installed_package() -> None:
    for floor in FLOORS:
        spec = importlib.util.find_spec(floor)
        if spec is not None and spec.origin is not None:
            assert Path(spec.origin).is_relative_to(ROOT), f"{floor} is also installed at {spec.origin}"


def test_every_dependency_is_pinned() -> None:
    pins = constraints()
    unpinned = [name for name in requirement_names() if name not in pins]
    assert not unpinned, f"constraints.txt says nothing about {unpinned}"
    ranges = {name: pin for name, pin in pins.items() if not pin.startswith("==")}
    assert set(ranges) == {"triton"}, f"only triton may be a range: {ranges}"
    assert "+" not in pins["torch"], "a local version label would tie the pin to one build of torch"


def test_the_makefile_installs_the_pinned_torch_first() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = re.findall(r"^TORCH\s*:=\s*torch(\S+)$", makefile, re.MULTILINE)
    assert pinned == [constraints()["torch"]]
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert len(installs) == 3 and all("-c constraints.txt" in line for line in installs)
    assert "$(TORCH)" in installs[1] and "--editable ." in installs[2]


def test_licence_and_readme_exist() -> None:
    assert PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert (ROOT / PROJECT["project"]["readme"]).is_file()


def test_ci_script_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    last = script.read_text(encoding="utf-8").rstrip().splitlines()[-1]
    assert last.startswith("exec make --no-print-directory test")


def test_the_console_script_is_installed() -> None:
    try:
        distribution = importlib.metadata.distribution(PROJECT["project"]["name"])
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("the project is not installed in this environment; run `make install`")
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"workbench": "app.cli:main"}


def test_transformers_does_not_mistake_our_kernels_for_the_library_of_that_name() -> None:
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()
