"""Intervene and Patching in a real browser: a line from the form, a run, a cell of a grid that goes into the basket, ablate in place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import models
from tests.app.dashboard.bdh_runs import shipped_services
from tests.app.dashboard.browsing import visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services = shipped_services(tmp_path_factory.mktemp("intervene-browser"))
    run = trace_run(models.load("gpt-english"), "the cat sat on the mat", services.store).id
    with served(services) as address:
        yield Stage(address, services, run)


def test_a_basket_from_the_form(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, f"/intervene?run={stage.run}&do=zero%20mlp%201", (browser, "intervene-effects")) as window:
        page, expect = window.page, playwright.expect
        rows = page.locator("#basket-rows")
        expect(rows).to_contain_text("zero mlp 1")
        expect(page.locator("#add-words")).to_contain_text("Put zeros in its place")
        page.fill("#add-units", "2")
        page.fill("#add-layer", "1")
        page.click("#add-line")
        expect(rows).to_contain_text("zero head 1.2")
        window.wait_for_view(basket="zero mlp 1\nzero head 1.2")
        page.get_by_label("Remove: zero mlp 1").click()
        expect(rows).not_to_contain_text("zero mlp 1")
        window.wait_for_view(basket="zero head 1.2")
        page.fill("#intervene-draws", "2")
        page.click("#intervene-start")
        wait_for_result(window)
        expect(page.locator("#panel-intervene-effects .panel-foot")).to_contain_text("zero head 1.2")
        page.click("#basket-python")
        expect(page.locator("#sheet-content")).to_contain_text("workbench intervene gpt-english")


def test_a_cell_goes_into_the_basket(stage: Stage, desk: playwright.BrowserContext) -> None:  # noqa: F811
    with visit(stage, desk, f"/patching?run={stage.run}") as window:
        page, expect = window.page, playwright.expect
        expect(page.locator("#patching-cost")).to_contain_text("runs over")
        page.click("#patching-start")
        wait_for_result(window)
        expect(page.locator("#panel-patching-head .panel-foot")).to_contain_text("correlation of estimate and exact")
        page.locator("#panel-patching-head .nsewdrag").scroll_into_view_if_needed()
        box = page.locator("#panel-patching-head .nsewdrag").bounding_box()
        assert box is not None
        place = (
            box["x"] + box["width"] * 0.625,
            box["y"] + box["height"] * 0.625,
        )  # of 4 × 4 cells: layer 1 counts from below, head 2
        page.mouse.move(place[0] - 4, place[1])
        page.mouse.move(*place)
        page.mouse.click(*place)
        window.wait_for_view(
            page="intervene", basket="patch head 1.2 from: In the morning she sai", prompts="In the morning she cam"
        )
        expect(page.locator("#basket-rows")).to_contain_text("patch head 1.2")
        window.open(f"/attention?run={stage.run}&layer=1&head=2")
        page.click("#ablate-head")
        expect(page.locator("#ablate-result")).to_contain_text("full result")
        expect(page.locator("#ablate-result")).to_contain_text("zero head 1.2")
