"""Figures of the state page: the memory of one head, how it grows and fades, and single entries followed over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, number, picture, token_lines
from app.theme import Theme, template

Span = tuple[int, int]


def state_picture(
    source: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    rows: Span,
    columns: Span,
    colours: Colours,
    theme: Theme,
    *,
    panel: str,
    tracked: Sequence[tuple[int, int]] = (),
) -> go.Figure:
    """A matrix state after one token, or the difference of two: `shape` [state_k, state_v], `axes` their names in words.

    `source` is the address of the picture of exactly `rows` × `columns`. Click follows an entry; followed entries wear the
    colour of their line in `tracked_entries`.
    """
    figure = picture(
        source, Axis(axes[1], shape[1], "state_v"), Axis(axes[0], shape[0], "state_k"), columns, rows, colours, theme,
        panel=panel, meta={"click": "track", "zoom": {"x": "scols", "y": "srows"}},
    )  # fmt: skip
    for index, (row, column) in enumerate(tracked):
        figure.add_shape(
            type="rect", x0=column, x1=column + 1, y0=row, y1=row + 1,
            line={"color": theme.categorical[index % 8], "width": 2.5},
        )  # fmt: skip
    return figure


def cache_picture(
    source: str, tokens: Sequence[str], width: int, span: Span, colours: Colours, theme: Theme, *, panel: str, name: str
) -> go.Figure:
    """Keys or values in a softmax cache: one column per token of `span`, one row per channel of `width`."""
    return picture(
        source, Axis("token in the cache", len(tokens), "token", tokens), Axis(f"{name} channel", width, "channel"), span,
        (0, width), colours, theme, panel=panel, meta={"click": "token"},
    )  # fmt: skip


def state_norms(
    norms: np.ndarray, tokens: Sequence[str], head: int, theme: Theme, *, panel: str, title: str = "Frobenius norm"
) -> go.Figure:
    """Size of each head's state after every token, `norms` [head, pos]; the chosen head strong."""
    order = [h for h in range(len(norms)) if h != head] + [head]
    figure = token_lines(
        [(f"head {h}", norms[h]) for h in order], tokens, theme, y_title=title, panel=panel, role="position",
        click="position", selected=len(order) - 1, from_zero=True,
        colours=[theme.categorical[h % 8] for h in order], ranks=order,
    )  # fmt: skip
    figure.update_layout(showlegend=1 < len(norms) <= 8)
    return figure


def signal_raster(
    source: str, tokens: Sequence[str], n_heads: int, span: Span, colours: Colours, theme: Theme, *, panel: str
) -> go.Figure:
    """A per-token signal (decay, gate, write) of all heads: one row per head, one column per token."""
    figure = picture(
        source, Axis("token", len(tokens), "position", tokens), Axis("head", n_heads, "head"), span, (0, n_heads), colours,
        theme, panel=panel, meta={"click": "position"},
    )  # fmt: skip
    figure.update_yaxes(tickvals=[h + 0.5 for h in range(n_heads)], ticktext=[str(h) for h in range(n_heads)])
    return figure


def vector_raster(
    source: str, tokens: Sequence[str], axis: str, size: int, colours: Colours, theme: Theme, *, panel: str
) -> go.Figure:
    """A vector state over time: one row per entry along `axis`, one column per token."""
    figure = picture(
        source, Axis("after token", len(tokens), "position", tokens), Axis(axis, size, "state_k"), (0, len(tokens)), (0, size), colours,
        theme, panel=panel, meta={"click": "position"},
    )  # fmt: skip
    return figure


def tracked_entries(
    names: Sequence[str], traces: np.ndarray, tokens: Sequence[str], theme: Theme, *, panel: str
) -> go.Figure:
    """Single entries of the state over time: `names` such as `[2, 5]`, `traces` [entry, pos]; nan where unknown."""
    return token_lines(
        list(zip(names, traces, strict=True)), tokens, theme,
        y_title="entry of the state", panel=panel, role="position", click="position",
        dashes=[("solid", "dash", "dot", "dashdot")[index // 2 % 4] for index in range(len(names))],
    )  # fmt: skip


def singular_values(values: np.ndarray, compare: np.ndarray | None, theme: Theme, *, panel: str, names: tuple[str, str]) -> go.Figure:
    """Singular values of the state, largest first, `values` [rank]; `compare` is a second state's, or None."""
    figure = go.Figure()
    for each, name, colour, symbol in ((compare, names[1], theme.categorical[1], "square"), (values, names[0], theme.accent, "circle")):
        if each is None:
            continue
        figure.add_scatter(
            x=np.arange(1, len(each) + 1), y=each, name=name, mode="lines+markers",
            line={"color": colour, "width": 1.5}, marker={"size": 6, "symbol": symbol},
            hovertemplate="singular value %{x}<br>%{y:.5g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), showlegend=compare is not None, meta={"panel": panel},
        xaxis={"title": {"text": "rank"}, "fixedrange": True, "showgrid": False},
        yaxis={"title": {"text": "singular value"}, "fixedrange": True, "rangemode": "tozero"},
    )  # fmt: skip
    return figure


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of the singular values taken as shares [rank] (Roy & Vetterli 2007); nan for a zero state."""
    total = float(np.sum(values, dtype=np.float64))
    if not total > 0:
        return float("nan")
    shares = np.asarray(values, dtype=np.float64) / total
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rank_words(values: np.ndarray) -> str:
    """One sentence on a spectrum [rank]."""
    return f"effective rank {number(effective_rank(values))} of {len(values)}"
