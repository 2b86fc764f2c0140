"""The benchmark of the delta rule runs and checks its results first."""

import pytest

from tests.benchmarks.bench_delta_rule import run


@pytest.mark.bench
def test_tiny_benchmark_returns_a_row_for_every_case() -> None:
    rows = run(tiny=True)
    assert len(rows) == 3 * 5 + 3
    assert all(row.ratio > 0 for row in rows)
