"""The figures of this study, from arrays to Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

TITLES = {"accuracy": "at the training length", "beyond": "beyond it, rows twice as long"}


def table(
    mixers: Sequence[str], tasks: Sequence[str], chances: Sequence[float], accuracy: np.ndarray, beyond: np.ndarray
) -> go.Figure:
    """Accuracies [mixer, task] as two heat maps; the colour is the share of the way from chance to 1."""
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=list(TITLES.values()), shared_yaxes=True, horizontal_spacing=0.03
    )
    names = [f"{task.replace('_', ' ')}<br>chance {chance:.2f}" for task, chance in zip(tasks, chances, strict=True)]
    for column, values in enumerate((accuracy, beyond), 1):
        above = np.clip((values - np.array(chances)) / (1 - np.array(chances)), 0, 1)
        figure.add_heatmap(z=above, x=names, y=list(mixers), text=values, texttemplate="%{text:.2f}", coloraxis="coloraxis",
                           hovertemplate="%{y}, %{x}: %{text:.3f}<extra></extra>", row=1, col=column)  # fmt: skip
        figure.update_yaxes(autorange="reversed", showgrid=False, row=1, col=column)
        figure.update_xaxes(showgrid=False, row=1, col=column)
    figure.update_layout(
        title="Accuracy on held-out rows", height=560, margin={"t": 60},
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"title": "chance → 1"}},
    )  # fmt: skip
    return figure


def patterns(shown: Mapping[str, np.ndarray], edges: np.ndarray, shares: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """One pattern [query, key] per mixer on the same row, each divided by its largest absolute weight, planted edges [answer, 2] marked."""
    titles = [
        f"{mixer}<br>L{shares[mixer]['layer']}H{shares[mixer]['head']}, {shares[mixer]['share']:.0%} planted"
        for mixer in shown
    ]
    figure = make_subplots(rows=1, cols=len(shown), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.02)
    for column, values in enumerate(shown.values(), 1):
        figure.add_heatmap(z=values / max(np.abs(values).max(), 1e-12), coloraxis="coloraxis", row=1, col=column,
                           hovertemplate="from %{y} to %{x}: %{z:.3f} of the largest<extra></extra>")  # fmt: skip
        figure.add_scatter(x=edges[:, 1], y=edges[:, 0], mode="markers", name="planted", showlegend=column == 1,
                           marker={"symbol": "square-open", "size": 7, "color": "#009E73"}, row=1, col=column)  # fmt: skip
        _square(figure, column)
    figure.update_yaxes(title="query", row=1, col=1)
    figure.update_layout(
        title="Recall: the head that points most at the answers", margin={"t": 90}, legend={"orientation": "h"},
        coloraxis={"colorscale": "RdBu_r", "cmin": -1, "cmax": 1, "cmid": 0},
    )  # fmt: skip
    return figure


def retention(shown: Mapping[str, np.ndarray]) -> go.Figure:
    """Retention [t, j] per mixer: cosine of what the state after t answers to the key of token j with its value."""
    figure = make_subplots(
        rows=1, cols=len(shown), subplot_titles=list(shown), shared_yaxes=True, horizontal_spacing=0.05
    )
    for column, values in enumerate(shown.values(), 1):
        figure.add_heatmap(z=values, coloraxis="coloraxis", row=1, col=column,
                           hovertemplate="after %{y}, token %{x}: %{z:.3f}<extra></extra>")  # fmt: skip
        _square(figure, column)
    figure.update_yaxes(title="after token", row=1, col=1)
    figure.update_layout(
        title="Recall: what the state still answers", margin={"t": 60},
        coloraxis={"colorscale": "RdBu_r", "cmin": -1, "cmax": 1, "cmid": 0},
    )  # fmt: skip
    return figure


def parity(
    traces: Mapping[str, np.ndarray], truth: np.ndarray, correlations: Mapping[str, float], length: int
) -> go.Figure:
    """The state number that goes most with parity, token by token, one panel per mixer; the dashed line ends the training length."""
    titles = [f"{mixer}, correlation {correlations[mixer]:.2f}" for mixer in traces]
    figure = make_subplots(rows=len(traces), cols=1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.06)
    for row, trace in enumerate(traces.values(), 1):
        odd = np.flatnonzero(truth > 0.5)
        even = np.flatnonzero(truth <= 0.5)
        figure.add_scatter(
            y=trace, mode="lines", line={"color": "#999999", "width": 1}, showlegend=False, row=row, col=1
        )
        for name, at, colour in (("odd", odd, "#D55E00"), ("even", even, "#0072B2")):
            figure.add_scatter(x=at, y=trace[at], mode="markers", name=name, legendgroup=name, showlegend=row == 1,
                               marker={"color": colour, "size": 6}, row=row, col=1)  # fmt: skip
        figure.add_vline(x=length - 1.5, line={"dash": "dash", "width": 1, "color": "#999999"}, row=row, col=1)
    figure.update_xaxes(title="token", row=len(traces), col=1)
    figure.update_annotations(font_size=12)
    figure.update_layout(title="Parity: one number of the state", height=140 * len(traces) + 80, margin={"t": 60})
    return figure


def _square(figure: go.Figure, column: int) -> None:
    across = f"x{column if column > 1 else ''}"
    figure.update_xaxes(title="key", constrain="domain", showgrid=False, row=1, col=column)
    figure.update_yaxes(autorange="reversed", scaleanchor=across, constrain="domain", showgrid=False, row=1, col=column)
    figure.update_annotations(font_size=11)
