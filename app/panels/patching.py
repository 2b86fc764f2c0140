"""Panels of the Patching page: per grid the exact one and, beside it, the estimate from one gradient."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, visible_text
from app.figures.interventions import patching_map
from app.measure.patching import KIND, VIEWS, GridView
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel, measured
from app.services import Scene
from app.theme import Theme
from probes.interventions.language import written_text


class PatchingPanel(ResultPanel):
    """One grid, exact or estimated."""

    kind = KIND
    start = "Give two texts of equally many tokens on this page and press Patch."
    height = 300

    def __init__(self, view: GridView, exact: bool) -> None:
        self.view, self.exact = view, exact
        self.id = f"patching-{view.name}{'' if exact else '-estimate'}"
        self.title = f"{view.title}{'' if exact else ': estimate'}"
        cell = "head" if view.by == "head" else "token"
        self.words = (
            f"One run per cell: 1 means that this {cell} alone restores the clean text's logit difference. "
            "Click a cell to put it into the basket."
            if exact
            else "Attribution patching: a first-order guess of all cells from one gradient."
        )

    def check(self, scene: Scene) -> None:
        super().check(scene)
        found = measured(scene, self.kind)
        if found is None or self.view.name not in found.manifest["results"]["views"]:
            raise NothingToShow("This grid was not asked for", "Choose it in the form and press Patch.")

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, f"{'exact' if self.exact else 'estimated'}.{self.view.name}")

    def columns(self, scene: Scene) -> list[str]:
        """What each column is called: heads by number, tokens by their place and text, that of either text where they differ."""
        if self.view.by == "head":
            return [f"head {head}" for head in range(self.values(scene).shape[1])]
        clean, corrupted = self.results(scene)["tokens"].values()
        names = []
        for place, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
            names.append(f"{place} ‘{visible_text(one)}’" + ("" if one == other else f" for ‘{visible_text(other)}’"))
        return names

    def ticks(self, scene: Scene) -> list[str]:
        """The same, as short as an axis needs it: a token of the text that is patched."""
        if self.view.by == "head":
            return [str(head) for head in range(self.values(scene).shape[1])]
        base = "corrupted" if self.settings(scene)["direction"] == "denoise" else "clean"
        return [visible_text(token) for token in self.results(scene)["tokens"][base]]

    def line(self, scene: Scene) -> dict | None:
        """What a click puts into the basket of the Intervene page; None where layers repeat, which a line cannot name."""
        asked, layers = self.settings(scene), self.results(scene)["views"][self.view.name]["layers"]
        if any("@" in layer for layer in layers):
            return None
        source, base = ("clean", "corrupted") if asked["direction"] == "denoise" else ("corrupted", "clean")
        return {
            "line": self.view.line.replace("{text}", written_text(asked[source])),
            "rows": layers,
            "on": asked[base],
        }

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows = self.results(scene)["views"][self.view.name]["layers"]
        line = self.line(scene)
        return patching_map(
            self.values(scene), rows, self.columns(scene), self.ticks(scene), theme, panel=self.id,
            x_title="head" if self.view.by == "head" else "token", meta={} if line is None else {"basket": line},
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        rows = self.results(scene)["views"][self.view.name]["layers"]
        lines = ([row, *map(float, line)] for row, line in zip(rows, self.values(scene), strict=True))
        return ["layer", *self.columns(scene)], lines

    def facts(self, scene: Scene) -> list[str]:
        results = self.results(scene)
        found = results["views"][self.view.name]["correlation"]
        said = (
            "no correlation: all cells alike" if found is None else f"correlation of estimate and exact {number(found)}"
        )
        difference = f"‘{visible_text(results['answer'])}’ − ‘{visible_text(results['wrong'])}’"
        ends = f"{difference}: clean {number(results['clean'])}, corrupted {number(results['corrupted'])}"
        return [said, ends] if self.exact else [said]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
from app.measure.patching import grid

model = models.load("{self.result(scene).model["name"]}")
values = grid(model, run.manifest["settings"], "{self.view.name}", exact={self.exact}).normalised().numpy()
"""


PANELS = tuple(PatchingPanel(view, exact) for view in VIEWS.values() for exact in (True, False))
