"""Neuron graph: which neurons of a BDH excite which, by its weights, by one text's synapses, or by firing together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_cytoscape as cyto
import numpy as np
from dash import Dash, Input, Output, State, html, no_update
from dash.development.base_component import Component

from app.figures.graph import graph_elements, graph_style
from app.forms import (
    count_input,
    earlier_results,
    form_frame,
    model_select,
    register_form,
    select,
    share_input,
    side_by_side,
    text_area,
    word_list,
)
from app.frames import frame
from app.measure.graph import GRAPHS, KIND, MOST_EDGES, OF_A_TEXT, THRESHOLDS, start_graph, threshold_of
from app.page import Page
from app.panels.graph import PANELS, neuron_names
from app.panels.results import measured
from app.services import Scene, Services
from app.theme import theme_called
from app.view_state import ViewState
from workbench.lab.runs import Run

EDGES, MODULARITY, DEGREES, HUBS = PANELS
EXAMPLE = (
    "The old lighthouse keeper climbed the stairs. At the top of the stairs the old lighthouse keeper lit the lamp."
)
FIELDS = (
    "name",
    "graph",
    "source_head",
    "target_head",
    "edges",
    "text",
    "layer",
    "draws",
    "threshold",
    "noise_quantile",
)
SHOWN_NEIGHBOURS = 12


def structure(scene: Scene) -> Hashable:
    return "graph", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    left = [_form(services, scene, found), *earlier_results(services, scene, KIND)]
    if found is None:
        return [html.Div([html.Div(left, className="column span-5"), html.Div(frame(EDGES, scene, ""), className="column span-7")],
                         className="grid")]  # fmt: skip
    keep = html.Button("Drawing as PNG", id="graph-png", className="tool-button is-framed", type="button", n_clicks=0)
    told = html.Div(id="graph-neuron", className="panel-words", role="status")
    drawn = frame(EDGES, scene, "", above=[_drawing(found), html.Div(keep, className="zoom-row"), told])
    wide = html.Div([drawn, frame(HUBS, scene, "")], className="column span-7")
    narrow = html.Div([frame(MODULARITY, scene, ""), frame(DEGREES, scene, ""), *left], className="column span-5")
    return [html.Div([wide, narrow], className="grid")]


def _form(services: Services, scene: Scene, found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    threshold = threshold_of(asked)
    run_text = (scene.run.manifest.get("text") or "") if scene.run is not None else ""
    text = (found.manifest.get("text") if found is not None else None) or run_text or EXAMPLE
    return form_frame(
        "graph", "A graph",
        "The largest entries between two heads become edges. Everything is compared with graphs of as many edges.",
        [
            model_select(services, scene, "graph-name", value=asked.get("model")),
            select("graph-graph", "Graph of", [*GRAPHS.items()], asked.get("graph", "x")),
            side_by_side(
                count_input("graph-source_head", "From head", asked.get("source_head", 0), 0, 255),
                count_input("graph-target_head", "To head", asked.get("target_head", 0), 0, 255),
            ),
            select("graph-threshold", "Keep the largest entries by", [*THRESHOLDS.items()], next(iter(threshold))),
            side_by_side(
                count_input("graph-edges", "Edges", threshold.get("edges", 1024), 20, MOST_EDGES),
                share_input("graph-noise_quantile", "Noise quantile", threshold.get("noise_quantile", 0.999)),
            ),
            side_by_side(
                count_input("graph-draws", "Draws per baseline", asked.get("draws", 3), 2, 50),
                count_input("graph-layer", "Layer (graphs of a text)", asked.get("layer") or 1, 0, 255),
            ),
            text_area("graph-text", "Text (graphs of a text)", text[:2000], 2),
        ],
    )  # fmt: skip


def elements(found: Run) -> list[dict[str, Any]]:
    """What cytoscape draws of a measured graph."""
    community = found.array("community")
    names = neuron_names(found.manifest["results"], found.manifest["settings"], len(community))
    return graph_elements(
        found.array("source"), found.array("target"), found.array("weight"), community, found.array("places"), names
    )


def _drawing(found: Run) -> Component:
    return html.Div(
        cyto.Cytoscape(
            id="graph-drawing", elements=elements(found), layout={"name": "preset", "fit": True, "padding": 16}, minZoom=0.1, maxZoom=6,
            stylesheet=graph_style(theme_called("light"), found.manifest["results"]["directed"]),
            style={"width": "100%", "height": "440px"},
            responsive=True, autoRefreshLayout=False, boxSelectionEnabled=False,
        ),
        className="graph-drawing", role="img", **{"aria-label": "The graph of neurons; the table of this panel lists its edges"},
    )  # fmt: skip


def neuron_words(found: Run, node: int) -> list[Any]:
    """A neuron's degree, community and strongest neighbours, and what it says where it is a hub."""
    source, target, weight, community = (found.array(name) for name in ("source", "target", "weight", "community"))
    names = neuron_names(found.manifest["results"], found.manifest["settings"], len(community))
    touching = np.flatnonzero((source == node) | (target == node))
    strongest = touching[np.argsort(-np.abs(weight[touching]), kind="stable")][:SHOWN_NEIGHBOURS]
    others = [
        (("→ " if source[e] == node else "← ") + names[target[e] if source[e] == node else source[e]], weight[e])
        for e in strongest
    ]
    parts: list[Any] = [
        html.Strong(f"Neuron {names[node]}"),
        f": {len(touching)} edges, community {int(community[node])}. ",
        word_list(others),
    ]
    for hub in found.manifest["results"]["hubs"]:
        if f"{hub['head']}·{hub['neuron']}" == names[node]:
            parts += [" promotes ", word_list(hub["meaning"]["promotes"])]
    return parts


