"""The Probes page: what it stores beside the battery, its panels' Python, refusals in the probe's words, heads that lead to Attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from app import ablate
from app.dashboard import build_app, job_line
from app.destinations import Destination
from app.measure.common import FormError
from app.measure.probes import MADE_UP, OWN, PROBES, look_at, sources, start_probing
from app.model_service import WorkbenchModels
from app.pages import find_pages
from app.pages.probes import brushed_places, grid_rows, head_words, looked
from app.panels.base import NothingToShow
from app.panels.probe_scores import chosen_head, chosen_score, other_score, score_words
from app.services import Services
from app.theme import DARK, LIGHT
from app.view_state import ViewState
from probes import battery
from probes.battery import store_probes, survey
from tests.app.conftest import Outcome
from tests.app.dashboard.bdh_runs import finished
from tests.app.dashboard.test_bdh_measurements import check_panels
from tests.app.dashboard.test_pages import text_of
from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import RunStore

PAGE = next(page for page in find_pages() if page.name == "probes")
PANELS = {panel.id: panel for panel in PAGE.panels}
FORM = {"name": "induction-circuit", "probes": list(PROBES), "source": MADE_UP, "text": "", "length": 40,
        "lengths": "28", "sequences": 4, "seed": 0, "twin": True, "whole": False}  # fmt: skip


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    torch.set_num_threads(1)
    store, jobs = RunStore(tmp_path_factory.mktemp("probes")), JobQueue()
    catalogue = WorkbenchModels(store, jobs)
    catalogue.warm_up()
    yield Services(store, jobs, catalogue)
    jobs.shutdown(timeout=60)


@pytest.fixture(scope="module")
def result(services: Services) -> str:
    return finished(services, start_probing(services, **FORM))


def view(result: str, **changes: object) -> ViewState:
    return ViewState(page="probes", result=result, **changes)  # type: ignore[arg-type]


def test_the_page_stores_what_the_survey_finds(services: Services, result: str) -> None:
    run = services.open_run(result)
    expected = survey(models.load("induction-circuit"), FORM["probes"], length=40, lengths=(28,), sequences=4)  # type: ignore[arg-type]
    twice = store_probes(services.store, models.load("induction-circuit"), expected)
    assert set(run.arrays()) == set(twice.arrays()) and run.manifest["results"] == twice.manifest["results"]
    for name in run.arrays():
        np.testing.assert_array_equal(run.array(name), twice.array(name), err_msg=name)
    services.store.delete(twice.id)


def test_local_queries_and_basins_have_maps_words_and_a_profile(services: Services, result: str) -> None:
    """The form offers every probe of the battery; the profile over segments is the battery's own, and its depth the stored score."""
    assert set(PROBES) == set(battery.PROBES)
    scene = services.scene(view(result, score="basin.score", measured_head="1.2"))
    run, segments = services.open_run(result), PANELS["probe-segments"]
    found = battery.run_probes(models.load("induction-circuit"), ["basin"], length=40, sequences=4)["basin"]
    np.testing.assert_allclose(segments.values(scene), found.density[1, 2], atol=1e-12)
    tokens = [f"{at}–{at + 3}" for at in range(0, 32, 4)]
    assert list(segments.figure(scene, LIGHT).data[0].customdata) == tokens
    density = segments.values(scene)
    depth = (min(density[0], density[-1]) - density[1:-1].mean()) / density.mean()
    assert run.array("basin.score")[1, 2] == pytest.approx(depth, abs=1e-6)
    assert score_words("local.score") == "local: share of local queries"
    assert score_words("retrieval.score") == "retrieval: copy–paste score"
    page = text_of(PAGE.build(services, scene))
    assert "Local queries" in page and "Attention basin" in page and "Where in the prompt it reads" in page


