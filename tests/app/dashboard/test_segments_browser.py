"""The Segments page in a real browser: start, choose a boundary, follow it to the State page; on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.app.dashboard.bdh_runs import shipped_services
from tests.app.dashboard.browsing import on_a_phone, visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401

pytestmark = pytest.mark.browser
TEXT = "The keeper lit the lamp. The keeper lit the lamp again."


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services = shipped_services(tmp_path_factory.mktemp("segments"))
    with served(services) as address:
        yield Stage(address, services, "")


def test_segments(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/segments") as window:
        page, expect = window.page, playwright.expect
        expect(page.locator("#panel-segments-loss")).to_contain_text("Nothing measured yet")
        page.locator("#segments-name").click()
        page.get_by_role("option", name="Induction circuit").click()
        page.locator("#segments-text").fill(TEXT)
        page.locator("#segments-length").fill("16")
        page.click("#segments-start")
        run = stage.services.open_run(wait_for_result(window))
        assert run.manifest["settings"]["length"] == 16 and run.manifest["text"] == TEXT
        cut = np.array(run.manifest["results"]["lost_by_layer"]["cut"], float)
        layer, segment = np.unravel_index(int(np.nanargmax(cut)), cut.shape)
        expect(page.locator("#segments-boundary")).to_contain_text(f"Layer {layer} hands to segment {segment}")
        expect(page.locator("#panel-segments-slots .nsewdrag").first).to_be_visible()
        area = page.locator("#panel-segments-layer-cut .nsewdrag").first
        area.scroll_into_view_if_needed()
        window.settle()
        box = area.bounding_box()
        assert box is not None  # two layers, three boundaries
        at = (box["x"] + box["width"] * 2.5 / 3, box["y"] + box["height"] * 0.5 / 2)
        page.mouse.move(at[0] - 4, at[1])
        page.mouse.move(*at)
        page.mouse.click(*at)
        page.wait_for_function("() => new URLSearchParams(location.search).get('mh') === '0.3'")
        expect(page.locator("#segments-boundary")).to_contain_text("Layer 0 hands to segment 3")
        address = page.url.removeprefix(stage.address)
        page.click("#segments-state")
        page.wait_for_function("() => location.pathname === '/state'")  # after a trace of what was read
        window.settle()
        assert (window.view.layer, window.view.position) == (0, 47) and page.evaluate("window.scrollY") == 0
        assert stage.services.open_run(window.view.run).manifest["text"] == TEXT
    on_a_phone(stage, browser, address, "segments-layer-cut")


def test_a_text_that_is_too_short_says_how_long_it_must_be(stage: Stage, desk: playwright.BrowserContext) -> None:  # noqa: F811
    with visit(stage, desk, "/segments") as window:
        page, expect = window.page, playwright.expect
        page.locator("#segments-text").fill("")
        page.click("#segments-start")
        expect(page.locator("#segments-message")).to_contain_text("nothing to read")
        page.locator("#segments-text").fill("short")
        page.click("#segments-start")
        expect(page.get_by_text("Expected at least 66")).to_be_visible()
