"""Running a study: its seeds, its measurements, its verdicts, and the run that keeps them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from case_studies.harness.claims import Study, Tier
from case_studies.harness.context import Context
from case_studies.harness.discovery import find_study, load_module
from case_studies.harness.errors import StudyError
from case_studies.harness.evidence import NotRun, Summary, summarise
from case_studies.harness.results import KIND, ClaimResult, StudyResult, decide, read_result, result_record
from case_studies.harness.workspace import Workspace, study_hash
from workbench.instrument.devices import checked_device
from workbench.instrument.errors import suggestion
from workbench.lab.run_format import encode_manifest
from workbench.lab.run_writer import code_version, machine
from workbench.lab.runs import RunStore


def run_study(
    study: str | os.PathLike[str] | Study,
    tier: str = "small",
    seeds: int | Sequence[int] | None = None,
    *,
    store: RunStore | None = None,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
    device: str = "cpu",
    fresh: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> StudyResult:
    """Run a study and keep its results as an immutable run.

    study       name, path of a folder, or a `Study`
    tier        smoke, small or full
    seeds       how many (0, 1, …) or which; what `claims.toml` says for the tier if left out
    store       where the run goes: `RunStore()` if left out
    progress    called with the share that is done and a few words
    cancel      set it to stop: JobCancelled is raised at the study's next `progress`
    fresh       do not go on with what an interrupted run left
    changes     other values for some of the tier's settings, such as `{"model": "path/of/a/checkpoint"}`

    A study that was killed or cancelled goes on at the seed where it stopped when it is run again with the same code and
    settings. Raises UnknownStudy, ClaimsError, StudyBusy, ValueError for a device that this machine lacks, StudyError for a
    study that returns what its claims cannot be decided with, and whatever the study itself raises. A claim that does not
    hold is a result, not an error.
    """
    found = study if isinstance(study, Study) else find_study(study)
    settings = found.tier(tier)
    checked_device(device)
    chosen = _seeds(settings.seeds if seeds is None else seeds)
    runs = RunStore() if store is None else store
    digest = study_hash(found.folder)
    values = _changed(found, settings, changes or {})
    key = {"code": digest, "settings": values, "device": device}
    started = time.monotonic()
    with Workspace(runs.root, found.name, tier, key, fresh) as workspace:
        module = load_module(found)
        context = Context(workspace, found.name, tier, chosen, values, device, progress, cancel)
        returned = module.run(context)
        context.check_cancelled()
        summaries = summarise_all(found, tier, returned)
        claims = decide_all(found, tier, module, summaries)
        seconds = round(time.monotonic() - started + context.resumed_seconds, 3)
        result = StudyResult("", found.name, found.title, tier, chosen, claims, seconds, machine(), code_version())
        run_id = _store(runs, result, workspace, context, summaries, digest, values)
        workspace.discard()
    if progress is not None:
        progress(1.0, "done")
    return read_result(runs.open(run_id))


def _changed(study: Study, tier: Tier, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tier with some values changed. StudyError for a setting that the tier does not have."""
    for name in changes:
        if name not in tier.settings:
            has = ", ".join(tier.settings) or "none"
            raise StudyError(
                f"study {study.name} has no setting {name!r} at tier {tier.name}; settings: {has}.{suggestion(name, tier.settings)}"
            )
    return {**tier.settings, **changes}


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or any(type(seed) is not int or seed < 0 for seed in chosen):
        raise StudyError(f"seeds are a number from 1 or different whole numbers from 0, got {seeds!r}")
    return chosen


def summarise_all(study: Study, tier: str, returned: Any) -> dict[str, Summary | NotRun]:
    """The summary of every measurement that `run` returned. StudyError when a claim's measurement is not among them."""
    if not isinstance(returned, Mapping):
        raise StudyError(f"study {study.name}: run returned {type(returned).__name__}, expected a dict of measurements")
    intervals = {claim.measurement: claim.interval for claim in study.claims if claim.interval}
    for claim in study.claims:
        if claim.measurement not in returned:
            raise StudyError(
                f"study {study.name}, claim {claim.id!r}: run returned no measurement {claim.measurement!r}; "
                f"return NotRun(reason) for what tier {tier} cannot measure.{suggestion(claim.measurement, returned)}"
            )
    return {
        name: value if isinstance(value, NotRun) else summarise(name, value, intervals.get(name))
        for name, value in returned.items()
    }


def decide_all(
    study: Study, tier: str, module: ModuleType, summaries: Mapping[str, Summary | NotRun]
) -> tuple[ClaimResult, ...]:
    """The verdict on every claim."""
    measured = {name: each for name, each in summaries.items() if isinstance(each, Summary)}

    def by_function(name: str) -> tuple[bool, str]:
        answer = getattr(module, name)(measured)
        holds, reason = answer if isinstance(answer, tuple) else (answer, f"decided by {name}")
        if not isinstance(holds, bool):
            raise StudyError(f"study {study.name}: {name} returned {holds!r}, expected True or False")
        return holds, str(reason)

    return tuple(decide(claim, tier, summaries[claim.measurement], by_function) for claim in study.claims)


def _store(
    runs: RunStore,
    result: StudyResult,
    workspace: Workspace,
    context: Context,
    summaries: Mapping[str, Summary | NotRun],
    digest: str,
    settings: Mapping[str, Any],
) -> str:
    measurements = {
        name: {"not_run": each.reason} if isinstance(each, NotRun) else {
            "values": list(each.values), "over": each.over, "value": each.value, "median": each.median,
            "ci_low": each.ci_low, "ci_high": each.ci_high, "interval": each.interval, "confidence": each.confidence,
        }
        for name, each in summaries.items()
    }  # fmt: skip
    results = {
        **result_record(result),
        "measurements": measurements,
        "facts": context.facts,
        "seconds_per_seed": context.seconds,
        "code_versions": sorted(context.versions),
    }
    encode_manifest({"results": results})  # refuses what JSON has no word for before the run is begun
    about = {"study": result.study, "tier": result.tier, "seeds": list(result.seeds), "device": context.device,
             "settings": dict(settings), "study_sha256": digest}  # fmt: skip
    with runs.create(KIND, f"{result.title} ({result.tier})") as run:
        run.set(settings=about, results=results, seed=result.seeds[0], seconds=result.seconds, text=result.words)
        for name, (array, record) in workspace.arrays().items():
            run.add_array(name, array, axes=record["axes"], unit=record["unit"])
        for name, content in workspace.figures().items():
            run.add_figure(name, content)
    return run.id
