"""Intervene: a basket of operations on any model, and what they change beside matched random ones."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.development.base_component import Component

from app import ablate
from app.forms import count_input, earlier_results, register_form, side_by_side, text_area
from app.frames import content_frame, frame, icon
from app.measure.basket import (
    FIELDS,
    Row,
    cost_words,
    form_values,
    line_of,
    lines_of,
    moved,
    offers_of,
    parse_basket,
    prompts_of,
    put,
    rows_of,
    shown_fields,
    texts_of,
)
from app.measure.common import FormError
from app.measure.interventions import KIND, MOST_DRAWS, start_intervening
from app.page import Page
from app.pages.synapses import written
from app.panels.interventions import PANELS
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import LONGEST_LINES, ViewState
from probes.interventions.kinds import KINDS
from probes.interventions.language import in_python
from probes.interventions.offers import Offer
from workbench.lab.jobs import Job

LABELS = {
    "place": "Where: part, role or hook point", "layer": "Layer", "units": "Heads, neurons, features", "name": "Dictionary",
    "synapse": "Synapse", "neurons": "Neurons (head.neuron)", "at": "Tokens", "queries": "Tokens that read", "keys": "Tokens that are read",
    "after": "After token", "by": "Factor, coefficient", "to": "Value", "count": "How many", "sinks": "First tokens kept",
    "texts": "Other text",
}  # fmt: skip
HINTS = {
    "layer": "0", "units": "0 or 0,3", "synapse": "1.0.210-2.2.190", "neurons": "0.3 1.7", "at": "all, or 5, 3:10, -1",
    "queries": "all, or 3:10",
    "keys": "0 or 3:10", "after": "20", "by": "0.5", "to": "0", "count": "8", "sinks": "4",
    "texts": "one text; for a direction: one || other",
}  # fmt: skip


def structure(scene: Scene) -> Hashable:
    return "intervene", scene.view.result


def first_basket(scene: Scene) -> str:
    """What the basket holds at first: the address's, the shown result's, the followed synapses muted, else one head, or a frozen memory."""
    found = measured(scene, KIND)
    if scene.view.basket:
        return scene.view.basket
    if found is not None:
        return str(found.manifest["settings"]["basket"])
    if scene.view.synapses:
        return "\n".join(f"mute {written(each)}" for each in scene.view.synapses)
    if scene.run is not None and scene.run.model.get("architecture") == "bdh":
        return f"freeze since {max(1, scene.n_tokens // 2)}"
    return f"zero head {scene.view.layer}.{scene.view.head}"


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    offers = offers_of(services, scene)
    left = [frame(panel, scene, "") for panel in PANELS]
    right = [
        _basket_frame(scene),
        _adding(scene, offers),
        *earlier_results(services, scene, KIND, basket="", prompts=""),
        _refused(offers),
    ]
    return [
        html.Div(
            [html.Div(right, className="column span-5"), html.Div(left, className="column span-7")], className="grid"
        )
    ]


def _asked(scene: Scene) -> Mapping[str, Any]:
    found = measured(scene, KIND)
    return (found.manifest.get("settings") if found is not None else None) or {}


def first_prompts(scene: Scene) -> str:
    """The prompts of the form, one a line; nothing means the open run's text."""
    if scene.view.prompts:
        return scene.view.prompts
    prompts = _asked(scene).get("prompts") or []
    own = scene.run.manifest.get("text") if scene.run is not None else None
    return "" if prompts == [own] else "\n".join(prompts)


