"""What all figures share: token axes, pictures on exact numeric axes, colour bars, and the meta that links figures.

Every figure states in `layout.meta` what its axes stand for, so that the page can mark hovered and pinned tokens on it
and knows what a click means:

    x, y     {role, origin, size}: role is "query", "key", "token", "position" or another word without a link; index i
             of the axis covers [i + origin, i + origin + 1); size is the number of indices
             of the axis covers [i + origin, i + origin + 1); size is the number of indices; tokens, if there, has for each index
             the first token of the open run there, or a negative number where only the other run has one
    click    "pattern" | "tile" | "token" | "position" | "track" | "depth" | "choose", or absent; "choose" sets what
             choices {x: [changes], y: [changes]} has for the column and the row
    zoom     {x, y}: the view keys that a dragged rectangle sets (y may be absent), or absent
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
MOST_POINTS = 4096
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
    if token in GLYPHS:
        return GLYPHS[token]
    return "".join(GLYPHS.get(c, c) if c != " " and (c.isprintable() or c in GLYPHS) else _escaped(c) for c in token)


def _escaped(character: str) -> str:
    return " " if character == " " else f"\\x{ord(character):02x}"


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


def short_number(value: float) -> str:
    """A number for a colour bar: two significant digits are enough to read a colour."""
    text = f"{value:.2g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.0e}"
    return text.replace("-", "−")


def ticks(axis: Axis, start: int, stop: int, most: int = 48) -> dict[str, Any]:
    """Plotly tick settings for indices start..stop of an axis whose cells are centred at index + 0.5."""
    count = stop - start
    if axis.labels is not None and count <= most:
        places = list(range(start, stop))
        texts = [plain_label(visible_text(axis.labels[index])) for index in places]
        font = {"family": MONO, "size": 10 if count > 30 else 11}
        return {"tickvals": [p + 0.5 for p in places], "ticktext": texts, "tickangle": 0, "tickfont": font, "ticks": ""}
    places_wanted = 9 if stop <= 1000 else 5
    step = next(s * 10**power for power in range(9) for s in (1, 2, 5) if count / (s * 10**power) <= places_wanted)
    places = [index for index in range(start, stop) if index % step == 0]
    return {"tickvals": [p + 0.5 for p in places], "ticktext": [str(p) for p in places], "tickangle": 0}


def left_margin(axis: Axis, start: int, stop: int, most: int = 48) -> int:
    """Pixels left of a picture for the title and what `ticks` writes there: words are wider than numbers."""
    words = axis.labels[start:stop] if axis.labels is not None and stop - start <= most else []
    longest = max((len(visible_text(word)) for word in words), default=0)
    return max(58, min(34 + 7 * longest, 150))


def colour_bar(colours: Colours) -> go.Scatter:
    """A trace without points that carries the colour bar; its labels are true values even on a bent scale."""
    fractions = [-1.0, -0.5, 0.0, 0.5, 1.0] if colours.signed else [0.0, 0.25, 0.5, 0.75, 1.0]
    scale = "linear" if colours.scale == "row" else colours.scale
    labels = [short_number(value_at_fraction(f, colours.limit, scale)) for f in fractions]
    if scale == "log":
        labels[2 if colours.signed else 0] = "≈0"
    bar = {
        "orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "ypad": 2, "xpad": 0,
        "lenmode": "pixels", "len": 220, "thickness": 8, "outlinewidth": 0, "tickvals": fractions, "ticktext": labels,
        "ticklen": 3, "ticks": "outside", "tickfont": {"size": 10.5}, "tickangle": 0,
        "title": {"text": f"{colours.unit}, {SCALE_WORDS[colours.scale]}", "side": "top", "font": {"size": 11}},
    }  # fmt: skip
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
    links = {
        "panel": panel, "value": True, "x": {"role": x_axis.role, "origin": 0, "size": x_axis.size},
        "y": {"role": y_axis.role, "origin": 0, "size": y_axis.size}, **(meta or {}),
    }  # fmt: skip
    figure.update_layout(
        template=template(theme.name), xaxis=x_settings, yaxis=y_settings, plot_bgcolor=theme.sunken, meta=links,
        hoveranywhere=True, clickanywhere=True, dragmode="zoom" if "zoom" in links else False,
        margin={"l": left_margin(y_axis, *rows), "r": 16, "t": 54, "b": 46, "autoexpand": False},
    )  # fmt: skip
    if "zoom" not in links:
        figure.update_xaxes(fixedrange=True)
        figure.update_yaxes(fixedrange=True)
    return figure


def extremes(values: np.ndarray, stretch: int) -> np.ndarray:
    """Positions of the smallest and the largest value of every `stretch` consecutive ones: int64, ascending.

    `values` [pos] may hold nan; a stretch of nothing but nan keeps its first position, so that a line still breaks there.
    """
    if stretch <= 1:
        return np.arange(len(values))
    kept: set[int] = set()
    for start in range(0, len(values), stretch):
        part = values[start : start + stretch]
        if np.isnan(part).all():
            kept.add(start)
        else:
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    return np.array(sorted(kept), dtype=np.int64)


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
    ranks: Sequence[int] | None = None,
) -> go.Figure:
    """Lines over tokens, one per (name, values [pos]); `selected` is drawn strong, the others faint.

    Values go to the browser exactly; hovering shows the token and the number. nan leaves a gap. A text longer than
    `MOST_POINTS` tokens is thinned to the extremes of each stretch of tokens, so that no spike is lost.
    """
    figure = go.Figure()
    stretch = -(-len(tokens) // (MOST_POINTS // 2)) if len(tokens) > MOST_POINTS else 1
    if stretch > 1:
        x_title = f"{x_title} (smallest and largest of every {stretch})"
    for index, (name, values) in enumerate(series):
        kept = extremes(np.asarray(values), stretch)
        labels = [plain_label(token_label(tokens, place)) for place in kept.tolist()]
        strong = selected is None or index == selected
        colour = colours[index] if colours else theme.categorical[index % 8]
        figure.add_scatter(
            x=kept, y=np.asarray(values)[kept], name=plain_label(name), mode="lines", text=labels,
            line={"color": colour, "width": 2.2 if strong else 1.2, "dash": dashes[index] if dashes else "solid"},
            opacity=1.0 if strong else 0.45, legendrank=ranks[index] if ranks else index,
            hovertemplate="token %{text}<br>%{y:.5g}<extra>%{fullData.name}</extra>",
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
