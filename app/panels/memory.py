"""Panels of other memories: the key-value cache of softmax attention, and the sparse neurons of BDH."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label
from app.figures.neurons import neuron_order, neuron_raster, top_neurons
from app.figures.state import cache_picture
from app.panels.attention_rows import head_words
from app.panels.base import FigurePanel, NothingToShow, PicturePanel, Reading, Span, Table, scale_words
from app.panels.words import memory_words
from app.services import Scene
from app.theme import Theme
from app.view_state import SORTS
from workbench.lab.pooling import pool

SHOWN_NEURONS = 5


class Cache(PicturePanel):
    """Keys or values that a softmax head has in its cache after the chosen token."""

    depends = ("run", "layer", "head", "query", "position", "scale")
    height = 330

    def __init__(self, which: str):
        self.which = which
        self.id = f"cache-{which}"
        self.title = "Keys in the cache" if which == "keys" else "Values in the cache"
        self.words = (
            "What each token offers to be found by: one column per token in the cache, one row per channel."
            if which == "keys"
            else "What each token hands over when it is read: one column per token in the cache."
        )

    def _part(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        if (scene.layer or {}).get("form") != "softmax":
            raise NothingToShow("This layer has no KV cache", memory_words(scene.layer or {}))
        factors, view = scene.factors(), scene.view
        read = factors.cache_keys if self.which == "keys" else factors.cache_values
        return read(view.head, scene.position).T

    def _span(self, scene: Scene) -> Span:
        positions = scene.factors().cache_positions(scene.position)
        return int(positions[0]), int(positions[-1]) + 1

    def shape(self, scene: Scene) -> tuple[int, int]:
        return self._part(scene).shape[0], scene.n_tokens

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        return (0, self._part(scene).shape[0]), self._span(scene)

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        start, stop = self._span(scene)
        whole = np.full((rows[1] - rows[0], columns[1] - columns[0]), np.nan, dtype=np.float32)
        first, last = max(start, columns[0]), min(stop, columns[1])
        if first < last:
            part = self._part(scene)[slice(*rows), first - start : last - start]
            whole[:, first - columns[0] : last - columns[0]] = part
        return whole

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self._part(scene), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        run, scale = scene.opened(), scene.view.scale
        name = f"layer.{scene.view.layer}.{'key' if self.which == 'keys' else 'value'}"

        def largest() -> float:
            groups = run.array(name)
            return float(np.abs(groups[scene.view.head * len(groups) // scene.heads_per_layer[scene.view.layer]]).max())

        limit = 1.0 if scale == "row" else scene.once("cache-limit", name, scene.view.head, make=largest)
        return Colours(theme.table_name(True), limit, scale, True, "entry")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        width = self._part(scene).shape[0]
        return cache_picture(self.address(scene, theme), scene.tokens, width, self._span(scene), self.colours(scene, theme),
                             theme, panel=self.id, name=self.which[:-1])  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("channel", str(row)), ("of token", token_label(scene.tokens, column))]

    def facts(self, scene: Scene) -> list[str]:
        start, stop = self._span(scene)
        after = f"after token {token_label(scene.tokens, scene.position)}"
        return [*head_words(scene), after, f"{stop - start} tokens in the cache", scale_words(scene.view.scale)]

    def snippet_body(self, scene: Scene) -> str:
        return f"values = factors.cache_{self.which}({scene.view.head}, {scene.position}).T  # channel, token"


class NeuronRaster(PicturePanel):
    """Sparse activity of the neurons of one head over the text."""

    depends = ("run", "layer", "head", "sort", "scale")
    height = 400

    def __init__(self, which: str):
        self.which = which
        self.id = f"neurons-{which}"
        self.title = "Neurons before reading (x)" if which == "x" else "Neurons after reading (y)"
        self.words = (
            "Which neurons fire at which token. These activations address the memory: they are query and key."
            if which == "x"
            else "Which neurons still fire once the memory has been read: gated by what was found."
        )

    def activity(self, scene: Scene) -> np.ndarray:
        """Activity of the chosen head, [pos, neuron], as stored."""
        self.check(scene)
        run, name = scene.opened(), f"layer.{scene.view.layer}.{self.which}"
        if not run.has(name):
            raise NothingToShow("No neurons in this layer", "Only BDH layers record sparse neurons.")
        return run.array(name)[scene.view.head]

    def order(self, scene: Scene) -> np.ndarray:
        """Neuron numbers in the order of the rows."""
        view = scene.view
        key = ("order", self.which, view.layer, view.head, view.sort)
        return scene.once(*key, make=lambda: neuron_order(np.asarray(self.activity(scene), np.float32), view.sort))

    def shape(self, scene: Scene) -> tuple[int, int]:
        tokens, neurons = self.activity(scene).shape
        return neurons, tokens

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        part = self.activity(scene)[slice(*columns)][:, self.order(scene)[slice(*rows)]]
        return part.T.astype(np.float32)

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self.block(scene, *self.spans(scene)), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        scale = scene.view.scale
        limit = 1.0 if scale == "row" else float(np.max(self.activity(scene), initial=0.0))
        return Colours(theme.table_name(False), limit, scale, False, "activity")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        neurons, tokens = self.shape(scene)
        return neuron_raster(self.address(scene, theme), scene.tokens, neurons, (0, tokens), self.colours(scene, theme), theme,
                             panel=self.id)  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("neuron", str(self.order(scene)[row])), ("at", token_label(scene.tokens, column))]

    def reading(self, scene: Scene, row: int, column: int) -> Reading:
        rows, columns = self.shape(scene)
        if not (0 <= row < rows and 0 <= column < columns):
            raise IndexError(f"cell [{row}, {column}] is outside {rows} × {columns}")
        return Reading(float(self.activity(scene)[column, self.order(scene)[row]]), self.place(scene, row, column))

    def facts(self, scene: Scene) -> list[str]:
        neurons, _ = self.shape(scene)
        active = float((self.activity(scene) > 0).mean())
        facts = [
            *head_words(scene),
            f"{active:.1%} of {neurons} neurons active on average",
            f"sorted by {SORTS[scene.view.sort]}",
        ]
        down, across = self.binning(scene)
        if max(down, across) > 1:
            facts.append(f"one picture cell = up to {down} neurons × {across} tokens, the largest drawn")
        return [*facts, scale_words(scene.view.scale)]

    def snippet_body(self, scene: Scene) -> str:
        view = scene.view
        orders = {
            "index": "np.arange(activity.shape[1])",
            "total": "np.argsort(-activity.sum(0, dtype=np.float64), kind='stable')",
            "peak": "np.argsort(-activity.max(0), kind='stable')",
            "first": "np.argsort(np.where(active.any(0), active.argmax(0), len(active)), kind='stable')",
        }
        active = "active = activity > 0\n" if view.sort == "first" else ""
        return f"""
