"""The matrix state of one gated linear head, evaluated from its factors.

    S_t = exp(g_t) S_{t-1} + w_t k_t v_tᵀ                       (recurrence; g = log decay, w = write weight)
        = Σ_{τ≤t} exp(G_t − G_τ) w_τ k_τ v_τᵀ,   G = cumsum(g)  (closed form)

with S_t of shape [state_k, state_v]; the decay is one number per token, or one per token and row of the state.
Any position, any entry over time and the norms over time follow without storing positions × state. Arithmetic is
float64. Decays are taken as differences of cumulative sums and masked before the exponential, so no exponent is ever
positive and nothing overflows, however fast the state decays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from workbench.lab.vector_decay import ChannelDecay

CHUNK = 64
BLOCK = 1024


class CumulativeDecay:
    """Decay between any two positions of one head, from its per-token log decays `log_decay` [pos], each ≤ 0.

    A log decay of −∞ is a reset: nothing from before it is left. Raises ValueError for nan and for positive values.
    """

    def __init__(self, log_decay: np.ndarray):
        values = np.asarray(log_decay, dtype=np.float64)
        wrong = np.flatnonzero(~(values <= 0))
        if len(wrong):
            raise ValueError(
                f"log decay at position {wrong[0]} is {values[wrong[0]]}, expected at most 0 "
                "(decays are natural logarithms of numbers in [0, 1])"
            )
        reset = np.isneginf(values)
        self._sum = np.cumsum(np.where(reset, 0.0, values))
        self._resets = np.cumsum(reset) if reset.any() else None

    def log_between(self, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """log of the decay from each `earlier` position to each `later` one: float64 [later, earlier], never
        positive; −∞ where `earlier` is after `later`.
        """
        gap = self._sum[later][:, None] - self._sum[earlier][None, :]
        gap[np.asarray(later)[:, None] < np.asarray(earlier)[None, :]] = -np.inf
        if self._resets is not None:
            gap[self._resets[later][:, None] != self._resets[earlier][None, :]] = -np.inf
        return gap


class LinearState:
    """State of one head.

    `key` [pos, state_k], `value` [pos, state_v]; `write` [pos] (absent = 1); `log_decay` [pos] or [pos, state_k]
    (absent = no decay).
    """

    def __init__(
        self,
        key: np.ndarray,
        value: np.ndarray,
        write: np.ndarray | None = None,
        log_decay: np.ndarray | None = None,
    ):
        self.key, self.value = key, value
        self.length = len(key)
        self._write = np.ones(self.length) if write is None else np.asarray(write, dtype=np.float64)
        self._log_decay = np.zeros(self.length) if log_decay is None else np.asarray(log_decay, dtype=np.float64)
        self._by_row = self._log_decay.ndim == 2
        if self._by_row:
            self._rows = ChannelDecay(self._log_decay)
        else:
            self._decay = CumulativeDecay(self._log_decay)

    def at(self, position: int) -> np.ndarray:
        """S after token `position`: float64 [state_k, state_v]."""
        weight = self._weights(position, 0, position + 1)
        state = np.zeros((self.key.shape[1], self.value.shape[1]))
        for start in range(0, position + 1, BLOCK):
            block = slice(start, min(start + BLOCK, position + 1))
            if weight[block].any():
                state += (self._keys(block) * weight[block]).T @ self._values(block)
        return state

    def entry(self, i: int, j: int) -> np.ndarray:
        """Entry [i, j] of S after every token: float64 [pos]. O(pos)."""
        written = self._write * np.asarray(self.key[:, i], np.float64) * np.asarray(self.value[:, j], np.float64)
        if not self._log_decay.any():
            return np.cumsum(written)
        trace, current = [], 0.0
        own = self._log_decay[:, i] if self._by_row else self._log_decay
        for decay, update in zip(np.exp(own).tolist(), written.tolist(), strict=True):
            current = decay * current + update
            trace.append(current)
        return np.array(trace)

    def norms(self) -> np.ndarray:
        """Frobenius norm of S after every token: float64 [pos]. O(pos · state_k · state_v), one state in memory.

        Within a chunk the squared norm is the carried part, twice the overlap, and a Gram term of the chunk's own
        writes. Where writes cancel, the result is good to about 1e-8 of the largest norm in the chunk. With a decay per
        row the state is stepped from token to token.
        """
        if self._by_row:
            return self._stepped_norms()
        squares = np.empty(self.length)
        carried = np.zeros((self.key.shape[1], self.value.shape[1]))
        for start in range(0, self.length, CHUNK):
            block = slice(start, min(start + CHUNK, self.length))
            positions = np.arange(block.start, block.stop)
            keys, values = self._keys(block) * self._write[block, None], self._values(block)
            within = np.exp(self._decay.log_between(positions, positions))
            before = np.array([max(start - 1, 0)])  # nothing is carried into the first chunk, whatever it is scaled by
            fading = np.exp(self._decay.log_between(positions, before)[:, 0])
            overlap = within @ ((keys @ carried) * values).sum(1)
            own = ((within @ ((keys @ keys.T) * (values @ values.T))) * within).sum(1)
            squares[block] = fading**2 * (carried**2).sum() + 2 * fading * overlap + own
            carried = fading[-1] * carried + (keys * within[-1][:, None]).T @ values
        return np.sqrt(np.maximum(squares, 0.0))

    def recalled(self, keys: np.ndarray, positions: Iterable[int]) -> Iterator[np.ndarray]:
        """What S answers to `keys` [key, state_k] after each of the ascending `positions`: Sᵀk, float64 [key, state_v] each.

        With one decay per token the answers are carried from position to position, and a state of any size is never
        formed; with a decay per row the state is carried. O(pos) in all.
        """
        asked, carried, done = np.asarray(keys, dtype=np.float64), np.zeros(()), 0
        for position in positions:
            if done and position >= done:
                carried = carried * self._fading(done - 1, position)
            for start in range(done, position + 1, BLOCK):
                block = slice(start, min(start + BLOCK, position + 1))
                written, values = (
                    self._keys(block) * self._weights(position, block.start, block.stop),
                    self._values(block),
                )
                carried = carried + (written.T @ values if self._by_row else (asked @ written.T) @ values)
            done = max(done, position + 1)
            yield asked @ carried if self._by_row else carried

    def _stepped_norms(self) -> np.ndarray:
        norms = np.empty(self.length)
        state, kept = np.zeros((self.key.shape[1], self.value.shape[1])), np.exp(self._log_decay)
        for start in range(0, self.length, BLOCK):
            block = slice(start, min(start + BLOCK, self.length))
            keys, values = self._keys(block) * self._write[block, None], self._values(block)
            for step in range(len(keys)):
                state *= kept[start + step][:, None]
                state += keys[step][:, None] * values[step]
                norms[start + step] = np.sqrt(np.einsum("ij,ij", state, state))
        return norms

    def _fading(self, earlier: int, position: int) -> np.ndarray:
        """What is left after `position` of the state after `earlier`: [1, 1], or [state_k, 1]."""
        if self._by_row:
            return self._rows.since(position, np.array([earlier])).T
        return np.exp(self._decay.log_between(np.array([position]), np.array([earlier])))

    def _weights(self, position: int, first: int, stop: int) -> np.ndarray:
        """What the writes of the tokens from `first` to before `stop` count after `position`: [token, 1], or [token, state_k]."""
        sources, written = np.arange(first, stop), self._write[first:stop, None]
        if self._by_row:
            return self._rows.since(position, sources) * written
        return np.exp(self._decay.log_between(np.array([position]), sources)[0])[:, None] * written

    def _keys(self, block: slice) -> np.ndarray:
        return np.asarray(self.key[block], dtype=np.float64)

    def _values(self, block: slice) -> np.ndarray:
        return np.asarray(self.value[block], dtype=np.float64)
