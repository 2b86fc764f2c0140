"""What came out of a study: one verdict per claim, and how it is kept in a run."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from case_studies.harness.claims import TIERS, Claim
from case_studies.harness.errors import StudyError
from case_studies.harness.evidence import NotRun, Summary
from case_studies.harness.rules import Comparison, RuleError
from workbench.lab.runs import Run, RunError, RunStore

KIND = "case-study"
REPRODUCED, NOT_REPRODUCED, NOT_RUN = "reproduced", "not reproduced", "not run here"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_RUN)


@dataclass(frozen=True)
class ClaimResult:
    """One claim with our value and its verdict; `reason` says why in words.

    `value` is the mean of `values` (one per seed or item, as `over` says); all are None or empty when nothing was
    measured. `ci_low` and `ci_high` bound the mean at `confidence`, by the method `interval`.
    """

    id: str
    sentence: str
    paper: str
    where: str
    published: float | str
    source: str
    evidence: str
    rule: str
    measurement: str
    unit: str
    note: str
    verdict: str
    reason: str
    value: float | None = None
    median: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    interval: str = ""
    confidence: float = 0.95
    n: int = 0
    over: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyResult:
    """All claims of one run of a study. `run` is its id in the run store; `shipped`: it came with the workbench."""

    run: str
    study: str
    title: str
    tier: str
    seeds: tuple[int, ...]
    claims: tuple[ClaimResult, ...]
    seconds: float
    machine: str
    code_version: str
    created: str = ""
    shipped: bool = False

    def count(self, verdict: str) -> int:
        return sum(claim.verdict == verdict for claim in self.claims)

    @property
    def words(self) -> str:
        """`2 reproduced, 1 not run here`."""
        counts = [(self.count(verdict), verdict) for verdict in VERDICTS]
        return ", ".join(f"{count} {verdict}" for count, verdict in counts if count)

    def __str__(self) -> str:
        lines = [f"{self.title} ({self.tier}, {len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}): {self.words}"]
        for claim in self.claims:
            lines.append(
                f"  {claim.verdict:14}  {claim.id}: ours {ours(claim)}, published {claim.published}. {claim.reason}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("claim", "published", "ours", "n", "verdict", "why")]
        rows += [
            (each.sentence, str(each.published), ours(each), str(each.n or ""), each.verdict, each.reason)
            for each in self.claims
        ]
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><caption>{html.escape(self.title)}</caption>{cells}</table>"


def ours(claim: ClaimResult) -> str:
    """Our value with its interval: `1.0003 [1.0000, 1.0006] nats`, with two digits of the interval's half width; `–` when
    nothing was measured."""
    if claim.value is None:
        return "–"
    unit = f" {claim.unit}" if claim.unit else ""
    if claim.ci_low is None or claim.ci_high is None:
        return f"{claim.value:.4g}{unit}"
    half = (claim.ci_high - claim.ci_low) / 2
    digits = 1 - math.floor(math.log10(half)) if half > 0 else 99
    if not 0 <= digits <= 6:
        return f"{claim.value:.5g} [{claim.ci_low:.5g}, {claim.ci_high:.5g}]{unit}"
    return f"{claim.value:.{digits}f} [{claim.ci_low:.{digits}f}, {claim.ci_high:.{digits}f}]{unit}"


def decide(
    claim: Claim,
    tier: str,
    measured: Summary | NotRun,
    by_function: Callable[[str], tuple[bool, str]] | None = None,
) -> ClaimResult:
    """The verdict on a claim. `by_function(name)` gives (holds, reason) of a rule that a function decides; it is asked
    only when there is something to decide."""
    about = {
        each.name: getattr(claim, each.name) for each in fields(Claim) if each.name not in ("tier", "seeds", "interval")
    }
    if isinstance(measured, NotRun):
        return ClaimResult(**about, verdict=NOT_RUN, reason=measured.reason)
    about |= {
        "value": measured.value, "median": measured.median, "ci_low": measured.ci_low, "ci_high": measured.ci_high,
        "interval": measured.interval, "confidence": measured.confidence, "n": measured.n, "over": measured.over,
        "values": measured.values,
    }  # fmt: skip
    refusal = _refusal(claim, tier, measured)
    if refusal:
        return ClaimResult(**about, verdict=NOT_RUN, reason=refusal)
    rule = claim.decision
    if isinstance(rule, Comparison):
        holds, reason = _compare(claim, rule, measured)
    else:
        if by_function is None:
            raise StudyError(f"claim {claim.id}: nothing here can call its function {rule.function}")
        holds, reason = by_function(rule.function)
    return ClaimResult(**about, verdict=REPRODUCED if holds else NOT_REPRODUCED, reason=reason)


def _refusal(claim: Claim, tier: str, measured: Summary) -> str:
    """Why what was measured decides nothing; empty when it does."""
    if TIERS.index(tier) < TIERS.index(claim.tier):
        return f"tier {claim.tier} decides it, this was {tier}"
    if measured.seeds < claim.seeds:
        return f"at least {claim.seeds} seeds decide it, this was {measured.seeds}"
    if claim.decision.needs_interval and measured.ci_low is None:
        return f"its rule needs an interval, and one of {measured.over} has none"
    return ""


def _compare(claim: Claim, rule: Comparison, measured: Summary) -> tuple[bool, str]:
    """Whether the rule holds, and the numbers that it looked at."""
    known = {"value": measured.value, "median": measured.median, "lowest": measured.lowest, "highest": measured.highest,
             "n": float(measured.n)}  # fmt: skip
    if measured.ci_low is not None and measured.ci_high is not None:
        known |= {"ci_low": measured.ci_low, "ci_high": measured.ci_high}
    if claim.published_number is not None:
        known["published"] = claim.published_number
    try:
        if rule.every_seed:
            failed = [value for value in measured.values if not rule.holds({**known, "value": value})]
            done = measured.n - len(failed)
            return not failed, f"holds in {done} of {measured.n} {measured.over}" + (
                f"; not for {', '.join(f'{value:.4g}' for value in failed[:5])}" if failed else ""
            )
        holds = rule.holds(known)
    except RuleError as error:
        raise StudyError(f"claim {claim.id}: {error}") from error
    looked_at = ", ".join(f"{name} = {known[name]:.4g}" for name in rule.names)
    return holds, f"{looked_at}; the rule is {rule.text}"


# ---- in runs ---------------------------------------------------------------------------------------------------------


def result_record(result: StudyResult) -> dict[str, Any]:
    """The part of a run's `results` that describes the study and its claims."""
    return {
        "study": result.study, "title": result.title, "tier": result.tier, "seeds": list(result.seeds),
        "claims": [asdict(claim) | {"values": list(claim.values)} for claim in result.claims],
    }  # fmt: skip


