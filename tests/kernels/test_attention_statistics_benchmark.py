"""The benchmark of attention statistics runs, and checks its peer and itself against float64 before it measures."""

import pytest
import torch

from tests.benchmarks.bench_attention_statistics import check, run


@pytest.mark.bench
def test_tiny_benchmark_measures_every_case() -> None:
    rows = run(tiny=True)
    assert len(rows) == 6 and all(row.ratio >= 0 for row in rows)


def test_both_sides_compute_the_same() -> None:
    q, k = torch.randn(2, 2, 192, 8, generator=torch.Generator().manual_seed(1))
    assert check(q, k) < 1e-5
    with pytest.raises(AssertionError):
        check(q * float("nan"), k)
