"""docs/attention-tasks.md: the table of the experiments, from their records and the stored results."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from models.trainings.record import SUBJECTS, Experiment
from workbench.lab.tasks import Task

PAGE = Path(__file__).parents[2] / "docs" / "attention-tasks.md"
COLUMNS = ("experiment", "paper", "what it should do", "task", "measured", "it", "baseline", "rule", "verdict", "CPU s")

HEAD = """# One small training per attention architecture

This page is written by `python -m models.trainings page` from `models/trainings/`; a test compares it with the experiments and the stored
results.

Every row trains two small models of width 48 the same way, with the same rows, steps, learning rate and seeds: the architecture, and a
plain model that lacks what the architecture adds. Below each table stands what both are. The columns *it* and *baseline* list the measured
values, one for each seed (of weights and data), on held-out rows. The rule was fixed before the seeds in the table were run; the verdict
says whether it held on every one. What was chosen by looking at results (steps, rates, sizes of rows) was chosen alike for both sides;
where the first choice was changed, the last section says so. CPU seconds are of one seed and both sides, on one thread.

The tasks ask for what the paper adds, mostly in a way that the plain model cannot answer at any size. So a *yes* shows that a part does
what it is for; it does not say that it makes the better language model. A *no* is a finding about these small models, not about the paper.

`python -m models.trainings run NAME --seeds 0` trains one again; `make test-slow` trains all of them with their first seed and compares the
verdicts.
"""


def page(experiments: Mapping[str, Experiment], results: Mapping[str, Any]) -> str:
    """The whole page as markdown; experiments without results are left out."""
    order = list(SUBJECTS)
    measured = sorted(
        (one for one in experiments.values() if one.name in results), key=lambda one: order.index(one.subject)
    )
    kept = [one.name for one in measured if all(seed["holds"] for seed in results[one.name]["seeds"].values())]
    lines = [HEAD, f"{len(measured)} experiments; the rule held on every seed in {len(kept)}.", ""]
    for subject, title in SUBJECTS.items():
        rows = [one for one in measured if one.subject == subject]
        if not rows:
            continue
        lines += [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_row(one, results[one.name]) for one in rows]
        lines += ["", *(_sides(one) for one in rows), ""]
    lines += ["## What was tried where the rule failed, and other remarks", ""]
    lines += [f"- `{one.name}`: {one.tried}" for one in measured if one.tried]
    return "\n".join(lines).rstrip() + "\n"


def _row(one: Experiment, record: Mapping[str, Any]) -> str:
    seeds = record["seeds"].values()
    digits = 3 if one.measure.less else 2
    ours, baseline = (", ".join(f"{seed[side]['value']:.{digits}f}" for seed in seeds) for side in ("ours", "baseline"))
    held = sum(seed["holds"] for seed in seeds)
    verdict = "**yes**" if held == len(seeds) else "no" if not held else f"on {held} of {len(seeds)} seeds"
    seconds = sum(seed[side]["cpu_seconds"] for seed in seeds for side in ("ours", "baseline")) / len(seeds)
    rule = one.rule.in_words(one.measure.less)
    cells = [
        f"`{one.name}`",
        one.paper,
        one.thing,
        f"`{one.task.name}`",
        one.measure.name,
        ours,
        baseline,
        rule,
        verdict,
        f"{seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _sides(one: Experiment) -> str:
    trained = _settings(one.task)
    tested = "" if one.test is None else f"; measured on {_settings(one.test)}"
    return (
        f"- `{one.name}`: {one.ours.words}. Baseline: {one.baseline.words}. {one.steps} steps of {one.batch} rows, rate {one.rate:g}; "
        f"`{one.task.name}` with {trained}{tested}."
    )


def _settings(task: Task) -> str:
    """The settings of a task but its seed, as `name value, …`."""
    return ", ".join(f"{item.name} {getattr(task, item.name)}" for item in fields(task) if item.name != "seed")
