"""The dashboard in a real browser: what no unit test can see."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from app.theme import DARK, LIGHT
from app.view_state import ViewState
from workbench.lab.factors import LayerFactors
from workbench.lab.runs import RunStore
from workbench.lab.synthetic_runs import write_synthetic_runs

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 90_000
"""Milliseconds that a step may take on a busy machine; nothing here waits without a reason."""


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def desk(browser: playwright.Browser) -> Iterator[playwright.BrowserContext]:
    """A desktop browser whose cache the tests share, as the windows of one reader do."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    yield context
    context.close()


class Window:
    """A page that fails the test when the console complains or a request leaves the machine."""

    def __init__(self, context: playwright.BrowserContext, address: str):
        self.address = address
        self.complaints: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda line: self.complaints.append(line.text) if line.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda answer: self.complaints.append(answer.url) if answer.status >= 400 else None)
        self.page.route(lambda url: not url.startswith((address, "data:", "blob:")), self._leave)

    def _leave(self, route: playwright.Route) -> None:
        self.complaints.append(f"left the machine: {route.request.url}")
        route.abort()

    def open(self, path: str) -> None:
        self.page.goto(self.address + path)
        self.settle()

    def settle(self) -> None:
        """Wait until every panel has a figure, a text or a message, and nothing is under way."""
        self.page.wait_for_selector("#page .panel")
        self.page.wait_for_function(
            """() => !document.querySelector('[data-dash-is-loading=true]')
                 && [...document.querySelectorAll('#page .panel-body')].every((body) => body.matches('.is-hidden') || (
                      [...body.querySelectorAll('.graph')].every((g) => g.querySelector('.js-plotly-plot')?._fullLayout?.xaxis?.l2p
                                                                        && g.querySelector('.js-plotly-plot').layout.meta)
                      && [...body.querySelectorAll('[data-strip]')].every((strip) => strip.querySelector('.token[style]'))))"""
        )

    @property
    def view(self) -> ViewState:
        parts = urlsplit(self.page.url)
        return ViewState.from_url(parts.path, parts.query)

    def wait_for_view(self, **values: object) -> None:
        for _ in range(200):
            if all(getattr(self.view, name) == value for name, value in values.items()):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{self.page.url} never showed {values}")

    def cell(self, panel: str, row: float, column: float) -> tuple[float, float]:
        """Where on the screen a cell of a picture lies."""
        graph = self.page.locator(f"#panel-{panel} .js-plotly-plot")
        graph.scroll_into_view_if_needed()
        return tuple(graph.evaluate(
            """(gd, [row, column]) => { const {xaxis, yaxis} = gd._fullLayout, box = gd.getBoundingClientRect();
                 return [box.left + xaxis._offset + xaxis.l2p(column + .5), box.top + yaxis._offset + yaxis.l2p(row + .5)]; }""",
            [row, column],
        ))  # fmt: skip

    def hover(self, panel: str, row: float, column: float) -> None:
        x, y = self.cell(panel, row, column)
        self.page.mouse.move(x - 3, y - 3)
        self.page.mouse.move(x, y)

    def click(self, panel: str, row: float, column: float) -> None:
        self.hover(panel, row, column)
        self.page.wait_for_timeout(60)
        self.page.mouse.click(*self.cell(panel, row, column))

    def wait_for_picture(self, panel: str, *parts: str) -> str:
        """The address of the picture, once it contains all parts (or lacks those that begin with "!")."""
        for _ in range(400):
            found = self.picture(panel)
            if all((part[1:] not in found) if part[0] == "!" else (part in found) for part in parts):
                return found
            self.page.wait_for_timeout(50)
        raise AssertionError(f"the picture of {panel} never had {parts}: {self.picture(panel)}")

    def picture(self, panel: str) -> str:
        return self.page.locator(f"#panel-{panel} .js-plotly-plot").evaluate("gd => gd.layout.images[0].source")


