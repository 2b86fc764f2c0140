"""Finding studies: every folder here that holds a `claims.toml` is one, and so is any folder given as a path."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from case_studies.harness.claims import Study, read_study
from case_studies.harness.errors import StudyError, UnknownStudy
from case_studies.harness.workspace import study_hash
from workbench.instrument.errors import suggestion

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE  # where studies are looked for
_loaded: dict[str, str] = {}  # package to the hash of the files that it was imported from


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
    """The study's `study.py`, imported; files beside it are reached by relative imports. A study that has changed since
    it was last loaded here is imported anew, so that a server that runs for days measures what its files say."""
    own = study.folder == PACKAGE / study.name
    package = f"case_studies.{study.name}" if own else f"_study_in_{abs(hash(study.folder)):x}_{study.name}"
    digest = study_hash(study.folder)
    if _loaded.setdefault(package, digest) != digest:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
        _loaded[package] = digest
    if not own and package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(study.folder)]
    importlib.invalidate_caches()
    return import_module(f"{package}.study")
