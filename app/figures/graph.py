"""Figures of the Neuron graph page: modularity beside its baselines, degrees, weights; and the elements that cytoscape draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.theme import MARKERS, Theme, template

MOST_DRAWN = 1_500
"""Edges that the browser draws; the strongest are kept."""
PLANE = 900
LAWS = {"power law": "dash", "log-normal": "dot"}
LABELLED = 12
"""Neurons with most edges, which carry their name."""


def modularity_points(
    observed: float, baselines: Mapping[str, Sequence[float]], theme: Theme, *, panel: str
) -> go.Figure:
    """The graph's Q as a line across, and every draw of each baseline with its mean ± standard deviation."""
    figure = go.Figure()
    for index, (name, draws) in enumerate(baselines.items()):
        values, colour = np.asarray(draws, float), theme.categorical[(index + 1) % 8]
        figure.add_scatter(
            x=np.full(len(values), index) + 0.16, y=values, mode="markers", showlegend=False,
            hovertemplate=f"{name}: %{{y:.4f}}<extra></extra>",
            marker={"color": colour, "size": 5, "opacity": 0.55},
        )  # fmt: skip
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        figure.add_scatter(
            x=[index], y=[values.mean()], error_y={"array": [spread], "color": colour}, mode="markers", name=name, showlegend=False,
            marker={"color": colour, "size": 10, "symbol": MARKERS[(index + 1) % 8]},
            hovertemplate=f"{name}: %{{y:.4f}} ± {spread:.4f}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=observed, line={"color": theme.accent, "width": 2.5}, annotation_text="this graph", annotation_position="top left",
                     annotation_font={"color": theme.accent})  # fmt: skip
    names = list(baselines)
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=False,
        xaxis={"tickvals": list(range(len(names))), "ticktext": names, "range": [-0.6, len(names) - 0.4], "fixedrange": True,
               "showgrid": False},
        yaxis={"title": {"text": "modularity Q"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def degree_tails(tails: Mapping[str, tuple[np.ndarray, np.ndarray]], theme: Theme, *, panel: str) -> go.Figure:
    """Share of neurons with at least k edges, and the fitted laws: by direction (ccdf [degree, 2], fit [degree, 3])."""
    figure = go.Figure()
    for index, (way, (ccdf, fit)) in enumerate(tails.items()):
        colour = theme.categorical[index % 8]
        figure.add_scatter(
            x=ccdf[:, 0], y=ccdf[:, 1], mode="markers", name=f"{way}-degree" if way != "all" else "degree",
            marker={"color": colour, "size": 6, "symbol": MARKERS[index % 8]},
            hovertemplate="at least %{x} edges<br>%{y:.3g} of the neurons<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        for column, (law, dash) in zip(range(1, fit.shape[1]), LAWS.items(), strict=False):
            figure.add_scatter(
                x=fit[:, 0], y=fit[:, column], mode="lines", name=f"{way}: {law}", line={"color": colour, "dash": dash, "width": 2},
                hovertemplate="%{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    least = min(float(ccdf[:, 1].min()) for ccdf, _ in tails.values())
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=True,
        xaxis={"type": "log", "title": {"text": "edges k of a neuron"}, "fixedrange": True, "dtick": 1},
        yaxis={"type": "log", "title": {"text": "share with at least k"}, "fixedrange": True, "dtick": 1,
               "range": [np.log10(least) - 0.4, 0.1]},
    )  # fmt: skip
    return figure


def edge_weights(weight: np.ndarray, theme: Theme, *, panel: str) -> go.Figure:
    """Edge weights by rank, largest first."""
    kept = np.unique(np.linspace(0, len(weight) - 1, 800).astype(int))
    figure = go.Figure(go.Scatter(x=kept + 1, y=weight[kept], mode="lines", line={"color": theme.accent, "width": 2},
                                  hovertemplate="edge %{x}<br>%{y:.5g}<extra></extra>"))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, xaxis={"title": {"text": "edge, by weight"}, "fixedrange": True},
        yaxis={"title": {"text": "weight"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def community_colour(number: int, theme: Theme) -> str:
    """The colour of a community: the first eight have their own, the rest are grey."""
    return theme.categorical[number] if 0 <= number < 8 else theme.dim


def graph_elements(
    source: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    community: np.ndarray,
    places: np.ndarray,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Cytoscape's elements: every neuron with edges, and the strongest edges. `names` [node]."""
    degree = np.bincount(source, minlength=len(names)) + np.bincount(target, minlength=len(names))
    least = max(2, np.sort(degree)[-min(LABELLED, len(degree))])
    nodes: list[dict[str, Any]] = [
        {"data": {"id": str(node), "label": names[node], "community": int(community[node]), "degree": int(degree[node]),
                  "hub": int(degree[node] >= least), "size": round(8 + 5 * float(np.sqrt(degree[node])), 1)},
         "position": {"x": round(PLANE * float(places[node, 0])), "y": round(PLANE * float(places[node, 1]))}}
        for node in np.flatnonzero(degree).tolist() if np.isfinite(places[node]).all()
    ]  # fmt: skip
    drawn = {node["data"]["id"] for node in nodes}
    strongest = np.argsort(-np.abs(weight), kind="stable")[:MOST_DRAWN]
    edges = [
        {"data": {"id": f"e{edge}", "source": str(source[edge]), "target": str(target[edge]), "sign": 1 if weight[edge] >= 0 else -1}}
        for edge in strongest.tolist() if str(source[edge]) in drawn and str(target[edge]) in drawn
    ]  # fmt: skip
    return [*nodes, *edges]


def graph_style(theme: Theme, directed: bool) -> list[dict[str, Any]]:
    """How cytoscape draws the elements in a scheme."""
    style: list[dict[str, Any]] = [
        {"selector": "node", "style": {"width": "data(size)", "height": "data(size)", "background-color": theme.dim,
                                       "border-width": 1, "border-color": theme.surface}},
        *({"selector": f"node[community = {n}]", "style": {"background-color": community_colour(n, theme)}} for n in range(8)),
        {"selector": "node[hub = 1]", "style": {"label": "data(label)", "font-size": 22, "color": theme.text,
                                                     "text-outline-width": 3, "text-outline-color": theme.surface}},
        {"selector": "edge", "style": {"width": 1.2, "line-color": theme.dim, "opacity": 0.35, "curve-style": "haystack"}},
        {"selector": "edge:selected", "style": {"line-color": theme.accent, "opacity": 1}},
        {"selector": "node:selected", "style": {"border-width": 5, "border-color": theme.accent, "label": "data(label)"}},
    ]  # fmt: skip
    if directed:
        style[-3]["style"] |= {
            "curve-style": "straight",
            "target-arrow-shape": "triangle",
            "target-arrow-color": theme.dim,
            "arrow-scale": 0.7,
        }
    return style
