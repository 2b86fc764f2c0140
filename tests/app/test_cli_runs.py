"""`workbench runs`: listing, showing, deleting and exporting real run folders."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from workbench.lab.runs import RunStore


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "runs")
    for title, kind in (("first [x]", "training"), ("second", "analysis")):
        with store.create(kind, title, model={"name": f"model-{kind}", "provenance": "random"}) as run:
            run.add_array("loss", np.array([3.0, 2.0, np.nan], np.float32), axes=("step",), unit="nats")
            run.set(seed=7, settings={"steps": 3})
    return store


def test_list_newest_first(workbench: Callable, store: RunStore) -> None:
    shown = workbench("runs", "list", "--runs", store.root, "--json")
    assert shown.code == 0 and shown.err == ""
    assert [run["id"] for run in shown.json] == [entry.id for entry in store.list()]
    table = workbench("runs", "--runs", store.root)
    assert table.code == 0 and "first [x]" in table.out and all(run["id"] in table.out for run in shown.json)


def test_list_by_kind_and_model(workbench: Callable, store: RunStore) -> None:
    def titles(*options: str) -> list[str]:
        return [run["title"] for run in workbench("runs", "list", "--runs", store.root, "--json", *options).json]

    assert titles("--kind", "training") == ["first [x]"]
    assert titles("--model", "model-analysis") == ["second"]
    assert titles("--kind", "training", "--model", "model-analysis") == []


def test_an_empty_root_says_how_to_make_a_run(workbench: Callable, tmp_path: Path) -> None:
    shown = workbench("runs", "--runs", tmp_path / "none")
    assert shown.code == 0 and shown.out == "" and "workbench trace" in shown.err
    assert workbench("runs", "list", "--runs", tmp_path / "none", "--json").json == []


def test_the_environment_names_the_root(workbench: Callable, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(store.root))
    assert len(workbench("runs", "--json").json) == 2


def test_options_before_a_further_word_are_refused(workbench: Callable, store: RunStore) -> None:
    refused = workbench("runs", "--runs", store.root, "list")
    assert refused.code == 2 and "after the word 'list'" in refused.err


def test_show(workbench: Callable, store: RunStore) -> None:
    entry = store.list(kind="training")[0]
    shown = workbench("runs", "show", entry.id, "--runs", store.root)
    assert shown.code == 0
    for expected in ("first [x]", "model-training", "steps=3", "loss", "float32", "nats"):
        assert expected in shown.out
    manifest = workbench("runs", "show", entry.id, "--runs", store.root, "--json").json
    assert manifest == json.loads((store.root / entry.id / "manifest.json").read_text())


def test_a_wrong_id_suggests_the_nearest(workbench: Callable, store: RunStore) -> None:
    entry = store.list()[0]
    failed = workbench("runs", "show", entry.id[:-1], "--runs", store.root)
    assert failed.code == 1 and failed.out == "" and entry.id in failed.err and "Traceback" not in failed.err


def test_delete_asks_and_yes_does_not(workbench: Callable, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    entry, other = store.list()
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert workbench("runs", "delete", entry.id, "--runs", store.root).code == 1
    assert len(store.list()) == 2
    assert workbench("runs", "delete", entry.id, "--runs", store.root, "--json").code == 1
    assert len(store.list()) == 2
    deleted = workbench("runs", "delete", entry.id, "--runs", store.root, "--yes", "--json")
    assert deleted.json == {"deleted": entry.id}
    assert [left.id for left in store.list()] == [other.id]


def test_export_writes_once_unless_forced(
    workbench: Callable, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = store.list()[0]
    exported = workbench("runs", "export", entry.id, "--runs", store.root)
    assert exported.code == 0 and exported.out == f"{entry.id}.zip\n"
    with zipfile.ZipFile(tmp_path / f"{entry.id}.zip") as archive:
        assert set(archive.namelist()) == {f"{entry.id}/manifest.json", f"{entry.id}/arrays.safetensors"}
    again = workbench("runs", "export", entry.id, "--runs", store.root)
    assert again.code == 1 and "exists" in again.err and "--force" in again.err
    forced = workbench("runs", "export", entry.id, "--runs", store.root, "--force", "--json")
    assert forced.json["bytes"] == (tmp_path / f"{entry.id}.zip").stat().st_size
    nowhere = workbench("runs", "export", entry.id, "--runs", store.root, "--out", "no/such/place.zip")
    assert nowhere.code == 1 and "no folder" in nowhere.err


def test_a_broken_folder_is_mentioned_beside_the_listing(workbench: Callable, store: RunStore) -> None:
    (store.root / "broken").mkdir()
    shown = workbench("runs", "list", "--runs", store.root, "--json")
    assert len(shown.json) == 2 and "broken is not a readable run" in shown.err


def test_import_takes_in_an_exported_run(workbench: Callable, store: RunStore, tmp_path: Path) -> None:
    entry = store.list()[0]
    file, other = tmp_path / "run.zip", tmp_path / "other"
    assert workbench("runs", "export", entry.id, "--runs", store.root, "--out", file).code == 0
    taken = workbench("runs", "import", file, "--runs", other)
    assert taken.code == 0 and taken.out == f"{entry.id}\n"
    assert RunStore(other).open(entry.id).manifest == store.open(entry.id).manifest
    again = workbench("runs", "import", file, "--runs", other)
    assert again.code == 1 and "here already" in again.err and "Traceback" not in again.err
    assert workbench("runs", "import", tmp_path / "nothing.zip", "--runs", other).code == 2
