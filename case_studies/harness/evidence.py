"""Measurements of a study and their summaries: mean, spread and a confidence interval whose method is stated.

A measurement is a number, one number per seed, or a `Sample` of items (sentences, heads, …) measured on a fixed model.
`summarise` turns it into the statistics that rules and tables use. Intervals:

    t           mean ± t(n−1) · s/√n; exact for independent normal values, the default over seeds
    bootstrap   percentiles of the mean over 10,000 resamples with a fixed seed; the default over items
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from case_studies.harness.errors import StudyError

INTERVALS = ("t", "bootstrap")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Sample:
    """A measurement of many items with one model: `values` (item), `over` what the items are, in the plural.

    The items must be independent; where they come in groups, measure one value per group.
    """

    values: Sequence[float]
    over: str = "items"


@dataclass(frozen=True)
class NotRun:
    """What a study returns in place of a measurement that cannot be made here, with the reason in words."""

    reason: str


@dataclass(frozen=True)
class Summary:
    """The statistics of one measurement.

    `value` is the mean of `values`; `ci_low` and `ci_high` are None for a single value; `n` counts the values, which
    are one per seed or one per item, as `over` says; `seeds` counts the seeds that they come from.
    """

    name: str
    values: tuple[float, ...]
    over: str
    seeds: int
    value: float
    median: float
    lowest: float
    highest: float
    ci_low: float | None
    ci_high: float | None
    interval: str
    confidence: float

    @property
    def n(self) -> int:
        return len(self.values)


def summarise(name: str, measured: Any, interval: str | None = None, confidence: float = 0.95) -> Summary:
    """The summary of a measurement: a number, a sequence with one number (or one `Sample`) per seed, or a `Sample`.

    `interval` None means t over seeds and bootstrap over items. Items of several seeds are averaged within each seed
    first, since items of one seed share a model. Raises StudyError for anything that is not a finite number.
    """
    over, seeds = "seeds", 1
    if isinstance(measured, Sample):
        values, over = _numbers(name, measured.values), measured.over
    elif _is_sequence(measured):
        per_seed = list(measured)
        seeds = len(per_seed)
        if seeds == 1 and isinstance(per_seed[0], Sample):
            return summarise(name, per_seed[0], interval, confidence)
        values = _numbers(
            name, [np.mean(_numbers(name, each.values)) if isinstance(each, Sample) else each for each in per_seed]
        )
    else:
        values = _numbers(name, [measured])
    method = interval or ("t" if over == "seeds" else "bootstrap")
    low, high = confidence_interval(values, method, confidence)
    return Summary(
        name, tuple(values), over, seeds, float(np.mean(values)), float(np.median(values)), min(values), max(values),
        low, high, method if low is not None else "", confidence,
    )  # fmt: skip


def confidence_interval(
    values: Sequence[float] | np.ndarray, method: str = "t", confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """(low, high) of the mean of `values`; (None, None) for fewer than two of them.

    ValueError for an unknown method or a confidence that is not between 0 and 1.
    """
    if method not in INTERVALS or not 0 < confidence < 1:
        raise ValueError(
            f"an interval is {' or '.join(INTERVALS)} with a confidence between 0 and 1, got {method!r}, {confidence}"
        )
    numbers = np.asarray(values, np.float64)
    n = len(numbers)
    if n < 2:
        return None, None
    mean, tail = float(numbers.mean()), (1 - confidence) / 2
    if method == "t":
        from scipy.special import stdtrit  # without the statistics package, which takes a second to load

        half = float(stdtrit(n - 1, 1 - tail)) * float(numbers.std(ddof=1)) / math.sqrt(n)
        return mean - half, mean + half
    generator = np.random.default_rng(0)
    block = max(1, 10**6 // n)  # resamples at once: a long sample must not need 10,000 times its memory
    means = [
        numbers[generator.integers(0, n, (min(block, RESAMPLES - done), n))].mean(1)
        for done in range(0, RESAMPLES, block)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _is_sequence(measured: Any) -> bool:
    return isinstance(measured, (list, tuple)) or (isinstance(measured, np.ndarray) and measured.ndim == 1)


def _numbers(name: str, values: Iterable[Any]) -> list[float]:
    numbers = []
    for position, value in enumerate(values):
        number = as_number(value)
        if number is None:
            raise StudyError(f"measurement {name!r} holds a {type(value).__name__} at {position}, expected a number")
        if not math.isfinite(number):
            raise StudyError(
                f"measurement {name!r} is {number} at {position}, expected a finite number; "
                f"a study that cannot measure something returns NotRun(reason)"
            )
        numbers.append(number)
    if not numbers:
        raise StudyError(f"measurement {name!r} is empty, expected at least one number")
    return numbers


def as_number(value: Any) -> float | None:
    """The value as a float if it is a number, a bool or an array with one element, else None."""
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return float(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a tensor or array without axes
        return float(value.item())
    return None
