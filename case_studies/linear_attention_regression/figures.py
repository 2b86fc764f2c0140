"""The figures of this study, from arrays to Plotly figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from case_studies.harness.context import SeedResults


def risk_curves(seeds: SeedResults, least: float) -> go.Figure:
    """Exact risk against training step, one line per seed, with the closed-form minimum and the scrambled control."""
    figure = go.Figure()
    for position, (steps, curve) in enumerate(zip(seeds["curve_steps"], seeds["curve"], strict=True)):
        figure.add_scatter(x=steps, y=curve, mode="lines", name="trained", legendgroup="trained", showlegend=position == 0,
                           line={"color": "#0072B2", "width": 1.5})  # fmt: skip
    for position, (steps, curve) in enumerate(zip(seeds["curve_steps"], seeds["scrambled_curve"], strict=True)):
        along = np.linspace(0, steps[-1], len(curve))
        figure.add_scatter(x=along, y=curve, mode="lines", name="scrambled labels", legendgroup="scrambled",
                           showlegend=position == 0, line={"color": "#D55E00", "width": 1.5, "dash": "dot"})  # fmt: skip
    figure.add_hline(y=least, line={"dash": "dash", "width": 1.5, "color": "#009E73"})
    figure.add_annotation(x=1, xref="paper", y=np.log10(least), text=f"minimum {least:.4f}", showarrow=False,
                          xanchor="right", yanchor="top")  # fmt: skip
    figure.update_layout(
        title="Risk falls to the closed-form minimum",
        xaxis_title="training step (control: share of its training)", yaxis_title="risk E(ŷ − y)²", yaxis_type="log",
    )  # fmt: skip
    return figure


def learned_and_optimal(learned: np.ndarray, optimum: np.ndarray) -> go.Figure:
    """The learned A, Γ⁻¹ and their difference times 10, as maps on one colour scale."""
    parts = {"learned": learned, "optimal Γ⁻¹": optimum, "difference × 10": 10 * (learned - optimum)}
    limit = float(max(np.abs(learned).max(), np.abs(optimum).max()))
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(parts), horizontal_spacing=0.06)
    for column, values in enumerate(parts.values(), 1):
        figure.add_heatmap(z=values, coloraxis="coloraxis", row=1, col=column,
                           hovertemplate="row %{y}, column %{x}: %{z:.4f}<extra></extra>")  # fmt: skip
        across = f"x{column if column > 1 else ''}"
        figure.update_xaxes(title="column", dtick=1, constrain="domain", showgrid=False, row=1, col=column)
        figure.update_yaxes(
            autorange="reversed", dtick=1, scaleanchor=across, constrain="domain", showgrid=False, row=1, col=column
        )
    figure.update_yaxes(title="row", row=1, col=1)
    figure.update_annotations(font_size=12)
    figure.update_layout(
        title="The learned update, first seed", margin={"t": 44},
        coloraxis={"colorscale": "RdBu_r", "cmin": -limit, "cmax": limit, "cmid": 0},
    )  # fmt: skip
    return figure


def covariate_shift(scales: Sequence[float], measured: Sequence[np.ndarray], theory: Sequence[float]) -> go.Figure:
    """Relative risk against the scale of the inputs, each seed and the closed form of the optimum."""
    figure = go.Figure()
    for position, values in enumerate(measured):
        figure.add_scatter(x=list(scales), y=values, mode="markers", name="trained", legendgroup="trained",
                           showlegend=position == 0, marker={"color": "#0072B2", "size": 9})  # fmt: skip
    figure.add_scatter(
        x=list(scales), y=list(theory), mode="lines", name="closed form", line={"color": "#009E73", "dash": "dash"}
    )
    figure.add_hline(y=1, line={"dash": "dot", "width": 1, "color": "#999999"})
    figure.update_layout(
        title="Inputs of another size than in training", xaxis_title="size of the inputs relative to training",
        yaxis_title="risk / variance of the targets", yaxis_type="log",
    )  # fmt: skip
    return figure
