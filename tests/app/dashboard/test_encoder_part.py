"""The Attention page on an encoder-decoder: what the encoder reads, what the decoder reads, and what it reads of the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from app.dashboard import resolve
from app.model_service import WorkbenchModels
from app.pages import attention as page_module
from app.pages import find_pages
from app.pages.attention import NOT_KEPT, PAGE, part_links
from app.panels.base import PicturePanel, StripPanel
from app.panels.words import memory_words
from app.services import Services
from app.shell import inspector
from app.theme import LIGHT
from app.view_state import ViewState
from tests.app.dashboard.panel_checks import check_panel
from tests.app.dashboard.serving import served
from tests.app.dashboard.test_browser import Window, browser, desk, playwright  # noqa: F401
from tests.app.dashboard.test_pages import text_of
from tests.lab.test_trace_source import SOURCE, TEXT, lively
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import Run, RunStore
from workbench.lab.trace import trace_run

PAGES = {page.name: page for page in find_pages()}
PANELS = {panel.id: panel for panel in PAGE.panels}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, Run, dict[int, np.ndarray]]]:
    """A run of T5, and the encoder's patterns as its own hook points hold them."""
    root = tmp_path_factory.mktemp("encoder")
    store, jobs = RunStore(root / "runs"), JobQueue()
    model = lively("t5").with_source(SOURCE)
    run = trace_run(model, TEXT, store)
    _, cache = model.run_with_cache(TEXT, names="encoder.blocks.*.attn.hook_pattern")
    patterns = {layer: cache[f"encoder.blocks.{layer}.attn.hook_pattern"][0].numpy() for layer in range(3)}
    yield Services(store, jobs, WorkbenchModels(store, jobs, root)), run, patterns
    jobs.shutdown(timeout=10)


def links_of(services: Services, **view: Any) -> dict[str, Any]:
    return {
        str(link.children): link for link in part_links(services, services.scene(ViewState(page="attention", **view)))
    }