def _basket_frame(scene: Scene) -> Component:
    asked = _asked(scene)
    prompts = text_area(
        "intervene-prompts", "Prompts, one a line (empty: the open run's text)", first_prompts(scene), 1
    )
    body = [
        html.Div(id="basket-rows", className="basket-rows"),
        _debounced(text_area("intervene-basket", "As text, one operation a line", first_basket(scene), 2)),
        _debounced(prompts),
        side_by_side(
            dmc.TextInput(id="intervene-target", label="Target token", value=asked.get("target", ""), placeholder="the expected one",
                          size="sm"),
            dmc.TextInput(id="intervene-against", label="against", value=asked.get("against", ""), placeholder="none", size="sm"),
            count_input("intervene-draws", "Random baskets", asked.get("draws", 10), 0, MOST_DRAWS),
            count_input("intervene-seed", "Seed", asked.get("seed", 0), 0, 10**6),
        ),
        html.Div([
            dmc.Button("Run", id="intervene-start", n_clicks=0),
            html.Button("As Python", id="basket-python", className="tool-button is-framed", type="button", n_clicks=0),
            html.Span(id="basket-cost", className="form-hint"),
        ], className="form-row"),
        html.Div(id="intervene-message", className="form-message", role="alert"),
        dcc.Store(id="basket-first", data={"text": first_basket(scene), "prompts": first_prompts(scene), "longest": LONGEST_LINES}),
        dcc.Store(id="basket-sent"),
        dcc.Store(id="basket-editing"),
    ]  # fmt: skip
    words = "The operations act together. What is watched is the target's logit after the pinned token, or after the last of other prompts."
    return content_frame("intervene-form", "The basket", words, html.Div(body, className="form-stack"), "")


def _debounced(area: Component) -> Component:
    """What is typed counts when the field is left: at once for a click on Run, unlike a delay, and not at every key."""
    area.debounce = True
    return area


def _adding(scene: Scene, offers: Mapping[str, Offer]) -> Component:
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind, spec in KINDS.items():
        label = f"{kind.replace('-', ' ')}: {spec.words}"
        groups.setdefault(spec.group, []).append(
            {"value": kind, "label": label, "disabled": not offers.get(kind, Offer(kind)).offered}
        )
    data = [{"group": group, "items": items} for group, items in groups.items()]
    chosen = "zero" if offers.get("zero", Offer("zero")).offered else None
    inputs = [html.Div(_input(name, scene), id=f"add-box-{name}", className=_box(name, "zero")) for name in FIELDS]
    body = [
        dmc.Select(id="add-kind", label="What to do", data=data, value=chosen, searchable=True, allowDeselect=False, size="sm"),
        html.Div(id="add-words", className="form-hint"),
        html.Div(inputs, className="form-pair"),
        html.Div([dmc.Button("Add", id="add-line", n_clicks=0, variant="light"),
                  html.Span(id="add-message", className="form-message", role="alert")], className="form-row"),
    ]  # fmt: skip
    return content_frame("basket-add", "Add an operation", "", html.Div(body, className="form-stack"), "")


def _input(name: str, scene: Scene) -> Component:
    if name in ("place", "name"):
        return dmc.Select(id=f"add-{name}", label=LABELS[name], data=[], value="head" if name == "place" else None, searchable=True,
                          size="sm", maxDropdownHeight=320, nothingFoundMessage="none of this model")  # fmt: skip
    value = {"layer": str(scene.view.layer), "units": str(scene.view.head)}.get(name, "")
    kind = dmc.Textarea if name == "texts" else dmc.TextInput
    return kind(id=f"add-{name}", label=LABELS[name], value=value, placeholder=HINTS.get(name, ""), size="sm")


def _box(name: str, kind: str | None) -> str:
    shown = kind in KINDS and name in shown_fields(kind)
    wide = " form-wide" if name in ("texts", "place", "synapse") else ""
    return f"add-box{wide}" if shown else "add-box is-hidden"


def _refused(offers: Mapping[str, Offer]) -> Component:
    by_reason: dict[str, list[str]] = {}
    for kind, offer in offers.items():
        if not offer.offered:
            by_reason.setdefault(offer.reason, []).append(kind.replace("-", " "))
    lines = [
        html.Li([html.Span(", ".join(kinds), className="mono"), f": {reason}."]) for reason, kinds in by_reason.items()
    ]
    body = html.Ul(lines, className="refusals") if lines else html.P("It takes everything.", className="form-hint")
    return content_frame("intervene-refused", "What this model does not take", "", body, "")


