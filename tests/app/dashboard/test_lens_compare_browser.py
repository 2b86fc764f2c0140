"""The Lens and Compare pages in a real browser, over shipped models: read, pin a cell, zoom; two maps that move together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from app.services import Services
from tests.app.dashboard.bdh_runs import finished, real_services
from tests.app.dashboard.browsing import visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401
from workbench.lab.factors import LayerFactors

pytestmark = pytest.mark.browser
TEXT, OTHER = "The old keeper climbed the stairs.", "The old keeper climbed the tower."


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services, _ = real_services(tmp_path_factory.mktemp("lens-browser"))
    run = finished(services, services.models.start_trace("gpt-english", TEXT, {}))
    with served(services) as address:
        yield Stage(address, services, run)


def model_trace(services: Services, name: str, text: str) -> str:
    return finished(services, services.models.start_trace(name, text, {}))


def test_lens(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, f"/lens?run={stage.run}&q=20", (browser, "lens-heads")) as window:
        page = window.page
        playwright.expect(page.locator("#panel-lens-grid")).to_contain_text("Nothing measured yet")
        page.locator("#lens-answer").fill("the")
        page.click("#lens-start")
        playwright.expect(page.locator("#lens-message")).to_contain_text("3 tokens")
        page.locator("#lens-answer").fill("e")
        page.locator("#lens-wrong").fill("a")
        page.click("#lens-start")
        found = stage.services.open_run(wait_for_result(window))
        playwright.expect(page.locator("#panel-lens-parts")).to_contain_text("logit ‘e’ − logit ‘a’ after token 20")
        window.hover("lens-grid", 2, 7)
        chance = float(np.exp(found.array("logit.top_log_probs")[2, 7, 0]))
        playwright.expect(page.locator(".readout b")).to_have_text(f"{chance:.6g}")
        window.click("lens-grid", 1, 9)
        window.wait_for_view(query=9, depth=1)
        playwright.expect(page.locator("#panel-lens-cell .panel-foot")).to_contain_text("after layer 0, at 9")
        page.evaluate("workbench.change({cols: '4-16'})")
        window.wait_for_view(columns=(4, 16))
        window.wait_for_picture("lens-grid", "cols=4-16")
        playwright.expect(page.locator("#panel-lens-grid .textpoint text").first).to_be_attached()


def test_compare(stage: Stage, desk: playwright.BrowserContext) -> None:  # noqa: F811
    """The text of B differs in one word, so its parts are not the tokens of A: pointer, pins and zoom go through the alignment."""
    second = model_trace(stage.services, "retnet-english", OTHER)
    with visit(stage, desk, f"/compare?run={stage.run}&b={second}&layer=1&head=2") as window:
        page = window.page
        playwright.expect(page.locator("#panel-compare-alignment")).to_contain_text(
            "without a counterpart: 6 of 34 tokens of A, 5 of 33 of B"
        )
        playwright.expect(page.locator("#compare-strip .is-alone")).to_have_count(11)
        factors = [LayerFactors.from_run(stage.services.open_run(run), 1) for run in (stage.run, second)]
        readout = page.locator(".readout b")
        for panel, pattern in (("compare-a", factors[0]), ("compare-b", factors[1])):
            window.hover(panel, 20, 6)
            playwright.expect(readout).to_have_text(f"{pattern.value(2, 20, 6):.6g}")
            assert page.locator(".mark-hover").count() >= 6  # a row and a column on all three maps
        window.click("compare-b", 38, 3)  # the full stop: part 38, token 33 of A
        window.wait_for_view(query=33, key=3)
        page.evaluate("workbench.change({urows: '10-30', ucols: '0-20'})")
        for panel in ("compare-a", "compare-b", "compare-difference"):
            window.wait_for_picture(panel, "urows=10-30", "ucols=0-20")
        page.locator("[data-action=whole-shared]").click()
        window.wait_for_view(shared_rows=None, shared_columns=None)
        window.click("compare-alike", 1, 6)
        window.wait_for_view(layer=0, head=1, head_b="1.2")
        page.click("#compare-start")
        wait_for_result(window)
        playwright.expect(page.locator("#panel-compare-kl")).to_contain_text("mean KL(A ‖ B)")
        page.set_viewport_size({"width": 375, "height": 800})
        page.wait_for_function("() => document.documentElement.scrollWidth <= 375")
