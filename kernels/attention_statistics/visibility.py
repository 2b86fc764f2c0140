"""Which keys a query may read: causality, window, padding, packed documents; and how many readers that leaves a key."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CAUSAL = ("inclusive", "strict", "none")


@lru_cache(maxsize=64)
def _ones(rows: int, columns: int, diagonal: int, upper: bool, like: tuple[torch.dtype, torch.device]) -> Tensor:
    """1 from a diagonal up, or up to it, else 0: [row, column]. Shared; not to be written to."""
    ones = torch.ones(rows, columns, dtype=like[0], device=like[1])
    return ones.triu_(diagonal) if upper else ones.tril_(diagonal)


def _write(cells: Tensor, value: float, diagonal: int, upper: bool) -> None:
    """Write `value` to the cells from a diagonal up (`upper`), or up to it. A tenth of the time of a fill by a mask."""
    if upper:
        cells.tril_(diagonal - 1)
    else:
        cells.triu_(diagonal + 1)
    if value:
        cells.add_(_ones(*cells.shape, diagonal, upper, (cells.dtype, cells.device)), alpha=value)


@dataclass(frozen=True)
class Visibility:
    """Query row r stands at position `keys - queries + r`: the queries are the last tokens of the text.

    Args:
        queries, keys: numbers of rows and columns. causal: `"inclusive"` (a token reads itself and the past), `"strict"`
            (only the past) or `"none"`. window: a token reads keys less than this many tokens away (None: all).
        real: False at padding, [batch, key]; None without padding. A padding row counts for nothing.
        segments: a number per token, [batch, key]; a token reads its own segment only (packed documents). None: one segment.
    """

    queries: int
    keys: int
    causal: str = "inclusive"
    window: int | None = None
    real: Tensor | None = None
    segments: Tensor | None = None

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.keys - self.queries

    @property
    def distances(self) -> range:
        """Every distance query - key that can occur; without causality also the negative ones."""
        return range(1 - self.queries if self.causal == "none" else 0, self.keys)

    @property
    def plain(self) -> bool:
        """Whether all sequences of a batch see alike, by position alone."""
        return self.real is None and self.segments is None

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """First key, and one behind the last key, that any of the rows start … stop - 1 may read; empty if they are equal."""
        low, high = 0, self.keys
        if self.causal != "none":
            high = self.first + stop - int(self.causal == "strict")
        if self.window is not None:
            low = max(0, self.first + start - self.window + 1)
            high = min(high, self.first + stop + self.window - 1)
        return low, max(low, high)

    def hide(self, cells: Tensor, item: int, start: int, low: int, value: float) -> None:
        """Write `value` to the cells [row, key] that may not be read; row 0 is query `start`, column 0 is key `low`.

        Only the corners are touched unless there is padding or segments.
        """
        rows, columns = cells.shape
        position = self.first + start - low  # of row 0, counted in columns
        if self.causal != "none":
            gap = int(self.causal == "strict")  # a token reads keys up to its own position less this
            corner = min(max(position - gap + 1, 0), columns)
            _write(cells[:, corner:], value, position - gap + 1 - corner, upper=True)
        if self.window is not None:
            corner = min(max(position + rows - self.window, 0), columns)
            _write(cells[:, :corner], value, position - self.window, upper=False)
            if self.causal == "none":
                corner = min(max(position + self.window, 0), columns)
                _write(cells[:, corner:], value, position + self.window - corner, upper=True)
        if self.real is not None:
            cells.masked_fill_(~self.real[item, low : low + columns], value)
        if self.segments is not None:
            own = self.segments[item, self.first + start : self.first + start + rows, None]
            cells.masked_fill_(own != self.segments[item, low : low + columns], value)

    def real_rows(self, item: int, start: int, stop: int) -> Tensor:
        """False at queries that are padding, [row]. Only where there is padding."""
        assert self.real is not None
        return self.real[item, self.first + start : self.first + stop]

    def first_key(self, item: int) -> int:
        """The first token that is no padding."""
        return 0 if self.real is None else int(self.real[item].to(torch.int8).argmax())

    def counts(self) -> tuple[Tensor, Tensor]:
        """How many rows may read each key, and how many visible pairs there are at each distance.

        Returns float64 [batch or 1, key] and [batch or 1, distance].
        """
        if not self.plain:
            raise ValueError("counts by formula need sequences without padding and segments")
        key = torch.arange(self.keys, dtype=torch.float64)
        last, low = float(self.keys), float(self.first)
        begin = key + int(self.causal == "strict") if self.causal != "none" else torch.zeros_like(key)
        end = torch.full_like(key, last)
        if self.window is not None:
            end = (key + self.window).clamp(max=last)
            begin = torch.maximum(begin, key - self.window + 1) if self.causal == "none" else begin
        readers = (end - begin.clamp(min=low)).clamp(min=0)
        # a pair at distance d: first <= i < keys and 0 <= i - d < keys
        d = torch.arange(self.distances.start, self.distances.stop, dtype=torch.float64)
        pairs = ((d + last).clamp(max=last) - d.clamp(min=low)).clamp(min=0)
        if self.window is not None:
            pairs[d.abs() >= self.window] = 0
        if self.causal == "strict":
            pairs[0] = 0
        return readers[None], pairs[None]
