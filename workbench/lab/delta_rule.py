"""The gated delta rule of one head, evaluated from its factors: rows of its exact pattern, and what every token really wrote.

    S <- diag(exp(g_t)) S_{t−1};   S_t = S + k_t u_tᵀ,  u_t = w_t (v_t − Sᵀ k_t);   o_t = scale · S_tᵀ q_t        (g = log decay)

Tokens are taken in chunks. Within one, with G the decay summed from its start, B_ij = Σ_d q_id k_jd exp(G_id − G_jd) for j ≤ i and
L_ij the same with keys for queries, times w_i, for j < i, the triangular system T = (I + L)⁻¹ diag(w) gives

    o = (q e^G − B T (k e^G)) S + B T v            S: the state before the chunk
    S' = P S + W v,   P = diag(e^{G_C}) − (k e^{G_C − G})ᵀ T (k e^G),   W = (k e^{G_C − G})ᵀ T

(the WY form of Yang et al. 2024, arXiv 2412.06464, section 3.3). A row of the pattern is B T in its own chunk and, carried backwards
through the P of the chunks before, q̃ W in each of those: memory O(pos · state_k), no pos × pos system. float64, numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.lab.vector_decay import ChannelDecay

CHUNK = 64


@dataclass(frozen=True)
class _Chunk:
    """What a chunk of tokens does, whatever the values: names as in the equations above, `read` = q e^G − B T (k e^G), `own` = B T."""

    start: int
    stop: int
    own: np.ndarray
    read: np.ndarray
    carry: np.ndarray
    write: np.ndarray
    solve: np.ndarray
    recalled: np.ndarray


class DeltaRule:
    """One head. `query`, `key` [pos, state_k]; `write` [pos]; `log_decay` None, [pos] or [pos, state_k]. ValueError for decays above 1."""

    def __init__(
        self,
        query: np.ndarray,
        key: np.ndarray,
        write: np.ndarray,
        log_decay: np.ndarray | None = None,
        scale: float = 1.0,
    ):
        self.length = len(key)
        self._chunks = [
            _chunk(query, key, write, log_decay, scale, start, min(start + CHUNK, self.length))
            for start in range(0, self.length, CHUNK)
        ]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows of the pattern at `positions`: float64 [row, key], 0 above the diagonal."""
        out = np.zeros((len(positions), self.length))
        home = positions // CHUNK
        carried = np.zeros((len(positions), self._chunks[0].read.shape[1]))
        for number in range(int(home.max()), -1, -1):
            chunk = self._chunks[number]
            here, later = np.flatnonzero(home == number), np.flatnonzero(home > number)
            columns = slice(chunk.start, chunk.stop)
            out[later, columns] = carried[later] @ chunk.write
            carried[later] = carried[later] @ chunk.carry
            local = positions[here] - chunk.start
            out[here, columns], carried[here] = chunk.own[local], chunk.read[local]
        return out

    def pseudo_values(self, value: np.ndarray) -> np.ndarray:
        """u: what every token really wrote, from `value` [pos, state_v]: float64 [pos, state_v]. The state is then that of gated linear
        attention with u for values."""
        written = np.empty((self.length, value.shape[1]))
        state = np.zeros((self._chunks[0].read.shape[1], value.shape[1]))
        for chunk in self._chunks:
            tokens = slice(chunk.start, chunk.stop)
            values = np.asarray(value[tokens], dtype=np.float64)
            written[tokens] = chunk.solve @ (values - chunk.recalled @ state)
            state = chunk.carry @ state + chunk.write @ values
        return written


def _chunk(
    query: np.ndarray,
    key: np.ndarray,
    write: np.ndarray,
    log_decay: np.ndarray | None,
    scale: float,
    start: int,
    stop: int,
) -> _Chunk:
    q, k, w = (np.asarray(x[start:stop], dtype=np.float64) for x in (query, key, write))
    g = np.zeros((stop - start, 1)) if log_decay is None else np.asarray(log_decay[start:stop], dtype=np.float64)
    decay = ChannelDecay(np.broadcast_to(g.reshape(stop - start, -1), k.shape))
    q = q * scale
    tokens = np.arange(stop - start)
    found = decay.products(q, k, tokens, tokens)
    recall = w[:, None] * np.tril(decay.products(k, k, tokens, tokens), -1)
    solve = np.linalg.solve(np.eye(len(tokens)) + recall, np.diag(w))
    from_start = np.exp(decay.sums)
    recalled, own = k * from_start, found @ solve
    to_end = (k * decay.since(len(tokens) - 1, tokens)).T @ solve
    carry = np.diag(from_start[-1]) - to_end @ recalled
    return _Chunk(start, stop, own, q * from_start - own @ recalled, carry, to_end, solve, recalled)
