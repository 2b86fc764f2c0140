"""Graphs of neurons: wired by the weights, by the synapses of a text, or by firing together.

parameter    G[i → j] = E_i · D_x[:, j]: how strongly firing (y) of neuron i excites (x) neuron j in the next pass; D_y for the gate.
             Kosowski et al. 2025 (section 5.5, figures 9 and 10) call it G* = D_x E
state        the synapses from layer k to layer l after a token: |C_t| or fixed-frame entries (figure 11)
coactivation how often, or how similarly, two neurons are active over tokens

An edge leads from source to target. The published matrix has the target as its row, so that its "in" and "out" may be swapped in a figure.
A graph between two heads has two sets of neurons (it is bipartite). A neuron's edge to itself is left out.
Thresholds are a number of edges, a mean degree (edges per neuron), a multiple of σ_Q, or a quantile of the noise
(`neuron_graph_noise`): weights have no unit, and a published β fits no other model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from probes.bdh.capture import (
    capture_writes,
    centred,
    checked_layer,
    checked_neuron,
    checked_position,
    neurons_per_head,
    require_bdh,
)
from probes.bdh.neuron_graph_edges import Edges, Product, above, distribution, largest
from probes.bdh.neuron_graph_noise import noise_edges, noise_threshold
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

KINDS = ("x", "y")
STATE_VIEWS = ("strength", "fixed")
MEASURES = ("correlation", "cosine", "count")
Node = tuple[int, int]
"""(head, neuron)."""


@dataclass(frozen=True)
class NeuronGraph:
    """Edges between the neurons of two heads (or of one), largest weight first.

    Args:
        name: what it shows. source_head, target_head: equal for a graph within one head. n_neurons: N, per head.
        source, target: neurons [edge]. weight: signed [edge]. threshold: size of the smallest weight.
        directed: False for a symmetric matrix, of which each pair occurs once.
        product: the matrix that the edges were taken from. sign: of the entries that were asked for.
    """

    name: str
    source_head: int
    target_head: int
    n_neurons: int
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float64]
    threshold: float
    product: Product
    directed: bool = True
    sign: str = "positive"

    @property
    def n_edges(self) -> int:
        """m."""
        return len(self.source)

    @property
    def bipartite(self) -> bool:
        """True between two heads."""
        return self.source_head != self.target_head

    @property
    def n_nodes(self) -> int:
        """Neurons of the head or heads, with and without edges."""
        return self.n_neurons * (2 if self.bipartite else 1)

    @property
    def mean_degree(self) -> float:
        """Edges per neuron, m / number of neurons."""
        return self.n_edges / self.n_nodes

    @property
    def ends(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and target of each edge as node numbers 0 … n_nodes − 1 (the target head's neurons follow the source head's)."""
        return self.source, self.target + (self.n_neurons if self.bipartite else 0)

    def node(self, number: int) -> Node:
        """(head, neuron) of a node number."""
        second, neuron = divmod(int(number), self.n_neurons)
        return (self.target_head if second else self.source_head), neuron

    def out_degrees(self) -> NDArray[np.int64]:
        """Edges that leave each neuron of the source head, [neuron]; of an undirected graph all its edges."""
        counts = np.bincount(self.source, minlength=self.n_neurons)
        return counts if self.directed else counts + np.bincount(self.target, minlength=self.n_neurons)

    def in_degrees(self) -> NDArray[np.int64]:
        """Edges that reach each neuron of the target head, [neuron]; of an undirected graph all its edges."""
        counts = np.bincount(self.target, minlength=self.n_neurons)
        return counts if self.directed else counts + np.bincount(self.source, minlength=self.n_neurons)

    def with_edges(
        self, name: str, source: NDArray[np.int64], target: NDArray[np.int64], weight: NDArray[np.float64]
    ) -> "NeuronGraph":
        """The same neurons with other edges."""
        threshold = float(np.abs(weight).min()) if len(weight) else 0.0
        ends = (self.source_head, self.target_head, self.n_neurons)
        return NeuronGraph(name, *ends, source, target, weight, threshold, self.product, self.directed, self.sign)

    def noise_edges(self) -> int:
        """How many edges noise alone would have at this threshold; ValueError where no side is left to tell noise by."""
        return noise_edges(self.product, self.threshold, self.sign)

    def to_networkx(self) -> Any:
        """A networkx DiGraph (Graph if undirected) of (head, neuron) nodes with edges; edges carry `weight`."""
        import networkx

        graph = networkx.DiGraph() if self.directed else networkx.Graph()
        source, target = self.ends
        for a, b, weight in zip(source.tolist(), target.tolist(), self.weight.tolist(), strict=True):
            graph.add_edge(self.node(a), self.node(b), weight=weight)
        return graph

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the matrix."""
        plain = {
            key: getattr(self, key)
            for key in ("name", "source_head", "target_head", "n_neurons", "threshold", "directed")
        }
        return plain | {key: getattr(self, key).tolist() for key in ("source", "target", "weight")}

    def __repr__(self) -> str:
        return (
            f"NeuronGraph({self.name}: {self.n_edges:,} edges among {self.n_nodes:,} neurons, mean degree {self.mean_degree:.3g}, "
            f"weights from {self.threshold:.4g} on)"
        )

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(repr(self))}</p>"


class Threshold(TypedDict, total=False):
    """Which entries become edges: exactly one of `edges` (their number), `mean_degree` (edges per neuron), `noise` (a multiple of σ_Q) and
    `noise_quantile` (module docstring). `sign`: `"positive"` (when not given), `"negative"` (inhibition) or `"both"`.
    """

    edges: int | None
    mean_degree: float | None
    noise: float | None
    noise_quantile: float | None
    sign: str


def graph_of(
    name: str,
    product: Product,
    source_head: int,
    target_head: int,
    n_neurons: int,
    *,
    edges: int | None = None,
    mean_degree: float | None = None,
    noise: float | None = None,
    noise_quantile: float | None = None,
    sign: str = "positive",
) -> NeuronGraph:
    """The graph of a matrix under a `Threshold`.

    Raises ValueError for no threshold or several, or where the matrix has too few entries of that sign.
    """
    thresholds = {"edges": edges, "mean_degree": mean_degree, "noise": noise, "noise_quantile": noise_quantile}
    given = {name: value for name, value in thresholds.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Thresholds given: {given or 'none'}. Expected exactly one of {', '.join(thresholds)}.")
    if noise is not None:
        sigma_q = 0.0 if product.one_signed else distribution(product).sigma_q
        if not sigma_q:
            raise ValueError(
                "noise needs entries of both signs, and these have one (strengths and counts do). "
                "Expected edges, mean_degree or noise_quantile."
            )
        threshold = noise * sigma_q
        found = above(product, threshold, sign)
    elif noise_quantile is not None:
        threshold = noise_threshold(product, noise_quantile, sign)
        found = above(product, threshold, sign)
    else:
        nodes = n_neurons * (1 if source_head == target_head else 2)
        found = largest(product, edges if edges is not None else round(float(mean_degree or 0) * nodes), sign)
        threshold = float(np.abs(found.weight[-1]))
    directed = product.left_out != "half"
    return NeuronGraph(name, source_head, target_head, n_neurons, *_arrays(found), threshold, product, directed, sign)


def _arrays(edges: Edges) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    return edges.source, edges.target, edges.weight


# Builders --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def parameter_product(
    model: Any, source_head: int, target_head: int, *, kind: str = "x", centre: bool = False
) -> Product:
    """E D_x (or E D_y) of a pair of heads as factors. `centre` takes the mean out of each E_i, as the layer norm will."""
    model = require_bdh(model, variants=True)
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}.{suggestion(kind, KINDS)} Expected one of {', '.join(KINDS)}.")
    checked_neuron(model, source_head, 0, "source_head with neuron 0,")
    checked_neuron(model, target_head, 0, "target_head with neuron 0,")
    encoder = model.weights.E[source_head].detach().cpu()
    decoder = (model.weights.D_x if kind == "x" else model.weights.D_y)[target_head].detach().cpu()
    return Product.of(centred(encoder) if centre else encoder, decoder, _left_out(source_head, target_head))


@implements("bdh", "probe", "parameter_graph", note="thresholds by edge count, degree or noise instead of a fixed β")
def parameter_graph(
    model: Any,
    source_head: int = 0,
    target_head: int = 0,
    kind: str = "x",
    *,
    centre: bool = False,
    **threshold: Unpack[Threshold],
) -> NeuronGraph:
    """Which neurons excite which, by the weights: G[i → j] = E_i · D[:, j] (module docstring).

    Args:
        kind: `"x"` for D_x (what fires next), `"y"` for D_y (what may pass the gate).
        centre: use E_i − mean(E_i), which is what reaches the stream. threshold: see `Threshold`.
    """
    product = parameter_product(model, source_head, target_head, kind=kind, centre=centre)
    name = f"E D_{kind}, head {source_head} → {target_head}"
    return graph_of(name, product, source_head, target_head, product.shape[0], **threshold)


@implements(
    "bdh", "probe", "state_graph", note="strength needs no filter for the negative values that rotation introduces"
)
def state_graph(
    model: Any,
    tokens: Any,
    target_layer: int,
    source_head: int = 0,
    target_head: int = 0,
    *,
    at: int = -1,
    source_layer: int | None = None,
    view: str = "strength",
    hooks: Sequence[Any] = (),
    **threshold: Unpack[Threshold],
) -> NeuronGraph:
    """The synapses of one text after token `at`.

    Args:
        tokens: one sequence. source_layer: default target_layer − 1.
        view: `"strength"` |C_t|, one target per rotary pair, reported with its even neuron; `"fixed"` the state's own entries.
        noise: only for `"fixed"`; strengths have no negative side, and `noise_quantile` shuffles the tokens instead.
        threshold: see `Threshold`.
    """
    model = require_bdh(model)
    if view not in STATE_VIEWS:
        raise ValueError(
            f"Unknown view {view!r}.{suggestion(view, STATE_VIEWS)} Expected one of {', '.join(STATE_VIEWS)}."
        )
    checked_layer(model, target_layer, "target_layer", first=1)
    source_layer = target_layer - 1 if source_layer is None else source_layer
    if not 0 <= source_layer < target_layer:
        raise ValueError(f"source_layer is {source_layer}; expected 0..{target_layer - 1}, below target_layer.")
    checked_neuron(model, source_head, 0, "source_head with neuron 0,")
    checked_neuron(model, target_head, 0, "target_head with neuron 0,")
    writes = capture_writes(model, tokens, target_layer, sources=[source_layer], hooks=hooks)
    if writes.tokens.shape[0] != 1:
        raise ValueError(
            f"Expected one sequence of tokens, got a batch of {writes.tokens.shape[0]}: synapses belong to one state."
        )
    stop = checked_position(at, writes.tokens.shape[1]) + 1
    # token 0 is silent: y is 0 there
    y, keys = writes.y[source_layer][0, source_head, 1:stop].cpu(), writes.keys[0, target_head, 1:stop].cpu()
    left_out = _left_out(source_head, target_head)
    if view == "fixed":
        product = Product.of(y.T, keys, left_out)
    else:
        pairs = keys.unflatten(-1, (-1, 2)).permute(2, 0, 1)
        even = 2 * torch.arange(pairs.shape[2])
        product = Product(y.T.expand(2, -1, -1), pairs, even, left_out, one_signed=True)
    name = f"{view} of y{source_layer}[{source_head}] → x{target_layer}[{target_head}] after token {stop - 1}"
    return graph_of(name, product, source_head, target_head, neurons_per_head(model), **threshold)


@implements("bdh", "probe", "coactivation_graph")
@torch.no_grad()
def coactivation_graph(
    model: Any,
    tokens: Any,
    layer: int,
    source_head: int = 0,
    target_head: int = 0,
    *,
    activity: str = "x",
    measure: str = "correlation",
    hooks: Sequence[Any] = (),
    **threshold: Unpack[Threshold],
) -> NeuronGraph:
    """Which neurons are active together over the tokens of a batch, position 0 left out (no edge direction within one head).

    Args:
        activity: `"x"` or `"y"`. measure: `"correlation"`, `"cosine"`, or `"count"` of tokens at which both are active.
        threshold: see `Threshold`.
    """
    model = require_bdh(model, variants=True)
    for what, value, known in (("activity", activity, KINDS), ("measure", measure, MEASURES)):
        if value not in known:
            raise ValueError(f"Unknown {what} {value!r}.{suggestion(value, known)} Expected one of {', '.join(known)}.")
    checked_layer(model, layer)
    checked_neuron(model, source_head, 0, "source_head with neuron 0,")
    checked_neuron(model, target_head, 0, "target_head with neuron 0,")
    point = f"blocks.{layer}.hook_{activity}"
    _, cache = model.run_with_cache(model.to_tokens(tokens), names=[point], hooks=hooks)
    sides = []
    for head in (source_head, target_head):
        values = cache[point][:, head, 1:].flatten(0, 1).cpu()
        if measure == "count":
            values = (values != 0).to(values.dtype)
        else:
            values = values - values.mean(0) if measure == "correlation" else values
            length = values.norm(dim=0)
            values = values / length.masked_fill(length == 0, 1)
        sides.append(values)
    left_out = "half" if source_head == target_head else "nothing"
    product = replace(Product.of(sides[0].T, sides[1], left_out), one_signed=measure != "correlation")
    name = f"{measure} of {activity} at layer {layer}, heads {source_head} and {target_head}"
    return graph_of(name, product, source_head, target_head, neurons_per_head(model), **threshold)


def _left_out(source_head: int, target_head: int) -> str:
    return "self" if source_head == target_head else "nothing"
