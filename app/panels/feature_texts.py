"""The contexts of a feature as text, in which each token has the colour of its value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dash import html
from dash.development.base_component import Component

from app.figures.common import number, visible_text
from app.measure.features import KIND
from app.panels.features import CONTEXTS, chosen_feature
from app.panels.results import measured
from app.render import to_levels
from app.services import Scene
from app.theme import colours_of, readable_on, theme_called


def coloured(
    tokens: Sequence[str], values: np.ndarray, largest: float, focus: int, scheme: str | None
) -> list[Component]:
    """Tokens with the colour of their values; neighbours of one colour are one piece, the marked token stands alone."""
    theme = theme_called(scheme)
    levels = to_levels(np.nan_to_num(np.asarray(values, float)), largest or 1.0, "sqrt", False)
    backgrounds = colours_of(levels, theme.wash_name(False))
    pieces: list[tuple[str, str, bool, float]] = []
    for at, (token, background, value) in enumerate(zip(tokens, backgrounds, values, strict=True)):
        colour = "" if not value > 0 else background
        text = visible_text(token) if len(token) > 1 or token.strip() or at == focus or colour else " "
        if pieces and at != focus and not pieces[-1][2] and pieces[-1][1] == colour == "":
            pieces[-1] = (pieces[-1][0] + text, colour, False, 0.0)
        else:
            pieces.append((text, colour, at == focus, float(value)))
    return [
        html.Span(
            text, className="feature-token is-focus" if marked else "feature-token", title=number(value) if value > 0 else "",
            style={"background": colour, "color": readable_on(colour)} if colour else {},
        )
        for text, colour, marked, value in pieces
    ]  # fmt: skip


def context_lines(scene: Scene, scheme: str | None) -> list[Component]:
    """The contexts of the chosen feature; under each, for a BDH, the same text by the feature's best neuron."""
    try:
        contexts = CONTEXTS.contexts(scene)
    except Exception:  # the panel below says why
        return []
    found, feature = measured(scene, KIND), chosen_feature(scene)
    assert found is not None and feature is not None
    largest = float(found.array("largest")[feature])
    own = [each["neuron"] for each in contexts if each["neuron"] is not None]
    strongest = max((float(np.nanmax(values)) for values in own if np.isfinite(values).any()), default=0.0)
    lines: list[Component] = []
    last = None
    for each in contexts:
        if each["band"] != last:
            last = each["band"]
            lines.append(
                html.H3("Strongest" if last < 0 else f"Part {last + 1} of 4 of its range", className="says-title")
            )
        text = html.Span(
            coloured(each["tokens"], each["values"], largest, each["focus"], scheme), className="feature-text"
        )
        lines.append(
            html.Div([html.Span(number(each["value"]), className="feature-value"), text], className="feature-line")
        )
        if each["neuron"] is not None and np.isfinite(each["neuron"]).any():
            text = html.Span(
                coloured(each["tokens"], each["neuron"], strongest, each["focus"], scheme), className="feature-text"
            )
            lines.append(
                html.Div([html.Span("neuron", className="feature-value"), text], className="feature-line is-neuron")
            )
    return lines