@pytest.fixture
def window(desk: playwright.BrowserContext, address: str) -> Iterator[Window]:
    opened = Window(desk, address)
    yield opened
    opened.page.close()
    assert opened.complaints == []


@pytest.fixture(scope="session")
def ids(address: str, browser_store: RunStore) -> dict[str, str]:
    names = {"softmax": "synthetic-attention", "gated": "retention", "bdh": "bdh"}
    entries = browser_store.list()
    return {kind: next(entry.id for entry in entries if name in entry.id) for kind, name in names.items()}


def test_hovering_reads_the_exact_value_and_marks_its_tokens(window: Window, browser_store: RunStore, ids: dict[str, str]) -> None:
    window.open(f"/attention?run={ids['gated']}&layer=1&head=1")
    factors = LayerFactors.from_run(browser_store.open(ids["gated"]), 1)
    readout = window.page.locator(".readout b")
    for row, column in ((40, 17), (55, 3), (12, 12)):
        window.hover("pattern", row, column)
        playwright.expect(window.page.locator(".readout")).to_contain_text(f"reads {row} ")
        playwright.expect(window.page.locator(".readout")).to_contain_text(f"from {column} ")
        shown = float(readout.get_attribute("data-value"))
        assert np.float32(shown) == np.float32(factors.value(1, row, column))
        hovered = window.page.locator("#token-strip .is-hover").evaluate_all("found => found.map((t) => Number(t.dataset.token))")
        assert sorted(hovered) == sorted({row, column})
    # The same tokens are marked on the other figures: a column on the profile of who is read, a row on the map.
    playwright.expect(window.page.locator("#panel-pattern .mark-hover")).to_have_count(2)
    playwright.expect(window.page.locator("#panel-received .mark-hover")).to_have_count(1)
    window.hover("pattern", 5, 50)
    playwright.expect(readout).to_have_text("not visible")


def test_clicks_pin_zoom_and_choose_heads_and_the_back_button_undoes_them(window: Window, ids: dict[str, str]) -> None:
    window.open(f"/attention?run={ids['softmax']}")
    whole = window.picture("pattern")
    window.click("pattern", 33, 20)
    window.wait_for_view(query=33, key=20)
    window.click("heads", 1, 2)  # tile: layer 1, head 2
    window.wait_for_view(layer=1, head=2)
    window.wait_for_picture("pattern", "layer=1", "head=2")
    (x0, y0), (x1, y1) = window.cell("pattern", 10.1, 5.1), window.cell("pattern", 29.9, 24.9)
    window.page.mouse.move(x0, y0)
    window.page.mouse.down()
    window.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2, steps=3)
    window.page.mouse.move(x1, y1, steps=3)
    window.page.mouse.up()
    window.wait_for_view(rows=(10, 31), columns=(5, 26))
    zoomed = window.wait_for_picture("pattern", "rows=10-31", "cols=5-26", "layer=1")
    assert window.page.request.get(window.address + zoomed).ok
    window.page.click("button:has-text('Whole map')")
    window.wait_for_view(rows=None, columns=None)
    for expected in ({"rows": (10, 31)}, {"rows": None, "layer": 1}, {"layer": 0, "query": 33}, {"query": None}):
        window.page.go_back()
        window.wait_for_view(**expected)
    assert window.wait_for_picture("pattern", "!rows", "!layer") == whole


def test_a_permalink_shows_the_same_view_again(desk: playwright.BrowserContext, window: Window, ids: dict[str, str]) -> None:
    link = f"/state?v=1&head=1&layer=1&q=9&run={ids['gated']}&scale=linear&t=31&t2=4&track=2.3,5.1"
    window.open(link)
    assert urlsplit(window.page.url)._replace(scheme="", netloc="").geturl() == link

    def shown(page: playwright.Page) -> object:
        return page.evaluate(
            """() => [...document.querySelectorAll('.graph .js-plotly-plot')].map((gd) => [gd.closest('.panel').id,
                 gd.data.map((t) => [t.name, t.x && t.x.length, t.line && t.line.color]), (gd.layout.images || []).map((i) => i.source)])"""
        )

    first = shown(window.page)
    other = Window(desk, window.address)
    other.open(urlsplit(window.page.url)._replace(scheme="", netloc="").geturl())
    assert shown(other.page) == first and len(first) >= 5
    playwright.expect(other.page.locator("#time-token")).to_contain_text("after 31 ")
    playwright.expect(other.page.locator("#panel-state .panel-foot")).to_contain_text("minus state after token 4")
    playwright.expect(other.page.locator("#tracked-list .chip")).to_have_count(2)
    other.page.close()
    assert other.complaints == []


