"""Figures of sparse neurons (BDH): who fires when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture, token_lines
from app.theme import Theme


def neuron_order(activity: np.ndarray, sort: str) -> np.ndarray:
    """Neurons in the order of a raster: int64 [neuron]. `activity` [pos, neuron] is nonnegative.

    `sort`: "index"; "total" and "peak" largest first; "first" by the first token at which a neuron is active, never-active
    ones last. Ties keep their number order. Raises ValueError for another word.
    """
    if sort == "index":
        return np.arange(activity.shape[1])
    if sort == "total":
        key = -activity.sum(axis=0, dtype=np.float64)
    elif sort == "peak":
        key = -activity.max(axis=0).astype(np.float64)
    elif sort == "first":
        active = activity > 0
        key = np.where(active.any(axis=0), active.argmax(axis=0), len(activity)).astype(np.float64)
    else:
        raise ValueError(f"neurons are sorted by index, total, peak or first, not {sort!r}")
    return np.argsort(key, kind="stable")


def neuron_raster(
    source: str, tokens: Sequence[str], n_neurons: int, span: tuple[int, int], colours: Colours, theme: Theme, *, panel: str
) -> go.Figure:
    """Activity of sorted neurons over tokens: one row per neuron (pooled when there are many), one column per token."""
    return picture(
        source, Axis("token", len(tokens), "position", tokens), Axis("neuron, in sorted order", n_neurons, "neuron"), span,
        (0, n_neurons), colours, theme, panel=panel, meta={"click": "position"},
    )  # fmt: skip


def top_neurons(neurons: Sequence[int], activity: np.ndarray, tokens: Sequence[str], theme: Theme, *, panel: str) -> go.Figure:
    """Activity over time of a few neurons: `neurons` their numbers, `activity` [neuron, pos]."""
    return token_lines(
        [(f"neuron {neuron}", trace) for neuron, trace in zip(neurons, activity, strict=True)], tokens, theme,
        y_title="activity", panel=panel, role="position", click="position", from_zero=True,
    )  # fmt: skip
