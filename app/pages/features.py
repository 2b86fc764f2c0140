"""Features: what the features of a dictionary respond to and say, beside random weights and, for a BDH, beside its own neurons."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
import numpy as np
from dash import Dash, Input, Output, State, html, no_update
from dash.development.base_component import Component

from app.figures.common import number
from app.forms import count_input, earlier_results, form_frame, register_form, select, side_by_side
from app.frames import content_frame, frame, scene_of_slice, slice_input, view_slice
from app.measure.common import FormError
from app.measure.features import (
    KIND,
    KINDS,
    MOST_CONTEXT,
    MOST_FEATURES,
    MOST_SEQUENCES,
    MOST_STEPS,
    checked_settings,
    corpora,
    estimate_words,
    folders,
    sites_of,
    start_opening,
    start_training,
)
from app.measure.probes import trace_of
from app.page import Page
from app.pages.synapses import GRID, RIGHT
from app.panels.feature_texts import context_lines
from app.panels.features import (
    CONTEXTS,
    DENSITY,
    LIST,
    NEURONS,
    PANELS,
    PARTNERS,
    TOKENS,
    VALUES,
    chosen_feature,
    neuron_name,
    promoted_words,
)
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

FIELDS = (
    "name",
    "site",
    "head",
    "kind",
    "size",
    "k",
    "sparsity",
    "corpus",
    "sequences",
    "context",
    "every",
    "steps",
    "seed",
    "control",
)
DIGITS = {"valueFormatter": {"function": "d3.format('.3~g')(params.value)"}}
COLUMNS = [
    {"field": "feature", "headerName": "feature", "width": 88, "cellClass": "cell-mono cell-link"},
    {"field": "density", "headerName": "density", "width": 94, **RIGHT, **DIGITS},
    {"field": "largest", "headerName": "largest", "width": 90, **RIGHT, **DIGITS},
    {"field": "peak", "headerName": "on", "width": 74, "cellClass": "cell-mono"},
    {"field": "promotes", "headerName": "promotes", "minWidth": 140, "flex": 1, "cellClass": "cell-mono"},
]  # fmt: skip


def structure(scene: Scene) -> Hashable:
    return "features", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    forms = [_form(services, scene, found), _opening(services), *earlier_results(services, scene, KIND)]
    if found is None:
        return [html.Div([html.Div(frame(DENSITY, scene, ""), className="column span-7"), html.Div(forms, className="column span-5")],
                         className="grid")]  # fmt: skip
    texts = [
        html.Div(id="feature-texts", className="feature-texts"),
        view_slice("content", "feature-texts", CONTEXTS.depends),
    ]
    left = [
        _cards(found),
        _chosen(),
        frame(CONTEXTS, scene, "", above=texts),
        frame(TOKENS, scene, ""),
        frame(PARTNERS, scene, ""),
    ]
    right = [frame(LIST, scene, "", above=[_grid(scene)]), frame(VALUES, scene, ""), frame(DENSITY, scene, "")]
    if found.manifest["results"].get("neurons"):
        right.append(frame(NEURONS, scene, ""))
    return [
        html.Div(
            [html.Div(left, className="column span-7"), html.Div([*right, *forms], className="column span-5")],
            className="grid",
        )
    ]


# ---- forms -----------------------------------------------------------------------------------------------------------


def _form(services: Services, scene: Scene, found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    models = services.models.list_models()
    names = [str(model["name"]) for model in models]
    wanted = [run.model.get("name") for run in (found, scene.run) if run is not None]
    name = next((each for each in (*wanted, *names) if each in names), None)
    sites = sites_of(services, name or "")
    site = asked.get("site") if asked.get("site") in sites else first_site(sites)
    return form_frame(
        "features", "Train a dictionary",
        "The last tenth of the text is held out, and the same dictionary is trained on random weights. A stopped training goes on.",
        [
            side_by_side(
                dmc.Select(id="features-name", label="Model", value=name, allowDeselect=False, searchable=True, size="sm",
                           data=[{"value": str(m["name"]), "label": str(m.get("title") or m["name"])} for m in models]),
                dmc.Select(id="features-site", label="Site", value=site, data=sites, allowDeselect=False, searchable=True, size="sm"),
            ),
            side_by_side(
                select("features-kind", "Kind", [*KINDS.items()], asked.get("kind", "topk")),
                count_input("features-size", "Features", asked.get("features", 512), 2, MOST_FEATURES),
            ),
            side_by_side(
                count_input("features-k", "k (TopK kinds)", asked.get("k", 16), 1, MOST_FEATURES),
                dmc.NumberInput(id="features-sparsity", label="Penalty (other kinds)", value=asked.get("sparsity", 0.1), min=0, step=0.05,
                                size="sm", clampBehavior="none"),
                count_input("features-steps", "Steps", asked.get("steps", 1000), 1, MOST_STEPS),
            ),
            side_by_side(
                select("features-corpus", "Text", corpora(), asked.get("corpus", next((value for value, _ in corpora()), ""))),
                count_input("features-sequences", "Sequences", asked.get("sequences", 200), 10, MOST_SEQUENCES),
                count_input("features-context", "Tokens of each", asked.get("context", 128), 8, MOST_CONTEXT),
            ),
            side_by_side(
                count_input("features-head", "Only head", asked.get("head"), 0, 4096),
                count_input("features-every", "Every n-th token", asked.get("every", 1), 1, MOST_CONTEXT),
                count_input("features-seed", "Seed", asked.get("seed", 0), 0, 10**6),
            ),
            dmc.CheckboxGroup(id="features-control", size="sm", value=["control"] if asked.get("control", True) else [],
                              children=dmc.Checkbox(label="also on the model at random weights", value="control", size="sm")),
            html.Div(id="features-estimate", className="form-hint", **{"aria-live": "polite"}),
        ],
        "Train",
    )  # fmt: skip


def first_site(sites: Sequence[str]) -> str | None:
    """The residual stream in the middle of the model, if it has one."""
    streams = [site for site in sites if site.endswith("hook_resid_post")] or list(sites)
    return streams[len(streams) // 2] if streams else None


def _opening(services: Services) -> Component:
    known = folders(services)
    words = "Dictionaries in the runs root, also those of “workbench features --out” there. One that was stopped is finished first."
    if not known:
        return content_frame(
            "features-open", "Open a dictionary", words, html.P("There is none yet.", className="form-hint"), ""
        )
    return form_frame(
        "feature-folder",
        "Open a dictionary",
        words,
        [select("feature-folder-folder", "Folder", known, known[0][0])],
        "Open",
    )


# ---- the dictionary --------------------------------------------------------------------------------------------------


def measures(found: Run) -> list[tuple[str, str, str]]:
    """(name, value, at random weights) of a dictionary's measures."""
    results = found.manifest["results"]
    control, recovery = results.get("control") or {}, results.get("recovery")
    lines = []
    for name, key, form in (
        ("active per row (L0)", "l0", "{:.1f}"), ("unexplained variance (FVU)", "fvu", "{:.3f}"), ("alive", "alive", "{:.0%}"),
        ("fire on more than 10 %", "dense_10", "{:.1%}"), ("cosine to its nearest other", "nearest", "{:.2f}"),
    ):  # fmt: skip
        lines.append(
            (name, form.format(results["evaluation"][key]), form.format(control[key]) if control else "not trained")
        )
    if recovery is not None:
        lines.append(("loss recovered (CE)", f"{recovery['ce_score']:.3f}", "–"))
        lines.append(("divergence recovered (KL)", f"{recovery['kl_score']:.3f}", "–"))
    return lines


