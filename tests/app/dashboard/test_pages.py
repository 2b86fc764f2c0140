"""Pages, jobs and the answers of the callbacks, as plain functions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from dash import Dash
from dash.development.base_component import Component

from app import frames
from app.dashboard import _panels_by_id, build_app, job_line, resolve
from app.page import GROUPS, Page
from app.pages import find_pages
from app.pages.overview import start
from app.pages.runs import delete, problems, rows
from app.pages.state import largest_entries, neuron_table, tracked_chips
from app.panels.base import FigurePanel, NothingToShow, StripPanel
from app.panels.overview import blocks_of
from app.services import Services
from app.shell import _navigation, inspector
from app.view_state import ViewState
from tests.app.dashboard.conftest import TOKENS, RunIds
from tests.app.dashboard.fake_models import FakeModels
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.synthetic_runs import write_synthetic_runs

ROOT = Path(__file__).resolve().parents[3]
PAGES = {page.name: page for page in find_pages()}


def text_of(component: object) -> str:
    """All text inside a component."""
    if isinstance(component, (str, int, float)):
        return str(component)
    if isinstance(component, (list, tuple)):
        return " ".join(text_of(child) for child in component)
    if isinstance(component, Component):
        return text_of(getattr(component, "children", None) or "")
    return ""


def panels_in(component: object) -> set[str]:
    found = json.dumps(component.to_plotly_json() if isinstance(component, Component) else component, default=_as_json)
    return {panel for panel in _panels_by_id(find_pages()) if f'"panel-{panel}"' in found}


def _as_json(value: object) -> object:
    return value.to_plotly_json() if isinstance(value, Component) else str(value)


@pytest.fixture
def own(tmp_path: Path) -> Services:
    """Services over a store of the test's own."""
    store, jobs = RunStore(tmp_path / "runs"), JobQueue()
    return Services(store, jobs, FakeModels(store, jobs))


def test_pages_register_themselves() -> None:
    assert list(PAGES)[:4] == ["overview", "attention", "state", "quantities"] and list(PAGES)[-2:] == ["cases", "runs"]
    assert all(page.path == ("/" if page.name == "overview" else f"/{page.name}") for page in PAGES.values())
    icons = ROOT / "app" / "assets" / "icons"
    for page in PAGES.values():
        assert (icons / f"{page.icon}.svg").is_file() and page.words.endswith(".")


def test_pages_stand_under_the_headings_of_the_navigation() -> None:
    assert list(dict.fromkeys(page.group for page in PAGES.values())) == list(GROUPS)
    shown = text_of(_navigation(list(PAGES.values())))
    assert all(shown.count(group) >= 1 for group in GROUPS) and shown.index("BDH") < shown.index(
        "Synapses"
    ) < shown.index("Measure")
    with pytest.raises(ValueError, match="'elsewhere'; expected one of Look, BDH"):
        replace(PAGES["runs"], group="elsewhere")


@pytest.mark.parametrize("kind,expected", [
    ("softmax", {"cache-keys", "cache-values"}),
    ("gated", {"state", "tracked", "state-norms", "spectrum", "decay", "retention"}),
    ("bdh", {"state", "tracked", "state-norms", "spectrum", "retention", "neurons-x", "neurons-y", "top-neurons"}),
])  # fmt: skip
def test_the_state_page_shows_the_memory_that_the_layer_has(
    services: Services, run_ids: RunIds, kind: str, expected: set[str]
) -> None:
    scene = services.scene(ViewState(page="state", run=getattr(run_ids, kind)))
    assert panels_in(PAGES["state"].build(services, scene)) == expected
    for name in expected:  # and what is laid out can be drawn
        panel = _panels_by_id(find_pages())[name]
        try:
            panel.values(scene)
        except NothingToShow as why:
            assert name == "tracked" and "followed" in why.title


def test_the_mamba_layer_also_has_gates(services: Services, run_ids: RunIds) -> None:
    scene = services.scene(ViewState(page="state", run=run_ids.gated, layer=1))
    assert "signals" in panels_in(PAGES["state"].build(services, scene))


def test_softmax_says_that_its_memory_is_a_cache(services: Services, run_ids: RunIds) -> None:
    words = text_of(PAGES["state"].build(services, services.scene(ViewState(page="state", run=run_ids.softmax))))
    assert "its memory is the KV cache" in words


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("view", [{}, {"run": "20200101-gone-123456"}])
def test_every_page_stands_without_a_run(own: Services, name: str, view: dict[str, str]) -> None:
    scene = own.scene(ViewState(page=name, **view))  # type: ignore[arg-type]
    words = text_of(PAGES[name].build(own, scene))
    assert PAGES[name].title in words
    assert ("This run is not here" in words) == bool(view)
    assert ("No run" in words) == (PAGES[name].needs_run or name == "overview")  # the others do not look into one
    assert not (PAGES[name].needs_run and panels_in(PAGES[name].build(own, scene)))
    assert inspector(scene)


