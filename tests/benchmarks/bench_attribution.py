"""How well estimates of patching agree with patching, and what they save, on the shipped induction circuit.

    python -m tests.benchmarks --only attribution

Two kinds of corrupted prompt: another token follows the earlier copy (attention stays), or the earlier copy itself is another token
(attention moves). Correlations are Pearson's with the exact effects of the same cells or edges; times are CPU seconds of one thread.
"""

import torch

from probes.edges import CONVENTIONS, EdgeGraph, edge_attribution, edge_effects
from probes.patching import activation_patching, attribution_patching, correlation
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


def saving() -> Row:
    model, clean, corrupted, objective = circuit_prompts()
    graph = EdgeGraph(model, clean, corrupted)
    ours, other = paired_medians(
        lambda: edge_attribution(graph, objective, steps=5), lambda: edge_effects(graph, objective), 3
    )
    return Row("exact edges / EAP-IG with 5 steps", other / ours, None, "time", f"{other:.2f} s and {ours:.2f} s")


def run() -> list[Row]:
    torch.manual_seed(0)
    return [*agreement("answer"), *agreement("match"), saving()]
