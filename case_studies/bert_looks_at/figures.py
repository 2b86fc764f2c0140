"""The figures of this study, from the results of its stages to Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
# Table 1 of the paper, and its notebook where the table's row is another one's; Stanford Dependencies, so names differ
PUBLISHED = {
    "all": 34.5,
    "det": 94.3,
    "obj": 86.8,
    "nsubj": 58.5,
    "amod": 75.6,
    "nmod:poss": 80.5,
    "case": 66.7,
    "aux:pass": 94.1,
}
PUBLISHED_PARSER = {"attention": 61, "right neighbour": 26}


def special_tokens(seen: Mapping[str, Any]) -> go.Figure:
    """Weight on special tokens and punctuation: one point per head, a line through the means of the layers."""
    figure = go.Figure()
    for (name, label), colour in zip(
        {"cls": "[CLS]", "sep": "[SEP]", "punctuation": "punctuation"}.items(), (BLUE, ORANGE, GREEN), strict=True
    ):
        mass = seen[f"mass_{name}"]
        layers = np.repeat(np.arange(len(mass)), mass.shape[1])
        figure.add_scatter(
            x=layers, y=mass.flatten(), mode="markers", marker={"color": colour, "size": 5, "opacity": 0.45}, showlegend=False,
            text=[f"head {i // mass.shape[1]}.{i % mass.shape[1]}" for i in range(mass.size)],
            hovertemplate="%{text}: %{y:.3f}<extra>" + label + "</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=np.arange(len(mass)), y=mass.mean(1), mode="lines", name=label, line={"color": colour, "width": 2}
        )
    figure.update_layout(
        title="Attention to special tokens", xaxis_title="layer", yaxis_title="mean weight", xaxis_dtick=1,
    )  # fmt: skip
    return figure


def neighbours(seen: Mapping[str, Any]) -> go.Figure:
    """Mean weight on the previous and on the next token, of every head."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("previous token", "next token"), horizontal_spacing=0.1)
    for column, name in enumerate(("previous", "next"), 1):
        figure.add_heatmap(
            z=seen[name], coloraxis="coloraxis", row=1, col=column,
            hovertemplate="head %{y}.%{x}: %{z:.2f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title="head", dtick=2, showgrid=False, row=1, col=column)
        figure.update_yaxes(title="layer" if column == 1 else None, dtick=1, showgrid=False, row=1, col=column)
    figure.update_annotations(font_size=12)
    figure.update_layout(
        title="Heads that read a neighbour",
        margin={"t": 60},
        coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 1, "colorbar": {"title": "weight"}},
    )
    return figure


def entropies(seen: Mapping[str, Any]) -> go.Figure:
    """Entropy of what heads read, by layer: all rows, and the row of [CLS]."""
    figure = go.Figure()
    for name, label, colour in (("entropy", "every token", BLUE), ("cls_entropy", "[CLS]", ORANGE)):
        values = seen[name]
        layers = np.repeat(np.arange(len(values)), values.shape[1])
        figure.add_scatter(
            x=layers, y=values.flatten(), mode="markers", marker={"color": colour, "size": 5, "opacity": 0.45}, showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=np.arange(len(values)), y=values.mean(1), mode="lines", name=label, line={"color": colour, "width": 2}
        )
    figure.update_layout(
        title="How broadly heads read", xaxis_title="layer", yaxis_title="entropy in nats", xaxis_dtick=1
    )
    return figure