def test_a_view_is_complete_and_canonical(services: Services, run_ids: RunIds) -> None:
    data, scene = resolve(services, PAGES, "/attention", f"?run={run_ids.gated}&head=9&q=999&junk=1")
    assert scene.view.head == 1 and scene.view.query == TOKENS - 1
    assert data["url"] == f"/attention?v=1&head=1&q={TOKENS - 1}&run={run_ids.gated}"
    assert data["asked"] == f"/attention?run={run_ids.gated}&head=9&q=999&junk=1"
    assert data["controls"]["head"] == "1" and data["controls"]["t"] == TOKENS - 1


def test_no_run_in_the_address_means_the_newest(services: Services, run_ids: RunIds) -> None:
    data, _ = resolve(services, PAGES, "/", "")
    assert data["run"] == services.trace_entries()[0].id and f"run={data['run']}" in data["url"]


def test_an_unknown_page_is_the_overview(services: Services, run_ids: RunIds) -> None:
    assert resolve(services, PAGES, "/nothing-like-it", "")[0]["page"] == "overview"


def test_the_page_is_laid_out_anew_only_when_its_structure_changes(services: Services, run_ids: RunIds) -> None:
    def structure(query: str, page: str = "state") -> str:
        return resolve(services, PAGES, f"/{page}", f"?run={run_ids.gated}&{query}")[0]["structure"]

    assert structure("t=3") == structure("t=9&head=1&scale=log&q=2&track=1.2")
    assert structure("layer=0") != structure("layer=1")  # the second layer also has gates
    assert structure("layer=0", "attention") != structure("layer=0")


# ---- frames ----------------------------------------------------------------------------------------------------------


class Failing:
    """Values that cannot be computed."""

    words = "It fails."

    def values(self, scene):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("secret detail /root/path")

    def snippet_body(self, scene):  # type: ignore[no-untyped-def]
        return "values = 1 / 0"


class Broken(Failing, FigurePanel):
    id, title = "broken", "Broken"

    def figure(self, scene, theme):  # type: ignore[no-untyped-def]
        return self.values(scene)


class BrokenStrip(Failing, StripPanel):
    id, title = "broken-strip", "Broken"


def test_a_failing_panel_says_so_without_its_insides(
    services: Services, run_ids: RunIds, caplog: pytest.LogCaptureFixture
) -> None:
    part = {"run": run_ids.softmax, "scheme": "light"}
    for answer in (frames.draw_figure(services, Broken(), part), frames.draw_strip(services, BrokenStrip(), part)):
        words = text_of(answer[3])
        assert "This panel failed" in words and "secret" not in words and "Traceback" not in words
        assert "error" in words and answer[2] == "panel-body is-hidden"
    assert "secret detail" in caplog.text  # the log has what the page keeps back


def test_a_slice_from_the_browser_cannot_break_a_panel(services: Services, run_ids: RunIds) -> None:
    panel = _panels_by_id(find_pages())["pattern"]
    hostile = {
        "run": "../../etc",
        "layer": 99,
        "head": 99,
        "pixels": 10**9,
        "scheme": "<script>",
        "rows": [5, 9],
        "nonsense": 1,
    }
    answer = frames.draw_figure(services, panel, hostile)
    assert "run" in text_of(answer[3])
    answer = frames.draw_figure(services, panel, {**hostile, "run": run_ids.softmax})
    assert answer[3] is None and "px=512" in answer[0].layout.images[0].source


def test_every_foot_names_the_run(services: Services, run_ids: RunIds) -> None:
    answer = frames.draw_figure(
        services, _panels_by_id(find_pages())["pattern"], {"run": run_ids.bdh, "scheme": "dark"}
    )
    assert answer[5][0].title == run_ids.bdh and run_ids.bdh.rsplit("-", 1)[-1] in text_of(answer[5][0])


def test_tables_are_cut_and_say_so(services: Services, run_ids: RunIds) -> None:
    panel, scene = _panels_by_id(find_pages())["pattern"], services.scene(ViewState(run=run_ids.softmax))
    words = text_of(frames.value_table(panel, scene))
    assert "CSV file has all" in words
    small = services.scene(ViewState(run=run_ids.softmax, rows=(0, 5), columns=(0, 5)))
    assert "CSV file has all" not in text_of(frames.value_table(panel, small))


def test_lists_of_the_state_page(services: Services, run_ids: RunIds) -> None:
    scene = services.scene(ViewState(run=run_ids.bdh, position=30, tracked=((1, 2), (999, 1))))
    assert text_of(largest_entries(scene)).count("Follow") == 8
    assert len(tracked_chips(scene, "dark")) == 1  # the other entry does not exist in this layer
    assert "neurons fire" in text_of(neuron_table(scene))
    softmax = services.scene(ViewState(run=run_ids.softmax))
    assert "KV cache" in text_of(largest_entries(softmax)) and tracked_chips(softmax, None) == []
    assert "BDH" in text_of(neuron_table(softmax))


