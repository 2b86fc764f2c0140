"""The case studies in a real browser: open, start, cancel, look at a claim, share the address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.services import Services
from case_studies.harness import discovery
from tests.app.dashboard.fake_models import FakeModels
from tests.app.dashboard.serving import served
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from tests.app.dashboard.test_cases import WAITING
from tests.case_studies.planted import write_study
from tests.case_studies.test_running import RICH
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a dashboard over two planted studies answers."""
    root = tmp_path_factory.mktemp("cases")
    before = discovery.ROOT
    discovery.ROOT = Path(root / "studies")
    slow = "[tiers.smoke]\n", '[tiers.smoke]\nnote = "takes for ever"\n'
    quick = write_study(root / "studies", "quick", study=RICH.replace("picture.png", "picture.txt"))
    write_study(root / "studies", "waiting", claims=(quick / "claims.toml").read_text().replace(*slow), study=WAITING)
    store, jobs = RunStore(root / "runs"), JobQueue()
    with served(Services(store, jobs, FakeModels(store, jobs))) as address:
        yield address
    discovery.ROOT = before


def test_a_study_from_the_list_to_its_verdicts(server: str, desk: playwright.BrowserContext) -> None:  # noqa: F811
    window = Window(desk, server)
    page = window.page
    window.open("/cases")
    page.click("#cases-grid .ag-row[row-id=quick] .cell-link")
    window.wait_for_view(page="cases", study="quick", result="")
    page.wait_for_selector("#claims-grid .ag-row")
    assert page.locator("#claims-grid").inner_text().count("never run here") == 1
    page.get_by_text("small", exact=True).click()
    page.wait_for_function("() => document.getElementById('case-about').textContent.startsWith('3 seeds')")
    page.click("#case-start")
    page.wait_for_function("() => new URLSearchParams(location.search).get('result')")
    page.wait_for_selector("#claims-grid .cell-good")
    playwright.expect(page.locator("#claims-grid")).to_contain_text("0.75 [0.75, 0.75]")
    page.wait_for_selector("#panel-case-line .js-plotly-plot .scatterlayer path")
    playwright.expect(page.locator("#panel-case-picture")).to_contain_text("not really a picture")

    page.click("#claims-grid .cell-link")
    page.wait_for_selector(".claim-details")
    playwright.expect(page.locator(".claim-details")).to_contain_text("ci_low > 0.5")
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.click("#case-export-csv")
    assert "above-half" in Path(download.value.path()).read_text()

    page.reload()
    page.wait_for_selector("#claims-grid .cell-good")
    page.click(".back-link")
    window.wait_for_view(study="", result="")
    page.wait_for_selector("#cases-grid .ag-row[row-id=quick] .cell-good")
    assert window.complaints == []
    page.close()


def test_cancelling(server: str, desk: playwright.BrowserContext) -> None:  # noqa: F811
    window = Window(desk, server)
    window.open("/cases?study=waiting")
    window.page.click("#case-start")
    window.page.wait_for_function("() => document.getElementById('job-message').textContent.includes('waiting')")
    window.page.click("#job-cancel")
    window.page.wait_for_function("() => document.getElementById('job-bar').className.includes('is-hidden')")
    assert window.view.study == "waiting" and window.view.result == "" and window.complaints == []
    window.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(server: str, browser: playwright.Browser, scheme: str) -> None:  # noqa: F811
    """Nothing sticks out at 375 pixels, in either scheme, and figures take the colours of the scheme."""
    context = browser.new_context(viewport={"width": 375, "height": 800})
    context.add_cookies([{"name": "workbench_scheme", "value": scheme, "url": server}])
    window = Window(context, server)
    window.open("/cases?study=quick")
    window.page.wait_for_selector("#claims-grid .ag-row")
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert window.complaints == []
    context.close()
