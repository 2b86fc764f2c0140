"""The contract of a panel that draws a measurement: a run of its own kind that the address names as its result."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from app.panels.base import FigurePanel, NothingToShow, Panel, PicturePanel, Span
from app.services import Scene
from workbench.lab.pooling import pool
from workbench.lab.runs import Run


class OfResult(Panel):
    """What a panel over `scene.result` has, when that is a run of `kind`. `start` says in words how to get one."""

    depends: tuple[str, ...] = ("run", "result")
    kind: str = ""
    start: str = "Fill in the form on this page and press Start."

    def source(self, scene: Scene) -> Run | None:
        return measured(scene, self.kind)

    def check(self, scene: Scene) -> None:
        if measured(scene, self.kind) is None:
            if scene.view.result and scene.result_problem:
                raise NothingToShow(
                    "This result is not here", f"{scene.result_problem[:1].upper()}{scene.result_problem[1:]}"
                )
            raise NothingToShow("Nothing measured yet", self.start)

    def result(self, scene: Scene) -> Run:
        """The measurement. NothingToShow when the address names none."""
        self.check(scene)
        found = measured(scene, self.kind)
        assert found is not None  # check would have raised
        return found

    def results(self, scene: Scene) -> dict[str, Any]:
        """What the measurement's manifest says it found."""
        return self.result(scene).manifest.get("results") or {}

    def settings(self, scene: Scene) -> dict[str, Any]:
        """What was asked for."""
        return self.result(scene).manifest.get("settings") or {}

    def recorded(self, scene: Scene, name: str, title: str, reason: str) -> Any:
        """A part of `results` that may be missing; then NothingToShow with this title and reason."""
        found = self.results(scene).get(name)
        if found is None:
            raise NothingToShow(title, reason)
        return found

    def array(self, scene: Scene, name: str) -> np.ndarray:
        """An array of the measurement."""
        return self.result(scene).array(name)

    def snippet(self, scene: Scene) -> str:
        """Python that measures the same again, from the text and settings that the run keeps."""
        body = self.snippet_body(scene).strip()
        numpy = ["import numpy as np", ""] if "np." in body else []
        lines = [*numpy, "import models", "from workbench.lab.runs import RunStore", ""]
        return "\n".join([*lines, f'run = RunStore().open("{self.result(scene).id}")', body, ""])


class ResultPanel(OfResult, FigurePanel):
    """A figure of a measurement."""


class HeadsOverTokens(OfResult, PicturePanel):
    """A picture of something that a measurement has for every head and token: one row per layer and head."""

    @abstractmethod
    def by_head(self, scene: Scene) -> np.ndarray:
        """What is drawn: [layer, head, pos]."""

    def heads(self, scene: Scene) -> list[tuple[int, int]]:
        """(layer, head) of every row."""
        layers, heads, _ = self.by_head(scene).shape
        return [(layer, head) for layer in range(layers) for head in range(heads)]

    def pixels_high(self, scene: Scene) -> int:
        return 110 + max(12, min(22, 700 // self.shape(scene)[0])) * self.shape(scene)[0]

    def shape(self, scene: Scene) -> tuple[int, int]:
        layers, heads, tokens = self.by_head(scene).shape
        return layers * heads, tokens

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self.by_head(scene).reshape(self.shape(scene))[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self.block(scene, *self.spans(scene)), size, size, "max")

    def limit(self, scene: Scene) -> float:
        """The largest magnitude on the colour scale."""
        return 1.0 if scene.view.scale == "row" else float(np.nanmax(np.abs(self.by_head(scene)), initial=0.0)) or 1.0


class OfOpenRun(OfResult):
    """What a panel over a measurement of the open run has: it shows none of another run."""

    def check(self, scene: Scene) -> None:
        super().check(scene)
        found = measured(scene, self.kind)
        if found is not None and scene.run is not None and found.manifest["settings"]["run"] != scene.run.id:
            raise NothingToShow(
                "This reading is of another run",
                "Press Read to read the open one, or choose one of its own readings under Results.",
            )


def measured(scene: Scene, kind: str) -> Run | None:
    """The run that the address names as its result, if it is of this kind."""
    return scene.result if scene.result is not None and scene.result.kind == kind else None
