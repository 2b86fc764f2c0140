"""A graph of BDH neurons with its communities, baselines, degree tails and hubs: the job behind the Neuron graph page."""

from __future__ import annotations

from typing import Any

from app.measure.common import (
    FormError,
    checked_choice,
    checked_model,
    checked_number,
    checked_text,
    model_record,
    part_of,
)
from app.services import Services
from workbench.lab.jobs import Job

KIND = "bdh-graph"
GRAPHS = {
    "x": "weights E D_x: what fires next",
    "y": "weights E D_y: what may pass the gate",
    "state": "synapses of a text: |C| after its last token",
    "coactivation": "co-activation over a text: correlation of x",
}
OF_A_TEXT = ("state", "coactivation")
THRESHOLDS = {"edges": "a number of edges", "noise_quantile": "a quantile of the noise"}
FEWEST, MOST_EDGES, HUBS = 20, 20_000, 12
MOST_HEADS, MOST_LAYERS = 256, 256
NOTHING = -1
"""Community of a neuron without edges."""


def start_graph(
    services: Services,
    name: Any,
    graph: Any,
    source_head: Any,
    target_head: Any,
    edges: Any,
    text: Any,
    layer: Any,
    draws: Any,
    threshold: Any = "edges",
    noise_quantile: Any = None,
) -> Job:
    """Queue the graph of the largest entries between two heads of a model, compared with `draws` graphs of each baseline.

    `graph` is one of GRAPHS; `text` and `layer` matter for the last two. `threshold` is one of THRESHOLDS and says which of `edges`
    and `noise_quantile` is meant. FormError, in words for the reader, for a bad form.
    """
    kind = checked_choice(graph, "the kind of graph", list(GRAPHS))
    settings = {
        "model": checked_model(services, name), "graph": kind,
        "source_head": checked_number(source_head, "the source head", 0, MOST_HEADS - 1),
        "target_head": checked_number(target_head, "the target head", 0, MOST_HEADS - 1),
        "threshold": _threshold(threshold, edges, noise_quantile),
        "draws": checked_number(draws, "draws of each baseline", 2, 50),
        "layer": checked_number(layer, "the layer", 1 if kind == "state" else 0, MOST_LAYERS) if kind in OF_A_TEXT else None,
    }  # fmt: skip
    read = checked_text(text) if kind in OF_A_TEXT else ""
    title = f"Neuron graph of {settings['model']}, heads {settings['source_head']} → {settings['target_head']} ({kind})"
    return services.jobs.submit(
        title, _measure, key=f"{KIND}:{settings}:{read}", services=services, settings=settings, text=read
    )


def _threshold(kind: Any, edges: Any, noise_quantile: Any) -> dict[str, float]:
    """The one threshold that is meant, as an argument of the graph functions."""
    if checked_choice(kind, "the threshold", list(THRESHOLDS)) == "edges":
        return {"edges": checked_number(edges, "the number of edges", FEWEST, MOST_EDGES)}
    if isinstance(noise_quantile, bool) or not isinstance(noise_quantile, (int, float)) or not 0 < noise_quantile < 1:
        raise FormError(
            f"the noise quantile is {noise_quantile!r}; expected more than 0 and less than 1, such as 0.999."
        )
    return {"noise_quantile": float(noise_quantile)}


def threshold_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The threshold that a stored graph has; results made before there was a choice have a number of edges."""
    return settings.get("threshold") or {"edges": settings.get("edges", 1024)}


def _graph(bdh: Any, model: Any, settings: dict[str, Any], text: str) -> Any:
    heads, threshold = (settings["source_head"], settings["target_head"]), settings["threshold"]
    if settings["graph"] == "state":
        graph = bdh.state_graph(model, text, settings["layer"], *heads, **threshold)
    elif settings["graph"] == "coactivation":
        graph = bdh.coactivation_graph(model, text, settings["layer"], *heads, **threshold)
    else:
        graph = bdh.parameter_graph(model, *heads, settings["graph"], **threshold)
    if not 1 <= graph.n_edges <= MOST_EDGES:
        way = "lower" if graph.n_edges < 1 else "higher"
        raise FormError(
            f"{graph.n_edges:,} entries exceed the threshold {graph.threshold:.4g}; expected 1 to {MOST_EDGES:,}. "
            f"Try a {way} noise quantile."
        )
    return graph


def _measure(job: Job, services: Services, settings: dict[str, Any], text: str) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    from probes import bdh

    model = services.models.load(settings["model"])
    graph = _graph(bdh, model, settings, text)
    heads = (settings["source_head"], settings["target_head"])
    compare: dict[str, Any] = {"draws": settings["draws"], "progress": part_of(job, 0.1, 0.7)}
    if settings["graph"] in ("x", "y"):
        curve = bdh.modularity_curve(model, *heads, settings["graph"], edges=(graph.n_edges,), **compare)
        point, note = curve.points[0], curve.note
    else:
        point, note = (
            bdh.compare_modularity(graph, **compare),
            "A text's graph has no untrained twin: there is no baseline of initial weights.",
        )
    job.progress(0.72, "degrees and hubs")
    tails, no_fit = {}, ""
    try:
        tails = bdh.degree_tails(graph)
    except ValueError as error:  # too few different degrees for a fit
        no_fit = str(error)
    hubs = bdh.graph_hubs(model, graph, k=HUBS)
    groups = bdh.communities(graph)
    job.progress(0.85, "placing the neurons")
    source, target = graph.ends
    number = {graph.node(node): node for node in range(graph.n_nodes)}
    community = np.full(graph.n_nodes, NOTHING, np.int32)
    for index, group in enumerate(groups):
        community[[number[node] for node in group]] = index
    with services.store.create(KIND, job.title, model=model_record(model), text=text or None) as run:
        run.add_array("source", source.astype(np.int32), axes=("edge",))
        run.add_array("target", target.astype(np.int32), axes=("edge",))
        run.add_array("weight", graph.weight, axes=("edge",))
        run.add_array("community", community, axes=("node",))
        run.add_array("places", _places(source, target, graph.n_nodes), axes=("node", "plane"))
        for way, tail in tails.items():
            run.add_array(f"ccdf.{way}", tail.ccdf, axes=("degree", "value"))
            run.add_array(f"fit.{way}", tail.fitted, axes=("degree", "value"))
        run.set(settings=settings, results={
            "name": graph.name, "n_neurons": graph.n_neurons, "directed": graph.directed, "threshold": graph.threshold, "note": note,
            "noise_edges": graph.noise_edges(),
            "modularity": point.to_json(), "no_fit": no_fit, "hubs": [hub.to_json() for hub in hubs],
            "tails": {way: {k: v for k, v in tail.to_json().items() if k != "ccdf"} for way, tail in tails.items()},
        })  # fmt: skip
    return run.id


def _places(source: Any, target: Any, n_nodes: int) -> Any:
    """Where each neuron with edges is drawn, by springs (Fruchterman and Reingold 1991): float32 [node, 2], else nan."""
    import networkx as nx
    import numpy as np

    drawn = nx.Graph(list(zip(source.tolist(), target.tolist(), strict=True)))
    drawn.remove_edges_from(list(nx.selfloop_edges(drawn)))
    found = nx.spring_layout(drawn, seed=0, iterations=60, k=2.2 / max(1, len(drawn)) ** 0.5)
    places = np.full((n_nodes, 2), np.nan, np.float32)
    for node, place in found.items():
        places[node] = place
    return places
