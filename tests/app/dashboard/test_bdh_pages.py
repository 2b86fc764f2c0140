"""The BDH pages in a real browser, over a shipped model: search, follow, share the address, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from app.services import Services
from tests.app.dashboard.bdh_runs import real_services, served
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
    with served(services) as address:
        yield Stage(address, services, run)


def wait_for_result(window: Window) -> str:
    """Wait until the job led to its result; its id."""
    window.page.wait_for_function("() => new URLSearchParams(location.search).get('result')")
    window.settle()
    return window.view.result


def without_wheel(complaints: list[str]) -> list[str]:
    """cytoscape warns of any wheel sensitivity, and its Dash component always sets one."""
    return [each for each in complaints if "wheel sensitivity" not in each]


def on_a_phone(stage: Stage, browser: playwright.Browser, path: str, panel: str) -> None:  # noqa: F811
    """Nothing sticks out at 375 pixels in the dark scheme, and the permalink opens what it names."""
    context = browser.new_context(viewport={"width": 375, "height": 800}, reduced_motion="reduce")
    context.add_cookies([{"name": "workbench_scheme", "value": "dark", "url": stage.address}])
    window = Window(context, stage.address)
    window.open(path)
    window.page.wait_for_selector(f"#panel-{panel}")
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert without_wheel(window.complaints) == []
    context.close()


def test_synapses(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/synapses")
    playwright.expect(page.locator("#panel-synapse-strength")).to_contain_text("No synapse is followed yet")
    page.click("#synapse-search-start")
    result = wait_for_result(window)
    page.locator("#synapse-grid .ag-row[row-index='1'] .cell-link").first.click()
    page.wait_for_selector("#synapse-chips .chip")
    window.settle()
    (followed,) = window.view.synapses
    assert list(followed) == stage.services.open_run(result).array("addresses")[1].tolist()
    playwright.expect(page.locator("#panel-synapse-strength .scatterlayer path").first).to_be_attached()
    playwright.expect(page.locator("#synapse-says")).to_contain_text("Source neuron")
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


def test_graph(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/graph")
    playwright.expect(page.locator("#panel-graph-edges")).to_contain_text("Nothing measured yet")
    page.get_by_label("Draws per baseline").fill("2")
    playwright.expect(page.get_by_label("Noise quantile")).to_be_disabled()
    page.get_by_label("Edges", exact=True).fill("200")
    page.click("#graph-start")
    result = wait_for_result(window)
    assert stage.services.open_run(result).manifest["settings"]["threshold"] == {"edges": 200}
    playwright.expect(page.locator("#graph-drawing canvas").first).to_be_attached()
    playwright.expect(page.locator("#panel-graph-modularity")).to_contain_text("random: Q")
    assert without_wheel(window.complaints) == []
    address = page.url.removeprefix(stage.address)
    page.close()
    on_a_phone(stage, browser, address, "graph-hubs")


def test_sparsity(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/sparsity")
    playwright.expect(page.locator("#panel-sparsity-tokens")).to_contain_text("Nothing measured yet")
    page.click("#sparsity-start")
    wait_for_result(window)
    playwright.expect(page.locator("#panel-sparsity-surprise")).to_contain_text("layers beyond chance")
    playwright.expect(page.locator("#panel-sparsity-octiles .scatterlayer path").first).to_be_attached()
    assert window.complaints == []
    address = page.url.removeprefix(stage.address)
    page.close()
    on_a_phone(stage, browser, address, "sparsity-layers")


def test_concepts(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/concepts")
    playwright.expect(page.locator("#concept-own")).to_be_hidden()  # of labelled concepts the sentences are drawn
    for label, value in (("Sentences of each set", "12"), ("Target layer (empty: all)", "1"), ("Target head (empty: all)", "0"),
                         ("Shuffles", "1"), ("Causal check: matched draws", "0")):  # fmt: skip
        page.get_by_label(label).fill(value)
    page.click("#concept-start")
    wait_for_result(window)
    playwright.expect(page.locator("#panel-concept-rivals")).to_contain_text("linear probe")
    playwright.expect(page.locator("#panel-concept-causal")).to_contain_text("not asked for")
    address = page.url.removeprefix(stage.address)
    page.locator("#concept-grid .ag-row[row-index='0'] .cell-link").click()
    window.wait_for_view(page="synapses")
    assert len(window.view.synapses) == 1 and window.complaints == []
    page.close()
    on_a_phone(stage, browser, address, "concept-traces")


def test_interventions(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open(f"/intervene?run={stage.run}")
    page.locator("#intervene-basket").fill("freeze sinc 30")
    page.click("#intervene-start")
    page.wait_for_function("() => document.getElementById('intervene-message').textContent.includes('freeze since 40')")
    page.locator("#intervene-basket").fill("freeze since 30")
    page.locator("#intervene-draws").fill("2")
    page.click("#intervene-start")
    wait_for_result(window)
    playwright.expect(page.locator("#panel-intervene-loss")).to_contain_text("freeze since 30")
    assert window.complaints == []
    address = page.url.removeprefix(stage.address)
    page.close()
    on_a_phone(stage, browser, address, "intervene-random")


def test_merge(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    window = Window(desk, stage.address)
    page = window.page
    window.open("/merge")
    page.click("#merge-start")  # a model with itself
    wait_for_result(window)
    playwright.expect(page.locator("#panel-merge-badge")).to_contain_text("identity")
    playwright.expect(page.locator("#panel-merge-losses")).to_contain_text("merge: ")
    assert window.complaints == []
    address = page.url.removeprefix(stage.address)
    page.close()
    on_a_phone(stage, browser, address, "merge-heritage")
