"""Labels under narrow figures keep apart, and code of a study has the scheme's colours: in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import models
from app.services import Services
from case_studies.harness import discovery
from tests.app.dashboard.fake_models import FakeModels
from tests.app.dashboard.serving import Stage, served
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from tests.case_studies.planted import write_study
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

pytestmark = pytest.mark.browser
SOME_LABELS_AND_APART = """(panel) => {
    const boxes = [...document.querySelectorAll(`#panel-${panel} g.xtick text`)]
        .filter((label) => getComputedStyle(label).visibility === "visible")
        .map((label) => label.getBoundingClientRect()).sort((a, b) => a.left - b.left);
    const apart = boxes.every((box, at) => at === 0 || boxes[at - 1].right < box.left);
    return boxes.length >= 3 && boxes.length < 40 && apart;  // some of 40 labels, not all
}"""
README = "# Planted\n\n```python\nvalues = [1, 2]  # a comment\n```\n"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A run of 40 tokens that are written with four characters each, and a study with code in its text."""
    root = tmp_path_factory.mktemp("labels")
    before, discovery.ROOT = discovery.ROOT, Path(root / "studies")
    write_study(discovery.ROOT, readme=README)
    store, jobs = RunStore(root / "runs"), JobQueue()
    run = trace_run(models.load("gpt-english"), torch.arange(130, 170)[None], store)
    services = Services(store, jobs, FakeModels(store, jobs))
    with served(services) as address:
        yield Stage(address, services, run.id)
    discovery.ROOT = before


@pytest.mark.parametrize("width", [375, 1400])
def test_labels_under_figures_keep_apart(stage: Stage, browser: playwright.Browser, width: int) -> None:  # noqa: F811
    context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    window = Window(context, stage.address)
    window.open(f"/attention?run={stage.run}")
    for panel in ("received", "pattern"):
        # Figures are drawn anew while the page settles, and labels are thinned after each drawing.
        window.page.wait_for_function(SOME_LABELS_AND_APART, arg=panel)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_has_the_colours_of_the_scheme(stage: Stage, browser: playwright.Browser, scheme: str) -> None:  # noqa: F811
    context = browser.new_context(viewport={"width": 1000, "height": 900}, reduced_motion="reduce")
    context.add_cookies([{"name": "workbench_scheme", "value": scheme, "url": stage.address}])
    window = Window(context, stage.address)
    window.open("/cases?study=planted")
    code = window.page.locator(".card-text pre code")
    playwright.expect(code).to_contain_text("a comment")
    playwright.expect(code).to_have_css("background-color", "rgba(0, 0, 0, 0)")
    colours = window.page.locator(".card-text pre, .card-text pre code, .card-text pre code span").evaluate_all(
        "all => [...new Set(all.map((part) => getComputedStyle(part).color))]"
    )
    assert len(colours) == 1, f"all of it is written in the colour of the text, not {colours}"
    context.close()
