"""The memory over the whole text: a vector state token by token, and what the state still answers (the retention matrix)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, number, picture, token_label
from app.figures.state import vector_raster
from app.panels.attention_rows import head_words
from app.panels.base import NothingToShow, PicturePanel, Span, scale_words
from app.panels.state import asked, axes_of, check_state, slot_facts
from app.panels.words import row_and_column
from app.services import Scene
from app.theme import Theme
from workbench.lab.factors import FactorError
from workbench.lab.pooling import pool

SAMPLED = 256
"""Tokens and times that a picture of a longer text is drawn from, evenly spaced."""


class VectorOverTime(PicturePanel):
    """A state that is a vector, after every token at once."""

    id = "state-over-time"
    title = "What the memory holds"
    words = "The state after every token, one column each. Click to move to that time."
    depends = ("run", "layer", "slot", "head", "pooling", "scale")
    height = 300

    def _whole(self, scene: Scene) -> np.ndarray:
        check_state(self, scene)
        if len(axes_of(scene)) > 1:
            raise NothingToShow(
                "A matrix is shown one token at a time", "Only vectors fit beside each other; move the slider."
            )
        factors, head = scene.state_factors(), scene.view.head

        def entries() -> np.ndarray:
            size = len(factors.state(head, int(factors.state_positions()[-1])))
            return np.stack([factors.state_entry(head, row, 0) for row in range(size)])

        return scene.once("vector", scene.view.layer, scene.view.slot, head, make=entries)

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self._whole(scene).shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self._whole(scene)[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self._whole(scene), size, size, scene.view.pooling)

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        scale = scene.view.scale
        limit = 1.0 if scale == "row" else float(np.nanmax(np.abs(self._whole(scene))))
        return Colours(theme.table_name(True), limit, scale, True, "entry")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        size, _ = self.shape(scene)
        axis = row_and_column(axes_of(scene))[0] or "number"
        return vector_raster(
            self.address(scene, theme), scene.tokens, axis, size, self.colours(scene, theme), theme, panel=self.id
        )

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [*((axis, str(row)) for axis in axes_of(scene)), ("after", token_label(scene.tokens, column))]

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), *slot_facts(scene), scale_words(scene.view.scale)]

    def snippet_body(self, scene: Scene) -> str:
        head, (size, _) = scene.view.head, self.shape(scene)
        return f"values = np.stack([{asked(scene)}.state_entry({head}, row, 0) for row in range({size})])  # entry, pos"


def _some(places: np.ndarray) -> np.ndarray:
    return places[np.unique(np.linspace(0, len(places) - 1, min(SAMPLED, len(places))).round().astype(int))]


class RetentionMatrix(PicturePanel):
    """Cosine between what the state after one token answers to the key of another, and that token's value."""

    id = "retention"
    title = "What it still remembers"
    words = (
        "Row: the state after that token. Column: the token whose key it is asked for. The colour is the cosine between the answer and "
        "the token's value: 1 is remembered, 0 forgotten. Click to move to that time."
    )
    depends = ("run", "layer", "head", "scale")
    height = 300

    def shape(self, scene: Scene) -> tuple[int, int]:
        check_state(self, scene)
        try:
            self.pooled(scene, SAMPLED)
        except FactorError as reason:
            raise NothingToShow(
                "It cannot be asked for a key", f"{str(reason)[:1].upper()}{str(reason)[1:]}."
            ) from None
        return scene.n_tokens, scene.n_tokens

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return scene.factors().retention(scene.view.head, slice(*rows), slice(*columns))

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        """Every pair of a short text, evenly spaced ones of a longer text."""

        def sampled() -> np.ndarray:
            factors = scene.factors()
            return factors.retention(
                scene.view.head, _some(factors.state_positions()), _some(np.arange(scene.n_tokens))
            )

        return scene.once("retention", scene.view.layer, scene.view.head, make=sampled)

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(True), 1.0, scene.view.scale, True, "cosine")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        self.shape(scene)  # says why there is nothing to draw, before the picture is asked for
        tokens, length = scene.tokens, scene.n_tokens
        x, y = Axis("asked for token", length, "token", tokens), Axis("state after token", length, "position", tokens)
        whole, colours = (0, length), self.colours(scene, theme)
        return picture(
            self.address(scene, theme), x, y, whole, whole, colours, theme, panel=self.id, meta={"click": "after"}
        )

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("after", token_label(scene.tokens, row)), ("asked for", token_label(scene.tokens, column))]

    def facts(self, scene: Scene) -> list[str]:
        facts = [*head_words(scene), scale_words(scene.view.scale)]
        if scene.n_tokens > SAMPLED:
            facts.append(
                f"drawn from {SAMPLED} × {SAMPLED} of {scene.n_tokens} × {scene.n_tokens} pairs; readings are exact"
            )
        return facts

    def summary(self, scene: Scene) -> str:
        last = np.nanmean(self.pooled(scene, SAMPLED)[-1])
        return f"After the last token, the mean cosine over the whole text is {number(float(last))}."

    def snippet_body(self, scene: Scene) -> str:
        return f"values = factors.retention({scene.view.head})  # state after, asked for"


PANELS = (VectorOverTime(), RetentionMatrix())
