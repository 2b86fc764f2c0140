"""Segments: a text read in pieces by a model that hands on a state, and what that state is worth, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, ctx, html, no_update
from dash.development.base_component import Component

from app.figures.common import number
from app.forms import (
    any_model_select,
    checks,
    count_input,
    earlier_results,
    form_frame,
    register_form,
    text_area,
)
from app.frames import content_frame, frame, scene_of_slice, slice_input, view_slice
from app.measure.common import FormError
from app.measure.segments import EXAMPLE, KIND, LONGEST, OTHER, SHORTEST, look_at, start_segments
from app.page import Page
from app.panels.results import measured
from app.panels.segments import (
    CHANGE,
    CUT,
    FOREIGN,
    LOSSES,
    MEASURE_WORDS,
    MEASURES,
    PANELS,
    PLACE,
    SLOTS,
    TOKENS,
    chosen_boundary,
    slot_rows,
)
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job, JobError
from workbench.lab.runs import Run

FIELDS = ("name", "text", "length", "other", "more")
MORE = {"parts": "also layer by layer and slot by slot"}
SHOWN = ("run", "result", "measured_head")
LOOKS = {f"segments-{page}": f"/{page}" for page in ("state", "attention", "intervene")}


def structure(scene: Scene) -> Hashable:
    return "segments", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    left, right = [frame(LOSSES, scene, "")], [_form(services, scene, found), *earlier_results(services, scene, KIND)]
    if found is not None:
        several = len(found.manifest["results"]["slots"]) > len(found.manifest["results"]["layers"])
        left += [frame(panel, scene, "") for panel in (CUT, FOREIGN, *([SLOTS] if several else []), TOKENS)]
        right = [frame(PLACE, scene, ""), _boundary_frame(), frame(CHANGE, scene, ""), *right]
    columns = html.Div(left, className="column span-7"), html.Div(right, className="column span-5")
    return [html.Div(list(columns), className="grid")]


def _form(services: Services, scene: Scene, found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    run_text = (scene.run.manifest.get("text") or "") if scene.run is not None else ""
    text = asked.get("text") or (run_text if len(run_text) > len(EXAMPLE) else EXAMPLE)
    return form_frame(
        "segments", "A text, in segments",
        "The same as “workbench segments”. Any model that hands on a state: memories, recurrent layers, caches of keys and values.",
        [
            any_model_select(services, scene, "segments-name", found),
            text_area("segments-text", "Text", text[:4000], 4),
            count_input("segments-length", "Tokens of a segment", asked.get("length", 64), SHORTEST, LONGEST),
            text_area("segments-other", "Another text, whose state is patched in (empty: none)", asked.get("other", OTHER) or "", 3),
            dmc.CheckboxGroup(id="segments-more", value=["parts"] * bool(asked.get("parts", True)), size="sm", children=checks(MORE)),
        ],
    )  # fmt: skip


def _boundary_frame() -> Component:
    buttons = [
        html.Button(
            f"{page[1:].capitalize()} page", id=id, className="tool-button is-framed", type="button", n_clicks=0
        )
        for id, page in LOOKS.items()
    ]
    inside = [
        html.Div(id="segments-boundary"),
        view_slice("content", "segments-boundary", SHOWN),
        html.Div([html.Span("Look at it on the", className="form-hint"), *buttons], className="form-row"),
        html.Div(id="segments-look-message", className="form-message", role="alert"),
    ]
    words = (
        "Click a cell of a map to choose a layer and a boundary. The State page shows what this layer carries there, token by token; "
        "on the Intervene page an operation takes it away, and can be edited."
    )
    return content_frame(
        "segments-boundary", "The chosen boundary", words, html.Div(inside, className="form-stack"), ""
    )


def boundary_words(scene: Scene) -> list[Component]:
    """What the chosen layer hands to the chosen segment: in words, and a table of its tensors."""
    found, chosen = measured(scene, KIND), chosen_boundary(scene)
    if found is None or chosen is None:
        return []
    results, (layer, segment) = found.manifest["results"], chosen
    first = results["starts"][segment]
    said = [f"Layer {results['layers'][layer]} hands to segment {segment} what it carries after token {first - 1}."]
    for reading, words in (("cut", "Handed nothing, it loses"), ("other", "With the other text’s it loses")):
        lost = results["lost_by_layer"].get(reading)
        if lost is not None:
            said.append(f"{words} {number(lost[layer][segment])} nats per token.")
    names, layers = slot_rows(results)
    rows = [row for row, at in enumerate(layers) if at == layer]
    measures = {words: results[name] for name, words in zip(MEASURES, MEASURE_WORDS, strict=True)}
    if "other" in results["lost_by_slot"]:
        measures["lost with the other’s"] = results["lost_by_slot"]["other"]
    head = html.Thead(html.Tr([html.Th(""), *(html.Th(names[row].rpartition(".")[2], scope="col") for row in rows)]))
    lines = [
        html.Tr([html.Th(words, scope="row"), *(html.Td(_cell(values[row][segment])) for row in rows)])
        for words, values in measures.items()
    ]
    table = html.Table([head, html.Tbody(lines)], className="value-table")
    return [html.P(" ".join(said), className="prose"), html.Div(table, className="value-scroll", tabIndex=0)]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value == int(value) and value > 1 else number(value)


def looked(services: Services, scene: Scene, page: str) -> tuple[Any, Any, str]:
    """Where the chosen boundary is looked at: (go, job, message)."""
    found, chosen = measured(scene, KIND), chosen_boundary(scene)
    if found is None or chosen is None:
        return no_update, no_update, "There is no boundary to look at."
    try:
        target = look_at(services, found, page, *chosen)
    except (FormError, JobError) as error:
        return no_update, no_update, str(error)
    return (no_update, target.id, "") if isinstance(target, Job) else (target, no_update, "")


def register(app: Dash, services: Services) -> None:
    @app.callback(Output("segments-boundary", "children"), slice_input("content", "segments-boundary"))
    def show_boundary(data: dict[str, Any] | None) -> Any:
        return boundary_words(scene_of_slice(services, data["view"])) if data and data.get("view") else None

    @app.callback(
        Output("go", "data", allow_duplicate=True), Output("job", "data", allow_duplicate=True),
        Output("segments-look-message", "children"), *[Input(id, "n_clicks") for id in LOOKS], State("view", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def follow(*given: Any) -> tuple[Any, Any, Any]:
        *clicks, view = given
        if not any(clicks) or ctx.triggered_id not in LOOKS:
            return no_update, no_update, no_update
        return looked(services, services.scene(ViewState.from_dict(view)), LOOKS[ctx.triggered_id])

    def start(view: ViewState, more: Any, **values: Any) -> Job:
        return start_segments(services, parts="parts" in (more or []), **values)

    register_form(app, "segments", FIELDS, start)


PAGE = Page(
    name="segments",
    title="Segments",
    icon="segments",
    order=10,
    group="Measure",
    words="A text read in segments: what a model hands from one to the next, and what that is worth, layer by layer.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
