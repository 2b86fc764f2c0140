"""Writing one run folder, complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from workbench.lab import run_format
from workbench.lab.run_folder import sha256
from workbench.lab.run_format import FIGURE_NAME, FORMAT, MODEL_FIELDS, SETTABLE, STORED_DTYPES, RunError


class RunWriter:
    """Collects one run; made by `RunStore.create` and used in a `with` statement.

    When the block ends without exception the run is complete and listed under `id`. When it raises, nothing remains.
    """

    def __init__(self, claim: Callable[[str], tuple[Path, int]], kind: str, title: str):
        self._claim = claim  # makes and locks the partial folder of an id; FileExistsError when the id is taken
        self.kind = kind
        self.id = ""
        self._fields: dict[str, Any] = {**SETTABLE, "title": title}
        self._arrays: dict[str, np.ndarray] = {}
        self._table: dict[str, dict[str, Any]] = {}
        self._figures: dict[str, bytes] = {}
        self._state = "new"

    def set(self, **manifest_fields: Any) -> None:
        """Set manifest fields: title, model, text, tokens, interventions, settings, results, seed, layers, hook_points,
        code_version, machine, seconds. The last three have defaults; unknown names are errors."""
        self._check_open("new", "open")
        run_format.check_names(manifest_fields.keys(), SETTABLE.keys(), "settable manifest field")
        model = manifest_fields.get("model")
        if model is not None:
            run_format.check_names(model.keys(), MODEL_FIELDS, "model field")
            manifest_fields["model"] = {field: model.get(field) for field in MODEL_FIELDS}
        self._fields.update(manifest_fields)

    def add_array(self, name: str, array: Any, *, axes: Sequence[str], unit: str | None = None) -> None:
        """Add an array, copied: later changes to the argument do not reach the run. `axes`: one name per axis."""
        self._check_open("open")
        if not run_format.ARRAY_NAME.fullmatch(name) or name == "__metadata__":
            raise RunError(
                f"{name!r} is not an array name: expected 1 to 200 printable ASCII characters without spaces"
            )
        if name in self._arrays:
            raise RunError(f"the run already has an array {name!r}")
        data = np.array(array, order="C", copy=True)
        if data.dtype.name not in STORED_DTYPES.values():
            raise RunError(
                f"array {name!r} has dtype {data.dtype}, expected one of {', '.join(STORED_DTYPES.values())}"
            )
        if isinstance(axes, str) or len(axes) != data.ndim:
            raise RunError(f"array {name!r} of shape {data.shape} needs {data.ndim} axis names, got {axes!r}")
        self._arrays[name] = data.astype(data.dtype.newbyteorder("="), copy=False)
        self._table[name] = {"shape": list(data.shape), "dtype": data.dtype.name, "axes": list(axes), "unit": unit}

    def add_figure(self, name: str, content: Any) -> None:
        """Add a figure file: bytes, text, or an object with `to_json` (a plotly figure).

        `name` ends in .png .svg .json .csv .md or .txt.
        """
        self._check_open("open")
        if not FIGURE_NAME.fullmatch(name):
            raise RunError(
                f"{name!r} is not a figure name: expected a plain file name ending in png, svg, json, csv, md or txt"
            )
        if name in self._figures:
            raise RunError(f"the run already has a figure {name!r}")
        content = content.to_json() if hasattr(content, "to_json") else content
        if not isinstance(content, (bytes, str)):
            raise RunError(
                f"figure {name!r} is a {type(content).__name__}, expected bytes, text or an object with to_json"
            )
        self._figures[name] = content.encode() if isinstance(content, str) else content

    def __enter__(self) -> RunWriter:
        self._check_open("new")
        slug = re.sub(r"[^a-z0-9]+", "-", self._fields["title"].lower()).strip("-")[:40].strip("-") or self.kind
        self._started = time.monotonic()
        self._created = datetime.now(UTC)
        for _ in range(100):
            self.id = f"{self._created:%Y%m%d-%H%M%S}-{slug}-{secrets.token_hex(3)}"
            try:
                self._partial, self._descriptor = self._claim(self.id)
            except FileExistsError:
                continue
            self._state = "open"
            return self
        raise RunError(f"no free run id for the title {self._fields['title']!r}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._state = "closed"
            self._arrays, self._figures = {}, {}
            if self._partial.exists():
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._descriptor)

    def _commit(self) -> None:
        arrays_file = self._partial / "arrays.safetensors"
        save_file(self._arrays, arrays_file)
        manifest = {
            "format": FORMAT,
            "id": self.id,
            "kind": self.kind,
            "created": self._created.isoformat(timespec="microseconds"),
            **self._fields,
            "arrays": self._table,
            "arrays_sha256": sha256(arrays_file),
            "figures": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in self._figures.items()
            },
        }
        defaults = {
            "seconds": round(time.monotonic() - self._started, 3),
            "code_version": code_version(),
            "machine": machine(),
        }
        manifest |= {name: default for name, default in defaults.items() if manifest[name] is None}
        text = run_format.encode_manifest(manifest)
        run_format.check_manifest(json.loads(text))
        _write_flushed(self._partial / "manifest.json", text)
        if self._figures:
            (self._partial / "figures").mkdir(mode=0o700)
            for name, content in self._figures.items():
                _write_flushed(self._partial / "figures" / name, content)
            flush(self._partial / "figures")
        flush(arrays_file)
        flush(self._partial)
        os.rename(self._partial, self._partial.parent / self.id)
        flush(self._partial.parent)

    def _check_open(self, *states: str) -> None:
        if self._state not in states:
            hint = (
                "the run is finished and cannot change"
                if self._state == "closed"
                else "use it inside its with statement"
            )
            hint = "the writer is already in use" if states == ("new",) and self._state == "open" else hint
            raise RunError(f"this run writer is {self._state}: {hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Provenance and files
# ---------------------------------------------------------------------------------------------------------------------


@cache
def code_version() -> str:
    """Version of the installed package, with the git commit when the code lies in a checkout."""
    try:
        version = metadata.version("interpretability-workbench")
    except metadata.PackageNotFoundError:
        version = "unknown"
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return version
    try:
        # Without optional locks: merely naming the version must not get in the way of a commit elsewhere.
        command = ["git", "--no-optional-locks", "-C", str(folder)]
        command += ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{found}"


def machine() -> str:
    """System, processor type, number of processors and Python version; no host name."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"


def _write_flushed(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flush a folder, or a file that something else wrote, so that a rename after it cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
