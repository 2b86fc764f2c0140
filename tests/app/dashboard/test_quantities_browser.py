"""The Quantities page in a real browser: panels follow the layer, heads their head, and a click pins a token."""

from __future__ import annotations

import pytest

import models
from tests.app.dashboard.serving import server, store  # noqa: F401
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser
TEXT = "watch it hatch"


def test_the_panels_are_those_of_the_layer(desk: playwright.BrowserContext, server: str, store: RunStore) -> None:  # noqa: F811
    run = trace_run(models.build("routing-transformer"), TEXT, store)
    window = Window(desk, server)
    window.open(f"/quantities?v=1&run={run.id}")
    expect, page = playwright.expect, window.page
    expect(page.locator("#panel-no-quantity")).to_contain_text("Layers that have special quantities: 1.")
    page.get_by_label("Layer", exact=True).first.click()
    page.get_by_role("option", name="1 · attention").click()
    window.wait_for_view(layer=1)
    expect(page.locator("#title-quantity-0")).to_have_text("Clusters of queries")
    expect(page.locator("#title-quantity-1")).to_have_text("Clusters of keys")
    expect(page.locator("#panel-quantity-1 .panel-foot")).to_contain_text("head 0")
    page.get_by_label("Head", exact=True).first.click()
    page.get_by_role("option", name="2", exact=True).click()
    window.wait_for_view(head=2)
    expect(page.locator("#panel-quantity-1 .panel-foot")).to_contain_text("head 2")
    window.settle()
    window.click("quantity-1", 1, 5)
    window.wait_for_view(query=5, layer=1)
    assert not window.complaints
    page.close()


def test_what_belongs_to_the_model_as_a_whole(desk: playwright.BrowserContext, server: str, store: RunStore) -> None:  # noqa: F811
    run = trace_run(models.build("universal-transformer"), TEXT, store)
    window = Window(desk, server)
    window.open(f"/quantities?v=1&run={run.id}")
    expect, page = playwright.expect, window.page
    expect(page.locator("#title-quantity-0")).to_have_text("Halting")
    expect(page.locator("#panel-quantity-1 .panel-foot")).to_contain_text("the whole model")
    page.locator("#panel-quantity-1").get_by_label("Show as table: Weight of every step (ponder map)").click()
    expect(page.locator("#sheet-content")).to_be_visible()
    assert not window.complaints
    page.close()
