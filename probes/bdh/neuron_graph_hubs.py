"""The best-connected neurons of a graph: degrees, neighbours, community, and what they say in tokens."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from probes.bdh.meaning import NeuronMeaning, neuron_says
from probes.bdh.neuron_graph import NeuronGraph, Node
from probes.bdh.neuron_graph_modularity import communities
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

ORDERS = ("all", "in", "out")


@dataclass(frozen=True)
class Hub:
    """One neuron: in- and out-degree, summed sizes of its weights, its community's number (0 = largest), what it says, and its edges.

    targets, sources: ((head, neuron), weight) of the strongest edges that leave and reach it. Of an undirected graph all are `targets`.
    """

    head: int
    neuron: int
    in_degree: int
    out_degree: int
    strength: float
    community: int
    meaning: NeuronMeaning
    targets: tuple[tuple[Node, float], ...]
    sources: tuple[tuple[Node, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@implements("bdh", "probe", "graph_hubs")
def graph_hubs(
    model: Any, graph: NeuronGraph, *, k: int = 10, by: str = "all", tokens: int = 8, neighbours: int = 8, seed: int = 0
) -> list[Hub]:
    """The k neurons with most edges (`by` all, those that reach it `"in"`, or those that leave it `"out"`), most first.

    Args:
        tokens: how many of each list of its meaning. neighbours: how many of its edges each way. seed: of the communities.
    """
    if by not in ORDERS:
        raise ValueError(f"Unknown by {by!r}.{suggestion(by, ORDERS)} Expected one of {', '.join(ORDERS)}.")
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    source, target = graph.ends
    sizes = np.abs(graph.weight)
    leaving = np.bincount(source, minlength=graph.n_nodes)
    reaching = np.bincount(target, minlength=graph.n_nodes)
    if not graph.directed:
        leaving = reaching = leaving + reaching
    strength = np.bincount(source, sizes, graph.n_nodes) + np.bincount(target, sizes, graph.n_nodes)
    ranking = {"all": leaving + reaching, "in": reaching, "out": leaving}[by]
    order = np.lexsort((-strength, -ranking))[:k]
    member = {node: number for number, part in enumerate(communities(graph, seed=seed)) for node in part}
    hubs = []
    for number in order:
        if not ranking[number]:
            break
        head, neuron = graph.node(number)
        out, into = np.flatnonzero(source == number), np.flatnonzero(target == number)
        ends = [(int(target[e]), e) for e in out], [(int(source[e]), e) for e in into]
        if not graph.directed:
            ends = sorted(ends[0] + ends[1], key=lambda end: end[1]), []
        # edges are stored largest first
        near = [tuple((graph.node(node), float(graph.weight[e])) for node, e in side[:neighbours]) for side in ends]
        hubs.append(
            Hub(
                head,
                neuron,
                int(reaching[number]),
                int(leaving[number]),
                float(strength[number]),
                member[head, neuron],
                neuron_says(model, head, neuron, tokens),
                near[0],
                near[1],
            )
        )
    return hubs
