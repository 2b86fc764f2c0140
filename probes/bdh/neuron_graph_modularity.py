"""Communities of a neuron graph: Louvain modularity, beside what graphs without communities reach with as many edges.

Louvain finds *some* division of any graph, and of a sparse random graph a very good one: at one edge per neuron it falls into small
pieces, and Q is near 1. So a modularity means nothing without baselines of the same number of edges and without the size of the giant
component. Baselines:

random        Erdős–Rényi G(n, m): m pairs at random, with the graph's own weights dealt out at random
low rank      the largest m entries of a product of normal factors of the same shape: what low rank alone does
initial       the weights of the model before training
rewired       the graph itself with its edges exchanged so that every in- and out-degree stays: what hubs alone do
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from probes.bdh.capture import require_bdh
from probes.bdh.neuron_graph import NeuronGraph, graph_of, parameter_product
from probes.bdh.neuron_graph_edges import Product
from probes.progress import Progress
from workbench.instrument.errors import suggestion
from workbench.instrument.html import table
from workbench.lab.catalogue import implements

BASELINES = ("random", "low rank", "initial", "rewired")
Draw = Callable[[int], NeuronGraph]
"""A baseline: from a seed to a graph."""


@dataclass(frozen=True)
class Modularity:
    """Newman's Q of the best division that Louvain found, on the undirected graph.

    communities: their number, neurons without edges not counted. connected: neurons with edges.
    giant: share of all neurons that are in the largest connected component. q_spread: largest minus smallest Q over Louvain's seeds.
    """

    q: float
    communities: int
    connected: int
    giant: float
    q_spread: float


def undirected(graph: NeuronGraph, weighted: bool = True) -> Any:
    """networkx Graph over node numbers; edges i → j and j → i become one, with the sum of their weights' sizes (1 each if unweighted)."""
    import networkx

    out = networkx.Graph()
    source, target = graph.ends
    sizes = np.abs(graph.weight) if weighted else np.ones(graph.n_edges)
    for a, b, size in zip(source.tolist(), target.tolist(), sizes.tolist(), strict=True):
        if out.has_edge(a, b):
            out[a][b]["weight"] += size
        else:
            out.add_edge(a, b, weight=size)
    return out


def communities(
    graph: NeuronGraph, *, weighted: bool = True, seeds: int = 5, seed: int = 0
) -> list[set[tuple[int, int]]]:
    """The best of `seeds` Louvain divisions, largest community first, as sets of (head, neuron)."""
    parts, _ = _best_division(undirected(graph, weighted), seeds, seed)
    return [{graph.node(number) for number in part} for part in sorted(parts, key=len, reverse=True)]


def _best_division(graph: Any, seeds: int, seed: int) -> tuple[list[set[int]], list[float]]:
    from networkx.algorithms.community import louvain_communities, modularity

    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; expected at least 1.")
    if not graph.number_of_edges():
        raise ValueError("The graph has no edges, so modularity is not defined.")
    parts = [louvain_communities(graph, weight="weight", seed=seed + number) for number in range(seeds)]
    scores = [float(modularity(graph, part, weight="weight")) for part in parts]
    return parts[int(np.argmax(scores))], scores


def graph_modularity(graph: NeuronGraph, *, weighted: bool = True, seeds: int = 5, seed: int = 0) -> Modularity:
    """Louvain modularity, best of `seeds`, with the size of the giant component."""
    from networkx import connected_components

    simple = undirected(graph, weighted)
    part, scores = _best_division(simple, seeds, seed)
    giant = max(len(component) for component in connected_components(simple)) / graph.n_nodes
    return Modularity(max(scores), len(part), simple.number_of_nodes(), giant, max(scores) - min(scores))


# Baselines -------------------------------------------------------------------------------------------------------------