def row_list(rows: Sequence[Row]) -> list[Component]:
    """The basket's lines, each with buttons to edit, move and remove it."""
    if not rows:
        return [html.P("The basket is empty: add an operation below, or write one.", className="form-hint")]

    def button(action: str, index: int, picture: str, words: str, off: bool = False) -> Component:
        return html.Button(icon(picture) if picture in ("close",) else picture, id={"type": "basket-row", "action": action, "index": index},
                           className="basket-button", type="button", n_clicks=0, disabled=off, title=words,
                           **{"aria-label": f"{words}: {rows[index].line}"})  # fmt: skip

    found: list[Component] = []
    for index, row in enumerate(rows):
        said = html.Code(row.line, className="basket-text")
        words = html.Span(row.problem, className="basket-problem", role="alert") if row.problem else None
        if row.operation is not None and not row.problem:
            words = html.Span(KINDS[row.operation.kind].words, className="form-hint")
        tools = [
            button("edit", index, "✎", "Edit", row.operation is None), button("up", index, "↑", "Move up", index == 0),
            button("down", index, "↓", "Move down", index == len(rows) - 1), button("remove", index, "close", "Remove"),
        ]  # fmt: skip
        found.append(html.Div([html.Div([said, words], className="basket-said"), html.Div(tools, className="basket-tools")],
                              className=f"basket-item{' is-wrong' if row.problem else ''}"))  # fmt: skip
    return found


def cost_of(scene: Scene, prompts: str, draws: Any) -> Component | str:
    """What a run costs, for the line beside the button."""
    try:
        texts = prompts_of(replace(scene, view=scene.view.change(prompts=prompts)))
    except FormError as error:
        return str(error)
    count = draws if isinstance(draws, int) else 0
    parameters = int((scene.run.model.get("parameters") if scene.run is not None else 0) or 0)
    words, long = cost_words(parameters, sum(len(text.encode()) for text in texts), len(texts) * (2 + count))
    return html.Span(words, className="chip chip-warning") if long else words


# ---- callbacks -------------------------------------------------------------------------------------------------------


def place_choices(kind: str, offers: Mapping[str, Offer]) -> list[Any]:
    """What the place list offers for a kind: short names and roles, then hook points."""
    places = offers[kind].places if kind in offers else ()
    parts = [each for each in places if "hook_" not in each]
    points = [each for each in places if "hook_" in each]
    if not points:
        return [{"value": each, "label": each} for each in parts]
    return [{"group": group, "items": [{"value": each, "label": each} for each in items]}
            for group, items in (("Parts and roles, with a layer", parts), ("Hook points", points)) if items]  # fmt: skip


def register(app: Dash, services: Services) -> None:
    ablate.register(app, services)

    def start(view: ViewState, **values: Any) -> Job:
        return start_intervening(services, services.scene(view), **values)

    register_form(app, "intervene", ("basket", "draws", "seed", "prompts", "target", "against"), start)
    _register_adding(app, services)
    _register_basket(app, services)

    @app.callback(
        Output("sheet", "opened", allow_duplicate=True),
        Output("sheet", "title", allow_duplicate=True),
        Output("sheet-content", "children", allow_duplicate=True),
        Output("intervene-message", "children", allow_duplicate=True),
        Input("basket-python", "n_clicks"),
        State("intervene-basket", "value"),
        State("intervene-prompts", "value"),
        State("view", "data"),
        prevent_initial_call=True,
    )
    def show_python(clicks: int, text: str, prompts: str, view: dict[str, Any]) -> tuple[Any, ...]:
        if not clicks:
            return (no_update,) * 4
        scene = services.scene(ViewState.from_dict(view))
        try:
            operations = parse_basket(text)
        except FormError as error:
            return no_update, no_update, no_update, str(error)
        read = (texts_of(prompts) or [str(scene.opened().manifest.get("text"))])[0]
        model = str(scene.opened().model["name"])
        options = " ".join(f"--do {json.dumps(str(each), ensure_ascii=False)}" for each in operations)
        command = f"workbench intervene {model} {json.dumps(read, ensure_ascii=False)} {options} --json"
        sheet = [
            html.P("The same operations from Python, and from a shell:", className="panel-words"),
            dmc.CodeHighlight(code=in_python(model, operations, read), language="python"),
            dmc.CodeHighlight(code=command, language="bash"),
        ]
        return True, "The basket", html.Div(sheet), ""


