"""Panels of the Merge page: losses of parents and merge, and whose neurons do the work."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines
from app.measure.merging import KIND
from app.panels.base import Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import MARKERS, Theme, template

MODELS = ("first parent", "second parent", "merge")
MEASURES = ("neurons that fire (y)", "what reaches the stream (E y)")
IDENTITY = 1e-6
"""A self-merge with ε → 0 counts as an identity below this relative error (float64)."""


class MergePanel(ResultPanel):
    """A panel over a measured merge."""

    kind = KIND

    def opening(self, scene: Scene) -> str:
        """Python that opens the parents and merges them."""
        return """
from app.measure.merging import heritage_of, losses, open_parent
from app.model_service import WorkbenchModels
from app.services import Services
from models.bdh.merge import merge
from workbench.lab.jobs import JobQueue

store, jobs, text = RunStore(), JobQueue(), run.manifest["text"]
services = Services(store, jobs, WorkbenchModels(store, jobs))
parents = [open_parent(services, run.manifest["settings"][which]) for which in ("first", "second")]
merged, heritage = merge(parents, names=["first", "second"])
""".strip()


class MergeLosses(MergePanel):
    """Loss per token of the three models."""

    id = "merge-losses"
    title = "Loss of the parents and of the merge"
    words = "Per token of the text. Nothing was trained: neurons stand side by side, embeddings are averaged."
    height = 300

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "losses")

    def tokens(self, scene: Scene) -> list[str]:
        """The tokens of the merge's own text."""
        return self.results(scene)["tokens"]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = list(zip(MODELS, self.values(scene), strict=True))
        return token_lines(series, self.tokens(scene), theme, y_title="nats", panel=self.id, role="", click="", selected=2, from_zero=True,
                           dashes=["dash", "dot", "solid"])  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values, tokens = self.values(scene), self.tokens(scene)
        return ["token", *MODELS], ([token_label(tokens, t), *map(float, values[:, t])] for t in range(values.shape[1]))

    def facts(self, scene: Scene) -> list[str]:
        means = np.nanmean(self.values(scene), axis=1)
        return [f"{name}: {number(float(mean))} nats per token" for name, mean in zip(MODELS, means, strict=True)]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.opening(scene)}\nvalues = np.stack([losses(model, text) for model in (*parents, merged)])"


class MergeHeritage(MergePanel):
    """Whose neurons do the work, layer by layer."""

    id = "merge-heritage"
    title = "Heritage: the first parent's share"
    words = "Of the neurons that fire and of what they add to the stream, by layer. A half each is a balanced merge."
    height = 250

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "heritage")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, figure = self.values(scene), go.Figure()
        for index, name in enumerate(MEASURES):
            figure.add_scatter(
                x=np.arange(len(values)), y=values[:, index], mode="lines+markers", name=name,
                line={"color": theme.categorical[index], "dash": ("solid", "dash")[index]}, marker={"size": 9, "symbol": MARKERS[index]},
                hovertemplate="layer %{x}<br>%{y:.3f}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
        figure.add_hline(y=0.5, line={"color": theme.dim, "dash": "dot"})
        low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
        figure.update_layout(
            template=template(theme.name), meta={"panel": self.id}, showlegend=True,
            xaxis={"title": {"text": "layer"}, "fixedrange": True, "dtick": 1},
            yaxis={"title": {"text": "share"}, "fixedrange": True, "range": [low - 0.02, high + 0.02]},
        )  # fmt: skip
        return figure

    def table(self, scene: Scene) -> Table:
        return ["layer", *MEASURES], ([str(layer), *map(float, row)] for layer, row in enumerate(self.values(scene)))

    def facts(self, scene: Scene) -> list[str]:
        first, second = self.results(scene)["neurons"]
        return [f"{first} + {second} neurons per head"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.opening(scene)}\nvalues = heritage_of(merged, heritage, text)"


PANELS = (MergeLosses(), MergeHeritage())
