"""Panels of the Compare page: the patterns of two runs on the same axes, and their difference."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture, visible_text
from app.panels.base import FigurePanel, PicturePanel, Span, TooLarge, scale_words
from app.panels.pairs import SIDES, Head, Pair, match_words
from app.panels.words import cell_word, is_signed, kind_words
from app.services import Scene
from app.theme import Theme
from app.view_state import clamp_span
from workbench.lab.pooling import pool
from workbench.lab.runs import Run

DRAWN_CELLS = 2**23
"""A larger part of a map takes too long to draw while the reader waits."""


class PairPanel(FigurePanel):
    """A panel over the open run (A) and run B."""

    depends: tuple[str, ...] = ("run", "run_b")

    def check(self, scene: Scene) -> None:
        super().check(scene)
        Pair.of(scene)

    def pair(self, scene: Scene) -> Pair:
        self.check(scene)
        return Pair.of(scene)

    def names(self, scene: Scene) -> tuple[str, str]:
        """`A: gpt-english` and `B: retnet-english`."""
        first, second = (str(run.model.get("name") or run.title) for run in self.pair(scene).runs)
        return f"A: {first}", f"B: {second}"

    def opening(self, scene: Scene) -> str:
        """Python that aligns the two runs, to put before `values`."""
        return f"""
from app.panels.pairs import Pair
from app.services import LeastRecentlyUsed
from workbench.lab.alignment import TokenText, align

other = RunStore().open("{scene.view.run_b}")
pair = Pair((run, other), align(TokenText.of(run.manifest), TokenText.of(other.manifest)), LeastRecentlyUsed(96))
""".strip()

    def axis_meta(self, scene: Scene, role: str, origin: float) -> dict:
        """The meta of an axis of parts: hovering and pinning go by tokens of A."""
        pair = self.pair(scene)
        tokens = pair.axis_tokens()
        return {"role": role, "origin": origin, "size": len(pair), **({"tokens": tokens} if tokens is not None else {})}


class SharedMap(PairPanel, PicturePanel):
    """One head's pattern between the parts of both texts."""

    depends = ("run", "run_b", "layer", "head", "head_b", "shared_rows", "shared_columns", "scale")
    words = "Row = reads, column = is read. All three maps share their axes, zoom and pointer; grey: not visible, or not in this text."
    height = 560
    side = 0
    zoom = ("urows", "ucols")

    def heads(self, scene: Scene) -> tuple[Head, Head]:
        mine = (scene.view.layer, scene.view.head)
        return mine, self.pair(scene).matched(mine, scene.view.head_b)

    def aspect(self, scene: Scene) -> float | None:
        return 1.0

    def shape(self, scene: Scene) -> tuple[int, int]:
        size = len(self.pair(scene))
        return size, size

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        size, _ = self.shape(scene)
        whole = (0, size)
        rows, columns = (
            clamp_span(span, size) or whole for span in (scene.view.shared_rows, scene.view.shared_columns)
        )
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self.pair(scene).block(self.side, self.heads(scene)[self.side], rows, columns)

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        (top, bottom), (left, right) = self.spans(scene)
        if (bottom - top) * (right - left) > DRAWN_CELLS:
            raise TooLarge(
                f"{bottom - top} × {right - left} pairs of tokens take too long to draw while you wait: zoom in."
            )
        key = (self.id, *self.heads(scene), (top, bottom), (left, right), size)
        return self.pair(scene).once(
            *key, make=lambda: pool(self.block(scene, (top, bottom), (left, right)), size, size, "max")
        )

    def record(self, scene: Scene, side: int) -> dict:
        return self.pair(scene).runs[side].layer(self.heads(scene)[side][0])

    def same_scale(self, scene: Scene) -> bool:
        """Whether both maps hold shares that sum to 1, so that one colour means one value in both."""
        return all((self.record(scene, side).get("pattern") or {}).get("rows_sum_to") == 1 for side in (0, 1))

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        signed = is_signed(self.record(scene, self.side))
        panels = MAPS[:2] if self.same_scale(scene) else [self]
        limit = max(float(np.nanmax(np.abs(panel.pooled(scene, scene.pixels)), initial=0.0)) for panel in panels)
        return Colours(
            theme.table_name(signed), limit, scene.view.scale, signed, cell_word(self.record(scene, self.side))
        )

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        (rows, columns), labels = self.spans(scene), self.pair(scene).labels()
        return picture(
            self.address(scene, theme), Axis("is read (key)", len(labels), "key", labels),
            Axis("reads (query)", len(labels), "query", labels), columns, rows, self.colours(scene, theme), theme, panel=self.id,
            meta={"click": "pattern", "zoom": {"x": "ucols", "y": "urows"}, "x": self.axis_meta(scene, "key", 0),
                  "y": self.axis_meta(scene, "query", 0)},
        )  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        pair = self.pair(scene)
        return [(words, self.part_words(pair, part)) for words, part in (("reads", row), ("from", column))]

    def part_words(self, pair: Pair, part: int) -> str:
        """`12 ‘cat’`: where a part is in the text of this side, or that it is not there."""
        start, stop = pair.alignment.tokens(self.side)[part].tolist()
        text = visible_text(pair.texts(self.side)[part])
        if start == stop:
            return f"‘{visible_text(pair.labels()[part])}’ is not in {SIDES[self.side]}"
        return f"{start} ‘{text}’" if stop - start == 1 else f"{start}–{stop - 1} ‘{text}’"

    def facts(self, scene: Scene) -> list[str]:
        heads, record = self.heads(scene), self.record(scene, self.side)
        name = match_words(scene.view.head_b, heads[1]) if self.side else f"A: layer {heads[0][0]}, head {heads[0][1]}"
        facts = [
            self.names(scene)[self.side][3:],
            name,
            kind_words(str(record.get("kind"))),
            scale_words(scene.view.scale),
        ]
        if (self.pair(scene).alignment.sizes > 1).any():
            facts.append("of several tokens: sources added, readers averaged")
        if not self.same_scale(scene):
            facts.append("coloured by its own largest")
        down, across = self.binning(scene)
        return (
            [*facts, f"one picture cell = up to {down} × {across}, the largest magnitude"]
            if max(down, across) > 1
            else facts
        )

    def snippet_body(self, scene: Scene) -> str:
        rows, columns = self.spans(scene)
        return f"""
{self.opening(scene)}
values = pair.block({self.side}, {self.heads(scene)[self.side]}, {rows}, {columns})  # query part, key part
"""

    def summary(self, scene: Scene) -> str:
        layer, head = self.heads(scene)[self.side]
        return f"Map of head {head} of layer {layer} of run {SIDES[self.side]}."


