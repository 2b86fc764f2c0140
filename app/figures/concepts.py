"""Figures of the Concepts page: AUCs with intervals, control shuffles, transfer, the causal check, and traces of sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import plain_label
from app.theme import MARKERS, Theme, colour_scale, template


def intervals(
    labels: Sequence[str],
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    theme: Theme,
    *,
    panel: str,
    title: str,
    null: float,
) -> go.Figure:
    """Estimates with their intervals, the first on top, and a line at the value that means nothing."""
    places = list(range(len(labels)))
    figure = go.Figure(go.Scatter(
        x=values, y=places, mode="markers", text=[plain_label(label) for label in labels], showlegend=False,
        marker={"size": 10, "color": [theme.accent if i == 0 else theme.categorical[1] for i in places],
                "symbol": [MARKERS[0] if i == 0 else MARKERS[1] for i in places]},
        error_x={"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low, "color": theme.dim},
        hovertemplate="%{text}<br>%{x:.4g}<extra></extra>",
    ))  # fmt: skip
    figure.add_vline(x=null, line={"color": theme.dim, "dash": "dot"})
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, xaxis={"title": {"text": title}, "fixedrange": True},
        yaxis={"tickvals": places, "ticktext": [plain_label(label) for label in labels], "range": [len(places) - 0.5, -0.5],
               "fixedrange": True, "ticks": "", "showgrid": False},
    )  # fmt: skip
    return figure


def null_points(
    null: np.ndarray, observed: float, theme: Theme, *, panel: str, title: str, name: str, x_title: str
) -> go.Figure:
    """What chance gave, one point each, and the observed value as a line."""
    figure = go.Figure(go.Scatter(
        x=np.arange(1, len(null) + 1), y=null, mode="markers", name=name,
        marker={"color": theme.categorical[1], "size": 8, "symbol": MARKERS[1]},
        hovertemplate=f"{name} %{{x}}<br>%{{y:.4g}}<extra></extra>",
    ))  # fmt: skip
    figure.add_hline(y=observed, line={"color": theme.accent, "width": 2.5}, annotation_text="found", annotation_position="top left",
                     annotation_font={"color": theme.accent})  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=False,
        xaxis={"title": {"text": x_title}, "fixedrange": True, "showgrid": False, "dtick": max(1, len(null) // 10), "tick0": 1},
        yaxis={"title": {"text": title}, "fixedrange": True},
    )  # fmt: skip
    return figure


def transfer_maps(
    names: Sequence[str], groups: Sequence[str], aucs: np.ndarray, theme: Theme, *, panel: str
) -> go.Figure:
    """AUC within groups and across: one row per method, one column per (found in, scored in); `aucs` [name, on, scored]."""
    columns = [f"{plain_label(a)}<br>→ {plain_label(b)}" for a in groups for b in groups]
    cells = aucs.reshape(len(names), -1)
    figure = go.Figure(go.Heatmap(
        z=cells, x=list(range(len(columns))), y=list(range(len(names))), zmin=0, zmax=1, zmid=0.5,
        colorscale=colour_scale(theme.table_name(True)),
        text=[[f"{value:.2f}" for value in row] for row in cells], texttemplate="%{text}", showscale=False,
        hovertemplate="AUC %{z:.4f}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel},
        xaxis={"tickvals": list(range(len(columns))), "ticktext": columns, "fixedrange": True, "ticks": "",
               "title": {"text": "found in → scored in"}},
        yaxis={"tickvals": list(range(len(names))), "ticktext": list(names), "autorange": "reversed", "fixedrange": True, "ticks": ""},
    )  # fmt: skip
    return figure


def sentence_traces(shown: Sequence[Sequence[str]], traces: np.ndarray, theme: Theme, *, panel: str) -> go.Figure:
    """A synapse over held-out sentences, `traces` [sentence, pos]: one colour and dash per class, of (class, sentence)."""
    figure = go.Figure()
    for index, ((label, text), line) in enumerate(zip(shown, traces, strict=True)):
        positive = label == "positive"
        kept = np.isfinite(line)
        places = np.flatnonzero(kept)
        tokens = list(text.encode())
        figure.add_scatter(
            x=places, y=line[kept], mode="lines", name=label, legendgroup=label, showlegend=all(each[0] != label for each in shown[:index]),
            line={"color": theme.categorical[0 if positive else 1], "width": 1.8, "dash": "solid" if positive else "dot"},
            text=[plain_label(bytes(tokens[: place + 1]).decode("utf-8", "replace")[-48:]) for place in places.tolist()],
            hovertemplate="%{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, xaxis={"title": {"text": "token of the sentence"}, "fixedrange": True},
        yaxis={"title": {"text": "strength |C|"}, "fixedrange": True, "rangemode": "tozero"}, showlegend=True,
    )  # fmt: skip
    return figure