activity = run.array("layer.{view.layer}.{self.which}")[{view.head}].astype(np.float32)  # pos, neuron
{active}order = {orders[view.sort]}  # {SORTS[view.sort]}
values = activity[:, order].T
"""


class TopNeurons(FigurePanel):
    """The neurons that fire most at the chosen token, over the whole text."""

    id = "top-neurons"
    title = "The neurons that fire most now"
    words = f"The {SHOWN_NEURONS} most active neurons (x) at the chosen token, over the whole text."
    depends = ("run", "layer", "head", "query", "position")
    height = 250

    def __init__(self, raster: NeuronRaster):
        self.raster = raster

    def neurons(self, scene: Scene) -> list[int]:
        """Their numbers, most active first; neurons that are silent at this token are left out."""
        now = np.asarray(self.raster.activity(scene)[scene.position], dtype=np.float32)
        order = np.argsort(-now, kind="stable")[:SHOWN_NEURONS]
        return [int(neuron) for neuron in order if now[neuron] > 0]

    def values(self, scene: Scene) -> np.ndarray:
        neurons = self.neurons(scene)
        if not neurons:
            token = token_label(scene.tokens, scene.position)
            raise NothingToShow("No neuron fires here", f"All neurons of this head are silent at token {token}.")
        return self.raster.activity(scene)[:, neurons].T.astype(np.float32)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return top_neurons(self.neurons(scene), self.values(scene), scene.tokens, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = ["token", *(f"neuron {neuron}" for neuron in self.neurons(scene))]
        return headers, ([token_label(scene.tokens, t), *map(float, values[:, t])] for t in range(values.shape[1]))

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), f"at token {token_label(scene.tokens, scene.position)}"]

    def snippet_body(self, scene: Scene) -> str:
        view = scene.view
        return f"""
activity = run.array("layer.{view.layer}.x")[{view.head}]  # pos, neuron
values = activity[:, {self.neurons(scene)}].T.astype(np.float32)
"""


def neuron_rows(scene: Scene, raster: NeuronRaster, most: int = 12) -> list[tuple[int, float, int, str]]:
    """The neurons that fire most at the chosen token: (neuron, activity now, tokens at which it fires, favourite token)."""
    activity = np.asarray(raster.activity(scene), dtype=np.float32)
    now = activity[scene.position]
    chosen = [int(neuron) for neuron in np.argsort(-now, kind="stable")[:most] if now[neuron] > 0]
    return [
        (neuron, float(now[neuron]), int((activity[:, neuron] > 0).sum()),
         token_label(scene.tokens, int(activity[:, neuron].argmax())))
        for neuron in chosen
    ]  # fmt: skip


def sparsity_words(scene: Scene, raster: NeuronRaster) -> str:
    """How many neurons fire at the chosen token."""
    now = raster.activity(scene)[scene.position]
    return f"{int((now > 0).sum())} of {len(now)} neurons fire, {number(float((now > 0).mean() * 100))} %"


RASTER_X, RASTER_Y = NeuronRaster("x"), NeuronRaster("y")
PANELS = (Cache("keys"), Cache("values"), RASTER_X, RASTER_Y, TopNeurons(RASTER_X))