def random_graph(graph: NeuronGraph, seed: int) -> NeuronGraph:
    """G(n, m) over the same sources and targets: m different allowed pairs, with the graph's weights dealt out at random."""
    rng = np.random.default_rng(seed)
    sources, targets = graph.product.shape
    columns = graph.product.columns.numpy()
    found: dict[int, None] = {}
    while len(found) < graph.n_edges:
        draws = rng.integers(0, sources * targets, 2 * graph.n_edges)
        source, target = draws // targets, columns[draws % targets]
        allowed = np.ones(len(draws), bool)
        if graph.product.left_out != "nothing":
            allowed = source < target if graph.product.left_out == "half" else source != target
        found.update(dict.fromkeys(draws[allowed].tolist()))
    chosen = np.array(list(found)[: graph.n_edges])
    weight = rng.permutation(graph.weight)
    return graph.with_edges("random", chosen // targets, columns[chosen % targets], weight)


def low_rank_graph(graph: NeuronGraph, seed: int) -> NeuronGraph:
    """The largest m entries of normal factors of the same shapes."""
    product = graph.product.gaussian(seed)
    return _same_size("low rank", graph, product)


def _same_size(name: str, graph: NeuronGraph, product: Product) -> NeuronGraph:
    positive, negative = bool((graph.weight > 0).any()), bool((graph.weight < 0).any())
    sign = "both" if positive and negative else "negative" if negative else "positive"
    return graph_of(
        name, product, graph.source_head, graph.target_head, graph.n_neurons, edges=graph.n_edges, sign=sign
    )


def rewired_graph(graph: NeuronGraph, seed: int, *, swaps: int = 10) -> NeuronGraph:
    """Exchange the targets of random pairs of edges, `swaps` attempts per edge; no self-edge and no double edge comes about.

    Every in- and out-degree stays exactly (of an undirected graph, every degree), and a weight stays with its source.
    """
    rng = np.random.default_rng(seed)
    source, target = graph.source.tolist(), graph.target.tolist()
    own = not graph.bipartite  # source and target numbers name the same neurons
    half = not graph.directed

    def key(a: int, b: int) -> int:
        a, b = (b, a) if half and b < a else (a, b)
        return a * graph.n_neurons + b

    present = {key(a, b) for a, b in zip(source, target, strict=True)}
    pairs = rng.integers(0, graph.n_edges, (swaps * graph.n_edges, 2)).tolist()
    turns = rng.integers(0, 2, len(pairs)).tolist()
    for (i, j), turned in zip(pairs, turns, strict=True):
        if half and turned:  # an undirected edge has no first end: exchange either
            source[j], target[j] = target[j], source[j]
        a, b, c, d = source[i], target[i], source[j], target[j]
        if b == d or a == c or (own and (a == d or c == b)):
            continue
        if key(a, d) in present or key(c, b) in present:
            continue
        present -= {key(a, b), key(c, d)}
        present |= {key(a, d), key(c, b)}
        target[i], target[j] = d, b
    first, second = np.array(source), np.array(target)
    if half:
        first, second = np.minimum(first, second), np.maximum(first, second)
    return graph.with_edges("rewired", first, second, graph.weight.copy())


@dataclass(frozen=True)
class InitialWeights:
    """A model as it was built, before training, and whether these are really this model's own initial weights.

    correlation: of E between the model and the rebuilt one; z: in standard errors of 0. Training moves weights but leaves a trace of where
    they began, so that a large z says "from this seed"; without it the rebuilt weights are another draw of the same initialisation.
    """

    model: Any
    correlation: float
    z: float

    @property
    def known(self) -> bool:
        """True with z of at least 5."""
        return self.z >= 5

    @property
    def note(self) -> str:
        """In words."""
        if self.correlation > 1 - 1e-6:
            return "The model still has its initial weights."
        if self.known:
            return (
                "Initial weights: rebuilt from the configuration's seed "
                f"(correlation with the model {self.correlation:.2f}, z = {self.z:.0f})."
            )
        return (
            "Initial weights: unknown. The configuration's seed gives weights unrelated to this model's "
            f"(correlation {self.correlation:.3f}, z = {self.z:.1f}), so another draw of the initialisation stands in for them."
        )


@torch.no_grad()
def initial_weights(model: Any, seed: int | None = None) -> InitialWeights:
    """Rebuild a model from its configuration (with another seed, if given) and compare."""
    from dataclasses import replace

    model = require_bdh(model, variants=True)
    config = model.config if seed is None else replace(model.config, seed=seed)
    rebuilt = type(model)(config).eval()
    pair = torch.stack([m.weights.E.detach().double().cpu().flatten() for m in (model, rebuilt)])
    correlation = float(torch.corrcoef(pair)[0, 1])
    return InitialWeights(rebuilt, correlation, correlation * pair.shape[1] ** 0.5)


# Comparison ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModularityComparison:
    """One graph against its baselines. baselines[name]: one Modularity per draw."""

    edges: int
    mean_degree: float
    observed: Modularity
    baselines: dict[str, tuple[Modularity, ...]]

    def mean(self, name: str) -> float:
        """Mean Q of a baseline."""
        return float(np.mean([draw.q for draw in self.baselines[name]]))

    def sd(self, name: str) -> float:
        """Standard deviation of a baseline's Q over draws; nan for a single draw."""
        draws = [draw.q for draw in self.baselines[name]]
        return float(np.std(draws, ddof=1)) if len(draws) > 1 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "edges": self.edges,
            "mean_degree": self.mean_degree,
            "observed": asdict(self.observed),
            "baselines": {name: [asdict(draw) for draw in draws] for name, draws in self.baselines.items()},
        }

    def __repr__(self) -> str:
        others = "; ".join(f"{name} {self.mean(name):.3f} ± {self.sd(name):.3f}" for name in self.baselines)
        return f"ModularityComparison({self.edges:,} edges: Q {self.observed.q:.3f}, giant component {self.observed.giant:.0%}; {others})"


