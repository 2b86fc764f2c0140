"""Figures of the Probes page: maps of scores over layers and heads, two scores against each other, dose curves, profiles over distances.

Whatever stands for a head carries "row.head" as its customdata, and `meta.pick` says that a click chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from app.figures.common import plain_label
from app.theme import MARKERS, Theme, colour_scale, template

MOST_NUMBERED = 48
"""Cells of a map that carry their number."""
PICK = "mh"


@dataclass(frozen=True)
class HeadMap:
    """One map: `values` and `stands_out` [row, head]; `note` stands under the title."""

    title: str
    values: np.ndarray
    stands_out: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class HeadCurve:
    """One head over lengths: `values`, `low` and `high` [length], nan where there is nothing; `place` is "row.head"."""

    name: str
    place: str
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray


def head_maps(
    maps: Sequence[HeadMap],
    rows: Sequence[str],
    theme: Theme,
    *,
    panel: str,
    columns: int,
    chosen: tuple[int, int] | None,
    largest: float = 1.0,
    numbered: bool = True,
) -> go.Figure:
    """Small maps, one row per layer (called `rows`) and one column per head, all on one colour scale from 0 to `largest`.

    A dot marks heads that stand out, a frame the chosen one. Cells without a head are left empty. `numbered`: whether the cells of a
    small map carry their numbers and every map its heads'; False on a narrow screen.
    """
    lines = -(-len(maps) // columns)
    note = "<br><span style='font-size:10.5px;color:{}'>{}</span>"
    titles = [plain_label(each.title) + note.format(theme.dim, plain_label(each.note)) for each in maps]
    figure = make_subplots(
        lines,
        columns,
        subplot_titles=titles,
        horizontal_spacing=min(0.09, 0.3 / columns),
        vertical_spacing=(0.3 if numbered else 0.4) / lines if lines > 1 else 0,
    )
    for index, each in enumerate(maps):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        height, width = each.values.shape
        figure.add_heatmap(
            z=each.values, x=list(range(width)), y=list(range(height)), zmin=0, zmax=largest, xgap=1, ygap=1, hoverongaps=False,
            colorscale=colour_scale(theme.table_name(False)), coloraxis=None, showscale=index == 0,
            colorbar={"thickness": 8, "outlinewidth": 0, "x": 1.01, "xanchor": "left", "tickfont": {"size": 10.5}, "nticks": 5},
            customdata=[[f"{row}.{head}" for head in range(width)] for row in range(height)],
            text=[[f"{rows[row]}.{head}" for head in range(width)] for row in range(height)],
            texttemplate="%{z:.2f}" if numbered and each.values.size <= MOST_NUMBERED else None, textfont={"size": 10},
            hovertemplate=f"head %{{text}}<br>%{{z:.4f}}<extra>{plain_label(each.title)}</extra>", **place,
        )  # fmt: skip
        marked = np.argwhere(each.stands_out)
        figure.add_scatter(
            x=marked[:, 1] + 0.34, y=marked[:, 0] - 0.32, mode="markers", hoverinfo="skip",
            marker={"size": 7, "color": theme.bad, "line": {"color": theme.surface, "width": 1.5}}, **place,
        )  # fmt: skip
        if chosen is not None and chosen[0] < height and chosen[1] < width:
            row, head = chosen
            figure.add_shape(type="rect", x0=head - 0.5, x1=head + 0.5, y0=row - 0.5, y1=row + 0.5,
                             line={"color": theme.bad, "width": 2.5}, **place)  # fmt: skip
        every_x, every_y = max(1, -(-width // 12)), max(1, -(-height // 12))
        shown = list(range(0, height, every_y))
        beneath = index + columns < len(maps)  # on a narrow screen the title of the map beneath needs the room
        figure.update_xaxes(
            tickvals=list(range(0, width, every_x)), range=[-0.5, width - 0.5], showticklabels=numbered or not beneath, **place
        )  # fmt: skip
        figure.update_yaxes(tickvals=shown, ticktext=[rows[row] for row in shown], range=[height - 0.5, -0.5], **place)
    figure.update_xaxes(fixedrange=True, showgrid=False, ticks="")
    figure.update_yaxes(fixedrange=True, showgrid=False, ticks="")
    for line in range(1, lines + 1):
        figure.update_yaxes(title={"text": "layer"}, row=line, col=1)
    for column in range(1, min(columns, len(maps)) + 1):
        figure.update_xaxes(title={"text": "head"}, row=-(-(len(maps) - column + 1) // columns), col=column)
    figure.update_annotations(font={"size": 12, "color": theme.text})
    figure.update_layout(template=template(theme.name), meta={"panel": panel, "pick": PICK}, showlegend=False,
                         plot_bgcolor=theme.surface, margin={"l": 44, "r": 62, "t": 46, "b": 40})  # fmt: skip
    return figure


def two_scores(
    names: Sequence[str],
    places: Sequence[str],
    x: np.ndarray,
    y: np.ndarray,
    theme: Theme,
    *,
    panel: str,
    x_title: str,
    y_title: str,
    chosen: str,
    nulls: tuple[float, float],
) -> go.Figure:
    """Every head by two scores, [head] each; the dotted lines are the best heads of the random twin. Dragging brushes heads."""
    at = [places.index(chosen)] if chosen in places else []
    figure = go.Figure(go.Scatter(
        x=x, y=y, mode="markers", text=[plain_label(name) for name in names], customdata=list(places),
        marker={"size": [13 if i in at else 9 for i in range(len(places))], "color": [theme.bad if i in at else theme.accent for i in
                range(len(places))], "line": {"color": theme.surface, "width": 1}, "opacity": 0.85},
        unselected={"marker": {"opacity": 0.2}},
        hovertemplate="head %{text}<br>%{x:.4f}, %{y:.4f}<extra></extra>",
    ))  # fmt: skip
    line = {"color": theme.dim, "dash": "dot", "width": 1}
    if np.isfinite(nulls[0]):
        figure.add_vline(x=nulls[0], line=line)
    if np.isfinite(nulls[1]):
        figure.add_hline(y=nulls[1], line=line)
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel, "pick": PICK}, showlegend=False, dragmode="select", clickmode="event",
        xaxis={"title": {"text": x_title}}, yaxis={"title": {"text": y_title}},
    )  # fmt: skip
    return figure


def dose_curves(
    curves: Sequence[HeadCurve], lengths: np.ndarray, theme: Theme, *, panel: str, y_title: str, chosen: str
) -> go.Figure:
    """A score at several lengths, one line per head; the chosen head is strong and has its interval."""
    figure = go.Figure()
    for index, curve in enumerate(curves):
        strong, colour = curve.place == chosen, theme.categorical[index % 8]
        if strong:
            figure.add_scatter(x=[*lengths, *lengths[::-1]], y=[*curve.high, *curve.low[::-1]], fill="toself", mode="none", opacity=0.25,
                               fillcolor=colour, hoverinfo="skip", showlegend=False)  # fmt: skip
        figure.add_scatter(
            x=lengths, y=curve.values, mode="lines+markers", name=plain_label(curve.name), customdata=[curve.place] * len(lengths),
            line={"color": colour, "width": 2.4 if strong else 1.3}, marker={"symbol": MARKERS[index % 8], "size": 8 if strong else 6},
            hovertemplate="%{x} tokens<br>%{y:.4f}<extra>head %{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel, "pick": PICK}, showlegend=True,
        xaxis={"title": {"text": "tokens"}, "type": "log", "tickvals": lengths.tolist(), "ticktext": [str(n) for n in lengths.tolist()],
               "fixedrange": True},
        yaxis={"title": {"text": y_title}, "fixedrange": True},
    )  # fmt: skip
    return figure


def segment_profile(
    values: np.ndarray, mean: np.ndarray, names: Sequence[str], theme: Theme, *, panel: str
) -> go.Figure:
    """Weight per token of a head on each segment, [segment], as bars; the mean of all heads as a line. `names`: tokens of each."""
    hover = "tokens %{customdata}<br>%{y:.5g}<extra>%{fullData.name}</extra>"
    places, about = np.arange(1, len(values) + 1), {"customdata": list(names), "hovertemplate": hover}
    figure = go.Figure(
        go.Bar(x=places, y=values, marker={"color": theme.accent, "line": {"width": 0}}, name="this head", **about)
    )
    figure.add_scatter(x=places, y=mean, mode="lines+markers", name="mean of all heads",
                       line={"color": theme.categorical[1], "width": 1.6}, marker={"size": 6}, **about)  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=True, bargap=0.15,
        xaxis={"title": {"text": "segment of the prompt"}, "tickvals": places.tolist(), "fixedrange": True, "showgrid": False},
        yaxis={"title": {"text": "mean weight per token"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def distance_profile(values: np.ndarray, twin: np.ndarray | None, theme: Theme, *, panel: str) -> go.Figure:
    """Mean weight of a head at each distance, [distance], as bars; its random twin's as a line."""
    places = np.arange(len(values))
    figure = go.Figure(go.Bar(x=places, y=values, marker={"color": theme.accent, "line": {"width": 0}}, name="this head",
                              hovertemplate="%{x} tokens back<br>%{y:.5g}<extra></extra>"))  # fmt: skip
    if twin is not None:
        figure.add_scatter(x=np.arange(len(twin)), y=twin, mode="lines", name="at random weights",
                           line={"color": theme.categorical[1], "width": 1.6, "shape": "hvh"},
                           hovertemplate="%{x} tokens back<br>%{y:.5g}<extra>at random weights</extra>")  # fmt: skip
    figure.update_layout(
        template=template(theme.name), meta={"panel": panel}, showlegend=twin is not None, bargap=0.15,
        xaxis={"title": {"text": "distance back from the reading token"}, "range": [-0.7, len(values) - 0.3], "fixedrange": True,
               "showgrid": False},
        yaxis={"title": {"text": "mean weight"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure
