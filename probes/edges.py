"""Edges: which component's output matters to which component's input?

    graph = EdgeGraph(model, clean, corrupted)
    found = edge_attribution(graph, objective)                                     EAP: one gradient for all edges
    found = edge_attribution(graph, objective, steps=5, convention="midpoint")     EAP-IG
    exact = edge_effects(graph, objective)                                         every edge patched by itself

A *sender* u is the embedding, an attention head, a whole recurrent mixer (its heads share gate and norm) or an MLP; its output z_u is added
to the stream. A *receiver* v is a head's query, key or value, a recurrent mixer, an MLP, or the logits; its input is the sum of all earlier
senders' outputs. The edge u→v is z_u as v alone sees it. *Corrupting* it puts z'_u, from the corrupted prompt, in that place.

EAP (Syed et al. 2023, arXiv 2310.10348) estimates what corrupting an edge costs to first order; EAP-IG (Hanna et al. 2024, arXiv
2403.17806) averages the gradient over inputs on the line from the corrupted to the clean embedding:

    score(u→v) = (z_u − z'_u) · (1/m) Σ_k ∂objective/∂in_v  at  e' + α_k (e − e')

    convention "paper":     α_k = k/m, k = 1 … m        m = 1 is EAP, whose gradient is that of the clean run
    convention "code":      α_k = k/m, k = 0 … m−1      the published code: starts at the corrupted input and never reaches the clean one
    convention "midpoint":  α_k = (k + ½)/m             the midpoint rule, of smaller error for the same m

Signs: papers write (z'_u − z_u) and a loss; here the objective is a gain, so positive scores are edges that help it.

Edges are defined only where the stream is a plain sum. That is tested when a graph is made: what the senders write must sum to the stream,
and with every edge corrupted the logits must be those of the corrupted prompt. Models that normalise the stream or what is added to it
(BDH, post-norm, Gemma 2), or that read it elsewhere, are refused.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.objectives import Objective, measured
from probes.patching import pair, pearson
from probes.progress import Report, watched
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point

CONVENTIONS = ("paper", "code", "midpoint")
INPUTS = {"query": "query_input", "key": "key_input", "value": "value_input"}


@dataclass(frozen=True)
class Node:
    """A sender ("embed", "head", "mixer", "mlp") or a receiver ("query", "key", "value", "mixer", "mlp", "logits")."""

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        return self.kind + "".join(f"{mark}{n}" for mark, n in ((" ", self.layer), (".", self.head)) if n is not None)


@dataclass(frozen=True)
class EdgeScores:
    """One number per edge. `scores` and `present` are [sender, receiver]; where no edge is present the score is 0."""

    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    scores: Tensor
    present: Tensor
    method: str

    def top(self, n: int = 10) -> list[tuple[Node, Node, float]]:
        """The n edges of largest score by absolute value: (sender, receiver, score)."""
        order = self.scores.abs().flatten().argsort(descending=True)[: min(n, int(self.present.sum()))].tolist()
        cells = [divmod(place, len(self.receivers)) for place in order]
        return [(self.senders[u], self.receivers[v], float(self.scores[u, v])) for u, v in cells]

    def correlation(self, other: "EdgeScores") -> float:
        """Pearson correlation with another method's scores over the edges that are present. Raises ValueError for another graph."""
        if (self.senders, self.receivers) != (other.senders, other.receivers):
            raise ValueError("The scores belong to graphs with other nodes. Expected two scores of one graph.")
        return pearson(self.scores[self.present], other.scores[other.present])

    def to_json(self) -> dict[str, Any]:
        """Nodes as text, scores as numbers, None where there is no edge."""
        rows = zip(self.scores.tolist(), self.present.tolist(), strict=True)
        return {
            "method": self.method,
            "senders": [str(node) for node in self.senders],
            "receivers": [str(node) for node in self.receivers],
            "scores": [[score if there else None for score, there in zip(*row, strict=True)] for row in rows],
        }

    def __repr__(self) -> str:
        edges = ", ".join(f"{u} → {v} {score:+.3f}" for u, v, score in self.top(5))
        return f"EdgeScores({self.method}, {int(self.present.sum())} edges: {edges})"


class EdgeGraph:
    """The edges of a model on a batch of prompt pairs, and runs with some of them corrupted.

    Args:
        clean, corrupted: ids [batch, pos] or texts, equally long, run in one batch. mask: True at real tokens of both, [batch, pos].

    Attributes: senders, receivers (tuples of `Node`), present (True where there is an edge, [sender, receiver]), logits (by "clean" and
    "corrupted", [batch, pos, vocab]).

    Raises:
        ValueError: the model's stream is not a sum of what its components write, or weights are shared over depth.
    """

    def __init__(self, model: Any, clean: Any, corrupted: Any, *, mask: Tensor | None = None) -> None:
        self.model, self.mask = model, mask
        self.tokens = pair(model, clean, corrupted)
        if any(point.steps > 1 for point in model.hook_dict.values()):
            raise ValueError(
                "This model repeats its layers, so that a component sends at several depths. Expected unshared layers."
            )
        self._plan()
        self.logits: dict[str, Tensor] = {}
        outputs, leaving = {}, {}
        with torch.no_grad():
            for name, tokens in self.tokens.items():
                self.logits[name], outputs[name] = self._pass(tokens)
                leaving[name] = self._leaving
        self._name_nodes(outputs["clean"])
        self.outputs = {name: torch.cat([part for _, part in sent]) for name, sent in outputs.items()}
        written = (self.outputs["clean"] - self.outputs["corrupted"]).sum(0)
        self._check("the stream that leaves", written, leaving["clean"] - leaving["corrupted"])
        for name, kept in (("no", torch.zeros_like(self.present)), ("every", self.present)):
            expected = self.logits["corrupted" if name == "no" else "clean"]
            self._check(f"the logits with {name} edge kept", self.run(kept), expected)

    # ------------------------------------------------------------------------------------------ the model's plan

    def _plan(self) -> None:
        """Hook points in the order in which a run passes them: (kind, layer, point), kinds of receivers first marked by 'in'."""
        points = list(self.model.hook_dict.values())
        self.plan: list[tuple[str, int, HookPoint]] = []
        for layer in range(self.model.n_layers):
            found = {
                role: main_point(points, role, layer)
                for role in (*INPUTS.values(), "resid", "result", "mixer_out", "mlp_input", "mlp_out", "resid_post")
            }
            enters, mixed = found["resid"], found["mixer_out"]
            leaves = found["resid_post"]
            if enters is None or leaves is None or mixed is None:
                raise ValueError(
                    f"Layer {layer} does not add its mixer's output to a stream (no hook points of role resid, mixer_out, resid_post), so "
                    "its edges are not defined. Expected a model of mixers and MLPs on a residual stream."
                )
            self.plan.append(("stream", layer, enters))
            if found["result"] is not None:
                inputs = [(kind, found[role]) for kind, role in INPUTS.items()]
                self.plan += [(kind, layer, point) for kind, point in inputs if point is not None]
                self.plan.append(("head", layer, found["result"]))
            else:
                self.plan.append(("mixer", layer, mixed))
            if found["mlp_input"] is not None and found["mlp_out"] is not None:
                self.plan += [("mlp_in", layer, found["mlp_input"]), ("mlp", layer, found["mlp_out"])]
            last = leaves
        self.plan.append(("logits", self.model.n_layers - 1, last))
        self.parallel = {
            layer
            for layer in range(self.model.n_layers)
            if main_point(points, "mlp_out", layer) and not main_point(points, "resid_mid", layer)
        }
        self.recurrent = {layer for kind, layer, _ in self.plan if kind == "mixer"}

    def _name_nodes(self, sent: list[tuple[Node, Tensor]]) -> None:
        senders: list[Node] = []
        for node, part in sent:
            senders += (
                [Node(node.kind, node.layer, head) for head in range(len(part))] if node.kind == "head" else [node]
            )
        receivers: list[Node] = []
        for kind, layer, _ in self.plan:
            if kind in INPUTS:
                receivers += [Node(kind, layer, head) for head in range(self._copies[kind, layer])]
            elif kind == "stream" and layer in self.recurrent:
                receivers.append(Node("mixer", layer))
            elif kind == "mlp_in":
                receivers.append(Node("mlp", layer))
        receivers.append(Node("logits"))
        self.senders, self.receivers = tuple(senders), tuple(receivers)
        self.present = torch.tensor([[self._sends(u, v) for v in receivers] for u in senders])

    def _sends(self, sender: Node, receiver: Node) -> bool:
        """Whether the sender's output is in the receiver's input."""
        if sender.layer is None or receiver.layer is None:
            return True
        if sender.layer != receiver.layer:
            return sender.layer < receiver.layer
        return receiver.kind == "mlp" and sender.kind != "mlp" and sender.layer not in self.parallel

    def _check(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Raise ValueError if the model's stream turns out to be something else than a sum of the senders' outputs."""
        missed = float((found - expected).abs().max())
        size = max(1.0, float(expected.abs().max()))
        if not missed < size * (1e-8 if expected.dtype == torch.float64 else 1e-3):
            raise ValueError(
                f"In {self.model.name!r} {what} should follow from what embedding, mixers and MLPs write, but is off by {missed:.2g}: "
                "the stream is not simply their sum, or something else reads it. Edges are not defined there; use path patching."
            )

    # ------------------------------------------------------------------------------------------------------- runs

    def _pass(
        self,
        tokens: Tensor,
        adjust: Callable[[str, int, Tensor, list[tuple[Node, Tensor]]], Tensor | None] | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Node, Tensor]]]:
        """Logits, and what each sender wrote in order: heads [head, batch, pos, d_model], others [1, batch, pos, d_model].

        adjust(kind, layer, input, sent so far) gives what is added to a receiver's input (None: nothing). embedded: replaces the first
        stream.
        """
        sent: list[tuple[Node, Tensor]] = []
        self._copies: dict[tuple[str, int], int] = {}
        added_to_stream: dict[int, Tensor] = {}

        def visit(kind: str, layer: int, x: Tensor) -> Tensor | None:
            if x.shape[1] != tokens.shape[1]:
                raise ValueError(
                    f"{self.model.name!r} reads {tokens.shape[1]} tokens in pieces, and one piece changes the next by another way than "
                    "edges. Expected a text of one segment, or path patching."
                )
            if kind == "stream":
                if layer == 0:
                    x = x if embedded is None else embedded.clone()
                    sent.append((Node("embed"), x[None]))
                if layer in self.recurrent:  # the mixer alone is to see the change, so it is taken out again behind it
                    change = None if adjust is None else adjust("mixer", layer, x, sent)
                    if change is not None:
                        added_to_stream[layer] = change
                        x = x + change
                return x
            if kind in (*INPUTS, "mlp_in", "logits"):
                if kind in INPUTS:
                    self._copies[kind, layer] = x.shape[2]
                if kind == "logits":
                    self._leaving = x
                change = None if adjust is None else adjust(kind, layer, x, sent)
                return x if change is None else x + change
            parts = x.permute(2, 0, 1, 3) if kind == "head" else x[None]
            sent.append((Node(kind, layer), parts))
            return x - added_to_stream[layer] if layer in added_to_stream and kind == "mixer" else x

        def hook(kind: str, layer: int) -> Callable[[Tensor, HookPoint], Tensor | None]:
            return lambda x, hook: visit(kind, layer, x)

        with _split_inputs(self.model):
            hooks = [(point.name, hook(kind, layer)) for kind, layer, point in self.plan]
            logits = self.model.run_with_hooks(tokens, mask=self.mask, hooks=hooks)
        return logits, sent

    def group(self, kind: str, layer: int) -> list[int]:
        """Indices of the receivers whose inputs are read at one hook point."""
        kind = "mlp" if kind == "mlp_in" else kind
        return [i for i, v in enumerate(self.receivers) if v.kind == kind and (v.layer == layer or kind == "logits")]

    @torch.no_grad()
    def run(self, kept: Tensor) -> Tensor:
        """Logits of the clean prompt with every edge corrupted that is not in `kept` (bool [sender, receiver])."""
        if kept.shape != self.present.shape or kept.dtype != torch.bool:
            raise ValueError(
                f"kept is {kept.dtype} {tuple(kept.shape)}; expected bool [sender, receiver] = {tuple(self.present.shape)}."
            )
        cut = (self.present & ~kept).to(self.logits["clean"])

        def corrupt(kind: str, layer: int, x: Tensor, sent: list[tuple[Node, Tensor]]) -> Tensor | None:
            group = self.group(kind, layer)
            now = torch.cat([part for _, part in sent])
            weights = cut[: len(now), group]
            if not bool(weights.any()):
                return None
            changes = torch.einsum("ubpd,uv->bpvd", self.outputs["corrupted"][: len(now)] - now, weights)
            return changes if kind in INPUTS else changes[:, :, 0]

        return self._pass(self.tokens["clean"], corrupt)[0]

    def gradients(self, objective: Objective, share: float) -> Tensor:
        """∂objective/∂input of every receiver, [receiver, batch, pos, d_model], at `share` of the way from corrupted to clean embedding."""
        leaves: dict[tuple[str, int], Tensor] = {}

        def watch(kind: str, layer: int, x: Tensor, sent: list[tuple[Node, Tensor]]) -> Tensor:
            leaves[kind, layer] = torch.zeros_like(x, requires_grad=True)
            return leaves[kind, layer]

        clean, corrupted = (self.outputs[name][0] for name in ("clean", "corrupted"))
        with torch.enable_grad():
            logits, _ = self._pass(self.tokens["clean"], watch, corrupted + share * (clean - corrupted))
            metric = measured(objective, logits).sum()
            found = torch.autograd.grad(metric, list(leaves.values()), allow_unused=True)
        result = torch.zeros(len(self.receivers), *clean.shape, dtype=clean.dtype, device=clean.device)
        for (kind, layer), leaf, gradient in zip(leaves, leaves.values(), found, strict=True):
            value = torch.zeros_like(leaf) if gradient is None else gradient
            result[self.group(kind, layer)] = value.permute(2, 0, 1, 3) if kind in INPUTS else value[None]
        return result


def edge_attribution(
    graph: EdgeGraph, objective: Objective, *, steps: int = 1, convention: str = "paper"
) -> EdgeScores:
    """EAP (the default) or EAP-IG with `steps` gradients; scores are means over the batch. See the module's docstring for conventions.

    Raises:
        ValueError: an unknown convention, or less than one step.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"Unknown convention {convention!r}.{suggestion(convention, CONVENTIONS)} Expected one of {', '.join(CONVENTIONS)}."
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1.")
    first = {"paper": 1.0, "code": 0.0, "midpoint": 0.5}[convention]
    mean = sum(graph.gradients(objective, (first + k) / steps) for k in range(steps)) / steps
    change = graph.outputs["clean"] - graph.outputs["corrupted"]
    scores = torch.einsum("ubpd,vbpd->uv", change, mean).cpu() / change.shape[1]
    method = "EAP" if (steps, convention) == (1, "paper") else f"EAP-IG, {steps} steps, {convention}"
    return EdgeScores(graph.senders, graph.receivers, (scores * graph.present).detach(), graph.present, method)


def edge_effects(
    graph: EdgeGraph,
    objective: Objective,
    *,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> EdgeScores:
    """What corrupting each edge by itself costs, exactly: one run per edge. Mean over the batch."""
    whole = measured(objective, graph.logits["clean"]).mean()
    scores = torch.zeros(graph.present.shape, dtype=whole.dtype)
    for u, v in watched(graph.present.nonzero().tolist(), "corrupting edges", progress, cancel):
        kept = graph.present.clone()
        kept[u, v] = False
        scores[u, v] = whole - measured(objective, graph.run(kept)).mean()
    return EdgeScores(graph.senders, graph.receivers, scores, graph.present, "exact")


@contextmanager
def _split_inputs(model: Any) -> Iterator[None]:
    """The switch that gives queries, keys and values of every head an input of their own, if the model has it."""
    name = "use_split_qkv_input"
    before = model.switches.get(name)
    if before is not None:
        model.set_switch(name, True)
    try:
        yield
    finally:
        if before is not None:
            model.set_switch(name, before)
