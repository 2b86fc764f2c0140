"""Where a study keeps its work until it is done, so that a killed run goes on where it was.

    <runs root>/.studies/<study>-<tier>-lock      held while a process runs this study at this tier
    <runs root>/.studies/<study>-<tier>-<key>/
        seeds/<stage>-<seed>.json, .safetensors   results of finished seeds
        work/<stage>-<seed>/                      a seed's own files, such as checkpoints
        figures/                                  figures saved so far
        arrays/                                   arrays saved so far

The key is a hash of the study's code, its tier and its settings: a change of any of them begins anew. Every file is
written under another name and renamed; a seed counts as finished once its JSON file is there, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from safetensors.numpy import load, save

from case_studies.harness.errors import StudyBusy

try:
    import fcntl
except ImportError:  # no file locks on this system: two processes are then not told apart
    fcntl = None  # type: ignore[assignment]

FORGOTTEN_SECONDS = 14 * 24 * 3600.0


def study_hash(folder: Path) -> str:
    """SHA-256 of the Python files of a study's folder, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class Workspace:
    """The working folder of one study at one tier, held by one process at a time. Use it in a `with` statement.

    `key` is whatever decides the results beside the seed. `fresh` throws away what an earlier run left.
    StudyBusy when another process holds it.
    """

    def __init__(self, runs_root: Path, study: str, tier: str, key: Mapping[str, Any], fresh: bool = False):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.root = runs_root / ".studies"
        self.folder = self.root / f"{study}-{tier}-{digest}"
        self._what = f"study {study} at tier {tier}"
        self._prefix = f"{study}-{tier}-"
        self._fresh = fresh
        self._lock = -1

    def __enter__(self) -> Workspace:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.root / f"{self._prefix}lock", os.O_RDWR | os.O_CREAT, 0o600)
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise StudyBusy(f"{self._what} is being run by another process in {self.root.parent}") from None
            except OSError:
                pass  # this disk has no locks
        if self._fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        for part in ("seeds", "work", "figures", "arrays"):
            (self.folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._forget_old()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def discard(self) -> None:
        """Remove everything, after the results have become a run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget_old(self) -> None:
        """Work of other versions of this study that nobody has touched for two weeks goes."""
        for folder in self.root.glob(f"{self._prefix}*"):
            if folder == self.folder or not folder.is_dir():
                continue
            newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
            if time.time() - newest > FORGOTTEN_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    # ---- seeds -------------------------------------------------------------------------------------------------------

    def work_folder(self, stage: str, seed: int) -> Path:
        """A folder for a seed's own files; it outlives a kill."""
        folder = self.folder / "work" / f"{stage}-{seed}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def finish_seed(self, stage: str, seed: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the results of a seed: JSON values and arrays."""
        write_whole(self.folder / "seeds" / f"{stage}-{seed}.safetensors", save(dict(arrays)))
        write_whole(self.folder / "seeds" / f"{stage}-{seed}.json", json.dumps(record, allow_nan=False).encode())

    def finished_seed(self, stage: str, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What `finish_seed` kept, or None when the seed is not finished or its files cannot be read."""
        try:
            record = json.loads((self.folder / "seeds" / f"{stage}-{seed}.json").read_bytes())
            return record, load((self.folder / "seeds" / f"{stage}-{seed}.safetensors").read_bytes())
        except Exception:  # whatever is wrong with them, the seed can be done again
            return None

    # ---- artefacts ---------------------------------------------------------------------------------------------------

    def keep_figure(self, name: str, content: bytes) -> None:
        write_whole(self.folder / "figures" / name, content)

    def figures(self) -> dict[str, bytes]:
        files = sorted((self.folder / "figures").iterdir())
        return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}

    def keep_array(self, name: str, array: np.ndarray, about: Mapping[str, Any]) -> None:
        content = save({"array": np.ascontiguousarray(array)}, {"about": json.dumps(dict(about))})
        write_whole(self.folder / "arrays" / quote(name, safe=""), content)

    def arrays(self) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """`{name: (array, {axes, unit})}`."""
        kept = {}
        for file in sorted((self.folder / "arrays").iterdir()):
            if not file.name.startswith("."):
                content = file.read_bytes()
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                kept[unquote(file.name)] = (load(content)["array"], json.loads(header["__metadata__"]["about"]))
        return kept


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
