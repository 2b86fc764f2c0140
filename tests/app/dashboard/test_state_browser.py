"""The State page of layers that carry several things, in a real browser."""

from __future__ import annotations

import pytest

import models
from tests.app.dashboard.serving import server, store  # noqa: F401
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser
TEXT = "watch it hatch"


def test_another_state_is_chosen_and_the_retention_matrix_moves_time(
    desk: playwright.BrowserContext,  # noqa: F811
    server: str,  # noqa: F811
    store: RunStore,  # noqa: F811
) -> None:
    run = trace_run(models.build("mlstm"), TEXT, store)
    window = Window(desk, server)
    window.open(f"/state?v=1&run={run.id}&layer=1&track=2.1&srows=0-3")
    expect, page = playwright.expect, window.page
    expect(page.locator("#panel-spectrum")).to_be_visible()
    page.get_by_label("State", exact=True).first.click()
    page.get_by_role("option", name="normaliser", exact=True).click()
    window.wait_for_view(slot="normaliser", tracked=(), state_rows=None, layer=1)
    expect(page.locator("#panel-state-over-time .panel-foot")).to_contain_text("shown: normaliser")
    expect(page.locator("#panel-spectrum")).to_have_count(0)  # a vector has none
    window.settle()
    window.click("retention", 6, 2)
    window.wait_for_view(position=6, slot="normaliser")
    expect(page.locator("#time-token")).to_contain_text("after 6")
    page.go_back()
    window.wait_for_view(position=None, slot="normaliser")
    page.go_back()
    window.wait_for_view(slot="", tracked=((2, 1),), state_rows=(0, 3))
    expect(page.locator("#panel-state .panel-foot")).to_contain_text("shown: main state")
    assert not window.complaints
    page.close()


def test_a_layer_with_one_state_has_no_chooser(desk: playwright.BrowserContext, server: str, store: RunStore) -> None:  # noqa: F811
    run = trace_run(models.build("gla"), TEXT, store)
    window = Window(desk, server)
    window.open(f"/state?v=1&run={run.id}&slot=normaliser")
    playwright.expect(window.page.locator("#panel-state")).to_be_visible()
    window.wait_for_view(slot="")  # an address that names another layer's state is mended
    playwright.expect(window.page.get_by_label("State", exact=True)).to_have_count(0)
    assert not window.complaints
    window.page.close()
