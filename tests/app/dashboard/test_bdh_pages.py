"""The BDH pages in a real browser, over a shipped model: search, follow, share the address, on a desk and on a phone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from app.dashboard import build_app, make_dashboard_server
from app.services import Services
from tests.app.dashboard.bdh_runs import real_services
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401

pytestmark = pytest.mark.browser


@dataclass(frozen=True)
class Stage:
    """A running dashboard over a store with one trace."""

    address: str
    services: Services
    run: str


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services, run = real_services(tmp_path_factory.mktemp("bdh-browser"))
    server = make_dashboard_server(build_app(services.store, services.jobs, services.models))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Stage(f"http://127.0.0.1:{server.port}", services, run)
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()
    services.jobs.shutdown(timeout=30)


def wait_for_result(window: Window) -> str:
    """Wait until the job led to its result; its id."""
    window.page.wait_for_function("() => new URLSearchParams(location.search).get('result')")
    window.settle()
    return window.view.result


def on_a_phone(stage: Stage, browser: playwright.Browser, path: str, panel: str) -> None:  # noqa: F811
    """Nothing sticks out at 375 pixels in the dark scheme, and the permalink opens what it names."""
    context = browser.new_context(viewport={"width": 375, "height": 800}, reduced_motion="reduce")
    context.add_cookies([{"name": "workbench_scheme", "value": "dark", "url": stage.address}])
    window = Window(context, stage.address)
    window.open(path)
    window.page.wait_for_selector(f"#panel-{panel}")
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert window.complaints == []
    context.close()


def test_synapses(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/synapses")
    assert "No synapse is followed yet" in page.locator("#panel-synapse-strength").inner_text()
    page.click("#synapse-search-start")
    result = wait_for_result(window)
    page.locator("#synapse-grid .ag-row[row-index='1'] .cell-link").first.click()
    page.wait_for_selector("#synapse-chips .chip")
    window.settle()
    (followed,) = window.view.synapses
    assert list(followed) == stage.services.open_run(result).array("addresses")[1].tolist()
    assert page.locator("#panel-synapse-strength .scatterlayer path").count() > 0
    assert "Source neuron" in page.locator("#synapse-says").inner_text()
    page.click("#synapse-follow")  # layer 0, neuron 0 to layer 1, neuron 0
    window.wait_for_view(synapses=(followed, (0, 0, 0, 1, 0, 0)))
    page.locator("#synapse-chips button").nth(1).click()
    window.wait_for_view(synapses=(followed,))
    page.get_by_label("Show as table: Strength |C|").click()
    page.wait_for_selector("#sheet-content .value-table")
    assert window.complaints == []
    address = page.url.removeprefix(stage.address)
    page.close()
    on_a_phone(stage, browser, address, "synapse-authors")
