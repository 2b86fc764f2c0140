"""Attention: who reads from whom, for softmax and for effective patterns alike."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from dash import Dash, Output, html
from dash.development.base_component import Component

from app import ablate
from app.frames import frame, scene_of_slice, slice_input, view_slice
from app.page import Page, head_choice, layer_choice, pooling_choice, scale_choice, score_map_choice, zoom_buttons
from app.panels.attention import PANELS
from app.panels.scores import ScoreRow
from app.panels.words import pattern_words
from app.services import Scene, Services, parts_of, reads_source
from app.view_state import ViewState
from workbench.lab.score_maps import run_score_labels

SCORE_ROW = ScoreRow()
PART_WORDS = {
    "encoder": ("Encoder", "What the tokens of the source read of one another."),
    "decoder": ("Decoder", "What the tokens of the text read of the text before them."),
    "cross": ("Cross", "What the tokens of the text read of the source."),
}
PART_DEPENDS = ("run", "part", "layer", "head", "query", "rows", "pooling", "scale")
NOT_KEPT = "This run does not keep it; a new run of the model does."


def structure(scene: Scene) -> Hashable:
    """The lists of heads and of scores depend on the layer, and what is said of its map on what it reads."""
    if not scene.layer:
        return None
    return (
        scene.view.part,
        scene.layer["n_heads"],
        reads_source(scene.layer),
        tuple(run_score_labels(scene.layers).items()),
    )


def controls(scene: Scene) -> Sequence[Component]:
    if not scene.layers:
        return []
    which = html.Div(id="part-choice", className="part-choice", role="group", **{"aria-label": "Which attention"})
    return [
        which,
        view_slice("content", "part-choice", PART_DEPENDS),
        layer_choice(scene),
        head_choice(scene),
        *score_map_choice(scene),
        pooling_choice(scene),
        scale_choice(scene),
    ]


def part_links(services: Services, scene: Scene) -> list[Component]:
    """Links to the parts of an encoder-decoder's run: its own text, what that reads of the source, and what the source reads of itself.

    Nothing for other runs. Which parts there are follows from the run's layers.
    """
    if not scene.view.run:
        return []
    found = parts_of(services.open_run(scene.view.run))
    shown = scene.view.part or ("cross" if reads_source(scene.layer) else "decoder")
    links: list[Component] = []
    for name, (part, first) in found.items():
        label, words = PART_WORDS[name]
        if first is None:
            missing = f"{NOT_KEPT} {words}"
            links.append(
                html.Span(
                    label, className="tool-button is-framed is-missing", title=missing, **{"aria-disabled": "true"}
                )
            )
            continue
        chosen = {"aria-current": "true"} if name == shown else {}
        view = scene.view if name == shown else _first_of(scene.view, part, first)
        links.append(html.A(label, href=view.to_url(), className="tool-button is-framed in-app", title=words, **chosen))
    return links


def _first_of(view: ViewState, part: str, first: int) -> ViewState:
    """The view at the first layer of a part; tokens stay chosen where it has the same."""
    kept = view.change(key=None, columns=None, score_map="", layer=first, head=0)
    return kept if part == view.part else kept.change(part=part, query=None, rows=None)


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    heads, pattern, row, received, row_profile, offsets = PANELS
    made_of = [frame(SCORE_ROW, scene, "span-12")] if run_score_labels(scene.layers) else []
    chips = html.Div(
        [
            html.Div(id="pattern-chips", className="chip-row"),
            view_slice("content", "pattern-chips", ("run", "part", "layer")),
        ]
    )
    taken = [] if scene.view.part else [ablate.button(scene)]  # its job names heads of the model's own layers
    bar = html.Div([chips, zoom_buttons("Whole map")], className="map-bar")
    return [
        html.Div(
            [
                frame(pattern, scene, "span-8", above=[bar, *taken]),
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
    @app.callback(Output("part-choice", "children"), slice_input("content", "part-choice"))
    def show_parts(data: dict[str, Any] | None) -> Any:
        if not data or not data.get("view"):
            return []
        scene = scene_of_slice(services, data["view"])
        return part_links(services, replace(scene, view=scene.view.change(page="attention")))

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
    words="Which tokens each head reads from, in attention and in linear layers alike.",
    layout=layout,
    panels=(*PANELS, SCORE_ROW),
    structure=structure,
    controls=controls,
    register=register,
    parts=True,
)
