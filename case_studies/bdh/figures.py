"""The figures of this study, from the results of its stages to Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from case_studies.bdh.letters import FIRST, PAPER_LAYER, PERIOD, WARM_UP, WORD
from case_studies.bdh.text import DOMAINS, SPARSITY_POINTS

Record = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PRIORS = (0.5, 0.5, 0.245)
GREY = "#999999"


def sparsity(seeds: Sequence[Record]) -> go.Figure:
    """Active share of x, gate and y (mean over layers) against training step, one line per seed, with the share at random weights."""
    figure = go.Figure()
    for point, name in enumerate(SPARSITY_POINTS):
        for number, seed in enumerate(seeds):
            curve = np.asarray(seed["sparsity_curve"])[:, point].mean(-1)
            figure.add_scatter(
                x=seed["sparsity_steps"], y=100 * curve, mode="lines+markers", name=name, legendgroup=name,
                showlegend=number == 0, line={"color": COLOURS[point], "width": 1.5}, marker={"size": 4},
            )  # fmt: skip
    for share in sorted(set(PRIORS)):
        figure.add_hline(y=100 * share, line={"dash": "dot", "width": 1, "color": GREY})
    figure.add_hline(y=5, line={"dash": "dash", "width": 1, "color": "#000000"}, annotation_text="published: 5 %")
    figure.update_layout(
        title="Sparsity during training, one line per seed", xaxis_title="training step",
        yaxis_title="active neurons, %", yaxis_rangemode="tozero",
    )  # fmt: skip
    return figure


def surprise(seeds: Sequence[Record]) -> go.Figure:
    """Active y by position in the layer of figure 14, and the ratio of first presentation to repetitions in every layer."""
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.6, 0.4], horizontal_spacing=0.1,
        subplot_titles=("layer 2, every seed", "first presentation over repetitions"),
    )  # fmt: skip
    for number, seed in enumerate(seeds):
        for name, key, colour in (
            ("one word", "active_by_position", COLOURS[0]),
            ("a new word each time", "fresh_by_position", GREY),
        ):
            figure.add_scatter(
                x=np.arange(1, PERIOD), y=100 * np.asarray(seed[key])[PAPER_LAYER, 1:], mode="lines", name=name,
                legendgroup=name, showlegend=number == 0, line={"color": colour, "width": 1}, row=1, col=1,
            )  # fmt: skip
        for key, name, colour, shift in (
            ("ratios", "one word", COLOURS[0], -0.1),
            ("control_ratios", "a new word each time", GREY, 0.1),
        ):
            ratios = np.asarray(seed[key])
            figure.add_scatter(
                x=np.arange(len(ratios)) + shift, y=ratios, mode="markers", name=name, legendgroup=name,
                showlegend=False, marker={"color": colour, "size": 8}, row=1, col=2,
            )  # fmt: skip
    figure.add_vrect(x0=FIRST.start, x1=FIRST.stop, fillcolor=COLOURS[1], opacity=0.15, line_width=0, row=1, col=1)
    figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#000000"}, row=1, col=2)
    figure.update_xaxes(title="position", tickvals=list(range(WARM_UP, PERIOD, WORD)), row=1, col=1)
    figure.update_yaxes(title="active y, %", row=1, col=1)
    figure.update_xaxes(title="layer", dtick=1, row=1, col=2)
    figure.update_yaxes(title="ratio", row=1, col=2)
    figure.update_layout(title="Does a surprise activate more neurons?", margin={"t": 60})
    return figure


def octiles(seeds: Sequence[Record]) -> go.Figure:
    """The ratio of first presentation to repetitions by time scale of the neurons."""
    figure = go.Figure()
    for number, seed in enumerate(seeds):
        figure.add_scatter(
            x=np.arange(8), y=np.asarray(seed["octile_ratios"])[PAPER_LAYER], mode="lines+markers", name="a seed",
            showlegend=number == 0, line={"color": COLOURS[0], "width": 1},
        )  # fmt: skip
    figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#000000"})
    figure.update_layout(
        title="Surprise by time scale, layer 2", xaxis_title="octile of neurons, 0 rotates fastest",
        yaxis_title="first presentation / repetitions",
    )  # fmt: skip
    return figure


def edits(seeds: Sequence[Record]) -> go.Figure:
    """What edits of the state do to the log probability of what recall brings, against matched controls, one point per seed."""
    names = {
        "copy_effect": "state of B<br>− state of C",
        "reset_effect": "another start<br>− reset",
        "freeze_effect": "frozen after the word<br>− before it",
    }
    figure = go.Figure()
    for key, label in names.items():
        figure.add_scatter(
            x=[label] * len(seeds), y=[seed[key] for seed in seeds], mode="markers", showlegend=False,
            marker={"color": COLOURS[0], "size": 9},
        )  # fmt: skip
    # at the left end, where the points lie far above the line
    figure.add_hline(
        y=1,
        line={"dash": "dash", "width": 1, "color": GREY},
        annotation_text="asked: 1 nat",
        annotation_position="top left",
    )
    figure.update_layout(title="Recall follows the state", yaxis_title="difference, nats per letter")
    return figure


def modularity(curve: Record) -> go.Figure:
    """Q of the wiring against the number of edges, with its baselines (mean and standard deviation over draws)."""
    points = curve["points"]
    edges = [point["edges"] for point in points]
    figure = go.Figure()
    figure.add_scatter(
        x=edges, y=[p["observed"]["q"] for p in points], mode="lines+markers", name="trained",
        line={"color": "#000000", "width": 2.5},
        text=[f"giant component {p['observed']['giant']:.0%}" for p in points],
    )  # fmt: skip
    for number, name in enumerate(points[0]["baselines"]):
        draws = np.array([[draw["q"] for draw in point["baselines"][name]] for point in points])
        giant = [np.mean([draw["giant"] for draw in point["baselines"][name]]) for point in points]
        figure.add_scatter(
            x=edges, y=draws.mean(1), error_y={"array": draws.std(1)}, mode="lines+markers", name=name,
            line={"color": COLOURS[number], "dash": "dash"}, text=[f"giant component {share:.0%}" for share in giant],
        )  # fmt: skip
    figure.update_layout(
        title="Modularity, head 0 to head 0 of the shipped model", xaxis_title="edges", xaxis_type="log",
        yaxis_title="modularity Q", yaxis_rangemode="tozero",
    )  # fmt: skip
    return figure


def degrees(tails: Mapping[str, Record]) -> go.Figure:
    """Complementary cumulative distribution of in- and out-degrees with the power law and the log-normal that fit best."""
    figure = go.Figure()
    for colour, (way, tail) in zip(COLOURS, tails.items(), strict=False):
        ccdf = np.asarray(tail["ccdf"])
        figure.add_scatter(
            x=ccdf[:, 0], y=ccdf[:, 1], mode="markers", name=f"{way}-degree", marker={"color": colour, "size": 5}
        )
        fitted = np.asarray(tail["fitted"])  # degree, power law, log-normal
        for column, (law, dash) in enumerate(
            {f"power law, α = {tail['alpha']:.2f}": "dash", "log-normal": "dot"}.items(), start=1
        ):
            figure.add_scatter(
                x=fitted[:, 0],
                y=fitted[:, column],
                mode="lines",
                name=f"{way}: {law}",
                line={"color": colour, "dash": dash, "width": 1},
            )
    figure.update_layout(
        title="Degrees, head 0 to head 0 of the shipped model", xaxis_title="degree", yaxis_title="share of neurons",
        xaxis_type="log", yaxis_type="log",
    )  # fmt: skip
    return figure


def concepts(names: Sequence[str], rows: Sequence[Record]) -> go.Figure:
    """AUC on held-out sentences of the best synapse, single neurons and linear probes, per concept."""
    shown = {
        "best synapse": "synapse_auc", "neuron y": "y_neuron_auc", "neuron x": "x_neuron_auc",
        "probe of the stream": "stream_probe_auc", "probe of neurons": "neuron_probe_auc", "synapse, other language": "transfer",
    }  # fmt: skip
    figure = go.Figure()
    for colour, (label, key) in zip(COLOURS, shown.items(), strict=True):
        figure.add_bar(x=list(names), y=[row[key] for row in rows], name=label, marker_color=colour)
    figure.add_hline(y=0.5, line={"dash": "dash", "width": 1, "color": "#000000"})
    figure.update_layout(
        title="Telling sentences about a concept from others",
        yaxis_title="AUC on held-out sentences",
        yaxis_range=[0, 1],
    )
    return figure


def traces(found: Mapping[str, Record]) -> go.Figure:
    """The strength of each concept's best synapse over one English and one French sentence about it."""
    figure = make_subplots(
        rows=len(found), cols=2, horizontal_spacing=0.06, vertical_spacing=0.25 / len(found),
        subplot_titles=[f"{concept}, {language}" for concept in found for language in ("English", "French")],
    )  # fmt: skip
    for row, trace in enumerate(found.values(), 1):
        for column, language in enumerate(("en", "fr"), 1):
            strength = trace[language]["strength"]
            data = trace[language]["text"].encode()
            figure.add_scatter(
                x=list(range(len(strength))), y=strength, mode="lines", showlegend=False,
                text=[data[:end].decode(errors="replace")[-24:] for end in range(1, len(strength) + 1)],
                line={"color": COLOURS[column - 1]}, row=row, col=column,
            )  # fmt: skip
    figure.update_annotations(font_size=11)
    figure.update_xaxes(title="byte", row=len(found))
    figure.update_layout(
        title="Strength |C| of the first choice over a sentence", height=170 * len(found) + 120, margin={"t": 80}
    )
    return figure


def merging(seeds: Sequence[Record]) -> go.Figure:
    """Losses of base, copies and merged model on every domain, mean over seeds."""
    losses = np.stack([np.asarray(seed["merge_losses"]) for seed in seeds])
    mean = losses.mean(0)
    models = ("base (English)", *(f"+ {name}" for name in DOMAINS[1:]), "merged")
    figure = go.Figure(
        go.Heatmap(
            z=mean, x=list(DOMAINS), y=list(models), colorscale="Blues", texttemplate="%{z:.2f}",
            hovertemplate="%{y} on %{x}: %{z:.3f} nats<extra></extra>", colorbar={"title": "nats"},
        )
    )  # fmt: skip
    figure.update_layout(
        title=f"Held-out loss in nats per byte, mean of {len(seeds)} seeds", yaxis_autorange="reversed",
        xaxis_title="held-out text of", yaxis_title="model",
    )  # fmt: skip
    return figure
