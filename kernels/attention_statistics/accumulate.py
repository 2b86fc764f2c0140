"""The pass over a pattern in strips of rows, from which every statistic is summed up; no array of query × key ever exists.

A strip is as many whole rows as fit in a processor's cache. With whole rows the softmax needs no second look: per strip

    s_ij  scores in units of log 2, their maximum m_i, e_ij = 2^(s_ij − m_i), l_i = Σ_j e_ij
    log normaliser = ln 2 · (m_i + log2 l_i)      largest weight = 1 / l_i
    entropy        = ln 2 · (log2 l_i − Σ_j e_ij (s_ij − m_i) / l_i)
    received_j    += Σ_i e_ij / l_i               profile_d += Σ_i e_{i, i−d} / l_i

The diagonals of the profile are columns of the same memory (`Strips.views`), so both sums are products of a vector and a matrix.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .result import AttentionStatistics
from .strips import Pool, Strips, largest
from .tiles import Fill, FunctionTiles, TileSource
from .visibility import Visibility

NOTHING = -1e30  # score of a cell that may not be read; finite, since 0 · −inf is no number
FAINT = (
    -120.0
)  # weights below 2^−120 of the row's largest count as 0: under 2^−126 arithmetic takes the processor's slow path
PER_ROW = {  # a statistic, and the fields of the result that hold it
    "log_normaliser": ("log_normaliser",),
    "entropy": ("entropy",),
    "largest": ("largest", "largest_at"),
    "first": ("first",),
    "self": ("self_weight",),
    "previous": ("previous",),
    "distance": ("distance", "distance_squared"),
}
SUMS_OF_ROWS = {"first", "self_weight", "previous", "distance", "distance_squared", "features", "top_weights"}


def accumulate(
    source: TileSource,
    see: Visibility,
    statistics: Sequence[str],
    *,
    weights: str,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    cells_per_strip: int | None = None,
    ready: dict[str, Tensor] | None = None,
) -> AttentionStatistics:
    """One pass over every head of every sequence.

    Args:
        source, see: the pattern, and which cells may be read. statistics: names from `STATISTICS`.
        weights: `"softmax"` for scores, else one of `WEIGHTS`. features: [batch or 1, key, feature]. top_k: largest weights of each row.
        map_size: bins a side of `map`. cells_per_strip: size of the working array (memory and speed, not results).
        ready: fields that a kernel has computed already, `received` as sums over rows. They are not among `statistics`.
    """
    strips = Strips(source, see, cells_per_strip)
    found: dict[str, list[Tensor]] = {}
    anything = bool(statistics) or features is not None or top_k > 0
    for item in range(source.batch if anything else 0):
        for head in range(source.head):
            own = None if features is None else features[item if len(features) > 1 else 0].to(source.dtype).T
            sums = HeadSums(strips, set(statistics), weights, item, own, top_k, map_size)
            with (
                torch.inference_mode()
            ):  # hundreds of small steps, each a little cheaper; what leaves is stacked outside
                parts = sums.read(source.head_tiles(item, head))
            for name, value in parts.items():
                found.setdefault(name, []).append(value)
    readers, pairs = see.counts() if see.plain else _counted(source, see, cells_per_strip)
    readers, pairs = (x.to(source.device).expand(source.batch, -1) for x in (readers, pairs))
    stacked = {name: torch.stack(x).unflatten(0, (source.batch, source.head)) for name, x in found.items()}
    stacked |= ready or {}
    for name, count in (("received", readers[:, None]), ("profile", pairs[:, None])):
        if name in stacked:
            stacked[name] = torch.where(count > 0, stacked[name] / count, torch.nan).to(source.dtype)
    rows = torch.ones(source.batch, see.queries, dtype=torch.bool, device=source.device)
    rows = rows if see.real is None else see.real[:, see.first :]
    return AttentionStatistics(weights, rows, readers, pairs, see.distances.start, **stacked)


def _counted(source: TileSource, see: Visibility, cells_per_strip: int | None) -> tuple[Tensor, Tensor]:
    """Readers [batch, key] and pairs [batch, distance]: the sums of a pattern that is 1 wherever a row may read."""
    one = torch.ones((), dtype=source.dtype, device=source.device)
    ones = FunctionTiles(lambda item, head, rows, keys: one, source.batch, 1, source.dtype, source.device)
    strips = Strips(ones, see, cells_per_strip)
    found = [
        HeadSums(strips, {"received", "profile"}, "absolute", item).read(ones.head_tiles(item, 0))
        for item in range(source.batch)
    ]
    return torch.stack([sums["received"] for sums in found]), torch.stack([sums["profile"] for sums in found])


class HeadSums:
    """The statistics of one head of one sequence, summed up strip by strip by `read`."""

    def __init__(
        self,
        strips: Strips,
        wanted: set[str],
        weights: str,
        item: int,
        features: Tensor | None = None,
        top_k: int = 0,
        map_size: int = 96,
    ) -> None:
        self.strips, self.see, self.kind, self.item = strips, strips.see, weights, item
        self.wanted, self.features, self.top_k = wanted, features, top_k
        self.first_key = self.see.first_key(item)
        like, queries = strips.cells, self.see.queries
        self.some = torch.zeros(queries, dtype=torch.bool, device=like.device)  # rows that read something
        self.over = torch.zeros(
            queries, dtype=like.dtype, device=like.device
        )  # what turns sums over a row into weights
        self.found: dict[str, Tensor] = {}
        for name in (field for statistic in wanted & set(PER_ROW) for field in PER_ROW[statistic]):
            dtype = torch.int64 if name == "largest_at" else like.dtype
            self.found[name] = torch.zeros(queries, dtype=dtype, device=like.device)
        if features is not None:
            self.found["features"] = like.new_zeros(queries, len(features))
        if top_k:
            self.found["top_weights"] = like.new_zeros(queries, top_k)
            self.found["top_keys"] = torch.full((queries, top_k), -1, device=like.device)
        for name, size in (("received", self.see.keys), ("profile", len(self.see.distances))):
            if name in wanted:
                self.found[name] = torch.zeros(size, dtype=torch.float64, device=like.device)
        self.pools = []
        if wanted & {"map", "received_largest"}:
            bins = map_size if "map" in wanted else None
            for low in (False, True) if weights == "signed" else (False,):
                self.pools.append(Pool(queries, self.see.keys, bins, like, low))

    def read(self, fill: Fill) -> dict[str, Tensor]:
        """Everything wanted of the head whose cells `fill` gives, by field of the result; `received` and `profile` are still sums."""
        for start, stop, low, high in self.strips.ranges():
            cells, weights, by_diagonal = self.strips.views(stop - start, high - low)
            fill(start, stop, low, high, cells)
            if self.kind in ("softmax", "share"):
                over = self._normalised(cells, weights, start, low)
            else:
                over = self._as_they_are(cells, weights, start, low)
            self.over[start:stop] = over
            self._rows(weights, by_diagonal, start, low)
            self._columns(weights, by_diagonal, over, start, low)
        for name, value in self.found.items():
            if name in SUMS_OF_ROWS:
                value.mul_(self.over if value.ndim == 1 else self.over[:, None])
            if name in ("largest_at", "top_keys"):
                value[~self.some] = -1
            elif name not in ("top_weights", "received", "profile"):
                value[~self.some] = torch.nan
        if self.pools:
            results = [pool.result() for pool in self.pools]
            for place, name in enumerate(("map", "received_largest")):
                if name in self.wanted:
                    high_, low_ = results[0][place], results[-1][place]
                    self.found[name] = torch.where(high_ >= -low_, high_, low_) if len(results) > 1 else high_
        return self.found

    def _normalised(self, cells: Tensor, weights: Tensor, start: int, low: int) -> Tensor:
        """Fill `weights` with e_ij and return 1 / l_i, 0 for rows that read nothing. [row]. Changes the cells."""
        if self.kind == "share":  # |α| / Σ|α| is the softmax of log |α|
            least = torch.finfo(cells.dtype).tiny  # below it a logarithm takes ten times as long
            torch.threshold_(cells.abs_().clamp_(min=least).log2_(), math.log2(least), NOTHING)
        self.see.hide(cells, self.item, start, low, NOTHING)
        top, at = largest(cells, 1) if "largest" in self.wanted else (cells.amax(1, keepdim=True), None)
        some = self._note(top[:, 0] > NOTHING / 2, start)
        torch.threshold_(
            cells.sub_(torch.where(some[:, None], top, 0.0)), FAINT, NOTHING
        )  # 2^NOTHING = 0, hidden or faint
        torch.exp2(cells, out=weights)
        total = self._mass(weights, start, low)
        over = torch.where(some, 1.0 / total, 0.0)
        logs = total.log2()
        if "entropy" in self.wanted:
            inner = cells.mul_(weights).sum(1) * over
            self._put("entropy", start, ((logs - inner) * math.log(2)).clamp(min=0.0))
        self._put("log_normaliser", start, (top[:, 0] + logs) * math.log(2))
        if at is not None:
            self._put("largest", start, over)
            self._put("largest_at", start, at[:, 0] + low)
        return over

    def _as_they_are(self, cells: Tensor, weights: Tensor, start: int, low: int) -> Tensor:
        """Fill `weights` with the cells or their magnitude; return 1, or 0 for rows that read nothing. [row]."""
        weights.copy_(cells)
        if self.kind == "absolute":
            weights.abs_()
        self.see.hide(weights, self.item, start, low, 0.0)
        if "distance" in self.wanted:
            self._mass(weights, start, low)
        value, at = largest(weights, 1, by_magnitude=self.kind == "signed")
        some = self._note(value[:, 0] != 0, start)
        self._put("largest", start, value[:, 0])
        self._put("largest_at", start, at[:, 0] + low)
        return some.to(weights.dtype)

    def _mass(self, weights: Tensor, start: int, low: int) -> Tensor:
        """Sum of each row; where distances are wanted, it comes with their sums. [row]."""
        if "distance" not in self.wanted:
            return weights.sum(1)
        mass, mean, square = self.strips.moments(weights, self.see.first + start, low)
        self._put("distance", start, mean)
        self._put("distance_squared", start, square)
        return mass

    def _note(self, reads: Tensor, start: int) -> Tensor:
        """Which rows count: those that read something and are no padding. [row]."""
        some = self.some[start : start + len(reads)]
        some.copy_(reads)
        if self.see.real is not None:
            some &= self.see.real_rows(self.item, start, start + len(reads))
        return some

    def _put(self, name: str, start: int, values: Tensor) -> None:
        if name in self.found:
            self.found[name][start : start + len(values)] = values

    def _rows(self, weights: Tensor, by_diagonal: Tensor, start: int, low: int) -> None:
        """What single keys and features get of each row, before the division by the row's sum."""
        rows, columns = weights.shape
        position = self.see.first + start  # of the first row
        if "first" in self.wanted and low <= self.first_key < low + columns:
            self._put("first", start, weights[:, self.first_key - low])
        for name, distance in (("self", 0), ("previous", 1)):
            column = position - low + rows - 1 - distance
            if name in self.wanted and 0 <= column < by_diagonal.shape[1]:
                self._put(PER_ROW[name][0], start, by_diagonal[:, column])
        if self.features is not None:
            self._put("features", start, (self.features[:, low : low + columns] @ weights.T).T)
        if self.top_k:
            count = min(self.top_k, columns)
            value, at = largest(weights, count, by_magnitude=self.kind == "signed")
            self.found["top_weights"][start : start + rows, :count] = value
            self.found["top_keys"][start : start + rows, :count] = torch.where(value != 0, at + low, -1)

    def _columns(self, weights: Tensor, by_diagonal: Tensor, over: Tensor, start: int, low: int) -> None:
        """What keys and distances get. Changes the weights, so it comes last."""
        columns = weights.shape[1]
        if "received" in self.wanted:
            self.found["received"][low : low + columns] += over @ weights
        if "profile" in self.wanted:
            sums = (over @ by_diagonal).flip(0)  # by distance, from the nearest on
            nearest = self.see.first + start - (low + columns - 1)
            known = self.see.distances
            skipped = max(0, known.start - nearest)  # distances that no row of this pattern can have
            sums = sums[skipped : known.stop - nearest]
            begin = nearest + skipped - known.start
            self.found["profile"][begin : begin + len(sums)] += sums
        if self.pools:
            if self.kind in ("softmax", "share") or self.see.real is not None:
                weights.mul_(over[:, None])
            for pool in self.pools:
                pool.add(weights, start, low)
