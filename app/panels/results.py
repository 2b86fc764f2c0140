"""The contract of a panel that draws a measurement: a run of its own kind that the address names as its result."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.panels.base import FigurePanel, NothingToShow, Panel
from app.services import Scene
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
