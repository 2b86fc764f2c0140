"""A dashboard that runs while a test looks at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from app.dashboard import build_app, make_dashboard_server
from app.services import Services
from tests.app.dashboard.fake_models import FakeModels
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore


@dataclass(frozen=True)
class Stage:
    """A running dashboard over a store with one run to begin with."""

    address: str
    services: Services
    run: str


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """An empty store for one file of tests, which import this and `server`."""
    return RunStore(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(store: RunStore) -> Iterator[str]:
    """The address of a dashboard over `store`."""
    jobs = JobQueue()
    with served(Services(store, jobs, FakeModels(store, jobs))) as address:
        yield address


@contextmanager
def served(services: Services) -> Iterator[str]:
    """The address of a running dashboard over the services, which ends with the block."""
    server = make_dashboard_server(build_app(services.store, services.jobs, services.models))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()
        services.jobs.shutdown(timeout=30)
