"""A graph of BDH neurons with its communities, baselines, degree tails and hubs: the job behind the Neuron graph page."""

from __future__ import annotations

from typing import Any

from app.measure.common import checked_choice, checked_model, checked_number, checked_text, model_record, part_of
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
) -> Job:
    """Queue the graph of the `edges` largest entries between two heads of a model, compared with `draws` graphs of each baseline.

    `graph` is one of GRAPHS; `text` and `layer` matter for the last two. FormError, in words for the reader, for a bad form.
    """
    kind = checked_choice(graph, "the kind of graph", list(GRAPHS))
    settings = {
        "model": checked_model(services, name), "graph": kind,
        "source_head": checked_number(source_head, "the source head", 0, MOST_HEADS - 1),
        "target_head": checked_number(target_head, "the target head", 0, MOST_HEADS - 1),
        "edges": checked_number(edges, "the number of edges", FEWEST, MOST_EDGES),
        "draws": checked_number(draws, "draws of each baseline", 2, 50),
        "layer": checked_number(layer, "the layer", 1 if kind == "state" else 0, MOST_LAYERS) if kind in OF_A_TEXT else None,
    }  # fmt: skip
    read = checked_text(text) if kind in OF_A_TEXT else ""
    title = f"Neuron graph of {settings['model']}, heads {settings['source_head']} → {settings['target_head']} ({kind})"
    return services.jobs.submit(
        title, _measure, key=f"{KIND}:{settings}:{read}", services=services, settings=settings, text=read
    )


def _graph(bdh: Any, model: Any, settings: dict[str, Any], text: str) -> Any:
    heads, edges = (settings["source_head"], settings["target_head"]), settings["edges"]
    if settings["graph"] == "state":
        return bdh.state_graph(model, text, settings["layer"], *heads, edges=edges)
    if settings["graph"] == "coactivation":
        return bdh.coactivation_graph(model, text, settings["layer"], *heads, edges=edges)
    return bdh.parameter_graph(model, *heads, settings["graph"], edges=edges)


def _measure(job: Job, services: Services, settings: dict[str, Any], text: str) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    from probes import bdh

    model = services.models.load(settings["model"])
    graph = _graph(bdh, model, settings, text)
    heads = (settings["source_head"], settings["target_head"])
    compare: dict[str, Any] = {"draws": settings["draws"], "progress": part_of(job, 0.1, 0.7)}
    if settings["graph"] in ("x", "y"):
        curve = bdh.modularity_curve(model, *heads, settings["graph"], edges=(settings["edges"],), **compare)
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
            run.add_array(f"fit.{way}", _fitted(tail), axes=("degree", "value"))
        run.set(settings=settings, results={
            "name": graph.name, "n_neurons": graph.n_neurons, "directed": graph.directed, "threshold": graph.threshold, "note": note,
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


def _fitted(tail: Any) -> Any:
    """The fitted power law beside the tail's data: ζ(α, k) / ζ(α, xmin) times the share of the tail, [degree, 2]."""
    import numpy as np
    from scipy.special import zeta

    degrees = tail.ccdf[tail.ccdf[:, 0] >= tail.xmin, 0]
    share = tail.n_tail / tail.n_positive
    return np.stack([degrees, share * zeta(tail.alpha, degrees) / zeta(tail.alpha, tail.xmin)], axis=1)
