"""Figures of the Sparsity page: shares by layer, by time scale, and their tie to surprisal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture
from app.theme import MARKERS, Theme, template

DASHES = ("solid", "dash", "dot", "dashdot")


def layer_shares(shares: Mapping[str, np.ndarray], theme: Theme, *, panel: str) -> go.Figure:
    """Share of active neurons of several activities, each [layer, head]: a line of means, a point per head."""
    figure = go.Figure()
    for index, (name, values) in enumerate(shares.items()):
        layers, heads = values.shape
        colour = theme.categorical[index % 8]
        figure.add_scatter(
            x=np.arange(layers), y=values.mean(1), mode="lines", name=name, line={"color": colour, "dash": DASHES[index % 4], "width": 2.2},
            hovertemplate="layer %{x}: %{y:.2%}<extra>%{fullData.name}, mean of heads</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=np.repeat(np.arange(layers), heads), y=values.ravel(), mode="markers", showlegend=False,
            customdata=np.tile(np.arange(heads), layers),
            marker={"color": colour, "size": 6, "symbol": MARKERS[index % 8], "opacity": 0.6},
            hovertemplate=f"{name}, layer %{{x}}, head %{{customdata}}: %{{y:.2%}}<extra></extra>",
        )  # fmt: skip
    return _shares(figure, theme, panel, "layer")


def share_raster(
    source: str, tokens: Sequence[str], heads: Sequence[tuple[int, int]], colours: Colours, theme: Theme, *, panel: str
) -> go.Figure:
    """Share of active neurons: one row per (layer, head) of `heads`, one column per token."""
    names = [f"{layer}·{head}" for layer, head in heads]
    return picture(
        source, Axis("token", len(tokens), "", tokens), Axis("layer·head", len(heads), "", names), (0, len(tokens)), (0, len(heads)),
        colours, theme, panel=panel,
    )  # fmt: skip


def shares_over_training(steps: np.ndarray, shares: Mapping[str, np.ndarray], theme: Theme, *, panel: str) -> go.Figure:
    """Share of active neurons of several activities over training, each [measurement, layer]: a line of means, a thin one per layer.

    `steps` [measurement] ascend from 0 and stand on a logarithmic axis of steps + 1. A gap of more than a factor of four is dotted.
    """
    figure, places = go.Figure(), np.log10(steps + 1.0)
    near = (
        np.flatnonzero(np.append(np.diff(places[1:]) > np.log10(4), True))[0] + 2
    )  # where what was measured closely ends
    for index, (name, values) in enumerate(shares.items()):
        colour, mean = theme.categorical[index % 8], values.mean(1)
        for layer in range(values.shape[1]):
            figure.add_scatter(
                x=places[:near], y=values[:near, layer], mode="lines", showlegend=False, hoverinfo="skip", opacity=0.4,
                line={"color": colour, "width": 1},
            )  # fmt: skip
        figure.add_scatter(
            x=places[:near], y=mean[:near], mode="lines+markers", name=name, customdata=steps[:near],
            line={"color": colour, "width": 2.2}, marker={"size": 6, "symbol": MARKERS[index % 8]},
            hovertemplate="after %{customdata:,} steps: %{y:.2%}<extra>%{fullData.name}, mean of layers</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=places[near - 1 :], y=mean[near - 1 :], mode="lines+markers", name=name, showlegend=False, customdata=steps[near - 1 :],
            line={"color": colour, "width": 2.2, "dash": "dot"}, marker={"size": 8, "symbol": MARKERS[index % 8]},
            hovertemplate="after %{customdata:,} steps: %{y:.2%}<extra>%{fullData.name}, mean of layers</extra>",
        )  # fmt: skip
    figure = _shares(figure, theme, panel, "steps of training")
    ticks = [0, *(10**power for power in range(1, 7) if 10**power <= steps[-1])]
    return figure.update_xaxes(
        tickvals=[float(np.log10(t + 1)) for t in ticks], ticktext=[f"{t:,}" for t in ticks], dtick=None, tickangle=0
    )


def octile_shares(values: np.ndarray, theme: Theme, *, panel: str) -> go.Figure:
    """Share of active neurons by time scale [layer, octile], a line per layer; nan for an octile without neurons."""
    figure = go.Figure()
    for layer, line in enumerate(values):
        figure.add_scatter(
            x=np.arange(len(line)), y=line, mode="lines+markers", name=f"layer {layer}", marker={"size": 7, "symbol": MARKERS[layer % 8]},
            line={"color": theme.categorical[layer % 8], "dash": DASHES[layer % 4]},
            hovertemplate="octile %{x}: %{y:.2%}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    return _shares(figure, theme, panel, "octile of rotation period, 0 fastest, 7 slowest")


def ties(values: Mapping[str, tuple[np.ndarray, np.ndarray]], theme: Theme, *, panel: str) -> go.Figure:
    """Correlations by layer, (value [layer], null [layer]) by name; the bars span ± null around 0: inside them it means nothing."""
    figure = go.Figure()
    for index, (name, (value, null)) in enumerate(values.items()):
        places = np.arange(len(value)) + 0.16 * (index - (len(values) - 1) / 2)
        colour = theme.categorical[index % 8]
        figure.add_scatter(
            x=places, y=np.zeros(len(null)), mode="markers", showlegend=False, hoverinfo="skip",
            marker={"size": 1, "color": colour}, error_y={"array": null, "color": colour, "thickness": 7, "width": 0},
            opacity=0.28,
        )  # fmt: skip
        figure.add_scatter(
            x=places, y=value, mode="markers", name=name, customdata=null,
            marker={"size": 10, "color": colour, "symbol": MARKERS[index % 8]},
            hovertemplate="%{y:+.3f}, by chance up to ± %{customdata:.3f}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": theme.dim, "dash": "dot"})
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=True,
        xaxis={"title": {"text": "layer"}, "fixedrange": True, "dtick": 1, "showgrid": False},
        yaxis={"title": {"text": "correlation"}, "fixedrange": True},
    )  # fmt: skip
    return figure


def _shares(figure: go.Figure, theme: Theme, panel: str, x_title: str) -> go.Figure:
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=True,
        xaxis={"title": {"text": x_title}, "fixedrange": True, "dtick": 1, "showgrid": False},
        yaxis={"title": {"text": "active neurons"}, "fixedrange": True, "tickformat": ".0%", "rangemode": "tozero"},
    )  # fmt: skip
    return figure
