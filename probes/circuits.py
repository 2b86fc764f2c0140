"""Circuits: does a part of the edges do what the model does, and which part?

    curve = faithfulness_curve(graph, objective, scores)        how much the best-ranked edges restore; curve.cpr, curve.cmd
    circuit = acdc(graph, threshold=0.01)                       edges that cannot be cut without changing the prediction
    area = roc_area(roc([c.kept for c in acdc_sweep(graph, thresholds)], truth, graph.present))

A *circuit* is a set of edges; all others are corrupted (`EdgeGraph.run`). Its faithfulness is

    f = (m(circuit) − m(∅)) / (m(full) − m(∅))          m(∅): every edge corrupted; means over the batch

The curve follows f over the share k of edges kept. CPR = ∫ f dk asks for all that helps (edges ranked by signed score); CMD = ∫ |1 − f| dk
asks for the model's own behaviour (ranked by |score|); both by trapezoids over the shares of the Mechanistic Interpretability Benchmark
(Mueller et al. 2025, arXiv 2504.13151).

ACDC (Conmy et al. 2023, arXiv 2304.14997) goes through the receivers from the logits down and cuts every edge whose cutting raises
KL(model ‖ circuit) by less than the threshold. It is greedy: what it finds can depend on the order, and edges that stand in for one another
are found once.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.edges import EdgeGraph, EdgeScores, Node
from probes.objectives import Divergence, Objective, measured
from probes.progress import Report, watched
from workbench.instrument.errors import suggestion

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKINGS = ("signed", "absolute")


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness by share of edges kept; `edges` is their number. CPR is meant for the signed ranking, CMD for the absolute one."""

    ranking: str
    shares: tuple[float, ...]
    edges: tuple[int, ...]
    faithfulness: tuple[float, ...]

    @property
    def cpr(self) -> float:
        """∫ f dk over the measured shares."""
        return _trapezoids(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """∫ |1 − f| dk over the measured shares."""
        return _trapezoids(self.shares, [abs(1 - f) for f in self.faithfulness])

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "ranking": self.ranking,
            "shares": list(self.shares),
            "edges": list(self.edges),
            "faithfulness": list(self.faithfulness),
            "cpr": self.cpr,
            "cmd": self.cmd,
        }


def faithfulness_curve(
    graph: EdgeGraph,
    objective: Objective,
    scores: EdgeScores,
    *,
    ranking: str = "signed",
    shares: Sequence[float] = SHARES,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> FaithfulnessCurve:
    """Keep the best-ranked edges, more and more of them. A share of k keeps ⌊k · number of edges⌋.

    Raises:
        ValueError: scores of another graph, an unknown ranking, shares that do not ascend within 0..1, prompts that score alike.
    """
    if ranking not in RANKINGS:
        raise ValueError(
            f"Unknown ranking {ranking!r}.{suggestion(ranking, RANKINGS)} Expected 'signed' or 'absolute'."
        )
    if (scores.senders, scores.receivers) != (graph.senders, graph.receivers):
        raise ValueError("The scores belong to another graph. Expected scores of this one.")
    shares = tuple(shares)
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise ValueError(f"shares are {shares}; expected ascending numbers from 0 to 1.")
    full, nothing = (float(measured(objective, graph.logits[name]).mean()) for name in ("clean", "corrupted"))
    if not abs(full - nothing) > 1e-9 * max(1e-3, abs(full), abs(nothing)):
        raise ValueError(f"Clean and corrupted prompts both score {full:.4g}, so there is nothing to be faithful to.")
    ranked = scores.scores if ranking == "signed" else scores.scores.abs()
    order = ranked.masked_fill(~graph.present, -torch.inf).flatten().argsort(descending=True, stable=True)
    counts = [int(share * int(graph.present.sum()) + 1e-9) for share in shares]
    values = []
    for count in watched(counts, "keeping edges", progress, cancel):
        kept = torch.zeros(graph.present.numel(), dtype=torch.bool)
        kept[order[:count]] = True
        found = float(measured(objective, graph.run(kept.view_as(graph.present))).mean())
        values.append((found - nothing) / (full - nothing))
    return FaithfulnessCurve(ranking, shares, tuple(counts), tuple(values))


@dataclass(frozen=True)
class Circuit:
    """What ACDC left: `kept` bool [sender, receiver]; KL(model ‖ circuit) in nats; how many runs it took."""

    threshold: float
    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    kept: Tensor
    divergence: float
    runs: int

    def edges(self) -> list[tuple[Node, Node]]:
        """The edges kept."""
        return [(self.senders[u], self.receivers[v]) for u, v in self.kept.nonzero().tolist()]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "threshold": self.threshold,
            "edges": [[str(u), str(v)] for u, v in self.edges()],
            "divergence": self.divergence,
            "runs": self.runs,
        }

    def __repr__(self) -> str:
        return f"Circuit(τ = {self.threshold:g}: {int(self.kept.sum())} edges, KL {self.divergence:.3g} nats, {self.runs} runs)"


