"""The registry's models as the dashboard sees them: real descriptions, and a real trace in the job queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from app.local_models import KEPT, LocalModels, card_text
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalModels]:
    jobs = JobQueue()
    yield LocalModels(RunStore(tmp_path), jobs)
    jobs.shutdown(10)


def test_every_model_of_the_registry_is_listed(local: LocalModels) -> None:
    listed = local.list_models()
    assert [model["name"] for model in listed] == [record.name for record in models.list_models()]
    assert all(model["parameters"] > 0 and model["title"] and model["description"] for model in listed)


@pytest.mark.parametrize("name", ["gpt2-random", "retnet-random", "mamba2-random", "bdh-random"])
def test_description_and_trace_of_one_model_of_each_family(local: LocalModels, name: str) -> None:
    model = models.load(name)
    about = local.describe(name)
    layers = [block["layer"] for block in about["blocks"]]
    assert layers[0] is None and layers[-1] is None
    assert sorted({layer for layer in layers if layer is not None}) == list(range(model.n_layers))
    assert [point["name"] for point in about["hook_points"]] == list(model.hook_dict)

    job = local.jobs.wait(local.start_trace(name, "A dragon hatches.", {"title": "Dragon"}).id, timeout=60)
    assert job.state == "done", job.traceback
    run = local.store.open(job.result)
    assert run.title == "Dragon" and run.model["name"] == name and len(run.layers) == model.n_layers


def test_what_the_model_cannot_take_is_refused_before_a_job_starts(local: LocalModels) -> None:
    with pytest.raises(ValueError, match="Did you mean 'gpt2-random'"):
        local.start_trace("gpt2-rando", "text", {})
    with pytest.raises(ValueError, match="empty"):
        local.start_trace("gpt2-random", "", {})
    with pytest.raises(ValueError, match=r"65 tokens.*at most 64"):
        local.start_trace("gpt2-random", "x" * 65, {})
    assert local.jobs.jobs() == [] and local.store.list() == []


def test_a_folder_is_no_model_name(local: LocalModels, tmp_path: Path) -> None:
    models.save(models.build("gpt2", n_layers=1), tmp_path / "mine")
    assert models.load(tmp_path / "mine").n_layers == 1
    with pytest.raises(ValueError, match="Unknown model"):
        local.describe(str(tmp_path / "mine"))


def test_few_models_stay_loaded(local: LocalModels) -> None:
    names = [model["name"] for model in local.list_models() if model["provenance"] == "random"][: KEPT + 1]
    for name in names:
        local.describe(name)
    assert list(local._loaded) == names[1:]


def test_a_card_as_markdown() -> None:
    assert card_text({}) is None
    text = card_text({"weights_sha256": "ab", "metrics": {"loss": 1.5}, "note": "plain"})
    assert text == '**weights sha256**: `ab`\n\n**metrics**\n\n```\n{\n  "loss": 1.5\n}\n```\n\n**note**: plain'
