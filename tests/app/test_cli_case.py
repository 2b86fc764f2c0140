"""`workbench case`: running, listing and showing planted studies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from case_studies.harness import discovery
from tests.case_studies.planted import CLAIM, CLAIMS, write_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of studies with one in it, and runs beside it."""
    monkeypatch.setattr(discovery, "ROOT", tmp_path / "studies")
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    write_study(tmp_path / "studies")
    return tmp_path


def test_a_run_prints_its_verdicts(workbench: Callable, here: Path) -> None:
    done = workbench("case", "planted", "--small", "--out", here / "out")
    assert done.code == 0, done.err
    for words in (
        "Planted · small · 3 seeds",
        "The number lies above a half.",
        "0.75 [0.63, 0.87]",
        "reproduced",
        "95 % t over seeds",
    ):
        assert words in done.out
    assert "Kept as run" in done.err and (here / "out" / "claims.csv").is_file()


def test_the_minutes_are_those_of_the_seeds_asked_for(workbench: Callable, here: Path) -> None:
    write_study(here / "studies", claims=(CLAIMS + CLAIM).replace("minutes = 0.1", "minutes = 6"))
    assert "About 6 minutes on one core with 3 seeds." in workbench("case", "planted").err
    assert "About 8 minutes on one core with 4 seeds." in workbench("case", "planted", "--seeds", 4).err


def test_json_is_one_document(workbench: Callable, here: Path) -> None:
    done = workbench("case", "planted", "--json", "--seeds", 4)
    (claim,) = done.json["claims"]
    assert done.code == 0 and done.json["tier"] == "small" and done.json["seeds"] == [0, 1, 2, 3]
    assert claim["verdict"] == "reproduced" and len(claim["values"]) == 4


def test_a_claim_that_fails_is_no_failure(workbench: Callable, here: Path) -> None:
    write_study(here / "studies", claims=CLAIMS + CLAIM.replace("> 0.5", "> 0.9"))
    done = workbench("case", "planted")
    assert done.code == 0 and "not reproduced" in done.out


def test_failures_say_what_to_do(workbench: Callable, here: Path) -> None:
    unknown = workbench("case", "plantd")
    assert unknown.code == 1 and "there is no study 'plantd'. Did you mean 'planted'?" in unknown.err
    assert workbench("case", "planted", "--smoke", "--small").code == 2
    assert workbench("case", "planted", "--full").code == 1
    assert "Did you mean" in workbench("case", "show", "plantd").err
    (here / "taken").mkdir()
    taken = workbench("case", "planted", "--out", here / "taken")
    assert taken.code == 1 and "exists already" in taken.err and not list((here / "runs").glob("2*"))
    write_study(here / "studies", study="def run(context):\n    raise RuntimeError('it broke')\n")
    broken = workbench("case", "planted")
    assert broken.code == 1 and "it broke" in broken.err


def test_list_and_show(workbench: Callable, here: Path) -> None:
    write_study(here / "studies", "broken", claims="title = ")
    listed = workbench("case")
    assert listed.code == 0 and "planted" in listed.out and "never run here" in listed.out
    assert "broken is not a readable study" in listed.err and not (here / "runs").exists()
    assert "ci_low > 0.5" in workbench("case", "show", "planted").out
    run = workbench("case", "planted", "--json").json["run"]
    workbench("case", "planted", "--smoke", "--json")
    assert "small: 1 reproduced" in workbench("case", "list").out
    assert workbench("case", "list", "--json").json[0]["last"]["run"] == run
    for name in ("planted", run):
        shown = workbench("case", "show", name)
        assert "0.75 [0.63, 0.87]" in shown.out and workbench("case", "show", name, "--json").json["run"] == run


def test_the_path_of_a_folder(workbench: Callable, here: Path) -> None:
    write_study(here / "elsewhere", "mine")
    assert workbench("case", here / "elsewhere" / "mine", "--smoke", "--json").json["study"] == "mine"


def test_interrupting_keeps_the_seeds(here: Path) -> None:
    """Ctrl-C in a real process: exit code 1, one line of advice, and the next run goes on."""
    study = """
import time


def run(context):
    return context.each_seed(measure).measurements()


def measure(context):
    for step in range(600 if context.seed == 1 else 1):
        context.progress(step / 600, "waiting")
        if context.seed == 1:
            (context.folder / "waiting").touch()
            time.sleep(0.1)
    return {"number": 0.8}
"""
    folder = write_study(here / "elsewhere", "slow", study=study)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "app.cli", "case", str(folder)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here
    )
    waited = time.monotonic() + 120
    while not list((here / "runs").glob(".studies/slow-small-*/work/measure-1/waiting")) and time.monotonic() < waited:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == "" and "finished seeds are kept" in err and "Traceback" not in err
    (kept,) = (here / "runs").glob(".studies/slow-small-*/seeds/measure-0.json")
    assert json.loads(kept.read_text())["values"] == {"number": 0.8}