def acdc(
    graph: EdgeGraph,
    threshold: float,
    *,
    at: int | Tensor = -1,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> Circuit:
    """Cut, from the logits down, every edge that raises the KL to the model's prediction at position `at` by less than `threshold` nats.

    Raises:
        ValueError: a negative threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; expected 0 or more nats.")
    objective = Divergence(graph.logits["clean"], at)
    kept, now, runs = graph.present.clone(), 0.0, 0
    for v in watched(list(reversed(range(len(graph.receivers)))), "ACDC, receivers", progress, cancel):
        if not _heard(graph, kept, graph.receivers[v]):
            kept[:, v] = False  # nothing that it computes arrives anywhere, so cutting its inputs changes nothing
            continue
        for u in reversed(graph.present[:, v].nonzero().flatten().tolist()):
            kept[u, v] = False
            without = -float(measured(objective, graph.run(kept)).mean())
            runs += 1
            if without - now < threshold:
                now = without
            else:
                kept[u, v] = True
    return Circuit(threshold, graph.senders, graph.receivers, kept, now, runs)


def acdc_sweep(
    graph: EdgeGraph,
    thresholds: Sequence[float],
    *,
    at: int | Tensor = -1,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> list[Circuit]:
    """ACDC at each threshold, from scratch: a larger one need not keep a subset."""
    return [acdc(graph, tau, at=at, cancel=cancel) for tau in watched(thresholds, "ACDC, thresholds", progress, cancel)]


def roc(found: Sequence[Tensor], truth: Tensor, present: Tensor) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) of sets of edges against the true one, ascending, with (0, 0) and (1, 1).

    Args: bool [sender, receiver] each.

    Raises:
        ValueError: the truth holds no edge, or every one.
    """
    truth = truth & present
    wrong = present & ~truth
    if not bool(truth.any()) or not bool(wrong.any()):
        raise ValueError("The true circuit holds none or all of the edges. Expected a part of them.")
    points = [(float((kept & wrong).sum() / wrong.sum()), float((kept & truth).sum() / truth.sum())) for kept in found]
    return sorted([(0.0, 0.0), *points, (1.0, 1.0)])


def roc_area(points: Sequence[tuple[float, float]]) -> float:
    """Area under the points by trapezoids: 0.5 for guessing."""
    return _trapezoids([x for x, _ in points], [y for _, y in points])


def _heard(graph: EdgeGraph, kept: Tensor, receiver: Node) -> bool:
    """Whether what a receiver's component writes still reaches somebody. With grouped keys, its layer's heads are asked together."""
    if receiver.kind == "logits":
        return True
    kind = receiver.kind if receiver.kind in ("mixer", "mlp") else "head"
    own = [i for i, u in enumerate(graph.senders) if u.kind == kind and u.layer == receiver.layer]
    alike = [v for v in graph.receivers if v.kind == receiver.kind and v.layer == receiver.layer]
    if kind == "head" and len(alike) == len(own):
        own = [i for i in own if graph.senders[i].head == receiver.head]
    return bool(kept[own].any())


def _trapezoids(x: Sequence[float], y: Sequence[float]) -> float:
    return sum((b - a) * (f + g) / 2 for a, b, f, g in zip(x, x[1:], y, y[1:], strict=False))
