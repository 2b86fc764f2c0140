"""Figures of the Compare page: heads of two runs against each other, and what both expect next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import MONO, plain_label, visible_text
from app.theme import MARKERS, Theme, template


def score_scatter(
    names: Sequence[str],
    values: np.ndarray,
    layers: Sequence[int],
    chosen: int | None,
    theme: Theme,
    *,
    panel: str,
    titles: tuple[str, str],
) -> go.Figure:
    """One point per pair of heads, `values` [pair, 2]; a marker for each layer of A, a ring around the chosen pair, the diagonal dotted."""
    figure = go.Figure()
    finite = values[np.isfinite(values).all(axis=1)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.06 * (high - low or 1.0)
    ends = [low - room, high + room]
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": theme.dim, "dash": "dot", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    for index, layer in enumerate(dict.fromkeys(layers)):
        places = [i for i, each in enumerate(layers) if each == layer]
        figure.add_scatter(
            x=values[places, 0], y=values[places, 1], mode="markers", name=f"layer {layer}", text=[plain_label(names[i]) for i in places],
            marker={"size": 9, "symbol": MARKERS[index % 8], "color": theme.categorical[index % 8]},
            hovertemplate="%{text}<br>A %{x:.4g}<br>B %{y:.4g}<extra></extra>",
        )  # fmt: skip
    if chosen is not None:
        figure.add_scatter(
            x=values[chosen : chosen + 1, 0], y=values[chosen : chosen + 1, 1], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"size": 17, "symbol": "circle-open", "color": theme.text, "line": {"width": 2}},
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, hovermode="closest", showlegend=len(set(layers)) > 1,
        xaxis={"title": {"text": titles[0]}, "fixedrange": True, "range": ends},
        yaxis={"title": {"text": titles[1]}, "fixedrange": True, "range": ends},
    )  # fmt: skip
    return figure


def paired_bars(
    labels: Sequence[str], values: np.ndarray, names: tuple[str, str], theme: Theme, *, panel: str
) -> go.Figure:
    """Probabilities of some tokens by two models, `values` [token, 2], the likeliest on top; nan where one is not known."""
    places = np.arange(len(labels))
    shown = [plain_label(visible_text(label)) for label in labels]
    figure = go.Figure()
    for side, name in enumerate(names):
        figure.add_bar(
            x=values[:, side], y=places, orientation="h", name=plain_label(name), customdata=shown,
            marker={"color": theme.categorical[side], "pattern": {"shape": "" if side == 0 else "/"}},
            hovertemplate="‘%{customdata}’<br>probability %{x:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, barmode="group", bargap=0.25, hovermode="closest",
        margin={"t": 38},
        xaxis={"title": {"text": "probability"}, "fixedrange": True, "rangemode": "tozero", "tickformat": ".0%"},
        yaxis={"tickvals": places, "ticktext": shown, "range": [len(labels) - 0.5, -0.5], "fixedrange": True, "ticks": "",
               "showgrid": False, "tickfont": {"family": MONO, "size": 13, "color": theme.text}},
    )  # fmt: skip
    return figure
