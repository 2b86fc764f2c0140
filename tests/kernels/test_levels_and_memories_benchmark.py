"""The benchmark of levels and memories runs and checks its results first."""

import pytest

from tests.benchmarks.bench_levels_and_memories import run


@pytest.mark.bench
def test_tiny_benchmark_returns_a_row_for_every_case() -> None:
    rows = run(tiny=True)
    assert len(rows) == 2 * 2 + 2
    assert all(row.ratio > 0 for row in rows)
