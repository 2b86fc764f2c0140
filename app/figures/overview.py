"""Figures of the overview: what the model is made of, what it found hard, and what it expects next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import MONO, Axis, Colours, number, picture, plain_label, token_label, token_lines, visible_text
from app.theme import FAMILY_COLOURS, Theme, readable_on, template

MOST_COLUMNS = 24
"""A deeper model is drawn as groups of equal consecutive layers."""


def next_tokens(
    labels: Sequence[str], log_probs: np.ndarray, theme: Theme, *, panel: str, actual: int | None = None
) -> go.Figure:
    """The most likely tokens as bars, most likely on top: `labels` and `log_probs` [rank].

    `actual` is the rank of the token that really is there, when it is among them; its bar is marked.
    """
    probabilities = np.exp(np.asarray(log_probs, dtype=np.float64))
    names = [plain_label(visible_text(label)) for label in labels]
    places = np.arange(len(labels))
    largest = max(1e-6, float(probabilities.max(initial=0)))
    colours = [theme.good if rank == actual else theme.accent for rank in range(len(labels))]
    figure = go.Figure()
    figure.add_bar(
        x=probabilities, y=places, orientation="h", marker={"color": colours, "line": {"width": 0}},
        text=[f"{p:.1%}" + (" ✓" if rank == actual else "") for rank, p in enumerate(probabilities)],
        textposition="outside", cliponaxis=False, textfont={"size": 11, "color": theme.dim}, customdata=names,
        hovertemplate="‘%{customdata}’<br>probability %{x:.5g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), showlegend=False, bargap=0.28, meta={"panel": panel},
        xaxis={"range": [0, 1.25 * largest], "tickformat": ".0%" if largest > 0.08 else ".1%" if largest > 0.008 else ".2%",
               "fixedrange": True, "nticks": 5, "title": {"text": "probability"}},
        yaxis={"range": [len(labels) - 0.5, -0.5], "tickvals": places, "ticktext": names, "fixedrange": True, "ticks": "",
               "showgrid": False, "tickfont": {"family": MONO, "size": 13, "color": theme.text}},
        margin={"l": 44, "r": 20, "t": 8, "b": 40},
    )  # fmt: skip
    return figure


def loss_strip(loss: np.ndarray, tokens: Sequence[str], theme: Theme, *, panel: str) -> go.Figure:
    """Surprisal of each token in nats, `loss` [pos] with nan where there was nothing to predict from."""
    figure = token_lines([("surprisal", loss)], tokens, theme, y_title="nats", panel=panel, from_zero=True)
    mean = float(np.nanmean(loss)) if np.isfinite(loss).any() else float("nan")
    if np.isfinite(mean):
        figure.add_hline(y=mean, line={"color": theme.dim, "width": 1, "dash": "dot"})
        figure.add_annotation(x=1, xref="paper", xanchor="left", y=mean, text=f" mean {number(mean)}", showarrow=False,
                              font={"size": 10.5, "color": theme.dim})  # fmt: skip
        figure.update_layout(margin_r=76)
    figure.data[0].update(fill="tozeroy", fillcolor=_faded(theme.accent, 0.14), line={"color": theme.accent, "width": 1.6,
                          "shape": "hvh"})  # fmt: skip
    return figure


def residual_norms(source: str, tokens: Sequence[str], n_depths: int, colours: Colours, theme: Theme, *, panel: str) -> go.Figure:
    """L2 norm of the residual stream: one row per depth (0 = embedding), one column per token."""
    figure = picture(
        source, Axis("token", len(tokens), "token", tokens), Axis("after layer", n_depths, "depth"), (0, len(tokens)),
        (0, n_depths), colours, theme, panel=panel, meta={"click": "token"},
    )  # fmt: skip
    places = list(range(0, n_depths, max(1, n_depths // 12)))
    names = ["embed" if depth == 0 else str(depth - 1) for depth in places]
    figure.update_yaxes(tickvals=[p + 0.5 for p in places], ticktext=names)
    return figure


# ---- block diagram ---------------------------------------------------------------------------------------------------


def block_diagram(blocks: Sequence[Mapping[str, Any]], theme: Theme, *, panel: str, layer: int | None = None) -> go.Figure:
    """What the model is made of: the residual stream as a line, and above it one column per layer.

    `blocks`: `{kind, label, detail, layer}` in the order of the forward pass; `layer` is None for what stands before and after
    the layers. Equal consecutive layers of a deep model are drawn once, with their number. Click chooses the layer;
    `layer` is the chosen one.
    """
    columns = _columns(blocks)
    tallest = tallest_column(blocks)
    figure = go.Figure()
    figure.add_shape(type="line", x0=-0.62, x1=len(columns) - 0.38, y0=0, y1=0, line={"color": theme.dim, "width": 2.5})
    figure.add_annotation(x=len(columns) - 0.36, y=0, ax=-14, ay=0, arrowhead=2, arrowwidth=2.5, arrowcolor=theme.dim, text="")
    for place, column in enumerate(columns):
        _draw_column(figure, place, column, theme, chosen=layer is not None and layer in column["layers"])
    centres = [column["layers"][0] if column["layers"] else None for column in columns]
    figure.add_scatter(
        x=list(range(len(columns))), y=[0.5] * len(columns), mode="markers", marker={"opacity": 0, "size": 30},
        hovertext=["<br>".join(plain_label(f"{part['label']}: {part['detail']}") for part in column["parts"]) for column in columns],
        hoverinfo="text", showlegend=False,
    )  # fmt: skip
    figure.update_layout(
        template=template(theme.name), margin={"l": 8, "r": 8, "t": 8, "b": 8},
        xaxis={"range": [-0.66, len(columns) - 0.3], "visible": False, "fixedrange": True},
        yaxis={"range": [-0.36, 0.2 + 0.98 * tallest], "visible": False, "fixedrange": True},
        clickanywhere=True, hoverdistance=60,
        meta={"panel": panel, "click": "layer", "layers": centres, "x": {"role": "layer", "origin": -0.5, "size": len(columns)}},
    )  # fmt: skip
    return figure


def column_count(blocks: Sequence[Mapping[str, Any]]) -> int:
    """How many columns `block_diagram` draws."""
    return len(_columns(blocks))


def tallest_column(blocks: Sequence[Mapping[str, Any]]) -> int:
    """How many boxes the tallest column of `block_diagram` has."""
    return max((len(column["parts"]) for column in _columns(blocks)), default=1)


def _columns(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    columns: list[dict[str, Any]] = []
    for block in blocks:
        layer = block.get("layer")
        if layer is not None and columns and columns[-1]["layers"] == [layer]:
            columns[-1]["parts"].append(block)
        else:
            columns.append({"layers": [] if layer is None else [layer], "parts": [block]})
    if len(columns) <= MOST_COLUMNS:
        return columns
    grouped: list[dict[str, Any]] = []
    for column in columns:
        same = grouped and grouped[-1]["layers"] and column["layers"] and _signature(grouped[-1]) == _signature(column)
        if same:
            grouped[-1]["layers"] += column["layers"]
        else:
            grouped.append({"layers": list(column["layers"]), "parts": column["parts"]})
    return grouped


def _signature(column: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(part["kind"], part["label"], part["detail"]) for part in column["parts"]]


def _draw_column(figure: go.Figure, place: int, column: Mapping[str, Any], theme: Theme, *, chosen: bool) -> None:
    layers = column["layers"]
    figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=0.2, line={"color": theme.dim, "width": 1.5})
    for level, part in enumerate(column["parts"]):
        bottom, top = 0.2 + level * 0.98, 0.2 + level * 0.98 + 0.86
        index = FAMILY_COLOURS.get(str(part["kind"]))
        fill = theme.sunken if index is None else theme.categorical[index]
        ink = theme.text if index is None else readable_on(fill)
        figure.add_shape(
            type="rect", x0=place - 0.43, x1=place + 0.43, y0=bottom, y1=top, fillcolor=fill,
            line={"color": theme.text if chosen else theme.border, "width": 2.5 if chosen else 1},
        )  # fmt: skip
        figure.add_annotation(
            x=place, y=(bottom + top) / 2, showarrow=False, font={"size": 11.5, "color": ink},
            text=f"<b>{_wrapped(str(part['label']), 11)}</b><br><span style='font-size:10px'>{_wrapped(str(part['detail']), 15)}</span>",
        )  # fmt: skip
    name = "" if not layers else f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"
    figure.add_annotation(x=place, y=-0.2, text=name, showarrow=False, font={"size": 11, "color": theme.dim})


def _wrapped(text: str, most: int) -> str:
    """Text of a box, in two lines at the space or hyphen nearest its middle where it is longer than `most` characters."""
    breaks = [at for at, letter in enumerate(text) if letter in " -"]
    if len(text) <= most or not breaks:
        return plain_label(text)
    middle = min(breaks, key=lambda at: abs(at - len(text) / 2))
    return f"{plain_label(text[: middle + 1].rstrip())}<br>{plain_label(text[middle + 1 :])}"


def _faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def token_choice(tokens: Sequence[str], index: int) -> str:
    """The words for a chosen token: `after token 12 ‘a’`."""
    return f"after token {token_label(tokens, index)}"
