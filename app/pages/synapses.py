"""Synapses: how single connections of a BDH grow while it reads, which are strongest, and who wrote them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import ALL, Dash, Input, Output, State, ctx, html, no_update
from dash.development.base_component import Component

from app.figures.common import number, visible_text
from app.forms import count_input, earlier_results, form_frame, register_form, select, side_by_side, word_list
from app.frames import content_frame, explain, frame, icon, scene_of_slice, slice_input, view_slice
from app.measure.common import FormError, bdh_models, checked_number
from app.measure.synapses import KIND, MEASURES, start_search
from app.page import Page
from app.panels.results import measured
from app.panels.synapses import PANELS, followed, reader, synapse_name
from app.services import Scene, Services
from app.theme import theme_called
from app.view_state import MAX_SYNAPSES, SynapseAddress, ViewState
from workbench.lab.jobs import Job
from workbench.lab.run_synapses import RunSynapses

STRENGTH, FIXED, CURRENT, COUNT, WRITES, TOP, AUTHORS = PANELS
MOST_OFFERED = 8
PARTS = ("source layer", "head", "neuron", "target layer", "head", "neuron")
FIRST = (0, 0, 0, 1, 0, 0)
RIGHT = {"type": "rightAligned"}
COLUMNS = [
    {
        "field": "source",
        "headerName": "from y",
        "headerTooltip": "layer·head·neuron that fires",
        "minWidth": 130,
        "flex": 2,
        "cellClass": "cell-mono cell-link",
    },
    {
        "field": "target",
        "headerName": "to x",
        "headerTooltip": "layer·head·neuron that is reached",
        "minWidth": 130,
        "flex": 2,
        "cellClass": "cell-mono cell-link",
    },
    {"field": "score", "headerName": "score", "minWidth": 86, "flex": 1, **RIGHT},
]
GRID = {"animateRows": False, "headerHeight": 36, "rowHeight": 32, "suppressNoRowsOverlay": True}


def structure(scene: Scene) -> Hashable:
    return "synapses", scene.view.result, depth_of(scene), bool(scene.view.synapses)


def depth_of(scene: Scene) -> int:
    """Layers of the open run that have synapses; 0 for another model."""
    try:
        return len(reader(scene).layers) if scene.run is not None else 0
    except Exception:  # the panels say why
        return 0


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    if scene.run is not None and not depth_of(scene):
        return [no_synapses(services, scene)]
    chips = [
        html.Div(id="synapse-chips", className="tracked-list"),
        view_slice("content", "synapse-chips", ("run", "synapses")),
    ]
    left: list[Component] = [_picker(), frame(STRENGTH, scene, "", above=chips)]
    if scene.view.synapses:  # until then the first panel says what to do, and the others would only repeat it
        left += [frame(panel, scene, "") for panel in (WRITES, FIXED, CURRENT, COUNT)]
    right: list[Component] = [_form(scene)]
    if measured(scene, KIND) is not None:
        right += [*_other_run(scene), frame(TOP, scene, "", above=[_table(scene)]), frame(AUTHORS, scene, "")]
        said = [html.Div(id="synapse-says"), view_slice("content", "synapse-says", ("run", "result", "synapses"))]
        right.append(content_frame("synapse-says", "What its neurons say", "", said, ""))
    right += earlier_results(services, scene, KIND)
    return [
        html.Div(
            [html.Div(left, className="column span-7"), html.Div(right, className="column span-5")], className="grid"
        )
    ]


def no_synapses(services: Services, scene: Scene) -> Component:
    """What to do when the open run is of another model: the runs of a BDH that there are, or how to make one."""
    names = {str(model["name"]) for model in bdh_models(services)}
    known = [entry for entry in services.store.list(kind="trace") if entry.model in names][:MOST_OFFERED]
    links = [
        html.Li(html.A(entry.title, href=scene.view.change(run=entry.id, synapses=()).to_url(), className="in-app"))
        for entry in known
    ]
    make = html.A(
        "start one on the Overview page", href=scene.view.change(page="overview").to_url(), className="in-app"
    )
    words = [
        "Only a BDH has synapses between neurons. ",
        "Open one of its runs, or " if links else "To have a run of one, ",
        make,
        ".",
    ]
    parts = [html.Strong("This run is of another model"), html.Span(words), html.Ul(links, className="plain-list")]
    return html.Div(parts[: 3 if links else 2], className="panel-message", role="status")


def _picker() -> Component:
    inputs = [
        count_input(
            f"synapse-part-{index}",
            {0: "From y: layer", 3: "To x: layer"}.get(index, name),
            FIRST[index],
            0,
            10**6,
        )
        for index, name in enumerate(PARTS)
    ]
    button = html.Button("Follow", id="synapse-follow", className="tool-button is-framed", type="button", n_clicks=0)
    body = html.Div([
        html.Div(inputs, className="synapse-picker"), html.Div([button, html.Span(id="synapse-follow-message", className="form-message",
                                                                                 role="alert")], className="form-row"),
    ], className="form-stack")  # fmt: skip
    return content_frame(
        "synapse-picker",
        "Follow a synapse",
        "From what neuron i fires (y) to what neuron j sees (x) in a higher layer.",
        body,
        "",
    )


def _form(scene: Scene) -> Component:
    depth = max(2, depth_of(scene))
    return form_frame(
        "synapse-search", "Search",
        "All synapses into one layer after the pinned token (else the last), a block at a time; the best 50 are kept.",
        [
            select("synapse-search-measure", "The most by", [*MEASURES.items()], "strength"),
            side_by_side(
                select("synapse-search-layer", "Into layer", [(str(layer), str(layer)) for layer in range(1, depth)], str(depth - 1)),
                count_input("synapse-search-since", "Change: span begins after token", 0, 0, 10**6),
            ),
            symbol_input(scene, "synapse-search-symbol", "Contribution: to the logit of",
                         "one character; the next one of the text at first", "e"),
        ],
        "Search",
    )  # fmt: skip


def symbol_input(scene: Scene, id: str, label: str, description: str, otherwise: str = "") -> Component:
    """One character whose logit is asked about; at first the one that follows the pinned token, `otherwise` where none does."""
    following = scene.tokens[scene.query + 1] if scene.query + 1 < scene.n_tokens else ""
    value = following if len(following.encode()) == 1 else otherwise
    return dmc.TextInput(id=id, label=label, value=value, size="sm", description=description)


def _other_run(scene: Scene) -> list[Component]:
    found = measured(scene, KIND)
    asked = (found.manifest.get("settings") or {}).get("run") if found is not None else None
    if not asked or scene.run is None or asked == scene.run.id:
        return []
    link = html.A("open it", href=scene.view.change(run=str(asked), synapses=()).to_url(), className="in-app")
    return [html.Div([html.Strong("This list is of another text"), html.Span(["It was made from another run: ", link, "."])],
                     className="banner", role="status")]  # fmt: skip


def table_rows(scene: Scene) -> list[dict[str, Any]]:
    """The search's rows for the grid; an id is the synapse as the address writes it."""
    values = TOP.values(scene)
    return [
        {"id": written(address), "source": "{}·{}·{}".format(*address[:3]),
         "target": "{}·{}·{}".format(*address[3:]), "score": number(float(value))}
        for address, value in zip(TOP.addresses(scene), values, strict=True)  # type: ignore[attr-defined]
    ]  # fmt: skip


