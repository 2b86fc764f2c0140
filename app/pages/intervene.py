"""Memory & intervene: a basket of edits of a BDH's synapses, neurons and state, with what they change beside matched random edits."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from dash import Dash, html
from dash.development.base_component import Component

from app.forms import count_input, earlier_results, form_frame, register_form, side_by_side, text_area
from app.frames import content_frame, frame
from app.measure.basket import EXAMPLES
from app.measure.interventions import KIND, start_intervening
from app.page import Page
from app.pages.synapses import written
from app.panels.interventions import PANELS
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job

LOSS, NEXT, RANDOM = PANELS


def structure(scene: Scene) -> Hashable:
    return "intervene", scene.view.result


def first_basket(scene: Scene) -> str:
    """What the basket holds at first: the shown result's, else the followed synapses muted, else a freeze in the middle of the text."""
    found = measured(scene, KIND)
    if found is not None:
        return str(found.manifest["settings"]["basket"])
    if scene.view.synapses:
        return "\n".join(f"mute {written(each)}" for each in scene.view.synapses)
    return f"freeze since {max(1, scene.n_tokens // 2)}"


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    help_lines = [html.Div(f"{kind} {example}", className="mono basket-line") for kind, example in EXAMPLES.items()]
    state = html.A("State page", href=scene.view.change(page="state").to_url(), className="in-app")
    synapses = html.A("Synapses page", href=scene.view.change(page="synapses").to_url(), className="in-app")
    form = form_frame(
        "intervene", "The basket", "One edit a line. They run together on the open run's text.",
        [
            text_area("intervene-basket", "Edits", first_basket(scene), 4),
            side_by_side(
                count_input("intervene-draws", "Random baskets", asked.get("draws", 10), 1, 100),
                count_input("intervene-seed", "Seed", asked.get("seed", 0), 0, 10**6),
            ),
        ],
        "Run",
    )  # fmt: skip
    words = content_frame("intervene-words", "What can be edited", "", html.Div([
        *help_lines, html.P(["Synapses are written layer.head.neuron-layer.head.neuron; find them on the ", synapses,
                             ". The memory itself, at one time or between two, and which neurons fire, are on the ", state, "."],
                            className="panel-words"),
    ]), "")  # fmt: skip
    left = html.Div(
        [frame(LOSS, scene, ""), frame(NEXT, scene, ""), frame(RANDOM, scene, "")], className="column span-7"
    )
    right = html.Div([form, words, *earlier_results(services, scene, KIND)], className="column span-5")
    return [html.Div([left, right], className="grid")]


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, **values: Any) -> Job:
        return start_intervening(services, services.scene(view), **values)

    register_form(app, "intervene", ("basket", "draws", "seed"), start)


PAGE = Page(
    name="intervene",
    title="Intervene",
    icon="intervene",
    order=6,
    words="Edit the memory of a BDH, and see what it changes beside random edits of the same kind.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    opens_kind=KIND,
)
