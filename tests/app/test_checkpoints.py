"""Checkpoints in the dashboard: folders under the models root and hub ids; what is said before opening; what is held in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import models
from app.checkpoints import Checkpoints, in_words
from app.measure.common import model_of
from app.model_service import WorkbenchModels
from app.open_models import OpenModels, size_of
from app.pages import overview
from app.services import Services
from tests.models.pretrained.reference import CASES, Case, write
from tests.models.pretrained.test_encoder_decoders import CASES as ENCODER_DECODERS
from workbench.lab.checkpoints import CheckpointError
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two published folders over bytes, one of a type that we lack, one of our own, and a file that is none."""
    above = tmp_path_factory.mktemp("root")
    for name, case in (("llama", "llama"), ("someone/mamba", "mamba")):
        known = CASES[case]
        write(Case(known.model, {**known.settings, "vocab_size": 256}), above / name)
        (above / name / "README.md").write_text("---\nlicense: mit\n---\n")
    (above / "odd").mkdir()
    (above / "odd" / "config.json").write_text('{"model_type": "lama"}')
    models.save(models.build("retnet"), above / "mine")
    (above / "notes.txt").write_text("nothing")
    (above / "llama" / "1_Pooling").mkdir()
    (above / "llama" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (above / "settings").mkdir()
    (above / "settings" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return above


@pytest.fixture
def services(tmp_path: Path, root: Path) -> Iterator[Services]:
    store, jobs = RunStore(tmp_path / "runs"), JobQueue()
    yield Services(store, jobs, WorkbenchModels(store, jobs, root))
    jobs.shutdown(timeout=60)


def test_folders_are_listed_behind_the_shipped_models(services: Services) -> None:
    listed = {model["name"]: model for model in services.models.list_models()}
    assert set(listed) - set(models.registry.shipped_names()) == {"llama", "someone/mamba", "odd", "mine", "settings"}
    assert listed["llama"]["provenance"] == "pretrained" and listed["mine"]["provenance"] == "trained"
    assert listed["mine"]["architecture"] == "retnet"
    labels = [choice["value"] for choice in overview._choices(services)]
    assert labels.index(overview.OTHER) == len(labels) - 1, "random weights would come behind it"


def test_one_odd_folder_does_not_spoil_the_list(tmp_path: Path) -> None:
    for name, content in (("a list", "[1]"), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    listed = {entry["name"]: entry["description"] for entry in Checkpoints(tmp_path).listed()}
    assert "no object" in listed["a list"] and "not valid JSON" in listed["broken"]
    about = overview.about_model(
        Services(None, None, WorkbenchModels(None, None, tmp_path)), "a list", None, None, asked=False
    )  # type: ignore[arg-type]
    assert "holds a list" in str(about.words)


def test_what_opening_takes(services: Services) -> None:
    known = services.models.look_up("llama")
    parameters = models.load(services.models.checkpoints.root / "llama").n_parameters()  # type: ignore[attr-defined]
    assert known["parameters"] == parameters and known["load_bytes"] == 4 * parameters and known["problem"] == ""
    assert services.models.look_up("llama", "auto")["load_bytes"] == 8 * parameters, "it is stored in float64"
    words = dict(in_words(known))
    assert (
        words["licence"] == "mit"
        and "llama, opens as llama" in words["type"]
        and f"{parameters:,}" in words["parameters"]
    )
    assert "Did you mean 'llama'" in services.models.look_up("odd")["problem"]
    assert services.models.look_up("mine")["architecture"] == "retnet"
    assert "names neither a model_type nor an architecture" in services.models.look_up("settings")["problem"]


@pytest.mark.parametrize("name", ["../llama", "/etc", "someone/../llama", "./llama", "~/llama", "nowhere", "a/b/c", ""])
def test_nothing_but_names_is_opened(
    services: Services, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither paths nor folders that happen to lie in the working directory."""
    monkeypatch.chdir(root)
    with pytest.raises(ValueError):
        services.models.look_up(name)
    with pytest.raises((ValueError, LookupError)):
        services.models.start_trace(name, "text", {})
    with pytest.raises((ValueError, LookupError)):
        services.models.load(name)


def test_a_hub_id_is_never_a_folder_of_the_working_directory(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    known = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*For this page: put it under"):
        known.look_up("someone/mamba")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        known.open("someone/mamba", "float32", None)


def test_a_run_of_a_checkpoint(services: Services) -> None:
    job, words = overview.start(services, "someone/mamba", "a cat")
    assert words == "" and job is not None
    services.jobs.wait(job, timeout=120)
    (run,) = services.store.list()
    assert run.model == "someone/mamba"
    assert services.models.describe("someone/mamba")["blocks"][1]["kind"] == "mamba"
    assert services.models.load("someone/mamba") is services.models.load("someone/mamba")
    assert overview.start(services, "odd", "a cat")[1].startswith("odd cannot be opened")


def test_tight_memory_asks_first(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.pretrained import folders

    monkeypatch.setattr(folders, "free_memory", lambda: 1000)
    job, words = overview.start(services, "llama", "a cat")
    assert job is None and "tick the box" in words
    about = overview.about_model(services, "llama", None, "float32", asked=False)
    assert (about.hub, about.precision, about.tight, about.source) == (False, True, True, False)
    assert "1.0 kB are free" in json.dumps(about.words[0].to_plotly_json(), default=str)
    job, words = overview.start(services, "llama", "a cat", "auto", anyway=True)
    assert job is not None
    services.jobs.wait(job, timeout=120)


def test_what_the_form_says(services: Services) -> None:
    about = overview.about_model(services, overview.OTHER, "", "float32", asked=False)
    assert "hub" in about.words and about.hub and about.precision and not about.tight
    about = overview.about_model(services, overview.OTHER, "someone/nothing", "float32", asked=True)
    assert "HF_HUB_OFFLINE" in str(about.words)
    about = overview.about_model(services, "gpt-english", None, "float32", asked=True)
    assert not (about.hub or about.precision or about.source)
    about = overview.about_model(services, "mine", None, "float32", asked=False)
    assert "opens as retnet" in str(about.words) and not about.precision, "our own folders have one precision"


def test_an_encoder_decoder_asks_for_its_source(services: Services, root: Path) -> None:
    """The form has a field for it, a start without it says so, and the run has both texts, whether published or saved by us."""
    known = ENCODER_DECODERS["t5"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), root / "t5")
    try:
        model = models.load(root / "t5")
        models.save(model, root / "own-t5")
        for name in ("t5", "own-t5"):
            assert overview.about_model(services, name, None, "float32", asked=False).source
            job, words = overview.start(services, name, "a cat")
            assert job is None and f"{name} is an encoder-decoder: type its source, too" in words
            job, words = overview.start(services, name, "a cat", source="eine Katze")
            assert words == "" and job is not None
            services.jobs.wait(job, timeout=120)
            run = services.store.open(services.store.list()[0].id)
            assert run.manifest["source"]["text"] == "eine Katze" and run.layer(1)["n_columns"] == 10
            again = model_of(services, run)
            assert again.bound_source()[0] == list(b"eine Katze"), "measurements of this run read its source again"
        assert not overview.about_model(services, "llama", None, "float32", asked=False).source
        job, _ = overview.start(services, "llama", "a cat", source="left over from another model")
        services.jobs.wait(str(job), timeout=120)
        assert services.store.open(services.store.list()[0].id).manifest["source"] is None
    finally:
        for name in ("t5", "own-t5"):
            shutil.rmtree(root / name)


def test_models_leave_when_memory_is_short() -> None:
    small = {name: torch.nn.Linear(10, 10, bias=False) for name in "abc"}
    assert size_of(small["a"]) == 400
    held = OpenModels(room=900)
    for name in "ab":
        held.get(name, lambda name=name: small[name])  # type: ignore[misc]
    held.get("a", lambda: pytest.fail("it is here"))
    held.get("c", lambda: small["c"])
    assert held.about() == [("c", 400), ("a", 400)], "b was not asked for longest"
    assert held.get("big", lambda: torch.nn.Linear(100, 100)) is not None
    assert [name for name, _ in held.about()] == ["big"], "one that is too large alone stays"