def _table(scene: Scene) -> Component:
    try:
        rows = table_rows(scene)
    except Exception as failure:  # the panel's own message says why
        return explain("top-synapses", failure)
    return dag.AgGrid(
        id="synapse-grid", rowData=rows, columnDefs=COLUMNS, className="runs-grid", getRowId="params.data.id",
        defaultColDef={"sortable": True, "resizable": True}, dashGridOptions=GRID, style={"height": "270px", "width": "100%"},
    )  # fmt: skip


def chips(scene: Scene, scheme: str | None) -> list[Component]:
    """The followed synapses, each with its colour and a button to let it go."""
    theme = theme_called(scheme)
    try:
        kept = followed(scene)
    except Exception:  # the panel below says why
        return []
    found = []
    for index, address in enumerate(kept):
        stop = html.Button(
            icon("close"), id={"type": "synapse-stop", "synapse": written(address)}, type="button", title="Stop following", n_clicks=0,
            **{"aria-label": f"Stop following {synapse_name(address)}"},
        )  # fmt: skip
        swatch = html.Span(className="swatch", style={"background": theme.categorical[index % 8]})
        found.append(html.Span([swatch, synapse_name(address), stop], className="chip chip-mono"))
    return found


def says(scene: Scene) -> Any:
    """What the neurons of the synapse chosen last say: tokens that excite them, and that they promote."""
    try:
        record = AUTHORS.explained(scene)  # type: ignore[attr-defined]
    except Exception as failure:
        return explain("synapse-says", failure)
    titles = {
        "source": "Source neuron (fires)",
        "target": "Target neuron (is reached)",
        "row": "The state's row under the target",
    }
    lines: list[Component] = []
    for part, title in titles.items():
        if part not in record["says"]:
            continue
        lines.append(html.H3(title, className="says-title"))
        for kind, words in record["says"][part].items():
            lines.append(html.Div([html.Span(kind, className="form-hint"),
                                   word_list([(visible_text(word), value) for word, value in words])], className="says-line"))  # fmt: skip
    return lines


