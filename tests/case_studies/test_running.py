"""Running planted studies: verdicts, artefacts, what is refused, and going on after a kill or a cancellation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from case_studies import run_study, study_results
from case_studies.harness.context import decode, encode
from case_studies.harness.errors import ClaimsError, StudyBusy, StudyError
from case_studies.harness.evidence import NotRun, Sample
from case_studies.harness.export import as_csv, as_record, write_folder
from case_studies.harness.results import most_telling, read_result
from case_studies.harness.workspace import Workspace
from tests.case_studies.planted import CLAIM, CLAIMS, write_study
from workbench.lab.jobs import JobCancelled
from workbench.lab.runs import RunStore

ROOT = Path(__file__).resolve().parents[2]
LOGGED = """
import os


def run(context):
    return context.each_seed(measure).measurements()


def measure(context):
    with open(os.environ["PLANTED_LOG"], "a") as log:
        log.write(f"{context.seed} ")
    BEFORE
    context.progress(0.5, "half way")
    return {"number": 0.70 + 0.05 * context.seed}
"""


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANTED_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def claim(**changes: object) -> str:
    """A claim with some fields replaced."""
    fields: dict[str, object] = {
        "id": "above-half", "sentence": "The number lies above a half.", "where": "Table 1", "published": 0.75,
        "source": "Table 1", "evidence": "closed form", "rule": "ci_low > 0.5", "measurement": "number", **changes,
    }  # fmt: skip
    return "\n[[claims]]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items()) + "\n"


def verdicts(folder: Path, store: RunStore, tier: str = "small", **options: object) -> dict[str, tuple[str, str]]:
    result = run_study(folder, tier, store=store, **options)  # type: ignore[arg-type]
    return {each.id: (each.verdict, each.reason) for each in result.claims}


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_a_claim_that_holds(tmp_path: Path, store: RunStore) -> None:
    told: list[tuple[float, str]] = []
    result = run_study(write_study(tmp_path), store=store, progress=lambda share, words: told.append((share, words)))
    (found,) = result.claims
    assert (found.verdict, found.n, found.over, found.interval) == ("reproduced", 3, "seeds", "t")
    assert found.values == pytest.approx((0.70, 0.75, 0.80)) and found.value == pytest.approx(0.75)
    half = 4.3027 * 0.05 / 3**0.5  # t with 2 degrees of freedom
    assert (found.ci_low, found.ci_high) == pytest.approx((0.75 - half, 0.75 + half), abs=1e-4)
    assert result.seeds == (0, 1, 2) and result.words == "1 reproduced"
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1.0 and (0.5, "seed 1: half way") in told


def test_every_verdict_at_its_edges(tmp_path: Path, store: RunStore) -> None:
    text = CLAIMS + "".join([
        claim(id="fails", rule="ci_low > 0.7"),
        claim(id="edge-in", rule="lowest >= 0.7"),
        claim(id="edge-out", rule="lowest > 0.7"),
        claim(id="each", rule="value > 0.65 in every seed"),
        claim(id="not-each", rule="value > 0.72 in every seed"),
        claim(id="many-seeds", seeds=4),
        claim(id="near", rule="abs(value - published) < 1e-9"),
    ])  # fmt: skip
    found = verdicts(write_study(tmp_path, claims=text), store)
    assert found["fails"][0] == "not reproduced" and "ci_low = 0.6258; the rule is ci_low > 0.7" in found["fails"][1]
    assert found["edge-in"][0] == "reproduced" and found["edge-out"][0] == "not reproduced"
    assert found["each"] == ("reproduced", "holds in 3 of 3 seeds")
    assert found["not-each"] == ("not reproduced", "holds in 2 of 3 seeds; not for 0.7")
    assert found["many-seeds"] == ("not run here", "at least 4 seeds decide it, this was 3")
    assert found["near"][0] == "reproduced"


def test_what_a_smaller_tier_or_fewer_seeds_cannot_decide(tmp_path: Path, store: RunStore) -> None:
    text = (
        CLAIMS
        + claim()
        + claim(id="any", tier="smoke", seeds=1, rule="value > 0.5")
        + claim(id="ci", tier="smoke", seeds=1)
    )
    found = verdicts(write_study(tmp_path, claims=text), store, "smoke")
    assert found["above-half"] == ("not run here", "tier small decides it, this was smoke")
    assert found["any"][0] == "reproduced"
    assert found["ci"] == ("not run here", "its rule needs an interval, and one of seeds has none")
    assert (
        verdicts(tmp_path / "planted", store, "small", seeds=2)["above-half"][1]
        == "at least 3 seeds decide it, this was 2"
    )


def test_measurements_that_cannot_be_made_and_items_of_one_model(tmp_path: Path, store: RunStore) -> None:
    study = """
