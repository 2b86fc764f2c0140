"""The Probes and Features pages in a real browser: start, choose, follow to another page; on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from app.measure.features import start_training
from tests.app.dashboard.bdh_runs import finished, shipped_services
from tests.app.dashboard.browsing import on_a_phone, visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401
from tests.app.dashboard.test_features_page import FORM

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services = shipped_services(tmp_path_factory.mktemp("measured"))
    made = finished(services, start_training(services, **{**FORM, "control": []}))
    with served(services) as address:
        yield Stage(address, services, made)


def test_probes(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/probes") as window:
        page = window.page
        playwright.expect(page.locator("#panel-probe-induction")).to_contain_text("Nothing measured yet")
        page.locator("#probe-name").click()
        page.get_by_role("option", name="Induction circuit").click()
        for words in (
            "census of habits",
            "attention sinks",
            "retrieval heads",
            "queries that near keys answer",
            "attention basin",
        ):
            page.get_by_label(words).uncheck()
        page.get_by_label("Tokens of each").fill("40")
        page.get_by_label("Sequences", exact=True).fill("4")
        page.click("#probe-start")
        result = wait_for_result(window)
        assert stage.services.open_run(result).manifest["settings"]["probes"] == ["induction"]
        page.wait_for_selector("#probe-grid .ag-row[row-index='0']")
        box = page.locator("#panel-probe-induction .nsewdrag").first.bounding_box()
        assert box is not None  # the first map: previous token, two layers of four heads
        at = (box["x"] + box["width"] * 1.5 / 4, box["y"] + box["height"] * 0.5 / 2)
        page.mouse.move(at[0] - 4, at[1])
        page.mouse.move(*at)
        page.mouse.click(*at)
        page.wait_for_function("() => new URLSearchParams(location.search).get('mh') === '0.1'")
        playwright.expect(page.locator("#probe-head")).to_contain_text("Head 0.1")
        address = page.url.removeprefix(stage.address)
        page.locator("#probe-grid .ag-row[row-index='0'] .cell-link", has_text="Attention").click()
        page.wait_for_function("() => location.pathname === '/attention'")  # after a trace of what was read
        window.settle()
        row = max(
            range(8), key=lambda head: float(stage.services.open_run(result).array("induction.induction").ravel()[head])
        )
        assert (window.view.layer, window.view.head) == divmod(row, 4)
    on_a_phone(stage, browser, address, "probe-list")


def test_features(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/features", (browser, "feature-contexts")) as window:
        page = window.page
        playwright.expect(page.locator("#features-estimate")).to_contain_text("MB of memory")
        page.click("#feature-folder-start")  # the dictionary that lies in the runs root
        result = wait_for_result(window)
        page.locator("#feature-grid .ag-row[row-index='1'] .cell-link").click()
        page.wait_for_function("() => new URLSearchParams(location.search).get('feature')")
        window.settle()
        chosen = window.view.feature
        assert stage.services.open_run(result).array("density")[chosen] > 0
        playwright.expect(page.locator("#feature-chosen")).to_contain_text(f"Feature {chosen}")
        playwright.expect(page.locator("#feature-texts .feature-token.is-focus").first).to_be_attached()
        page.locator("#feature-search").fill("zzzz no such token")
        playwright.expect(page.locator("#feature-grid .ag-row")).to_have_count(0)
