"""Rows of the delta rule's effective pattern, a few at a time, without tokens × tokens systems.

The weight of token j for a query at i is α_ij = β_j k_j·p_j, where p is what the query asks of the state, taken back in time from
p = scale q_i: past token j it becomes D_j (p − β_j k_j (k_j·p)), with D_j the decay. So a row needs one vector besides itself, and
goes back chunk by chunk of C tokens: with g the log decay summed from the chunk's start, p and P the vectors at its end and before
its start,

    y (I + L) = u,   L_ij = β_i Σ_d k_id k_jd exp(g_i − g_j) for i > j,   u_j = Σ_d p_d k_jd exp(g_C − g_j)
    α_j = β_j y_j,   P = exp(g_C) p − Σ_j α_j exp(g_j) k_j

and, for a query inside the chunk, u_j = scale Σ_d q_id k_jd exp(g_i − g_j) and exp(g_i) scale q_i in place of exp(g_C) p. Every exponent is
at most 0. Work grows with the square of the text, memory with the text.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import compute_dtype
from kernels.gated_linear_attention.decay import cumulative
from kernels.gated_linear_attention.pattern import pattern_rows

from .tiles import Fill

CHUNK = 64


class Chunk(NamedTuple):
    """What the rows of a head need of the tokens `start` … `stop` − 1. See the module's docstring."""

    start: int
    stop: int
    system: Tensor  # I + L, [token, token]
    match: Tensor  # u of queries inside, [query, token]
    to_end: Tensor  # exp(g_C − g_j) k_j, [token, d]
    from_start: Tensor  # exp(g_j) k_j, [token, d]
    query: Tensor  # exp(g_i) scale q_i, [token, d]
    whole: Tensor  # exp(g_C), [d or 1]
    beta: Tensor  # [token]


class DeltaTiles:
    """α of the gated delta rule; arguments as in `kernels.delta_rule.effective_pattern`."""

    scores = False

    def __init__(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float) -> None:
        self.q, self.k, self.beta, self.log_decay, self.scale = q, k, beta, log_decay, scale
        self.batch, self.head = q.shape[:2]
        self.dtype, self.device = compute_dtype(q.dtype), q.device

    def head_tiles(self, item: int, head: int) -> Fill:
        chunks = [self._chunk(item, head, start) for start in range(0, self.k.shape[2], CHUNK)]
        width = self.k.shape[3]

        def fill(start: int, stop: int, low: int, high: int, cells: Tensor) -> None:
            cells.zero_()
            asked = cells.new_zeros(stop - start, width)
            for chunk in reversed(chunks[: (stop - 1) // CHUNK + 1]):
                end = min(chunk.stop, stop)
                first, behind = max(chunk.start - start, 0), max(end - start, 0)  # rows inside, and after, the chunk
                own = slice(max(start - chunk.start, 0), end - chunk.start)
                u = cells.new_zeros(stop - start - first, end - chunk.start)
                u[: behind - first] = chunk.match[own, : end - chunk.start]
                if start + behind < stop:  # then the chunk is whole
                    u[behind - first :] = asked[behind:] @ chunk.to_end.T
                system = chunk.system[: end - chunk.start, : end - chunk.start]
                y = torch.linalg.solve_triangular(system, u, upper=False, left=False, unitriangular=True)
                alpha = y * chunk.beta[: end - chunk.start]
                cells[first:, chunk.start - low : end - low] = alpha
                asked[behind:] *= chunk.whole
                asked[first:behind] = chunk.query[own]
                asked[first:] -= alpha @ chunk.from_start[: end - chunk.start]

        return fill

    def _chunk(self, item: int, head: int, start: int) -> Chunk:
        stop = min(start + CHUNK, self.k.shape[2])
        own = (slice(item, item + 1), slice(head, head + 1), slice(start, stop))
        q, k, beta = (x[own].to(self.dtype) for x in (self.q, self.k, self.beta))
        decay = self.log_decay
        if decay is not None:
            decay = decay[own[1]] if decay.ndim == 1 else decay[own]
        rows = list(range(stop - start))
        system = pattern_rows(k, k, decay, None, 1.0, True, rows)[0, 0] * beta[0, 0, :, None]
        match = pattern_rows(q, k, decay, None, self.scale, False, rows)[0, 0]
        q, k, beta = q[0, 0] * self.scale, k[0, 0], beta[0, 0]
        if decay is None:
            return Chunk(start, stop, system, match, k, k, q, k.new_ones(1), beta)
        g = cumulative(
            decay.expand(stop - start)[:, None] if decay.ndim == 1 else decay[0, 0].view(stop - start, -1), 0
        )
        since, until = g.exp().to(self.dtype), (g[-1] - g).exp().to(self.dtype)
        return Chunk(start, stop, system, match, k * until, k * since, q * since, since[-1], beta)