def read_result(run: Run) -> StudyResult:
    """The result that a run of kind "case-study" holds. StudyError when it is another kind or misses a part."""
    if run.kind != KIND:
        raise StudyError(f"run {run.id} is a {run.kind} run, expected a {KIND} run")
    kept, known = run.manifest["results"], {each.name for each in fields(ClaimResult)}
    try:
        claims = tuple(
            ClaimResult(
                **{name: value for name, value in each.items() if name in known} | {"values": tuple(each["values"])}
            )
            for each in kept["claims"]
        )
        return StudyResult(
            run.id, kept["study"], kept["title"], kept["tier"], tuple(kept["seeds"]), claims,
            float(run.manifest.get("seconds") or 0), str(run.manifest.get("machine") or ""),
            str(run.manifest.get("code_version") or ""), run.created,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"run {run.id} does not hold the results of a study: {error!r}") from error


def study_results(store: RunStore, study: str | None = None) -> list[StudyResult]:
    """The results in a store, newest first, optionally of one study. Runs that cannot be read are left out; the store's
    `problems` names them."""
    found = []
    for entry in store.list(kind=KIND):
        try:
            result = read_result(store.open(entry.id))
        except (RunError, StudyError, OSError):
            continue
        if study in (None, result.study):
            found.append(result)
    return found


def most_telling(results: Iterable[StudyResult]) -> dict[str, StudyResult]:
    """For each study the result that says most: at the largest tier, and of those the newest.

    `results` come newest first, as `study_results` gives them.
    """
    chosen: dict[str, StudyResult] = {}
    for result in results:
        held = chosen.get(result.study)
        if held is None or TIERS.index(result.tier) > TIERS.index(held.tier):
            chosen[result.study] = result
    return chosen
