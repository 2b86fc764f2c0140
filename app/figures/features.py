"""Figures of the Features page: how often features fire, how strongly one does, what it says, and what fires with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import plain_label, visible_text
from app.theme import MARKERS, Theme, template

PICK = "feature"
FEWEST = 1e-6
MOST_DRAWN = 3000
"""Points that are drawn one by one; more need the graphics card."""


def densities(
    series: Mapping[str, np.ndarray], chosen: float, theme: Theme, *, panel: str, bins: int = 30
) -> go.Figure:
    """Histograms of log₁₀ density, of the units that fire at all; the line is the chosen feature's."""
    logs = {name: np.log10(values[values > 0]) for name, values in series.items()}
    low = min((float(values.min()) for values in logs.values() if len(values)), default=-4.0)
    edges = np.linspace(np.floor(low * 2) / 2, 0.0, bins + 1)
    figure = go.Figure()
    for index, (name, values) in enumerate(logs.items()):
        counts = np.histogram(values, edges)[0]
        share = counts / max(1, len(series[name]))
        colour = theme.categorical[index % 8]
        figure.add_scatter(
            x=(edges[:-1] + edges[1:]) / 2, y=share, mode="lines", name=plain_label(name), fill="tozeroy" if index == 0 else None,
            line={"color": colour, "width": 2, "shape": "hvh", "dash": ("solid", "dash", "dot")[index % 3]},
            hovertemplate="fires on 10^%{x:.2f} of the rows<br>%{y:.3f} of all<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    if chosen > 0:
        figure.add_vline(x=float(np.log10(chosen)), line={"color": theme.bad, "width": 2, "dash": "dot"})
    ticks = list(range(int(edges[0]), 1))
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=len(series) > 1,
        xaxis={"title": {"text": "share of rows on which it fires"}, "tickvals": ticks, "ticktext": [f"{10.0**t:g}" for t in ticks],
               "fixedrange": True, "showgrid": False},
        yaxis={"title": {"text": "share of units"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def value_histogram(counts: np.ndarray, largest: float, theme: Theme, *, panel: str) -> go.Figure:
    """Rows by the feature's value in equal parts of 0 … largest, [bin]; logarithmic, since most values are small."""
    width = largest / max(1, len(counts))
    figure = go.Figure(go.Bar(
        x=(np.arange(len(counts)) + 0.5) * width, y=counts, width=width, marker={"color": theme.accent, "line": {"width": 0}},
        hovertemplate="value %{x:.3g}<br>%{y} rows<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=False, bargap=0.05,
        xaxis={"title": {"text": "value where it fires"}, "range": [0, largest or 1.0], "fixedrange": True, "showgrid": False},
        yaxis={"title": {"text": "rows"}, "type": "log", "fixedrange": True, "dtick": 1},
    )  # fmt: skip
    return figure


def token_effects(words: Sequence[str], values: np.ndarray, theme: Theme, *, panel: str) -> go.Figure:
    """Change of the logit per unit of the feature, raised tokens on top and lowered ones below."""
    places = list(range(len(values)))
    figure = go.Figure(go.Bar(
        x=values, y=places, orientation="h", marker={"color": [theme.categorical[0] if v >= 0 else theme.categorical[1] for v in values]},
        customdata=[""] * len(places), text=[plain_label(visible_text(word)) for word in words], textposition="none",
        hovertemplate="‘%{text}’<br>%{x:.4g} per unit<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=False, bargap=0.25,
        xaxis={"title": {"text": "change of the logit per unit, against the mean token"}, "fixedrange": True, "zeroline": True},
        yaxis={"tickvals": places, "ticktext": [plain_label(visible_text(word)) for word in words], "autorange": "reversed",
               "fixedrange": True, "ticks": "", "showgrid": False, "tickfont": {"family": "JetBrains Mono Variable, monospace"}},
    )  # fmt: skip
    return figure


def feature_points(
    features: Sequence[int],
    x: np.ndarray,
    y: np.ndarray,
    labels: Sequence[str],
    theme: Theme,
    *,
    panel: str,
    x_title: str,
    y_title: str,
    chosen: int | None = None,
    log_x: bool = False,
) -> go.Figure:
    """One point per feature; a click chooses it. `labels` are shown under the pointer."""
    marked = [feature == chosen for feature in features]
    kind = go.Scatter if len(features) <= MOST_DRAWN else go.Scattergl
    figure = go.Figure(kind(
        x=np.maximum(x, FEWEST) if log_x else x, y=y, mode="markers", customdata=[str(feature) for feature in features],
        text=[plain_label(label) for label in labels],
        marker={"color": [theme.bad if each else theme.accent for each in marked], "size": [12 if each else 7 for each in marked],
                "symbol": [MARKERS[2] if each else MARKERS[0] for each in marked], "opacity": 0.75},
        hovertemplate="feature %{customdata} · %{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel, "pick": PICK}, showlegend=False, hovermode="closest",
        xaxis={"title": {"text": x_title}, "type": "log" if log_x else "linear", "fixedrange": True},
        yaxis={"title": {"text": y_title}, "fixedrange": True},
    )  # fmt: skip
    return figure


def context_values(values: np.ndarray, bands: np.ndarray, largest: float, theme: Theme, *, panel: str) -> go.Figure:
    """The value of each context, by where it was drawn from: the strongest, or a part of the range."""
    names = ["strongest", *(f"{part} of 4" for part in range(1, int(bands.max(initial=-1)) + 2))]
    figure = go.Figure(go.Scatter(
        x=values, y=bands + 1, mode="markers", hovertemplate="value %{x:.4g}<extra></extra>",
        marker={"color": [theme.categorical[0] if band < 0 else theme.categorical[1] for band in bands], "size": 8,
                "symbol": [MARKERS[0] if band < 0 else MARKERS[1] for band in bands], "opacity": 0.8},
    ))  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=False,
        xaxis={"title": {"text": "value at the marked token"}, "range": [0, 1.05 * largest or 1.0], "fixedrange": True},
        yaxis={"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5], "fixedrange": True, "ticks": ""},
    )  # fmt: skip
    return figure