def test_command_python_and_page_agree_number_by_number(
    services: Services, workbench: Callable[..., Outcome], tmp_path: Path
) -> None:
    """`workbench probe --json`, three lines of Python and the form: the same results and the same stored arrays."""
    names = ["retrieval", "sinks", "induction"]
    done = workbench("probe", "induction-circuit", "--probe", ",".join(names), "--length", 40, "--lengths", "28", "--sequences", 4,
                     "--json", "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    model = models.load("induction-circuit")
    found = battery.survey(model, names, length=40, lengths=(28,), sequences=4)
    python = store_probes(RunStore(tmp_path), model, found)
    page = services.open_run(finished(services, start_probing(services, **{**FORM, "probes": names})))
    command = RunStore(tmp_path).open(done.json["id"])
    for run in (command, page):
        assert set(run.arrays()) == set(python.arrays())
        for name in python.arrays():
            np.testing.assert_array_equal(run.array(name), python.array(name), err_msg=name)
    printed = done.json["results"]
    assert set(printed) == set(names) and printed == python.manifest["results"] == page.manifest["results"]
    alone = battery.run_probes(model, names, length=40, sequences=4)
    assert (
        printed["retrieval"]["scores"] == alone["retrieval"].to_json()["scores"]
        and max(map(max, printed["retrieval"]["scores"])) > 0.5
    )
    assert printed["sinks"]["first_mass"] == alone["sinks"].to_json()["first_mass"]
    assert all(printed["induction"][key] == value for key, value in alone["induction"].to_json().items())


@pytest.mark.parametrize("score", ["induction.previous_token", "sinks.first_mass"])
def test_panels_draw_and_their_python_makes_their_arrays(
    services: Services, result: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(PANELS) if score.startswith("induction") else ["probe-list", "probe-twin", "probe-dose"]
    check_panels(
        services, view(result, score=score, against="sinks.sink_mass", measured_head="1.2"), names, monkeypatch
    )


def test_what_is_chosen_follows_the_address(services: Services, result: str) -> None:
    scene = services.scene(view(result))
    assert chosen_score(scene) == "induction.induction" and other_score(scene) == "census.induction"
    row, head = chosen_head(scene)  # type: ignore[misc]
    values = services.open_run(result).array("induction.induction")
    assert values[row, head] == values.max() and row == 1
    other = services.scene(view(result, score="sinks.sink_mass", against="sinks.sink_mass", measured_head="0.3"))
    assert (chosen_score(other), chosen_head(other)) == ("sinks.sink_mass", (0, 3)) and other_score(
        other
    ) != "sinks.sink_mass"
    assert chosen_head(services.scene(view(result, measured_head="7.0"))) == (row, head)  # not in this model
    assert "Head 0.3" in text_of(head_words(other)) and "copy–paste score" in text_of(head_words(other))
    rows = grid_rows(scene, None)
    assert [each["score"] for each in rows] == sorted((each["score"] for each in rows), reverse=True) and len(rows) == 8
    assert {each["id"] for each in grid_rows(scene, ["1.0", "0.2"])} == {"1.0", "0.2"}
    assert brushed_places({"points": [{"customdata": "1.0"}, {"x": 1}]}) == ["1.0"] and brushed_places(None) is None
    page = text_of(PAGE.build(services, scene))
    assert "Attention sinks" in page and "Retrieval heads" in page and "Newest first" in page


def test_the_address_names_scores_heads_and_features() -> None:
    chosen = ViewState(
        page="probes",
        result="a-1",
        score="census.induction",
        against="sinks.first_mass",
        measured_head="1.2",
        feature=17,
    )
    assert ViewState.from_url("/probes", chosen.to_query()) == chosen == ViewState.from_dict(chosen.as_dict())
    for query in (
        "score=census",
        "score=<b>.x",
        "vs=a.b.c",
        "mh=1",
        "mh=1.x",
        "mh=99999.0",
        "feature=-1",
        "feature=1.5",
    ):
        assert ViewState.from_url("/probes", query) == ViewState(page="probes"), query


def test_a_probe_that_refuses_says_so_in_its_own_words(services: Services) -> None:
    found = finished(services, start_probing(services, **{**FORM, "name": "gpt2-random", "probes": ["retrieval", "sinks"], "source": OWN,
                                                          "text": "abcdefgh" * 5, "lengths": "", "twin": False}))  # fmt: skip
    scene = services.scene(view(found))
    with pytest.raises(NothingToShow, match=r"in none of .* runs"):
        PANELS["probe-retrieval"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="not among those"):
        PANELS["probe-census"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="basin was not among"):
        PANELS["probe-segments"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="tick the random twin"):
        PANELS["probe-twin"].figure(scene, LIGHT)
    with pytest.raises(NothingToShow, match="further lengths"):
        PANELS["probe-dose"].figure(scene, LIGHT)
    assert any("one text has no interval" in fact for fact in PANELS["probe-sinks"].facts(scene))


def test_a_model_without_patterns_and_one_with_a_single_head(services: Services) -> None:
    from dataclasses import replace

    refused = {
        **FORM,
        "name": "lstm-random",
        "probes": ["sinks", "retrieval"],
        "lengths": "",
        "sequences": 2,
        "twin": False,
    }
    scene = services.scene(view(finished(services, start_probing(services, **refused))))
    for name in ("probe-retrieval", "probe-sinks", "probe-list", "probe-profile", "probe-scatter"):
        with pytest.raises(NothingToShow):
            PANELS[name].figure(scene, DARK)
    assert "None of the probes" in text_of(head_words(scene)) and looked(services, scene, "")[2]
    config = models.build("attention-only").config
    lone = models.build("attention-only", config=replace(config, mixer=replace(config.mixer, n_heads=1), n_layers=3))
    run = store_probes(
        services.store, lone, survey(lone, ["induction", "sinks"], length=30, sequences=3), settings={"length": 30}
    )
    scene = services.scene(view(run.id, measured_head="2.0"))
    figure = PANELS["probe-induction"].figure(scene, LIGHT)
    assert np.shape(figure.data[0].z) == (3, 1) and figure.data[0].customdata[2][0] == "2.0"
    assert PANELS["probe-twin"].values(scene).shape == (2, 3, 1) and PANELS["probe-profile"].values(scene).shape == (
        30,
    )


def test_a_head_leads_to_the_attention_page(services: Services, result: str) -> None:
    run = services.open_run(result)
    _, words = ablate.start(services, view(result, measured_head="1.2"))
    assert "there is none yet" in words, "nothing can be taken away without a run"
    job = look_at(services, run, "1.2")
    assert isinstance(job, Job)  # there was no trace of this model
    done = services.jobs.wait(job.id, timeout=600)
    assert isinstance(done.result, Destination), done.error
    target = {"change": {"run": done.result.run, "layer": 1, "head": 2}, "page": "/attention"}
    assert (
        job_line(services, job.id)["target"] == target and look_at(services, run, "1.2") == target
    )  # now there is one
    trace = services.open_run(done.result.run)
    assert trace.kind == "trace" and len(trace.manifest["tokens"]["ids"]) == 40  # the first made-up sequence
    assert looked(services, services.scene(view(result, measured_head="1.2")), "")[0] == target
    shown = view(result, measured_head="1.2")
    job_id, words = ablate.start(services, shown)  # the chosen head is the one that is taken away, in that run
    assert job_id and not words, words
    done = services.jobs.wait(job_id, timeout=600)
    ablated = services.open_run(str(done.result)).manifest
    assert ablated["settings"]["basket"] == "zero head 1.2" and ablated["model"]["name"] == "induction-circuit"
    said = str(ablate.progress(services, job_id, shown)[0])
    assert "Δlogit of" in said and f"run={trace.id}" in said


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": "gpt-englsh"}, "Did you mean 'gpt-english'"), ({"probes": []}, "at least one probe"),
    ({"probes": ["sink"]}, "Did you mean 'sinks'"),
    ({"source": "wikipedia"}, "what is read"), ({"source": OWN, "text": " "}, "Type a text"),
    ({"lengths": "48; x"}, "whole numbers separated"),
    ({"lengths": "9000"}, "from 24 to 512"), ({"length": 8}, "the length is 8"), ({"sequences": 1}, "sequences is 1"),
    ({"lengths": ",".join(["30"] * 7)}, "7 further lengths"),
])  # fmt: skip
def test_mistakes_in_the_form_are_named(services: Services, changes: dict, words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_probing(services, **{**FORM, **changes})


def test_wiring(services: Services, result: str) -> None:
    """A brushed scatter narrows the list, over HTTP as the browser asks for it."""
    client = build_app(services.store, services.jobs, services.models).server.test_client()
    part = {"depends": [], "view": {"result": result, "score": "induction.induction"}}
    scatter = '{"panel":"probe-scatter","type":"graph"}'
    answer = client.post("/_dash-update-component", json={
        "output": "..probe-grid.rowData...probe-brushed.children..",
        "outputs": [{"id": "probe-grid", "property": "rowData"}, {"id": "probe-brushed", "property": "children"}],
        "inputs": [
            {"id": {"type": "slice", "kind": "content", "panel": "probe-grid"}, "property": "data", "value": part},
            {"id": {"type": "graph", "panel": "probe-scatter"}, "property": "selectedData", "value": {"points": [{"customdata": "1.3"}]}},
        ],
        "changedPropIds": [f"{scatter}.selectedData"],
    })  # fmt: skip
    rows = answer.get_json()["response"]["probe-grid"]["rowData"]
    assert [row["id"] for row in rows] == ["1.3"] and rows[0]["head"] == "1.3"
    assert sources()[0][0] == MADE_UP