def relations(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The chosen head of each relation on test sentences beside its baselines and BERT-base's published score."""
    figure = _bars(
        [record["label"] for record in records],
        {
            "chosen head": ([record["accuracy"] for record in records], BLUE),
            "fixed offset": ([record["offset_accuracy"] for record in records], ORANGE),
            "random twin": ([record["twin"] for record in records], PURPLE),
            "answers permuted, best of all heads": ([record["permuted"] for record in records], GREY),
        },
        [record["interval"] for record in records],
        [f"{record['head_name']}, {record['count']} words" for record in records],
    )
    known = [record["label"] for record in records if record["label"] in PUBLISHED]
    figure.add_scatter(
        x=known, y=[PUBLISHED[name] / 100 for name in known], mode="markers", name="BERT-base, published",
        marker={"symbol": "diamond-open", "size": 11, "color": "#000000", "line": {"width": 2}},
    )  # fmt: skip
    figure.update_layout(title="Dependency relations that one head points along", yaxis_title="share of heads found")
    return figure


def coreference(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The chosen head on mentions of every kind, beside the rules that need no model."""
    figure = _bars(
        [record["label"] for record in records],
        {
            "chosen head": ([record["accuracy"] for record in records], BLUE),
            "nearest mention": ([record["nearest"] for record in records], ORANGE),
            "nearest mention of the same word": ([record["same_word"] for record in records], GREEN),
            "random twin": ([record["twin"] for record in records], PURPLE),
        },
        [record["interval"] for record in records],
        [f"{record['head_name']}, {record['count']} mentions" for record in records],
    )
    figure.update_layout(title="Mentions whose antecedent a head points at", yaxis_title="share found")
    return figure


def parser(scores: Mapping[str, float]) -> go.Figure:
    """Attachment of the parser that sees attention alone, with the published scores."""
    figure = go.Figure()
    figure.add_bar(x=list(scores), y=list(scores.values()), name="here", marker_color=BLUE)
    known = [name for name in scores if name in PUBLISHED_PARSER]
    figure.add_bar(
        x=known, y=[PUBLISHED_PARSER[name] / 100 for name in known], name="BERT-base, published", marker_color=GREY
    )
    figure.update_layout(
        title="A parser that reads attention alone", yaxis_title="words whose head is found", yaxis_range=[0, 1]
    )
    return figure


def alike(distance: np.ndarray, n_layers: int) -> go.Figure:
    """Heads in a plane, near each other where they read alike: classical scaling of Jensen–Shannon distances."""
    places, explained = scaled(distance)
    heads = len(distance) // n_layers
    figure = go.Figure()
    for layer in range(n_layers):
        rows = slice(layer * heads, (layer + 1) * heads)
        shade = layer / max(1, n_layers - 1)
        figure.add_scatter(
            x=places[rows, 0], y=places[rows, 1], mode="markers", name=f"layer {layer}",
            text=[f"{layer}.{head}" for head in range(heads)], hovertemplate="head %{text}<extra></extra>",
            marker={"size": 9, "color": f"rgb({round(20 + 210 * shade)}, {round(90 + 60 * shade)}, {round(190 - 160 * shade)})"},
        )  # fmt: skip
    figure.update_layout(
        title=f"Heads that read alike ({explained:.0%} of the squared distances)", height=560,
        xaxis={"showticklabels": False}, yaxis={"showticklabels": False, "scaleanchor": "x"},
    )  # fmt: skip
    return figure


def scaled(distance: np.ndarray) -> tuple[np.ndarray, float]:
    """Two coordinates for each thing from distances between all, [thing, 2], and the share of the positive variance that they hold."""
    centre = np.eye(len(distance)) - 1 / len(distance)
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distance) @ centre)
    places = vectors[:, [-1, -2]] * np.sqrt(np.maximum(values[[-1, -2]], 0))
    return places, float(values[-2:].clip(min=0).sum() / values.clip(min=0).sum())


def _bars(
    labels: Sequence[str],
    series: Mapping[str, tuple[Sequence[float], str]],
    intervals: Sequence[Mapping[str, float]],
    words: Sequence[str],
) -> go.Figure:
    """Grouped bars; the first series gets intervals and a text to point at."""
    figure = go.Figure()
    for number, (name, (values, colour)) in enumerate(series.items()):
        more: dict[str, Any] = {}
        if number == 0:
            above = [each["high"] - value for each, value in zip(intervals, values, strict=True)]
            below = [value - each["low"] for each, value in zip(intervals, values, strict=True)]
            more = {"error_y": {"array": above, "arrayminus": below}, "text": list(words), "textposition": "none"}
            more["hovertemplate"] = "%{x}: %{y:.2f}<br>%{text}<extra></extra>"
        figure.add_bar(x=list(labels), y=list(values), name=name, marker_color=colour, **more)
    figure.update_layout(barmode="group", yaxis_range=[0, 1])
    return figure
