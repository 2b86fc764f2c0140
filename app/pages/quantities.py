"""Special quantities: what only this model's parts compute, each in a panel of its own, found by the roles that hook points declare."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dash import html
from dash.development.base_component import Component

from app.frames import content_frame, frame
from app.page import Page, head_choice, layer_choice, pooling_choice, scale_choice
from app.panels.quantities import MOST_PANELS, PANELS, quantities_of
from app.panels.words import kind_words
from app.services import Scene, Services
from workbench.lab.quantities import run_quantities

NOTHING = (
    "The parts of this layer compute nothing beyond queries, keys, values, patterns and states, which the Attention and State pages show."
)


def structure(scene: Scene) -> Hashable:
    """The panels and their titles depend on the layer."""
    layer = scene.layer
    return (layer["layer"] if layer else None, tuple(each.name + each.label for each in quantities_of(scene)))


def controls(scene: Scene) -> Sequence[Component]:
    return [layer_choice(scene), head_choice(scene), pooling_choice(scene), scale_choice(scene)] if scene.layers else []


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = quantities_of(scene)[:MOST_PANELS]
    parts: list[Component] = []
    whole = [place for place, each in enumerate(found) if each.layer is None]
    own = [place for place, each in enumerate(found) if each.layer is not None]
    if whole:
        parts += [html.H2("The whole model", className="group-title span-12"), *_frames(whole, scene)]
    if scene.layer is not None:
        name = f"Layer {scene.layer['layer']} · {kind_words(str(scene.layer['kind']))}"
        parts.append(html.H2(name, className="group-title span-12"))
        parts += _frames(own, scene) or [content_frame("no-quantity", "Nothing special in this layer", "", _elsewhere(scene))]
    return [html.Div(parts, className="grid")]


def _frames(places: Sequence[int], scene: Scene) -> list[Component]:
    """Maps first, each a third of the width; then pictures over tokens, half of it."""
    maps = [at for at in places if PANELS[at].is_map(scene)]
    others = [at for at in places if at not in maps]
    return [*(frame(PANELS[at], scene, "span-4") for at in maps), *(frame(PANELS[at], scene, "span-6") for at in others)]


def _elsewhere(scene: Scene) -> Component:
    """Why there is nothing, and which layers have something."""
    others = sorted({each.layer for each in run_quantities(scene.opened().manifest) if each.layer is not None})
    more = f" Layers that have special quantities: {', '.join(map(str, others))}." if others else ""
    return html.P(NOTHING + more, className="prose")


PAGE = Page(
    name="quantities",
    title="Quantities",
    icon="quantities",
    order=3,
    words="What only this model's parts compute: gates, λ, halting, depth weights, clusters, token types, block weights and the like.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    controls=controls,
)
