"""A store with a trace of the smallest shipped BDH, and the real catalogue over it."""

from __future__ import annotations

from pathlib import Path

from app.model_service import WorkbenchModels
from app.services import Services
from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import RunStore

MODEL = "bdh-english"
TEXT = "The old lighthouse keeper climbed the stairs. The old lighthouse keeper lit the lamp."


def shipped_services(root: Path) -> Services:
    """Services over the shipped models and an empty store."""
    store, jobs = RunStore(root), JobQueue()
    return Services(store, jobs, WorkbenchModels(store, jobs))


def real_services(root: Path) -> tuple[Services, str]:
    """Services over the shipped models and a store with one trace: (services, its id)."""
    services = shipped_services(root)
    return services, finished(services, services.models.start_trace(MODEL, TEXT, {}))


def finished(services: Services, job: Job) -> str:
    """The id of the run that a job made; AssertionError with its words when it failed."""
    done = services.jobs.wait(job.id, timeout=900)
    assert done.state == "done", (done.error, done.traceback)
    return str(done.result)
