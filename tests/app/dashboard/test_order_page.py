"""The Order page: what its form starts, what its panels draw, and what it refuses in words."""

from __future__ import annotations

import numpy as np
import pytest

import models
from app.measure.common import FormError
from app.measure.order import EXAMPLE, start_order
from app.model_service import WorkbenchModels
from app.pages import order as page
from app.services import Scene, Services
from app.view_state import ViewState
from probes.document_order import plan_order
from tests.app.dashboard.panel_checks import check_panels
from tests.app.dashboard.test_pages import text_of
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

PROMPT = "The cat sat.\nA dog ran.\n\nRain fell.\nWho sat? The "


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Services, Scene]:
    store, jobs = RunStore(tmp_path_factory.mktemp("runs")), JobQueue()
    services = Services(store, jobs, WorkbenchModels(store, jobs))
    run = trace_run(models.load("gpt-english"), "abc", store)
    return services, services.scene(ViewState(run=run.id))


def finished(services: Services, scene: Scene, **changes: object) -> str:
    asked = {"prompt": PROMPT, "answer": "c", "rounds": 2, "bases": "10000,17500", **changes}
    job = start_order(services, scene, **asked)  # type: ignore[arg-type]
    status = services.jobs.wait(job.id, 120)
    assert status.state == "done", status
    return str(status.result)


def test_the_form_measures_what_python_measures(own: tuple[Services, Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    services, scene = own
    result = finished(services, scene)
    run = services.store.open(result)
    found = plan_order(
        models.load("gpt-english"), ["The cat sat.\n", "A dog ran.\n", "Rain fell.\n"], "Who sat? The ", answer="c", rounds=2,
        bases=[10000.0, 17500.0],
    )  # fmt: skip
    np.testing.assert_array_equal(run.array("mass"), found.mass)
    view = scene.view.change(result=result)
    check_panels(services, view, ("order-mass", "order-answers"), monkeypatch)
    words = text_of(page.PAGE.build(services, services.scene(view)))
    assert "attention sorting + buckets" in words and "Rain fell." in words
    order = " ".join(map(str, found.orders["attnrank"]))
    assert order in words


def test_without_a_result_the_page_has_a_form(own: tuple[Services, Scene]) -> None:
    services, scene = own
    words = text_of(page.PAGE.build(services, scene))
    assert "Documents and question" not in EXAMPLE and "Orders" not in words and "A prompt" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"prompt": "one\ntwo"}, "1 documents"), ({"prompt": ""}, "nothing to read"), ({"rounds": 0}, "Rounds is 0"),
     ({"bases": "x"}, "Bases: 'x'"), ({"prompt": "a\n" * 30 + "b"}, "30 documents")],
)  # fmt: skip
def test_a_bad_form_is_refused_in_words(own: tuple[Services, Scene], changes: dict[str, object], words: str) -> None:
    services, scene = own
    asked = {"prompt": PROMPT, "answer": "c", "rounds": 2, "bases": "", **changes}
    with pytest.raises(FormError, match=words):
        start_order(services, scene, **asked)  # type: ignore[arg-type]