def _cards(found: Run) -> Component:
    results = found.manifest["results"]
    cards = [
        html.Div(
            [
                html.Dt(name),
                html.Dd(value),
                html.Dd(f"random: {other}" if other != "–" else "", className="card-control"),
            ]
        )
        for name, value, other in measures(found)
    ]
    name, model = results["site"]["name"], found.model.get("name")
    size = f"{results['rows']:,} rows of {results['d_in']} numbers"
    about = f"{results['n_features']:,} features ({results['kind']}) of {name}, {model}; {size}."
    missing = "" if results.get("recovery") else " Loss is not measured for sites that are read at some positions only."
    note = "A dictionary of random weights often reconstructs better; features say something about training only where they differ."
    return content_frame("features-cards", "The dictionary", f"{about}{missing}", [
        html.Dl(cards, className="card-facts"), html.P(note, className="panel-words"),
    ], "")  # fmt: skip


def _chosen() -> Component:
    body = html.Div([html.Div(id="feature-chosen"), view_slice("content", "feature-chosen", CONTEXTS.depends)])
    return content_frame(
        "feature-chosen", "The chosen feature", "Click a feature in the list or in any figure to choose it.", body, ""
    )


def chosen_words(services: Services, scene: Scene) -> list[Any]:
    """What the chosen feature is in a few words, and ways to take it out of a run."""
    found, feature = measured(scene, KIND), chosen_feature(scene)
    if found is None or feature is None:
        return ["No feature of this dictionary fires."]
    density, largest = float(found.array("density")[feature]), float(found.array("largest")[feature])
    parts: list[Any] = [
        html.P([html.Strong(f"Feature {feature}"), f": fires on {density:.2%} of the rows, up to {number(largest)}."])
    ]
    for side, words in (("promoted", "raises"), ("suppressed", "lowers")):
        chips = [html.Span(each, className="chip chip-mono") for each in promoted_words(found, feature, side)]
        if chips:
            parts.append(
                html.Div(
                    [html.Span(words, className="form-hint"), html.Span(chips, className="chip-row")],
                    className="says-line",
                )
            )
    where = np.flatnonzero(found.array("shown") == feature)
    if found.has("neurons.match") and len(where):
        neuron, r = int(found.array("neurons.match")[where[0]]), float(found.array("neurons.r")[where[0]])
        parts.append(
            html.P(
                f"Native neuron that follows it best: {neuron_name(found, neuron)}, r {r:.2f}.", className="panel-words"
            )
        )
    return [*parts, _interventions(services, scene, found, feature, largest)]


