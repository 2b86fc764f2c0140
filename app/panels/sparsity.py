"""Panels of the Sparsity page: which share of neurons is active, where, when, and how that follows surprise."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines
from app.figures.sparsity import layer_shares, octile_shares, ties
from app.measure.sparsity import ACTIVITIES, KIND
from app.panels.base import Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import Theme

MEANINGS = {"x": "x: what neurons see", "gate": "gate: what memory opens", "y": "y = x · gate: what fires"}
TIES = {"read": "while the token is read", "next": "before the surprising token"}


class SparsityPanel(ResultPanel):
    """A panel over counts of active neurons."""

    kind = KIND

    def opening(self, scene: Scene) -> str:
        """Python that counts again."""
        model = self.settings(scene)["model"]
        return (
            "from probes.bdh import measure_sparsity\n\n"
            f'found = measure_sparsity(models.load("{model}"), run.manifest["text"])'
        )


class SparsityOverTokens(SparsityPanel):
    """Share of firing neurons, token by token."""

    id = "sparsity-tokens"
    title = "What fires, token by token"
    words = "Share of neurons whose y is not zero, per layer, mean over heads. The first token reads nothing and is left out."
    height = 290

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "active.y").mean(axis=1)

    def tokens(self, scene: Scene) -> list[str]:
        """The tokens of the measured text."""
        return self.results(scene)["tokens"]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = [(f"layer {layer}", line) for layer, line in enumerate(self.values(scene))]
        dashes = [("solid", "dash", "dot", "dashdot")[layer % 4] for layer in range(len(series))]
        figure = token_lines(series, self.tokens(scene), theme, y_title="active neurons", panel=self.id, role="", click="", from_zero=True,
                             dashes=dashes)  # fmt: skip
        return figure.update_yaxes(tickformat=".0%")

    def table(self, scene: Scene) -> Table:
        values, nats, tokens = self.values(scene), self.array(scene, "surprisal"), self.tokens(scene)
        headers = ["token", "surprisal (nats)", *(f"layer {layer}" for layer in range(len(values)))]
        return headers, (
            [token_label(tokens, t), float(nats[t]), *map(float, values[:, t])] for t in range(values.shape[1])
        )

    def facts(self, scene: Scene) -> list[str]:
        return [f"surprisal {number(float(np.nanmean(self.array(scene, 'surprisal'))))} nats per token"]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.opening(scene)}\nvalues = found.of("y")[0].mean(1).numpy()'


class SparsityByLayer(SparsityPanel):
    """Shares of x, gate and y by layer and head."""

    id = "sparsity-layers"
    title = "How sparse, by layer and head"
    words = "Lines are means over heads, points single heads. Published claims about sparsity are about y; untrained: x and gate ½, y ¼."
    height = 270

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack([np.nanmean(self.array(scene, f"active.{name}"), axis=2) for name in ACTIVITIES])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        shares = dict(zip(MEANINGS.values(), self.values(scene), strict=True))
        return layer_shares(shares, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        dead = {name: self.array(scene, f"dead.{name}") for name in ACTIVITIES}
        return ["activity", "layer", "head", "active", "never active"], (
            [name, str(layer), str(head), float(share), float(dead[name][layer, head])]
            for name, values in zip(ACTIVITIES, self.values(scene), strict=True)
            for (layer, head), share in np.ndenumerate(values)
        )

    def facts(self, scene: Scene) -> list[str]:
        results = self.results(scene)
        everywhere = results["dead_everywhere"]
        return [
            f"{results['neurons']} neurons per head",
            f"{everywhere['y']} fire (y) at no token of no layer, {everywhere['x']} see (x) nothing",
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.opening(scene)}\nvalues = np.stack([found.mean(name).numpy() for name in ("x", "gate", "y")])'


class SurpriseTie(SparsityPanel):
    """Does surprise come with activity?"""

    id = "sparsity-surprise"
    title = "Does surprise come with activity?"
    words = "Correlation of the share that fires with surprisal over tokens. Bars: what 95 % of shifted copies of the same series reach."
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack([self.array(scene, f"correlation.{token}") for token in TIES])

    def nulls(self, scene: Scene) -> np.ndarray:
        """95th percentile of |correlation| by chance, [token, layer]."""
        return np.stack([self.array(scene, f"null.{token}") for token in TIES])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        pairs = zip(self.values(scene), self.nulls(scene), strict=True)
        return ties(dict(zip(TIES.values(), pairs, strict=True)), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values, nulls = self.values(scene), self.nulls(scene)
        return ["when", "layer", "correlation", "chance"], (
            [name, str(layer), float(values[row, layer]), float(nulls[row, layer])]
            for row, name in enumerate(TIES.values())
            for layer in range(values.shape[1])
        )

    def facts(self, scene: Scene) -> list[str]:
        beyond = np.abs(self.values(scene)) > self.nulls(scene)
        return [
            f"{self.results(scene)['compared']} tokens compared",
            *(
                f"{name}: {int(row.sum())} of {len(row)} layers beyond chance"
                for name, row in zip(TIES.values(), beyond, strict=True)
            ),
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.opening(scene)}\nvalues = np.stack([found.correlation("y", token=when).value.numpy() for when in ("read", "next")])'


class SparsityByTimeScale(SparsityPanel):
    """Fast and slow neurons."""

    id = "sparsity-octiles"
    title = "Fast and slow neurons"
    words = "Share that fires (y) by rotation period: octile 0 turns once in 6 to 25 tokens, each further one about 4 times as slowly."
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "octile.y")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return octile_shares(self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values = {name: self.array(scene, f"octile.{name}") for name in ACTIVITIES}
        return ["layer", "octile", *ACTIVITIES], (
            [str(layer), str(octile), *(float(each[layer, octile]) for each in values.values())]
            for layer, octile in np.ndindex(values["y"].shape)
        )

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.opening(scene)}\nvalues = found.octile_means("y").numpy()'


PANELS = (SparsityOverTokens(), SparsityByLayer(), SurpriseTie(), SparsityByTimeScale())
