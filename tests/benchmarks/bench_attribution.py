"""How well estimates of patching agree with patching, and what they save, on the shipped induction circuit.

    python -m tests.benchmarks --only attribution

Two kinds of corrupted prompt: another token follows the earlier copy (attention stays), or the earlier copy itself is another token
(attention moves). Correlations are Pearson's with the exact effects of the same cells or edges; times are CPU seconds of one thread.

Relevance gives every token of a prompt a number and knows no other prompt. It is compared with what the objective loses when that token's
embedding is exchanged for the corrupted prompt's, prompt by prompt: exactly 0 where both prompts have the same token.
"""

import torch

from probes.edges import CONVENTIONS, EdgeGraph, edge_attribution, edge_effects
from probes.patching import activation_patching, attribution_patching, correlation, pearson
from probes.relevance import gradient_attention, gradient_x_input, integrated_gradients, rollout
from probes.relevance_propagation import BASELINES, last_layer, relevance_propagation
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import paired_medians
from tests.probes.attribution_cases import circuit_prompts


def agreement(changed: str) -> list[Row]:
    model, clean, corrupted, objective = circuit_prompts(changed)
    options = {"role": "z", "by": ("head", "pos")}
    exact_cells = activation_patching(model, clean, corrupted, objective, **options)  # type: ignore[arg-type]
    guess = attribution_patching(model, clean, corrupted, objective, **options)  # type: ignore[arg-type]
    note = f"{exact_cells.values[..., 0].numel()} cells (head × position), {len(clean)} prompts"
    rows = [
        Row(
            f"{changed} changed: attribution patching ~ patching",
            correlation(guess, exact_cells),
            None,
            "Pearson",
            note,
        )
    ]
    graph = EdgeGraph(model, clean, corrupted)
    exact = edge_effects(graph, objective)
    plans = [(1, "paper"), *((steps, convention) for steps in (5, 30) for convention in CONVENTIONS)]
    for steps, convention in plans:
        found = edge_attribution(graph, objective, steps=steps, convention=convention)
        name = f"{changed} changed: {found.method} ~ exact edges"
        rows.append(Row(name, found.correlation(exact), None, "Pearson", f"{int(graph.present.sum())} edges"))
    return rows


def relevance(changed: str) -> list[Row]:
    """Each token's relevance for the clean prompt's objective ~ what exchanging the token takes from it."""
    model, clean, corrupted, objective = circuit_prompts(changed)
    options = {"role": "embed", "by": ("pos",), "direction": "noise"}
    grids = [
        patch(model, clean, corrupted, objective, **options) for patch in (activation_patching, attribution_patching)
    ]  # type: ignore[operator]
    exact, guess = ((grid.clean - grid.values[0]).T.flatten() for grid in grids)  # [prompt · pos]
    metric = lambda logits, _: objective(logits)  # noqa: E731
    found = [
        rollout(model, clean),
        *(last_layer(model, clean, metric, kind) for kind in BASELINES),
        gradient_attention(model, clean, metric),
        relevance_propagation(model, clean, metric),
        gradient_x_input(model, clean, metric),
        integrated_gradients(model, clean, metric),
    ]
    estimates = {"attribution patching": guess} | {each.method: each.scores.detach().flatten() for each in found}
    note = f"{len(exact)} cells (prompt × position), {int((clean != corrupted).sum())} of them exchanged"
    return [
        Row(f"{changed} changed: {name} ~ exchanged tokens", pearson(estimate, exact), None, "Pearson", note)
        for name, estimate in estimates.items()
    ]


def saving() -> Row:
    model, clean, corrupted, objective = circuit_prompts()
    graph = EdgeGraph(model, clean, corrupted)
    ours, other = paired_medians(
        lambda: edge_attribution(graph, objective, steps=5), lambda: edge_effects(graph, objective), 3
    )
    return Row("exact edges / EAP-IG with 5 steps", other / ours, None, "time", f"{other:.2f} s and {ours:.2f} s")


def run() -> list[Row]:
    torch.manual_seed(0)
    rows = [row for changed in ("answer", "match") for row in (*agreement(changed), *relevance(changed))]
    return [*rows, saving()]
