"""Reading one run folder: its manifest as a dict, its arrays mapped from disk, its hashes checked."""

from __future__ import annotations

import copy
import hashlib
import html
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.lab import run_format
from workbench.lab.run_format import RunError, RunNotFoundError


@dataclass(frozen=True)
class RunEntry:
    """One line of a listing. `tokens` and `layers` are counts, `bytes` is the size on disk, `text` the first
    characters of the prompt."""

    id: str
    kind: str
    title: str
    created: str
    model: str | None
    architecture: str | None
    provenance: str | None
    tokens: int
    layers: int
    bytes: int
    text: str


class Run:
    """One run, checked when opened.

    `manifest` is the dict of `manifest.json`; arrays are mapped from disk on demand.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder).resolve()
        self.manifest: dict[str, Any] = run_format.read_manifest(inside(self.path, "manifest.json"))
        if self.manifest["id"] != self.path.name:
            raise RunError(f"the folder {self.path.name!r} holds the manifest of run {self.manifest['id']!r}")
        self._arrays_file = inside(self.path, "arrays.safetensors")
        self._stored = run_format.read_array_header(self._arrays_file)
        run_format.check_arrays_agree(self.manifest["arrays"], self._stored)
        self._map: mmap.mmap | None = None

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def title(self) -> str:
        return self.manifest["title"]

    @property
    def created(self) -> str:
        """Time of creation, ISO 8601, UTC."""
        return self.manifest["created"]

    @property
    def model(self) -> dict[str, Any]:
        return self.manifest["model"] or {}

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One record per layer, as in the run contract; empty for runs without layers."""
        return self.manifest.get("layers", [])

    def layer(self, index: int) -> dict[str, Any]:
        """The record of layer number `index`; a trace may hold only some layers of its model."""
        for record in self.layers:
            if record["layer"] == index:
                return record
        held = ", ".join(str(record["layer"]) for record in self.layers) or "none"
        raise RunNotFoundError(f"run {self.id} has no layer {index!r}; layers that it has: {held}")

    @property
    def encoder(self) -> Run:
        """What the run stores of an encoder that read its source, as a trace of the source: `layers`, arrays and tokens are the encoder's.

        RunNotFoundError for a run that stores nothing of one.
        """
        side = copy.copy(self)
        side.manifest = run_format.encoder_manifest(self.manifest)
        prefix = run_format.ENCODER_PREFIX
        side._stored = {
            name.removeprefix(prefix): stored for name, stored in self._stored.items() if name.startswith(prefix)
        }
        return side

    def arrays(self) -> dict[str, dict[str, Any]]:
        """`{name: {shape, dtype, axes, unit}}` of every array."""
        return dict(self.manifest["arrays"])

    def has(self, name: str) -> bool:
        return name in self._stored

    def array(self, name: str) -> np.ndarray:
        """The array called `name`, read-only and mapped from disk: slicing it reads only that part."""
        if name not in self._stored:
            raise RunNotFoundError(f"run {self.id} has no array {name!r}.{run_format.did_you_mean(name, self._stored)}")
        if self._map is None:
            with open(self._arrays_file, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stored = self._stored[name]
        return np.ndarray(stored.shape, stored.dtype, buffer=self._map, offset=stored.start)

    def figures(self) -> list[str]:
        return sorted(self.manifest.get("figures", {}))

    def figure(self, name: str) -> bytes:
        if name not in self.figures():
            raise RunNotFoundError(
                f"run {self.id} has no figure {name!r}.{run_format.did_you_mean(name, self.figures())}"
            )
        return inside(self.path, f"figures/{name}").read_bytes()

    def verify(self) -> str:
        """Read every byte and compare with the hashes of the manifest.

        Returns the SHA-256 of the array file; RunError names the file that changed.
        """
        digest = sha256(self._arrays_file)
        if digest != self.manifest["arrays_sha256"]:
            raise RunError(
                f"arrays.safetensors of run {self.id} has changed since it was written: "
                f"its SHA-256 is {digest}, the manifest says {self.manifest['arrays_sha256']}"
            )
        for name, figure in self.manifest.get("figures", {}).items():
            if hashlib.sha256(self.figure(name)).hexdigest() != figure["sha256"]:
                raise RunError(f"figure {name!r} of run {self.id} has changed since it was written")
        return digest

    def entry(self) -> RunEntry:
        """This run's line in a listing."""
        manifest, model = self.manifest, self.model
        tokens = manifest.get("tokens") or {"ids": []}
        size = (self.path / "manifest.json").stat().st_size + self._arrays_file.stat().st_size
        return RunEntry(
            id=self.id,
            kind=self.kind,
            title=self.title,
            created=self.created,
            model=model.get("name"),
            architecture=model.get("architecture"),
            provenance=model.get("provenance"),
            tokens=len(tokens["ids"]),
            layers=len(self.layers),
            bytes=size,
            text=(manifest.get("text") or "")[:120],
        )

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.kind}, {len(self._stored)} arrays>"

    def _repr_html_(self) -> str:
        entry = self.entry()
        model = f"{entry.model} ({entry.provenance} weights)" if entry.model else "none"
        arrays = f"{len(self._stored)}, {entry.bytes / 1e6:.1f} MB"
        shown = ("title", entry.title), ("kind", entry.kind), ("created", entry.created), ("model", model)
        counts = ("tokens", entry.tokens), ("layers", entry.layers), ("arrays", arrays), ("text", entry.text)
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in shown + counts)
        return f"<table><caption>Run {html.escape(self.id)}</caption>{cells}</table>"


def inside(root: Path, name: str) -> Path:
    """`root/name` with links followed; RunError when that leads out of `root` or there is nothing."""
    base = root.resolve()
    try:
        path = (base / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{root.name}/{name} is missing or unreadable") from error
    if not path.is_relative_to(base):
        raise RunError(f"{root.name}/{name} is a link that leads out of {root.name}: refused")
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
