"""The new-run form in a real browser: a hub id that cannot be had, a folder of a type that we lack, checkpoints that open."""

from __future__ import annotations

from pathlib import Path

from app.model_service import WorkbenchModels
from app.services import Services
from tests.app.dashboard.serving import served
from tests.app.dashboard.test_browser import Window, browser, desk, playwright, pytestmark  # noqa: F401
from tests.models.pretrained.reference import CASES, Case, write
from tests.models.pretrained.test_encoder_decoders import CASES as ENCODER_DECODERS
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore


def test_a_checkpoint_is_looked_up_and_read(desk: playwright.BrowserContext, tmp_path: Path) -> None:  # noqa: F811
    known = CASES["mamba2"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), tmp_path / "root" / "someone" / "small")
    known = ENCODER_DECODERS["t5"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), tmp_path / "root" / "translator")
    (tmp_path / "root" / "odd").mkdir()
    (tmp_path / "root" / "odd" / "config.json").write_text('{"model_type": "lama"}')
    store, jobs = RunStore(tmp_path / "runs"), JobQueue()
    with served(Services(store, jobs, WorkbenchModels(store, jobs, tmp_path / "root"))) as address:
        window = Window(desk, address)
        page, expect = window.page, playwright.expect
        window.open("/")

        def choose(words: str) -> None:
            page.click("#form-model")
            page.get_by_role("option", name=words).first.click()

        choose("Another one")
        page.fill("#form-hub", "someone/elsewhere")
        page.click("#form-look")
        expect(page.locator("#form-about")).to_contain_text("hf download someone/elsewhere")
        choose("odd (folder)")
        expect(page.locator("#form-about")).to_contain_text("Did you mean 'llama'")
        expect(page.locator("#form-other")).to_be_hidden()
        choose("translator (folder)")
        expect(page.locator("#form-about")).to_contain_text("t5, opens as t5")
        for part, shown in (("other", False), ("precision", True), ("tight", False), ("reads", True)):
            expect(page.locator(f"#form-{part}")).to_be_visible(visible=shown)
        page.fill("#form-text", "a cat")
        page.click("#form-start")
        expect(page.locator("#form-message")).to_contain_text("type its source")
        page.fill("#form-source", "eine Katze")
        page.click("#form-start")
        expect(page.locator("#panel-card")).to_contain_text("cross attention")
        choose("someone/small (folder)")
        expect(page.locator("#form-about")).to_contain_text("mamba2, opens as mamba2")
        expect(page.locator("#form-reads")).to_be_hidden()
        page.fill("#form-text", "a cat")
        page.click("#form-start")
        expect(page.locator("#panel-card")).to_contain_text("pretrained weights")
        expect(page.locator("#form-model")).to_have_value("someone/small (folder)")
        (other,) = (entry.id for entry in store.list() if entry.model == "translator")
        window.open(f"/attention?v=1&layer=1&run={other}")
        expect(page.locator("#panel-query-row .token")).to_have_count(len("eine Katze"))
        page.locator("#panel-query-row .token").first.click()  # of another text: nothing to pin
        expect(page.locator("#panel-offsets")).to_contain_text("reads another text")
        assert "q=" not in page.url and window.complaints == []
        page.close()
    assert {entry.model for entry in store.list()} == {"someone/small", "translator"}