@pytest.mark.parametrize("name", sorted(PANELS))
@pytest.mark.parametrize("layer", [0, 2])
def test_every_panel_draws_the_encoder(
    traced: tuple[Services, Run, Any], name: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures, tables, words, and the Python that makes the same array."""
    services, run, _ = traced
    panel = PANELS[name]
    assert "part" in panel.depends, "else it would draw the decoder beside the encoder"
    scene = services.scene(ViewState(run=run.id, part="encoder", layer=layer, head=1, query=9))
    check_panel(panel, scene, services, monkeypatch)
    if isinstance(panel, PicturePanel):
        assert "part=encoder" in panel.address(scene, LIGHT)
    if isinstance(panel, StripPanel):
        assert len(panel.colours(scene, LIGHT)["values"]) == len(SOURCE)


def test_the_numbers_are_the_encoders(traced: tuple[Services, Run, dict[int, np.ndarray]]) -> None:
    """Also beside the decoder's of the same layer and head: what is computed once is not mixed up."""
    services, run, patterns = traced
    view = ViewState(run=run.id, layer=1, head=2, query=3)
    whole, side = services.scene(view), services.scene(view.change(part="encoder"))
    for _ in range(2):
        assert PANELS["pattern"].values(whole).shape == (5, 17), "the cross-attention of layer 1"
        assert np.allclose(PANELS["pattern"].values(side), patterns[1][2], atol=1e-6)
        assert np.allclose(PANELS["query-row"].values(side), patterns[1][2, 3], atol=1e-6)
    assert side.tokens == list(SOURCE) and whole.tokens == list(TEXT) and side.heads_per_layer == [4, 4, 4]
    reading = PANELS["pattern"].reading(side, 3, 12)  # type: ignore[attr-defined]
    assert abs(reading.value - patterns[1][2, 3, 12]) < 1e-6 and reading.rows[:2] == [
        ("reads", "3 ‘e’"),
        ("from", "12 ‘K’"),
    ]
    words = str(inspector(side))
    assert "Encoder layer 1: attention" in words and "encoder.blocks.1.attn.hook_pattern" in words
    assert "reads in both directions" in memory_words(side.layer or {}) and "surprisal" not in words
    assert "encoder layer 1" in " ".join(PANELS["pattern"].facts(side))


def test_the_choice(traced: tuple[Services, Run, Any]) -> None:
    """Each link leads to the first layer of its kind; a token of the text stays pinned only where it is one."""
    services, run, _ = traced
    links = links_of(services, run=run.id, query=2, head=3, pooling="mean")
    assert list(links) == ["Encoder", "Decoder", "Cross"]

    def leads(name: str) -> ViewState:
        return ViewState.from_url("/attention", links[name].href.partition("?")[2])

    common = {"page": "attention", "run": run.id, "pooling": "mean"}
    assert leads("Encoder") == ViewState(**common, part="encoder")
    assert leads("Decoder") == ViewState(**common, query=2, head=3), "where it is"
    assert leads("Cross") == ViewState(**common, layer=1, query=2)
    for view, chosen in (({}, "Decoder"), ({"layer": 3}, "Cross"), ({"part": "encoder", "layer": 2}, "Encoder")):
        current = [
            name for name, link in links_of(services, run=run.id, **view).items() if getattr(link, "aria-current", None)
        ]
        assert current == [chosen]
    built = PAGE.build(services, services.scene(ViewState(page="attention", run=run.id, part="encoder")))
    assert "Ablate head" not in text_of(built), "that job names the model's own layers"


def test_other_runs(traced: tuple[Services, Run, Any]) -> None:
    """A model of one text has nothing to choose; an older run of an encoder-decoder says what it does not keep."""
    services, _, _ = traced
    other = trace_run(lively("gpt2"), TEXT, services.store)
    assert links_of(services, run=other.id) == {}
    assert services.scene(ViewState(run=other.id, part="encoder", layer=1)).view == ViewState(run=other.id), (
        "no such part"
    )
    older = services.open_run(trace_run(lively("t5").with_source(SOURCE), TEXT, services.store).id)
    older.manifest["encoder"] = None
    links = links_of(services, run=older.id)
    assert not hasattr(links["Encoder"], "href") and NOT_KEPT in links["Encoder"].title and links["Cross"].href
    assert services.scene(ViewState(run=older.id, part="encoder", query=9)).view.part == ""


def test_other_pages_show_the_text(traced: tuple[Services, Run, Any]) -> None:
    """Layer 2 and token 16 of the source are no layer and token of the text."""
    services, run, _ = traced
    query = f"?v=1&run={run.id}&part=encoder&layer=2&head=1&q=16"
    data, scene = resolve(services, PAGES, "/attention", query)
    assert (data["part"], data["layer"], data["query"]) == ("encoder", 2, 16) and scene.n_tokens == 17
    for name in sorted(set(PAGES) - {"attention"}):
        data, scene = resolve(services, PAGES, "/" if name == "overview" else f"/{name}", query)
        assert (data["part"], data["layer"], data["query"]) == ("", 0, None) and scene.tokens == list(TEXT), name
        assert "part=" not in data["url"]


def test_nothing_here_names_an_architecture() -> None:
    from pathlib import Path

    source = Path(page_module.__file__ or "").read_text()
    assert "t5" not in source.lower()


@pytest.mark.browser
def test_encoder_decoder_and_cross_in_a_browser(
    traced: tuple[Services, Run, Any],
    desk: playwright.BrowserContext,  # noqa: F811
) -> None:
    services, run, _ = traced
    with served(services) as address:
        window = Window(desk, address)
        page, expect = window.page, playwright.expect
        window.open(f"/attention?v=1&run={run.id}&q=2")
        chosen = page.locator("#part-choice [aria-current=true]")
        expect(chosen).to_have_text("Decoder")
        expect(page.locator("#token-strip .token")).to_have_count(len(TEXT))
        page.locator("#part-choice a", has_text="Encoder").click()
        expect(chosen).to_have_text("Encoder")
        expect(page.locator("#token-strip .token")).to_have_count(len(SOURCE))
        expect(page.locator("#panel-pattern .panel-foot")).to_contain_text("encoder layer 0")
        expect(page.locator("#panel-query-row .token")).to_have_count(len(SOURCE))
        page.keyboard.press("ArrowUp")
        expect(page.locator("#panel-pattern .panel-foot")).to_contain_text("encoder layer 1")
        page.locator("#part-choice a", has_text="Cross").click()
        expect(chosen).to_have_text("Cross")
        expect(page.locator("#panel-query-row .panel-foot")).to_contain_text("drawn over the source")
        expect(page.locator("#token-strip .token")).to_have_count(len(TEXT))
        page.go_back()
        expect(chosen).to_have_text("Encoder")
        page.locator("a.nav-link", has_text="State").click()
        expect(page.locator("#token-strip .token")).to_have_count(len(TEXT))
        assert "part=" not in page.url
        assert window.complaints == []
