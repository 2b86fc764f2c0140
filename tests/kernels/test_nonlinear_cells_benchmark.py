"""The benchmark of the nonlinear cells runs and checks its results first."""

import pytest

from tests.benchmarks.bench_nonlinear_cells import run


@pytest.mark.bench
def test_tiny_benchmark_returns_a_row_for_every_case() -> None:
    rows = run(tiny=True)
    assert len(rows) == 2 * 4 + 2 + 1
    assert all(row.ratio > 0 for row in rows)
