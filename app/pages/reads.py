"""Reads: what a token of a BDH reads, from a logit back to layer, head and past token, and to the neurons that match."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from dash import Dash, Output, html
from dash.development.base_component import Component

from app.figures.common import visible_text
from app.forms import earlier_results, form_frame, register_form, word_list
from app.frames import content_frame, explain, frame, scene_of_slice, slice_input, view_slice
from app.measure.reads import KIND, start_reads
from app.page import Page, scale_choice, zoom_buttons
from app.pages.synapses import depth_of, no_synapses, symbol_input
from app.panels.reads import MAP, PAIRS, PANELS, STRIP, TOP
from app.panels.results import measured
from app.services import Scene, Services

SAID_PAIRS = 4


def structure(scene: Scene) -> Hashable:
    return "reads", scene.view.result, depth_of(scene)


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    if not depth_of(scene):
        return [no_synapses(services, scene)]
    side = [_form(scene), *earlier_results(services, scene, KIND, of={"run": scene.view.run}, key=None)]
    if measured(scene, KIND) is None:
        columns = [
            html.Div(frame(MAP, scene, ""), className="column span-7"),
            html.Div(side, className="column span-5"),
        ]
        return [html.Div(columns, className="grid")]
    says = [html.Div(id="read-says"), view_slice("content", "read-says", PAIRS.depends)]
    said = content_frame("read-says", "What these neurons say", "", says, "")
    zoom = html.Div([html.Div(), zoom_buttons("Whole text")], className="map-bar")
    rows = [
        frame(MAP, scene, "span-12", above=[zoom]),
        html.Div([frame(STRIP, scene, ""), frame(PAIRS, scene, ""), said], className="column span-7"),
        html.Div([side[0], frame(TOP, scene, ""), *side[1:]], className="column span-5"),
    ]
    return [html.Div(rows, className="grid")]


def _form(scene: Scene) -> Component:
    return form_frame(
        "reads", "A token that reads", "Asks about the pinned token, else the last: pin another one in the text.",
        [symbol_input(scene, "reads-symbol", "Its logit of", "one character; empty: the likeliest next one")], "Read",
    )  # fmt: skip


def neuron_words(scene: Scene) -> Any:
    """What the neurons of the chosen reading's largest pairs are excited by, and what they promote when they fire."""
    try:
        _, head, _ = PAIRS.chosen(scene)
        says = PAIRS.results(scene)["says"]
        neurons = [2 * pair + side for pair in PAIRS.order(scene)[:SAID_PAIRS].tolist() for side in (0, 1)]
    except Exception as failure:
        return explain("read-says", failure)
    lines: list[Component] = []
    for neuron in neurons:
        if f"{head}.{neuron}" in says:
            lines.append(html.H3(f"Neuron {head}·{neuron}", className="says-title"))
        for kind, words in says.get(f"{head}.{neuron}", {}).items():
            chips = word_list([(visible_text(word), value) for word, value in words])
            lines.append(html.Div([html.Span(kind, className="form-hint"), chips], className="says-line"))
    return lines or html.P("Only neurons of the largest readings were put into words.", className="form-hint")


def register(app: Dash, services: Services) -> None:
    register_form(
        app, "reads", ("symbol",), lambda view, **values: start_reads(services, services.scene(view), **values)
    )

    @app.callback(Output("read-says", "children"), slice_input("content", "read-says"))
    def show_says(data: dict[str, Any] | None) -> Any:
        return neuron_words(scene_of_slice(services, data["view"])) if data and data.get("view") else None


PAGE = Page(
    name="reads",
    title="Reads",
    icon="reads",
    order=1,
    group="BDH",
    words="What a token of a BDH reads: from a logit back to layer, head and past token, and to the neurons that match.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    controls=lambda scene: [scale_choice(scene)],
    register=register,
    opens_kind=KIND,
)