def register(app: Dash, services: Services) -> None:
    register_form(app, "graph", FIELDS, lambda view, **values: start_graph(services, **values))

    @app.callback(
        Output("graph-edges", "disabled"), Output("graph-noise_quantile", "disabled"), Input("graph-threshold", "value")
    )
    def meant(threshold: str | None) -> tuple[bool, bool]:
        return threshold != "edges", threshold == "edges"

    @app.callback(Output("graph-text", "disabled"), Output("graph-layer", "disabled"), Input("graph-graph", "value"))
    def reads_text(kind: str | None) -> tuple[bool, bool]:
        return (kind not in OF_A_TEXT,) * 2

    @app.callback(Output("graph-drawing", "stylesheet"), Input("scheme", "data"), State("view", "data"))
    def colour(scheme: str | None, view: dict[str, Any] | None) -> Any:
        found = measured(services.scene(ViewState.from_dict(view)), KIND) if view else None
        return no_update if found is None else graph_style(theme_called(scheme), found.manifest["results"]["directed"])

    @app.callback(
        Output("graph-drawing", "generateImage"), Input("graph-png", "n_clicks"), State("view", "data"), prevent_initial_call=True
    )  # fmt: skip
    def picture(clicks: int, view: dict[str, Any]) -> Any:
        if not clicks:
            return no_update
        name = f"{ViewState.from_dict(view).result}-drawing"
        return {"type": "png", "action": "download", "filename": name, "options": {"full": True, "scale": 2}}

    @app.callback(Output("graph-neuron", "children"), Input("graph-drawing", "tapNodeData"), State("view", "data"))
    def tell(tapped: dict[str, Any] | None, view: dict[str, Any] | None) -> Any:
        found = measured(services.scene(ViewState.from_dict(view)), KIND) if view else None
        text = str((tapped or {}).get("id", ""))
        if found is None or not text.isdigit() or int(text) >= len(found.array("community")):
            return None
        return neuron_words(found, int(text))


PAGE = Page(
    name="graph",
    title="Neuron graph",
    icon="graph",
    order=4,
    group="BDH",
    words="Which neurons of a BDH excite which: communities, hubs and degrees, beside the graphs that chance would make.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
