"""The models of the registry as the dashboard sees them: listed, described, and traced in the job queue.

This is the one place of the dashboard that loads models, and it imports them only when one is asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import RunStore

KEPT = 3  # models that stay loaded; more would hold memory for models that nobody looks at any more


class LocalModels:
    """An `app.services.ModelCatalogue` over `models.registry`. Traces are written to `store` and run in `jobs`."""

    def __init__(self, store: RunStore, jobs: JobQueue):
        self.store, self.jobs = store, jobs
        self._loaded: dict[str, Any] = {}
        self._lock = threading.Lock()

    def list_models(self) -> Sequence[Mapping[str, Any]]:
        """Shipped models first, then architectures at random weights."""
        from models.registry import list_models

        names = ("name", "title", "architecture", "family", "paper", "parameters", "provenance", "description")
        return [
            {name: getattr(record, name) for name in names} | {"card": card_text(record.card)}
            for record in list_models()
        ]

    def describe(self, name: str) -> Mapping[str, Any]:
        """`{blocks, hook_points}` in the order of the forward pass. Raises ValueError for an unknown name."""
        model = self._load(name)
        points = [
            {"name": point, "role": slot.role, "axes": list(slot.axes), "editable": bool(slot.editable)}
            for point, slot in model.hook_dict.items()
        ]
        return {"blocks": blocks(model), "hook_points": points}

    def start_trace(self, name: str, text: str, settings: Mapping[str, Any]) -> Job:
        """Start a trace; the job's result is the run's id. Raises ValueError for a text that the model cannot take."""
        model = self._load(name)
        if not text:
            raise ValueError("The text is empty: there is nothing to read.")
        length = model.to_tokens(text).shape[1]
        if model.n_ctx is not None and length > model.n_ctx:
            raise ValueError(f"The text has {length:,} tokens; {name} reads at most {model.n_ctx:,}.")
        return self.jobs.submit(
            f"Trace with {name}", self._trace, name=name, text=text, run_title=settings.get("title")
        )

    def _trace(self, job: Job, name: str, text: str, run_title: str | None) -> str:
        from workbench.lab.trace import trace_run

        return trace_run(self._load(name), text, self.store, title=run_title, progress=job.progress).id

    def _load(self, name: str) -> Any:
        """The model, loaded once. Only names of the registry: what a browser sends never becomes a path."""
        import models

        models.describe(name)
        with self._lock:
            if name not in self._loaded:
                while len(self._loaded) >= KEPT:
                    self._loaded.pop(next(iter(self._loaded)))
                self._loaded[name] = models.load(name)
            return self._loaded[name]


def blocks(model: Any) -> list[dict[str, Any]]:
    """The parts of a model in the order of the forward pass: `{kind, label, detail, layer}`."""
    found: list[dict[str, Any]] = []

    def add(kind: str, label: str, detail: str, layer: int | None = None) -> None:
        found.append({"kind": kind, "label": label, "detail": detail, "layer": layer})

    add("embed", "Embedding", f"{model.vocab_size} × {model.d_model}")
    roles: dict[int, set[str]] = {}
    for slot in model.hook_dict.values():
        if slot.layer_index is not None:
            roles.setdefault(slot.layer_index, set()).add(slot.role)
    for layer, mixer in enumerate(model.mixers):
        about = mixer.describe()
        state = " × ".join(map(str, about["state"]["shape"])) if about["state"] else ""
        detail = f"{about['n_heads']} heads" + (f", state {state}" if state else "")
        add(about["kind"], about["kind"].replace("_", " ").capitalize(), detail, layer)
        if "mlp_out" in roles.get(layer, ()):
            add("mlp", "MLP", "", layer)
    add("unembed", "Unembedding", f"{model.d_model} × {model.vocab_size}")
    return found


def card_text(card: Mapping[str, Any]) -> str | None:
    """A model's card as Markdown: one line per entry, longer records as indented JSON. None for no card."""
    if not card:
        return None
    lines = []
    for name, value in card.items():
        heading = f"**{name.replace('_', ' ')}**"
        if isinstance(value, Mapping | list):
            block = json.dumps(value, indent=2, ensure_ascii=False)
            lines.append(f"{heading}\n\n```\n{block}\n```")
        elif name in ("command", "weights_sha256"):
            lines.append(f"{heading}: `{value}`")
        else:
            lines.append(f"{heading}: {value}")
    return "\n\n".join(lines)
