"""Edges against patches made by hand, completeness of EAP-IG, refusals, and the shipped induction circuit."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from probes.edges import EdgeGraph, Node, edge_attribution, edge_effects
from probes.heads import head_scores
from probes.objectives import LogitDifference
from tests.probes.attribution_cases import circuit_prompts, left_padded, perturbed, random_tokens
from workbench.lab.tasks import make_task

ANSWER, WRONG = torch.tensor([3, 8, 21]), torch.tensor([5, 1, 30])
OBJECTIVE = LogitDifference(ANSWER, WRONG)
DEFINED = ("gpt2", "llama", "retnet", "mamba2", "gptj", "attention-only")


def graph_of(model: Any, **options: Any) -> EdgeGraph:
    clean = random_tokens(model)
    corrupted = clean.clone()
    corrupted[:, [2, 5]] = (clean[:, [2, 5]] + 7) % model.vocab_size
    return EdgeGraph(model, clean, corrupted, **options)


def edge(graph: EdgeGraph, sender: Node, receiver: Node) -> tuple[int, int]:
    return graph.senders.index(sender), graph.receivers.index(receiver)


def without(graph: EdgeGraph, sender: Node, receiver: Node) -> Tensor:
    kept = graph.present.clone()
    kept[edge(graph, sender, receiver)] = False
    return graph.run(kept)


def test_single_edges_by_hand() -> None:
    """From the weights: one head's query, an MLP and the logits see another head's corrupted output; nobody else does."""
    model = perturbed("gpt2")
    graph = graph_of(model)
    model.set_use_attn_result(True)
    _, one = model.run_with_cache(graph.tokens["clean"])
    _, other = model.run_with_cache(graph.tokens["corrupted"])
    change = (other["blocks.0.attn.hook_result"] - one["blocks.0.attn.hook_result"])[:, :, 1]
    model.set_use_attn_result(False)

    attention, block = model.blocks[1].attn, model.blocks[1]
    query = one["blocks.1.attn.hook_q"].clone()
    query[:, :, 2] = block.ln1(one["resid_pre", 1] + change) @ attention.W_Q[2] + attention.b_Q[2]
    by_hand = model.run_with_hooks(graph.tokens["clean"], hooks=[("blocks.1.attn.hook_q", lambda q, hook: query)])
    found = without(graph, Node("head", 0, 1), Node("query", 1, 2))
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-11, rtol=0)

    added = block.mlp(block.ln2(one["resid_mid", 1] + change))
    by_hand = model.run_with_hooks(graph.tokens["clean"], hooks=[("blocks.1.hook_mlp_out", lambda x, hook: added)])
    found = without(graph, Node("head", 0, 1), Node("mlp", 1))
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-11, rtol=0)

    by_hand = model.unembed(model.ln_final(one["resid_post", 2] + change))
    found = without(graph, Node("head", 0, 1), Node("logits"))
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-11, rtol=0)
    assert (found - graph.logits["clean"]).abs().max() > 1e-6


def test_edges_into_a_recurrent_mixer_by_hand() -> None:
    """The mixer reads the corrupted sum through its norm; the stream beside it does not change."""
    model = perturbed("retnet")
    graph = graph_of(model)
    _, one = model.run_with_cache(graph.tokens["clean"])
    _, other = model.run_with_cache(graph.tokens["corrupted"])
    read = model.blocks[2].ln1(one["resid_pre", 2] + other["mixer_out", 0] - one["mixer_out", 0])
    by_hand = model.run_with_hooks(
        graph.tokens["clean"], hooks=[("blocks.2.ln1.hook_normalized", lambda x, hook: read)]
    )
    found = without(graph, Node("mixer", 0), Node("mixer", 2))
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-11, rtol=0)
    assert (found - graph.logits["clean"]).abs().max() > 1e-6


@pytest.mark.parametrize("name", DEFINED)
def test_all_edges_or_none(name: str) -> None:
    graph = graph_of(perturbed(name))
    torch.testing.assert_close(graph.run(graph.present), graph.logits["clean"], atol=1e-11, rtol=0)
    nothing = graph.run(torch.zeros_like(graph.present))
    torch.testing.assert_close(nothing, graph.logits["corrupted"], atol=1e-11, rtol=0)


def test_gptj_mlps_do_not_hear_their_own_layers_heads() -> None:
    graph = graph_of(perturbed("gptj"))
    assert not graph.present[edge(graph, Node("head", 1, 0), Node("mlp", 1))]
    assert graph.present[edge(graph, Node("head", 1, 0), Node("mlp", 2))]


@pytest.mark.parametrize("name", ["llama", "retnet", "mamba2"])
def test_eap_is_the_derivative_of_corrupting(name: str) -> None:
    """The same prompts with an embedding that is hardly corrupted: every score is the edge's effect, to first order."""
    model = perturbed(name)
    with torch.no_grad():
        model.W_E[1] = model.W_E[0] + 1e-5 * model.W_E[2]
    clean = random_tokens(model)
    corrupted = clean.clone()
    clean[:, [2, 5]], corrupted[:, [2, 5]] = 0, 1
    graph = EdgeGraph(model, clean, corrupted)
    guess, exact = edge_attribution(graph, OBJECTIVE), edge_effects(graph, OBJECTIVE)
    assert exact.scores.abs().max() > 1e-9
    torch.testing.assert_close(guess.scores, exact.scores, atol=1e-4 * float(exact.scores.abs().max()), rtol=1e-3)


