"""Panels of the Sparsity page: which share of neurons is active, where, when, and how that follows surprise."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label, token_lines
from app.figures.sparsity import layer_shares, octile_shares, share_raster, shares_over_training, ties
from app.measure.sparsity import ACTIVITIES, KIND
from app.panels.base import Table, scale_words
from app.panels.results import HeadsOverTokens, ResultPanel
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


class SparsityRaster(SparsityPanel, HeadsOverTokens):
    """Share of firing neurons, head by head and token by token."""

    id = "sparsity-raster"
    title = "What fires, head by head"
    words = "Share of each head’s neurons whose y is not zero, at every token."
    depends = ("run", "result", "scale")

    def by_head(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "active.y")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(False), self.limit(scene), scene.view.scale, False, "active neurons")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        tokens = self.results(scene)["tokens"]
        address = self.address(scene, theme)
        return share_raster(address, tokens, self.heads(scene), self.colours(scene, theme), theme, panel=self.id)

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        layer, head = self.heads(scene)[row]
        return [("head", f"{layer}·{head}"), ("at", token_label(self.results(scene)["tokens"], column))]

    def facts(self, scene: Scene) -> list[str]:
        return [scale_words(scene.view.scale)]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.opening(scene)}\nvalues = found.of("y")[0].flatten(0, 1).numpy()  # layer·head, pos'


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


class SparsityOverTraining(SparsityPanel):
    """How sparse the model became while it learned."""

    id = "sparsity-training"
    title = "How it became sparse"
    words = "Share of active neurons over the model’s own training, on held-out text. Thick: mean over layers; thin: one layer each."
    height = 320

    def about(self, scene: Scene) -> dict[str, Any]:
        """What the model's card says of its curve."""
        why = "The card of this model keeps none. A BDH that was trained with workbench train has one, and so have the shipped ones."
        return self.recorded(scene, "training", "No curve of its training", why)

    def values(self, scene: Scene) -> np.ndarray:
        self.about(scene)
        return self.array(scene, "training.active")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        shares = dict(zip(MEANINGS.values(), self.values(scene), strict=True))
        return shares_over_training(self.array(scene, "training.step"), shares, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values, nats = self.values(scene), self.array(scene, "training.surprisal")
        headers = [
            "step",
            "surprisal (nats)",
            *(f"{name}, layer {layer}" for name in ACTIVITIES for layer in range(values.shape[2])),
        ]
        return headers, (
            [str(step), float(nats[row]), *map(float, values[:, row].ravel())]
            for row, step in enumerate(self.array(scene, "training.step").tolist())
        )

    def facts(self, scene: Scene) -> list[str]:
        about, values = self.about(scene), self.values(scene)
        first, last = values[2, [0, -1]].mean(1)
        facts = [f"y {first:.1%} untrained, {last:.1%} trained"]
        if about["until"]:
            facts.append(
                f"the first {about['until']} steps were made again as the card says (losses differ from the card’s by at most "
                f"{number(about['difference'])} nats); the last point is the model itself"
            )
        return facts

    def snippet_body(self, scene: Scene) -> str:
        return f"""
from probes.bdh import card_curve, over_steps

curve = card_curve(models.load("{self.settings(scene)["model"]}").card)
values = np.stack([over_steps(curve, name)[1].numpy() for name in ("x", "gate", "y")])  # activity, measurement, layer
"""


PANELS = (
    SparsityOverTokens(), SparsityByLayer(), SurpriseTie(), SparsityByTimeScale(), SparsityOverTraining(), SparsityRaster(),
)  # fmt: skip
