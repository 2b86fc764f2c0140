"""Runs: immutable folders of results, written once, listed, opened, exported, deleted.

    store = RunStore()                                        # $WORKBENCH_RUNS, else ./runs
    with store.create("training", "first try", model={...}) as run:
        run.add_array("loss", losses, axes=("step",), unit="nats")
        run.set(settings={"learning_rate": 1e-3}, seed=0)
    store.open(run.id).array("loss")
    store.export_zip(run.id, "mine.zip")                      # and store.import_zip("theirs.zip")

A run is written in a folder `.partial-<id>` whose owner holds a file lock, flushed to disk, and renamed to `<id>`
in one step. So a folder with a valid id is complete, whatever was killed and when; folders whose owner is gone are
swept when a store is next opened. Nothing is unpickled. `run_format` checks the format, `run_writer` writes one
folder, `run_folder` reads one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from workbench.lab import run_archive, run_format
from workbench.lab.run_folder import Run, RunEntry, inside
from workbench.lab.run_format import FORMAT, RUN_ID, RunError, RunNotFoundError
from workbench.lab.run_writer import RunWriter, flush

try:
    import fcntl
except ImportError:  # no file locks on this system: abandoned folders are then told by their age alone
    fcntl = None  # type: ignore[assignment]

__all__ = ["Run", "RunEntry", "RunError", "RunNotFoundError", "RunProblem", "RunStore", "RunWriter"]

NEIGHBOURS = ("request.json", "features.json", "config.json")
"""Files that tell a folder of something else than a run: a study of features, a model."""
ABANDONED_SECONDS = 3600.0

# What a store remembers of a folder: the time stamps and sizes of its files, then its entry or what is wrong with it.
Remembered = tuple[list[int], RunEntry | None, str]
Index = dict[str, Remembered]


@dataclass(frozen=True)
class RunProblem:
    """A folder in the runs root that is not a readable run, and why."""

    folder: str
    reason: str


class RunStore:
    """The runs under one root folder.

    `root`: `$WORKBENCH_RUNS` when not given, else `./runs`; created with mode 0700. Opening a store sweeps
    folders left by writers that were killed. Methods may be called from several threads.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None):
        self.root = Path(root or os.environ.get("WORKBENCH_RUNS") or "runs").expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"the runs root {str(self.root)!r} is a file, expected a folder")
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._foreign: list[RunProblem] = []
        # A root on a read-only disk can still be listed and opened.
        with contextlib.suppress(PermissionError, OSError):
            self._sweep()

    def create(
        self, kind: str, title: str, *, model: Mapping[str, Any] | None = None, **manifest_fields: Any
    ) -> RunWriter:
        """A writer to use in a `with` statement; the run appears in the store when the block ends without exception.

        `kind`: `"trace"`, `"training"`, ... `model`: `{name, provenance: trained|random|pretrained,
        architecture, family, paper, parameters, config, weights_sha256}`. Further fields as for `RunWriter.set`.
        """
        writer = RunWriter(self._claim_partial, kind, title)
        writer.set(model=model, **manifest_fields)
        return writer

    def open(self, run_id: str) -> Run:
        """The run with this id. RunNotFoundError names the nearest id; RunError says what is wrong with the folder."""
        return Run(self._folder(run_id))

    def list(self, kind: str | None = None, model: str | None = None) -> list[RunEntry]:
        """Entries of all readable runs, newest first, optionally of one kind and one model name.

        A folder is read once and remembered by the time stamps and sizes of its two files, in memory and in
        `.index.json`; a folder that cannot be read is left out and described by `problems`.
        """
        entries = [entry for _, entry, _ in self._scan().values() if entry is not None]
        chosen = [entry for entry in entries if kind in (None, entry.kind) and model in (None, entry.model)]
        return sorted(chosen, key=lambda entry: (datetime.fromisoformat(entry.created), entry.id), reverse=True)

    def problems(self) -> Sequence[RunProblem]:
        """Folders in the root that are not readable runs, with the reason in words.

        Studies of features and models may lie beside runs (`NEIGHBOURS` tells them) and are no problem.
        """
        index = self._scan()
        corrupt = [
            RunProblem(name, problem)
            for name, (_, entry, problem) in index.items()
            if entry is None and not any((self.root / name / file).is_file() for file in NEIGHBOURS)
        ]
        return sorted(corrupt + self._foreign, key=lambda problem: problem.folder)

    def delete(self, run_id: str) -> None:
        """Remove a run, readable or not. It leaves the listing in one step (a rename); its files go after that."""
        folder = self._folder(run_id)
        hidden = self.root / f".deleted-{run_id}-{secrets.token_hex(3)}"
        os.rename(folder, hidden)
        flush(self.root)
        shutil.rmtree(hidden, ignore_errors=True)

    def export_zip(self, run_id: str, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the run as a zip archive, `<id>/manifest.json` and so on, to a path or a binary file object."""
        if isinstance(file, (str, os.PathLike)):
            target = Path(file)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(3)}.tmp")
            try:
                with open(partial, "xb") as stream:
                    self.export_zip(run_id, stream)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            return
        run_archive.write(self.open(run_id), file)

    def import_zip(self, file: str | os.PathLike[str] | IO[bytes]) -> Run:
        """Take in a run from a zip archive that `export_zip` wrote, here or elsewhere, and return it.

        Every byte is checked before the run is listed; nothing is left behind otherwise. RunError when the file is no such archive, is
        damaged, or holds a run that is here already.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                run_id = run_archive.run_id(archive)
                try:
                    partial, descriptor = self._claim_partial(run_id)
                except FileExistsError:
                    raise RunError(f"the run {run_id} is here already; delete it first to take it in again") from None
                try:
                    unpacked = run_archive.unpack(archive, partial)
                    for path in (*unpacked.path.rglob("*"), unpacked.path):
                        flush(path)
                    os.rename(unpacked.path, self.root / run_id)
                    flush(self.root)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                    os.close(descriptor)
        except zipfile.BadZipFile as error:
            raise RunError(f"this is not a zip archive of a run: {error}") from error
        return self.open(run_id)

    # ---- folders ----------------------------------------------------------------------------------------------------

    def _folder(self, run_id: str) -> Path:
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
            raise RunError(f"{str(run_id)[:80]!r} is not a run id: expected 1 to 64 of the characters a-z 0-9 -")
        folder = self.root / run_id
        if not os.path.lexists(folder):
            known = [name for name in os.listdir(self.root) if RUN_ID.fullmatch(name)]
            raise RunNotFoundError(f"there is no run {run_id!r}.{run_format.did_you_mean(run_id, known)}")
        if folder.is_symlink():
            raise RunError(f"{run_id} is a link, expected the folder of a run: refused")
        return inside(self.root, run_id)

    def _scan(self) -> Index:
        with self._lock:
            known = self._read_index() if self._index is None else self._index
            index: Index = {}
            foreign: list[RunProblem] = []
            with os.scandir(self.root) as folders:
                for item in folders:
                    if item.name.startswith(".") or not (item.is_dir() or item.is_symlink()):
                        continue
                    if not RUN_ID.fullmatch(item.name):
                        foreign.append(RunProblem(item.name, "not a run: the name is not [a-z0-9-]{1,64}"))
                        continue
                    stamp = _stamp(self.root / item.name)
                    remembered = known.get(item.name)
                    index[item.name] = (
                        remembered if remembered and remembered[0] == stamp else (stamp, *self._read_entry(item.name))
                    )
            if index != known:
                self._write_index(index)
            self._index, self._foreign = index, foreign
            return dict(index)

    def _read_entry(self, name: str) -> tuple[RunEntry | None, str]:
        try:
            return self.open(name).entry(), ""
        except (RunError, OSError) as error:
            return None, str(error)

    def _read_index(self) -> Index:
        try:
            saved = json.loads((self.root / ".index.json").read_bytes())
            names = {field.name for field in fields(RunEntry)}
            return {name: (stamp, RunEntry(**entry), "") for name, (stamp, entry) in saved["runs"].items()
                    if saved["format"] == FORMAT and entry.keys() == names}  # fmt: skip
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}  # the index only saves time: without one, every folder is read again

    def _write_index(self, index: Index) -> None:
        runs = {name: (stamp, asdict(entry)) for name, (stamp, entry, _) in index.items() if entry is not None}
        partial = self.root / f".index-{secrets.token_hex(3)}.tmp"
        with contextlib.suppress(OSError):
            try:
                partial.write_text(json.dumps({"format": FORMAT, "runs": runs}))
                os.replace(partial, self.root / ".index.json")
            finally:
                partial.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed writers and interrupted deletions left. A folder that can be locked has no owner."""
        doomed: list[Path] = []
        with self._root_locked():
            for name in os.listdir(self.root):
                folder = self.root / name
                if name.startswith(".deleted-"):
                    doomed.append(folder)
                elif name.startswith(".partial-") and _is_abandoned(folder):
                    hidden = folder.with_name(f".deleted-{name[1:]}-{secrets.token_hex(3)}")
                    os.rename(folder, hidden)
                    doomed.append(hidden)
                elif name.startswith(".index-") and name.endswith(".tmp"):
                    _unlink_if_older(folder, ABANDONED_SECONDS)
        for folder in doomed:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _root_locked(self) -> Iterator[None]:
        """Held while a partial folder is made and locked, and while a sweep looks, which so sees none unlocked."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _claim_partial(self, run_id: str) -> tuple[Path, int]:
        with self._root_locked():
            if os.path.lexists(self.root / run_id):
                raise FileExistsError(run_id)
            folder = self.root / f".partial-{run_id}"
            folder.mkdir(mode=0o700)
            descriptor = os.open(folder, os.O_RDONLY)
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, descriptor


def _stamp(folder: Path) -> list[int]:
    stamp: list[int] = []
    for name in ("manifest.json", "arrays.safetensors"):
        try:
            status = (folder / name).stat()
        except OSError:
            return []
        stamp += [status.st_mtime_ns, status.st_size]
    return stamp


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False  # its owner lives, however long it takes
    except OSError:
        pass  # this disk has no locks
    finally:
        os.close(descriptor)
    return time.time() - folder.stat().st_mtime > ABANDONED_SECONDS


def _unlink_if_older(path: Path, seconds: float) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > seconds:
            path.unlink()
