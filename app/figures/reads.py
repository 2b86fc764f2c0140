"""Figures of the Reads page: what is read by layer, head and past token, and which neurons match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture, plain_label
from app.figures.synapses import ranked_bars
from app.theme import Theme, template


def read_map(
    source: str, tokens: Sequence[str], heads: Sequence[tuple[int, int]], columns: tuple[int, int], colours: Colours, theme: Theme, *,
    panel: str,
) -> go.Figure:  # fmt: skip
    """One row per (layer, head) of `heads`, one column per past token; a click chooses both, dragging zooms in on tokens."""
    choices = {
        "x": [{"k": place} for place in range(len(tokens))],
        "y": [{"layer": layer or None, "head": head or None} for layer, head in heads],
    }
    names = [f"{layer}·{head}" for layer, head in heads]
    return picture(
        source, Axis("token that is read", len(tokens), "key", tokens), Axis("layer·head", len(heads), "choice", names), columns,
        (0, len(heads)), colours, theme, panel=panel, meta={"click": "choose", "choices": choices, "zoom": {"x": "cols"}},
    )  # fmt: skip


def top_reads(
    labels: Sequence[str],
    values: np.ndarray,
    changes: Sequence[Mapping[str, Any]],
    theme: Theme,
    *,
    panel: str,
    selected: int | None,
) -> go.Figure:
    """Readings as bars, the largest on top; a click makes the changes of its bar."""
    figure = ranked_bars(labels, values, theme, panel=panel, title="added to the logit", selected=selected)
    across = {"panel": panel, "click": "choose", "choices": {"y": [dict(each) for each in changes]}}
    return figure.update_layout(
        clickanywhere=True, meta={**across, "y": {"role": "choice", "origin": -0.5, "size": len(labels)}}
    )


def matching_neurons(
    labels: Sequence[str], same: np.ndarray, cross: np.ndarray, theme: Theme, *, panel: str
) -> go.Figure:
    """Parts of one score by pair of neurons, the first on top: what the same neurons share, and what rotation makes of two."""
    places = list(range(len(labels)))
    figure = go.Figure()
    for name, values, colour in (("fired alike", same, 0), ("by rotation", cross, 1)):
        figure.add_bar(
            x=values, y=places, orientation="h", name=name, text=[plain_label(label) for label in labels], textposition="none",
            marker={"color": theme.categorical[colour]}, hovertemplate="%{text}<br>%{x:.5g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    return figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, barmode="relative", bargap=0.25, hovermode="closest", showlegend=True,
        xaxis={"title": {"text": "part of the score S"}, "fixedrange": True},
        yaxis={"title": {"text": "pair of neurons"}, "tickvals": places, "ticktext": [plain_label(label) for label in labels],
               "autorange": "reversed", "fixedrange": True, "ticks": "", "showgrid": False},
    )  # fmt: skip
