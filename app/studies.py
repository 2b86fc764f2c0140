"""The case studies behind their page: which there are, what was found, and starting one in the job queue.

Reading studies and results loads no torch; that happens in the job.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from case_studies.harness.claims import Study
from case_studies.harness.discovery import find_study, list_studies
from case_studies.harness.errors import StudyError
from case_studies.harness.results import StudyResult, most_telling, read_result
from case_studies.harness.running import run_study
from case_studies.harness.shipped import known_results, open_run
from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import Run, RunError, RunStore

MOST_SEEDS = 100


@dataclass(frozen=True)
class OpenStudy:
    """What the page of one study shows. `result` and `run` are None when it was never run; `others` are its results, its own and
    shipped ones, newest first; `problem` says in words what could not be opened."""

    study: Study | None
    result: StudyResult | None
    run: Run | None
    others: Sequence[StudyResult]
    problem: str = ""


def overview(store: RunStore) -> list[tuple[Study, StudyResult | None]]:
    """Every study with its most telling result."""
    last = most_telling(known_results(store))
    return [(study, last.get(study.name)) for study in list_studies()]


def open_study(store: RunStore, name: str, result_id: str) -> OpenStudy:
    """The study of a name, or of a result; of its results the one asked for, else the most telling one."""
    result: StudyResult | None = None
    problem = ""
    if result_id:
        result = next((each for each in known_results(store) if each.run == result_id), None)
        problem = "" if result is not None else _why_not(store, result_id)
    if result is not None:
        name = result.study
    others = known_results(store, name) if name else []
    if result is None:
        result = most_telling(others).get(name)
    study: Study | None = None
    if name:
        try:
            study = find_study(name)
        except StudyError as error:
            problem = problem or str(error)
    run = None if result is None else open_run(store, result.run)
    return OpenStudy(study, result, run, others, problem)


def _why_not(store: RunStore, run_id: str) -> str:
    """What is wrong with a run that is no result."""
    try:
        read_result(store.open(run_id))
    except (RunError, StudyError) as error:
        return str(error)
    return ""


class CancelOf(threading.Event):
    """An event that is set once its job is being cancelled."""

    def __init__(self, job: Job):
        super().__init__()
        self._job = job

    def is_set(self) -> bool:
        return self._job.cancelling


def start_study(jobs: JobQueue, store: RunStore, name: str | None, tier: str | None, seeds: int | None) -> Job:
    """Queue a study; the job's result is the id of its run. StudyError, in words for the reader, for what cannot be run."""
    study = find_study(name or "")
    chosen = study.tier(tier or "")
    if seeds is not None and not (type(seeds) is int and 1 <= seeds <= MOST_SEEDS):
        raise StudyError(f"The number of seeds is a whole number from 1 to {MOST_SEEDS}.")
    return jobs.submit(
        f"{study.title} ({chosen.name})", _run, key=f"study:{study.name}:{chosen.name}:{seeds}",
        study=study, tier=chosen.name, seeds=seeds, store=store,
    )  # fmt: skip


def _run(job: Job, study: Study, tier: str, seeds: int | None, store: RunStore) -> str:
    return run_study(study, tier, seeds, store=store, progress=job.progress, cancel=CancelOf(job)).run
