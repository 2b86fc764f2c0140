"""Results that come with the workbench: `<study>/result/<run id>/` is a stored run of the study, as `run_study` kept it.

So the verdicts, the value of every seed and the figures are there to be looked at before anyone has spent an hour on them.
`workbench case ship RUN` replaces a study's shipped result by a newer run.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from case_studies.harness import discovery
from case_studies.harness.claims import Study
from case_studies.harness.errors import StudyError
from case_studies.harness.results import StudyResult, most_telling, read_result, study_results
from case_studies.harness.workspace import study_hash
from workbench.lab.runs import Run, RunError, RunNotFoundError, RunStore

FOLDER = "result"


def shipped_runs(study: str | None = None) -> list[Run]:
    """The runs that come with the studies, optionally of one study. One that cannot be read is left out (a test reads them all)."""
    found = []
    for folder in discovery.study_folders():
        for manifest in sorted(folder.glob(f"{FOLDER}/*/manifest.json")) if study in (None, folder.name) else ():
            try:
                run = Run(manifest.parent)
                read_result(run)
            except (RunError, StudyError, OSError):
                continue
            found.append(run)
    return found


def known_results(store: RunStore | None, study: str | None = None) -> list[StudyResult]:
    """The results in a store and those that are shipped, newest first, optionally of one study. One that is both counts as the store's."""
    own = [] if store is None else study_results(store, study)
    held = {result.run for result in own}
    shipped = [replace(read_result(run), shipped=True) for run in shipped_runs(study) if run.id not in held]
    return sorted([*own, *shipped], key=lambda result: result.created, reverse=True)


def known_result(store: RunStore | None, study: str) -> StudyResult | None:
    """What is known of a study: the result at the largest tier, and of those the newest."""
    return most_telling(known_results(store, study)).get(study)


def code_changed(run: Run, study: Study) -> bool:
    """Whether the study's Python files differ from those that measured this run."""
    return run.manifest["settings"].get("study_sha256") != study_hash(study.folder)


def open_run(store: RunStore, run_id: str) -> Run:
    """The run of a result, from the store or shipped. RunNotFoundError or RunError as from the store."""
    try:
        return store.open(run_id)
    except RunNotFoundError:
        for run in shipped_runs():
            if run.id == run_id:
                return run
        raise


def ship(run: Run) -> Path:
    """Make a run the shipped result of its study, in place of the one before. Returns its folder.

    StudyError when it is not the result of one of the studies here.
    """
    result = read_result(run)
    study = discovery.find_study(result.study)
    if study.folder not in discovery.study_folders():
        raise StudyError(f"{study.folder} is not one of the workbench's own studies; its result cannot be shipped")
    home = study.folder / FOLDER
    home.mkdir(exist_ok=True)
    partial = home / f".{run.id}-{secrets.token_hex(3)}.tmp"
    try:
        (partial / "figures").mkdir(parents=True)
        for name in ("manifest.json", "arrays.safetensors", *(f"figures/{figure}" for figure in run.figures())):
            shutil.copyfile(run.path / name, partial / name)
        if (home / run.id).exists():
            return home / run.id
        os.rename(partial, home / run.id)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for other in home.iterdir():
        if other.name != run.id:
            shutil.rmtree(other, ignore_errors=True)
    return home / run.id
