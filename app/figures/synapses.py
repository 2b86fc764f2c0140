"""Figures of the Synapses page: synapses over time with the tokens that wrote them, and ranked bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import plain_label, token_label, token_lines
from app.theme import MARKERS, Theme, template


def synapse_lines(
    names: Sequence[str],
    traces: np.ndarray,
    written: np.ndarray,
    tokens: Sequence[str],
    theme: Theme,
    *,
    panel: str,
    title: str,
    share: float,
    last: int,
) -> go.Figure:
    """Synapses over time, `traces` [synapse, pos]; a marker where a token wrote at least `share` of the synapse's largest write.

    `written` [synapse, pos] is what each token wrote. The synapse number `last` is drawn strong.
    """
    figure = token_lines(
        list(zip(names, traces, strict=True)), tokens, theme, y_title=title, panel=panel,
        selected=last if len(names) > 1 else None, dashes=[("solid", "dash", "dot", "dashdot")[i % 4] for i in range(len(names))],
    )  # fmt: skip
    for index, (line, writes) in enumerate(zip(traces, written, strict=True)):
        places = np.flatnonzero(writes >= share * max(float(writes.max()), np.finfo(float).tiny))
        figure.add_scatter(
            x=places, y=line[places], mode="markers", showlegend=False, name=plain_label(names[index]),
            text=[plain_label(token_label(tokens, place)) for place in places.tolist()], customdata=writes[places],
            marker={"symbol": MARKERS[index % 8], "size": 7, "color": theme.categorical[index % 8]},
            hovertemplate="written by %{text}<br>y · |z| = %{customdata:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    return figure


def ranked_bars(
    labels: Sequence[str], values: np.ndarray, theme: Theme, *, panel: str, title: str, selected: int | None = None
) -> go.Figure:
    """Signed values as horizontal bars, the first on top; `selected` in the accent colour."""
    places = list(range(len(values)))
    figure = go.Figure(go.Bar(
        x=values, y=places, orientation="h", text=[plain_label(label) for label in labels], textposition="none",
        marker={"color": [theme.accent if i == selected else theme.categorical[0] for i in places]},
        hovertemplate="%{text}<br>%{x:.5g}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, bargap=0.25, hovermode="closest",
        xaxis={"title": {"text": title}, "fixedrange": True},
        yaxis={"tickvals": places, "ticktext": [plain_label(label) for label in labels], "autorange": "reversed", "fixedrange": True,
               "ticks": "", "showgrid": False},
    )  # fmt: skip
    return figure
