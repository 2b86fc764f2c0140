"""The BDH pages in a real browser, over a shipped model: search, follow, share the address, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.app.dashboard.bdh_runs import real_services
from tests.app.dashboard.browsing import on_a_phone, visit, wait_for_result
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import browser, desk, playwright  # noqa: F401

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    torch.set_num_threads(1)
    services, run = real_services(tmp_path_factory.mktemp("bdh-browser"))
    with served(services) as address:
        yield Stage(address, services, run)


def test_synapses(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/synapses", (browser, "synapse-authors")) as window:
        page = window.page
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


def test_reads(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, f"/reads?run={stage.run}&q=40", (browser, "read-pairs")) as window:
        page, expect = window.page, playwright.expect
        expect(page.locator("#panel-read-map")).to_contain_text("Nothing measured yet")
        page.fill("#reads-symbol", "no")
        page.click("#reads-start")
        expect(page.locator("#reads-message")).to_contain_text("one character")
        page.fill("#reads-symbol", "t")
        page.click("#reads-start")
        wait_for_result(window)
        expect(page.locator("#panel-read-map .panel-foot")).to_contain_text("logit of ‘t’ after token 40")
        expect(page.locator("#panel-read-strip .token[style]").first).to_be_attached()
        expect(page.locator("#read-says")).to_contain_text("excited by")
        window.click("read-map", 6, 12)  # row 6: layer 1, head 2
        window.wait_for_view(layer=1, head=2, key=12)
        expect(page.locator("#panel-read-pairs .panel-foot")).to_contain_text("layer 1, head 2 reads token 12")


def test_graph(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/graph", (browser, "graph-hubs")) as window:
        page = window.page
        playwright.expect(page.locator("#panel-graph-edges")).to_contain_text("Nothing measured yet")
        page.get_by_label("Draws per baseline").fill("2")
        playwright.expect(page.get_by_label("Noise quantile")).to_be_disabled()
        page.get_by_label("Edges", exact=True).fill("200")
        page.click("#graph-start")
        result = wait_for_result(window)
        assert stage.services.open_run(result).manifest["settings"]["threshold"] == {"edges": 200}
        playwright.expect(page.locator("#graph-drawing canvas").first).to_be_attached()
        playwright.expect(page.locator("#panel-graph-modularity")).to_contain_text("random: Q")
        with page.expect_download() as drawing:
            page.click("#graph-png")
        assert drawing.value.suggested_filename == f"{result}-drawing.png"


def test_sparsity(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/sparsity", (browser, "sparsity-layers")) as window:
        page = window.page
        playwright.expect(page.locator("#panel-sparsity-tokens")).to_contain_text("Nothing measured yet")
        page.click("#sparsity-start")
        wait_for_result(window)
        playwright.expect(page.locator("#panel-sparsity-surprise")).to_contain_text("layers beyond chance")
        playwright.expect(page.locator("#panel-sparsity-octiles .scatterlayer path").first).to_be_attached()
        playwright.expect(page.locator("#panel-sparsity-training .panel-foot")).to_contain_text(
            "y 2"
        )  # a quarter, untrained
        window.hover("sparsity-raster", 6, 12)
        playwright.expect(page.locator(".readout")).to_contain_text("1·2")


def test_concepts(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/concepts") as window:
        page = window.page
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
        assert len(window.view.synapses) == 1
    on_a_phone(stage, browser, address, "concept-traces")


def test_interventions(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, f"/intervene?run={stage.run}", (browser, "intervene-random")) as window:
        page = window.page
        page.locator("#intervene-basket").fill("freeze sinc 30")
        page.click("#intervene-start")
        page.wait_for_function(
            "() => document.getElementById('intervene-message').textContent.includes('freeze since 40')"
        )
        page.locator("#intervene-basket").fill("freeze since 30")
        page.locator("#intervene-draws").fill("2")
        page.click("#intervene-start")
        wait_for_result(window)
        playwright.expect(page.locator("#panel-intervene-loss")).to_contain_text("freeze since 30")


def test_merge(stage: Stage, desk: playwright.BrowserContext, browser: playwright.Browser) -> None:  # noqa: F811
    with visit(stage, desk, "/merge", (browser, "merge-heritage")) as window:
        page = window.page
        page.click("#merge-start")  # a model with itself
        wait_for_result(window)
        playwright.expect(page.locator("#panel-merge-badge")).to_contain_text("identity")
        playwright.expect(page.locator("#panel-merge-losses")).to_contain_text("merge: ")
