"""Attention: who reads from whom, for softmax and for effective patterns alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from dash import Dash, Output, html
from dash.development.base_component import Component

from app import ablate
from app.frames import frame, scene_of_slice, slice_input, view_slice
from app.page import Page, head_choice, layer_choice, pooling_choice, scale_choice, score_map_choice, zoom_buttons
from app.panels.attention import PANELS
from app.panels.scores import ScoreRow, labels_of
from app.panels.words import pattern_words
from app.services import Scene, Services, reads_source

SCORE_ROW = ScoreRow()


def structure(scene: Scene) -> Hashable:
    """The lists of heads and of scores depend on the layer, and what is said of its map on what it reads."""
    return (scene.layer["n_heads"], reads_source(scene.layer), tuple(labels_of(scene).items())) if scene.layer else None


def controls(scene: Scene) -> Sequence[Component]:
    if not scene.layers:
        return []
    return [
        layer_choice(scene),
        head_choice(scene),
        *score_map_choice(scene),
        pooling_choice(scene),
        scale_choice(scene),
    ]


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    heads, pattern, row, received, row_profile, offsets = PANELS
    made_of = [frame(SCORE_ROW, scene, "span-12")] if labels_of(scene) else []
    chips = html.Div(
        [html.Div(id="pattern-chips", className="chip-row"), view_slice("content", "pattern-chips", ("run", "layer"))]
    )
    bar = html.Div([chips, zoom_buttons("Whole map")], className="map-bar")
    return [
        html.Div(
            [
                frame(pattern, scene, "span-8", above=[bar, ablate.button(scene)]),
                html.Div([frame(heads, scene, ""), frame(received, scene, "")], className="column span-4"),
                frame(row, scene, "span-12"),
                *made_of,
                frame(row_profile, scene, "span-6"),
                frame(offsets, scene, "span-6"),
            ],
            className="grid",
        )
    ]


def register(app: Dash, services: Services) -> None:
    @app.callback(Output("pattern-chips", "children"), slice_input("content", "pattern-chips"))
    def show_pattern_words(data: dict[str, Any] | None) -> Any:
        if not data or not data.get("view"):
            return []
        layer = scene_of_slice(services, data["view"]).layer
        return (
            [html.Span(fact, className="chip") for fact in pattern_words(layer)] if layer and layer.get("form") else []
        )


PAGE = Page(
    name="attention",
    title="Attention",
    icon="attention",
    order=1,
    words="Which tokens each head reads from, in softmax and in linear layers alike.",
    layout=layout,
    panels=(*PANELS, SCORE_ROW),
    structure=structure,
    controls=controls,
    register=register,
)
