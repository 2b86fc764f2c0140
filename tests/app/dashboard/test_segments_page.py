"""The Segments page: what its form starts, what its panels draw, where a boundary leads, and what is refused in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import models
from app.destinations import Destination
from app.measure.common import FormError
from app.measure.segments import look_at, start_segments
from app.pages.segments import PAGE, boundary_words, looked
from app.panels.base import NothingToShow
from app.panels.segments import chosen_boundary
from app.services import Services
from app.view_state import ViewState
from models.decoder import next_token_loss
from probes.interventions import parse
from probes.interventions.executor import Executor
from probes.segments import segment_memory
from tests.app.dashboard.bdh_runs import finished, shipped_services
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_pages import text_of
from workbench.lab.jobs import Job

MODEL, LENGTH = "induction-circuit", 16  # two layers, with two slots each
TEXT = "The keeper lit the lamp. The keeper lit the lamp again."
OTHER = "A young baker sold bread in the square."
FORM = {"name": MODEL, "text": TEXT, "length": LENGTH, "other": OTHER, "parts": True}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str]]:
    torch.set_num_threads(1)
    services = shipped_services(tmp_path_factory.mktemp("segments"))
    yield services, finished(services, start_segments(services, **FORM))
    services.jobs.shutdown(timeout=60)


def test_the_page_measures_what_python_measures(stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch) -> None:
    services, result = stage
    found, run = segment_memory(models.load(MODEL), TEXT, LENGTH, other=OTHER), services.open_run(result)
    for name, values in found.loss.items():
        np.testing.assert_array_equal(run.array(f"loss.{name}"), values)
    np.testing.assert_array_equal(run.array("layer.cut"), found.layer_loss["cut"])
    np.testing.assert_array_equal(run.array("slot.other"), found.slot_loss["other"])
    view = ViewState(page="segments", result=result)
    names = [panel.id for panel in PAGE.panels]
    check_panels(services, view, names, monkeypatch)
    scene = services.scene(view)
    np.testing.assert_allclose(PANELS["segments-layer-cut"].values(scene), found.by_layer("cut"))
    np.testing.assert_allclose(PANELS["segments-loss"].values(scene)[2], found.mean_loss("other"))
    words = text_of(PAGE.build(services, scene))
    assert "What each part of a layer’s state is worth" in words and "The chosen boundary" in words
    headers, rows = PANELS["segments-change"].table(scene)
    assert headers[2:4] == ["numbers", "bytes"] and len(list(rows)) == 4 * 3
    said = PANELS["segments-change"].facts(scene)  # 16 tokens of two layers' keys and values, and 48
    assert said == [
        "8,192 numbers at the first boundary, 24,576 at the last",
        "what is there never changes, it only grows",
    ]
    assert f"the other text is shorter and was begun {found.repeated} times" in PANELS["segments-loss"].facts(scene)


def test_a_boundary_is_chosen_and_told(stage: tuple[Services, str]) -> None:
    services, result = stage
    found = services.open_run(result).manifest["results"]
    cut = np.array(found["lost_by_layer"]["cut"], float)
    best = services.scene(ViewState(result=result))
    assert chosen_boundary(best) == np.unravel_index(int(np.nanargmax(cut)), cut.shape)
    chosen = services.scene(ViewState(result=result, measured_head="1.2"))
    words = " ".join(text_of(each) for each in boundary_words(chosen))
    assert (
        "Layer 1 hands to segment 2 what it carries after token 31." in words and "value" in words and "4,096" in words
    )
    assert chosen_boundary(services.scene(ViewState(result=result, measured_head="9.2"))) == chosen_boundary(best)
    assert boundary_words(services.scene(ViewState())) == []


def test_a_boundary_leads_to_a_trace_of_the_same_text(stage: tuple[Services, str]) -> None:
    services, result = stage
    found = services.open_run(result)
    job = look_at(services, found, "/state", 1, 2)
    assert isinstance(job, Job)
    went = services.jobs.wait(job.id, timeout=300).result
    assert isinstance(went, Destination) and went.page == "/state" and went.change == {"layer": 1, "t": 31}
    trace = services.open_run(went.run)
    assert trace.manifest["text"] == TEXT and trace.model["name"] == MODEL
    scene = services.scene(ViewState(result=result, measured_head="1.2"))
    target, job, said = looked(services, scene, "/attention")  # the trace is there now
    assert target == {"change": {"run": went.run, "layer": 1, "q": 32}, "page": "/attention"} and not said
    target, _, _ = looked(services, scene, "/intervene")
    assert target["change"]["do"] == "cut layer 1 queries 32:48 keys 0:32"
    with pytest.raises(FormError, match="no layer 6"):
        look_at(services, found, "/state", 6, 2)


def test_what_was_not_asked_for_says_so(stage: tuple[Services, str]) -> None:
    services, _ = stage
    bare = finished(services, start_segments(services, **{**FORM, "other": " ", "parts": False, "length": 32}))
    scene = services.scene(ViewState(page="segments", result=bare))
    for name, words in (("segments-layer-cut", "layer by layer"), ("segments-slots", "layer by layer")):
        with pytest.raises(NothingToShow, match=words):
            PANELS[name].values(scene)
    with pytest.raises(NothingToShow, match="needs two"):
        PANELS["segments-change"].values(scene)
    assert PANELS["segments-loss"].values(scene).shape == (2, 2) and chosen_boundary(scene) == (0, 1)
    assert "Layer 0 hands to segment 1" in " ".join(text_of(each) for each in boundary_words(scene))
    alone = finished(services, start_segments(services, **{**FORM, "other": "", "length": 32}))
    with pytest.raises(NothingToShow, match="without another text"):
        PANELS["segments-layer-other"].values(services.scene(ViewState(page="segments", result=alone)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"name": "mamba"}, "no model called"), ({"text": ""}, "nothing to read"), ({"length": 1}, "Tokens of a segment is 1"),
     ({"other": "a" * 5000}, "other text has 5,000")],
)  # fmt: skip
def test_a_bad_form_is_refused_in_words(stage: tuple[Services, str], changes: dict[str, object], words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_segments(stage[0], **{**FORM, **changes})


def test_a_text_of_one_segment_is_refused_with_the_number_needed(stage: tuple[Services, str]) -> None:
    services, _ = stage
    job = start_segments(services, **{**FORM, "length": 512})
    done = services.jobs.wait(job.id, timeout=120)
    assert done.state == "failed" and "Expected at least 514" in str(done.error)


@pytest.mark.parametrize("name", [MODEL, "retnet-english"])
def test_the_operation_that_it_offers_is_the_cut_that_was_measured(stage: tuple[Services, str], name: str) -> None:
    """A cache is no longer read, a recurrent state is reset: the segment's loss is that of the map's cell."""
    services, _ = stage
    result = finished(services, start_segments(services, **{**FORM, "name": name}))
    found, model, (layer, segment) = services.open_run(result), models.load(name), (1, 2)
    target = look_at(services, found, "/intervene", layer, segment)
    if isinstance(target, Job):  # the trace is made first
        target = services.jobs.wait(target.id, timeout=300).result.target()
    line = target["change"]["do"]
    assert line.startswith("reset state 1 after 31" if name == "retnet-english" else "cut layer 1 queries 32:48")
    tokens = model.to_tokens(TEXT)
    hooks = Executor(model, [tokens]).hooks(parse([line], tokens.shape[1]), 0)
    with torch.no_grad():
        losses = next_token_loss(model.run_with_hooks(tokens, hooks=hooks), tokens, per_token=True)[0].numpy()
    start = segment * LENGTH
    expected = found.array("layer.cut")[layer, segment, 1:]
    np.testing.assert_allclose(losses[start : start + LENGTH - 1], expected, atol=2e-3, rtol=1e-3)
    assert abs(losses[start : start + LENGTH - 1] - found.array("loss.state")[segment, 1:]).max() > 0.05
