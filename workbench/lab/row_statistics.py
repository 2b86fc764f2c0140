"""What a head does with its rows, in a few numbers: how far it reads, how spread, how much on the first, the previous, the same token.

    row_statistics(LayerFactors.from_run(run, 1), head=0)["distance"]        float64 [row], in tokens

Rows are taken as shares, |α| / Σ|α|, so that signed effective patterns are measured like attention (as `probes.heads` does). A row that
reads nothing has nan. numpy only; in tiles, so that a long text needs no tokens × tokens array.
"""

from __future__ import annotations

import numpy as np

from workbench.lab.pattern_factors import TILE_ROWS, FactorError, PatternFactors

STATISTICS = ("distance", "entropy", "first", "previous", "itself")
MOST_ROWS = 1_024
"""Rows that are measured; of a longer text so many, evenly spaced."""


def row_statistics(factors: PatternFactors, head: int, most: int = MOST_ROWS) -> dict[str, np.ndarray]:
    """`{statistic: float64 [row]}` of a head's rows, all but the first, which has no choice; `rows_of` says which.

    distance: mean |query − key| in tokens. entropy: nats. first, previous, itself: share on token 0, on the token before, on its own.
    FactorError for a layer that stores less than whole rows.
    """
    rows = rows_of(factors, most)
    found = {name: np.full(len(rows), np.nan) for name in STATISTICS}
    keys = np.arange(factors.length)
    for start in range(0, len(rows), TILE_ROWS):
        block = slice(start, start + TILE_ROWS)
        some = rows[block]
        share = np.abs(factors.pattern(head, some).astype(np.float64))
        total = share.sum(axis=1, keepdims=True)
        share /= np.where(total > 0, total, np.nan)
        within = np.arange(len(some))
        logs = np.log(share, out=np.zeros_like(share), where=share > 0)
        found["distance"][block] = (share * np.abs(some[:, None] - keys[None, :])).sum(axis=1)
        found["entropy"][block] = -(share * logs).sum(axis=1)
        found["first"][block] = share[:, 0]
        found["previous"][block] = share[within, some - 1]
        found["itself"][block] = share[within, some]
    return found


def rows_of(factors: PatternFactors, most: int = MOST_ROWS) -> np.ndarray:
    """The rows that are measured: all but the first, or `most` evenly spaced ones."""
    if not factors.whole:
        raise FactorError(
            f"layer {factors.index} ({factors.kind}) stores only some rows of its pattern, so its heads are not measured"
        )
    if factors.reads_source:
        raise FactorError(
            f"layer {factors.index} ({factors.kind}) reads another text, in which no token is the reader's own or the one before it"
        )
    every = np.arange(1, factors.length)
    if len(every) <= most:
        return every
    return np.unique(np.linspace(1, factors.length - 1, most).round().astype(np.int64))