def test_the_token_strip_is_linked_on_every_page(window: Window, ids: dict[str, str]) -> None:
    window.open(f"/?run={ids['bdh']}")
    window.page.click("#token-strip [data-token='14']")
    window.wait_for_view(query=14)
    playwright.expect(window.page.locator("#panel-next-tokens .panel-foot")).to_contain_text("after token 14 ")
    for name in ("Attention", "State", "Overview"):
        window.page.click(f".nav-link:has-text('{name}')")
        playwright.expect(window.page.locator("h1")).to_have_text(name)
        window.wait_for_view(query=14)
        window.settle()
        assert window.page.locator("#token-strip .is-query").get_attribute("data-token") == "14"
    playwright.expect(window.page.locator(".nav-link[aria-current=page]")).to_have_text("Overview")
    window.page.hover("#panel-surprisal-text [data-token='21']")
    assert window.page.locator("#token-strip .is-hover").get_attribute("data-token") == "21"


def test_the_keyboard_alone(window: Window, ids: dict[str, str]) -> None:
    window.open(f"/attention?run={ids['softmax']}")
    press = window.page.keyboard.press
    press("ArrowLeft")
    window.wait_for_view(query=58)
    press("ArrowLeft")
    press("ArrowRight")
    press("ArrowUp")
    press("]")
    press("]")
    press("[")
    window.wait_for_view(query=58, layer=1, head=1)
    playwright.expect(window.page.get_by_label("Head").first).to_have_value("1")  # the control follows
    press("/")
    window.page.keyboard.type("grandeur")
    playwright.expect(window.page.locator("#strip-found")).to_have_text("1 found")
    press("Enter")
    window.wait_for_view(query=9)
    press("Escape")
    press("?")
    playwright.expect(window.page.locator("[role=dialog]")).to_contain_text("previous, next token")
    press("Escape")
    playwright.expect(window.page.locator("[role=dialog]")).to_have_count(0)
    press("Escape")
    window.wait_for_view(query=None, layer=1)
    window.page.locator("#token-strip [tabindex='0']").focus()  # one tab stop, then the arrows move inside
    press("ArrowRight")
    press("Enter")
    assert window.view.query is not None


def test_time_moves_by_slider_buttons_and_play(window: Window, ids: dict[str, str]) -> None:
    window.open(f"/state?run={ids['gated']}&t=20")
    before = window.picture("state")
    window.page.click("[aria-label='One token on']")
    window.wait_for_view(position=21)
    slider = window.page.locator("[role=slider]")
    playwright.expect(slider).to_have_attribute("aria-valuenow", "21")  # it follows the address a moment later
    slider.focus()
    window.page.keyboard.press("ArrowRight")
    window.wait_for_view(position=22)
    assert window.wait_for_picture("state", "t=22") != before
    window.page.click("[aria-label='Play over time']")
    window.wait_for_view(position=23)  # with reduced motion it still steps, slowly
    window.page.click("[aria-label='Play over time']")
    window.page.click("#compare-button")
    playwright.expect(window.page.locator("#compare-button")).to_contain_text("Stop comparing")
    assert window.view.compare is not None