def _interventions(services: Services, scene: Scene, found: Run, feature: int, largest: float) -> Component:
    folder = found.manifest["results"].get("folder")
    if not folder or not (services.store.root / folder).is_dir():
        words = "Its dictionary is not in the runs root, so it cannot be taken out of a run from here; train or copy it there."
        return html.P(words, className="panel-words")
    run = scene.run
    if run is None or run.model.get("name") != found.model.get("name"):
        run = trace_of(services, found)
    if run is None:
        return html.P(
            "Start a run of this model on the Overview page to take the feature out of it.", className="panel-words"
        )
    amount = number(largest).replace("−", "-") if largest else "1"
    edits = {
        "Take it out of a run": f"feature {folder} {feature} to 0",
        "Add its largest value": f"feature-add {folder} {feature} add {amount}",
    }
    shown = scene.view.change(page="intervene", run=run.id, result="", prompts="")
    links = [
        html.A(words, href=shown.change(basket=line).to_url(), className="in-app tool-button is-framed")
        for words, line in edits.items()
    ]
    return html.Div(links, className="form-row")


def _grid(scene: Scene) -> Component:
    rows = LIST.rows(scene)
    search = dmc.TextInput(
        id="feature-search", placeholder="Token or number", size="xs", w=200, **{"aria-label": "Search features"}
    )
    return html.Div([
        html.Div(search, className="map-bar feature-search"),
        dag.AgGrid(
            id="feature-grid", rowData=rows, columnDefs=COLUMNS, className="runs-grid", getRowId="params.data.id",
            defaultColDef={"sortable": True, "resizable": True}, dashGridOptions={**GRID, "rowBuffer": 4},
            style={"height": "280px", "width": "100%"},
        ),
    ], className="panel-body is-padded")  # fmt: skip


# ---- callbacks -------------------------------------------------------------------------------------------------------


def register(app: Dash, services: Services) -> None:
    def train(view: ViewState, **values: Any) -> Job:
        return start_training(services, **values)

    def open_folder(view: ViewState, folder: Any) -> Job:
        return start_opening(services, folder)

    _register_training(app, services, train)
    register_form(app, "feature-folder", ("folder",), open_folder)

    @app.callback(Output("feature-texts", "children"), slice_input("content", "feature-texts"))
    def show_texts(data: dict[str, Any] | None) -> Any:
        part = (data or {}).get("view")
        return context_lines(scene_of_slice(services, part), part.get("scheme")) if part else None

    @app.callback(Output("feature-chosen", "children"), slice_input("content", "feature-chosen"))
    def show_chosen(data: dict[str, Any] | None) -> Any:
        return chosen_words(services, scene_of_slice(services, data["view"])) if data and data.get("view") else None

    @app.callback(
        Output("feature-grid", "dashGridOptions"),
        Input("feature-search", "value"),
        State("feature-grid", "dashGridOptions"),
    )
    def search(text: str | None, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "quickFilterText": (text or "").strip()}

    @app.callback(
        Output("go", "data", allow_duplicate=True), Input("feature-grid", "cellClicked"), prevent_initial_call=True
    )
    def choose(cell: dict[str, Any] | None) -> Any:
        chosen = str((cell or {}).get("rowId") or "")
        return {"change": {"feature": chosen}, "page": "/features"} if chosen.isdigit() else no_update


def _register_training(app: Dash, services: Services, train: Any) -> None:
    """The training form: its sites follow the model, its estimate every input."""
    register_form(app, "features", FIELDS, train)

    @app.callback(
        Output("features-site", "data"), Output("features-site", "value"), Input("features-name", "value"), State("features-site", "value"),
        prevent_initial_call=True,
    )  # fmt: skip
    def follow(name: str | None, site: str | None) -> tuple[Any, Any]:
        sites = sites_of(services, name or "")
        return sites, site if site in sites else first_site(sites)

    @app.callback(
        Output("features-estimate", "children"),
        *[Input(f"features-{field}", "value") for field in FIELDS],
    )
    def estimate(*values: Any) -> str:
        return estimated(services, dict(zip(FIELDS, values, strict=True)))


def estimated(services: Services, form: dict[str, Any]) -> str:
    """Time and memory that the form asks for, or what is wrong with it."""
    try:
        return estimate_words(services, checked_settings(services, **form))
    except FormError as error:
        return str(error)
    except (ValueError, LookupError) as error:
        return f"How long it takes cannot be told: {error}"


PAGE = Page(
    name="features",
    title="Features",
    icon="features",
    order=1,
    group="Measure",
    words="Sparse features of any site: what each responds to, says and fires with, beside random weights and a BDH's own neurons.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