from case_studies import NotRun, Sample


def run(context):
    return {"number": NotRun("there is no checkpoint here"), "items": Sample([0.6, 0.7, 0.8] * 20, "sentences")}
"""
    text = CLAIMS + claim() + claim(id="items", measurement="items", seeds=1)
    result = run_study(write_study(tmp_path, claims=text, study=study), store=store)
    first, second = result.claims
    assert (first.verdict, first.reason, first.value) == ("not run here", "there is no checkpoint here", None)
    assert (second.verdict, second.over, second.n, second.interval) == ("reproduced", "sentences", 60, "bootstrap")


def test_a_function_decides(tmp_path: Path, store: RunStore) -> None:
    study = """
def run(context):
    return {"number": [1.0, 2.0, 3.0], "control": [0.0, 0.0, 2.5]}


def beats_control(measured):
    wins = sum(a > b for a, b in zip(measured["number"].values, measured["control"].values))
    return wins == 3, f"{wins} of 3"


def confused(measured):
    return "yes"


def never(measured):
    raise AssertionError("asked although there is nothing to decide")
"""
    text = CLAIMS + claim(rule="function beats_control") + claim(id="late", rule="function never", seeds=9)
    found = verdicts(write_study(tmp_path, claims=text, study=study), store)
    assert found == {
        "above-half": ("reproduced", "3 of 3"),
        "late": ("not run here", "at least 9 seeds decide it, this was 3"),
    }
    folder = write_study(tmp_path / "other", claims=CLAIMS + claim(rule="function confused"), study=study)
    with pytest.raises(StudyError, match="confused returned 'yes', expected True or False"):
        run_study(folder, store=store)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body,words",
    [
        ("return {'nmber': [1.0, 2.0, 3.0]}", "claim 'above-half': run returned no measurement 'number'.*Did you mean 'nmber'"),
        ("return [1.0]", "run returned list, expected a dict of measurements"),
        ("return {'number': float('nan')}", "'number' is nan"),
        ("return context.seed", "there is a seed only in a function given to context.each_seed"),
        ("return context.each_seed(lambda c: {'number': 1.0})", "a stage needs a plain name, got '<lambda>'"),
        ("context.each_seed(measure)\n    return context.each_seed(measure)", "two calls of each_seed are the stage 'measure'"),
        ("return context.each_seed(empty)", "empty of seed 0 returned dict, expected a dict of measurements"),
        ("return context.each_seed(odd)", "'number' .odd of seed 0. is no number, array or JSON value"),
        ("return context.each_seed(measure)['curve']", "measure returned nothing called 'curve'"),
        ("context.save_figure('../up.png', b'x')", "'../up.png' is not a figure name"),
        ("context.save_figure('a.png', 5)", "figure 'a.png' is a int"),
        ("context.save_array('a', [1, 2], axes=('x',))", "expected an array or tensor"),
        ("import numpy\n    context.save_array('a', numpy.zeros(3), axes=('x', 'y'))", "needs 1 axis names"),
        ("context.record(thing=object())", "fact 'thing' cannot be written as JSON"),
    ],
)  # fmt: skip
def test_studies_that_return_nonsense(tmp_path: Path, store: RunStore, body: str, words: str) -> None:
    study = f"""
def run(context):
    {body}


def measure(context):
    return {{"number": 1.0}}


def empty(context):
    return {{}}


def odd(context):
    return {{"number": object()}}
"""
    with pytest.raises(StudyError, match=words):
        run_study(write_study(tmp_path, study=study), store=store)
    assert store.list() == []


def test_unknown_tiers_and_seeds(tmp_path: Path, store: RunStore) -> None:
    folder = write_study(tmp_path)
    with pytest.raises(ClaimsError, match=r"no tier 'smal'; it has: smoke, small\. Did you mean 'small'"):
        run_study(folder, "smal", store=store)
    for seeds in (0, [1, 1], [-1], []):
        with pytest.raises(StudyError, match="seeds are a number from 1"):
            run_study(folder, seeds=seeds, store=store)
    assert run_study(folder, seeds=[4, 7, 9], store=store).seeds == (4, 7, 9)


# ---- artefacts and results -------------------------------------------------------------------------------------------

RICH = """
import numpy as np
import plotly.graph_objects as go


