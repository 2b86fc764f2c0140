"""The figures of this study, from the results of its stages to Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from probes.retrieval import THRESHOLD

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")


def planted(scores: np.ndarray, threshold: float) -> go.Figure:
    """Retrieval score of every head of the hand-written model."""
    figure = _maps([scores], ["written by hand: 1.2 retrieves, the other heads of layer 1 are decoys"])
    figure.update_layout(title=f"A known answer (threshold {threshold})")
    return figure


def released(models: Mapping[str, Any]) -> go.Figure:
    """Scores of the 200 best heads of every released model, in order, with the paper's threshold."""
    figure = go.Figure()
    for number, (name, record) in enumerate(models.items()):
        figure.add_scatter(
            x=np.arange(1, len(record["sorted"]) + 1), y=record["sorted"], mode="lines", name=f"{name}: {record['share']:.1%}",
            line={"color": COLOURS[number % len(COLOURS)]},
        )  # fmt: skip
    figure.add_hline(y=THRESHOLD, line={"dash": "dash", "width": 1, "color": "#888888"})
    figure.update_layout(
        title="Released scores: few heads score high", xaxis_title="rank of the head", yaxis_title="mean retrieval score",
        legend={"title": "share above 0.1"},
    )  # fmt: skip
    return figure


def scores(seeds: Sequence[np.ndarray]) -> go.Figure:
    """Retrieval score of every head, one map per seed."""
    figure = _maps(seeds, [f"seed {number}" for number in range(len(seeds))])
    figure.update_layout(title="Retrieval scores of the models trained here")
    return figure


def masking(curves: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Recall without the k best heads, and without as many others of their layers; every seed, and means."""
    figure = go.Figure()
    for name, label, colour in (("top", "best k heads", COLOURS[0]), ("control", "others of their layers", COLOURS[1])):
        values = np.array([[curve["plain"], *curve[name]] for curve in curves])
        ks = [0, *curves[0]["k"]]
        sizes = np.array([[0, *curve["control_size"]] for curve in curves])
        fair = (sizes == np.array(ks)).all(0) if name == "control" else np.ones(len(ks), bool)
        for row in values:
            figure.add_scatter(
                x=np.array(ks)[fair], y=row[fair], mode="lines", line={"color": colour, "width": 1}, opacity=0.4, showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=np.array(ks)[fair],
            y=values.mean(0)[fair],
            mode="lines+markers",
            name=label,
            line={"color": colour, "width": 2.5},
        )
    figure.update_layout(
        title="Needles repeated without k heads", xaxis_title="heads masked", xaxis_dtick=1,
        yaxis_title="recall of the needle", yaxis_range=[0, 1.02],
    )  # fmt: skip
    return figure


def alone(scores: Sequence[np.ndarray], without: Sequence[np.ndarray]) -> go.Figure:
    """What the absence of each head costs against its retrieval score: readers to the right, feeders at the left edge below."""
    figure = go.Figure()
    for number, (score, recall) in enumerate(zip(scores, without, strict=True)):
        names = [f"{layer}.{head}" for layer in range(score.shape[0]) for head in range(score.shape[1])]
        figure.add_scatter(
            x=score.ravel(), y=recall.ravel(), mode="markers+text", text=names, textposition="middle right", name=f"seed {number}",
            marker={"size": 9, "color": COLOURS[number % len(COLOURS)]}, textfont={"size": 10},
        )  # fmt: skip
    figure.update_layout(
        title="Heads that score nothing and without which nothing is found", xaxis_title="retrieval score",
        yaxis_title="recall without this head", yaxis_range=[0, 1.02],
    )  # fmt: skip
    return figure


def effective(models: Mapping[str, Any]) -> go.Figure:
    """Retrieval scores by effective pattern of models of other kinds, beside their recall."""
    titles = [f"{name}: recall {record['recall']:.2f}" for name, record in models.items()]
    figure = _maps([np.array(record["scores"], dtype=float) for record in models.values()], titles)
    figure.update_layout(title="Other mixers, by what their output reads")
    return figure


def _maps(maps: Sequence[np.ndarray], titles: Sequence[str]) -> go.Figure:
    """Maps [layer, head] side by side on one scale from 0 to 1, at most three in a row."""
    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=list(titles), horizontal_spacing=0.08, vertical_spacing=0.35 / rows
    )
    for number, values in enumerate(maps):
        row, column = number // columns + 1, number % columns + 1
        figure.add_heatmap(
            z=values, coloraxis="coloraxis", row=row, col=column, hovertemplate="head %{y}.%{x}: %{z:.2f}<extra></extra>",
            texttemplate="%{z:.2f}", textfont={"size": 10},
        )  # fmt: skip
        figure.update_xaxes(title="head", dtick=1, showgrid=False, row=row, col=column)
        figure.update_yaxes(title="layer", dtick=1, showgrid=False, row=row, col=column)
    figure.update_annotations(font_size=12)
    figure.update_layout(
        coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 1, "colorbar": {"title": "score"}}, height=140 + 210 * rows,
        margin={"t": 90},
    )  # fmt: skip
    return figure
