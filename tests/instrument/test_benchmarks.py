"""The benchmarks of the instrument run, compare only equal computations, and print a row for every claim."""

import pytest
import torch

from tests.benchmarks import bench_hooks, bench_memory


@pytest.mark.bench
def test_hook_benchmark_runs() -> None:
    rows = bench_hooks.run(repeats=2, peers=False)
    assert [row.name for row in rows] == [
        f"{side} / bare" for side in ("idle hooks", "one intervention", "cache one residual stream", "cache everything")
    ]
    assert [row.limit for row in rows] == [1.02, None, None, 1.3] and all(0.1 < row.ratio < 20 for row in rows)


@pytest.mark.bench
def test_a_different_computation_is_not_timed() -> None:
    with pytest.raises(AssertionError, match=r"cache everything: relative error 1.0e-03, not timed"):
        bench_hooks.require_equal(1.001 * torch.ones(3), torch.ones(3), "cache everything")


@pytest.mark.bench
def test_memory_benchmark_sees_what_is_allocated() -> None:
    """A subprocess that holds 64 MB more is measured as holding 64 MB more."""
    lean, fat = (bench_memory.peak_above_model(tokens=16, layers=1, extra=extra) for extra in ("", bench_memory.WASTE))
    assert fat - lean == pytest.approx(64, abs=12)