@dataclass(frozen=True)
class ModularityCurve:
    """Comparisons at several numbers of edges, and what is known about the initial weights."""

    name: str
    points: tuple[ModularityComparison, ...]
    note: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, "note": self.note, "points": [point.to_json() for point in self.points]}

    def __repr__(self) -> str:
        return "\n".join(
            [f"ModularityCurve({self.name})", *(f"  {point!r}" for point in self.points), f"  {self.note}"]
        )

    def _repr_html_(self) -> str:
        names = list(self.points[0].baselines)
        rows = [
            (
                f"{p.edges:,} ({p.mean_degree:.3g})",
                f"{p.observed.q:.3f} ({p.observed.giant:.0%})",
                *(f"{p.mean(n):.3f} ± {p.sd(n):.3f} ({np.mean([d.giant for d in p.baselines[n]]):.0%})" for n in names),
            )
            for p in self.points
        ]
        return table(
            f"Modularity (giant component) of {self.name}. {self.note}", ("edges (mean degree)", "graph", *names), rows
        )


def compare_modularity(
    graph: NeuronGraph,
    baselines: Mapping[str, Draw] | None = None,
    *,
    draws: int = 5,
    weighted: bool = True,
    seeds: int = 5,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> ModularityComparison:
    """A graph's modularity beside that of `draws` graphs of each baseline; by default random, low rank and rewired.

    Args:
        baselines: functions from a seed to a graph with as many edges. weighted: use the sizes of the weights. seeds: Louvain runs each.
    """
    if baselines is None:
        baselines = standard_baselines(graph)
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected at least 1.")
    report = progress if isinstance(progress, Progress) else Progress(progress, cancel)
    total, done = 1 + draws * len(baselines), 0

    def measure(made: NeuronGraph, what: str) -> Modularity:
        nonlocal done
        report(done / total, f"communities of {what} at {graph.n_edges:,} edges")
        done += 1
        return graph_modularity(made, weighted=weighted, seeds=seeds, seed=seed)

    observed = measure(graph, "the graph")
    found = {}
    for name, draw in baselines.items():
        found[name] = tuple(measure(draw(seed + number), name) for number in range(draws))
    return ModularityComparison(graph.n_edges, graph.mean_degree, observed, found)


def standard_baselines(graph: NeuronGraph) -> dict[str, Draw]:
    """The baselines that any graph has."""
    return {
        "random": lambda seed: random_graph(graph, seed),
        "low rank": lambda seed: low_rank_graph(graph, seed),
        "rewired": lambda seed: rewired_graph(graph, seed),
    }


@implements(
    "bdh",
    "probe",
    "modularity_curve",
    note="adds initial weights and degree-preserving rewiring to the baselines of figure 9b",
)
def modularity_curve(
    model: Any,
    source_head: int = 0,
    target_head: int = 0,
    kind: str = "x",
    *,
    edges: Sequence[int] = (256, 1024, 3072, 12288),
    sign: str = "positive",
    centre: bool = False,
    baselines: Sequence[str] = BASELINES,
    draws: int = 5,
    weighted: bool = True,
    seeds: int = 5,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> ModularityCurve:
    """Modularity of a parameter graph over numbers of edges, beside its baselines (figure 9b).

    Args:
        edges: numbers m. baselines: some of `"random"`, `"low rank"`, `"initial"`, `"rewired"`. draws: graphs per baseline; the initial
            weights' first draw has the configuration's own seed, the others the seeds after it. Others as in `parameter_graph`.
    """
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(
                f"Unknown baseline {name!r}.{suggestion(name, BASELINES)} Expected some of {', '.join(BASELINES)}."
            )
    if not len(edges):
        raise ValueError("edges is empty; expected numbers of edges.")
    model = require_bdh(model, variants=True)
    product = parameter_product(model, source_head, target_head, kind=kind, centre=centre)
    name = f"E D_{kind}, head {source_head} → {target_head}"
    initial: list[Product] = []
    note = ""
    if "initial" in baselines:
        for number in range(draws):
            rebuilt = initial_weights(model, model.config.seed + number)
            note = note or rebuilt.note
            initial.append(parameter_product(rebuilt.model, source_head, target_head, kind=kind, centre=centre))
    points = []
    for number, m in enumerate(edges):
        part = Progress(progress, cancel).part(number / len(edges), (number + 1) / len(edges))
        graph = graph_of(name, product, source_head, target_head, product.shape[0], edges=m, sign=sign)
        makers = standard_baselines(graph) | {"initial": _from_products("initial", graph, initial, seed)}
        chosen = {which: makers[which] for which in baselines}
        points.append(
            compare_modularity(graph, chosen, draws=draws, weighted=weighted, seeds=seeds, seed=seed, progress=part)
        )
    return ModularityCurve(name, tuple(points), note)


def _from_products(name: str, graph: NeuronGraph, products: Sequence[Product], first: int) -> Draw:
    return lambda seed: _same_size(name, graph, products[seed - first])
