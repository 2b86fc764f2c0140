"""A byte n-gram model: the reference that a trained model must beat.

Interpolated Kneser–Ney smoothing (Kneser & Ney 1995; the interpolated form and the discount estimate after Chen &
Goodman 1998). With h a context of n − 1 bytes, b a byte and c the counts of the training text,

    p_n(b | h) = max(c(h b) − D_n, 0) / c(h)  +  D_n N(h) / c(h) · p_{n−1}(b | h without its first byte)

where N(h) is the number of different bytes seen after h, and p_n(b | h) = p_{n−1}(b | …) for an h never seen. Below
the highest order the count c(h b) is the number of different bytes seen before h b; the lowest order falls back on
the uniform 1/256. D_n = n1 / (n1 + 2 n2), with n1 and n2 the number of n-grams counted once and twice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 8  # an n-gram is packed into one 64-bit integer


@dataclass(frozen=True)
class _Table:
    """Counts of the n-grams of one length, packed with the oldest byte highest."""

    ngrams: NDArray[np.uint64]  # sorted
    counts: NDArray[np.int64]  # of each n-gram
    contexts: NDArray[np.uint64]  # sorted; n-gram without its last byte
    totals: NDArray[np.int64]  # sum of the counts after each context
    kinds: NDArray[np.int64]  # number of different bytes after each context
    discount: float


class NgramModel:
    """Interpolated Kneser–Ney n-gram model over bytes; `order=3` looks at two bytes of context."""

    def __init__(self, order: int = 3) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order must be 1 … {MAX_ORDER}, got {order}")
        self.order = order
        self._plain: list[_Table] = []  # by length − 1: counts as seen
        self._continuation: list[_Table] = []  # by length − 1: number of different bytes seen before

    def fit(self, data: bytes) -> "NgramModel":
        """Count the n-grams of `data`; returns self. Raises ValueError if `data` is shorter than one n-gram."""
        if len(data) < self.order:
            raise ValueError(f"{len(data)} bytes are too few for an order of {self.order}")
        self._plain, self._continuation = [], []
        values = np.frombuffer(data, dtype=np.uint8).astype(np.uint64)
        for length in range(1, self.order + 1):
            self._plain.append(_table(*np.unique(_packed(values, length), return_counts=True)))
        for length in range(1, self.order):
            longer = self._plain[length].ngrams  # each different n-gram of one byte more, once
            self._continuation.append(_table(*np.unique(longer & _mask(length), return_counts=True)))
        return self

    def losses(self, data: bytes) -> NDArray[np.float64]:
        """−log p(byte t | up to order − 1 bytes before it) in nats, for every t of `data` [pos].

        The first bytes have less context and are predicted by the model of that shorter order.
        """
        if not self._plain:
            raise ValueError("fit the model before asking for losses")
        values = np.frombuffer(data, dtype=np.uint8).astype(np.uint64)
        probabilities = np.empty(len(values))
        for length in range(1, min(self.order - 1, len(values)) + 1):
            probabilities[length - 1 : length] = self._probabilities(_packed(values[:length], length), length)
        if len(values) >= self.order:
            probabilities[self.order - 1 :] = self._probabilities(_packed(values, self.order), self.order)
        return -np.log(probabilities)

    def distribution(self, context: bytes) -> NDArray[np.float64]:
        """p(next byte | the last order − 1 bytes of `context`), float64 [256]; sums to 1."""
        if not self._plain:
            raise ValueError("fit the model before asking for a distribution")
        kept = context[max(0, len(context) - self.order + 1) :]
        packed = np.uint64(int.from_bytes(kept, "big") << 8) + np.arange(256, dtype=np.uint64)
        return self._probabilities(packed, len(kept) + 1)

    def _probabilities(self, ngrams: NDArray[np.uint64], length: int) -> NDArray[np.float64]:
        """p(last byte | the bytes before it) of packed n-grams of one length, highest order first."""
        probabilities = np.full(len(ngrams), 1 / 256)
        for shorter in range(1, length + 1):
            table = self._plain[shorter - 1] if shorter == length else self._continuation[shorter - 1]
            suffixes = ngrams & _mask(shorter)
            counts = _look_up(table.ngrams, table.counts, suffixes)
            totals = _look_up(table.contexts, table.totals, suffixes >> np.uint64(8))
            kinds = _look_up(table.contexts, table.kinds, suffixes >> np.uint64(8))
            seen = totals > 0
            with np.errstate(divide="ignore", invalid="ignore"):
                mixed = (np.maximum(counts - table.discount, 0) + table.discount * kinds * probabilities) / totals
            probabilities = np.where(seen, mixed, probabilities)
        return probabilities


def _table(ngrams: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Table:
    contexts, first = np.unique(ngrams >> np.uint64(8), return_index=True)  # sorted n-grams: each context is one run
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # a discount of 0 would leave unseen bytes no probability at all; a text without rare n-grams gives no estimate
    discount = once / (once + 2 * twice) if once else 0.5
    kinds = np.diff(np.append(first, len(ngrams)))
    return _Table(ngrams, counts, contexts, np.add.reduceat(counts, first), kinds, discount)


def _packed(values: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """Every run of `length` bytes as one integer."""
    packed = np.zeros(len(values) - length + 1, dtype=np.uint64)
    for offset in range(length):
        packed = (packed << np.uint64(8)) | values[offset : offset + len(packed)]
    return packed


def _mask(length: int) -> np.uint64:
    return np.uint64((1 << 8 * length) - 1)


def _look_up(keys: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The value of each wanted key, 0 where it is missing. `keys` is sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
