from __future__ import annotations

import numpy as np
import pytest

from app.dashboard import _colour_variables
from app.theme import (
    LEVELS,
    TABLE_NAMES,
    THEMES,
    Theme,
    colour_scale,
    colour_table,
    contrast,
    hex_to_rgb,
    readable_on,
    template,
)
from app.theme import relative_luminance as luminance


def luminances(name: str) -> np.ndarray:
    return np.array([luminance("#{:02x}{:02x}{:02x}".format(*row)) for row in colour_table(name).tolist()])


def test_contrast_agrees_with_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # the well-known grey that just fails


@pytest.mark.parametrize("theme", THEMES.values(), ids=lambda theme: theme.name)
def test_text_can_be_read_on_every_ground(theme: Theme) -> None:
    for ground in (theme.page, theme.surface, theme.sunken):
        for ink in (theme.text, theme.dim, theme.accent, theme.good, theme.warning, theme.bad):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert contrast(theme.surface, theme.text) >= 4.5  # the readout and the pinned token are inverted
    assert contrast(theme.surface, theme.accent) >= 4.5


@pytest.mark.parametrize("theme", THEMES.values(), ids=lambda theme: theme.name)
def test_lines_stand_out_from_the_ground(theme: Theme) -> None:
    assert len(theme.categorical) == 8 and len(set(theme.categorical)) == 8
    for colour in theme.categorical:
        assert contrast(colour, theme.surface) >= 2.0, colour
        assert contrast(readable_on(colour), colour) >= 4.5, colour


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_the_colour_bar_is_the_table_of_the_pictures(name: str) -> None:
    table, scale = colour_table(name), colour_scale(name)
    assert table.shape == (LEVELS, 3) and len(scale) == LEVELS
    assert [place for place, _ in scale] == [level / (LEVELS - 1) for level in range(LEVELS)]
    assert [colour for _, colour in scale] == [f"rgb({r},{g},{b})" for r, g, b in table.tolist()]


@pytest.mark.parametrize("name", ["sequential-light", "sequential-dark", "wash-light", "wash-dark"])
def test_a_sequential_table_goes_one_way_in_lightness(name: str) -> None:
    steps = np.diff(luminances(name))
    # Rounding to 8 bits can undo a step by less than one level.
    assert (steps > -0.004).all() or (steps < 0.004).all()
    assert abs(luminances(name)[0] - luminances(name)[-1]) > 0.4


@pytest.mark.parametrize("name", ["diverging-light", "diverging-dark"])
def test_a_diverging_table_is_even_about_its_middle(name: str) -> None:
    found = luminances(name)
    middle = LEVELS // 2
    outward = found[middle:] - found[middle], found[middle::-1] - found[middle]
    for side in outward:
        assert (np.diff(np.abs(side)) > -0.006).all()
    assert np.abs(outward[0] - outward[1]).max() < 0.16
    assert np.ptp(np.asarray(colour_table(name)[middle], dtype=int)) <= 13  # zero has no hue


def test_zero_of_coloured_text_is_the_panel_itself() -> None:
    for theme in THEMES.values():
        assert tuple(colour_table(theme.wash_name(False))[0].tolist()) == hex_to_rgb(theme.surface)


def test_styles_and_figures_use_the_same_colours() -> None:
    for theme in THEMES.values():
        assert f"--wb-surface: {theme.surface};" in _colour_variables()
        assert template(theme.name).layout.paper_bgcolor == theme.surface


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="jet"):
        colour_table("jet")
