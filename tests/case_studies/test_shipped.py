"""Results that come with the workbench: every one reads, fits its study's claims, and is found where one looks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from case_studies import find_study, known_results, run_study, study_results
from case_studies.harness import discovery
from case_studies.harness.errors import StudyError
from case_studies.harness.results import NOT_RUN, read_result
from case_studies.harness.shipped import FOLDER, code_changed, known_result, open_run, ship, shipped_runs
from tests.case_studies.planted import write_study
from tests.case_studies.test_running import RICH
from workbench.lab.runs import Run, RunNotFoundError, RunStore

ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/[\w.-]+/[\w.-]+")
FOLDERS = sorted(manifest.parent for manifest in discovery.ROOT.glob(f"*/{FOLDER}/*/manifest.json"))


def test_there_are_shipped_results() -> None:
    assert len(FOLDERS) >= 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.parent.name)
def test_a_shipped_result_fits_its_study(folder: Path) -> None:
    run = Run(folder)
    run.verify()
    result, study = read_result(run), find_study(folder.parent.parent.name)
    assert result.study == study.name and result.tier == "small"
    asked = {claim.id: (claim.sentence, claim.rule, claim.published) for claim in study.claims}
    assert {claim.id: (claim.sentence, claim.rule, claim.published) for claim in result.claims} == asked
    for claim in result.claims:
        assert claim.verdict == NOT_RUN or claim.value is not None, claim.id
    assert not ABSOLUTE_PATH.search(json.dumps(run.manifest)), "a path of the machine that measured it is kept"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "one result per study"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setattr(discovery, "ROOT", tmp_path / "studies")
    write_study(tmp_path / "studies", study=RICH)
    return RunStore(tmp_path / "runs")


def test_shipping_a_run(planted: RunStore, tmp_path: Path) -> None:
    first = run_study("planted", "small", store=planted)
    folder = ship(planted.open(first.run))
    assert folder == tmp_path / "studies" / "planted" / FOLDER / first.run
    assert ship(planted.open(first.run)) == folder
    assert [result.shipped for result in known_results(planted)] == [False], "its own result is not listed twice"
    elsewhere = RunStore(tmp_path / "other")
    shipped = replace(first, shipped=True, created=planted.open(first.run).created)
    assert known_results(elsewhere) == [shipped] and study_results(elsewhere) == []
    assert known_result(elsewhere, "planted") == shipped and known_results(None, "planted") == [shipped]
    kept, copy = planted.open(first.run), open_run(elsewhere, first.run)
    assert copy.path == folder and copy.manifest == kept.manifest and copy.figures() == kept.figures()
    copy.verify()
    with pytest.raises(RunNotFoundError, match="there is no run"):
        open_run(elsewhere, "another")

    second = run_study("planted", "smoke", store=elsewhere)
    assert [result.shipped for result in known_results(elsewhere)] == [False, True]
    assert known_result(elsewhere, "planted") == shipped, "the larger tier says more"
    ship(elsewhere.open(second.run))
    assert [run.id for run in shipped_runs("planted")] == [second.run]


def test_a_result_of_earlier_code_is_told(planted: RunStore) -> None:
    run = planted.open(run_study("planted", "smoke", store=planted).run)
    study = find_study("planted")
    assert not code_changed(run, study)
    (study.folder / "study.py").write_text((study.folder / "study.py").read_text() + "\n# changed\n")
    assert code_changed(run, study)


def test_only_results_of_the_workbenchs_own_studies_are_shipped(planted: RunStore, tmp_path: Path) -> None:
    with planted.create("training", "no study") as writer:
        pass
    with pytest.raises(StudyError, match="training run, expected"):
        ship(planted.open(writer.id))
    own = run_study(write_study(tmp_path / "elsewhere", "guest", study=RICH), "smoke", store=planted)
    with pytest.raises(StudyError, match="guest"):
        ship(planted.open(own.run))
    assert shipped_runs() == []


def test_a_damaged_result_is_left_out(planted: RunStore) -> None:
    run = run_study("planted", "smoke", store=planted)
    manifest = ship(planted.open(run.run)) / "manifest.json"
    for damaged in ({}, json.loads(manifest.read_text()) | {"results": {"study": "planted"}}):
        manifest.write_text(json.dumps(damaged))
        assert shipped_runs() == [] and known_results(None) == []
