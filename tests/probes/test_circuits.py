"""Circuits on planted edges: models in which it is known which edges matter."""

import json
import threading
from typing import Any

import pytest
import torch

from probes.circuits import acdc, acdc_sweep, faithfulness_curve, roc, roc_area
from probes.edges import EdgeGraph, EdgeScores, edge_attribution, edge_effects
from probes.objectives import Divergence, LogitDifference
from probes.progress import MeasurementCancelled
from tests.probes.attribution_cases import perturbed, random_tokens

OBJECTIVE = LogitDifference(torch.tensor([3, 8, 21]), torch.tensor([5, 1, 30]))


def planted() -> EdgeGraph:
    """Two layers in which only head 0.1 → value 1.2 → logits carries anything: all other heads write nothing, MLPs are absent.

    The prompts' last tokens are equal, so that what differs has to come through attention.
    """
    model = perturbed("attention-only", scale=0.3, n_layers=2)
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 2)):
            attention = model.blocks[layer].attn
            width = attention.d_head
            keep = torch.zeros(attention.output.weight.shape[1], dtype=torch.bool)
            keep[head * width : (head + 1) * width] = True
            attention.output.weight[:, ~keep] = 0.0
    clean = random_tokens(model)
    corrupted = clean.clone()
    corrupted[:, [2, 5]] = (clean[:, [2, 5]] + 7) % model.vocab_size
    return EdgeGraph(model, clean, corrupted)


def names(edges: Any) -> set[tuple[str, str]]:
    return {(str(u), str(v)) for u, v in edges}


def test_acdc_cuts_what_carries_nothing_and_keeps_what_does() -> None:
    graph = planted()
    silent = {f"head {layer}.{head}" for layer, own in ((0, 1), (1, 2)) for head in range(4) if head != own}
    for circuit in (acdc(graph, 1e-12), acdc(graph, 1e-4)):
        kept = names(circuit.edges())
        assert not any(u in silent or v.split()[1:] == s.split()[1:] for u, v in kept for s in silent if v != "logits")
        assert {("head 1.2", "logits")} <= kept
        reached = float(-Divergence(graph.logits["clean"])(graph.run(circuit.kept)).mean())
        assert circuit.divergence == pytest.approx(reached, abs=1e-12)
    assert circuit.runs < int(graph.present.sum())  # heads that nobody hears cost no run
    assert int(acdc(graph, 1e9).kept.sum()) == 0


def test_exact_effects_of_silent_edges_are_zero() -> None:
    graph = planted()
    exact = edge_effects(graph, OBJECTIVE)
    for (u, v), score in zip(graph.present.nonzero().tolist(), exact.scores[graph.present].tolist(), strict=True):
        sender = graph.senders[u]
        if sender.kind == "head" and (sender.layer, sender.head) not in ((0, 1), (1, 2)):
            assert score == 0, f"{sender} → {graph.receivers[v]}"


def test_faithfulness_runs_from_nothing_to_everything() -> None:
    graph = planted()
    exact = edge_effects(graph, OBJECTIVE)
    shares = (0.0, 0.1, 0.3, 1.0)
    curve = faithfulness_curve(graph, OBJECTIVE, exact, ranking="absolute", shares=shares)
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-9) and curve.faithfulness[-1] == pytest.approx(1, abs=1e-9)
    assert curve.edges == tuple(int(share * int(graph.present.sum())) for share in shares)
    f = curve.faithfulness
    by_hand = 0.1 * (f[0] + f[1]) / 2 + 0.2 * (f[1] + f[2]) / 2 + 0.7 * (f[2] + f[3]) / 2
    assert curve.cpr == pytest.approx(by_hand)
    g = [abs(1 - value) for value in f]
    assert curve.cmd == pytest.approx(0.1 * (g[0] + g[1]) / 2 + 0.2 * (g[1] + g[2]) / 2 + 0.7 * (g[2] + g[3]) / 2)
    backwards = EdgeScores(graph.senders, graph.receivers, -exact.scores.abs(), graph.present, "backwards")
    worst = faithfulness_curve(graph, OBJECTIVE, backwards, shares=shares)
    assert abs(1 - curve.faithfulness[2]) < abs(1 - worst.faithfulness[2])


def test_the_sweep_finds_the_true_edges() -> None:
    """Against the exact effects of the planted model: a large area for ACDC over thresholds, and for the ranking by EAP-IG."""
    graph = planted()
    truth = edge_effects(graph, Divergence(graph.logits["clean"])).scores.abs() > 1e-6
    circuits = acdc_sweep(graph, (1e-9, 1e-6, 1e-4, 1e-2))
    assert [int(c.kept.sum()) for c in circuits] == sorted((int(c.kept.sum()) for c in circuits), reverse=True)
    area = roc_area(roc([circuit.kept for circuit in circuits], truth, graph.present))
    guess = edge_attribution(graph, OBJECTIVE, steps=5, convention="midpoint").scores.abs()
    cuts = [guess > t for t in guess[graph.present].quantile(torch.linspace(0, 1, 20, dtype=guess.dtype))]
    ranked = roc_area(roc(cuts, truth, graph.present))
    print(f"area under the ROC curve against exact effects: ACDC {area:.3f}, EAP-IG {ranked:.3f}")
    assert area > 0.9 and ranked > 0.9


def test_roc_of_known_sets() -> None:
    present = torch.ones(2, 2, dtype=torch.bool)
    truth = torch.tensor([[True, True], [False, False]])
    assert roc_area(roc([truth], truth, present)) == 1.0
    assert roc_area(roc([~truth], truth, present)) == 0.0
    assert roc_area(roc([], truth, present)) == 0.5
    with pytest.raises(ValueError, match="none or all"):
        roc([], present, present)


def test_mistakes_are_named_and_work_can_be_cancelled() -> None:
    graph = planted()
    scores = edge_attribution(graph, OBJECTIVE)
    with pytest.raises(ValueError, match=r"Unknown ranking 'sign'. Did you mean 'signed'"):
        faithfulness_curve(graph, OBJECTIVE, scores, ranking="sign")
    with pytest.raises(ValueError, match="expected ascending numbers"):
        faithfulness_curve(graph, OBJECTIVE, scores, shares=(0.5, 0.2))
    with pytest.raises(ValueError, match="nothing to be faithful to"):
        faithfulness_curve(graph, lambda logits: logits[:, 0, 0] * 0, scores)
    with pytest.raises(ValueError, match="threshold is -1"):
        acdc(graph, -1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(MeasurementCancelled):
        acdc(graph, 0.1, cancel=stop)
    assert json.loads(json.dumps(acdc(graph, 0.1).to_json()))["threshold"] == 0.1