class MapA(SharedMap):
    id = "compare-a"
    title = "A: who reads from whom"


class MapB(SharedMap):
    id = "compare-b"
    title = "B: who reads from whom"
    side = 1

    def source(self, scene: Scene) -> Run | None:
        return scene.other


class MapDifference(SharedMap):
    """B − A, of each row's shares."""

    id = "compare-difference"
    title = "B − A, where the texts align"
    words = "Difference of each row's shares |α| / Σ|α|: softmax weights as they are, signed effective weights by magnitude."

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        pair, heads = self.pair(scene), self.heads(scene)
        first, second = (pair.block(side, heads[side], rows, columns, shares=True) for side in (0, 1))
        return second - first

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        limit = float(np.nanmax(np.abs(self.pooled(scene, scene.pixels)), initial=0.0)) or 1.0
        return Colours(theme.table_name(True), limit, scene.view.scale, True, "share of B − share of A")

    def part_words(self, pair: Pair, part: int) -> str:
        return f"‘{visible_text(pair.labels()[part])}’" + (
            "" if pair.alignment.aligned[part] else ", which only one of them has"
        )

    def facts(self, scene: Scene) -> list[str]:
        a, b = self.heads(scene)
        return [f"A: layer {a[0]}, head {a[1]}", match_words(scene.view.head_b, b), scale_words(scene.view.scale),
                self.pair(scene).alignment.in_words().rstrip(".")]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        (rows, columns), (a, b) = self.spans(scene), self.heads(scene)
        return f"""
{self.opening(scene)}
values = pair.block(1, {b}, {rows}, {columns}, shares=True) - pair.block(0, {a}, {rows}, {columns}, shares=True)
"""

    def summary(self, scene: Scene) -> str:
        return "Difference of the two maps where both texts have the tokens."


MAPS = (MapA(), MapB(), MapDifference())
