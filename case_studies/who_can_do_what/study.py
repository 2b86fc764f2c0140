"""Which sequence mixer learns which task, at equal size and equal training.

Every seed fills a table, mixers × tasks, of accuracies on held-out rows (`cells`), reads the claims off it, and looks into some of the
trained models (`pictures`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from case_studies.harness.context import Context, SeedResults
from case_studies.harness.evidence import Summary
from case_studies.who_can_do_what import cells, figures, mixers, pictures
from case_studies.who_can_do_what.cells import TASKS
from case_studies.who_can_do_what.mixers import CHOOSING, MIXERS, NONLINEAR, POSITIVE, TURNING

Table = Mapping[tuple[str, str], Mapping[str, Any]]  # (mixer, task) -> cell


def run(context: Context) -> dict[str, Any]:
    seeds = context.each_seed(measure)
    models = {mixer: mixers.build(mixer, 0) for mixer in MIXERS}
    context.record(
        parameters={mixer: mixers.parameters(model) for mixer, model in models.items()},
        state_numbers={mixer: mixers.state_numbers(model) for mixer, model in models.items()},
        tasks=TASKS,
        chance={task: cells.chance(cells.task_of(task, 0)) for task in TASKS},
        rates=seeds["rates"],
        planted_share=seeds["planted_share"],
        parity_correlation=seeds["parity_correlation"],
        right_sign=seeds["right_sign"],
    )
    context.save_array("accuracy", np.stack(seeds["accuracy"]), axes=("seed", "mixer", "task"))
    context.save_array("beyond", np.stack(seeds["beyond"]), axes=("seed", "mixer", "task"))
    context.save_array("loss", np.stack(seeds["loss"]), axes=("seed", "mixer", "task"), unit="nats")
    save_pictures(context, seeds)
    return seeds.measurements()


def save_pictures(context: Context, seeds: SeedResults) -> None:
    """The table as a heat map, means over seeds; patterns, states and traces of the first seed."""
    chances = [cells.chance(cells.task_of(task, 0)) for task in TASKS]
    accuracy, beyond = np.stack(seeds["accuracy"]).mean(0), np.stack(seeds["beyond"]).mean(0)
    context.save_figure("table", figures.table(list(MIXERS), list(TASKS), chances, accuracy, beyond))
    first = seeds[0]
    patterns = {mixer: first[f"pattern.{mixer}"] for mixer in pictures.RECALL_CELLS}
    context.save_figure("patterns", figures.patterns(patterns, first["planted_edges"], first["planted_share"]))
    context.save_figure("retention", figures.retention({m: first[f"kept.{m}"] for m in pictures.KEEPING_CELLS}))
    traces = {mixer: first[f"trace.{mixer}"] for mixer in pictures.PARITY_CELLS}
    length = TASKS["parity"]["length"]
    context.save_figure("parity", figures.parity(traces, first["parity_truth"], first["parity_correlation"], length))
    for mixer, pattern in patterns.items():
        context.save_array(f"pattern.{mixer}", pattern, axes=("query", "key"))
    for mixer in pictures.KEEPING_CELLS:
        context.save_array(f"kept.{mixer}", first[f"kept.{mixer}"], axes=("after", "key"))
    for mixer, trace in traces.items():
        context.save_array(f"trace.{mixer}", trace, axes=("pos",))
    context.save_array("trace.truth", first["parity_truth"], axes=("pos",))


def measure(context: Context) -> dict[str, Any]:
    """One seed: all cells, then the pictures."""
    torch.set_num_threads(1)
    table = {}
    wanted = [(mixer, task) for task in TASKS for mixer in MIXERS]
    for number, (mixer, task) in enumerate(wanted):
        context.progress(0.98 * number / len(wanted), f"{mixer} on {task}")
        folder = context.folder / task / mixer
        table[mixer, task] = cells.measure_cell(mixer, task, context.seed, context.settings, folder, context.cancel)
    context.progress(0.98, "pictures")
    return {**measurements(table), **as_arrays(table), **look_inside(context, table)}


def as_arrays(table: Table) -> dict[str, Any]:
    """Accuracies and losses [mixer, task], and the learning rates as plain values."""
    found = {
        name: np.array([[table[mixer, task][name] for task in TASKS] for mixer in MIXERS])
        for name in ("accuracy", "beyond", "loss")
    }
    return {**found, "rates": {task: {mixer: table[mixer, task]["rate"] for mixer in MIXERS} for task in TASKS}}


def measurements(table: Table) -> dict[str, float]:
    """What the claims are about. A claim that something can be done takes the best of a group; so does one that it cannot."""

    def best(group: tuple[str, ...], task: str, what: str = "beyond") -> float:
        return max(table[mixer, task][what] for mixer in group)

    def mean(group: tuple[str, ...], task: str) -> float:
        return float(np.mean([table[mixer, task]["accuracy"] for mixer in group]))

    recall, copy = "associative_recall", "selective_copy"
    return {
        "parity_nonlinear": best(NONLINEAR, "parity"),
        "parity_positive": best(POSITIVE, "parity"),
        "parity_softmax": table["softmax", "parity"]["beyond"],
        "parity_turning": best(TURNING, "parity"),
        "parity_negative_gain": table["deltanet-negative", "parity"]["beyond"] - table["deltanet", "parity"]["beyond"],
        "permutations_nonlinear": best(NONLINEAR, "permutations"),
        "permutations_positive": best(POSITIVE, "permutations"),
        "recall_softmax": table["softmax", recall]["accuracy"],
        "recall_delta_gain": table["gated-deltanet", recall]["accuracy"] - table["mamba2", recall]["accuracy"],
        "recall_softmax_margin": table["softmax", recall]["accuracy"] - mean(CHOOSING, recall),
        "copy_choosing_best": best(CHOOSING, copy, "accuracy"),
        "copy_choosing_gain": mean(CHOOSING, copy) - table["retnet", copy]["accuracy"],
        "passkey_softmax": table["softmax", "passkey"]["accuracy"],
        "passkey_softmax_beyond": table["softmax", "passkey"]["beyond"],
    }


def passkey_within_and_not_beyond(measured: Mapping[str, Summary]) -> tuple[bool, str]:
    """Found at the training length, and clearly less often at twice that length."""
    within, beyond = measured["passkey_softmax"].value, measured["passkey_softmax_beyond"].value
    holds = within >= 0.95 and beyond < 0.9 * within
    return holds, f"{within:.3f} within, {beyond:.3f} beyond; asked: at least 0.95, and below 0.9 of that"


def look_inside(context: Context, table: Table) -> dict[str, Any]:
    """Pictures of some trained cells, as arrays and plain values."""
    found: dict[str, Any] = {"planted_share": {}, "parity_correlation": {}, "right_sign": {}}

    def model_of(mixer: str, task: str) -> Any:
        folder = context.folder / task / mixer
        return cells.trained_model(mixer, task, context.seed, table[mixer, task], context.settings, folder)

    recall = cells.task_of("associative_recall", context.seed)
    row = recall.batch(pictures.ROWS, 0, "validation")
    answers = row.loss_mask[0].nonzero()[:, 0]
    found["planted_edges"] = torch.stack([answers - 1, row.metadata["source"][0, answers]], 1)  # [answer, (query, key)]
    for mixer in pictures.RECALL_CELLS:
        model = model_of(mixer, "associative_recall")
        seen = pictures.recall_picture(model, recall)
        found[f"pattern.{mixer}"] = seen["pattern"]
        found["planted_share"][mixer] = {name: seen[name] for name in ("layer", "head", "share")}
        if mixer in pictures.KEEPING_CELLS:
            found[f"kept.{mixer}"] = pictures.kept(model, recall, seen["layer"], seen["head"])
    parity = cells.twice_as_long(cells.task_of("parity", context.seed))
    for mixer in pictures.PARITY_CELLS:
        seen = pictures.parity_picture(model_of(mixer, "parity"), parity)
        found[f"trace.{mixer}"], found["parity_truth"] = seen["trace"], seen["parity"]
        found["parity_correlation"][mixer] = seen["correlation"]
    products = cells.task_of("permutations", context.seed)
    longer = cells.twice_as_long(products)
    for mixer in pictures.SIGN_CELLS:
        found["right_sign"][mixer] = pictures.right_sign(model_of(mixer, "permutations"), longer, products.length)
    return found
