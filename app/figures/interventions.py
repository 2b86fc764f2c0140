"""Figures of interventions: changes with intervals beside matched random ones, predictions before and after, and patching grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import MONO, plain_label
from app.theme import MARKERS, Theme, colour_scale, template

MOST_LABELS = 48


def changes(
    labels: Sequence[str], found: np.ndarray, controls: Sequence[np.ndarray], theme: Theme, *, panel: str
) -> go.Figure:
    """Changes of some measures, the first on top: `found` [measure, 3] is value, low, high (nan: none); `controls` by measure [draw].

    Each measure has a row of its own for the random ones, every draw a point.
    """
    figure = go.Figure()
    figure.add_vline(x=0, line={"color": theme.dim, "dash": "dot"})
    places = np.arange(len(labels), dtype=float)
    for place, drawn in zip(places, controls, strict=True):
        figure.add_scatter(
            x=drawn, y=np.full(len(drawn), place + 0.22), mode="markers", name="matched random", showlegend=bool(place == 0),
            marker={"size": 7, "color": theme.categorical[1], "symbol": MARKERS[1], "opacity": 0.65},
            hovertemplate="random %{x:.4g}<extra></extra>",
        )  # fmt: skip
    value, low, high = found.T
    figure.add_scatter(
        x=value, y=places - 0.12, mode="markers", name="edited", text=[plain_label(label) for label in labels],
        marker={"size": 11, "color": theme.accent, "symbol": MARKERS[0]},
        error_x={"type": "data", "symmetric": False, "array": np.nan_to_num(high - value), "arrayminus": np.nan_to_num(value - low),
                 "color": theme.accent},
        hovertemplate="%{text}<br>%{x:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=True, hovermode="closest",
        xaxis={"title": {"text": "change (logits; loss: nats)"}, "fixedrange": True, "zeroline": False},
        yaxis={"tickvals": places.tolist(), "ticktext": [plain_label(label) for label in labels], "range": [len(labels) - 0.5, -0.5],
               "fixedrange": True, "ticks": "", "showgrid": False},
    )  # fmt: skip
    return figure


def before_after(labels: Sequence[str], found: np.ndarray, theme: Theme, *, panel: str) -> go.Figure:
    """Probabilities of next tokens before and after, `found` [token, 2], the likeliest on top."""
    figure = go.Figure()
    places = list(range(len(labels)))
    for column, (name, colour) in enumerate((("before", theme.dim), ("after", theme.accent))):
        figure.add_bar(
            x=found[:, column], y=places, orientation="h", name=name, marker={"color": colour}, text=[plain_label(each) for each in labels],
            textposition="none", hovertemplate="%{text}<br>%{x:.4f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, barmode="group", bargap=0.3, bargroupgap=0.08, showlegend=True,
        hovermode="closest", xaxis={"title": {"text": "probability"}, "fixedrange": True, "rangemode": "tozero"},
        yaxis={"tickvals": places, "ticktext": [plain_label(each) for each in labels], "autorange": "reversed", "fixedrange": True,
               "ticks": "", "showgrid": False, "tickfont": {"family": MONO}},
    )  # fmt: skip
    return figure


def patching_map(
    cells: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    marks: Sequence[str],
    theme: Theme,
    *,
    panel: str,
    x_title: str,
    meta: Mapping[str, Any],
) -> go.Figure:
    """A patching grid: `cells` [layer, column], `marks` under the columns; 0 nothing restored, 1 all; colours symmetric around 0.

    `meta["basket"]` says what a click adds to the basket of the Intervene page.
    """
    limit = float(np.nanmax(np.abs(cells), initial=0.0)) or 1.0
    figure = go.Figure(go.Heatmap(
        z=cells, x=list(range(len(columns))), y=list(range(len(rows))), zmin=-limit, zmax=limit, zmid=0,
        colorscale=colour_scale(theme.table_name(True)), xgap=1, ygap=1,
        text=[[plain_label(f"layer {row}, {column}") for column in columns] for row in rows],
        hovertemplate="%{text}<br>%{z:.4f}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "x": 1, "xanchor": "left", "xpad": 14,
                  "title": {"text": "restored", "side": "right"}},
    ))  # fmt: skip
    step = max(1, -(-len(columns) // MOST_LABELS))
    shown = list(range(0, len(columns), step))
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel, **meta}, margin={"l": 52, "r": 92, "t": 12, "b": 46, "autoexpand": False},
        xaxis={"tickvals": shown, "ticktext": [plain_label(marks[i]) for i in shown], "title": {"text": x_title}, "fixedrange": True,
               "ticks": "", "showgrid": False, "tickangle": 0, "tickfont": {"family": MONO, "size": 10},
               "range": [-0.5, len(columns) - 0.5]},
        yaxis={"tickvals": list(range(len(rows))), "ticktext": list(rows), "title": {"text": "layer"}, "fixedrange": True, "ticks": "",
               "showgrid": False, "zeroline": False},
    )  # fmt: skip
    figure.update_xaxes(zeroline=False)
    return figure
