"""Colours of the dashboard: one table of 255 colours per scale, shared by the PNG renderer and the plotly colour bars.

Sequential: Cividis, made for readers with colour-vision deficiency (Nunez, Anderton & Renslow 2018, PLOS ONE 13(7)); on a
dark page its blue end is darker, so that a map full of zeros does not glow.
Wash: for coloured text, where zero is the page itself.
Diverging: always drawn symmetric about zero. On a light page the middle is near white, on a dark page near black, so
zero recedes on both. Categorical: the eight colours of Okabe & Ito (2008).

A colour table has 255 rows. Level 255 of a picture is left over for masked cells and is transparent, so a masked cell
never looks like a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go

LEVELS = 255
"""Number of colours in a table; picture level 255 means masked."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D00", "#000000")
"""Categorical colours; the yellow of the original set is darkened, since pure yellow lines vanish on white."""

MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
"""Marker shapes that accompany the categorical colours, so that no series is told apart by colour alone."""

_ANCHORS = {
    "sequential-light": (
        "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
    ),
    "sequential-dark": (
        "#060f20", "#0f2a57", "#33446b", "#545b6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
    ),
    "diverging-light": (
        "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b",
        "#67001f",
    ),
    "diverging-dark": (
        "#b5d8f7", "#7fb8ea", "#4a92d0", "#2e6496", "#243f5c", "#22272f", "#5a3a2c", "#934f2c", "#c9722f", "#f09c4f",
        "#ffcf96",
    ),
    "wash-light": ("#ffffff", "#fdebc8", "#f8c573", "#e58a2c", "#b5490c", "#6b1f04"),
    "wash-dark": ("#161b22", "#3b2f1d", "#7a5320", "#c07c22", "#f0b44c", "#fff0c2"),
}  # fmt: skip
TABLE_NAMES = tuple(_ANCHORS)


@dataclass(frozen=True)
class Theme:
    """Colours of one scheme. All are `#rrggbb`; `categorical` has eight, in a fixed order."""

    name: str
    page: str
    surface: str
    sunken: str
    border: str
    grid: str
    text: str
    dim: str
    accent: str
    good: str
    warning: str
    bad: str
    categorical: tuple[str, ...]

    def table_name(self, signed: bool) -> str:
        """Name of the colour table of pictures with signed or with nonnegative values."""
        return f"{'diverging' if signed else 'sequential'}-{self.name}"

    def wash_name(self, signed: bool) -> str:
        """Name of the colour table of coloured text."""
        return f"{'diverging' if signed else 'wash'}-{self.name}"


LIGHT = Theme(
    name="light", page="#f5f6f8", surface="#ffffff", sunken="#eceef2", border="#dfe3e9", grid="#e8ebf0",
    text="#18202b", dim="#56606e", accent="#2458c5", good="#0b7a55", warning="#8f5a00", bad="#b3261e",
    categorical=OKABE_ITO,
)  # fmt: skip
DARK = Theme(
    name="dark", page="#0e1217", surface="#161b22", sunken="#1d242d", border="#2a323d", grid="#252d38",
    text="#e7ebf1", dim="#9ca8b7", accent="#86aefc", good="#4cc79a", warning="#e8b04a", bad="#ff8f85",
    categorical=("#4FA8E0", "#F0854A", "#2CC295", "#E3A3C8", "#F2BC4B", "#8ED1F5", "#D0B95A", "#F2F4F7"),
)  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}

MANTINE_DARK = ("#e7ebf1", "#c5cdd8", "#9ca8b7", "#6c7888", "#3a4452", "#2a323d", "#1d242d", "#161b22", "#12171d", "#0e1217")
"""Mantine's ten dark greys, lightest first, in the tones of the dark scheme."""
MANTINE_ACCENT = (
    "#eaf1fe", "#d0e0fc", "#a9c6fb", "#86aefc", "#5f8ff0", "#3f73e0", "#2f63d2", "#2458c5", "#1d4aa8", "#173d8c",
)  # fmt: skip

