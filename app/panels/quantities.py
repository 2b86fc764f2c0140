"""Panels of special quantities: one for each that the run keeps of the chosen layer and of the whole model, whatever model it is of."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label
from app.figures.quantities import quantity_picture
from app.panels.base import NothingToShow, PicturePanel, Span, scale_words
from app.panels.words import kind_words
from app.services import Scene
from app.theme import Theme
from app.view_state import POOLINGS
from workbench.lab.pooling import pool
from workbench.lab.quantities import Quantity, run_quantities

MOST_PANELS = 24
AXIS_WORDS = {
    "pos": "token", "kv_head": "key/value head", "one": "", "query": "token that reads", "key": "token that is read",
    "source": "earlier output",
}  # fmt: skip


def quantities_of(scene: Scene) -> list[Quantity]:
    """What the run keeps of the whole model and of the chosen layer."""
    if scene.run is None:
        return []
    layer = scene.layer["layer"] if scene.layer else None
    return scene.once("quantities", layer, make=lambda: run_quantities(scene.opened().manifest, layer))


def axis_words(name: str) -> str:
    """What an axis is called: `symbol head × symbol`."""
    return " × ".join(AXIS_WORDS.get(part, part.replace("_", " ")) for part in name.split(" × "))


class QuantityPanel(PicturePanel):
    """The special quantity with this number among those of the view."""

    title = "A special quantity"
    words = "What only some models compute."
    depends = ("run", "layer", "head", "pooling", "scale")
    height = 420

    def __init__(self, place: int):
        self.id, self.place_in_list = f"quantity-{place}", place

    def quantity(self, scene: Scene) -> Quantity:
        """The one that is drawn."""
        self.check(scene)
        found = quantities_of(scene)
        if self.place_in_list >= len(found):
            raise NothingToShow("No further quantity", "This layer's parts compute no more than the panels above show.")
        return found[self.place_in_list]

    def heading(self, scene: Scene) -> str:
        return self.quantity(scene).label

    def explanation(self, scene: Scene) -> str:
        return self.quantity(scene).words

    def _stored(self, scene: Scene) -> np.ndarray:
        """[which, row, column]."""
        quantity = self.quantity(scene)
        if not quantity.array:
            raise NothingToShow("Not kept in this run", quantity.why)
        array = scene.opened().array(quantity.array)
        return array[None] if array.ndim == 2 else array

    def _which(self, scene: Scene) -> int:
        """Which of several is drawn: the chosen head's, or its group's."""
        count = self._stored(scene).shape[0]
        heads = (scene.layer or {}).get("n_heads", 1)
        return scene.view.head * count // heads if count <= heads else min(scene.view.head, count - 1)

    def is_map(self, scene: Scene) -> bool:
        """Whether rows are the tokens that read."""
        return self.quantity(scene).axes[1] == "query"

    def aspect(self, scene: Scene) -> float | None:
        return 1.0 if self.is_map(scene) else None

    def pixels_high(self, scene: Scene) -> int:
        return 118 + min(max(24 * self.shape(scene)[0], 44), 300)

    def shape(self, scene: Scene) -> tuple[int, int]:
        _, rows, columns = self._stored(scene).shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return np.asarray(self._stored(scene)[self._which(scene)][slice(*rows), slice(*columns)])

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self.block(scene, *self.spans(scene)), size, size, scene.view.pooling)

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        values, scale = self._stored(scene), scene.view.scale
        signed = bool(np.nanmin(values, initial=0.0) < 0)
        limit = 1.0 if scale == "row" else float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        return Colours(theme.table_name(signed), limit, scale, signed, self.quantity(scene).unit)

    def row_labels(self, scene: Scene) -> list[str]:
        """What each row is called: its number, or several where rows count several things."""
        sizes = self.quantity(scene).row_shape
        return (
            [" · ".join(map(str, at)) for at in np.ndindex(*sizes)]
            if sizes
            else [str(row) for row in range(self.shape(scene)[0])]
        )

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.shape(scene)
        return quantity_picture(
            self.address(scene, theme), scene.tokens, (axis_words(self.quantity(scene).axes[1]), rows), columns, self.is_map(scene),
            self.colours(scene, theme), theme, panel=self.id, row_labels=self.row_labels(scene),
        )  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        rows, columns = self.shape(scene)
        _, down, across = self.quantity(scene).axes

        def said(axis: str, at: int, count: int) -> tuple[str, str]:
            tokens = axis in ("pos", "query", "key") and count == scene.n_tokens
            named = self.row_labels(scene)[at] if axis == down else str(at)
            return axis_words(axis), token_label(scene.tokens, at) if tokens else named

        return [each for each in (said(down, row, rows), said(across, column, columns)) if each[0]]

    def facts(self, scene: Scene) -> list[str]:
        quantity, stored = self.quantity(scene), self._stored(scene)
        layer = scene.layer or {}
        facts = (
            ["the whole model"]
            if quantity.layer is None
            else [f"layer {quantity.layer} ({kind_words(str(layer.get('kind')))})"]
        )
        if len(stored) > 1:
            facts.append(f"{axis_words(quantity.axes[0])} {self._which(scene)}")
        low, high = float(np.nanmin(stored, initial=np.inf)), float(np.nanmax(stored, initial=-np.inf))
        if low <= high:
            facts.append(f"from {number(low)} to {number(high)}")
        down, across = self.binning(scene)
        if max(down, across) > 1:
            facts.append(f"one picture cell = up to {down} × {across} values, drawn by {POOLINGS[scene.view.pooling]}")
        return [*facts, *quantity.notes, scale_words(scene.view.scale)]

    def summary(self, scene: Scene) -> str:
        quantity = self.quantity(scene)
        values = self.values(scene)
        if not np.isfinite(values).any():
            return f"{quantity.label}: no cell has a value."
        row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
        where = ", ".join(" ".join(each) for each in self.place(scene, int(row), int(column)))
        return f"{quantity.label}: the largest value is {number(float(values[row, column]))}, at {where}."

    def snippet_body(self, scene: Scene) -> str:
        quantity = self.quantity(scene)
        flat = len(scene.opened().array(quantity.array).shape) == 2
        words = ", ".join(axis_words(axis) for axis in quantity.axes[1:] if axis_words(axis))
        return f'values = run.array("{quantity.array}"){"" if flat else f"[{self._which(scene)}]"}  # {words}'


PANELS = tuple(QuantityPanel(place) for place in range(MOST_PANELS))
