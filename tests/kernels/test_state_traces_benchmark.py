"""The benchmark of followed state entries runs and gives ratios; what they are is reported, not tested."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_state_traces import run


@pytest.mark.bench
def test_the_benchmark_runs_on_tiny_shapes() -> None:
    rows = run(tiny=True)
    assert [row.unit for row in rows] == ["time", "bytes"]
    assert all(row.ratio >= 0 and row.limit is not None for row in rows)
    assert "relative error" in rows[0].note and "MB" in rows[1].note
