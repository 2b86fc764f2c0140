"""Retrieval heads (Wu et al. 2024) at four distances: written by hand, in the authors' scores, trained here, in a checkpoint of yours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from case_studies.harness.context import Context, SeedResults
from case_studies.harness.evidence import NotRun
from case_studies.retrieval_heads import figures
from case_studies.retrieval_heads.checkpoint import checkpoint
from case_studies.retrieval_heads.planted import planted
from case_studies.retrieval_heads.published import published
from case_studies.retrieval_heads.trained import others, trained


def run(context: Context) -> dict[str, Any]:
    by_hand, released = planted(), published()
    context.progress(0.05, "models trained here")
    seeds = context.each_seed(trained, share=(0.05, 0.75))
    beside = context.each_seed(others, share=(0.75, 0.95))[0]["others"]
    yours = context.each_seed(checkpoint, share=(0.95, 0.99))
    save(context, by_hand, released, seeds, beside)
    numbers = {name: value for name, value in (by_hand | released).items() if isinstance(value, float) or _kept(value)}
    return numbers | measurements(seeds) | {"effective_recall": effective(beside)} | yours.measurements()


def _kept(value: Any) -> bool:
    return type(value).__name__ in ("Sample", "NotRun")


def measurements(seeds: SeedResults) -> dict[str, Any]:
    """The measurements of the seeds that learned the task; NotRun where none did."""
    learned = [record for record in seeds if not isinstance(record["recall"], NotRun)]
    if not learned:
        return {name: value for name, value in seeds[0].items() if isinstance(value, NotRun)}
    found: dict[str, Any] = {}
    for name, first in learned[0].items():
        if isinstance(first, (float, NotRun)):
            values = [record[name] for record in learned if not isinstance(record[name], NotRun)]
            found[name] = values or NotRun("no seed could measure it")
    return found


def effective(beside: dict[str, Any]) -> float | NotRun:
    """Largest retrieval score by an effective pattern among the models without softmax attention that repeat needles."""
    scores = [
        float(np.nanmax(record["scores"]))
        for name, record in beside.items()
        if name != "induction-circuit" and record["succeeded"] > 0.2
    ]
    return max(scores) if scores else NotRun("no model without softmax attention learned to repeat needles here")


def save(
    context: Context, by_hand: dict[str, Any], released: dict[str, Any], seeds: SeedResults, beside: dict[str, Any]
) -> None:
    learned: Sequence[Any] = [record for record in seeds if "curve" in record]
    context.record(
        others=beside,
        released={
            name: {key: value for key, value in record.items() if key != "sorted"}
            for name, record in released["released_models"].items()
        },
        seeds_that_learned=len(learned),
    )
    context.save_figure("planted", figures.planted(by_hand["planted_scores"], by_hand["threshold"]))
    context.save_array("planted.scores", by_hand["planted_scores"], axes=("layer", "head"))
    if released["released_models"]:
        context.save_figure("released", figures.released(released["released_models"]))
    if learned:
        context.record(seeds=[{"feeders": record["feeders"], "reader": record["reader"]} for record in learned])
        context.save_figure("scores", figures.scores([record["scores"] for record in learned]))
        context.save_figure("masking", figures.masking([record["curve"] for record in learned]))
        context.save_figure(
            "alone", figures.alone([record["scores"] for record in learned], [r["alone"] for r in learned])
        )
        for name in ("scores", "frequency", "alone"):
            context.save_array(name, np.stack([record[name] for record in learned]), axes=("seed", "layer", "head"))
    context.save_figure("effective", figures.effective(beside))
