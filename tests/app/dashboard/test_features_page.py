"""The Features page: training, stopping, going on and opening; panels' Python; coloured contexts; the estimate; mistakes named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from app.dashboard import build_app
from app.measure.common import FormError
from app.measure.features import (
    checked_settings,
    estimate,
    estimate_words,
    folder_name,
    folders,
    sites_of,
    start_opening,
    start_training,
)
from app.model_service import WorkbenchModels
from app.pages import find_pages
from app.pages.features import chosen_words, estimated, first_site, measures
from app.panels.base import NothingToShow
from app.panels.feature_texts import coloured, context_lines
from app.panels.features import LIST, chosen_feature
from app.services import Services
from app.theme import LIGHT
from app.view_state import ViewState
from tests.app.dashboard.bdh_runs import finished
from tests.app.dashboard.test_bdh_measurements import check_panels
from tests.app.dashboard.test_pages import text_of
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore

PAGE = next(page for page in find_pages() if page.name == "features")
PANELS = {panel.id: panel for panel in PAGE.panels}
FORM: dict[str, Any] = {"name": "bdh-english", "site": "blocks.1.hook_resid_post", "head": None, "kind": "topk", "size": 300, "k": 2,
                        "sparsity": 0.1, "corpus": "pydoc", "sequences": 20, "context": 24, "every": 1, "steps": 30, "seed": 0,
                        "control": ["control"]}  # fmt: skip


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    torch.set_num_threads(1)
    store, jobs = RunStore(tmp_path_factory.mktemp("features")), JobQueue()
    yield Services(store, jobs, WorkbenchModels(store, jobs))
    jobs.shutdown(timeout=60)


@pytest.fixture(scope="module")
def result(services: Services) -> str:
    return finished(services, start_training(services, **FORM))


def view(result: str, **changes: object) -> ViewState:
    return ViewState(page="features", result=result, **changes)  # type: ignore[arg-type]


def test_panels_draw_and_their_python_makes_their_arrays(
    services: Services, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = services.open_run(result).array("shown")
    where = view(result, feature=int(shown[2]))
    unrun = [name for name in PANELS if name not in ("feature-contexts", "feature-neurons", "feature-partners")]
    check_panels(services, where, list(PANELS), monkeypatch, unrun)
    scene = services.scene(where)
    assert chosen_feature(scene) == shown[2] and chosen_feature(services.scene(view(result, feature=4800))) in shown
    page = text_of(PAGE.build(services, scene))
    assert "unexplained variance" in page and "All features" in page and "Features beside native neurons" in page
    words = text_of(chosen_words(services, scene))
    assert (
        f"Feature {shown[2]}" in words and "Native neuron" in words and "Overview page" in words
    )  # no run to take it out of yet
    named = dict((name, value) for name, value, _ in measures(services.open_run(result)))
    assert float(named["active per row (L0)"]) <= 2 and "loss recovered (CE)" in named
    rows = LIST.rows(scene)
    assert len(rows) == 300 and [row["density"] for row in rows] == sorted(
        (row["density"] for row in rows), reverse=True
    )


def test_contexts_are_coloured_by_value_and_by_the_neuron(services: Services, result: str) -> None:
    shown = services.open_run(result).array("shown")
    scene = services.scene(view(result, feature=int(shown[0])))
    lines = context_lines(scene, "light")
    whole = text_of(lines)
    contexts = PANELS["feature-contexts"].contexts(scene)  # type: ignore[attr-defined]
    assert whole.startswith("Strongest") and whole.count("neuron") == len(contexts)
    assert contexts[0]["value"] == pytest.approx(float(services.open_run(result).array("largest")[shown[0]]), rel=1e-5)
    spans = coloured(["a", "b", "c", "d", "e"], np.array([0.0, 0.0, 2.0, np.nan, 0.0]), 2.0, 2, "dark")
    assert [(span.children, span.className.endswith("is-focus")) for span in spans] == [
        ("ab", False),
        ("c", True),
        ("de", False),
    ]
    assert spans[1].style["background"].startswith("#") and spans[0].style == {}


def test_a_feature_that_never_fires_says_so(services: Services, result: str) -> None:
    silent = np.flatnonzero(services.open_run(result).array("density") == 0)
    assert len(silent)  # 300 features, two of which fire on each of a few hundred rows
    scene = services.scene(view(result, feature=int(silent[0])))
    with pytest.raises(NothingToShow, match="never fires"):
        PANELS["feature-contexts"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="dead"):
        PANELS["feature-values"].figure(scene, LIGHT)
    assert PANELS["feature-tokens"].figure(scene, LIGHT) is not None  # its direction speaks all the same


def test_a_stopped_training_goes_on_and_a_head_has_no_tokens(services: Services) -> None:
    form = {
        **FORM,
        "name": "induction-circuit",
        "site": "blocks.1.attn.hook_z",
        "head": 2,
        "steps": 300,
        "control": [],
        "corpus": "pydoc",
    }
    job = start_training(services, **form)
    while "step" not in job.message and not job.finished:
        time.sleep(0.01)
    services.jobs.cancel(job.id)
    assert services.jobs.wait(job.id, timeout=300).state == "cancelled"
    folder = folder_name(checked_settings(services, **form))
    assert dict(folders(services))[folder].endswith("(stopped: it goes on)")
    kept = services.store.root / folder / "dictionary" / "checkpoint.safetensors"
    assert kept.exists()  # what was learned is there
    again = services.open_run(finished(services, start_opening(services, folder)))
    assert again.manifest["results"]["folder"] == folder and "stopped" not in dict(folders(services))[folder]
    scene = services.scene(view(again.id))
    with pytest.raises(NothingToShow, match="residual stream only"):
        PANELS["feature-tokens"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="Only a BDH"):
        PANELS["feature-neurons"].figure(scene, LIGHT)


def test_the_way_to_intervene(services: Services, result: str) -> None:
    trace = finished(services, services.models.start_trace("bdh-english", "The old lamp.", {}))
    scene = services.scene(view(result, run=trace))
    links = [each for each in _links(chosen_words(services, scene))]
    folder = services.open_run(result).manifest["results"]["folder"]
    target = ViewState.from_url(*links[0].partition("?")[::2])
    assert (target.page, target.run, target.basket) == (
        "intervene",
        trace,
        f"feature {folder} {chosen_feature(scene)} to 0",
    )


def _links(parts: Any) -> list[str]:
    if isinstance(parts, (list, tuple)):
        return [link for part in parts for link in _links(part)]
    found = [parts.href] if getattr(parts, "href", None) else []
    return found + (
        _links(parts.children) if getattr(parts, "children", None) is not None and not isinstance(parts, str) else []
    )


def test_the_estimate_counts_products() -> None:
    settings = {
        "sequences": 100,
        "context": 101,
        "every": 1,
        "features": 512,
        "kind": "topk",
        "steps": 1000,
        "control": False,
    }
    one = estimate(settings, width=64, parameters=10**6, speed=1e9)
    # 10,100 tokens through 10⁶ weights, 1000 steps of 1024 rows × 64 × 512 three times, contexts of 10,000 rows eight times
    assert one["seconds"] == pytest.approx(4 + (1.01e10 + 3 * 1000 * 1024 * 64 * 512 + 8 * 10_000 * 64 * 512) / 1e9)
    assert one["disk"] == pytest.approx(1.2 * 10_000 * 64 * 2 + 3 * 2 * 64 * 512 * 4)
    twice = estimate({**settings, "control": True}, width=64, parameters=10**6, speed=1e9)
    assert twice["disk"] == 2 * one["disk"] and one["seconds"] < twice["seconds"] < 2 * one["seconds"]
    assert estimate({**settings, "kind": "gated"}, 64, 10**6, 1e9)["seconds"] > one["seconds"]


def test_the_estimate_is_told_before_the_start(services: Services) -> None:
    settings = checked_settings(services, **FORM)
    assert "MB of memory" in estimate_words(services, settings) and "MB on disk" in estimated(services, FORM)
    assert "no site 'x'" in estimated(services, {**FORM, "site": "x"})
    sites = sites_of(services, "bdh-english")
    assert first_site(sites) in sites and first_site([]) is None and sites_of(services, "no such model") == []


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": "bdh-englsh"}, "Did you mean 'bdh-english'"),
    ({"site": "blocks.1.hook_resid_pst"}, "Did you mean 'blocks.1.hook_resid_post'"),
    ({"kind": "top"}, "kind of dictionary"), ({"size": 1}, "number of features"), ({"k": 301}, "from 1 to 300"),
    ({"kind": "gated", "sparsity": 0}, "positive number"), ({"kind": "gated", "sparsity": None}, "positive number"),
    ({"corpus": "web"}, "the corpus"), ({"sequences": 5}, "from 10"), ({"steps": 0}, "steps is 0"), ({"head": 1.5}, "the head"),
])  # fmt: skip
def test_mistakes_in_the_form_are_named(services: Services, changes: dict, words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_training(services, **{**FORM, **changes})


def test_only_folders_of_the_runs_root_are_opened(services: Services, result: str) -> None:
    for name in ("../elsewhere", "/etc", "nothing", None):
        with pytest.raises(FormError, match="no dictionary"):
            start_opening(services, name)
    (services.store.root / "broken").mkdir()
    (services.store.root / "broken" / "request.json").write_text("[]")
    assert "broken" not in dict(folders(services))
    assert services.store.problems() == []  # dictionaries beside runs are no broken runs
    again = finished(services, start_opening(services, services.open_run(result).manifest["results"]["folder"]))
    np.testing.assert_array_equal(services.open_run(again).array("density"), services.open_run(result).array("density"))


def test_wiring(services: Services, result: str) -> None:
    """The training form's sites follow the model, over HTTP as the browser asks for it."""
    client = build_app(services.store, services.jobs, services.models).server.test_client()
    answer = client.post("/_dash-update-component", json={
        "output": "..features-site.data...features-site.value..",
        "outputs": [{"id": "features-site", "property": "data"}, {"id": "features-site", "property": "value"}],
        "inputs": [{"id": "features-name", "property": "value", "value": "gpt-english"}],
        "state": [{"id": "features-site", "property": "value", "value": "blocks.1.hook_y"}],
        "changedPropIds": ["features-name.value"],
    })  # fmt: skip
    found = answer.get_json()["response"]["features-site"]
    assert found["value"] in found["data"] and "blocks.0.attn.hook_z" in found["data"]
