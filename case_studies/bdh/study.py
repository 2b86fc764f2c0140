"""The Dragon Hatchling (Kosowski et al. 2025): what of its analyses holds for models small enough to train here.

Five stages: models of letters and of text are trained anew for every seed; the shipped models are looked into once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from case_studies.bdh import figures
from case_studies.bdh.letters import letters
from case_studies.bdh.shipped import concepts, reading, wiring
from case_studies.bdh.text import text
from case_studies.harness.context import Context, SeedResults
from case_studies.harness.evidence import Sample
from probes.bdh import u_to_rank_biserial
from probes.bdh.concepts_statistics import u_to_p

STAGES = {letters: (0.0, 0.45), text: (0.45, 0.75), concepts: (0.75, 0.9), wiring: (0.9, 0.96), reading: (0.96, 0.99)}
PUBLISHED_U, PUBLISHED_SENTENCES = 2368, 50


def run(context: Context) -> dict[str, Any]:
    done = {stage.__name__: finished(context.each_seed(stage, share=share)) for stage, share in STAGES.items()}
    save_figures(context, done)
    save_arrays(context, done)
    measured = [measurements(records) for records in done.values()]
    return {name: value for part in measured for name, value in part.items()} | published_test()


def finished(seeds: SeedResults) -> list[Any]:
    """The records of the seeds that a stage measured: some stages measure the first seeds only."""
    return [record for record in seeds if "skipped" not in record]


def measurements(records: Sequence[Any]) -> dict[str, Any]:
    """Numbers and samples as `{name: [one per seed that has it]}`."""
    found: dict[str, Any] = {}
    for name, first in records[0].items():
        if isinstance(first, (float, Sample)):
            found[name] = [record[name] for record in records if record[name] is not None]
    return found


def published_test() -> dict[str, float]:
    """The paper's one test (section 6.3), recomputed from its U: rank-biserial r and one-sided p."""
    n = PUBLISHED_SENTENCES
    return {"published_r": u_to_rank_biserial(PUBLISHED_U, n, n), "published_p": u_to_p(PUBLISHED_U, n, n)}


def save_figures(context: Context, done: dict[str, list[Any]]) -> None:
    known, wires = done["concepts"][0], done["wiring"][0]
    context.save_figure("sparsity", figures.sparsity(done["text"]))
    context.save_figure("surprise", figures.surprise(done["letters"]))
    context.save_figure("octiles", figures.octiles(done["letters"]))
    context.save_figure("edits", figures.edits(done["letters"]))
    context.save_figure("modularity", figures.modularity(wires["curve"]))
    context.save_figure("degrees", figures.degrees(wires["ccdf"]))
    context.save_figure("concepts", figures.concepts(known["concept_names"], known["concept_rows"]))
    context.save_figure("traces", figures.traces(known["traces"]))
    context.save_figure("merging", figures.merging(done["text"]))


def save_arrays(context: Context, done: dict[str, list[Any]]) -> None:
    def stacked(stage: str, name: str) -> np.ndarray:
        return np.stack([np.asarray(record[name]) for record in done[stage]])

    context.save_array("surprise.ratio", stacked("letters", "ratios"), axes=("seed", "layer"))
    context.save_array("surprise.control", stacked("letters", "control_ratios"), axes=("seed", "layer"))
    context.save_array("surprise.octile", stacked("letters", "octile_ratios"), axes=("seed", "layer", "octile"))
    active = stacked("letters", "active_by_position")[:, :, 1:]  # position 0 is silent and has no share
    context.save_array("surprise.active", active, axes=("seed", "layer", "pos"))
    context.save_array("sparsity", stacked("text", "sparsity_curve"), axes=("seed", "step", "point", "layer"))
    losses = stacked("text", "merge_losses")
    context.save_array("merge.loss", losses, axes=("seed", "model", "domain"), unit="nats per byte")
    context.save_array("modularity", stacked("text", "small_modularity"), axes=("seed", "head", "degree", "graph"))
    context.save_array("state.share", done["reading"][0]["share_by_layer"], axes=("window", "layer"))
    context.save_array("state.cosine", done["reading"][0]["cosine_by_layer"], axes=("window", "layer"))
