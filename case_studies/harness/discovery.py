"""Finding studies: every folder here that holds a `claims.toml` is one, and so is any folder given as a path."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from case_studies.harness.claims import Study, read_study
from case_studies.harness.errors import StudyError, UnknownStudy
from workbench.instrument.errors import suggestion

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE  # where studies are looked for


@dataclass(frozen=True)
class StudyProblem:
    """A folder with a `claims.toml` that cannot be read, and why."""

    folder: str
    reason: str


def study_folders(root: Path | None = None) -> list[Path]:
    """The folders of the studies, in the order of their names."""
    return sorted(file.parent for file in (root or ROOT).glob("*/claims.toml"))


def list_studies(root: Path | None = None) -> list[Study]:
    """Every study that can be read; `study_problems` says what is wrong with the others."""
    return [found for found in _read_all(root) if isinstance(found, Study)]


def study_problems(root: Path | None = None) -> list[StudyProblem]:
    """The studies that cannot be read."""
    return [found for found in _read_all(root) if isinstance(found, StudyProblem)]


def _read_all(root: Path | None) -> list[Study | StudyProblem]:
    found: list[Study | StudyProblem] = []
    for folder in study_folders(root):
        try:
            found.append(read_study(folder))
        except StudyError as error:
            found.append(StudyProblem(folder.name, str(error)))
    return found


def find_study(name: str | os.PathLike[str], root: Path | None = None) -> Study:
    """The study of this name (`-` and `_` are alike), or in the folder of this path.

    UnknownStudy names the nearest ones; ClaimsError says what is wrong with its files.
    """
    text = os.fspath(name)
    if os.sep in text or isinstance(name, os.PathLike):
        folder = Path(name).expanduser().resolve()
        if not (folder / "claims.toml").is_file():
            raise UnknownStudy(f"the folder {text!r} holds no claims.toml")
        return read_study(folder)
    folders = {folder.name: folder for folder in study_folders(root)}
    wanted = text.replace("-", "_")
    if wanted not in folders:
        near = suggestion(wanted, folders) or (f" There are: {', '.join(folders)}." if folders else " There are none.")
        raise UnknownStudy(f"there is no study {text!r}.{near}")
    return read_study(folders[wanted])


def load_module(study: Study) -> ModuleType:
    """The study's `study.py`, imported. Files beside it are reached by relative imports."""
    if study.folder == PACKAGE / study.name:
        return import_module(f"case_studies.{study.name}.study")
    package = f"_study_in_{abs(hash(study.folder)):x}_{study.name}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(study.folder)]
    spec = importlib.util.spec_from_file_location(f"{package}.study", study.folder / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
