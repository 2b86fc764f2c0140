"""Pooling against a loop over bins."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.lab.pooling import StreamingPool, bin_edges, max_pool_signed, pool


def pool_by_loops(values: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """The definition, bin by bin: cell r of n goes to bin b when b·n/size ≤ r < (b+1)·n/size after rounding down."""
    rows, columns = values.shape
    height, width = min(height, rows), min(width, columns)
    result = np.empty((height, width))
    for a in range(height):
        for b in range(width):
            part = values[
                a * rows // height : (a + 1) * rows // height, b * columns // width : (b + 1) * columns // width
            ]
            present = [float(cell) for cell in part.ravel() if not np.isnan(cell)]
            if not present:
                result[a, b] = np.nan
            elif kind == "max":
                result[a, b] = max(present, key=lambda cell: (abs(cell), cell))
            else:
                result[a, b] = sum(present) / (len(present) if kind == "mean" else 1)
    return result


SHAPES = [(12, 12, 4, 4), (13, 7, 5, 3), (96, 97, 96, 96), (5, 5, 9, 2), (1, 10, 3, 4), (31, 64, 30, 63)]


@pytest.mark.parametrize(("rows", "columns", "height", "width"), SHAPES)
@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_pool_equals_the_loop(rows: int, columns: int, height: int, width: int, kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((rows, columns))
    expected = pool_by_loops(values, height, width, kind)
    result = pool(values, height, width, kind)
    assert result.dtype == np.float64 and result.shape == expected.shape
    if kind == "max":
        np.testing.assert_array_equal(result, expected)
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_absent_cells_are_left_out(kind: str) -> None:
    generator = np.random.default_rng(1)
    values = np.where(generator.random((23, 17)) < 0.6, np.nan, generator.standard_normal((23, 17)))
    expected = pool_by_loops(values, 9, 8, kind)
    assert np.isnan(expected).any() and not np.isnan(expected).all()
    np.testing.assert_allclose(pool(values, 9, 8, kind), expected, rtol=1e-13, atol=1e-13)


def test_no_cell_is_dropped_at_any_ratio() -> None:
    """A lone spike anywhere survives max pooling in exactly one bin, and sums keep the total."""
    for cells in range(1, 40):
        for bins in range(1, 45):
            edges = bin_edges(cells, bins)
            assert edges[0] == 0 and edges[-1] == cells and (np.diff(edges) >= 1).all()
    for spike in range(37):
        row = np.zeros((1, 37))
        row[0, spike] = -2.0
        pooled = max_pool_signed(row, 1, 10)
        assert (pooled == -2).sum() == 1 and (pooled == 0).sum() == 9
        assert pool(row, 1, 10, "sum").sum() == -2


def test_sign_is_kept_and_a_tie_is_positive() -> None:
    assert max_pool_signed(np.array([[0.5, -0.7]]), 1, 1)[0, 0] == -0.7
    assert max_pool_signed(np.array([[-0.7, 0.7]]), 1, 1)[0, 0] == 0.7
    assert max_pool_signed(np.array([[-0.7, -0.2]]), 1, 1)[0, 0] == -0.7


def test_dtypes() -> None:
    assert pool(np.array([[200, 100]], np.uint8), 1, 1)[0, 0] == 200
    assert pool(np.array([[-128, 100]], np.int8), 1, 1)[0, 0] == -128
    assert pool(np.ones((3, 3), np.float16), 2, 2).dtype == np.float32
    assert pool(np.array([[True, False]]), 1, 1, "mean")[0, 0] == 0.5


@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_tiles_in_any_order_equal_the_whole(kind: str) -> None:
    generator = np.random.default_rng(2)
    values = generator.standard_normal((50, 41))
    tiles = [(row, column) for row in range(0, 50, 7) for column in range(0, 41, 6)]
    streaming = StreamingPool(50, 41, 11, 9, kind)
    for row, column in generator.permutation(tiles):
        streaming.add(row, column, values[row : row + 7, column : column + 6])
    np.testing.assert_allclose(streaming.result(), pool(values, 11, 9, kind), rtol=1e-13, atol=1e-13)


def test_a_nan_in_a_stream_is_not_hidden() -> None:
    for kind in ("max", "mean", "sum"):
        streaming = StreamingPool(4, 4, 2, 2, kind)
        streaming.add(0, 0, np.array([[1.0, np.nan]]))
        result = streaming.result()
        assert np.isnan(result[0, 0]) and not np.isnan(result[1]).any()


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'median', expected one of max, mean, sum"):
        pool(np.ones((2, 2)), 1, 1, "median")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        pool(np.ones(3), 1, 1)
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        pool(np.ones((0, 3)), 1, 1)
    with pytest.raises(ValueError, match="both must be at least 1"):
        pool(np.ones((2, 2)), 0, 1)
    with pytest.raises(ValueError, match=r"\[3:5, 0:2\] lies outside the map of 4 × 4"):
        StreamingPool(4, 4, 2, 2).add(3, 0, np.ones((2, 2)))
