"""`workbench models`, `catalogue`, `data` and `bench`: what is here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app import coverage as app_coverage
from workbench.lab.catalogue import Declaration, coverage


@pytest.fixture
def planted_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        Declaration("mamba", "model", "tiny [m]", "no convolution"),
        Declaration("mamba", "case_study", "memory"),
    ]
    monkeypatch.setattr(app_coverage, "full_coverage", lambda: coverage(records))


def test_catalogue_as_json(workbench: Callable, planted_coverage: None) -> None:
    shown = workbench("catalogue", "--json")
    assert shown.code == 0 and shown.err == "" and len(shown.json) == 292
    mamba = next(row for row in shown.json if row["slug"] == "mamba")
    assert mamba["covered"] and mamba["year"] == 2023
    assert mamba["implementations"]["model"] == [{"name": "tiny [m]", "note": "no convolution", "module": ""}]
    assert [row["slug"] for row in shown.json if row["covered"]] == ["mamba"]


def test_every_declaration_of_every_floor_names_a_paper() -> None:
    from models.registry import list_models

    entries = {entry.paper.slug: entry for entry in app_coverage.full_coverage()}
    for record in list_models():
        if record.paper:
            assert record.name in entries[record.paper].names("model")
    assert "bdh-random" in entries["bdh"].names("model")


def test_models_in_both_forms(workbench: Callable) -> None:
    from models.registry import list_models

    shown = workbench("models", "--json")
    assert shown.code == 0 and shown.err == ""
    for row, record in zip(shown.json, list_models(), strict=True):
        assert (row["name"], row["paper"], row["parameters"]) == (record.name, record.paper, record.parameters)
    table = workbench("models")
    assert all(row["name"] in table.out and f"{row['parameters']:,}" in table.out for row in shown.json)


def test_one_model_lists_its_hook_points(workbench: Callable) -> None:
    import models

    shown = workbench("models", "retnet-random", "--json").json
    expected = models.load("retnet-random").hook_dict
    assert {row["name"]: row["role"] for row in shown["hook_points"]} == {
        name: point.role for name, point in expected.items()
    }
    assert "blocks.0.mixer.hook_pattern" in workbench("models", "retnet-random").out
    wrong = workbench("models", "retnet-radnom")
    assert wrong.code == 1 and wrong.out == "" and "Did you mean 'retnet-random'" in wrong.err


def test_catalogue_filters(workbench: Callable, planted_coverage: None) -> None:
    def slugs(*options: str) -> list[str]:
        return [row["slug"] for row in workbench("catalogue", "--json", *options).json]

    assert slugs("--covered") == ["mamba"]
    missing = slugs("--missing")
    assert len(missing) == 292 - 48 - 1, "all but the background reading and the covered one"
    assert "mamba" not in missing
    assert set(slugs("--family", "ssm")) >= {"mamba"} and len(slugs("--family", "ssm")) == 3
    assert slugs("--family", "ssm", "--covered") == ["mamba"]
    assert workbench("catalogue", "--covered", "--missing").code == 2
    wrong = workbench("catalogue", "--family", "smm")
    assert wrong.code == 1 and "Did you mean 'ssm'" in wrong.err


def test_catalogue_for_people(workbench: Callable, planted_coverage: None) -> None:
    listing = workbench("catalogue", "--covered")
    assert "model tiny [m], case study memory" in listing.out.replace("\n", " ")
    one = workbench("catalogue", "mamba")
    assert "state-spaces/mamba" in one.out and "tiny [m] (no convolution)" in one.out
    wrong = workbench("catalogue", "mambo")
    assert wrong.code == 1 and "'mamba'" in wrong.err


def test_data_lists_corpora_and_tasks(workbench: Callable) -> None:
    from workbench.lab.corpora import list_corpora
    from workbench.lab.tasks import list_tasks

    shown = workbench("data", "--json")
    assert shown.code == 0 and shown.err == ""
    assert [row["name"] for row in shown.json["corpora"]] == [record.name for record in list_corpora()]
    assert [row["name"] for row in shown.json["tasks"]] == [record.name for record in list_tasks()]
    table = workbench("data")
    assert all(row["name"] in table.out for rows in shown.json.values() for row in rows)


def test_bench_passes_its_options_and_exit_code_on(workbench: Callable) -> None:
    wrong = workbench("bench", "--only", "no-such-benchmark")
    assert wrong.code == 2 and wrong.out == "" and "there is no benchmark 'no-such-benchmark'" in wrong.err