def test_entries_are_followed_by_clicking_the_state(window: Window, browser_store: RunStore, ids: dict[str, str]) -> None:
    window.open(f"/state?run={ids['gated']}&layer=1")
    playwright.expect(window.page.locator("#panel-tracked .panel-message")).to_contain_text("No entry is followed yet")
    window.click("state", 3, 11)
    window.wait_for_view(tracked=((3, 11),))
    window.page.locator("#panel-largest button:has-text('Follow')").first.click()
    playwright.expect(window.page.locator("#tracked-list .chip")).to_have_count(2)
    window.page.wait_for_function("() => document.querySelector('#panel-tracked .js-plotly-plot')?._fullData?.length === 2")
    drawn = window.page.locator("#panel-tracked .js-plotly-plot").evaluate("gd => Array.from(gd._fullData[0].y)")
    exact = LayerFactors.from_run(browser_store.open(ids["gated"]), 1).state_entry(0, 3, 11)
    np.testing.assert_array_equal(np.float32(drawn), exact)
    window.page.click("[aria-label='Stop following [3, 11]']")
    playwright.expect(window.page.locator("#tracked-list .chip")).to_have_count(1)


def test_the_scheme_is_right_from_the_first_paint_and_the_choice_is_kept(
    browser: playwright.Browser, address: str, ids: dict[str, str]
) -> None:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="dark")
    window = Window(context, address)
    window.page.add_init_script("""requestAnimationFrame(function look() {
        if (document.body) window.first ??= getComputedStyle(document.body).backgroundColor; else requestAnimationFrame(look);
    })""")
    paper = "document.querySelector('#panel-pattern .js-plotly-plot')._fullLayout.paper_bgcolor"
    window.open(f"/attention?run={ids['gated']}")
    assert window.page.evaluate("window.first") == "rgb(14, 18, 23)"
    assert window.page.evaluate(paper) == DARK.surface and "scheme=dark" in window.picture("pattern")
    window.page.click("[data-action=scheme]")
    window.page.wait_for_function(f"() => {paper} === '{LIGHT.surface}'")
    window.wait_for_picture("pattern", "scheme=light")
    window.page.reload()
    window.settle()
    assert window.page.evaluate("window.first") == "rgb(245, 246, 248)"
    assert window.page.evaluate(paper) == LIGHT.surface
    context.close()
    assert window.complaints == []


def test_a_phone_can_use_every_page(browser: playwright.Browser, address: str, ids: dict[str, str]) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 760}, has_touch=True)
    window = Window(context, address)
    for path in (f"/?run={ids['softmax']}", f"/attention?run={ids['softmax']}", f"/state?run={ids['bdh']}", "/runs"):
        window.open(path)
        assert window.page.evaluate("document.documentElement.scrollWidth") <= 375, path
        for panel in window.page.locator("#page .panel").all():
            box = panel.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 376, path
    window.page.click("[aria-label='Navigation']")
    window.page.click(".nav-link:has-text('Attention')")
    playwright.expect(window.page.locator("h1")).to_have_text("Attention")
    window.settle()
    assert "px=256" in window.picture("pattern")  # no finer than the screen
    playwright.expect(window.page.locator(".nav-link").first).not_to_be_in_viewport()
    context.close()
    assert window.complaints == []


def test_export_table_and_python(window: Window, ids: dict[str, str]) -> None:
    window.open(f"/attention?run={ids['softmax']}&head=1")
    panel = window.page.locator("#panel-pattern")

    def choose(text: str) -> None:
        panel.locator("button:has-text('Export')").click()
        window.page.click(f"[role=menuitem]:has-text('{text}')")

    for text, ending in (("Figure as PNG", "-pattern.png"), ("Figure as SVG", "-pattern.svg"), ("Numbers as CSV", "-pattern.csv")):
        with window.page.expect_download() as download:
            choose(text)
        assert download.value.suggested_filename == ids["softmax"] + ending
    choose("Python that makes it")
    playwright.expect(window.page.locator("[role=dialog]")).to_contain_text(f'RunStore().open("{ids["softmax"]}")')
    window.page.keyboard.press("Escape")
    playwright.expect(window.page.locator("[role=dialog]")).to_have_count(0)
    panel.locator("button:has-text('Table')").click()
    playwright.expect(window.page.locator("[role=dialog] table td").first).to_be_visible()
    playwright.expect(window.page.locator("[role=dialog] tbody tr")).to_have_count(60)


