"""Statistics of rows against loops over a small pattern, and closed cases."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.lab.factors import LayerFactors
from workbench.lab.pattern_factors import FactorError
from workbench.lab.row_statistics import STATISTICS, row_statistics, rows_of

RECORD = {"layer": 0, "kind": "attention", "n_heads": 1, "n_key_heads": 1, "n_value_heads": 1, "scale": 1.0, "strict": False,
          "alibi_slopes": None, "window": None, "state": None, "signals": []}  # fmt: skip


def dense(pattern: np.ndarray) -> LayerFactors:
    record = {
        **RECORD,
        "form": "dense",
        "pattern": {"signed": True, "rows_sum_to": None, "exact": True, "causal": True},
    }
    return LayerFactors(record, {"pattern": pattern[None].astype(np.float32)}, len(pattern))


def test_the_definitions_by_loops() -> None:
    pattern = np.tril(np.random.default_rng(0).standard_normal((12, 12)))
    pattern[7] = 0
    found = row_statistics(dense(pattern), 0)
    for row in range(1, 12):
        if row == 7:
            assert all(np.isnan(found[name][row - 1]) for name in STATISTICS)
            continue
        total = sum(abs(pattern[row, key]) for key in range(12))
        shares = [abs(pattern[row, key]) / total for key in range(12)]
        expected = {
            "distance": sum(share * (row - key) for key, share in enumerate(shares)),
            "entropy": -sum(share * np.log(share) for share in shares if share > 0),
            "first": shares[0], "previous": shares[row - 1], "itself": shares[row],
        }  # fmt: skip
        assert {name: found[name][row - 1] for name in STATISTICS} == pytest.approx(expected, abs=1e-6)


def test_closed_cases() -> None:
    n = 40
    previous = row_statistics(dense(np.eye(n, k=-1)), 0)
    assert (previous["previous"] == 1).all() and (previous["distance"] == 1).all() and (previous["entropy"] == 0).all()
    uniform = row_statistics(dense(-np.tril(np.ones((n, n)))), 0)  # the sign does not count
    np.testing.assert_allclose(uniform["entropy"], np.log(np.arange(2, n + 1)), rtol=1e-6)
    np.testing.assert_allclose(uniform["distance"], np.arange(1, n) / 2, rtol=1e-6)
    sink = np.zeros((n, n))
    sink[:, 0] = 0.3
    assert (row_statistics(dense(sink), 0)["first"] == 1).all()


def test_long_texts_are_sampled_evenly() -> None:
    factors = dense(np.tril(np.random.default_rng(1).standard_normal((700, 700))))
    rows = rows_of(factors, 50)
    assert len(rows) == 50 and rows[0] == 1 and rows[-1] == 699 and set(np.diff(rows)) <= {14, 15}
    every, some = row_statistics(factors, 0), row_statistics(factors, 0, 50)
    for name in STATISTICS:
        np.testing.assert_array_equal(some[name], every[name][rows - 1])


def test_a_pattern_that_is_not_whole_is_refused() -> None:
    record = {**RECORD, "form": "dense", "pattern": {"signed": True, "rows_sum_to": None}}
    arrays = {"pattern_rows": np.zeros((1, 2, 9), np.float32), "row_positions": np.array([0, 8])}
    with pytest.raises(FactorError, match="only some rows"):
        row_statistics(LayerFactors(record, arrays, 9), 0)
