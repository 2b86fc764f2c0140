"""The benchmark of gated linear attention runs, checks its results first, and prints what it measured."""

import json

import pytest
import torch

from tests.benchmarks.bench_gated_linear_attention import main, relative_error


@pytest.mark.bench
def test_tiny_benchmark_prints_a_row_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 4 * 4 + 2 + 3 + 4
    assert all(row["ratio"] > 0 for row in rows)


def test_a_wrong_result_is_not_timed() -> None:
    with pytest.raises(AssertionError, match="wrong result"):
        relative_error(torch.ones(3), 1.001 * torch.ones(3, dtype=torch.float64))
