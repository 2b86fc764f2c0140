"""The Reads page: what it measures beside the probe, its panels' numbers and Python, mistakes in its form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import models
from app.measure.common import FormError
from app.measure.reads import start_reads
from app.pages import find_pages
from app.pages.reads import neuron_words
from app.panels.base import NothingToShow, StripPanel
from app.services import Services
from app.theme import LIGHT
from app.view_state import ViewState
from probes.bdh import matching_pairs, read_circuit
from tests.app.dashboard.bdh_runs import MODEL, TEXT, finished, real_services
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_pages import text_of

AT = 40
PAGE = next(page for page in find_pages() if page.name == "reads")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str, str]]:
    """Services, a run of a BDH, and what its token 40 reads for the logit of "t"."""
    torch.set_num_threads(1)
    services, run = real_services(tmp_path_factory.mktemp("reads"))
    yield services, run, finished(services, start_reads(services, services.scene(ViewState(run=run, query=AT)), "t"))
    services.jobs.shutdown(timeout=60)


def test_the_numbers_are_those_of_the_probe(stage: tuple[Services, str, str]) -> None:
    services, run, result = stage
    model, found = models.load(MODEL), services.open_run(result)
    circuit = read_circuit(model, TEXT, logit=ord("t"), at=AT)
    expected = circuit.contributions[0].numpy()
    np.testing.assert_array_equal(found.array("contributions"), expected)
    assert found.manifest["results"]["logit"] == pytest.approx(model(TEXT)[0, AT, ord("t")].item(), rel=1e-5)
    scene = services.scene(ViewState(run=run, result=result))
    np.testing.assert_allclose(PANELS["read-map"].values(scene), expected.reshape(16, AT))
    strip = PANELS["read-strip"].values(scene)
    np.testing.assert_allclose(strip[:AT], expected.sum((0, 1)), rtol=1e-4, atol=1e-6)
    assert np.isnan(strip[AT:]).all() and len(strip) == len(TEXT)
    layer, head, past, value = circuit.top(1)[0]
    assert PANELS["top-reads"].values(scene)[0] == pytest.approx(value)
    for chosen in ((layer, head, past), (2, 1, 7)):  # the largest one when none is chosen
        view = ViewState(run=run, result=result)
        shown = view if chosen[2] == past else view.change(layer=2, head=1, key=7)
        score, same, cross = PANELS["read-pairs"].values(services.scene(shown))
        pairs = matching_pairs(model, TEXT, *chosen[:2], past=chosen[2], at=AT, k=len(score))
        np.testing.assert_allclose(score, pairs.contribution.numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(same, pairs.same.numpy(), rtol=3e-3, atol=1e-3)
        np.testing.assert_allclose(cross, pairs.cross.numpy(), rtol=3e-3, atol=1e-3)


def test_panels(stage: tuple[Services, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    services, run, result = stage
    view = ViewState(page="reads", run=run, result=result)
    names = [panel.id for panel in PAGE.panels]
    check_panels(services, view, names, monkeypatch)
    check_panels(services, view.change(layer=3, head=2, key=12, columns=(5, 30), scale="row"), names, monkeypatch)
    scene = services.scene(view.change(columns=(AT + 1, AT + 4)))  # a zoom of another page, beyond what is read
    assert PANELS["read-map"].values(scene).shape == (16, AT)
    reading = PANELS["read-map"].reading(services.scene(view), 13, 12)  # type: ignore[attr-defined]
    assert reading.value == pytest.approx(float(services.open_run(result).array("contributions")[3, 1, 12]))
    assert isinstance(PANELS["read-strip"], StripPanel)


def test_a_click_on_a_bar_or_cell_chooses_its_reading(stage: tuple[Services, str, str]) -> None:
    services, run, result = stage
    scene = services.scene(ViewState(run=run, result=result))
    bars = PANELS["top-reads"].figure(scene, LIGHT).layout.meta["choices"]["y"]  # type: ignore[attr-defined]
    contributions = services.open_run(result).array("contributions")
    values = [contributions[each["layer"] or 0, each["head"] or 0, each["k"]] for each in bars]
    np.testing.assert_allclose(values, PANELS["top-reads"].values(scene))
    meta = PANELS["read-map"].figure(scene, LIGHT).layout.meta  # type: ignore[attr-defined]
    assert meta["choices"]["y"][6] == {"layer": 1, "head": 2} and meta["choices"]["x"][9] == {"k": 9}


def test_the_page_and_its_words(stage: tuple[Services, str, str]) -> None:
    services, run, result = stage
    scene = services.scene(ViewState(page="reads", run=run, result=result))
    page = text_of(PAGE.build(services, scene))
    assert "Which neurons match" in page and "What these neurons say" in page
    assert "excited by" in text_of(neuron_words(scene)) and "promotes" in text_of(neuron_words(scene))
    small = int(np.abs(services.open_run(result).array("contributions")[0, 0]).argmin())
    unsaid = services.scene(ViewState(page="reads", run=run, result=result, key=small))
    assert text_of(neuron_words(unsaid))
    other = finished(services, services.models.start_trace("gpt-english", "a cat", {}))
    assert "another model" in text_of(PAGE.build(services, services.scene(ViewState(page="reads", run=other))))
    again = finished(services, services.models.start_trace(MODEL, "another text", {}))
    with pytest.raises(NothingToShow, match="Press Read"):
        PANELS["read-map"].values(services.scene(ViewState(run=again, result=result)))


@pytest.mark.parametrize(
    "at,symbol,words", [(0, "t", "pin a later token"), (4, "ab", "one character"), (4, "é", "one byte")]
)
def test_mistakes_are_named(stage: tuple[Services, str, str], at: int, symbol: str, words: str) -> None:
    services, run, _ = stage
    with pytest.raises(FormError, match=words):
        start_reads(services, services.scene(ViewState(run=run, query=at)), symbol)


def test_without_a_character_it_is_the_likeliest(stage: tuple[Services, str, str]) -> None:
    services, run, _ = stage
    found = services.open_run(finished(services, start_reads(services, services.scene(ViewState(run=run)), "")))
    likeliest = models.load(MODEL)(TEXT)[0, -1].argmax().item()
    assert found.manifest["settings"]["logit"] == likeliest and found.manifest["results"]["rank"] == 0
