"""Products of queries and keys under a decay of their own for every channel, and the decay between positions: numpy, no overflow.

    W_ij = Σ_d q_id k_jd exp(G_id − G_jd),   G = cumsum(log_decay),   j ≤ i          (0 above the diagonal)

The exponential of a difference must not be split into exp(G_i) · exp(−G_j), which overflows. It is split at a position between the two:
for a block of keys that ends at e, rows behind it use exp(G_i − G_e) and exp(G_e − G_j), both at most 1; for the few rows inside the
block the difference of every pair and channel is formed before the exponential.
"""

from __future__ import annotations

import numpy as np

RESET = (
    -800.0
)  # exp(RESET) is 0 in float64: what a log decay of −∞ is taken for, so that differences of sums stay numbers
KEYS_AT_ONCE = 32
DIRECT = 2**21  # products of rows, keys and channels up to which no splitting is worth while


class ChannelDecay:
    """Decay of one head, from its log decays [pos, channel], each ≤ 0.

    Raises ValueError for nan and for positive values.
    """

    def __init__(self, log_decay: np.ndarray):
        values = np.asarray(log_decay, dtype=np.float64)
        wrong = np.argwhere(~(values <= 0))
        if len(wrong):
            position, channel = wrong[0]
            raise ValueError(
                f"log decay at position {position}, channel {channel} is {values[position, channel]}, expected at most 0 "
                "(decays are natural logarithms of numbers in [0, 1])"
            )
        self.sums = np.cumsum(np.maximum(values, RESET), axis=0)

    def since(self, position: int, earlier: np.ndarray) -> np.ndarray:
        """Decay from each `earlier` position to `position`: float64 [earlier, channel]."""
        return np.exp(self.sums[position] - self.sums[earlier])

    def products(self, query: np.ndarray, key: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """W at `rows` × `columns`, from query [row, channel] and key [column, channel] of those positions: float64 [row, column]."""
        if len(rows) * len(columns) * query.shape[1] <= DIRECT:
            return self._direct(query, key, rows, columns)
        out = np.zeros((len(rows), len(columns)))
        for start in range(0, len(columns), KEYS_AT_ONCE):
            block = slice(start, start + KEYS_AT_ONCE)
            some = columns[block]
            first, last = some.min(), some.max()
            behind = np.flatnonzero(rows >= last)
            inside = np.flatnonzero((rows >= first) & (rows < last))
            if len(behind):
                faded = query[behind] * np.exp(self.sums[rows[behind]] - self.sums[last])
                out[behind, block] = faded @ (key[block] * self.since(int(last), some)).T
            if len(inside):
                out[inside, block] = self._direct(query[inside], key[block], rows[inside], some)
        return out

    def _direct(self, query: np.ndarray, key: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        gap = self.sums[rows][:, None] - self.sums[columns][None]
        gap[rows[:, None] < columns[None, :]] = -np.inf
        return np.einsum("id,jd,ijd->ij", query, key, np.exp(gap, out=gap))
