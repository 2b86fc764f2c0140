"""Where the cells of a pattern come from: queries and keys of softmax attention, factors of gated linear attention, or any function.

A source gives the cells of a few rows at a time, so that the accumulation (`accumulate`) is the same for all and never sees a whole
pattern. Which cells may be read is no business of the source; it may leave anything finite in the others.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.arguments import compute_dtype
from kernels.gated_linear_attention.decay import between, cumulative, lower_triangle
from kernels.gated_linear_attention.pattern import pattern_rows

LOG2_E = math.log2(math.e)

Fill = Callable[[int, int, int, int, Tensor], None]
"""fill(start, stop, low, high, cells): cells of queries start … stop − 1 and keys low … high − 1, written into `cells`."""


class TileSource(Protocol):
    """Patterns of a batch of heads, row by row.

    `scores`: the cells are scores in units of log 2, of which each row is to be normalised (weight = 2^score / Σ 2^score); otherwise they
    are weights. (A vectorised 2^x takes a third of the time of e^x on a CPU.)
    """

    batch: int
    head: int
    scores: bool
    dtype: torch.dtype
    device: torch.device

    def head_tiles(self, item: int, head: int) -> Fill:
        """The cells of one head of one sequence."""
        ...


class SoftmaxTiles:
    """score_ij = softcap(scale · q_i·k_j) + bias_ij, of which `accumulate` takes the softmax.

    Args:
        q: [batch, head, query, d]. k: [batch, kv_head, key, d]; head h reads group ⌊h·kv_head/head⌋. scale: factor of q·k.
        softcap: c in c · tanh(s / c), applied before the bias (Gemma 2). distance_bias: by distance, [head, distance], in the order of
            `distances`. bias: bias(item, head, queries, keys) -> [query, key], or broadcastable, for the slices given.
    """

    scores = True

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        softcap: float | None,
        distance_bias: Tensor | None,
        distances: range,
        bias: Callable[[int, int, slice, slice], Tensor] | None,
    ) -> None:
        self.q, self.k, self.scale, self.softcap = q, k, scale, softcap
        self.distance_bias, self.distances, self.bias = distance_bias, distances, bias
        self.batch, self.head = q.shape[:2]
        self.dtype, self.device = compute_dtype(q.dtype), q.device
        self._block: tuple[int, Tensor] | None = None

    def head_tiles(self, item: int, head: int) -> Fill:
        queries = self.q[item, head].to(self.dtype)
        keys = self.k[item, head * self.k.shape[1] // self.head].to(self.dtype)
        first = keys.shape[0] - queries.shape[0]
        factor = self.scale * (LOG2_E if self.softcap is None else 1.0 / self.softcap)

        def fill(start: int, stop: int, low: int, high: int, cells: Tensor) -> None:
            torch.mm(queries[start:stop] * factor, keys[low:high].T, out=cells)
            if self.softcap is not None:
                cells.tanh_().mul_(self.softcap * LOG2_E)
            if self.distance_bias is not None:
                # the bias of any strip is a piece of one block, because it depends on query − key alone
                block = self._distance_block(head, stop - start)
                left = keys.shape[0] + low - (first + start)
                cells.add_(block[: stop - start, left : left + high - low])
            if self.bias is not None:
                cells.add_(self.bias(item, head, slice(start, stop), slice(low, high)) * LOG2_E)

        return fill

    def _distance_block(self, head: int, rows: int) -> Tensor:
        """[row, x] with the bias at distance row − x + keys, in units of log 2; one tile, kept for the head."""
        if self._block is None or self._block[0] != head or self._block[1].shape[0] < rows:
            assert self.distance_bias is not None
            keys = self.distances.stop
            wide = torch.zeros(2 * keys + 2 * rows, dtype=torch.float64, device=self.device)  # from −keys − rows
            start = keys + rows + self.distances.start
            wide[start : start + len(self.distances)] = self.distance_bias[head].to(self.device, torch.float64) * LOG2_E
            falling = wide.flip(0).to(self.dtype)  # at index i: the bias at distance keys + rows − 1 − i
            block = falling.unfold(0, 2 * keys, 1)[:rows].flip(0)  # [row, x]: index rows − 1 − row + x
            self._block = (head, block)
        return self._block[1]


class GatedLinearTiles:
    """α_ij = scale · write_j · Σ_d q_id k_jd exp(G_id − G_jd) of gated linear attention; arguments as in `effective_pattern`."""

    scores = False

    def __init__(
        self, q: Tensor, k: Tensor, log_decay: Tensor | None, write: Tensor | None, scale: float, strict: bool
    ) -> None:
        self.q, self.k, self.log_decay, self.write, self.scale, self.strict = q, k, log_decay, write, scale, strict
        self.batch, self.head = q.shape[:2]
        self.dtype, self.device = compute_dtype(q.dtype), q.device

    def head_tiles(self, item: int, head: int) -> Fill:
        own = (slice(item, item + 1), slice(head, head + 1))
        write = None if self.write is None else self.write[own]
        if self.log_decay is not None and self.log_decay.ndim == 4:
            q, k, decay = self.q[own], self.k[own], self.log_decay[own]

            def vector(start: int, stop: int, low: int, high: int, cells: Tensor) -> None:
                rows = list(range(start, stop))
                cells.copy_(pattern_rows(q, k, decay, write, self.scale, self.strict, rows)[0, 0, :, low:high])

            return vector

        queries, keys = self.q[item, head].to(self.dtype) * self.scale, self.k[item, head].to(self.dtype)
        if write is not None:
            keys = keys * write[0, 0].to(self.dtype)[:, None]
        total = None
        if self.log_decay is not None:
            constant = self.log_decay.ndim == 1
            decay = self.log_decay[head].expand(keys.shape[0]) if constant else self.log_decay[item, head]
            total = cumulative(decay, 0)

        def fill(start: int, stop: int, low: int, high: int, cells: Tensor) -> None:
            torch.mm(queries[start:stop], keys[low:high].T, out=cells)
            if total is None:
                return
            # before the first row the decay splits into two factors, both at most 1: none can overflow
            before = max(0, min(start, high) - low)
            if before:
                cells[:, :before].mul_((total[start] - total[low : low + before]).exp().to(self.dtype))
                cells[:, :before].mul_((total[start:stop] - total[start]).exp().to(self.dtype)[:, None])
            inside = high - low - before
            if inside:
                visible = lower_triangle(stop - start, inside, False, self.device)
                cells[:, before:].mul_(between(total[start:stop], total[start : start + inside], visible, self.dtype))

        return fill


class FunctionTiles:
    """Any pattern: function(item, head, queries, keys) -> weights [query, key] of the slices given. A dense pattern is its indexing."""

    scores = False

    def __init__(
        self,
        function: Callable[[int, int, slice, slice], Tensor],
        batch: int,
        head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.function, self.batch, self.head, self.dtype, self.device = function, batch, head, dtype, device

    def head_tiles(self, item: int, head: int) -> Fill:
        def fill(start: int, stop: int, low: int, high: int, cells: Tensor) -> None:
            cells.copy_(self.function(item, head, slice(start, stop), slice(low, high)))

        return fill