FAMILY_COLOURS = {
    "attention": 0, "retention": 2, "linear": 2, "mamba": 1, "mamba2": 1, "ssm": 1, "delta": 4, "rwkv": 5, "bdh": 3,
    "rg_lru": 1, "conv": 5,
}  # fmt: skip
"""Which categorical colour a kind of block wears, in the diagram and in badges."""


def theme_called(name: str | None) -> Theme:
    """The scheme of that name; the light one for anything unknown."""
    return THEMES.get(name or "light", LIGHT)


def hex_to_rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as three integers 0..255. Raises ValueError for any other form."""
    if len(colour) != 7 or colour[0] != "#":
        raise ValueError(f"a colour is written #rrggbb, not {colour!r}")
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@cache
def colour_table(name: str) -> np.ndarray:
    """The table of that name: uint8 (255 levels, 3 channels), linear in sRGB between its anchors.

    Raises ValueError for an unknown name.
    """
    if name not in _ANCHORS:
        raise ValueError(f"no colour table is called {name!r}; there are {', '.join(TABLE_NAMES)}")
    anchors = np.array([hex_to_rgb(colour) for colour in _ANCHORS[name]], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    table = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    table.setflags(write=False)
    return table


@cache
def colour_scale(name: str) -> list[tuple[float, str]]:
    """The same table as a plotly colour scale: (fraction, colour) pairs, one per level."""
    return [
        (level / (LEVELS - 1), f"rgb({red},{green},{blue})")
        for level, (red, green, blue) in enumerate(colour_table(name).tolist())
    ]


def relative_luminance(colour: str) -> float:
    """Relative luminance 0..1 of WCAG 2.1."""
    channels = [value / 255 for value in hex_to_rgb(colour)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio 1..21 of WCAG 2.1; text needs 4.5."""
    low, high = sorted((relative_luminance(one), relative_luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable_on(background: str) -> str:
    """Near-black or white, whichever reads better on the background."""
    return max(("#10151c", "#ffffff"), key=lambda text: contrast(text, background))


def colours_of(levels: np.ndarray, table: str) -> list[str]:
    """`#rrggbb` of each level of a 1-D uint8 array; an empty string where the level is masked."""
    rows = colour_table(table)
    return ["" if level == LEVELS else "#{:02x}{:02x}{:02x}".format(*rows[level].tolist()) for level in levels.tolist()]


@cache
def template(name: str) -> go.layout.Template:
    """The plotly template of the light or dark scheme."""
    theme = THEMES[name]
    axis: dict[str, Any] = {
        "gridcolor": theme.grid, "zerolinecolor": theme.border, "linecolor": theme.border, "tickcolor": theme.border,
        "ticks": "outside", "ticklen": 4, "automargin": True, "zeroline": False, "showline": False,
        "title": {"font": {"size": 12, "color": theme.dim}, "standoff": 9},
        "tickfont": {"size": 11, "color": theme.dim}, "exponentformat": "power",
    }  # fmt: skip
    # Only the vertical title must clear labels of unknown width.
    level = {**axis, "title": {"font": axis["title"]["font"]}}
    font = "Inter Variable, Inter, system-ui, sans-serif"
    return go.layout.Template(
        layout={
            "font": {"family": font, "size": 12, "color": theme.text},
            "paper_bgcolor": theme.surface, "plot_bgcolor": theme.surface, "colorway": list(theme.categorical),
            "margin": {"l": 56, "r": 16, "t": 12, "b": 44}, "xaxis": level, "yaxis": axis,
            "hoverlabel": {
                "bgcolor": theme.text, "bordercolor": theme.text,
                "font": {"family": font, "size": 12, "color": theme.surface},
            },
            "legend": {
                "orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0,
                "font": {"size": 11, "color": theme.dim}, "bgcolor": "rgba(0,0,0,0)",
            },
            "dragmode": False, "hovermode": "closest",
        }
    )  # fmt: skip
