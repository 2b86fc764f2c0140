"""Shrinking a map to an image without losing what it shows.

A sink or a previous-token diagonal is one cell wide. Averaging, and every browser's own scaling, wipes it out; taking
the largest value keeps it. For maps with negative values the value of largest magnitude is taken, with its sign.

Bin b of `size` bins over `n` cells holds the cells ⌊b·n/size⌋ to ⌊(b+1)·n/size⌋ − 1: every cell is in exactly one
bin, whatever the ratio, and no bin is empty. An image never has more bins than there are cells.
"""

from __future__ import annotations

import numpy as np

KINDS = ("max", "mean", "sum")


def bin_edges(cells: int, bins: int) -> np.ndarray:
    """First cell of each bin and, last, `cells`: int64 [min(bins, cells) + 1]."""
    if cells < 1 or bins < 1:
        raise ValueError(f"pooling {cells} cells into {bins} bins: both must be at least 1")
    bins = min(bins, cells)
    return np.arange(bins + 1, dtype=np.int64) * cells // bins


class StreamingPool:
    """Pools a map of `rows` × `columns` cells that arrives in tiles, to at most `height` × `width` bins.

    `kind`: `"max"` (largest magnitude, sign kept), `"sum"` or `"mean"`. Tiles may come in any order and cut
    bins anywhere, each cell at most once; cells that never come count as 0. nan in a tile makes its bin nan.
    """

    def __init__(self, rows: int, columns: int, height: int, width: int, kind: str = "max"):
        if kind not in KINDS:
            raise ValueError(f"unknown pooling {kind!r}, expected one of {', '.join(KINDS)}")
        self.kind = kind
        self.row_edges = bin_edges(rows, height)
        self.column_edges = bin_edges(columns, width)
        shape = (len(self.row_edges) - 1, len(self.column_edges) - 1)
        # 0 is neutral for all three kinds: no value has a smaller magnitude.
        self._high = np.zeros(shape)
        self._low = np.zeros(shape) if kind == "max" else self._high

    def add(self, row: int, column: int, tile: np.ndarray) -> None:
        """Add the cells `[row : row + tile.shape[0], column : column + tile.shape[1]]`."""
        if tile.ndim != 2 or 0 in tile.shape:
            raise ValueError(f"a tile has two axes and at least one cell, got shape {tile.shape}")
        end_row, end_column = row + tile.shape[0], column + tile.shape[1]
        if row < 0 or column < 0 or end_row > self.row_edges[-1] or end_column > self.column_edges[-1]:
            raise ValueError(
                f"tile [{row}:{end_row}, {column}:{end_column}] lies outside the map of "
                f"{self.row_edges[-1]} × {self.column_edges[-1]} cells"
            )
        row_bins, row_starts = _bins_of(self.row_edges, row, end_row)
        column_bins, column_starts = _bins_of(self.column_edges, column, end_column)
        place = (row_bins, column_bins)
        if self.kind == "max":
            for total, take in ((self._high, np.maximum), (self._low, np.minimum)):
                pooled = take.reduceat(take.reduceat(tile, row_starts, axis=0), column_starts, axis=1)
                total[place] = take(total[place], pooled)
        else:
            pooled = np.add.reduceat(tile, row_starts, axis=0, dtype=np.float64)
            self._high[place] += np.add.reduceat(pooled, column_starts, axis=1)

    def result(self) -> np.ndarray:
        """The pooled map so far: float64 [min(height, rows), min(width, columns)]."""
        if self.kind == "max":
            return np.where(self._high >= -self._low, self._high, self._low)
        if self.kind == "mean":
            return self._high / np.outer(np.diff(self.row_edges), np.diff(self.column_edges))
        return self._high.copy()


def pool(array2d: np.ndarray, height: int, width: int, kind: str = "max") -> np.ndarray:
    """`array2d` [row, column] pooled to at most `height` × `width` bins: float [min(height, rows), min(width,
    columns)].

    `kind`: `"max"` keeps the value of largest magnitude with its sign (on a tie the positive one), `"sum"` adds,
    `"mean"` averages. nan marks a cell that is not there (a masked one): it is left out, and a bin of nothing but
    such cells is nan. float64 input gives float64, everything else float32. Raises ValueError for other shapes or
    kinds.
    """
    values = np.asarray(array2d)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"pooling needs a map with two axes and at least one cell, got shape {values.shape}")
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    if values.dtype.kind in "biu":
        values = values.astype(np.float64)
    absent = np.isnan(values)
    some_absent = bool(absent.any())
    rows, columns = values.shape
    pooled = StreamingPool(rows, columns, height, width, kind="sum" if kind == "mean" else kind)
    pooled.add(0, 0, np.where(absent, 0, values) if some_absent else values)
    result = pooled.result()
    if kind == "mean" or some_absent:
        present = StreamingPool(rows, columns, height, width, kind="sum")
        present.add(0, 0, ~absent)
        count = present.result()
        seen = count > 0
        result = np.divide(result, count if kind == "mean" else 1, out=np.full_like(result, np.nan), where=seen)
    return result.astype(dtype)


def max_pool_signed(array2d: np.ndarray, height: int, width: int) -> np.ndarray:
    """`pool` with `kind="max"`: in every bin the value of largest magnitude, with its sign."""
    return pool(array2d, height, width, kind="max")


def _bins_of(edges: np.ndarray, start: int, stop: int) -> tuple[slice, np.ndarray]:
    """The bins that cells `start` to `stop - 1` touch, and where each begins, counted from `start`."""
    first = int(np.searchsorted(edges, start, side="right")) - 1
    last = int(np.searchsorted(edges, stop, side="left"))
    return slice(first, last), np.maximum(edges[first:last], start) - start
