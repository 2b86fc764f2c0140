"""What the BDH pages measure, beside the probes; their panels' Python; mistakes in their forms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import models
from app.measure.common import FormError
from app.measure.synapses import start_search
from app.pages import find_pages
from app.pages.synapses import chips, says, table_rows, toggled, typed
from app.panels.base import NothingToShow, StripPanel
from app.services import Services
from app.theme import DARK, LIGHT
from app.view_state import MAX_SYNAPSES, ViewState
from probes import bdh
from tests.app.dashboard.bdh_runs import MODEL, TEXT, finished, real_services
from tests.app.dashboard.test_pages import text_of

PAGES = {page.name: page for page in find_pages()}
PANELS = {panel.id: panel for page in find_pages() for panel in page.panels}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str]]:
    torch.set_num_threads(1)
    services, run = real_services(tmp_path_factory.mktemp("bdh"))
    yield services, run
    services.jobs.shutdown(timeout=60)


def check_panels(services: Services, view: ViewState, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every panel draws in both schemes, has a table, and its Python makes its array."""
    monkeypatch.setenv("WORKBENCH_RUNS", str(services.store.root))
    scene = services.scene(view)
    for name in names:
        panel = PANELS[name]
        panel.check(scene)
        values = panel.values(scene)
        assert np.isfinite(values).any(), name
        if isinstance(panel, StripPanel):
            assert len(panel.colours(scene, LIGHT)["values"]) == scene.n_tokens
        else:
            assert all(len(panel.figure(scene, theme).to_json()) < 400_000 for theme in (LIGHT, DARK)), name
        headers, rows = panel.table(scene)
        lines = list(rows)
        assert lines and all(len(line) == len(headers) for line in lines), name
        assert panel.facts(scene) is not None and panel.source(scene) is not None
        code, found = panel.snippet(scene), {}  # type: ignore[var-annotated]
        exec(code, found)
        np.testing.assert_allclose(np.asarray(found["values"]), values, rtol=1e-5, atol=1e-7, err_msg=code)


# ---- synapses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(stage: tuple[Services, str]) -> str:
    services, run = stage
    return finished(services, start_search(services, services.scene(ViewState(run=run)), "strength", 2))


def test_the_search_finds_what_the_probe_finds(stage: tuple[Services, str], searched: str) -> None:
    services, run = stage
    found = services.open_run(searched)
    expected = bdh.strongest_synapses(models.load(MODEL), TEXT, 2, k=50)
    np.testing.assert_array_equal(found.array("scores"), expected.scores.numpy())
    first = expected.synapses[0]
    address = (first.source_layer, *first.source, first.target_layer, *first.target)
    assert tuple(found.array("addresses")[0]) == address
    assert found.manifest["settings"]["run"] == run and found.manifest["results"]["error"] < 1e-4
    # The panel reads the same strength from the open run's stored activity.
    scene = services.scene(ViewState(page="synapses", run=run, result=searched, synapses=(address,)))
    traced = PANELS["synapse-strength"].values(scene)[0, -1]
    assert traced == pytest.approx(float(expected.scores[0]), rel=2e-3)
    terms = PANELS["synapse-authors"].values(scene)
    assert abs(terms).max() > 0 and "Source neuron" in text_of(says(scene)) and len(chips(scene, "dark")) == 1
    assert table_rows(scene)[0]["id"] == "{}.{}.{}-{}.{}.{}".format(*address)


@pytest.mark.parametrize("measure,more", [("change", {"since": 20}), ("read", {"symbol": "t"})])
def test_the_other_measures(
    stage: tuple[Services, str], measure: str, more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    scene = services.scene(ViewState(run=run, query=40))
    result = finished(services, start_search(services, scene, measure, 3, **more))
    view = ViewState(page="synapses", run=run, result=result)
    assert services.open_run(result).manifest["settings"]["at"] == 40
    check_panels(services, view, ["top-synapses", "synapse-authors"], monkeypatch)


def test_panels_of_the_synapses_page(
    stage: tuple[Services, str], searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    first, second = (tuple(map(int, row)) for row in services.open_run(searched).array("addresses")[[0, 5]])
    view = ViewState(page="synapses", run=run, result=searched, synapses=(second, first))  # type: ignore[arg-type]
    check_panels(services, view, [panel.id for panel in PAGES["synapses"].panels], monkeypatch)
    assert text_of(PAGES["synapses"].build(services, services.scene(view))).count("Who wrote it, exactly") == 1


@pytest.mark.parametrize("changes,words", [
    ({"measure": "strenght"}, "Did you mean 'strength'"), ({"layer": 0}, "from 1 to 3"), ({"measure": "change", "since": 84}, "beginning"),
    ({"measure": "read", "symbol": "ab"}, "one character"), ({"measure": "read", "symbol": None}, "one character"),
])  # fmt: skip
def test_mistakes_in_the_search_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    services, run = stage
    with pytest.raises(FormError, match=words):
        start_search(services, services.scene(ViewState(run=run)), **{"measure": "strength", "layer": 2, **changes})


def test_following(stage: tuple[Services, str]) -> None:
    services, run = stage
    scene = services.scene(ViewState(run=run))
    assert typed(scene, [1, 0, 2, 3, 3, 511]) == (1, 0, 2, 3, 3, 511)
    for parts, words in (
        ([1, 0, 2, 3, 3, 512], "Neuron 512"),
        ([2, 0, 0, 2, 0, 0], "higher layer"),
        ([1, 0, "", 2, 0, 0], "neuron is ''"),
    ):
        with pytest.raises(FormError, match=words):
            typed(scene, parts)
    view = ViewState(run=run)
    for number in range(MAX_SYNAPSES + 2):
        change = toggled(view, (0, 0, number, 1, 0, 0))["change"]["syn"]
        view = ViewState.from_url("/synapses", f"run={run}&syn={change}")
    assert [each[2] for each in view.synapses] == list(range(2, MAX_SYNAPSES + 2))
    assert toggled(ViewState(synapses=view.synapses[:1]), view.synapses[0])["change"]["syn"] is None
    with pytest.raises(NothingToShow, match="Search"):
        PANELS["synapse-fixed"].values(scene)