def written(address: SynapseAddress) -> str:
    """The synapse as the address bar writes it."""
    return ViewState(synapses=(address,)).to_query().rpartition("syn=")[2]


def toggled(view: ViewState, address: SynapseAddress) -> dict[str, Any]:
    """The change of the address bar that follows a synapse, or lets it go; the one followed longest makes room."""
    kept = [each for each in view.synapses if each != address]
    if len(kept) == len(view.synapses):
        kept = [*kept, address][-MAX_SYNAPSES:]
    query = ViewState(synapses=tuple(kept)).to_query()
    return {"change": {"syn": query.rpartition("syn=")[2] if kept else None}, "page": "/synapses"}


def typed(scene: Scene, parts: Sequence[Any]) -> SynapseAddress:
    """The synapse that the six inputs name. FormError for one that the run does not have."""
    numbers = [checked_number(part, name, 0, 10**6) for part, name in zip(parts, PARTS, strict=True)]
    address: SynapseAddress = tuple(numbers)  # type: ignore[assignment]
    try:
        RunSynapses(scene.opened()).check(((address[0], address[1], address[2]), (address[3], address[4], address[5])))
    except (ValueError, RuntimeError) as error:
        raise FormError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
    return address


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, measure: Any, layer: Any, since: Any, symbol: Any) -> Job:
        layer = int(layer) if str(layer).isdigit() else layer
        return start_search(services, services.scene(view), measure, layer, since, symbol)

    register_form(app, "synapse-search", ("measure", "layer", "since", "symbol"), start)

    @app.callback(
        Output("synapse-search-since", "disabled"),
        Output("synapse-search-symbol", "disabled"),
        Input("synapse-search-measure", "value"),
    )
    def meant(measure: str | None) -> tuple[bool, bool]:
        return measure != "change", measure != "read"

    @app.callback(Output("synapse-chips", "children"), slice_input("content", "synapse-chips"))
    def show_chips(data: dict[str, Any] | None) -> Any:
        return (
            chips(scene_of_slice(services, data["view"]), data["view"].get("scheme"))
            if data and data.get("view")
            else None
        )

    @app.callback(Output("synapse-says", "children"), slice_input("content", "synapse-says"))
    def show_says(data: dict[str, Any] | None) -> Any:
        return says(scene_of_slice(services, data["view"])) if data and data.get("view") else None

    @app.callback(
        Output("go", "data", allow_duplicate=True), Input("synapse-grid", "cellClicked"), State("view", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def follow_clicked(cell: dict[str, Any] | None, view: dict[str, Any]) -> Any:
        chosen = ViewState.from_url("/synapses", f"syn={(cell or {}).get('rowId') or ''}").synapses
        return toggled(ViewState.from_dict(view), chosen[0]) if chosen else no_update

    @app.callback(
        Output("go", "data", allow_duplicate=True), Input({"type": "synapse-stop", "synapse": ALL}, "n_clicks"), State("view", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def stop(clicks: Sequence[int], view: dict[str, Any]) -> Any:
        asked = ctx.triggered_id
        if not asked or not ctx.triggered[0]["value"]:
            return no_update
        chosen = ViewState.from_url("/synapses", f"syn={asked['synapse']}").synapses
        return toggled(ViewState.from_dict(view), chosen[0])

    @app.callback(
        Output("go", "data", allow_duplicate=True), Output("synapse-follow-message", "children"),
        Input("synapse-follow", "n_clicks"), State("view", "data"), *[State(f"synapse-part-{i}", "value") for i in range(6)],
        prevent_initial_call=True,
    )  # fmt: skip
    def follow_typed(clicks: int, view: dict[str, Any], *parts: Any) -> tuple[Any, str]:
        if not clicks:
            return no_update, ""
        shown = ViewState.from_dict(view)
        try:
            address = typed(services.scene(shown), parts)
        except FormError as error:
            return no_update, str(error)
        return (no_update if address in shown.synapses else toggled(shown, address)), ""


PAGE = Page(
    name="synapses",
    title="Synapses",
    icon="synapses",
    order=0,
    group="BDH",
    words="How the connections of a BDH grow while it reads: any synapse over time, the strongest ones, and who wrote them.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    opens_kind=KIND,
)