def test_the_catalogue_knows_the_blocks_best_but_only_of_the_same_model(
    own: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = write_synthetic_runs(own.store, tokens=8)[0]
    assert [block["label"] for block in blocks_of(own.scene(ViewState(run=run_id)))] == [
        "Embedding", "Attention", "Attention", "Unembedding",
    ]  # fmt: skip
    # only models with a card are described without being opened
    for n_layers, card, expected in ((2, "its card", "MLP"), (3, "its card", "Unembedding"), (2, None, "Unembedding")):
        listed = [{"name": "Synthetic attention", "card": card}]
        monkeypatch.setattr(own.models, "list_models", lambda listed=listed: listed)
        blocks = [{"kind": "mlp", "label": "MLP", "detail": "64", "layer": layer} for layer in range(n_layers)]
        monkeypatch.setattr(own.models, "describe", lambda name, blocks=blocks: {"blocks": blocks, "hook_points": []})
        own.forget_run(run_id)
        assert blocks_of(own.scene(ViewState(run=run_id)))[-1]["label"] == expected


# ---- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,text,words",
    [
        (None, "a text", "Choose a model"), ("synthetic-bdh", "", "nothing to read"), ("synthetic-bdh", " \n ", "nothing to read"),
        ("synthetic-bdh", None, "nothing to read"), ("synthetic-bdh", "x" * 20_001, "20,001 characters"),
        ("nonsense", "a text", "no model 'nonsense'"), ("synthetic-bdh", "a\x00b", "zero byte"),
    ],
)  # fmt: skip
def test_mistakes_in_the_form_are_named(own: Services, name: str | None, text: str | None, words: str) -> None:
    job, told = start(own, name, text)
    assert job is None and words in told
    assert own.jobs.jobs() == []


def test_a_run_is_started_and_found(own: Services) -> None:
    job, told = start(own, "synthetic-bdh", "a text of some length")
    assert job is not None and told == ""
    assert job_line(own, job)["shown"]
    own.jobs.wait(job, timeout=30)
    line = job_line(own, job)
    assert not line["shown"] and line["ended"] and line["percent"] == 100
    assert own.open_run(line["run"]).model["name"] == "Synthetic BDH"


def test_a_failed_and_a_cancelled_job_are_told_apart(own: Services) -> None:
    job, _ = start(own, "synthetic-bdh", "please fail")
    assert job is not None
    own.jobs.wait(job, timeout=30)
    line = job_line(own, job)
    assert line["failed"] and line["shown"] and "out of patience" in line["message"] and line["run"] is None
    job, _ = start(own, "synthetic-bdh", "a long story " * 5)
    assert job is not None
    own.jobs.cancel(job)
    own.jobs.wait(job, timeout=30)
    line = job_line(own, job)
    assert line["ended"] and not line["shown"] and line["run"] is None
    assert own.store.list() == []


def test_a_job_of_another_window_is_shown_too(own: Services) -> None:
    job, _ = start(own, "synthetic-bdh", "a text")
    assert job is not None and job_line(own, None)["shown"]
    own.jobs.wait(job, timeout=30)
    assert not job_line(own, None)["shown"] and job_line(own, "no-such-job")["ended"]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_deleted_and_forgotten(own: Services) -> None:
    ids = write_synthetic_runs(own.store, tokens=8)
    assert {row["id"] for row in rows(own)} == set(ids)
    scene = own.scene(ViewState(run=ids[0]))
    assert scene.run is not None
    assert delete(own, [ids[0], "20200101-gone-123456"]).startswith("20200101-gone-123456: there is no run")
    assert {row["id"] for row in rows(own)} == set(ids[1:])
    assert own.scene(ViewState(run=ids[0])).problem is not None


def test_problems_are_listed(own: Services) -> None:
    (own.store.root / "Not A Run").mkdir()
    (own.store.root / "broken-run").mkdir()
    words = text_of(problems(own))
    assert "Not A Run" in words and "broken-run" in words


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_two_dashboards_share_nothing(tmp_path: Path) -> None:
    apps: list[Dash] = []
    for name in ("one", "two"):
        store, jobs = RunStore(tmp_path / name), JobQueue()
        apps.append(build_app(store, jobs, FakeModels(store, jobs)))
    assert apps[0].server is not apps[1].server
    assert [app.server.test_client().get("/").status_code for app in apps] == [200, 200]


def test_two_pages_of_one_name_are_refused() -> None:
    pages = [
        Page(name, name, "page", 0, "A page.", lambda services, scene: [], panels=[Broken()]) for name in ("a", "b")
    ]
    with pytest.raises(ValueError, match="broken"):
        _panels_by_id(pages)


def test_the_dashboard_starts_fast_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time; before = time.process_time()\n"
        "from app.dashboard import build_app\n"
        "from tests.app.dashboard.fake_models import FakeModels\n"
        "from workbench.lab.jobs import JobQueue\nfrom workbench.lab.runs import RunStore\n"
        "store, jobs = RunStore(sys.argv[1]), JobQueue()\n"
        "app = build_app(store, jobs, FakeModels(store, jobs))\n"
        "assert app.server.test_client().get('/').status_code == 200\n"
        "assert app.server.test_client().get('/_dash-layout').status_code == 200\n"
        "print(time.process_time() - before, [m for m in ('torch', 'pandas', 'transformers') if m in sys.modules])"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 5, f"{seconds} CPU seconds ({time.monotonic() - began:.1f} s by the clock)"