def run(context):
    seeds = context.each_seed(measure)
    context.save_figure("line", go.Figure(go.Scatter(y=[1, 2])))
    context.save_figure("picture.png", b"not really a picture")
    context.save_array("curves", np.stack(seeds["curve"]), axes=("seed", "step"), unit="nats")
    context.record(data_sha256="ab" * 32)
    return seeds.measurements()


def measure(context):
    return {
        "number": np.float32(0.75), "curve": context.rng("curve").normal(size=4), "words": ["a", {"b": 1}],
        "tensor": context.torch_generator("t").initial_seed() % 97,
    }
"""


def test_what_a_run_holds(tmp_path: Path, store: RunStore) -> None:
    folder = write_study(tmp_path, study=RICH)
    result = run_study(folder, store=store)
    run = store.open(result.run)
    run.verify()
    assert run.kind == "case-study" and run.figures() == ["line.json", "picture.png"]
    assert json.loads(run.figure("line.json"))["data"][0]["type"] == "scatter"
    curves = run.array("curves")
    assert curves.shape == (3, 4) and run.arrays()["curves"]["unit"] == "nats" and len(np.unique(curves)) == 12
    kept = run.manifest
    assert kept["results"]["facts"] == {"data_sha256": "ab" * 32} and set(kept["results"]["seconds_per_seed"]) == {
        "measure-0", "measure-1", "measure-2",
    }  # fmt: skip
    assert kept["settings"]["settings"] == {"offset": 0.0} and kept["settings"]["tier"] == "small"
    assert kept["machine"] and kept["code_version"] and kept["results"]["code_versions"] == [kept["code_version"]]
    assert "words" not in kept["results"]["measurements"] and set(kept["results"]["measurements"]) == {
        "number",
        "tensor",
    }
    assert read_result(run) == result and not list((store.root / ".studies").glob("planted-*/*"))
    again = store.open(run_study(folder, store=store).run)
    assert np.array_equal(again.array("curves"), curves), "random numbers depend on study, seed and purpose alone"


def test_results_are_found_again(tmp_path: Path, store: RunStore) -> None:
    folder = write_study(tmp_path)
    small = run_study(folder, store=store)
    smoke = run_study(folder, "smoke", store=store)
    with store.create("training", "something else"):
        pass
    assert [each.run for each in study_results(store)] == [smoke.run, small.run]
    assert study_results(store, "other") == []
    assert most_telling(study_results(store))["planted"].run == small.run
    with pytest.raises(StudyError, match="is a training run, expected a case-study run"):
        read_result(store.open(store.list(kind="training")[0].id))


def test_export(tmp_path: Path, store: RunStore) -> None:
    result = run_study(write_study(tmp_path, study=RICH, claims=CLAIMS + claim(sentence="=1+1")), store=store)
    out = write_folder(store.open(result.run), tmp_path / "out")
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "arrays.safetensors", "claims.csv", "line.html", "line.json", "picture.png", "plotly.min.js", "results.json",
    ]  # fmt: skip
    assert json.loads((out / "results.json").read_text())["claims"][0]["values"] == [0.75] * 3
    head, line = as_csv(result).splitlines()
    assert head.startswith("id,sentence,paper") and line.startswith("above-half,'=1+1,"), "no formula for a spreadsheet"
    assert as_record(result)["seeds"] == [0, 1, 2]
    with pytest.raises(StudyError, match="exists already"):
        write_folder(store.open(result.run), out)


def test_what_a_seed_returned_survives_the_disk() -> None:
    given = {
        "a": 0.1, "b": True, "c": np.arange(3), "d": Sample([1.0, 2.0], "heads"), "e": NotRun("no"), "f": {"x": [1, None]},
    }  # fmt: skip
    values, arrays = encode(given, "here")
    back = decode(json.loads(json.dumps(values)), arrays)
    assert np.array_equal(back.pop("c"), given.pop("c"))  # type: ignore[arg-type]
    assert back == {**given, "b": 1.0}


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_killed_study_goes_on_at_its_seed(tmp_path: Path, store: RunStore, log: Path) -> None:
    """The process dies in the middle of seed 1; the next one measures seeds 1 and 2, in the folder that seed 1 left."""
    die = "marker = context.folder / 'begun'\n    begun = marker.exists()\n    marker.touch()\n"
    die += "    if context.seed == 1 and not begun:\n        os.kill(os.getpid(), 9)"
    folder = write_study(tmp_path, study=LOGGED.replace("BEFORE", die))
    program = "import sys; from case_studies import run_study; from workbench import RunStore\n"
    program += "run_study(sys.argv[1], store=RunStore(sys.argv[2]))"
    died = subprocess.run(
        [sys.executable, "-c", program, folder, store.root], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert died.returncode == -9 and log.read_text() == "0 1 " and RunStore(store.root).list() == []
    told: list[str] = []
    result = run_study(folder, store=store, progress=lambda share, words: told.append(words))
    assert log.read_text() == "0 1 1 2 " and "seed 0: done before" in told
    assert result.claims[0].values == pytest.approx((0.70, 0.75, 0.80)) and len(store.list()) == 1


def test_a_cancelled_study_keeps_its_seeds(tmp_path: Path, store: RunStore, log: Path) -> None:
    folder, cancel = write_study(tmp_path, study=LOGGED.replace("BEFORE", "pass")), threading.Event()

    def stop(share: float, words: str) -> None:
        if words.startswith("seed 1"):
            cancel.set()

    with pytest.raises(JobCancelled):
        run_study(folder, store=store, progress=stop, cancel=cancel)
    assert log.read_text() == "0 1 " and store.list() == []
    run_study(folder, store=store)
    assert log.read_text() == "0 1 1 2 "
    run_study(folder, store=store)
    assert log.read_text() == "0 1 1 2 0 1 2 ", "a finished study begins anew"


def test_other_code_other_settings_and_fresh_begin_anew(tmp_path: Path, store: RunStore, log: Path) -> None:
    failing = "if context.seed == 1 and not os.environ.get('PLANTED_WELL'): raise RuntimeError('broken')"
    study = LOGGED.replace("BEFORE", failing)
    folder = write_study(tmp_path, study=study)

    def fails() -> str:
        log.unlink(missing_ok=True)
        with pytest.raises(RuntimeError, match="broken"):
            run_study(folder, store=store)
        return log.read_text()

    assert fails() == "0 1 " and fails() == "1 "
    write_study(tmp_path, study=study + "\n# another version\n")
    assert fails() == "0 1 " and fails() == "1 "
    write_study(tmp_path, study=study, claims=CLAIMS.replace("offset = 0.0", "offset = 0.1") + CLAIM)
    assert fails() == "0 1 " and fails() == "1 "
    log.unlink()
    with pytest.raises(RuntimeError):
        run_study(folder, store=store, fresh=True)
    assert log.read_text() == "0 1 "


def test_a_damaged_seed_is_measured_again(tmp_path: Path, store: RunStore, log: Path) -> None:
    folder = write_study(tmp_path, study=LOGGED.replace("BEFORE", "if context.seed == 2: raise RuntimeError('broken')"))
    with pytest.raises(RuntimeError):
        run_study(folder, store=store)
    (file,) = (store.root / ".studies").glob("planted-small-*/seeds/measure-0.json")
    file.write_text("{")
    with pytest.raises(RuntimeError):
        run_study(folder, store=store)
    assert log.read_text() == "0 1 2 0 2 "


def test_two_processes_do_not_share_a_study(tmp_path: Path, store: RunStore) -> None:
    with (
        Workspace(store.root, "planted", "small", {"code": "x"}),
        pytest.raises(StudyBusy, match="study planted at tier small is being run by another process"),
    ):
        run_study(write_study(tmp_path), store=store)
    run_study(tmp_path / "planted", store=store)


def test_files_beside_the_study_and_changed_code(tmp_path: Path, store: RunStore) -> None:
    """Relative imports work, and code that changed in a running process is what is measured."""
    study = "from .numbers_of_it import NUMBER\n\n\ndef run(context):\n    return {'number': [NUMBER] * 3}\n"
    folder = write_study(tmp_path, study=study)
    for number in (0.6, 0.9):
        (folder / "numbers_of_it.py").write_text(f"NUMBER = {number}\n" + "# longer\n" * int(10 * number))
        assert run_study(folder, store=store).claims[0].value == pytest.approx(number)


def test_settings_can_be_changed_for_a_run(tmp_path: Path, store: RunStore) -> None:
    """The value of a setting reaches the study and is recorded; a setting that the tier lacks is refused by name."""
    folder = write_study(tmp_path)
    plain, changed = (run_study(folder, store=store, changes=changes) for changes in (None, {"offset": 0.125}))
    assert changed.claims[0].value == pytest.approx(plain.claims[0].value + 0.125)
    assert store.open(changed.run).manifest["settings"]["settings"] == {"offset": 0.125}
    with pytest.raises(StudyError, match=r"no setting 'ofset' at tier small; settings: offset.*Did you mean 'offset'"):
        run_study(folder, store=store, changes={"ofset": 1})
