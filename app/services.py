"""What the dashboard is built over: a run store, a job queue and a catalogue of models.

The dashboard knows models only through `ModelCatalogue`, so that no page and no figure ever loads a model or torch.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from app.view_state import ViewState
from workbench.lab.factors import FactorError, LayerFactors, state_slots
from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import Run, RunEntry, RunError, RunStore
from workbench.lab.score_maps import run_score_labels

T = TypeVar("T")
LARGEST_PROMPT = 20_000
"""Characters that the new-run form accepts."""


class ModelCatalogue(Protocol):
    """The models that a reader can start a run with."""

    def list_models(self) -> Sequence[Mapping[str, Any]]:
        """`{name, title, architecture, family, parameters, provenance, description, card}` of each model, best first.

        `name` is the key for the other two methods; `parameters` is a count; `provenance` is "trained", "random" or
        "pretrained"; `description` is a sentence; `card` is a longer text in Markdown or None.
        """
        ...

    def describe(self, name: str) -> Mapping[str, Any]:
        """`{blocks, hook_points}` of a model.

        `blocks`: `{kind, label, detail, layer}` in the order of the forward pass, `layer` None before and after the layers;
        `hook_points`: `{name, role, axes, editable}`. Raises ValueError (or LookupError) for an unknown name.
        """
        ...

    def load(self, name: str) -> Any:
        """The model itself, for the functions of jobs: this may load torch. Raises ValueError (or LookupError) for an unknown name."""
        ...

    def look_up(self, name: str, dtype: str = "float32") -> Mapping[str, Any]:
        """What opening a published checkpoint would take: the fields of `models.pretrained.outlook.Outlook`, and `free_bytes`,
        `needed_bytes`, `tight`. Raises ValueError in words for the reader.
        """
        ...

    def start_trace(self, name: str, text: str, settings: Mapping[str, Any]) -> Job:
        """Start a trace of `text` and return its job, whose result is the id of the finished run.

        `settings`: {"title": str, "source": str (what an encoder-decoder's encoder reads), "dtype": "float32" or "auto" (of a
        checkpoint)}. Raises ValueError, in words for the reader, for a text that the model cannot take.
        """
        ...


class LeastRecentlyUsed:
    """A small thread-safe cache: at most `entries` values, the one not asked for longest goes first."""

    def __init__(self, entries: int):
        self._entries = entries
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made by `make()` when it is not there. Two threads may make the same value at once."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._entries:
                self._values.popitem(last=False)
        return value

    def forget(self, about: Callable[[Any], bool]) -> None:
        """Drop every value whose key `about` picks."""
        with self._lock:
            for key in [key for key in self._values if about(key)]:
                del self._values[key]


@dataclass(frozen=True)
class Scene:
    """A view with what it points at: the run, its layer, its factors.

    `problem` says why there is no run, in words. `pixels` is the largest side of a picture: never more than the screen shows,
    since a browser that shrinks a picture drops single cells. `result` is the run that the address names as its result, such as
    the measurement that a page shows beside the run; `result_problem` says why it is not there. `other` is the run that the address
    compares the open one with, `other_problem` likewise. `store` is where further runs are looked up.
    """

    view: ViewState
    run: Run | None
    problem: str | None
    cache: LeastRecentlyUsed = field(repr=False)
    models: ModelCatalogue = field(repr=False)
    pixels: int = 512
    result: Run | None = None
    result_problem: str = ""
    other: Run | None = None
    other_problem: str = ""
    store: RunStore | None = field(default=None, repr=False)

    @property
    def tokens(self) -> list[str]:
        return [] if self.run is None else (self.run.manifest.get("tokens") or {}).get("strings", [])

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def source_tokens(self) -> list[str]:
        """What an encoder-decoder's encoder read; [] of other models."""
        return [] if self.run is None else (self.run.manifest.get("source") or {}).get("strings", [])

    @property
    def read_tokens(self) -> list[str]:
        """The columns of the chosen layer's pattern: the tokens of the run, or of its source."""
        return self.source_tokens if reads_source(self.layer) else self.tokens

    @property
    def layers(self) -> list[dict[str, Any]]:
        return [] if self.run is None else self.run.layers

    @property
    def heads_per_layer(self) -> list[int]:
        return [layer["n_heads"] for layer in self.layers]

    @property
    def slots(self) -> list[dict[str, Any]]:
        """What the chosen layer carries from token to token: `{name, axes, shape, ...}` each, the main one first."""
        return state_slots(self.layer or {})

    @property
    def slot(self) -> dict[str, Any]:
        """The one of `slots` that the view shows; {} for a layer without a state."""
        return next((slot for slot in self.slots if slot["name"] == self.view.slot), (self.slots or [{}])[0])

    @property
    def layer(self) -> dict[str, Any] | None:
        """The record of the chosen layer, or None for a run without layers."""
        return self.layers[self.view.layer] if self.view.layer < len(self.layers) else None

    @property
    def query(self) -> int:
        """The token that reads: the pinned one, else the last."""
        return self.view.query_position(self.n_tokens)

    @property
    def position(self) -> int:
        """The token whose state is shown."""
        return self.view.state_position(self.n_tokens)

    def opened(self) -> Run:
        """The run; RunError with the problem when there is none."""
        if self.run is None:
            raise RunError(self.problem or "no run is open")
        return self.run

    def factors(self) -> LayerFactors:
        """The factors of the chosen layer. FactorError says why there are none."""
        run, layer = self.opened(), self.view.layer
        if self.layer is None:
            raise FactorError(f"run {run.id} has no layers to look into: it is a {run.kind} run")
        return self.cache.get(("factors", run.id, self.view.part, layer), lambda: LayerFactors.from_run(run, layer))

    def state_factors(self) -> LayerFactors:
        """The factors of the chosen layer, with the chosen one of `slots` as its state."""
        factors, name = self.factors(), self.slot.get("name")
        if name is None or name == self.slots[0]["name"]:
            return factors
        return self.once("slot", self.view.layer, name, make=lambda: factors.slot(name))

    def once(self, *key: Hashable, make: Callable[[], T]) -> T:
        """A value computed once per run and key; `key` names everything that it depends on besides the run."""
        return self.cache.get(("value", self.opened().id, self.view.part, *key), make)


