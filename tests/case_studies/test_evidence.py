"""Summaries and intervals against closed forms, enumeration and coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from case_studies.harness.errors import StudyError
from case_studies.harness.evidence import Sample, confidence_interval, summarise


def test_the_t_interval_of_a_textbook_table() -> None:
    """n = 5: t = 2.776 at 95 %, 4.604 at 99 % (two-sided)."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = math.sqrt(2.5) / math.sqrt(5)
    assert confidence_interval(values, "t", 0.95) == pytest.approx((3 - 2.776 * half, 3 + 2.776 * half), abs=1e-3)
    assert confidence_interval(values, "t", 0.99) == pytest.approx((3 - 4.604 * half, 3 + 4.604 * half), abs=1e-3)


def test_the_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(2.0, 3.0, (4000, 4))
    inside = [low <= 2.0 <= high for low, high in (confidence_interval(row, "t", 0.9) for row in draws)]  # type: ignore[operator]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)  # four standard errors


def test_the_bootstrap_interval_against_all_resamples() -> None:
    values = [0.0, 1.0, 5.0, 9.0]
    every = [np.mean(each) for each in itertools.product(values, repeat=4)]
    assert confidence_interval(values, "bootstrap", 0.8) == pytest.approx(
        tuple(np.quantile(every, [0.1, 0.9])), abs=0.26
    )
    assert confidence_interval(values, "bootstrap") == confidence_interval(values, "bootstrap")


def test_a_long_sample_is_resampled_in_pieces() -> None:
    values = np.random.default_rng(1).normal(size=3000)
    low, high = confidence_interval(values, "bootstrap")
    expected_low, expected_high = confidence_interval(values, "t")
    assert low == pytest.approx(expected_low, abs=4e-3) and high == pytest.approx(expected_high, abs=4e-3)


def test_one_value_has_no_interval_and_equal_values_a_point() -> None:
    assert confidence_interval([1.0]) == (None, None)
    assert confidence_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert confidence_interval([2.0, 2.0], "bootstrap") == (2.0, 2.0)


@pytest.mark.parametrize("method,confidence", [("normal", 0.95), ("t", 1.0), ("t", 0.0)])
def test_unknown_methods(method: str, confidence: float) -> None:
    with pytest.raises(ValueError, match="an interval is t or bootstrap"):
        confidence_interval([1.0, 2.0], method, confidence)


def test_numbers_per_seed() -> None:
    for measured in ([0.1, 0.2, 0.6], np.array([0.1, 0.2, 0.6]), [np.float32(0.1), torch.tensor(0.2), 0.6]):
        summary = summarise("m", measured)
        assert (summary.n, summary.seeds, summary.over, summary.interval) == (3, 3, "seeds", "t")
        assert summary.value == pytest.approx(0.3) and summary.median == pytest.approx(0.2)
        assert (summary.lowest, summary.highest) == pytest.approx((0.1, 0.6))


def test_a_single_number_and_truth_values() -> None:
    summary = summarise("m", 3)
    assert (summary.value, summary.n, summary.ci_low, summary.interval) == (3.0, 1, None, "")
    assert summarise("m", [True, True, False]).value == pytest.approx(2 / 3)


def test_items_of_one_model_get_a_bootstrap_and_items_of_several_are_averaged_within_each_seed() -> None:
    alone = summarise("m", [Sample([0.0, 1.0, 1.0, 1.0], "sentences")])
    assert (alone.n, alone.over, alone.seeds, alone.interval) == (4, "sentences", 1, "bootstrap")
    assert alone == summarise("m", Sample([0.0, 1.0, 1.0, 1.0], "sentences"))
    several = summarise("m", [Sample([0.0, 1.0]), Sample([1.0, 1.0, 1.0])])
    assert several.values == (0.5, 1.0) and several.over == "seeds" and several.seeds == 2


@pytest.mark.parametrize(
    "measured,words",
    [
        (float("nan"), "'m' is nan at 0.*NotRun"), ([1.0, float("inf")], "'m' is inf at 1"), ([], "'m' is empty"),
        ("0.5", "'m' holds a str"), ([1.0, None], "'m' holds a NoneType at 1"), (Sample([]), "'m' is empty"),
        (np.zeros((2, 2)), "'m' holds a ndarray"),
    ],
)  # fmt: skip
def test_what_is_no_measurement(measured: object, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        summarise("m", measured)
