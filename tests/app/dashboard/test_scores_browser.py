"""Scores by term on the Attention page, in a real browser: chosen, drawn, read under the pointer, kept in the address."""

from __future__ import annotations

import numpy as np
import pytest

import models
from tests.app.dashboard.serving import server, store  # noqa: F401
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from workbench.lab.runs import RunStore
from workbench.lab.score_maps import ScoreMaps
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser


def test_a_term_is_chosen_and_read(desk: playwright.BrowserContext, server: str, store: RunStore) -> None:  # noqa: F811
    run = trace_run(models.build("t5-bias"), "watch it hatch", store)
    window = Window(desk, server)
    window.open(f"/attention?v=1&run={run.id}")
    expect, page = playwright.expect, window.page
    expect(page.locator("#panel-score-row .legend")).to_contain_text("bias.t5")
    page.get_by_label("Map", exact=True).first.click()
    page.get_by_role("option", name="bias.t5").click()
    window.wait_for_view(score_map="bias.t5")
    expect(page.locator("#panel-pattern .infolayer")).to_contain_text("bias.t5, nats")
    expect(page.locator("#panel-pattern .panel-foot")).to_contain_text("scores = content + bias.t5")
    window.settle()
    window.click("pattern", 9, 4)
    window.wait_for_view(query=9, key=4, score_map="bias.t5")
    expect(page.locator("#panel-score-row .panel-foot")).to_contain_text("pinned: token 9")
    value = ScoreMaps.from_run(run, 0).at(0, 9, 4)["bias.t5"]
    page.locator("#panel-pattern").get_by_role("button", name="Show as table").click()
    expect(page.locator("#sheet-content .value-scroll")).to_contain_text(f"{np.abs(value):.4g}"[:5])
    assert not window.complaints
    page.close()


def test_a_layer_without_scores_has_no_choice(desk: playwright.BrowserContext, server: str, store: RunStore) -> None:  # noqa: F811
    run = trace_run(models.build("retnet"), "watch it hatch", store)
    window = Window(desk, server)
    window.open(f"/attention?v=1&run={run.id}&map=bias.t5")
    playwright.expect(window.page.locator("#panel-pattern .infolayer")).to_contain_text("weight")
    playwright.expect(window.page.get_by_label("Map", exact=True)).to_have_count(0)
    playwright.expect(window.page.locator("#panel-score-row")).to_have_count(0)
    assert not window.complaints
    window.page.close()
