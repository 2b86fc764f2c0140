"""Arrays to pictures: values to 255 colour levels, levels to a palette PNG of a few kilobytes.

Pooling is `workbench.lab.pooling`; what is here starts from an array that is already at most as fine as the picture.
A cell that is nan is masked: it becomes the transparent level and never looks like a zero.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from app.theme import LEVELS, colour_table
from workbench.lab.pooling import bin_edges

LOG_DECADES = 4.0
"""The logarithmic colour scale spans this many powers of ten below the limit; anything smaller looks like zero."""


def colour_fraction(values: np.ndarray, limit: float, scale: str) -> np.ndarray:
    """Where values lie on the colour scale: −1..1, keeping their sign; nan stays nan. Any shape.

    `scale`: "linear", "sqrt" or "log". Values beyond ±limit are drawn as ±limit. Raises ValueError for another scale.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.clip(np.abs(np.asarray(values, dtype=np.float64)) / (limit if limit > 0 else 1.0), 0.0, 1.0)
        if scale == "sqrt":
            size = np.sqrt(size)
        elif scale == "log":
            size = np.where(np.isnan(size), np.nan, np.maximum(0.0, 1.0 + np.log10(size) / LOG_DECADES))
        elif scale != "linear":
            raise ValueError(f"a colour scale is linear, sqrt or log, not {scale!r}")
        return np.sign(values) * size


def value_at_fraction(fraction: float, limit: float, scale: str) -> float:
    """The value whose colour lies at `fraction` (−1..1): the inverse of `colour_fraction`, for colour bar labels."""
    size = abs(fraction)
    if scale == "sqrt":
        size = size**2
    elif scale == "log":
        size = 0.0 if size == 0 else 10 ** (LOG_DECADES * (size - 1.0))
    return float(np.sign(fraction) * size * limit)


def to_levels(values: np.ndarray, limit: float, scale: str, signed: bool) -> np.ndarray:
    """Colour levels: uint8 of the same shape, 0..254, or 255 where the value is nan.

    Signed values use the whole table symmetrically with zero at level 127; nonnegative ones start at level 0.
    """
    fraction = colour_fraction(values, limit, scale)
    place = (fraction + 1.0) / 2.0 if signed else np.maximum(fraction, 0.0)
    levels = np.rint(np.nan_to_num(place) * (LEVELS - 1)).astype(np.uint8)
    levels[np.isnan(fraction)] = LEVELS
    return levels


def share_of_row(values: np.ndarray) -> np.ndarray:
    """Each row of a 2-D array divided by its largest magnitude; a row of zeros stays zero, nan stays nan."""
    sizes = np.where(np.isnan(values), 0.0, np.abs(values))
    largest = sizes.max(axis=-1, keepdims=True)
    return values / np.where(largest > 0, largest, 1.0)


def to_png(levels: np.ndarray, table: str) -> bytes:
    """A palette PNG of the levels [row, column], one pixel per cell; the masked level is transparent."""
    if levels.ndim != 2 or levels.dtype != np.uint8 or 0 in levels.shape:
        raise ValueError(f"a picture is a uint8 array [row, column] that is not empty, not {levels.dtype} {levels.shape}")
    image = Image.fromarray(levels)
    image.putpalette([*colour_table(table).ravel().tolist(), 0, 0, 0])
    stream = io.BytesIO()
    image.save(stream, format="PNG", transparency=LEVELS, compress_level=6)
    return stream.getvalue()


def visible_bins(
    rows: tuple[int, int],
    columns: tuple[int, int],
    height: int,
    width: int,
    *,
    causal: bool,
    strict: bool,
    window: int | None,
) -> np.ndarray:
    """Which bins of a pooled pattern hold at least one cell that a row can see: bool [bin, bin].

    Rows and columns are half-open spans of positions, binned as `workbench.lab.pooling` bins them. A bin spans every
    distance query − key between its corners, so one comparison per bin decides.
    """
    top, left = rows[0] + bin_edges(rows[1] - rows[0], height), columns[0] + bin_edges(columns[1] - columns[0], width)
    largest = (top[1:] - 1)[:, None] - left[:-1][None, :]
    smallest = top[:-1][:, None] - (left[1:] - 1)[None, :]
    reach = np.iinfo(np.int64).max if window is None else window
    if causal:
        return (largest >= (1 if strict else 0)) & (smallest < reach)
    return (largest > -reach) & (smallest < reach)


def mosaic(tiles: list[list[np.ndarray]], size: int) -> np.ndarray:
    """Level pictures side by side: uint8 [rows · size, columns · size], masked where there is no tile.

    `tiles[row][column]` are uint8 arrays of any size; each is enlarged without smoothing to `size` × `size`. Rows may
    have different numbers of tiles.
    """
    columns = max((len(row) for row in tiles), default=0)
    if not columns:
        raise ValueError("a mosaic needs at least one tile")
    picture = np.full((len(tiles) * size, columns * size), LEVELS, dtype=np.uint8)
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            down = (np.arange(size) * tile.shape[0]) // size
            across = (np.arange(size) * tile.shape[1]) // size
            top, left = row * size, column * size
            picture[top : top + size, left : left + size] = tile[np.ix_(down, across)]
    return picture
