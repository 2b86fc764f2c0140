"""The catalogue is complete, a wrong name is met with the nearest right one, and coverage joins exactly."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from workbench.lab import catalogue
from workbench.lab.catalogue import Declaration, UnknownPaper, coverage, gather, implements, load_catalogue, paper


@pytest.fixture
def empty_declarations(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str, str], Declaration]:
    fresh: dict[tuple[str, str, str], Declaration] = {}
    monkeypatch.setattr(catalogue, "_declarations", fresh)
    return fresh


def test_the_catalogue_is_complete_and_clean() -> None:
    papers = load_catalogue()
    assert len(papers) == 292
    assert Counter(row.tier for row in papers) == {0: 48, 1: 15, 2: 86, 3: 105, 4: 38}
    slugs = [row.slug for row in papers]
    assert slugs == sorted(set(slugs)) and all(re.fullmatch(r"[a-z0-9-]+", slug) for slug in slugs)
    for row in papers:
        texts = (row.title, row.kind, row.family, row.system_name, row.repo)
        assert row.title and row.kind and row.family and 1950 < row.year < 2030, row
        assert all(text == " ".join(text.split()) for text in texts), row


def test_a_paper_by_its_slug() -> None:
    mamba = paper("mamba")
    assert (mamba.title, mamba.year, mamba.family, mamba.tier, mamba.repo) == (
        "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        2023,
        "ssm",
        2,
        "state-spaces/mamba",
    )


def test_a_wrong_slug_names_the_nearest() -> None:
    with pytest.raises(UnknownPaper, match=r"'bert-atention'.*Did you mean 'bert-attention'") as caught:
        paper("bert-atention")
    assert not str(caught.value).startswith('"'), "KeyError's repr quotes must not reach the reader"


def test_load_catalogue_hands_out_a_copy() -> None:
    load_catalogue().clear()
    assert len(load_catalogue()) == 292


def test_implements_as_call_and_as_decorator(empty_declarations: dict) -> None:
    implements("mamba", "model", "mamba-small", note="no convolution")

    @implements("bdh", "probe", "synapses")
    def synapses() -> int:
        return 7

    assert synapses() == 7
    assert catalogue.declarations() == [
        Declaration("bdh", "probe", "synapses", "", __name__),
        Declaration("mamba", "model", "mamba-small", "no convolution", __name__),
    ]


def test_a_wrong_slug_is_found_when_read_and_names_the_module(empty_declarations: dict) -> None:
    implements("mambo", "model", "x")
    with pytest.raises(UnknownPaper, match=rf"model 'x' in {re.escape(__name__)}.*'mambo'.*'mamba'"):
        catalogue.declarations()


def test_a_wrong_kind_an_empty_name_and_a_second_owner_are_errors(empty_declarations: dict) -> None:
    with pytest.raises(ValueError, match=r"'modle' is no kind.*Did you mean 'model'"):
        implements("mamba", "modle", "x")
    with pytest.raises(ValueError, match="needs the name"):
        implements("mamba", "model", "")
    implements("mamba", "model", "x")
    implements("mamba", "model", "x")  # the same module again, as after a reload
    exec("implements('bdh', 'model', 'y')", {"implements": implements, "__name__": "elsewhere"})
    with pytest.raises(ValueError, match="declared in elsewhere and in"):
        implements("bdh", "model", "y")
    assert len(empty_declarations) == 2


def test_coverage_joins_every_record_once() -> None:
    records = [
        Declaration("mamba", "probe", "b"),
        Declaration("mamba", "model", "z"),
        Declaration("mamba", "probe", "a"),
        Declaration("bdh", "model", "bdh"),
    ]
    joined = coverage(records)
    assert [entry.paper for entry in joined] == load_catalogue()
    by_slug = {entry.paper.slug: entry for entry in joined}
    assert [record.name for record in by_slug["mamba"].declarations] == ["z", "a", "b"]
    assert by_slug["mamba"].names("probe") == ["a", "b"] and by_slug["mamba"].names("view") == []
    assert {slug for slug, entry in by_slug.items() if entry.covered} == {"mamba", "bdh"}
    assert sum(len(entry.declarations) for entry in joined) == len(records)


def test_coverage_refuses_what_it_cannot_place() -> None:
    with pytest.raises(UnknownPaper, match="'mamba'"):
        coverage([Declaration("mambaa", "model", "x")])
    with pytest.raises(ValueError, match="'probes' is no kind"):
        coverage([Declaration("mamba", "probes", "x")])


def test_gather_imports_the_declaring_modules_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_declarations: dict
) -> None:
    package = tmp_path / "planted_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("raise RuntimeError('must stay unloaded')  # never calls implements(...)\n")
    declares = "from workbench.lab.catalogue import implements\n"
    (package / "inner" / "__init__.py").write_text(f"{declares}implements('bdh', 'view', 'inner')\n")
    (package / "inner" / "deep.py").write_text(
        f"{declares}@implements('mamba', 'probe', 'deep')\ndef deep() -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert catalogue.declaring_modules("planted_package") == ["planted_package.inner", "planted_package.inner.deep"]
    found = gather(["planted_package"])
    assert [(record.slug, record.name, record.module) for record in found] == [
        ("bdh", "inner", "planted_package.inner"),
        ("mamba", "deep", "planted_package.inner.deep"),
    ]
    with pytest.raises(ModuleNotFoundError, match="no package 'planted_nothing'"):
        gather(["planted_nothing"])


def test_declaring_loads_neither_torch_nor_the_csv() -> None:
    code = (
        "import sys; from workbench.lab import catalogue; catalogue.implements('no-such-slug', 'model', 'x'); "
        "assert 'torch' not in sys.modules; assert catalogue._papers.cache_info().currsize == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
