"""The page of the case studies: what it shows, starts and exports, as plain functions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from app.dashboard import build_app, job_line
from app.page import where_to
from app.pages import cases, find_pages
from app.pages.cases import claim_details, claim_rows, exported, start, study_rows, tier_words
from app.services import Services
from app.studies import open_study
from app.view_state import ViewState
from case_studies import run_study
from case_studies.harness import discovery
from case_studies.harness.claims import Study, read_study
from tests.app.dashboard.fake_models import FakeModels
from tests.app.dashboard.test_pages import text_of
from tests.case_studies.planted import CLAIM, CLAIMS, write_study
from tests.case_studies.test_running import RICH
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore

WAITING = """
import time


def run(context):
    return context.each_seed(measure).measurements()


def measure(context):
    for step in range(3000):
        context.progress(step / 3000, "waiting")
        time.sleep(0.01)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Services over a store of the test's own, with one planted study in place of the real ones."""
    monkeypatch.setattr(discovery, "ROOT", tmp_path / "studies")
    write_study(tmp_path / "studies", study=RICH, readme="# Planted\n\nRead me.\n")
    store, jobs = RunStore(tmp_path / "runs"), JobQueue()
    return Services(store, jobs, FakeModels(store, jobs))


def page_text(services: Services, **view: str) -> str:
    return text_of(cases.PAGE.build(services, services.scene(ViewState(page="cases", **view))))


def planted(services: Services) -> Study:
    return read_study(discovery.ROOT / "planted")


def test_the_list(own: Services) -> None:
    (row,) = study_rows(own)
    assert row["title"] == "Planted" and row["last"] == "never run here" and row["reproduced"] is None
    run_study(planted(own), store=own.store)
    (row,) = study_rows(own)
    assert (row["reproduced"], row["failed"], row["open"]) == (1, 0, 0) and row["last"].startswith("small · ")
    write_study(discovery.ROOT, "broken", claims="title = ")
    words = page_text(own)
    assert "All studies" in words and "broken" in words and "not valid TOML" in words


def test_a_study_before_and_after_its_first_run(own: Services) -> None:
    before = page_text(own, study="planted")
    assert "Measure it here" in before and "This result" not in before
    (row,) = claim_rows(planted(own), None)
    assert (row["verdict"], row["ours"], row["published"]) == ("never run here", "–", "0.75")
    result = run_study(planted(own), store=own.store)
    after = page_text(own, study="planted")
    assert "This result" in after and "1 reproduced" in after and result.run in after and "Line" in after
    (row,) = claim_rows(planted(own), result)
    assert row["verdict"] == "reproduced" and row["n"] == 3


def test_a_result_opens_its_study_and_a_wrong_one_says_so(own: Services) -> None:
    small, smoke = (run_study(planted(own), tier, store=own.store) for tier in ("small", "smoke"))
    opened = open_study(own.store, "", smoke.run)
    assert (
        opened.result == smoke
        and opened.study is not None
        and [each.run for each in opened.others] == [smoke.run, small.run]
    )
    assert open_study(own.store, "planted", "").result == small, "the larger tier says more"
    assert "there is no run" in page_text(own, study="planted", result="20260101-nothing")
    assert "there is no study 'plantde'" in page_text(own, study="plantde")
    with own.store.create("training", "no study") as run:
        pass
    assert "is a training run" in page_text(own, result=run.id)


def test_a_study_that_is_gone_still_shows_its_results(own: Services) -> None:
    result = run_study(planted(own), store=own.store)
    for file in (discovery.ROOT / "planted").iterdir():
        file.unlink() if file.is_file() else None
    words = page_text(own, result=result.run)
    assert "This result" in words and "there is no study 'planted'" in words


def test_the_details_of_a_claim(own: Services) -> None:
    result = run_study(planted(own), store=own.store)
    words = text_of(claim_details(planted(own), result, "above-half"))
    for part in (
        "ci_low > 0.5",
        "Table 1",
        "closed form: a theorem",
        "95 % interval by t",
        "reproduced: ci_low",
        "0.75, 0.75, 0.75",
    ):
        assert part in words, part
    assert "ci_low > 0.5" in text_of(claim_details(planted(own), None, "above-half"))
    assert "not part of the study" in text_of(claim_details(planted(own), result, "gone"))


def test_tiers_in_words(own: Services) -> None:
    assert tier_words(planted(own), "small") == "3 seeds, about 6 s on one core, decides 1 of 1 claims."
    assert tier_words(planted(own), "smoke") == "1 seed, decides 0 of 1 claims."


def test_exports(own: Services) -> None:
    result = run_study(planted(own), store=own.store)
    as_json, as_csv = exported(own, result.run, "json"), exported(own, result.run, "csv")
    assert as_json is not None and json.loads(as_json["content"])["run"] == result.run
    assert as_csv is not None and "above-half" in as_csv["content"] and as_csv["filename"] == f"{result.run}.csv"
    assert exported(own, "20260101-nothing", "csv") is None


def test_starting_leads_to_the_result(own: Services) -> None:
    job_id, words = start(own, "planted", "small", 2)
    assert job_id is not None and words == ""
    job = own.jobs.wait(job_id, timeout=120)
    assert job.state == "done", job.traceback
    line = job_line(own, job_id)
    assert line["run"] == job.result and where_to(own, find_pages(), job.result) == {
        "change": {"result": job.result, "study": None}, "page": "/cases",
    }  # fmt: skip
    assert where_to(own, find_pages(), "20260101-nothing") == {"run": "20260101-nothing", "page": "/"}
    assert open_study(own.store, "", job.result).result.seeds == (0, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("name,tier,seeds,words", [
    ("plantde", "small", None, "Did you mean 'planted'"), (None, "small", None, "no study"), ("planted", "large", None, "no tier"),
    ("planted", None, None, "no tier"), ("planted", "small", 0, "from 1 to 100"), ("planted", "small", 1e9, "from 1 to 100"),
])  # fmt: skip
def test_what_cannot_be_started(
    own: Services, name: str | None, tier: str | None, seeds: float | None, words: str
) -> None:
    job, said = start(own, name, tier, seeds)
    assert job is None and words in said and own.jobs.jobs() == []


def test_cancelling_a_study(own: Services) -> None:
    write_study(discovery.ROOT, study=WAITING)
    job_id, _ = start(own, "planted", "smoke", None)
    assert job_id is not None and start(own, "planted", "smoke", None)[0] == job_id, (
        "the same study is not started twice"
    )
    while not own.jobs.job(job_id).message:
        time.sleep(0.02)
    own.jobs.cancel(job_id)
    assert own.jobs.wait(job_id, timeout=60).state == "cancelled" and own.store.list() == []


def test_the_view_names_study_and_result() -> None:
    view = ViewState(page="cases", study="some_study", result="20260101-abc")
    assert view.to_url() == "/cases?v=1&result=20260101-abc&study=some_study"
    assert ViewState.from_url("/cases", view.to_query()) == view
    assert ViewState.from_url("/cases", "study=../etc&result=A_B") == ViewState(page="cases")


def test_the_app_builds_with_the_page(own: Services) -> None:
    client = build_app(own.store, own.jobs, own.models).server.test_client()
    assert client.get("/cases?study=planted").status_code == 200


def test_claims_without_a_study_are_told_apart(own: Services) -> None:
    write_study(discovery.ROOT, claims=CLAIMS + CLAIM.replace("> 0.5", "> 0.9"))
    result = run_study(planted(own), store=own.store)
    assert claim_rows(None, result)[0]["verdict"] == "not reproduced" and "1 not reproduced" in page_text(
        own, result=result.run
    )
