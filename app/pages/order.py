"""Order: which documents of a prompt a model reads at which places, and in which order they should stand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, html
from dash.development.base_component import Component

from app.figures.common import visible_text
from app.forms import earlier_results, form_frame, register_form, side_by_side, text_area
from app.frames import content_frame, frame
from app.measure.order import EXAMPLE, KIND, start_order
from app.page import Page
from app.panels.order import PANELS
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

MASS, ANSWERS = PANELS
FIELDS = ("prompt", "answer", "rounds", "bases")


def structure(scene: Scene) -> Hashable:
    return "order", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    wide: list[Component] = [frame(MASS, scene, "")]
    if found is not None:
        wide += [content_frame("order-plans", "Orders", "Which document stands at each place, and what the model then expects next.",
                               _plans(found), ""), frame(ANSWERS, scene, "")]  # fmt: skip
    narrow = [_form(found), *earlier_results(services, scene, KIND)]
    return [html.Div([html.Div(wide, className="column span-7"), html.Div(narrow, className="column span-5")], className="grid")]


def _plans(found: Run) -> Component:
    results, settings = found.manifest["results"], found.manifest["settings"]
    rows = []
    for name, best in settings["said"].items():
        order = results["orders"].get(name.removesuffix(" + buckets"), [])
        words = ", ".join(f"‘{visible_text(token)}’ {chance:.0%}" for token, chance in best[:2])
        rows.append(html.Tr([html.Th(name, scope="row"), html.Td(" ".join(map(str, order))), html.Td(words)]))
    head = html.Thead(html.Tr([html.Th(words, scope="col") for words in ("planner", "documents, first to last", "expects next")]))
    documents = html.Ol([html.Li(text.strip()) for text in results["documents"]], start=0, className="prose")
    return html.Div([html.Div(html.Table([head, html.Tbody(rows)], className="value-table"), className="value-scroll"), documents])


def _form(found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    prompt = "".join(asked["documents"]) + asked["question"] if asked else EXAMPLE
    return form_frame(
        "order", "A prompt", "Documents, one a line; the last line is the question. The open run's model reads them in turned orders.",
        [
            text_area("order-prompt", "Documents and question", prompt, 6),
            side_by_side(
                dmc.TextInput(id="order-answer", label="Answer", value=asked.get("answer", "n"), placeholder="its first token", size="sm"),
                dmc.NumberInput(id="order-rounds", label="Rounds of sorting", value=asked.get("rounds", 3), min=1, max=20, size="sm"),
                dmc.TextInput(id="order-bases", label="Rotation bases together", value=",".join(f"{b:g}" for b in asked.get("bases", [])),
                              placeholder="10000,17500", size="sm"),
            ),
        ],
    )  # fmt: skip


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, **values: Any) -> Job:
        return start_order(services, services.scene(view), **values)

    register_form(app, "order", FIELDS, start)


PAGE = Page(
    name="order",
    title="Order",
    icon="order",
    order=9,
    group="Measure",
    words="Which documents of a prompt a model reads at which places, and in which order Attention Sorting and AttnRank would put them.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    opens_kind=KIND,
)
