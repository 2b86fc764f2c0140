"""Percentile bootstrap intervals, over single cases or over whole groups of them (documents, sequences)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float

    @classmethod
    def of(cls, draws: Array, level: float = 0.95) -> "Interval":
        """The central `level` of the draws, nan left out."""
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return cls(float(low), float(high))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"[{self.low:.3g}, {self.high:.3g}]"


def mean_interval(
    values: Any,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    weights: Any = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of values [case]: cases are drawn with replacement, or whole groups, whose cases are not independent.

    Args:
        groups: the group of each case [case] (None: every case its own). weights: of each case, so that a value may itself be a mean.

    Raises:
        ValueError: no cases, or lengths that differ.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(values) or weights.shape != values.shape or (groups is not None and len(groups) != len(values)):
        raise ValueError(
            f"Expected one value, weight and group for each case, and at least one case; got {len(values)} values, {len(weights)} weights"
            f"{'' if groups is None else f', {len(groups)} groups'}."
        )
    number = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, counts = np.bincount(number, weights * values), np.bincount(number, weights)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of groups without weight says nothing
        return Interval.of((drawn @ sums) / (drawn @ counts), level)
