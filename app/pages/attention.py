"""Attention: who reads from whom, for softmax and for effective patterns alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dash import html
from dash.development.base_component import Component

from app.frames import frame
from app.page import Page, head_choice, layer_choice, pooling_choice, scale_choice
from app.panels.attention import PANELS
from app.panels.words import pattern_words
from app.services import Scene, Services


def structure(scene: Scene) -> Hashable:
    """The head list depends on the layer; so do the words about its pattern."""
    layer = scene.layer
    return (layer["n_heads"], tuple(pattern_words(layer)) if layer.get("form") else None) if layer else None


def controls(scene: Scene) -> Sequence[Component]:
    return [layer_choice(scene), head_choice(scene), pooling_choice(scene), scale_choice(scene)] if scene.layers else []


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    heads, pattern, row, received, row_profile, offsets = PANELS
    facts = pattern_words(scene.layer) if scene.layer and scene.layer.get("form") else []
    chips = html.Div([html.Span(fact, className="chip") for fact in facts], className="chip-row")
    zoom = html.Div(
        [
            html.Button("Zoom to the pinned token", className="tool-button is-framed", type="button", **{"data-action": "near"}),
            html.Button("Whole map", className="tool-button is-framed", type="button", **{"data-action": "whole-map"}),
        ],
        className="zoom-row",
    )
    return [
        html.Div(
            [
                frame(pattern, scene, "span-8", above=[html.Div([chips, zoom], className="map-bar")]),
                html.Div([frame(heads, scene, ""), frame(received, scene, "")], className="column span-4"),
                frame(row, scene, "span-12"),
                frame(row_profile, scene, "span-6"),
                frame(offsets, scene, "span-6"),
            ],
            className="grid",
        )
    ]


PAGE = Page(
    name="attention",
    title="Attention",
    icon="attention",
    order=1,
    words="Which tokens each head reads from, in softmax and in linear layers alike.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    controls=controls,
)
