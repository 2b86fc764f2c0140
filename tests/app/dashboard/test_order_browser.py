"""The Order page in a real browser: a prompt is measured, the orders and maps are there, a mistake is said, and a phone shows it too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import models
from app.model_service import WorkbenchModels
from app.services import Services
from tests.app.dashboard.browsing import visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser
PROMPT = "The cat sat.\nA dog ran.\nRain fell.\nWho sat? The "


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    store, jobs = RunStore(tmp_path_factory.mktemp("order-browser")), JobQueue()
    services = Services(store, jobs, WorkbenchModels(store, jobs))
    run = trace_run(models.load("gpt-english"), "abc", store)
    with served(services) as address:
        yield Stage(address, services, run.id)


def test_a_prompt_is_measured(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    expect = playwright.expect
    with visit(stage, desk, f"/order?v=1&run={stage.run}", (browser, "order-mass")) as window:
        page = window.page
        expect(page.locator("#panel-order-mass")).to_contain_text("Nothing measured yet")
        page.fill("#order-prompt", "one\ntwo")
        page.click("#order-start")
        expect(page.locator("#order-message")).to_contain_text("There are 1 documents before the last line")
        page.fill("#order-prompt", PROMPT)
        page.fill("#order-answer", "c")
        page.fill("#order-rounds", "1")
        page.click("#order-start")
        result = wait_for_result(window)
        orders = stage.services.open_run(result).manifest["results"]["orders"]
        assert sorted(orders["attention sorting"]) == [0, 1, 2]
        row = page.locator("#panel-order-plans tr", has_text="attention sorting").first
        expect(row).to_contain_text(" ".join(map(str, orders["attention sorting"])))
        expect(page.locator("#panel-order-plans ol")).to_contain_text("Rain fell.")
        expect(page.locator("#panel-order-mass .nsewdrag").first).to_be_attached()
        page.locator("#panel-order-mass").get_by_role("button", name="Show as table").click()
        expect(page.locator("#sheet-content .value-scroll")).to_be_visible()