class Services:
    """The run store, the job queue and the model catalogue, with small caches of opened runs and computed values."""

    def __init__(self, store: RunStore, jobs: JobQueue, models: ModelCatalogue):
        self.store, self.jobs, self.models = store, jobs, models
        self._cache = LeastRecentlyUsed(96)
        self.pictures = LeastRecentlyUsed(256)

    def open_run(self, run_id: str) -> Run:
        """The run, opened once. RunError when it is not there (any more) or cannot be read."""
        run = self._cache.get(("run", run_id), lambda: self.store.open(run_id))
        if not run.path.is_dir():
            self.forget_run(run_id)
            return self.store.open(run_id)
        return run

    def forget_run(self, run_id: str) -> None:
        """Drop what is cached about a run, after it was deleted."""
        for cache in (self._cache, self.pictures):
            cache.forget(lambda key: isinstance(key, tuple) and run_id in key)

    def trace_entries(self) -> list[RunEntry]:
        """Runs that have tokens to look at, newest first."""
        return [entry for entry in self.store.list() if entry.tokens > 0]

    def scene(self, view: ViewState, pixels: int = 512) -> Scene:
        """What a view points at. A view without a run means the newest one; the view comes back fitted to the run."""
        scene = replace(self._scene_of_run(view, pixels), store=self.store)
        if view.result:
            result, problem = self._named(view.result)
            scene = replace(scene, result=result, result_problem=problem)
        if view.run_b:
            other, problem = self._named(view.run_b)
            scene = replace(scene, other=other, other_problem=problem)
        return scene

    def _named(self, run_id: str) -> tuple[Run | None, str]:
        """The run of an id, or None and why it is not there."""
        try:
            return self.open_run(run_id), ""
        except RunError as error:
            return None, str(error).split(" Known:")[0]

    def _part_of(self, run: Run, view: ViewState) -> tuple[Run, ViewState]:
        """The part of a run that a view names, as a run; the whole of it where there is no such part."""
        try:
            return self._cache.get(("part", run.id, view.part), lambda: run.encoder), view
        except RunError:
            return run, view.own_text()

    def _scene_of_run(self, view: ViewState, pixels: int) -> Scene:
        run_id = view.run
        if not run_id:
            newest = self.trace_entries()[:1]
            if not newest:
                return Scene(view, None, None, self._cache, self.models, pixels)
            run_id = newest[0].id
        try:
            run = self.open_run(run_id)
        except RunError as error:
            return Scene(view, None, str(error).split(" Known:")[0], self._cache, self.models, pixels)
        if view.part:
            run, view = self._part_of(run, view)
        scene = Scene(view.change(run=run_id), run, None, self._cache, self.models, pixels)
        slots = [[slot["name"] for slot in state_slots(layer)] for layer in scene.layers]
        maps = list(run_score_labels(scene.layers))
        columns = [len(scene.source_tokens) if reads_source(layer) else scene.n_tokens for layer in scene.layers]
        return replace(scene, view=scene.view.clamped(scene.n_tokens, scene.heads_per_layer, slots, columns, maps))


def parts_of(run: Run) -> dict[str, tuple[str, int | None]]:
    """The parts of a run whose model reads a source, {"encoder", "decoder", "cross"} -> (part of a view, first layer there, or None where
    the run keeps nothing of it); {} for other runs, whose layers are of one kind."""
    own = {bool(reads_source(layer)): number for number, layer in reversed(list(enumerate(run.layers)))}
    if True not in own:
        return {}
    return {
        "encoder": ("encoder", 0 if run.manifest.get("encoder") else None),
        "decoder": ("", own.get(False)),
        "cross": ("", own[True]),
    }


def reads_source(layer: Mapping[str, Any] | None) -> bool:
    """Whether a layer reads another text than the run's own tokens, from its record."""
    return bool(layer and layer.get("n_columns") is not None)


def content_tag(*parts: str) -> str:
    """A short hash of some texts, for ETag headers."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
