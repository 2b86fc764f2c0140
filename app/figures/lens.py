"""Figures of the Lens page: predictions by depth and token, curves by depth, and a logit difference by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import MONO, Axis, Colours, number, picture, plain_label, ticks, visible_text
from app.theme import MARKERS, Theme, colour_scale, template

Span = tuple[int, int]
LETTER = 0.62
"""Width of a letter of the monospaced face, in its size."""
MOST_LABELS = 192
"""Tokens whose texts stand under a grid that shows texts."""
MARGIN = 74
"""Pixels beside a grid, for the names of the depths."""


def depth_label(name: str) -> str:
    """`embed`, `0`, `1·2` (layer 1, step 2) for the name of a depth."""
    if name == "embedding":
        return "embed"
    return name.removeprefix("layer ").replace(", step ", "·")


def lens_grid(
    source: str,
    tokens: Sequence[str],
    depths: Sequence[str],
    columns: Span,
    words: Sequence[Sequence[str]] | None,
    inks: Sequence[Sequence[str]] | None,
    wide: int,
    colours: Colours,
    theme: Theme,
    *,
    panel: str,
) -> go.Figure:
    """One row per depth (the embedding on top), one column per token in view; each cell says what is most likely next there.

    `words` and `inks` [depth, column]: the texts and their colours, or None where they would be too small to read; `wide`: pixels for a
    cell. Click pins a cell, dragging zooms in on tokens.
    """
    figure = picture(
        source, Axis("token", len(tokens), "query", tokens), Axis("after layer", len(depths), "depth"), columns, (0, len(depths)),
        colours, theme, panel=panel, meta={"click": "depth", "zoom": {"x": "cols"}},
    )  # fmt: skip
    step = max(1, -(-len(depths) // 24))
    places = [*range(0, len(depths) - 1, step), len(depths) - 1]
    figure.update_yaxes(
        tickvals=[p + 0.5 for p in places],
        ticktext=[depth_label(depths[p]) for p in places],
        fixedrange=True,
    )
    figure.update_layout(margin={"l": MARGIN - 16, "r": 16, "t": 54, "b": 46, "autoexpand": False})
    if words is not None and inks is not None:
        figure.update_xaxes(**ticks(Axis("token", len(tokens), "query", tokens), *columns, most=MOST_LABELS))
        size = max(7, min(12, int(wide / LETTER)))
        letters = max(1, int(wide / (LETTER * size)))
        cells = [(row, column) for row in range(len(depths)) for column in range(columns[1] - columns[0])]
        figure.add_scatter(
            x=[columns[0] + column + 0.5 for _, column in cells], y=[row + 0.5 for row, _ in cells], mode="text", hoverinfo="skip",
            text=[plain_label(visible_text(words[row][column])[:letters]) for row, column in cells], showlegend=False,
            textfont={"family": MONO, "size": size, "color": [inks[row][column] for row, column in cells]},
        )  # fmt: skip
    return figure


def depth_lines(
    series: Sequence[tuple[str, Sequence[str], np.ndarray]],
    theme: Theme,
    *,
    panel: str,
    title: str,
    whole: Sequence[str] = (),
) -> go.Figure:
    """A number by depth: one line for each (name, names of its depths, values). `whole`: all depths, if a series lacks the last."""
    figure = go.Figure()
    longest = list(whole) or max((list(names) for _, names, _ in series), key=len)
    for index, (name, depths, values) in enumerate(series):
        figure.add_scatter(
            x=list(range(len(depths))), y=values, mode="lines+markers", name=plain_label(name),
            text=[plain_label(each) for each in depths],
            line={"color": theme.categorical[index % 8], "dash": ("solid", "dash", "dot", "dashdot")[index % 4], "width": 2},
            marker={"symbol": MARKERS[index % 8], "size": 7}, hovertemplate="after %{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    step = max(1, -(-len(longest) // 14))
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=len(series) > 1, hovermode="closest",
        xaxis={"title": {"text": "after layer"}, "fixedrange": True, "tickvals": list(range(0, len(longest), step)),
               "ticktext": [depth_label(name) for name in longest[::step]]},
        yaxis={"title": {"text": title}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def component_bars(labels: Sequence[str], values: np.ndarray, theme: Theme, *, panel: str, title: str) -> go.Figure:
    """Signed contributions as bars in the order given, the first on top, each with its number."""
    places = list(range(len(values)))
    figure = go.Figure(go.Bar(
        x=values, y=places, orientation="h", text=[number(float(value)) for value in values], textposition="outside", cliponaxis=False,
        textfont={"size": 10.5, "color": theme.dim}, customdata=[plain_label(label) for label in labels],
        marker={"color": [theme.categorical[0] if value >= 0 else theme.categorical[1] for value in values]},
        hovertemplate="%{customdata}<br>%{x:.6g}<extra></extra>",
    ))  # fmt: skip
    low, high = min(0.0, float(values.min(initial=0))), max(0.0, float(values.max(initial=0)))
    room = 0.24 * (high - low or 1.0)
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, bargap=0.22, hovermode="closest", showlegend=False,
        xaxis={"title": {"text": title}, "fixedrange": True, "range": [low - room, high + room], "zeroline": True,
               "zerolinecolor": theme.dim},
        yaxis={"tickvals": places, "ticktext": [plain_label(label) for label in labels], "range": [len(places) - 0.4, -0.6],
               "fixedrange": True, "ticks": "", "showgrid": False},
    )  # fmt: skip
    return figure


def head_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], theme: Theme, *, panel: str, unit: str,
    choices: Mapping[str, Sequence[Mapping[str, Any]]], x_title: str = "head", y_title: str = "layer",
    texts: bool = True,
) -> go.Figure:  # fmt: skip
    """Signed values [row, column] as cells, nan where there is none.

    `choices` says what a click changes, `texts` whether numbers stand in the cells where there is room.
    """
    limit = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    show = texts and values.size <= 400
    figure = go.Figure(go.Heatmap(
        z=values, x=[c + 0.5 for c in range(len(columns))], y=[r + 0.5 for r in range(len(rows))], zmin=-limit, zmax=limit,
        colorscale=colour_scale(theme.table_name(True)), xgap=1, ygap=1, hoverongaps=False,
        text=[["" if np.isnan(v) else number(round(float(v), 3)) for v in row] for row in values] if show else None,
        texttemplate="%{text}" if show else None,
        colorbar={"title": {"text": unit, "side": "top"}, "thickness": 10, "outlinewidth": 0},
        hovertext=[[f"{y_title} {r}, {x_title} {c}" for c in columns] for r in rows],
        hovertemplate="%{hovertext}<br>%{z:.5g}<extra></extra>",
    ))  # fmt: skip
    across, down = max(1, -(-len(columns) // 24)), max(1, -(-len(rows) // 24))
    figure.update_layout(
        template=template(theme.name), clickanywhere=True, plot_bgcolor=theme.sunken,
        meta={"panel": panel, "click": "choose", "choices": dict(choices), "x": {"role": "choice", "origin": 0, "size": len(columns)},
              "y": {"role": "choice", "origin": 0, "size": len(rows)}},
        xaxis={"title": {"text": x_title}, "fixedrange": True, "showgrid": False, "ticks": "", "range": [0, len(columns)],
               "tickvals": [c + 0.5 for c in range(0, len(columns), across)], "ticktext": list(columns)[::across]},
        yaxis={"title": {"text": y_title}, "fixedrange": True, "showgrid": False, "ticks": "", "range": [len(rows), 0],
               "tickvals": [r + 0.5 for r in range(0, len(rows), down)], "ticktext": list(rows)[::down]},
    )  # fmt: skip
    return figure
