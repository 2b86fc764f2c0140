"""Runs to look at, and the dashboard over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from dash import Dash
from flask.testing import FlaskClient

from app.dashboard import build_app
from app.services import Services
from tests.app.dashboard.fake_models import FakeModels
from tests.app.dashboard.serving import served
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.synthetic_runs import write_synthetic_runs

TOKENS = 60


@dataclass(frozen=True)
class RunIds:
    """Ids of the runs of the session's store."""

    softmax: str
    gated: str
    bdh: str
    long: str

    def each(self) -> tuple[str, ...]:
        return self.softmax, self.gated, self.bdh


@pytest.fixture(scope="session")
def run_store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return RunStore(tmp_path_factory.mktemp("dashboard-runs"))


@pytest.fixture(scope="session")
def run_ids(run_store: RunStore) -> RunIds:
    return RunIds(*write_synthetic_runs(run_store, tokens=TOKENS, long=True))


@pytest.fixture(scope="session")
def services(run_store: RunStore, run_ids: RunIds) -> Services:
    jobs = JobQueue()
    return Services(run_store, jobs, FakeModels(run_store, jobs))


@pytest.fixture(scope="session")
def dashboard(run_store: RunStore, run_ids: RunIds) -> Dash:
    jobs = JobQueue()
    return build_app(run_store, jobs, FakeModels(run_store, jobs))


@pytest.fixture
def client(dashboard: Dash) -> FlaskClient:
    return dashboard.server.test_client()


@pytest.fixture(scope="session")
def browser_store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The store behind `address`: its own, so that starting and deleting runs disturbs no other test."""
    return RunStore(tmp_path_factory.mktemp("browser-runs"))


@pytest.fixture(scope="session")
def address(browser_store: RunStore) -> Iterator[str]:
    """Where a running dashboard answers."""
    write_synthetic_runs(browser_store, tokens=TOKENS)
    jobs = JobQueue()
    with served(Services(browser_store, jobs, FakeModels(browser_store, jobs, seconds=0.4))) as running:
        yield running
