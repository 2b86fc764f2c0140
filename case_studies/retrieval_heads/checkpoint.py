"""The full tier: a checkpoint of yours, on needles in natural text."""

from __future__ import annotations

from typing import Any

import numpy as np

import models
from case_studies.harness.context import Context
from case_studies.harness.evidence import NotRun
from probes.retrieval import THRESHOLD, masking_curve, retrieval_scores
from probes.text_needles import text_needle_grid
from workbench.lab.corpora import load_corpus

BYTES = 256
LONGEST_TOKEN = 16  # characters; tokens of text are shorter on average, so that much text is enough
NAMES = ("checkpoint_share", "checkpoint_stability", "checkpoint_masking")


def checkpoint(context: Context) -> dict[str, Any]:
    """Share of retrieval heads, their stability over depths, and what masking them costs; NotRun without `--model`."""
    settings = context.settings
    if not settings["model"]:
        reason = "needs a checkpoint: workbench case retrieval_heads --full --model FOLDER"
        return dict.fromkeys(NAMES, NotRun(reason))
    model = models.load(settings["model"])
    if model.vocab_size <= BYTES:
        reason = (
            f"{model.name} reads bytes; any English repeats most letters of a needle, so that success cannot be told"
        )
        return dict.fromkeys(NAMES, NotRun(reason))
    haystack = load_corpus(settings["haystack"], "all").text[: LONGEST_TOKEN * max(settings["lengths"])]
    runs = text_needle_grid(model, haystack, settings["lengths"], settings["depths"])
    context.progress(0.1, f"{len(runs)} needles")
    try:
        found = retrieval_scores(model, runs)
    except ValueError as refused:
        if "nothing is retrieved" not in str(refused):
            raise
        return dict.fromkeys(NAMES, NotRun(str(refused)))
    heads = found.scores[~np.isnan(found.scores)]
    k = max(1, round(0.05 * len(heads)))
    tell = lambda fraction, message: context.progress(0.5 + fraction / 2, message)  # noqa: E731
    curve = masking_curve(model, runs, found, (k,), controls=settings["controls"], progress=tell, cancel=context.cancel)
    return {
        "checkpoint_share": float((heads > THRESHOLD).mean()),
        "checkpoint_stability": found.stability("depth")
        if len(found.over("depth")) > 1
        else NotRun("one depth succeeds"),
        "checkpoint_masking": curve["control"][0] - curve["top"][0],
        "checkpoint": {
            "model": settings["model"],
            "recall": float(found.recall.mean()),
            "best": found.to_json()["best"],
            "k": k,
        },
    }
