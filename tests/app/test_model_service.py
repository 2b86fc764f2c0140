"""The dashboard's models: shipped ones from their cards, runs in the queue, demo runs in a store that holds nothing of the reader's own."""

from pathlib import Path

import pytest

from app.model_service import WorkbenchModels, card_in_words, shipped_cards
from models.registry import shipped_names
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore


@pytest.fixture
def service(tmp_path: Path):  # type: ignore[no-untyped-def]
    jobs = JobQueue()
    yield WorkbenchModels(RunStore(tmp_path / "runs"), jobs)
    jobs.shutdown(timeout=60)


def test_shipped_models_come_first_and_in_order(service: WorkbenchModels) -> None:
    assert [card["name"] for card in shipped_cards()] == shipped_names()
    assert [model["name"] for model in service.list_models()] == shipped_names()
    service.warm_up()
    listed = [model["name"] for model in service.list_models()]
    assert listed[: len(shipped_names())] == shipped_names() and "llama-random" in listed


@pytest.mark.parametrize("name", [*shipped_names(), "looped-random"])
def test_every_model_is_described(service: WorkbenchModels, name: str) -> None:
    described = service.describe(name)
    assert {"kind", "label", "detail", "layer"} == set(described["blocks"][0])
    assert all(len(block["detail"]) <= 22 for block in described["blocks"])  # it has to fit into its box
    assert {"name", "role", "axes", "editable"} <= set(described["hook_points"][0])


@pytest.mark.parametrize("card", shipped_cards(), ids=lambda card: card["name"])
def test_cards_read_as_text(card: dict) -> None:  # type: ignore[type-arg]
    words = card_in_words(card)
    assert "validation loss" in words and card["command"] in words and card["weights_sha256"] in words


def test_a_run_is_started_by_name_only(service: WorkbenchModels, tmp_path: Path) -> None:
    for name in ("no-such-model", str(tmp_path), "../shipped/gpt-english", f"{tmp_path}-random"):
        with pytest.raises(ValueError, match=r"no model|Unknown architecture"):
            service.start_trace(name, "text", {})
    with pytest.raises(ValueError, match="empty"):
        service.start_trace("gpt-english", "", {})


def test_demo_runs_fill_a_store_without_runs_of_ones_own(service: WorkbenchModels) -> None:
    """Every shipped model once; a start that was cut short is completed; a store with a run of the reader's own is left alone."""
    for job in service.start_demo_runs():
        service.jobs.wait(job.id, timeout=60)
    runs = service.store.list()
    assert sorted(run.model for run in runs) == sorted(shipped_names()) and runs[0].model == shipped_names()[0]
    assert service.start_demo_runs() == []
    service.store.delete(runs[-1].id)
    (again,) = service.start_demo_runs()
    service.jobs.wait(again.id, timeout=60)
    own = service.start_trace("gpt-english", "my own", {"title": "mine"})
    service.jobs.wait(own.id, timeout=60)
    service.store.delete(service.store.list()[1].id)
    assert service.start_demo_runs() == []
