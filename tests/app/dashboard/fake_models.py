"""A model catalogue without models: its runs are the synthetic ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.synthetic_runs import write_synthetic_runs


class FakeModels:
    """Two models. `start_trace` reports progress and then writes synthetic runs; the text decides how many tokens."""

    def __init__(self, store: RunStore, jobs: JobQueue, steps: int = 4, seconds: float = 0.05):
        self.store, self.jobs, self.steps, self.seconds = store, jobs, steps, seconds

    def list_models(self) -> list[dict[str, Any]]:
        return [
            {
                "name": "synthetic-attention", "title": "Synthetic attention", "architecture": "transformer",
                "family": "attention", "parameters": 812_544, "provenance": "random",
                "description": "Drawn factors with a planted previous-token head, a sink and an induction head.", "card": None,
            },
            {
                "name": "synthetic-bdh", "title": "Synthetic BDH", "architecture": "bdh", "family": "bdh",
                "parameters": 25_300_000, "provenance": "random", "description": "Sparse neurons that share letters.",
                "card": "## Synthetic BDH\n\nNot trained.",
            },
        ]  # fmt: skip

    def describe(self, name: str) -> dict[str, Any]:
        if name not in {model["name"] for model in self.list_models()}:
            raise ValueError(f"there is no model {name!r}")
        return {"blocks": [{"kind": "embed", "label": "Embedding", "detail": "256 × 64", "layer": None}], "hook_points": []}

    def load(self, name: str) -> Any:
        raise ValueError(f"{name!r} is not a real model")

    def look_up(self, name: str, dtype: str = "float32") -> dict[str, Any]:
        raise ValueError(f"there is no model {name!r}, here or on the hub.")

    def start_trace(self, name: str, text: str, settings: Mapping[str, Any]) -> Job:
        self.describe(name)
        if "\x00" in text:
            raise ValueError("The text holds a zero byte, which this model cannot read.")
        return self.jobs.submit(f"Trace with {name}", self._trace, name=name, text=text)

    def _trace(self, job: Job, name: str, text: str) -> str:
        for step in range(self.steps):
            job.progress(step / self.steps, f"layer {step} of {self.steps}")
            time.sleep(self.seconds)
        if "fail" in text:
            raise RuntimeError("The model ran out of patience.")
        ids = write_synthetic_runs(self.store, tokens=max(8, min(len(text), 120)))
        return ids[2] if name == "synthetic-bdh" else ids[0]
