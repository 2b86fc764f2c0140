"""Probes: which heads read the previous token, complete patterns, sink or retrieve, and whether it is more than chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, ctx, html, no_update
from dash.development.base_component import Component

from app import ablate
from app.forms import (
    any_model_select,
    checks,
    count_input,
    earlier_results,
    form_frame,
    register_form,
    select,
    side_by_side,
    text_area,
)  # fmt: skip
from app.frames import content_frame, frame, scene_of_slice, slice_input, view_slice
from app.measure.common import FormError
from app.measure.probes import (
    KIND,
    MADE_UP,
    MOST_SEQUENCES,
    OWN,
    PROBES,
    SHORTEST,
    look_at,
    place_of,
    sources,
    start_probing,
    trace_of,
)  # fmt: skip
from app.measure.probes import LONGEST as LONGEST_LENGTH
from app.page import Page
from app.pages.synapses import GRID, RIGHT
from app.panels.base import NothingToShow
from app.panels.probe_basin import BASIN
from app.panels.probe_scores import chosen_head, chosen_score, other_score, row_names, score_words, scores_of
from app.panels.probes import DOSE, LIST, MAPS, PANELS, PROFILE, SCATTER, TWIN
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job, JobError
from workbench.lab.runs import Run

FIELDS = ("name", "probes", "source", "text", "length", "lengths", "sequences", "seed", "more")
EXAMPLE = (
    "The old lighthouse keeper climbed the stairs. At the top of the stairs the old lighthouse keeper lit the lamp."
)
MORE = {
    "twin": "also at random weights, as the null",
    "whole": "form patterns that no factors determine (tokens × tokens)",
}
SHOWN = ("run", "result", "score", "against", "measured_head")
DIGITS = {"valueFormatter": {"function": "params.value == null ? '–' : d3.format('.3f')(params.value)"}}
COLUMNS = [
    {"field": "head", "headerName": "head", "width": 68, "cellClass": "cell-mono cell-link"},
    *({"field": key, "headerName": key, "minWidth": 70, "flex": 1, **RIGHT, **DIGITS} for key in ("score", "low", "high")),
    {"field": "marked", "headerName": "✓", "headerTooltip": "stands out", "width": 48},
    {"field": "look", "headerName": "", "width": 90, "cellClass": "cell-link", "sortable": False,
     "valueGetter": {"function": "'Attention'"}},
]  # fmt: skip


def structure(scene: Scene) -> Hashable:
    return "probes", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    form = [_form(services, scene, found), *earlier_results(services, scene, KIND)]
    if found is None:
        return [html.Div([html.Div(frame(MAPS[0], scene, ""), className="column span-7"), html.Div(form, className="column span-5")],
                         className="grid")]  # fmt: skip
    asked = [panel for panel in MAPS if panel.probe in (found.manifest.get("results") or {})]
    left = [frame(panel, scene, "") for panel in asked]
    right = [
        _head_frame(), frame(LIST, scene, "", above=[_score_choice(scene, found), _grid(scene)]), frame(TWIN, scene, ""),
        frame(PROFILE, scene, ""), *([frame(BASIN, scene, "")] if BASIN.probe in (found.manifest.get("results") or {}) else []),
    ]  # fmt: skip
    left += [frame(SCATTER, scene, "", above=[_against_choice(scene, found)]), frame(DOSE, scene, "")]
    return [
        html.Div(
            [html.Div(left, className="column span-7"), html.Div([*right, *form], className="column span-5")],
            className="grid",
        )
    ]


def _form(services: Services, scene: Scene, found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    run_text = (scene.run.manifest.get("text") or "") if scene.run is not None else ""
    source = OWN if asked.get("text") else asked.get("corpus") or MADE_UP
    ticked = [
        key for key, on in (("twin", asked.get("twin", True)), ("whole", asked.get("whole_patterns", False))) if on
    ]
    return form_frame(
        "probe", "Probe the heads of a model",
        "The same as “workbench probe”. Induction and retrieval make their own sequences; the others read what is chosen here.",
        [
            any_model_select(services, scene, "probe-name", found),
            dmc.CheckboxGroup(
                id="probe-probes", label="Probes", value=asked.get("probes") or list(PROBES), size="sm",
                children=checks(PROBES),
            ),
            side_by_side(
                select("probe-source", "Read", sources(), source),
                count_input("probe-sequences", "Sequences", asked.get("sequences", 16), 2, MOST_SEQUENCES),
            ),
            text_area("probe-text", "Text", str(asked.get("text") or run_text or EXAMPLE)[:1500], 2),
            side_by_side(
                count_input("probe-length", "Tokens of each", asked.get("length", 96), SHORTEST, LONGEST_LENGTH),
                dmc.TextInput(id="probe-lengths", label="Also at lengths", size="sm", placeholder="48, 192",
                              value=", ".join(map(str, asked.get("lengths") or []))),
                count_input("probe-seed", "Seed", asked.get("seed", 0), 0, 10**6),
            ),
            dmc.CheckboxGroup(id="probe-more", value=ticked, size="sm", children=checks(MORE)),
        ],
    )  # fmt: skip


def _score_choice(scene: Scene, found: Run) -> Component:
    return _choice("probe-score", "Score", found, chosen_score(scene))


def _against_choice(scene: Scene, found: Run) -> Component:
    return _choice("probe-against", "Against", found, other_score(scene))


def _choice(id: str, label: str, found: Run, value: str) -> Component:
    data = [{"value": name, "label": score_words(name)} for name in scores_of(found)]
    chosen = dmc.Select(id=id, label=label, data=data, value=value or None, allowDeselect=False, size="xs", w=250)
    return html.Div([chosen, view_slice("content", id, SHOWN)], className="map-bar")


def _grid(scene: Scene) -> Component:
    return html.Div([
        dag.AgGrid(
            id="probe-grid", rowData=grid_rows(scene, None), columnDefs=COLUMNS, className="runs-grid", getRowId="params.data.id",
            defaultColDef={"sortable": True, "resizable": True}, dashGridOptions=GRID, style={"height": "236px", "width": "100%"},
        ),
        html.Div(id="probe-brushed", className="form-hint", role="status"),
        view_slice("content", "probe-grid", SHOWN),
    ], className="panel-body is-padded")  # fmt: skip


def grid_rows(scene: Scene, brushed: Sequence[str] | None) -> list[dict[str, Any]]:
    """Heads by score for the grid; of those that were brushed in the scatter, if any were."""
    try:
        rows = LIST.rows(scene)
    except NothingToShow:  # the panel's own message says why
        return []
    return rows if brushed is None else [row for row in rows if row["id"] in brushed]


def _head_frame() -> Component:
    body = [html.Div(id="probe-head"), view_slice("content", "probe-head", SHOWN)]
    button = html.Button(
        "Look at it on the Attention page",
        id="probe-look",
        className="tool-button is-framed",
        type="button",
        n_clicks=0,
    )
    message = html.Div(id="probe-look-message", className="form-message", role="alert")
    words = "Click a head in any figure to choose it; click it again to look at it on the Attention page."
    inside = html.Div(
        [*body, html.Div(button, className="form-row"), message, ablate.controls()], className="form-stack"
    )
    return content_frame("probe-head", "The chosen head", words, inside, "")


def head_to_ablate(services: Services, scene: Scene) -> ViewState:
    """The view of the chosen head in a run of its model; see `app.ablate`."""
    found, chosen = measured(scene, KIND), chosen_head(scene)
    if found is None or chosen is None:
        raise FormError("There is no head to take away.")
    run = trace_of(services, found)
    if run is None:
        raise FormError(
            "A head is taken away in a run of its model, and there is none yet. “Look at it on the Attention page” makes one."
        )
    return scene.view.change(run=run.id, result="", **place_of(found, "{}.{}".format(*chosen)))


def head_words(scene: Scene) -> list[Any]:
    """Name, census label and scores of the chosen head."""
    found, chosen = measured(scene, KIND), chosen_head(scene)
    if found is None or chosen is None:
        return ["None of the probes has a score for a head of this model."]
    row, head = chosen
    name = f"{row_names(found, chosen_score(scene))[row]}.{head}"
    parts: list[Any] = [html.Strong(f"Head {name}")]
    census = (found.manifest.get("results") or {}).get("census") or {}
    for place, label in zip(census.get("heads") or [], census.get("labels") or [], strict=False):
        layer = "·".join(map(str, place[0])) if isinstance(place[0], list) else str(place[0])
        if f"{layer}.{place[1]}" == name:
            parts.append(f": {label.replace('_', ' ')}" if label else ": no habit of the census stands out")
    chips = []
    for score in scores_of(found):
        values = found.array(score)
        if row < values.shape[0] and head < values.shape[1] and values[row, head] == values[row, head]:
            chips.append(html.Span(f"{score_words(score)} {values[row, head]:.2f}", className="chip"))
    return [html.P(parts), html.Div(chips, className="chip-row")]


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, more: Any, **values: Any) -> Job:
        ticked = more or []
        return start_probing(services, twin="twin" in ticked, whole="whole" in ticked, **values)

    register_form(app, "probe", FIELDS, start)
    _register_choices(app, services)

    @app.callback(Output("probe-head", "children"), slice_input("content", "probe-head"))
    def show_head(data: dict[str, Any] | None) -> Any:
        return head_words(scene_of_slice(services, data["view"])) if data and data.get("view") else None

    @app.callback(
        Output("probe-grid", "rowData"), Output("probe-brushed", "children"), slice_input("content", "probe-grid"),
        Input({"type": "graph", "panel": SCATTER.id}, "selectedData"),
    )  # fmt: skip
    def show_rows(data: dict[str, Any] | None, brush: dict[str, Any] | None) -> tuple[Any, Any]:
        if not data or not data.get("view"):
            return no_update, no_update
        places = brushed_places(brush)
        words = (
            ""
            if places is None
            else f"{len(places)} heads brushed in the scatter; click beside its points to show all."
        )
        return grid_rows(scene_of_slice(services, data["view"]), places), words

    @app.callback(
        Output("go", "data", allow_duplicate=True), Output("job", "data", allow_duplicate=True), Output("probe-look-message", "children"),
        Input("probe-look", "n_clicks"), Input("probe-grid", "cellClicked"), State("view", "data"), prevent_initial_call=True,
    )  # fmt: skip
    def follow(clicks: int, cell: dict[str, Any] | None, view: dict[str, Any]) -> tuple[Any, Any, Any]:
        scene = services.scene(ViewState.from_dict(view))
        in_grid = ctx.triggered_id == "probe-grid"
        place = str((cell or {}).get("rowId") or "") if in_grid else ""
        if not (place if in_grid else clicks):
            return no_update, no_update, no_update
        if in_grid and (cell or {}).get("colId") != "look":
            return {"change": {"mh": place}, "page": "/probes"}, no_update, ""
        return looked(services, scene, place)


def brushed_places(brush: dict[str, Any] | None) -> list[str] | None:
    """ "row.head" of the heads inside the brush; None where nothing is brushed."""
    points = (brush or {}).get("points") or []
    return [str(point["customdata"]) for point in points if "customdata" in point] or None


def looked(services: Services, scene: Scene, place: str) -> tuple[Any, Any, Any]:
    """Where a head is looked at, (go, job, message); `place` "" means the chosen head."""
    found, chosen = measured(scene, KIND), chosen_head(scene)
    if found is None or chosen is None:
        return no_update, no_update, "There is no head to look at."
    try:
        target = look_at(services, found, place or "{}.{}".format(*chosen))
    except (FormError, JobError) as error:
        return no_update, no_update, str(error)
    return (no_update, target.id, "") if isinstance(target, Job) else (target, no_update, "")


def _register_choices(app: Dash, services: Services) -> None:
    """The lists of scores change the address and follow it."""
    for id, key, current in (("probe-score", "score", chosen_score), ("probe-against", "vs", other_score)):

        @app.callback(Output(id, "value"), slice_input("content", id), State(id, "value"))
        def follow(data: dict[str, Any] | None, value: str | None, current: Any = current) -> Any:
            shown = current(scene_of_slice(services, data["view"])) if data and data.get("view") else value
            return shown if shown and shown != value else no_update

        @app.callback(
            Output("go", "data", allow_duplicate=True),
            Input(id, "value"),
            State("view", "data"),
            prevent_initial_call=True,
        )
        def choose(value: str | None, view: dict[str, Any] | None, key: str = key, current: Any = current) -> Any:
            if not value or not view or value == current(services.scene(ViewState.from_dict(view))):
                return no_update
            return {"change": {key: value}, "page": "/probes"}


ablate.HEADS["probes"] = head_to_ablate
PAGE = Page(
    name="probes",
    title="Probes",
    icon="probes",
    order=0,
    group="Measure",
    words="What the heads of a model read, at any length: every score beside chance and beside the same architecture at random weights.",
    layout=layout,
    panels=(*PANELS, BASIN),
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
