"""Concepts: which synapses of a BDH tell sentences about something from other sentences, beside neurons, probes and chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
from dash import Dash, Input, Output, State, html, no_update
from dash.development.base_component import Component

from app.forms import (
    count_input,
    earlier_results,
    form_frame,
    model_select,
    register_form,
    select,
    side_by_side,
    text_area,
)
from app.frames import frame
from app.measure.concepts import (
    KIND,
    NO_DICTIONARY,
    OWN,
    STATISTICS,
    concept_names,
    dictionaries,
    start_finding,
)
from app.page import Page
from app.pages.synapses import GRID, RIGHT, toggled, written
from app.panels.concepts import PANELS
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState

CANDIDATES, RIVALS, SHUFFLES, TRANSFER, CAUSAL, TRACES = PANELS
FIELDS = (
    "name",
    "concept",
    "positive",
    "negative",
    "sentences",
    "statistic",
    "layer",
    "head",
    "shuffles",
    "draws",
    "dictionary",
)
MEANINGS = {
    "effect": ("effect", "partial correlation with the labels on the discovery half: always too good"),
    "rank_biserial": ("r", "rank-biserial correlation on the held-out half"),
    "auc": ("AUC", "on the held-out half, adjusted for length"),
    "p": ("p", "Mann–Whitney U on the held-out half"),
    "q": ("q", "Benjamini–Hochberg over the candidates"),
}
COLUMNS = [
    {"field": "synapse", "headerName": "synapse", "minWidth": 184, "flex": 3, "cellClass": "cell-mono cell-link"},
    *({"field": key, "headerName": name, "headerTooltip": words, "minWidth": 68, "flex": 1, **RIGHT}
      for key, (name, words) in MEANINGS.items()),
]  # fmt: skip
TAUGHT = "bdh-concepts"  # the shipped model whose text was about these concepts
POSITIVE = "\n".join(
    f"{frame.format(word)}"
    for word in ("cat", "dog", "hen", "cow", "pig")
    for frame in ("we have a {} here", "he sees a {} now")
)
NEGATIVE = "\n".join(
    f"{frame.format(word)}"
    for word in ("saw", "axe", "nut", "jug", "pan")
    for frame in ("we have a {} here", "he sees a {} now")
)


def structure(scene: Scene) -> Hashable:
    return "concepts", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    narrow = [_form(services, scene, asked), *earlier_results(services, scene, KIND)]
    if found is None:
        wide = [frame(CANDIDATES, scene, "")]
    else:
        wide = [
            frame(CANDIDATES, scene, "", above=[_grid(scene)]),
            frame(TRACES, scene, ""),
            frame(TRANSFER, scene, ""),
        ]
        narrow = [frame(RIVALS, scene, ""), frame(SHUFFLES, scene, ""), frame(CAUSAL, scene, ""), *narrow]
    return [
        html.Div(
            [html.Div(wide, className="column span-7"), html.Div(narrow, className="column span-5")], className="grid"
        )
    ]


def _form(services: Services, scene: Scene, asked: dict[str, Any]) -> Component:
    search = asked.get("search") or {}
    layers, heads = search.get("layers"), search.get("target_heads")
    own = asked.get("concept") == OWN
    return form_frame(
        "concept", "Two sets of sentences",
        "Half of the sentences choose synapses, the other half scores them, and the whole is done again with shuffled labels.",
        [
            model_select(services, scene, "concept-name", value=asked.get("model"), otherwise=TAUGHT),
            side_by_side(
                select("concept-concept", "Sentences about", [*((name, name) for name in concept_names()), (OWN, "own sentences")],
                       asked.get("concept", "animal")),
                count_input("concept-sentences", "Sentences of each set", min(400, max(8, len(asked.get("positive") or [0] * 64))), 8, 400),
            ),
            html.Div([
                text_area("concept-positive", "Own: positive, one a line (group | sentence)", _lines(asked, 0) if own else POSITIVE, 2),
                text_area("concept-negative", "Own: negative", _lines(asked, 1) if own else NEGATIVE, 2),
            ], id="concept-own", className="form-stack", style=shown_if(own)),
            select("concept-statistic", "Statistic of a sentence", [*STATISTICS.items()], search.get("statistic", "strength")),
            side_by_side(
                count_input("concept-layer", "Target layer (empty: all)", layers[0][1] if layers else None, 1, 255),
                count_input("concept-head", "Target head (empty: all)", heads[0] if heads else None, 0, 255),
            ),
            side_by_side(
                count_input("concept-shuffles", "Shuffles", search.get("n_shuffles", 9), 0, 200),
                count_input("concept-draws", "Causal check: matched draws", asked.get("draws", 5), 0, 200),
            ),
            select("concept-dictionary", "Rival: best feature of a dictionary", dictionaries(services),
                   asked.get("dictionary") or NO_DICTIONARY),
        ],
    )  # fmt: skip


def shown_if(wanted: bool) -> dict[str, str]:
    """The style of a part of a form that not every choice needs."""
    return {} if wanted else {"display": "none"}


def _lines(asked: dict[str, Any], which: int) -> str:
    texts = asked[("positive", "negative")[which]]
    return "\n".join(
        f"{group} | {text}" if group else text for group, text in zip(asked["groups"][which], texts, strict=True)
    )


def candidate_rows(scene: Scene) -> list[dict[str, Any]]:
    """The candidates for the grid; an id is the synapse as the address bar writes it."""
    rows = CANDIDATES.results(scene)["rows"]
    addresses = CANDIDATES.addresses(scene)  # type: ignore[attr-defined]
    return [
        {
            "id": written(address),
            "synapse": row["synapse"],
            **{key: _rounded(row[key], key in ("p", "q")) for key in MEANINGS},
        }
        for row, address in zip(rows, addresses, strict=True)
    ]


def _rounded(value: float | None, chance: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if not chance else f"{value:.1g}" if value < 0.01 else f"{value:.2g}"


def _grid(scene: Scene) -> Component:
    return dag.AgGrid(
        id="concept-grid", rowData=candidate_rows(scene), columnDefs=COLUMNS, className="runs-grid", getRowId="params.data.id",
        defaultColDef={"resizable": True}, dashGridOptions=GRID,
        style={"height": "250px", "width": "100%", "--ag-cell-horizontal-padding": "8px"},
    )  # fmt: skip


def register(app: Dash, services: Services) -> None:
    register_form(app, "concept", FIELDS, lambda view, **values: start_finding(services, **values))

    @app.callback(
        Output("concept-own", "style"), Output("concept-sentences", "disabled"), Input("concept-concept", "value")
    )
    def meant(concept: str | None) -> tuple[dict[str, str], bool]:
        return shown_if(concept == OWN), concept == OWN

    @app.callback(
        Output("go", "data", allow_duplicate=True), Input("concept-grid", "cellClicked"), State("view", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
    def follow(cell: dict[str, Any] | None, view: dict[str, Any]) -> Any:
        chosen = ViewState.from_url("/synapses", f"syn={(cell or {}).get('rowId') or ''}").synapses
        shown = ViewState.from_dict(view)
        if not chosen:
            return no_update
        return {"page": "/synapses"} | toggled(
            shown.change(synapses=tuple(s for s in shown.synapses if s != chosen[0])), chosen[0]
        )


PAGE = Page(
    name="concepts",
    title="Concepts",
    icon="concepts",
    order=2,
    group="BDH",
    words="Which synapses of a BDH tell sentences about something from others, and whether a neuron or chance would do as well.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