def test_one_step_of_the_paper_is_eap_and_of_the_code_is_not() -> None:
    graph = graph_of(perturbed("gpt2"))
    eap = edge_attribution(graph, OBJECTIVE)
    change = graph.outputs["clean"] - graph.outputs["corrupted"]
    at_clean, at_corrupted = (
        torch.einsum("ubpd,vbpd->uv", change, graph.gradients(OBJECTIVE, share)) / 3 * graph.present
        for share in (1.0, 0.0)
    )
    torch.testing.assert_close(eap.scores, at_clean)
    torch.testing.assert_close(edge_attribution(graph, OBJECTIVE, convention="code").scores, at_corrupted)
    assert (at_clean - at_corrupted).abs().max() > 1e-5
    both = edge_attribution(graph, OBJECTIVE, steps=2, convention="code").scores
    torch.testing.assert_close(
        both, (edge_attribution(graph, OBJECTIVE, convention="midpoint").scores + at_corrupted) / 2
    )


@pytest.mark.parametrize(("name", "steps"), [("llama", 16), ("mamba2", 16), ("retnet", 64)])
def test_what_the_embedding_sends_is_complete(name: str, steps: int) -> None:
    """Σ_v score(embed → v) is an integral along the embedding's path: with more steps it becomes m(clean) − m(corrupted)."""
    graph = graph_of(perturbed(name))
    whole = float((OBJECTIVE(graph.logits["clean"]) - OBJECTIVE(graph.logits["corrupted"])).mean())
    sums = {
        convention: float(edge_attribution(graph, OBJECTIVE, steps=steps, convention=convention).scores[0].sum())
        for convention in (("paper", "code", "midpoint") if name == "llama" else ("midpoint",))
    }
    errors = {convention: abs(value - whole) for convention, value in sums.items()}
    assert errors["midpoint"] < 0.05 * abs(whole) and errors["midpoint"] == min(errors.values())


@pytest.mark.parametrize("changed", ["answer", "match"])
def test_the_shipped_circuit_is_found(changed: str) -> None:
    """Another answer travels through an induction head's value; another match from a previous-token head to an induction head's key.

    By runs and by both estimates alike; their correlation with the runs is printed.
    """
    model, clean, corrupted, objective = circuit_prompts(changed)
    graph = EdgeGraph(model, clean, corrupted)
    batch = make_task("induction", vocab_size=128, length=65, seed=3).batch(8)
    found = head_scores(model, batch, ("induction", "previous_token"))
    readers = {head for head in range(4) if found["induction"][1, head] > 0.2}
    previous = {head for head in range(4) if found["previous_token"][0, head] > 0.2}
    exact = edge_effects(graph, objective)
    eap = edge_attribution(graph, objective)
    integrated = edge_attribution(graph, objective, steps=5, convention="midpoint")
    for guess in (eap, integrated):
        r = guess.correlation(exact)
        print(
            f"{changed} changed, {int(graph.present.sum())} edges: {guess.method} and exact patching, Pearson {r:.3f}"
        )
    for scores in (exact, integrated):
        sender, receiver, _ = next(found for found in scores.top(81) if found[1].layer == 1)
        assert receiver.head in readers
        if changed == "answer":
            assert receiver.kind == "value"
        else:
            assert (sender.kind, sender.layer, receiver.kind) == ("head", 0, "key") and sender.head in previous
        last = next(u for u, v, _ in scores.top(81) if v.kind == "logits")
        assert last.layer == 1 and last.head in readers
    assert integrated.correlation(exact) > 0.6


def test_padding_changes_nothing() -> None:
    model = perturbed("gpt2")
    graph = graph_of(model)
    (clean, mask), (corrupted, _) = (left_padded(graph.tokens[name]) for name in ("clean", "corrupted"))
    padded = EdgeGraph(model, clean, corrupted, mask=mask)
    one, other = (edge_attribution(g, OBJECTIVE, steps=2) for g in (graph, padded))
    torch.testing.assert_close(one.scores, other.scores, atol=1e-11, rtol=1e-8)
    assert model.switches["use_split_qkv_input"] is False  # as it was


@pytest.mark.parametrize("name", ["bdh", "gpt1", "gemma2", "looped"])
def test_streams_that_are_no_sums_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not (simply their sum|defined)|repeats its layers"):
        graph_of(perturbed(name))


def test_mistakes_are_named() -> None:
    graph = graph_of(perturbed("gpt2"))
    with pytest.raises(ValueError, match=r"Unknown convention 'papers'. Did you mean 'paper'"):
        edge_attribution(graph, OBJECTIVE, convention="papers")
    with pytest.raises(ValueError, match="steps is 0"):
        edge_attribution(graph, OBJECTIVE, steps=0)
    with pytest.raises(ValueError, match=r"expected bool \[sender, receiver\]"):
        graph.run(graph.present.float())
    scores = edge_attribution(graph, OBJECTIVE)
    record = json.loads(json.dumps(scores.to_json()))
    assert record["scores"][-1][0] is None and record["scores"][0][0] is not None  # the last MLP feeds no query
    with pytest.raises(ValueError, match="other nodes"):
        scores.correlation(edge_attribution(graph_of(perturbed("llama")), OBJECTIVE))
