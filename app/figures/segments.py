"""Figures of the Segments page: readings by segment and by place, and maps of what each part of the state is worth.

Cells of maps carry "layer.segment" as their customdata, and `meta.pick` says that a click chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import plain_label
from app.figures.probes import PICK
from app.theme import MARKERS, Theme, colour_scale, template

DASHES = ("solid", "dash", "dot")
MOST_MARKED, MOST_TICKS, MOST_NUMBERED = 64, 24, 60
"""Points that carry a marker, labels of an axis, cells that carry their number."""


def numbered_lines(
    series: Mapping[str, np.ndarray], theme: Theme, *, panel: str, x_title: str, y_title: str, lost: bool = False
) -> go.Figure:
    """A line per name over the numbers 0, 1, …; nan leaves a gap.

    `lost`: values are losses against the first of all readings, so its colour is left out, and a line marks where nothing is lost.
    """
    figure = go.Figure()
    for index, (name, values) in enumerate(series.items(), start=int(lost)):
        figure.add_scatter(
            x=np.arange(len(values)), y=values, mode="lines+markers" if len(values) <= MOST_MARKED else "lines", name=name,
            line={"color": theme.categorical[index], "dash": DASHES[index % 3], "width": 2},
            marker={"size": 6, "symbol": MARKERS[index % 8]},
            hovertemplate=f"{x_title} %{{x}}: %{{y:.4f}} nats<extra>%{{fullData.name}}</extra>",
        )  # fmt: skip
    if lost:
        figure.add_hline(y=0, line={"color": theme.dim, "dash": "dot", "width": 1})
    count = max(map(len, series.values()))
    return figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=len(series) > 1, hovermode="closest",
        xaxis={"title": {"text": x_title}, "fixedrange": True, "showgrid": False, "range": [-0.5, count - 0.5],
               **({"dtick": 1} if count <= MOST_TICKS else {})},
        yaxis={"title": {"text": y_title}, "fixedrange": True},
    )  # fmt: skip


def boundary_map(
    rows: Sequence[str],
    layers: Sequence[int],
    values: np.ndarray,
    theme: Theme,
    *,
    panel: str,
    row_title: str,
    unit: str,
    signed: bool,
    chosen: tuple[int, int] | None,
    numbered: bool,
    first: int = 1,
) -> go.Figure:
    """`values` [row, segment]: one row per part of the state (`rows`, of `layers`), one column per segment from `first` on.

    A frame marks the rows of the `chosen` (layer, segment). `numbered`: whether the cells of a small map carry their numbers.
    """
    segments = list(range(first, values.shape[1]))
    shown = values[:, first:]
    largest = float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
    figure = go.Figure(go.Heatmap(
        z=shown, x=segments, y=list(range(len(rows))), zmin=-largest if signed else 0, zmax=largest, xgap=1, ygap=1, hoverongaps=False,
        colorscale=colour_scale(theme.table_name(signed)), text=[[plain_label(row)] * len(segments) for row in rows],
        customdata=[[f"{layer}.{segment}" for segment in segments] for layer in layers],
        texttemplate="%{z:.3f}" if numbered and shown.size <= MOST_NUMBERED else None, textfont={"size": 10},
        hovertemplate=f"{row_title} %{{text}}, handed to segment %{{x}}<br>%{{z:.4g}} {unit}<extra></extra>",
        colorbar={"thickness": 8, "outlinewidth": 0, "tickfont": {"size": 10.5}, "nticks": 5,
                  "title": {"text": unit, "side": "right", "font": {"size": 11}}},
    ))  # fmt: skip
    if chosen is not None and chosen[1] >= first:
        for row in (number for number, layer in enumerate(layers) if layer == chosen[0]):
            figure.add_shape(type="rect", x0=chosen[1] - 0.5, x1=chosen[1] + 0.5, y0=row - 0.5, y1=row + 0.5,
                             line={"color": theme.bad, "width": 2.5})  # fmt: skip
    every_x, every_y = -(-len(segments) // MOST_TICKS), -(-len(rows) // MOST_TICKS)
    kept = list(range(0, len(rows), every_y))
    return figure.update_layout(
        template=template(theme.name), meta={"panel": panel, "pick": PICK}, plot_bgcolor=theme.surface,
        xaxis={"title": {"text": "segment that is handed it"}, "tickvals": segments[::every_x], "fixedrange": True, "showgrid": False,
               "ticks": ""},
        yaxis={"title": {"text": row_title}, "tickvals": kept, "ticktext": [plain_label(rows[row]) for row in kept], "fixedrange": True,
               "showgrid": False, "ticks": "", "range": [len(rows) - 0.5, -0.5]},
        margin={"l": max(50, min(34 + 7 * max(map(len, rows)), 150)), "r": 76, "t": 12, "b": 46},
    )  # fmt: skip
