"""Steps that the browser tests of measurements share: visit a page, wait for its result, look at it on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.app.dashboard.serving import Stage
from tests.app.dashboard.test_browser import Window, playwright


@contextmanager
def visit(
    stage: Stage, desk: playwright.BrowserContext, path: str, phone: tuple[playwright.Browser, str] | None = None
) -> Iterator[Window]:
    """A window on a page, closed at the end, when nothing must have complained.

    `phone`: a browser and a panel; what the window shows at the end must then open on a phone too, with that panel.
    """
    window = Window(desk, stage.address)
    window.open(path)
    yield window
    assert without_wheel(window.complaints) == []
    address = window.page.url.removeprefix(stage.address)
    window.page.close()
    if phone is not None:
        on_a_phone(stage, phone[0], address, phone[1])


def on_a_phone(stage: Stage, browser: playwright.Browser, path: str, panel: str) -> None:
    """Nothing sticks out at 375 pixels in the dark scheme, and the permalink opens what it names."""
    context = browser.new_context(viewport={"width": 375, "height": 800}, reduced_motion="reduce")
    context.add_cookies([{"name": "workbench_scheme", "value": "dark", "url": stage.address}])
    window = Window(context, stage.address)
    window.open(path)
    window.page.wait_for_selector(f"#panel-{panel}")
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert without_wheel(window.complaints) == []
    context.close()


def wait_for_result(window: Window) -> str:
    """Wait until the job led to its result; its id."""
    window.page.wait_for_function("() => new URLSearchParams(location.search).get('result')")
    window.settle()
    return window.view.result


def without_wheel(complaints: list[str]) -> list[str]:
    """cytoscape warns of any wheel sensitivity, and its Dash component always sets one."""
    return [each for each in complaints if "wheel sensitivity" not in each]
