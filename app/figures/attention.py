"""Figures of the attention page: one head's pattern, all heads at once, and profiles that say where the weight goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture, token_lines
from app.theme import Theme, template

Span = tuple[int, int]


def attention_map(
    source: str,
    tokens: Sequence[str],
    rows: Span,
    columns: Span,
    colours: Colours,
    theme: Theme,
    *,
    panel: str,
    read: Sequence[str] | None = None,
) -> go.Figure:
    """One head's pattern as a picture: row = token that reads, column = token that is read.

    `source` is the address of the picture of exactly `rows` × `columns`. `read` are the tokens of another text, if that is what is read.
    Click pins a cell (of another text: the row), dragging zooms.
    """
    keys = Axis("token that is read (key)", len(tokens), "key", tokens)
    figure = picture(
        source,
        keys if read is None else Axis("token of the source that is read (key)", len(read), "source", read),
        Axis("token that reads (query)", len(tokens), "query", tokens),
        columns,
        rows,
        colours,
        theme,
        panel=panel,
        meta={"click": "pattern" if read is None else "row", "zoom": {"x": "cols", "y": "rows"}},
    )
    return figure


def head_mosaic(source: str, heads_per_layer: Sequence[int], theme: Theme, *, panel: str) -> go.Figure:
    """Every head of every layer as one picture; tile (layer l, head h) covers [h, h + 1) × [l, l + 1).

    Click chooses the head.
    """
    n_layers, n_heads = len(heads_per_layer), max(heads_per_layer)
    colours = Colours(theme.table_name(False), 1.0, "sqrt", False, "weight, each head by its own largest")
    figure = picture(
        source,
        Axis("head", n_heads, "head"),
        Axis("layer", n_layers, "layer"),
        (0, n_heads),
        (0, n_layers),
        colours,
        theme,
        panel=panel,
        columns_on_top=True,
        meta={"click": "tile"},
    )
    figure.data = ()
    figure.add_scatter(x=[None], y=[None], hoverinfo="skip", showlegend=False)
    figure.update_layout(margin={"l": 42, "r": 6, "t": 42, "b": 6, "autoexpand": False})
    for axis, count in ((figure.layout.xaxis, n_heads), (figure.layout.yaxis, n_layers)):
        step = max(1, -(-count // 12))
        axis.update(
            ticks="",
            tickvals=[i + 0.5 for i in range(0, count, step)],
            ticktext=[str(i) for i in range(0, count, step)],
        )
    gap = {"color": theme.surface, "width": 5 if max(n_heads, n_layers) <= 8 else 3}
    figure.layout.shapes = [
        *({"type": "line", "x0": at, "x1": at, "y0": 0, "y1": n_layers, "line": gap} for at in range(n_heads + 1)),
        *({"type": "line", "x0": 0, "x1": n_heads, "y0": at, "y1": at, "line": gap} for at in range(n_layers + 1)),
    ]
    return figure


def head_profiles(
    values: np.ndarray, tokens: Sequence[str], head: int, theme: Theme, *, y_title: str, panel: str, role: str
) -> go.Figure:
    """One line per head over tokens, `values` [head, pos]; the chosen head strong, the others of the layer faint."""
    n_heads = len(values)
    order = [h for h in range(n_heads) if h != head] + [head]  # the chosen head is drawn last, on top
    figure = token_lines(
        [(f"head {h}", values[h]) for h in order],
        tokens,
        theme,
        y_title=y_title,
        panel=panel,
        role=role,
        click="none" if role == "source" else "token",
        selected=n_heads - 1,
        from_zero=True,
        colours=[theme.accent if h == head else theme.dim for h in order],
        ranks=order,
        x_title="token",
    )
    figure.update_layout(showlegend=False)
    return figure


def offset_profile(values: np.ndarray, theme: Theme, *, panel: str, y_title: str = "mean weight") -> go.Figure:
    """Mean weight (or what `y_title` says) at each distance query − key, `values` [distance], as bars; nan where no pair exists."""
    figure = go.Figure()
    figure.add_bar(
        x=np.arange(len(values)), y=values, marker={"color": theme.accent, "line": {"width": 0}},
        hovertemplate="%{x} tokens back<br>%{y:.5g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), showlegend=False, bargap=0.15, meta={"panel": panel},
        xaxis={"title": {"text": "distance back from the reading token"}, "range": [-0.7, len(values) - 0.3], "fixedrange": True,
               "showgrid": False},
        yaxis={"title": {"text": y_title}, "fixedrange": True, "zeroline": True},
    )  # fmt: skip
    return figure