def _register_adding(app: Dash, services: Services) -> None:
    boxes = [Output(f"add-box-{name}", "className") for name in FIELDS]
    values = [State(f"add-{name}", "value") for name in FIELDS]

    @app.callback(
        *boxes, Output("add-words", "children"), Output("add-place", "data"), Output("add-name", "data"),
        Input("add-kind", "value"), State("view", "data"),
    )  # fmt: skip
    def show_kind(kind: str | None, view: dict[str, Any] | None) -> tuple[Any, ...]:
        if kind not in KINDS or not view:
            return (*(["add-box is-hidden"] * len(FIELDS)), "", [], [])
        offers = offers_of(services, services.scene(ViewState.from_dict(view)))
        words = f"{KINDS[kind].words} Such as: {KINDS[kind].verb} {KINDS[kind].example}"
        names = [{"value": each, "label": each} for each in offers["feature"].places] if offers else []
        return (*(_box(name, kind) for name in FIELDS), words, place_choices(kind, offers), names)

    @app.callback(
        Output("intervene-basket", "value", allow_duplicate=True), Output("add-message", "children"), Output("basket-editing", "data"),
        Output("add-line", "children"), Input("add-line", "n_clicks"), State("intervene-basket", "value"), State("basket-editing", "data"),
        State("add-kind", "value"), *values, prevent_initial_call=True,
    )  # fmt: skip
    def add(clicks: int, text: str, editing: int | None, kind: str | None, *given: Any) -> tuple[Any, ...]:
        if not clicks:
            return (no_update,) * 4
        try:
            line = line_of(kind, dict(zip(FIELDS, given, strict=True)))
        except FormError as error:
            return no_update, str(error), no_update, no_update
        return put(text, editing, line), "", None, "Add"

    @app.callback(
        Output("intervene-basket", "value", allow_duplicate=True), Output("add-kind", "value"),
        Output("basket-editing", "data", allow_duplicate=True), Output("add-line", "children", allow_duplicate=True),
        *[Output(f"add-{name}", "value") for name in FIELDS],
        Input({"type": "basket-row", "action": ALL, "index": ALL}, "n_clicks"), State("intervene-basket", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    def change_row(clicks: Sequence[int], text: str) -> tuple[Any, ...]:
        same = (no_update,) * (4 + len(FIELDS))
        asked = ctx.triggered_id
        if not asked or not ctx.triggered[0]["value"]:
            return same
        index, action = int(asked["index"]), asked["action"]
        if action == "edit":
            operation = parse_basket(lines_of(text)[index])[0]
            values = form_values(operation)
            return no_update, operation.kind, index, "Replace", *(values[name] or None for name in FIELDS)
        changed = put(text, index, None) if action == "remove" else moved(text, index, -1 if action == "up" else 1)
        return changed, no_update, None, "Add", *([no_update] * len(FIELDS))


def _register_basket(app: Dash, services: Services) -> None:
    def scene_of(view: dict[str, Any]) -> Scene:
        return services.scene(ViewState.from_dict(view))

    @app.callback(
        Output("basket-rows", "children"), Output("basket-cost", "children"), Input("intervene-basket", "value"),
        Input("intervene-prompts", "value"), Input("intervene-draws", "value"), State("view", "data"),
    )  # fmt: skip
    def show_rows(text: str, prompts: str, draws: Any, view: dict[str, Any] | None) -> tuple[Any, Any]:
        if not view:
            return no_update, no_update
        scene = scene_of(view)
        length = None if texts_of(prompts) else scene.n_tokens or None
        return row_list(rows_of(text, length, offers_of(services, scene))), cost_of(scene, prompts or "", draws)

    app.clientside_callback(
        ClientsideFunction("workbench", "basket_to_address"), Output("basket-sent", "data"), Input("intervene-basket", "value"),
        Input("intervene-prompts", "value"), State("basket-first", "data"), prevent_initial_call=True,
    )  # fmt: skip
    app.clientside_callback(
        ClientsideFunction("workbench", "basket_from_address"), Output("intervene-basket", "value", allow_duplicate=True),
        Output("intervene-prompts", "value", allow_duplicate=True), Input("view", "data"), State("intervene-basket", "value"),
        State("intervene-prompts", "value"), prevent_initial_call=True,
    )  # fmt: skip


PAGE = Page(
    name="intervene",
    title="Intervene",
    icon="intervene",
    order=0,
    group="Change",
    words="Change something inside the model while it reads, and see what that does beside random changes of the same kind.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    opens_kind=KIND,
)