def test_runs_are_started_cancelled_and_opened_from_the_page(window: Window, browser_store: RunStore, ids: dict[str, str]) -> None:
    window.open(f"/?run={ids['bdh']}")
    window.page.fill("#form-text", "")
    window.page.click("#form-start")
    playwright.expect(window.page.locator("#form-message")).to_contain_text("Type a text first")
    window.page.fill("#form-text", "this will fail")
    window.page.click("#form-start")
    playwright.expect(window.page.locator("#job-message")).to_contain_text("ran out of patience")
    window.page.click("#job-cancel")  # it says Close by now
    playwright.expect(window.page.locator("#job-bar")).to_be_hidden()
    window.page.fill("#form-text", "slow down")
    window.page.click("#form-start")
    playwright.expect(window.page.locator("#job-cancel")).to_have_text("Cancel")
    window.page.click("#job-cancel")
    playwright.expect(window.page.locator("#job-bar")).to_be_hidden()
    assert window.view.run == ids["bdh"]
    window.page.fill("#form-text", "<b>A new text</b> & more")
    window.page.click("#form-start")
    playwright.expect(window.page.locator("#job-bar")).to_be_visible()
    playwright.expect(window.page.locator("#job-message")).to_contain_text("layer")
    window.page.wait_for_url(lambda url: "run=" in url and ids["bdh"] not in url)
    made = parse_qs(urlsplit(window.page.url).query)["run"][0]
    assert made not in ids.values() and browser_store.open(made).kind == "trace"
    playwright.expect(window.page.locator("#job-bar")).to_be_hidden()
    playwright.expect(window.page.locator("#panel-surprisal-text .panel-foot")).to_contain_text(made.rsplit("-", 1)[-1])


def test_runs_are_filtered_opened_and_deleted_after_a_question(window: Window, browser_store: RunStore, ids: dict[str, str]) -> None:
    doomed = write_synthetic_runs(browser_store, tokens=8)
    window.open(f"/runs?run={ids['bdh']}")
    playwright.expect(window.page.locator(f"#runs-grid [row-id='{doomed[0]}']").first).to_be_visible()
    window.page.locator(f"#runs-grid [row-id='{doomed[0]}'] input[type=checkbox]").check()
    window.page.click("#runs-delete")
    playwright.expect(window.page.locator("[role=dialog]")).to_contain_text(doomed[0])
    window.page.click("#delete-no")
    playwright.expect(window.page.locator("[role=dialog]")).to_have_count(0)
    assert doomed[0] in {entry.id for entry in browser_store.list()}
    window.page.click("#runs-delete")
    window.page.click("#delete-yes")
    playwright.expect(window.page.locator(f"#runs-grid [row-id='{doomed[0]}']")).to_have_count(0)
    assert doomed[0] not in {entry.id for entry in browser_store.list()}
    window.page.fill("#runs-filter", doomed[2])
    playwright.expect(window.page.locator("#runs-grid .ag-center-cols-container [row-id]")).to_have_count(1)
    window.page.click(f"#runs-grid [row-id='{doomed[2]}'] .cell-link")
    window.wait_for_view(run=doomed[2], page="overview")
    for run_id in doomed[1:]:
        browser_store.delete(run_id)


def test_an_address_of_a_run_that_is_gone_says_so(window: Window) -> None:
    window.page.goto(window.address + "/attention?run=20200101-gone-123456")
    playwright.expect(window.page.locator(".banner")).to_contain_text("This run is not here")
    playwright.expect(window.page.locator(".page > .panel-message")).to_contain_text("No run is open")
    playwright.expect(window.page.locator("#crumbs")).not_to_contain_text("Synthetic")  # nor is another run shown in its place
    assert "Traceback" not in window.page.inner_text("body")
