"""Patching: which activations carry the difference between two texts, layer by token and layer by head."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html
from dash.development.base_component import Component

from app.forms import earlier_results, form_frame, register_form, select, side_by_side
from app.frames import frame
from app.measure.basket import LONG_SECONDS, cost_words
from app.measure.patching import DIRECTIONS, FIRST, KIND, VIEWS, offered_views, runs_of, seconds_for, start_patching
from app.page import Page
from app.panels.patching import PANELS
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job

CLEAN, CORRUPTED, ANSWER, WRONG = "In the morning she sai", "In the morning she cam", "d", "e"
FIELDS = ("clean", "corrupted", "answer", "wrong", "views", "direction")


def structure(scene: Scene) -> Hashable:
    return "patching", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    shown = list((found.manifest.get("results") or {})["views"]) if found is not None else ["resid"]
    grids: list[Component] = []
    for panel in PANELS:
        if panel.view.name in shown:
            grids.append(frame(panel, scene, "span-7" if panel.exact else "span-5"))
    side = [
        html.Div(_form(scene), className="span-7"),
        html.Div([*earlier_results(services, scene, KIND)], className="span-5"),
    ]
    return [html.Div([*side, *grids], className="grid")]


def _form(scene: Scene) -> Component:
    found = measured(scene, KIND)
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    known = offered_views(scene)
    chosen = [name for name in asked.get("roles", FIRST) if name in known]
    data = [{"value": name, "label": f"{name}: layer × {'head' if VIEWS[name].by == 'head' else 'token'}"} for name in known]
    missing = [VIEWS[name].title.lower() for name in VIEWS if name not in known]
    lacks = f"This model has no {', no '.join(missing)}." if missing else ""
    return form_frame(
        "patching", "Two texts", "Equally many tokens, one line each. Answer and wrong token are compared after the last token.",
        [
            dmc.TextInput(id="patching-clean", label="Clean text", value=asked.get("clean", CLEAN), size="sm"),
            dmc.TextInput(id="patching-corrupted", label="Corrupted text", value=asked.get("corrupted", CORRUPTED), size="sm"),
            side_by_side(
                dmc.TextInput(id="patching-answer", label="Answer", value=asked.get("answer", ANSWER), placeholder="of clean", size="sm"),
                dmc.TextInput(id="patching-wrong", label="Wrong", value=asked.get("wrong", WRONG), placeholder="of corrupted", size="sm"),
                select("patching-direction", "Direction", [*DIRECTIONS.items()], asked.get("direction", "denoise")),
            ),
            dmc.MultiSelect(id="patching-views", label="Grids", data=data, value=chosen, size="sm"),
            html.Div([html.Span(id="patching-cost", className="form-hint"), html.Span(lacks, className="form-hint")], className="form-row"),
        ],
        "Patch",
    )  # fmt: skip


def cost(scene: Scene, clean: str, corrupted: str, views: Sequence[str] | None) -> Component:
    """How many runs, how long, and whether the texts are equally long, before it starts."""
    one, other = len((clean or "").encode()), len((corrupted or "").encode())
    parameters = int((scene.run.model.get("parameters") if scene.run is not None else 0) or 0)
    words, _ = cost_words(parameters, one, runs_of(scene, views or [], one))
    if one != other:
        words = f"The texts have {one} and {other} bytes: a byte model reads them as unequally long. {words}"
    long = one != other or seconds_for(scene, views or [], one) > LONG_SECONDS
    return html.Span(words, className="chip chip-warning" if long else "")


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, **values: Any) -> Job:
        return start_patching(services, services.scene(view), **values)

    register_form(app, "patching", FIELDS, start)

    @app.callback(
        Output("patching-cost", "children"), Input("patching-clean", "value"), Input("patching-corrupted", "value"),
        Input("patching-views", "value"), State("view", "data"),
    )  # fmt: skip
    def show_cost(clean: str, corrupted: str, views: Sequence[str] | None, view: dict[str, Any] | None) -> Any:
        return cost(services.scene(ViewState.from_dict(view)), clean, corrupted, views) if view else None


PAGE = Page(
    name="patching",
    title="Patching",
    icon="patching",
    order=1,
    group="Change",
    words="Put activations of one text into a run of another, cell by cell, to see which of them carry the difference.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    opens_kind=KIND,
)
