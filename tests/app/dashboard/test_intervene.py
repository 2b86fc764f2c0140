"""Intervene and Patching pages on real models: jobs, panels and their Python, the form, the basket, refusals, and "ablate" elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import models
from app import ablate
from app.dashboard import build_app
from app.measure.basket import (
    cost_words,
    form_values,
    line_of,
    moved,
    offers_of,
    parse_basket,
    put,
    rows_of,
    shown_fields,
)
from app.measure.common import FormError
from app.measure.interventions import start_intervening
from app.measure.patching import offered_views, start_patching
from app.model_service import WorkbenchModels
from app.pages import find_pages
from app.pages.intervene import first_basket, first_prompts, place_choices, row_list
from app.pages.intervene_patching import cost
from app.services import Services
from app.theme import DARK, LIGHT
from app.view_state import ViewState
from probes.interventions import KINDS, intervene, parse_line
from probes.objectives import LogitDifference
from probes.patching import activation_patching
from tests.app.dashboard.bdh_runs import finished
from tests.app.dashboard.test_pages import text_of
from workbench import Ablate
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

PAGES = {page.name: page for page in find_pages()}
TEXT = "the cat sat on the mat; the cat sat"
CLEAN, CORRUPTED = "Tom met Ann. Ann gave ", "Tom met Ann. Tom gave "


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, dict[str, str]]]:
    torch.set_num_threads(1)
    store, jobs = RunStore(tmp_path_factory.mktemp("intervene")), JobQueue()
    services = Services(store, jobs, WorkbenchModels(store, jobs))
    runs = {name: trace_run(models.load(name), TEXT, store).id for name in ("retnet-english", "gpt-english")}
    yield services, runs
    jobs.shutdown(timeout=60)


@pytest.fixture(scope="module")
def ran(stage: tuple[Services, dict[str, str]]) -> str:
    services, runs = stage
    scene = services.scene(ViewState(run=runs["gpt-english"], query=20))
    return finished(
        services,
        start_intervening(services, scene, "zero head 1.2\nscale mlp 2 by 0.5 at 3:", 3, 1, target="e", against=" "),
    )


def check_panels(
    services: Services, view: ViewState, monkeypatch: pytest.MonkeyPatch, names: set[str] | None = None
) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(services.store.root))
    scene = services.scene(view)
    for panel in PAGES[view.page].panels:
        if names is not None and panel.id not in names:
            continue
        panel.check(scene)
        values = panel.values(scene)
        assert np.isfinite(values).any(), panel.id
        assert all(len(panel.figure(scene, theme).to_json()) < 400_000 for theme in (LIGHT, DARK))
        headers, rows = panel.table(scene)
        lines = list(rows)
        assert lines and all(len(line) == len(headers) for line in lines), panel.id
        assert panel.facts(scene) and panel.source(scene) is not None
        code: str = panel.snippet(scene)
        found: dict[str, Any] = {}
        exec(compile(code, panel.id, "exec"), found)
        np.testing.assert_allclose(np.asarray(found["values"]), values, rtol=1e-5, atol=1e-7, err_msg=code)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_basket_runs_as_a_job_and_its_panels_say_how(
    stage: tuple[Services, dict[str, str]], ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, runs = stage
    found, model = services.open_run(ran), models.load("gpt-english")
    hooks = [
        Ablate("blocks.1.attn.hook_z", heads=[2]),
        ("blocks.2.hook_mlp_out", lambda x, hook: torch.cat([x[:, :3], 0.5 * x[:, 3:]], 1)),
    ]
    with torch.no_grad():
        before, after = model(TEXT)[0].double(), model.run_with_hooks(TEXT, hooks=hooks)[0].double()
    wanted = (after - before)[20, ord("e")] - (after - before)[20, ord(" ")]
    np.testing.assert_allclose(found.array("target"), [float(wanted)], atol=1e-4)
    assert found.manifest["results"]["targets"] == ["e"] and found.array("controls").shape == (3, len(TEXT))
    view = ViewState(page="intervene", run=runs["gpt-english"], result=ran)
    check_panels(services, view, monkeypatch)
    page = text_of(PAGES["intervene"].build(services, services.scene(view)))
    assert "no layer carries a recurrent state" in page and "only a BDH" in page
    again = intervene(model, found.manifest["settings"]["prompts"], [r["line"] for r in found.manifest["interventions"]], target="e",
                      wrong=" ", at=20, controls=3, seed=1)  # fmt: skip
    np.testing.assert_allclose(
        again.change("loss").controls, found.manifest["results"]["changes"]["loss"]["controls"], atol=1e-9
    )


def test_the_basket_comes_from_address_result_or_run(stage: tuple[Services, dict[str, str]], ran: str) -> None:
    services, runs = stage
    run = runs["gpt-english"]
    assert first_basket(services.scene(ViewState(run=run, layer=1, head=3))) == "zero head 1.3"
    assert first_basket(services.scene(ViewState(run=run, result=ran))) == "zero head 1.2\nscale mlp 2 by 0.5 at 3:"
    view = ViewState(page="intervene", run=run, result=ran, basket="zero mlp 1", prompts="one\ntwo ")
    assert first_basket(services.scene(view)) == "zero mlp 1" and first_prompts(services.scene(view)) == "one\ntwo "
    assert first_prompts(services.scene(ViewState(run=run, result=ran))) == ""
    path, query = view.to_url().split("?")
    assert ViewState.from_url(path, query) == view


def test_several_prompts(stage: tuple[Services, dict[str, str]]) -> None:
    services, runs = stage
    scene = services.scene(ViewState(run=runs["retnet-english"]))
    found = services.open_run(
        finished(
            services, start_intervening(services, scene, "reset state 1 after 4", 2, 0, "one two three\nfour five ")
        )
    )
    assert found.manifest["settings"]["prompts"] == ["one two three", "four five "]
    assert found.array("target").shape == (2,) and found.manifest["results"]["at"] == [12, 9]
    assert found.manifest["results"]["changes"]["target"]["interval"] is not None


@pytest.mark.parametrize("name,basket,words", [
    ("gpt-english", "", "0 edits"), ("gpt-english", "zero hea 1.2", "not take it|understood|head"),
    ("gpt-english", "reset state 1 after 3", "does not take it"),
    ("gpt-english", "neurons 0.3", "only a BDH"), ("gpt-english", "zero mlp 7", "layers 0 to 3"),
    ("gpt-english", "zero head 1.7", "no head 7"),
    ("retnet-english", "window layer 1 sinks 1 last 4", "does not take it"), ("gpt-english", "feature x 1 to 0", "no dictionary"),
    ("gpt-english", "zero mlp 1 at 99", "no token 99"),
])  # fmt: skip
def test_what_cannot_run_is_refused_before_a_job(
    stage: tuple[Services, dict[str, str]], name: str, basket: str, words: str
) -> None:
    services, runs = stage
    if basket == "zero hea 1.2":  # the place is looked up in the model itself
        job = services.jobs.wait(
            start_intervening(services, services.scene(ViewState(run=runs[name])), basket, 1, 0).id, timeout=60
        )
        assert job.state == "failed" and "Did you mean 'head'" in str(job.error)
        return
    with pytest.raises(FormError, match=words):
        start_intervening(services, services.scene(ViewState(run=runs[name])), basket, 1, 0)
    with pytest.raises(FormError, match="draws"):
        start_intervening(services, services.scene(ViewState(run=runs[name])), "zero mlp 1", 1000, 0)


# ---- the form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_writes_every_kind(kind: str) -> None:
    operation = parse_line(f"{KINDS[kind].verb} {KINDS[kind].example}")
    values = form_values(operation)
    assert line_of(kind, values) == str(operation)
    assert {name for name, value in values.items() if value and name not in shown_fields(kind)} <= {"place"}


@pytest.mark.parametrize("kind,values,words", [
    (None, {}, "Choose what to do"), ("zero", {"place": "head", "layer": "1"}, "names no head"),
    ("scale", {"place": "mlp", "layer": "x"}, "layer: 'x'"),
    ("steer", {"place": "resid", "layer": "1", "by": "2", "texts": "one"}, "two texts"), ("cut", {"layer": "1"}, "understood"),
])  # fmt: skip
def test_the_form_names_what_is_missing(kind: str | None, values: dict[str, str], words: str) -> None:
    with pytest.raises(FormError, match=words):
        line_of(kind, values)


def test_lines_are_moved_replaced_and_removed() -> None:
    text = "a\nb\n\nc"
    assert moved(text, 2, -1) == "a\nc\nb" and moved(text, 0, -1) == "a\nb\nc"
    assert put(text, 1, None) == "a\nc" and put(text, 1, "d") == "a\nd\nc" and put(text, None, "d") == "a\nb\nc\nd"


def test_rows_say_what_is_wrong(stage: tuple[Services, dict[str, str]]) -> None:
    services, runs = stage
    scene = services.scene(ViewState(run=runs["gpt-english"]))
    offers = offers_of(services, scene)
    rows = rows_of("zero head 1.2\nzer head 1\nreset state 0 after 3\nzero mlp 1 at 99", scene.n_tokens, offers)
    assert [bool(row.problem) for row in rows] == [False, True, True, True]
    said = text_of(row_list(rows))
    assert "Did you mean 'zero'" in said and "does not take it" in said and "no token 99" in said
    choices = place_choices("zero", offers)
    assert choices[0]["items"][0]["value"] == "head" and "blocks.0.attn.hook_z" in {
        item["value"] for item in choices[1]["items"]
    }
    assert "empty" in text_of(row_list([]))
    assert (
        parse_basket("zero head 1.2")
        and cost_words(10**6, 100, 10)[1] is False
        and cost_words(10**9, 1000, 100)[1] is True
    )


def test_wiring(stage: tuple[Services, dict[str, str]]) -> None:
    """The callbacks of the page answer over HTTP: a line is added, and every line is read."""
    services, runs = stage
    client = build_app(services.store, services.jobs, services.models).server.test_client()
    specification = json.loads(client.get("/_dash-dependencies").data)
    view = {**ViewState(page="intervene", run=runs["gpt-english"]).as_dict()}

    def call(output: str, inputs: dict[str, Any], triggered: str) -> dict[str, Any]:
        (found,) = [
            each
            for each in specification
            if output in each["output"] and any(triggered.split(".")[0] in i["id"] for i in each["inputs"])
        ]
        given = lambda part: [{**each, "id": json.loads(each["id"]) if each["id"].startswith("{") else each["id"],  # noqa: E731
                               "value": inputs.get(f"{each['id']}.{each['property']}")} for each in found[part]]  # fmt: skip
        outputs = [
            dict(zip(("id", "property"), part.rsplit(".", 1), strict=True))
            for part in found["output"].strip(".").split("...")
        ]
        body = {
            "output": found["output"],
            "outputs": outputs,
            "inputs": given("inputs"),
            "state": given("state"),
            "changedPropIds": [triggered],
        }
        answer = client.post("/_dash-update-component", json=body)
        assert answer.status_code == 200, answer.data[:300]
        return json.loads(answer.data)["response"]

    form = {f"add-{name}.value": value for name, value in form_values(parse_line("zero head 1.2")).items()}
    added = call(
        "add-message",
        {**form, "add-line.n_clicks": 1, "add-kind.value": "zero", "intervene-basket.value": "zero mlp 1"},
        "add-line.n_clicks",
    )
    assert "zero mlp 1\nzero head 1.2" in json.dumps(added).replace("\\n", "\n")
    shown = call(
        "basket-rows",
        {"intervene-basket.value": "zero mlp 1\nzer", "intervene-draws.value": 5, "view.data": view},
        "intervene-basket.value",
    )
    assert "no edit is called" in json.dumps(shown) and "7 runs" in json.dumps(shown)


# ---- patching --------------------------------------------------------------------------------------------------------


def test_patching_grids(stage: tuple[Services, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    services, runs = stage
    scene = services.scene(ViewState(run=runs["retnet-english"]))
    assert offered_views(scene) == ["resid", "mixer", "mlp", "state", "head", "pattern"]
    assert "state" not in offered_views(services.scene(ViewState(run=runs["gpt-english"])))
    job = start_patching(services, scene, CLEAN, CORRUPTED, "T", "A", ["resid", "state", "pattern"], "denoise")
    found, model = services.open_run(finished(services, job)), models.load("retnet-english")
    objective = LogitDifference(ord("T"), ord("A"))
    exact = activation_patching(model, CLEAN, CORRUPTED, objective, role="resid", by=("pos",))
    np.testing.assert_allclose(found.array("exact.resid"), exact.normalised().numpy(), atol=1e-5)
    names = {f"patching-{name}{suffix}" for name in ("resid", "state", "pattern") for suffix in ("", "-estimate")}
    view = ViewState(page="patching", run=runs["retnet-english"], result=found.id)
    check_panels(services, view, monkeypatch, names)
    (panel,) = [panel for panel in PAGES["patching"].panels if panel.id == "patching-resid"]
    scene = services.scene(view)
    assert "correlation" in " ".join(panel.facts(scene))
    basket = panel.figure(scene, LIGHT).layout.meta["basket"]
    # the cell that a click puts into the basket does what the grid says of it
    column = int(np.nanargmax(np.abs(found.array("exact.resid")[1])))
    line = basket["line"].replace("{y}", basket["rows"][1]).replace("{x}", str(column))
    effects = intervene(model, basket["on"], line, target="T", wrong="A", controls=0)
    before, clean = found.manifest["results"]["corrupted"], found.manifest["results"]["clean"]
    assert effects.change("target").value / (clean - before) == pytest.approx(
        float(found.array("exact.resid")[1, column]), abs=1e-4
    )
    assert "Patching" in text_of(PAGES["patching"].build(services, scene))


@pytest.mark.parametrize("change,words", [
    ({"clean": ""}, "clean text"), ({"clean": CORRUPTED}, "the same"), ({"clean": "a\nb"}, "one line"),
    ({"views": []}, "at least one grid"),
    ({"views": ["stat"]}, "Did you mean 'state'"), ({"direction": "up"}, "direction"),
])  # fmt: skip
def test_mistakes_in_the_patching_form(
    stage: tuple[Services, dict[str, str]], change: dict[str, Any], words: str
) -> None:
    services, runs = stage
    asked = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answer": "T",
        "wrong": "A",
        "views": ["resid"],
        "direction": "denoise",
    } | change
    with pytest.raises(FormError, match=words):
        start_patching(services, services.scene(ViewState(run=runs["retnet-english"])), **asked)


def test_patching_says_what_is_wrong_with_the_texts(stage: tuple[Services, dict[str, str]]) -> None:
    services, runs = stage
    scene = services.scene(ViewState(run=runs["gpt-english"]))
    for clean, answer, words in (
        ("short", "T", "equal length"),
        (CLEAN, "TT", "exactly one"),
        (CLEAN, "A", "both ‘A’"),
    ):
        job = services.jobs.wait(
            start_patching(services, scene, clean, CORRUPTED, answer, "A", ["head"], "noise").id, timeout=60
        )
        assert job.state == "failed" and words in str(job.error), job.error
    assert "unequally long" in text_of(cost(scene, "ab", "abc", ["resid"]))


# ---- ablate from anywhere --------------------------------------------------------------------------------------------


def test_a_head_is_ablated_from_another_page(stage: tuple[Services, dict[str, str]]) -> None:
    services, runs = stage
    view = ViewState(page="attention", run=runs["gpt-english"], layer=1, head=2)
    assert "Ablate head" in text_of(ablate.button(services.scene(view)))
    job, words = ablate.start(services, view)
    assert job and not words
    for _ in range(600):
        said, ended, _ = ablate.progress(services, job, view)
        if ended:
            break
        time.sleep(0.1)
    run = services.open_run(services.jobs.job(job).result)
    text = text_of(said)
    assert (
        "Δlogit of" in text and "other heads of the layer" in text and "full result" in text and "zero head 1.2" in text
    )
    assert run.manifest["settings"]["basket"] == "zero head 1.2" and len(run.manifest["results"]["controls"]) == 3
    assert ablate.progress(services, "none", view)[1] is True
