from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from app.render import colour_fraction, mosaic, share_of_row, to_levels, to_png, value_at_fraction, visible_bins
from app.theme import LEVELS, TABLE_NAMES, colour_table
from workbench.lab.pooling import pool


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_every_level_of_a_picture_has_the_colour_of_its_table(table: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = decode(to_png(levels, table)).reshape(256, 4)
    assert (pixels[:LEVELS, :3] == colour_table(table)).all()
    assert (pixels[:LEVELS, 3] == 255).all() and pixels[LEVELS, 3] == 0


def test_levels_of_nonnegative_values_by_hand() -> None:
    values = np.array([[0.0, 0.25, 1.0, 9.0, np.nan]])
    assert to_levels(values, 1.0, "linear", signed=False).tolist() == [[0, 64, 254, 254, 255]]  # 63.5 rounds to even
    assert to_levels(values, 1.0, "sqrt", signed=False).tolist() == [[0, 127, 254, 254, 255]]


def test_levels_of_signed_values_are_symmetric_about_zero() -> None:
    values = np.linspace(-2, 2, 101)
    levels = to_levels(values, 2.0, "sqrt", signed=True).astype(int)
    assert levels[50] == 127 and (levels + levels[::-1] == 254).all()
    assert (np.diff(levels) >= 0).all()


@pytest.mark.parametrize("scale", ["linear", "sqrt", "log"])
@pytest.mark.parametrize("fraction", [-1.0, -0.5, 0.25, 0.75, 1.0])
def test_the_colour_bar_labels_invert_the_scale(scale: str, fraction: float) -> None:
    value = value_at_fraction(fraction, 3.0, scale)
    assert colour_fraction(np.array([value]), 3.0, scale)[0] == pytest.approx(fraction, abs=1e-12)


def test_the_logarithmic_scale_spans_four_decades() -> None:
    found = colour_fraction(np.array([1.0, 0.1, 1e-4, 1e-9, 0.0, -0.01]), 1.0, "log")
    assert found == pytest.approx([1.0, 0.75, 0.0, 0.0, 0.0, -0.5])


def test_an_unknown_scale_is_named() -> None:
    with pytest.raises(ValueError, match="cubic"):
        colour_fraction(np.zeros(1), 1.0, "cubic")


def test_a_masked_cell_is_not_a_zero() -> None:
    for signed in (False, True):
        zero, masked = to_levels(np.array([0.0, np.nan]), 1.0, "linear", signed).tolist()
        assert masked == LEVELS and zero != LEVELS


def test_share_of_row() -> None:
    values = np.array([[2.0, -4.0, np.nan], [0.0, 0.0, 0.0], [np.nan, np.nan, np.nan]])
    expected = [[0.5, -1.0, np.nan], [0, 0, 0], [np.nan] * 3]
    np.testing.assert_array_equal(share_of_row(values), expected)


@pytest.mark.parametrize("causal,strict,window", [(True, False, None), (True, True, None), (True, False, 7), (True, True, 2),
                                                  (False, False, None), (False, False, 5)])  # fmt: skip
@pytest.mark.parametrize("rows,columns", [((0, 40), (0, 40)), ((10, 33), (0, 40)), ((0, 9), (20, 40)), ((5, 6), (5, 6))])
def test_which_bins_are_visible(causal: bool, strict: bool, window: int | None, rows: tuple, columns: tuple) -> None:
    i, j = np.arange(*rows)[:, None], np.arange(*columns)[None, :]
    reach = 10**9 if window is None else window
    seen = ((i - j >= int(strict)) & (i - j < reach)) if causal else np.abs(i - j) < reach
    oracle = pool(np.where(seen, 1.0, np.nan), 7, 6)
    found = visible_bins(rows, columns, 7, 6, causal=causal, strict=strict, window=window)
    np.testing.assert_array_equal(found, np.isfinite(oracle))


def test_a_mosaic_of_ragged_lines() -> None:
    one, two = np.full((2, 2), 3, np.uint8), np.array([[1, 2], [3, 4]], np.uint8)
    picture = mosaic([[one], [one, two]], 4)
    assert picture.shape == (8, 8)
    assert (picture[:4, 4:] == LEVELS).all() and (picture[:4, :4] == 3).all()
    assert picture[4:, 4:].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_a_picture_needs_cells() -> None:
    with pytest.raises(ValueError, match="not empty"):
        to_png(np.zeros((0, 3), np.uint8), "sequential-light")
    with pytest.raises(ValueError, match="float64"):
        to_png(np.zeros((3, 3)), "sequential-light")
