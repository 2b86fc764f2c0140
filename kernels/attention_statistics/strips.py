"""The working arrays of the pass over a pattern: a strip of whole rows at a time, its diagonals, and tables of distances."""

import torch
from torch import Tensor

from .tiles import TileSource
from .visibility import Visibility

CELLS_PER_STRIP = {"cpu": 1 << 20}  # measured: less repeats small steps, more leaves the cache
CELLS_ELSEWHERE = 1 << 23
MOST_ROWS = 256  # more rows waste work above the diagonal
BLOCK = 64  # keys per block in the search for the largest weights


class Strips:
    """As many whole rows as fit in `budget` cells, one array of cells and one of weights, used again for every strip.

    Each row of weights is preceded by rows − 1 zeros, so that the same memory read with a row stride longer by one has the diagonals of
    the strip as its columns.
    """

    def __init__(self, source: TileSource, see: Visibility, budget: int | None) -> None:
        budget = budget or CELLS_PER_STRIP.get(source.device.type, CELLS_ELSEWHERE)
        widest = see.keys
        if see.window is not None:
            widest = min(widest, (1 if see.causal != "none" else 2) * see.window + MOST_ROWS)
        self.see = see
        self.rows = max(1, min(MOST_ROWS, see.queries, budget // widest))
        size = self.rows * (widest + self.rows) + self.rows
        self.cells = torch.empty(size, dtype=source.dtype, device=source.device)
        self.weights = torch.empty(size, dtype=source.dtype, device=source.device)
        up = torch.arange(1, see.keys + 1, device=source.device).to(source.dtype)
        self.rising = torch.stack([up, up * up])  # d, d² of distances 1 … keys
        self.falling = self.rising.flip(1)
        self.within = torch.arange(self.rows, device=source.device).to(source.dtype)
        self.own = (self.within[:, None] - self.within).abs()  # distance of row and key inside the strip's own square

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, low, high) of every strip: queries start … stop − 1 may read keys low … high − 1. Without those that read none."""
        found = []
        for start in range(0, self.see.queries, self.rows):
            stop = min(start + self.rows, self.see.queries)
            low, high = self.see.span(start, stop)
            if low < high:
                found.append((start, stop, low, high))
        return found

    def views(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cells and weights [row, key], and weights by diagonal [row, c]: column c holds the distance first − low + rows − 1 − c."""
        width = columns + rows - 1
        padded = self.weights[: rows * width].view(rows, width)
        padded[:, : rows - 1] = 0
        self.weights[rows * width : rows * width + rows] = 0
        cells = self.cells[: rows * columns].view(rows, columns)
        return cells, padded[:, rows - 1 :], self.weights.as_strided((rows, width), (width + 1, 1))

    def moments(self, weights: Tensor, position: int, low: int) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_j w_ij, Σ_j w_ij |i − j| and Σ_j w_ij (i − j)² of the rows from `position` on, keys from `low` on. [row] each.

        For keys before the strip i − j = (position − j) + (i − position), and for keys behind it likewise: sums of positive terms, where
        i² − 2 i E[j] + E[j²] would lose every digit at long range.
        """
        rows, columns = weights.shape
        keys = self.see.keys
        within = self.within[:rows]
        before, behind = min(max(position - low, 0), columns), min(max(position + rows - low, 0), columns)
        parts = []
        if before:
            d = self.falling[:, keys - position + low : keys - position + low + before]
            parts.append(_shifted_moments(weights[:, :before], d, within))
        if behind < columns:
            nearest = low + behind - position - rows  # distance of the first key behind, less 1
            d = self.rising[:, nearest : nearest + columns - behind]
            parts.append(_shifted_moments(weights[:, behind:], d, rows - 1 - within))
        if before < behind:
            inside = weights[:, before:behind]
            moved = inside * (d := self.own[:rows, low + before - position : low + behind - position])
            parts.append((inside.sum(1), moved.sum(1), moved.mul_(d).sum(1)))
        mass, mean, square = (sum(each[1:], each[0]) for each in zip(*parts, strict=True))
        return mass, mean, square


def _shifted_moments(weights: Tensor, powers: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments 0, 1, 2 of d + shift. weights [row, key]; powers d, d² [2, key]; shift [row]."""
    mass, linear, quadratic = weights.sum(1), weights @ powers[0], weights @ powers[1]
    moved = shift * mass
    return mass, linear + moved, quadratic + shift * (2 * linear + moved)


def largest(values: Tensor, count: int, by_magnitude: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, largest first, and where they are. [row, count] each.

    The k largest entries lie in the k blocks with the largest maxima, so one pass and a search of those blocks find them.
    """
    size = values.abs() if by_magnitude else values
    columns = size.shape[1]
    blocks = columns // BLOCK
    if blocks < 4 or count >= blocks:
        at = size.argmax(1, keepdim=True) if count == 1 else size.topk(count, dim=1).indices
        return values.gather(1, at), at
    maxima = size[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
    chosen = maxima.argmax(1, keepdim=True) if count == 1 else maxima.topk(count, dim=1).indices
    inside = torch.arange(BLOCK, device=values.device)
    candidates = (chosen[:, :, None] * BLOCK + inside).flatten(1)
    if columns > blocks * BLOCK:
        rest = torch.arange(blocks * BLOCK, columns, device=values.device)
        candidates = torch.cat([candidates, rest.expand(len(size), -1)], 1)
    found = size.gather(1, candidates)
    best = found.argmax(1, keepdim=True) if count == 1 else found.topk(count, dim=1).indices
    at = candidates.gather(1, best)
    return values.gather(1, at), at


class Pool:
    """Largest values of bins of rows × keys while rows come in order; and of whole columns.

    Args:
        rows, keys: size of the pattern. size: bins a side, None for columns only. low: keep smallest values instead (of signed weights).
    """

    def __init__(self, rows: int, keys: int, size: int | None, like: Tensor, low: bool = False) -> None:
        self.take, self.reduce = (torch.minimum, torch.amin) if low else (torch.maximum, torch.amax)
        self.row_edges = bin_edges(rows, size or 1)
        edges = torch.tensor(bin_edges(keys, size or 1), device=like.device)
        self.equal = keys % (len(edges) - 1) == 0  # bins of one width are a view, others a table of their members
        width = int((edges[1:] - edges[:-1]).max())
        within = torch.arange(width, device=like.device)
        self.members = torch.minimum(edges[:-1, None] + within, edges[1:, None] - 1)  # [bin, width], the last repeated
        self.map = like.new_zeros(len(self.row_edges) - 1, len(edges) - 1)
        self.columns, self.current, self.bin = like.new_zeros(keys), like.new_zeros(keys), 0

    def add(self, weights: Tensor, start: int, low: int) -> None:
        """The weights of rows from `start` and keys from `low` on; later calls come with later rows."""
        stop = start + len(weights)
        while start < stop:
            edge = self.row_edges[self.bin + 1]
            if start >= edge:
                self._finish()
                continue
            part = weights[len(weights) - (stop - start) : len(weights) - max(stop - edge, 0)]
            place = self.current[low : low + weights.shape[1]]
            self.take(place, self.reduce(part, 0), out=place)
            start = min(edge, stop)

    def _finish(self) -> None:
        binned = self.current.view(self.members.shape) if self.equal else self.current[self.members]
        self.map[self.bin] = self.reduce(binned, 1)
        self.take(self.columns, self.current, out=self.columns)
        self.current.zero_()
        self.bin += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """The pooled map [row_bin, key_bin] and the largest of each column [key]; call once, at the end."""
        self._finish()
        return self.map, self.columns


def bin_edges(cells: int, bins: int) -> list[int]:
    """First cell of each bin and, last, `cells`; never more bins than cells."""
    bins = min(bins, cells)
    return [number * cells // bins for number in range(bins + 1)]
