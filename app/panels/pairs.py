"""Two runs side by side: their tokens aligned in parts, their heads matched, their patterns brought to the same axes.

A part is a token of both runs, a group of several that stand for the same letters, or a token that only one run has. A pattern between
parts adds the weights of a part's tokens as sources and averages its tokens as readers, so that a row keeps its sum (Clark et al. 2019,
"What Does BERT Look At?", do the same for split words).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.panels.base import NothingToShow, Span
from app.panels.words import kind_words
from app.services import LeastRecentlyUsed, Scene, reads_source
from app.view_state import MATCHES
from workbench.lab.alignment import Alignment, TokenText, align
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.row_statistics import row_statistics
from workbench.lab.runs import Run

Head = tuple[int, int]
"""(layer, head)."""
SIDES = ("A", "B")
MATCHED_PARTS = 128
"""Aligned parts, the first of the text, whose patterns are compared to find heads that are alike."""


@dataclass(frozen=True)
class Pair:
    """Two traces, A (`runs[0]`) and B."""

    runs: tuple[Run, Run]
    alignment: Alignment
    cache: LeastRecentlyUsed = field(repr=False)

    @classmethod
    def of(cls, scene: Scene) -> Pair:
        """The open run and the one that the address compares it with. NothingToShow where there are no two."""
        first, second = scene.opened(), scene.other
        if second is None:
            if scene.other_problem:
                raise NothingToShow("Run B is not here", f"{scene.other_problem[:1].upper()}{scene.other_problem[1:]}")
            raise NothingToShow("One run is no comparison", "Choose a second run under “B” above.")
        key = ("value", first.id, second.id, "alignment")
        try:
            found = scene.cache.get(key, lambda: align(TokenText.of(first.manifest), TokenText.of(second.manifest)))
        except ValueError as error:
            raise NothingToShow("These runs cannot be aligned", f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
        return cls((first, second), found, scene.cache)

    def __len__(self) -> int:
        """Number of parts."""
        return len(self.alignment.parts)

    def once(self, *key: Any, make: Any) -> Any:
        """A value that both runs and `key` determine, computed once."""
        return self.cache.get(("value", self.runs[0].id, self.runs[1].id, *key), make)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def texts(self, side: int) -> list[str]:
        """The text of every part on one side, "" where it has no token there."""
        labels = self.runs[side].manifest["tokens"]["strings"]
        return ["".join(labels[start:stop]) for start, stop in self.alignment.tokens(side).tolist()]

    def labels(self) -> list[str]:
        """The text of every part, of A where A has it."""
        return self.once("labels", make=lambda: [a or b for a, b in zip(self.texts(0), self.texts(1), strict=True)])

    def axis_tokens(self) -> list[int] | None:
        """For the page: the first token of A in each part, a negative number where only B has one; None where parts are A's tokens."""
        first = self.alignment.tokens(0)
        if (first[:, 1] - first[:, 0] == 1).all():
            return None
        return [start if stop > start else -(place + 2) for place, (start, stop) in enumerate(first.tolist())]

    def part_of(self, token: int) -> int:
        """The part of a token of A."""
        first = self.alignment.tokens(0)
        return int(np.flatnonzero((first[:, 0] <= token) & (token < first[:, 1]))[0])

    # ---- heads ------------------------------------------------------------------------------------------------------

    def heads(self, side: int) -> list[Head]:
        """All heads of layers that have a whole pattern."""
        return [
            (layer["layer"], head)
            for layer in self.runs[side].layers
            if layer.get("form") is not None and not reads_source(layer)
            for head in range(layer["n_heads"])
        ]

    def matched(self, head: Head, how: str) -> Head:
        """The head of B beside a head of A: the same number (the nearest there is), the most alike, or "layer.head"."""
        others = self.heads(1)
        if not others:
            raise NothingToShow("Run B has no token-to-token maps", "None of its layers stores a pattern.")
        if how == "pattern":
            mine = self.heads(0)
            if head not in mine:
                raise NothingToShow("This head has no map", "Choose a layer of A that has a token-to-token map.")
            line = self.likeness()[mine.index(head)]
            return others[int(np.nanargmax(np.where(np.isnan(line), -np.inf, line)))]
        if how != "index":
            layer, number = map(int, how.split("."))
            if (layer, number) not in others:
                raise NothingToShow(
                    "Run B has no such head", f"Its layers are 0 to {others[-1][0]}; head {how} is not there."
                )
            return layer, number
        layer = min((one for one, _ in others), key=lambda one: abs(one - head[0]))
        return layer, min(head[1], max(number for one, number in others if one == layer))

    def likeness(self) -> np.ndarray:
        """Cosine between the patterns of every head of A and every head of B over the same parts: float64 [head of A, head of B].

        Every row is divided by its Σ|α| first, with its sign: effective patterns may have rows of very different sizes.
        """
        return self.once("likeness", make=self._likeness)

    def _likeness(self) -> np.ndarray:
        places = np.flatnonzero(self.alignment.aligned)[:MATCHED_PARTS]
        if len(places) < 2:
            raise NothingToShow("Nothing to compare", "Fewer than two parts of the texts align.")
        span = (0, int(places[-1]) + 1)
        sides = []
        for side in (0, 1):
            maps = []
            for layer, head in self.heads(side):
                try:
                    block = _by_row(self.block(side, (layer, head), span, span)[np.ix_(places, places)]).ravel()
                except FactorError:
                    block = np.full(len(places) ** 2, np.nan)  # only some of its rows are stored
                maps.append(block)
            sides.append(np.stack(maps).astype(np.float64))
        norms = [np.linalg.norm(each, axis=1) for each in sides]
        with np.errstate(invalid="ignore", divide="ignore"):
            return sides[0] @ sides[1].T / np.outer(*norms)

    def scores(self, side: int, statistic: str) -> dict[Head, float]:
        """Mean of a statistic of rows (a key of `HEAD_SCORES`) for every head; nan where a layer stores no whole pattern."""
        run = self.runs[side]
        every = self.cache.get(("value", run.id, "row-statistics"), lambda: self._scores(side))
        return {head: found[statistic] for head, found in every.items()}

    def _scores(self, side: int) -> dict[Head, dict[str, float]]:
        found = {}
        for layer, head in self.heads(side):
            try:
                rows = row_statistics(self.factors(side, layer), head)
            except FactorError:
                rows = {name: np.full(1, np.nan) for name in ("distance", "entropy", "first", "previous", "itself")}
            found[layer, head] = {name: _mean(values) for name, values in rows.items()}
        return found

    # ---- patterns ---------------------------------------------------------------------------------------------------

    def factors(self, side: int, layer: int) -> LayerFactors:
        """The factors of a layer of A or B. NothingToShow where it has no pattern."""
        run = self.runs[side]
        record = run.layer(layer)
        if record.get("form") is None:
            name = kind_words(record["kind"])
            raise NothingToShow(
                f"This layer of {SIDES[side]} has no token-to-token map", f"A {name} layer is not linear in its values."
            )
        if reads_source(record):
            raise NothingToShow(
                f"This layer of {SIDES[side]} reads another text",
                "Its columns are the source's tokens, which are not aligned. Choose another layer.",
            )
        return self.cache.get(("factors", run.id, layer), lambda: LayerFactors.from_run(run, layer))

    def block(self, side: int, head: Head, rows: Span, columns: Span, shares: bool = False) -> np.ndarray:
        """The pattern of a head between parts `rows` and `columns`: [part, part], nan where nothing is visible or one side has no token.

        `shares`: of |α| divided by the sum of its row, instead of α.
        """
        factors = self.factors(side, head[0])
        tokens = self.alignment.tokens(side)
        ranges = [tokens[slice(*span)] for span in (rows, columns)]
        present = [each[:, 1] > each[:, 0] for each in ranges]
        if not (present[0].any() and present[1].any()):
            return np.full((rows[1] - rows[0], columns[1] - columns[0]), np.nan, dtype=np.float32)
        down, across = (
            slice(int(each[on, 0].min()), int(each[on, 1].max())) for each, on in zip(ranges, present, strict=True)
        )
        tile = factors.pattern(head[1], down, across)
        seen = factors.visible(down, across)
        if shares:
            tile = np.abs(tile) / self._row_totals(side, head, down)[:, None]
        if self.alignment.identical:
            return np.where(seen, tile, np.float32(np.nan))
        counts = _between(_between(seen.astype(np.float64), ranges[1] - across.start, 1), ranges[0] - down.start, 0)
        sums = _between(_between(tile.astype(np.float64), ranges[1] - across.start, 1), ranges[0] - down.start, 0)
        readers = np.maximum(ranges[0][:, 1] - ranges[0][:, 0], 1)[:, None]
        return np.where(counts > 0, sums / readers, np.nan)

    def _row_totals(self, side: int, head: Head, rows: slice) -> np.ndarray:
        """Σ|α| of each row, nan where it is 0."""
        factors = self.factors(side, head[0])

        def measure() -> np.ndarray:
            starts = range(0, factors.length, 512)
            totals = [
                np.abs(factors.pattern(head[1], slice(at, min(at + 512, factors.length)))).sum(1, dtype=np.float64)
                for at in starts
            ]
            return np.concatenate(totals)

        totals = self.cache.get(("value", self.runs[side].id, "row-totals", *head), measure)[rows]
        return np.where(totals > 0, totals, np.nan)


def _between(values: np.ndarray, ranges: np.ndarray, axis: int) -> np.ndarray:
    """Sums over ranges (start, stop) of an axis; 0 for an empty one."""
    before = np.concatenate([np.zeros_like(values.take([0], axis)), values.cumsum(axis)], axis)
    stops, starts = (before.take(np.clip(ranges[:, end], 0, values.shape[axis]), axis) for end in (1, 0))
    empty = (ranges[:, 1] <= ranges[:, 0]).reshape((-1, 1) if axis == 0 else (1, -1))
    return np.where(empty, 0, stops - starts)


def _by_row(block: np.ndarray) -> np.ndarray:
    """Rows divided by the sum of their magnitudes; what is not visible, and a row of zeros, becomes 0."""
    known = np.nan_to_num(block.astype(np.float64))
    totals = np.abs(known).sum(axis=1, keepdims=True)
    return known / np.where(totals > 0, totals, 1.0)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def match_words(how: str, head: Head) -> str:
    """How the head of B was found, in words."""
    name = f"B: layer {head[0]}, head {head[1]}"
    return f"{name} ({MATCHES[how]})" if how in MATCHES else name
