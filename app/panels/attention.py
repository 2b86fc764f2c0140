"""Panels of the attention page. Softmax and effective patterns go through the same panels; what differs is said in words."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.attention import attention_map, head_mosaic
from app.figures.common import Colours, number, token_label
from app.panels.attention_rows import OffsetProfile, QueryRow, Received, RowProfile, check_pattern, head_words
from app.panels.base import (
    ImagePanel,
    NothingToShow,
    PicturePanel,
    Reading,
    Span,
    TooLarge,
    scale_words,
)
from app.panels.scores import cell_scores, check_map, labels_of, score_maps, stores_scores, sum_words
from app.panels.words import cell_word, is_signed, kind_words
from app.render import mosaic, to_levels, to_png, visible_bins
from app.services import Scene, reads_source
from app.theme import Theme
from app.view_state import POOLINGS
from workbench.lab.pooling import bin_edges, pool

DRAWN_CELLS = 2**25
"""A larger part of a map is drawn from the pooled overview that the run stores: drawing it anew takes many seconds."""
DRAWN_SCORES = 2**23
"""A larger part of a map of scores is not drawn: no overview of scores is stored."""
TILE = 96


class HeadMosaic(ImagePanel):
    """All heads of all layers at a glance."""

    id = "heads"
    title = "All heads"
    words = "One small map per head. Each is coloured by its own largest weight. Click one to open it."
    depends = ("run", "part")
    height = 420

    def _overviews(self, scene: Scene) -> list[np.ndarray | None]:
        run = scene.opened()
        names = [f"overview.{index}" for index in range(len(scene.layers))]
        return [run.array(name) if run.has(name) else None for name in names]

    def shape(self, scene: Scene) -> tuple[int, int]:
        self.check(scene)
        if not scene.layers or all(overview is None for overview in self._overviews(scene)):
            raise NothingToShow("No token-to-token maps in this run", "None of its layers stores a pattern.")
        return len(scene.layers), max(scene.heads_per_layer)

    def _masked(self, scene: Scene, index: int, tiles: np.ndarray) -> np.ndarray:
        layer, total = scene.layers[index], (0, scene.n_tokens)
        read = (0, layer.get("n_columns") or scene.n_tokens)
        seen = visible_bins(total, read, *tiles.shape[1:], causal=(layer.get("pattern") or {}).get("causal", True),
                            strict=bool(layer.get("strict")), window=layer.get("window"))  # fmt: skip
        return np.where(seen, tiles, np.nan)

    def values(self, scene: Scene) -> np.ndarray:
        self.shape(scene)
        lines = [np.hstack(list(tiles)) for tiles in self._overviews(scene) if tiles is not None]
        widest = max(line.shape[1] for line in lines)
        return np.vstack(
            [np.pad(line, ((0, 0), (0, widest - line.shape[1])), constant_values=np.nan) for line in lines]
        )

    def snippet_body(self, scene: Scene) -> str:
        layers = [index for index, tiles in enumerate(self._overviews(scene)) if tiles is not None]
        return f"""
