"""What all figures share: token axes, pictures on exact numeric axes, colour bars, and the meta that links figures.

Every figure states in `layout.meta` what its axes stand for, so that the page can mark hovered and pinned tokens on it
and knows what a click means:

    x, y     {role, origin, size}: role is "query", "key", "token", "position" or another word without a link; index i
             of the axis covers [i + origin, i + origin + 1); size is the number of indices
    click    "pattern" | "tile" | "token" | "position" | "track", or absent
    zoom     {x, y}: the view keys that a dragged rectangle sets, or absent
    panel    the panel that draws the figure; value is true when the exact value under the pointer can be asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.render import value_at_fraction
from app.theme import Theme, colour_scale, template

GLYPHS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "": "∅"}
MONO = "JetBrains Mono Variable, monospace"
SCALE_WORDS = {
    "linear": "linear colour", "sqrt": "square-root colour", "log": "logarithmic colour", "row": "share of row maximum",
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One axis of a picture: title, number of indices, what they stand for, and their labels if they have any."""

    title: str
    size: int
    role: str = ""
    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class Colours:
    """How values become colours: the table's name, the largest magnitude, the scale, the sign, the unit in words."""

    table: str
    limit: float
    scale: str
    signed: bool
    unit: str


def visible_text(token: str) -> str:
    """The token as it is drawn: stand-ins for white space, nothing else changed."""
    return GLYPHS.get(token) or token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def plain_label(text: str) -> str:
    """The text, safe in a plotly label: plotly reads `<b>`, `<a href>` and entities, and a token may contain them."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def token_label(tokens: Sequence[str], index: int) -> str:
    """`12 ‘a’`: position and text of a token, unescaped."""
    return f"{index} ‘{visible_text(tokens[index])}’"


def number(value: float) -> str:
    """A number in at most four significant digits, with a real minus sign; `–` for nan."""
    if np.isnan(value):
        return "–"
    if value == 0:
        return "0"
    text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
    return text.replace("-", "−") if text.startswith("-") else text


def ticks(axis: Axis, start: int, stop: int, most: int = 48) -> dict[str, Any]:
    """Plotly tick settings for indices start..stop of an axis whose cells are centred at index + 0.5."""
    count = stop - start
    if axis.labels is not None and count <= most:
        places = list(range(start, stop))
        texts = [plain_label(visible_text(axis.labels[index])) for index in places]
        font = {"family": MONO, "size": 10 if count > 30 else 11}
        return {"tickvals": [p + 0.5 for p in places], "ticktext": texts, "tickangle": 0, "tickfont": font, "ticks": ""}
    step = next(s * 10**power for power in range(9) for s in (1, 2, 5) if count / (s * 10**power) <= 9)
    places = [index for index in range(start, stop) if index % step == 0]
    return {"tickvals": [p + 0.5 for p in places], "ticktext": [str(p) for p in places], "tickangle": 0}


def colour_bar(colours: Colours, *, right: bool = True) -> go.Scatter:
    """A trace without points that carries the colour bar; its labels are true values even on a bent scale."""
    fractions = [-1.0, -0.5, 0.0, 0.5, 1.0] if colours.signed else [0.0, 0.25, 0.5, 0.75, 1.0]
    scale = "linear" if colours.scale == "row" else colours.scale
    labels = [number(value_at_fraction(f, colours.limit, scale)) for f in fractions]
    if scale == "log":
        labels[2 if colours.signed else 0] = "≈0"
    bar = {
        "thickness": 10, "len": 0.92, "y": 0.5, "x": 1.01, "xpad": 6, "outlinewidth": 0, "tickvals": fractions,
        "ticktext": labels, "ticklen": 3, "ticks": "outside", "tickfont": {"size": 10.5},
        "title": {"text": f"{colours.unit}, {SCALE_WORDS[colours.scale]}", "side": "right", "font": {"size": 11}},
    }  # fmt: skip
    if not right:
        bar |= {"orientation": "h", "y": 1.02, "x": 0.5, "yanchor": "bottom", "len": 0.7}
    return go.Scatter(
        x=[None], y=[None], mode="markers", hoverinfo="skip", showlegend=False,
        marker={
            "color": [0], "cmin": -1 if colours.signed else 0, "cmax": 1, "colorscale": colour_scale(colours.table),
            "showscale": True, "colorbar": bar,
        },
    )  # fmt: skip


def picture(
    source: str,
    x_axis: Axis,
    y_axis: Axis,
    columns: tuple[int, int],
    rows: tuple[int, int],
    colours: Colours,
    theme: Theme,
    *,
    panel: str,
    meta: Mapping[str, Any] | None = None,
    square: bool = False,
    columns_on_top: bool = False,
) -> go.Figure:
    """A server-drawn picture on exact numeric axes: cell (row i, column j) covers [j, j + 1) × [i, i + 1), row 0 first.

    `source` is the address of the PNG of exactly `rows` × `columns`.
    """
    figure = go.Figure([colour_bar(colours)])
    figure.add_layout_image(
        source=source, xref="x", yref="y", x=columns[0], y=rows[0], sizex=columns[1] - columns[0],
        sizey=rows[1] - rows[0], sizing="stretch", layer="below", xanchor="left", yanchor="top",
    )  # fmt: skip
    x_settings = {"range": list(columns), "showgrid": False, "title": {"text": x_axis.title}, **ticks(x_axis, *columns)}
    if columns_on_top:
        x_settings["side"] = "top"
    y_settings = {"range": [rows[1], rows[0]], "showgrid": False, "title": {"text": y_axis.title}}
    y_settings |= ticks(y_axis, *rows)
    if square:
        y_settings |= {"scaleanchor": "x", "scaleratio": 1, "constrain": "domain", "constraintoward": "top"}
        x_settings |= {"constrain": "domain", "constraintoward": "left"}
    links = {
        "panel": panel, "value": True, "x": {"role": x_axis.role, "origin": 0, "size": x_axis.size},
        "y": {"role": y_axis.role, "origin": 0, "size": y_axis.size}, **(meta or {}),
    }  # fmt: skip
    figure.update_layout(
        template=template(theme.name), xaxis=x_settings, yaxis=y_settings, plot_bgcolor=theme.sunken, meta=links,
        hoveranywhere=True, clickanywhere=True, dragmode="zoom" if "zoom" in links else False,
        margin={"l": 52, "r": 12, "t": 36 if columns_on_top else 10, "b": 12 if columns_on_top else 44},
    )  # fmt: skip
    if "zoom" not in links:
        figure.update_xaxes(fixedrange=True)
        figure.update_yaxes(fixedrange=True)
    return figure


def token_lines(
    series: Sequence[tuple[str, np.ndarray]],
    tokens: Sequence[str],
    theme: Theme,
    *,
    y_title: str,
    panel: str,
    role: str = "token",
    click: str = "token",
    selected: int | None = None,
    x_title: str = "token",
    from_zero: bool = False,
    colours: Sequence[str] | None = None,
    dashes: Sequence[str] | None = None,
) -> go.Figure:
    """Lines over tokens, one per (name, values [pos]); `selected` is drawn strong, the others faint.

    Values go to the browser exactly; hovering shows the token and the number. nan leaves a gap.
    """
    figure = go.Figure()
    labels = [plain_label(token_label(tokens, index)) for index in range(len(tokens))]
    for index, (name, values) in enumerate(series):
        strong = selected is None or index == selected
        colour = colours[index] if colours else theme.categorical[index % 8]
        figure.add_scatter(
            x=np.arange(len(values)), y=np.asarray(values), name=plain_label(name), mode="lines", text=labels,
            line={"color": colour, "width": 2.2 if strong else 1.2, "dash": dashes[index] if dashes else "solid"},
            opacity=1.0 if strong else 0.45, hovertemplate="token %{text}<br>%{y:.5g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    axis = Axis(x_title, len(tokens), role, tokens)
    x_ticks = ticks(axis, 0, len(tokens))
    x_ticks["tickvals"] = [place - 0.5 for place in x_ticks["tickvals"]]
    figure.update_layout(
        template=template(theme.name), hovermode="closest", showlegend=len(series) > 1, hoverdistance=40,
        meta={"panel": panel, "click": click, "x": {"role": role, "origin": -0.5, "size": len(tokens)}},
        xaxis={"range": [-0.5, len(tokens) - 0.5], "title": {"text": x_title}, "fixedrange": True, "showgrid": False},
        yaxis={"title": {"text": y_title}, "fixedrange": True, "rangemode": "tozero" if from_zero else "normal"},
    )  # fmt: skip
    figure.update_xaxes(**x_ticks)
    return figure
