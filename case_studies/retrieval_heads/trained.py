"""Models trained here to continue repeated random sequences: which of their heads retrieve, and what happens without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import models
from case_studies.harness.context import Context
from case_studies.harness.evidence import NotRun
from models.attention.config import AttentionConfig
from models.bdh.model import BDH, BDHConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.recurrent.delta import DeltaConfig
from probes.heads import head_scores
from probes.retrieval import (
    THRESHOLD,
    NeedleRun,
    RetrievalScores,
    feeders,
    masking_curve,
    needle_grid,
    needle_recall,
    retrieval_scores,
)
from workbench.lab.batches import TaskBatches
from workbench.lab.jobs import JobCancelled
from workbench.lab.tasks import Task, make_task
from workbench.lab.training import TrainingConfig, train

VOCAB, LENGTH, NEEDLE = 48, 64, 6
LAYERS, WIDTH, HEADS, D_HEAD = 2, 64, 4, 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def build(kind: str, seed: int) -> Any:
    """A model of about 40 thousand weights: `softmax`, `gated-deltanet` or `bdh`."""
    if kind == "bdh":
        config = BDHConfig(n_layers=4, d_model=32, n_heads=2, n_neurons=256, vocab_size=VOCAB, dropout=0.0, seed=seed)
        return BDH(config)
    attention = AttentionConfig(HEADS, d_head=D_HEAD, position="rope", bias=False)
    mixer = attention if kind == "softmax" else DeltaConfig(HEADS, D_HEAD, D_HEAD, decay="scalar")
    return LanguageModel(
        LanguageModelConfig(LAYERS, WIDTH, VOCAB, None, mixer, norm="rms", init_std=WIDTH**-0.5, seed=seed)
    )


def fit(
    context: Context, model: Any, task: Task, steps: int, rate: float, what: str, share: tuple[float, float]
) -> None:
    """Train with the workbench's trainer; progress and cancelling go through the context."""

    def report(point: Any, total: int) -> None:
        done = share[0] + (share[1] - share[0]) * point.step / total
        context.progress(done, f"{what}: step {point.step} of {total}, {point.train_loss:.2f} nats")

    config = TrainingConfig(
        steps=steps, learning_rate=rate, warmup=min(50, steps // 4), weight_decay=0.01, betas=(0.9, 0.98), seed=context.seed,
        eval_every=steps, checkpoint_every=max(1, steps // 4), threads=1,
    )  # fmt: skip
    data = TaskBatches(task, context.settings["batch"], 2)
    folder = context.folder / what.replace(" ", "-")
    result = train(model, data, config, folder, progress=report, cancel=context.cancel, command="case retrieval_heads")
    if not result.completed:
        raise JobCancelled(what)
    model.eval()


def the_task(seed: int, length: int = LENGTH) -> Task:
    """Random segments that repeat; period and prefix vary from row to row."""
    return make_task("induction", vocab_size=VOCAB, length=length, seed=seed)


def needles(context: Context, longest: int = LENGTH) -> list[NeedleRun]:
    lengths = (longest // 2, longest - NEEDLE - 2)
    return needle_grid(VOCAB, lengths, DEPTHS, NEEDLE, repeats=context.settings["repeats"], seed=1000 + context.seed)


def trained(context: Context) -> dict[str, Any]:
    """Everything that is measured on the softmax model of one seed."""
    model = build("softmax", context.seed)
    fit(context, model, the_task(context.seed), context.settings["steps"], 5e-3, "softmax", (0.0, 0.5))
    runs = needles(context)
    context.progress(0.5, "retrieval scores")
    return with_success(context, model, runs, measure)


NAMES = (
    "recall", "retrieval_heads", "stability_depth", "stability_length", "masking_difference", "reader_best",
    "feeder_share", "feeder_previous", "feeder_score", "feeder_masked", "official_differs", "continued_correlation",
)  # fmt: skip


def with_success(context: Context, model: Any, runs: list[NeedleRun], measured: Any) -> dict[str, Any]:
    """`measured(context, model, runs, scores)`, or NotRun where the model repeats no needle."""
    settings = context.settings
    recall = needle_recall(model, runs)
    if settings["demand_success"] and not (recall > 0.5).any():
        return dict.fromkeys(
            NAMES, NotRun(f"seed {context.seed} did not learn to repeat needles in {settings['steps']} steps")
        )
    scores = retrieval_scores(model, runs, success=0.5 if settings["demand_success"] else -1)
    return measured(context, model, runs, scores)


def measure(context: Context, model: LanguageModel, runs: list[NeedleRun], scores: RetrievalScores) -> dict[str, Any]:
    """Scores, their stability, what masking costs, what feeds the best reader, and whether longer training keeps the heads."""
    ks = tuple(range(1, HEADS + 1))
    curve = masking_curve(
        model, runs, scores, ks, controls=context.settings["controls"], seed=context.seed, cancel=context.cancel
    )
    fair = [at for at, k in enumerate(ks) if curve["control_size"][at] == k]
    context.progress(0.65, "feeders")
    layer, head, best = next(place for place in scores.best(LAYERS * HEADS) if place[0] != 0)
    longest = max(run.length for run in runs)
    fed = feeders(model, [run for run in runs if run.length == longest], (layer, head))  # type: ignore[arg-type]
    clean = fed.pop((layer, head))  # type: ignore[arg-type]
    feeder = next(iter(fed))
    context.progress(0.75, "every head by itself")
    batch = the_task(context.seed).batch(16, split="validation")
    previous = head_scores(model, batch, "previous_token")["previous_token"]
    alone = np.array([[needle_recall(model, runs, [(at, h)]).mean() for h in range(HEADS)] for at in range(LAYERS)])
    official = retrieval_scores(model, runs, "official", success=-1 if not context.settings["demand_success"] else 0.5)
    same = continued(context, model, runs, scores)
    return {
        "recall": float(scores.recall.mean()),
        "retrieval_heads": float(len(scores.retrieval_heads(THRESHOLD))),
        "stability_depth": finite(scores.stability("depth")),
        "stability_length": finite(scores.stability("length")),
        "masking_difference": float(np.mean([curve["control"][at] - curve["top"][at] for at in fair])),
        "reader_best": best,
        "feeder_share": float(fed[feeder] / clean),
        "feeder_previous": float(previous[feeder]),
        "feeder_score": float(scores.scores[feeder]),
        "feeder_masked": float(alone[feeder] / curve["plain"]) if curve["plain"] else NotRun("nothing is repeated"),
        "official_differs": float(np.abs(official.scores - scores.scores).max()),
        "continued_correlation": same,
        "scores": scores.scores,
        "frequency": scores.frequency,
        "alone": alone,
        "curve": {name: curve[name] for name in ("k", "top", "control", "control_size", "plain")},
        "feeders": {f"{at}.{h}": value for (at, h), value in fed.items()},
        "reader": f"{layer}.{head}",
    }


def finite(value: float) -> float | NotRun:
    return value if np.isfinite(value) else NotRun("scores do not differ")


def continued(context: Context, model: LanguageModel, runs: list[NeedleRun], scores: RetrievalScores) -> float | NotRun:
    """Correlation over heads between scores before and after training on at twice the length, as long-context models are made."""
    further = LanguageModel(replace(model.config, seed=context.seed))
    further.load_state_dict(model.state_dict())
    steps = context.settings["further_steps"]
    fit(context, further, the_task(context.seed + 100, 2 * LENGTH), steps, 1e-3, "training on", (0.8, 1.0))
    success = 0.5 if context.settings["demand_success"] else -1
    after = retrieval_scores(further, runs, success=success)
    if np.ptp(after.scores) == 0 or np.ptp(scores.scores) == 0:
        return NotRun("scores do not differ")
    return float(np.corrcoef(scores.scores.ravel(), after.scores.ravel())[0, 1])


# ---- beside softmax attention ----------------------------------------------------------------------------------------


def others(context: Context) -> dict[str, Any]:
    """The same task and the same needles for models without softmax attention, by their effective patterns; first seed only."""
    if context.seed != context.seeds[0]:
        return {"skipped": True}
    found: dict[str, Any] = {}
    kinds = context.settings["others"]
    for number, kind in enumerate(kinds):
        model = build(kind, context.seed)
        share = (number / len(kinds), (number + 0.8) / len(kinds))
        fit(context, model, the_task(context.seed), context.settings["other_steps"], 5e-3, kind, share)
        found[kind] = by_effective_pattern(context, model, needles(context))
    found["induction-circuit"] = by_effective_pattern(context, models.load("induction-circuit"), needles(context))
    return {"others": found}


def by_effective_pattern(context: Context, model: Any, runs: list[NeedleRun]) -> dict[str, Any]:
    """Recall, scores over all runs, and what the best head's absence costs."""
    scores = retrieval_scores(model, runs, success=-1, whole_patterns=True)
    curve = masking_curve(model, runs, scores, (1,), controls=context.settings["controls"], cancel=context.cancel)
    succeeded = scores.recall > 0.5
    return {
        "recall": curve["plain"],
        "succeeded": float(succeeded.mean()),
        "scores": np.round(scores.by_run[succeeded].mean(0) if succeeded.any() else scores.scores, 4).tolist(),
        "without_best": curve["top"][0],
        "without_other": curve["control"][0],
    }