# pooled maps of every head, one line per layer, side by side
lines = [np.hstack(list(run.array(f"overview.{{layer}}"))) for layer in {layers}]
widest = max(line.shape[1] for line in lines)
missing = [((0, 0), (0, widest - line.shape[1])) for line in lines]
values = np.vstack([np.pad(line, gap, constant_values=np.nan) for line, gap in zip(lines, missing)])
"""

    def picture(self, scene: Scene, theme: Theme, size: int) -> bytes:
        self.shape(scene)
        signed = any(is_signed(layer) for layer in scene.layers)
        lines = []
        for index, tiles in enumerate(self._overviews(scene)):
            line = []
            for tile in self._masked(scene, index, tiles) if tiles is not None else ():
                limit = float(np.nanmax(np.abs(tile), initial=0.0)) or 1.0
                line.append(to_levels(tile, limit, "sqrt", signed))
            lines.append(line)
        heads = max(scene.heads_per_layer)
        tile_size = max(12, min(TILE, 2048 // max(len(lines), heads)))
        return to_png(mosaic(lines, tile_size), theme.table_name(signed))

    def aspect(self, scene: Scene) -> float | None:
        rows, columns = self.shape(scene)
        return (columns + 0.4) / (rows + 0.4)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        self.shape(scene)
        return head_mosaic(self.address(scene, theme), scene.heads_per_layer, theme, panel=self.id)

    def reading(self, scene: Scene, row: int, column: int) -> Reading:
        rows, _ = self.shape(scene)
        overview = self._overviews(scene)[row] if 0 <= row < rows else None
        if overview is None or not 0 <= column < len(overview):
            raise IndexError(f"there is no head {column} in layer {row}")
        strongest = overview[column].ravel()[np.argmax(np.abs(overview[column]))]
        name = kind_words(scene.layers[row]["kind"])
        return Reading(float(strongest), [("largest weight of", f"layer {row} ({name}), head {column}")])

    def facts(self, scene: Scene) -> list[str]:
        return [
            "pooled: largest magnitude, sign kept",
            "each head coloured by its own largest, square-root colour scale",
        ]

    def summary(self, scene: Scene) -> str:
        rows, columns = self.shape(scene)
        return f"Small attention maps of {rows} layers with up to {columns} heads."


class AttentionMap(PicturePanel):
    """One head's pattern."""

    id = "pattern"
    title = "Who reads from whom"
    words = "Row = token that reads (query). Column = token that is read (key). Drag to zoom, click to pin a cell."
    depends = ("run", "part", "layer", "head", "score_map", "rows", "columns", "pooling", "scale")
    height = 880
    zoom = ("rows", "cols")

    def explanation(self, scene: Scene) -> str:
        if not reads_source(scene.layer):
            return self.words
        return "Row = token that reads (query). Column = token of the source that is read (key). Drag to zoom, click to pin a row."

    def aspect(self, scene: Scene) -> float | None:
        if not reads_source(scene.layer):
            return 1.0
        (top, bottom), (left, right) = self.spans(scene)
        return min(max((right - left) / (bottom - top), 0.5), 2.0)

    def shape(self, scene: Scene) -> tuple[int, int]:
        self.check(scene)
        factors = check_pattern(scene)
        if scene.view.score_map:
            check_map(scene, scene.view.score_map)
        return factors.length, factors.columns

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        rows, columns = self.shape(scene)
        return scene.view.rows or (0, rows), scene.view.columns or (0, columns)

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        head, (queries, keys) = scene.view.head, (slice(*rows), slice(*columns))
        if scene.view.score_map:
            return score_maps(scene).tile(scene.view.score_map, head, queries, keys)
        part = scene.factors().pattern(head, queries, keys)
        return np.where(self._seen(scene, rows, columns, part), part, np.float32(np.nan))

    def _seen(self, scene: Scene, rows: Span, columns: Span, part: np.ndarray) -> np.ndarray:
        """Which cells a row can see: where scores are stored they tell every mask, also one that is no window."""
        queries, keys = slice(*rows), slice(*columns)
        seen = scene.factors().visible(queries, keys)
        if not stores_scores(scene):
            return seen
        return seen & (score_maps(scene).scored(scene.view.head, queries, keys) | (part != 0))

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        rows, columns = self.spans(scene)
        view = scene.view
        key = ("pattern", view.layer, view.head, view.score_map, rows, columns, view.pooling, size)
        return scene.once(*key, make=lambda: self._pool(scene, rows, columns, size))

    def _pool(self, scene: Scene, rows: Span, columns: Span, size: int) -> np.ndarray:
        factors, view = scene.factors(), scene.view
        if view.score_map:
            self._check_size(scene)
            return score_maps(scene).overview(
                view.score_map, view.head, size, slice(*rows), slice(*columns), view.pooling
            )
        if self._coarse(scene):
            stored = scene.opened().array(f"overview.{view.layer}")[view.head]
            rows, columns = self.extents(scene)
            bins = [
                slice(*np.searchsorted(edges, span).tolist())
                for edges, span in zip(self._edges(scene), (rows, columns), strict=True)
            ]
            pooled = stored[bins[0], bins[1]]
        else:
            pooled = factors.overview(view.head, size, slice(*rows), slice(*columns), view.pooling)
        seen = visible_bins(
            rows, columns, *pooled.shape, causal=factors.causal, strict=factors.strict, window=factors.window
        )
        if stores_scores(scene):
            some = pool(np.isfinite(self.block(scene, rows, columns)).astype(np.float32), *pooled.shape)
            seen = some > 0
        return np.where(seen, pooled, np.nan)

    def extents(self, scene: Scene) -> tuple[Span, Span]:
        spans = self.spans(scene)
        if not self._coarse(scene):
            return spans
        # The stored bins that the part in view touches; they may reach a little beyond it.
        first, last = (
            [int(edges[np.searchsorted(edges, a, side="right") - 1]), int(edges[np.searchsorted(edges, b)])]
            for edges, (a, b) in zip(self._edges(scene), spans, strict=True)
        )
        return (first[0], first[1]), (last[0], last[1])

    def _edges(self, scene: Scene) -> list[np.ndarray]:
        """Where the bins of the stored overview begin, of rows and of columns."""
        bins = scene.opened().array(f"overview.{scene.view.layer}").shape[1:]
        return [bin_edges(size, count) for size, count in zip(self.shape(scene), bins, strict=True)]

    def _coarse(self, scene: Scene) -> bool:
        """Whether the picture is made of the overview that the run stores. TooLarge when that overview cannot show it."""
        if scene.view.score_map:
            return False
        (top, bottom), (left, right) = self.spans(scene)
        stored = scene.opened().has(f"overview.{scene.view.layer}")
        if not scene.factors().whole:
            if not stored:
                raise NothingToShow("The map is not stored", " ".join((scene.layer or {}).get("not_stored") or []))
            if scene.view.pooling != "max":
                raise TooLarge(
                    f"Of this map only the overview pooled by {POOLINGS['max']} is stored: choose that pooling."
                )
            return True
        if (bottom - top) * (right - left) <= DRAWN_CELLS or not stored:
            return False
        if scene.view.pooling != "max":
            raise TooLarge(f"The {scene.view.pooling} of {bottom - top} × {right - left} token pairs takes too long to draw while you "
                           "wait: zoom in, or choose the pooling “largest magnitude”.")  # fmt: skip
        return True

    def _check_size(self, scene: Scene) -> None:
        (top, bottom), (left, right) = self.spans(scene)
        if (bottom - top) * (right - left) > DRAWN_SCORES:
            raise TooLarge(
                f"The scores of {bottom - top} × {right - left} token pairs take too long to draw while you wait: zoom in."
            )

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        view, layer = scene.view, scene.layer or {}
        if view.score_map:
            limit = (
                1.0 if view.scale == "row" else float(np.nanmax(np.abs(self.pooled(scene, scene.pixels)), initial=0.0))
            )
            return Colours(theme.table_name(True), limit, view.scale, True, f"{labels_of(scene)[view.score_map]}, nats")
        signed, name = is_signed(layer), f"overview.{view.layer}"
        if view.scale == "row":
            limit = 1.0
        elif view.pooling == "max" and scene.opened().has(name):
            # The stored overview is pooled by magnitude, so its largest is the head's largest: every zoom has one scale.
            limit = float(np.abs(scene.opened().array(name)[view.head]).max())
        else:
            limit = float(np.nanmax(np.abs(self.pooled(scene, scene.pixels)), initial=0.0))
        return Colours(theme.table_name(signed), limit, view.scale, signed, cell_word(layer))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.spans(scene)
        figure = attention_map(
            self.address(scene, theme), scene.tokens, rows, columns, self.colours(scene, theme), theme, panel=self.id,
            read=scene.source_tokens if reads_source(scene.layer) else None,
        )  # fmt: skip
        (top, bottom), (left, right) = self.extents(scene)
        figure.layout.images[0].update(x=left, y=top, sizex=right - left, sizey=bottom - top)
        return figure

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        seen = np.isfinite(self.block(scene, (row, row + 1), (column, column + 1))[0, 0])
        words = [("reads", token_label(scene.tokens, row)), ("from", token_label(scene.read_tokens, column))]
        if not seen:
            return [*words, ("", "this token cannot see that one")]
        weight = (
            [("weight", number(scene.factors().value(scene.view.head, row, column)))] if scene.view.score_map else []
        )
        return [*words, *weight, *cell_scores(scene, row, column)]

    def facts(self, scene: Scene) -> list[str]:
        facts = [*head_words(scene), *([sum_words(scene)] if scene.view.score_map and sum_words(scene) else [])]
        down, across = self.binning(scene)
        if self._coarse(scene):
            side = max(int(np.diff(edges).max()) for edges in self._edges(scene))
            more = "zoom in for more" if scene.factors().whole else "more is not stored"
            facts.append(f"coarse: one picture cell = up to {side} × {side} tokens, drawn by {POOLINGS['max']}; {more}")
        elif max(down, across) > 1:
            facts.append(f"one picture cell = up to {down} × {across} tokens, drawn by {POOLINGS[scene.view.pooling]}")
        else:
            facts.append("one picture cell = one token pair, not pooled")
        return [*facts, scale_words(scene.view.scale), "grey = not visible to the reading token"]

    def snippet_body(self, scene: Scene) -> str:
        (r0, r1), (c0, c1) = self.spans(scene)
        if scene.view.score_map:
            return f"""
from workbench.lab.score_maps import ScoreMaps
maps = ScoreMaps.from_run(run, {scene.view.layer})
values = maps.tile("{scene.view.score_map}", {scene.view.head}, slice({r0}, {r1}), slice({c0}, {c1}))  # query, key
"""
        head, before, more = scene.view.head, "", ""
        if stores_scores(scene):
            before = "from workbench.lab.score_maps import ScoreMaps\n"
            more = f"""visible &= ScoreMaps.from_run(run, {scene.view.layer}).scored({head}, rows, columns) | (weights != 0)\n"""
        return f"""
{before}rows, columns = slice({r0}, {r1}), slice({c0}, {c1})
weights = factors.pattern({head}, rows, columns)  # query, key
visible = factors.visible(rows, columns)
{more}values = np.where(visible, weights, np.float32(np.nan))
"""

    def summary(self, scene: Scene) -> str:
        if scene.view.score_map:
            what = labels_of(scene)[scene.view.score_map]
            return (
                f"Map of the {what} of head {scene.view.head} of layer {scene.view.layer}, before they become weights."
            )
        received = self._received(scene)
        if received is None:
            return f"Map of head {scene.view.head} of layer {scene.view.layer}."
        top = int(np.nanargmax(received))
        return (f"Map of head {scene.view.head} of layer {scene.view.layer}. The token that gets most is "
                f"{token_label(scene.read_tokens, top)}, with a mean weight of {number(received[top])}.")  # fmt: skip

    def _received(self, scene: Scene) -> np.ndarray | None:
        run, name = scene.opened(), f"received.{scene.view.layer}"
        return run.array(name)[scene.view.head] if run.has(name) else None


PANELS = (HeadMosaic(), AttentionMap(), QueryRow(), Received(), RowProfile(), OffsetProfile())
