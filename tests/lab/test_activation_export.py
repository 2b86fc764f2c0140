"""Exports hold what the store holds, read by the libraries that they are for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from workbench.lab.activation_export import export_dataset, export_safetensors
from workbench.lab.activation_store import ActivationStore, ActivationStoreError, Site, harvest

SITES = [Site("blocks.1.hook_resid_post"), Site("blocks.0.attn.hook_z", head=2)]


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    tokens = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(0))
    return harvest(models.build("gpt2"), tokens, SITES, tmp_path / "store", batch_size=2, rows_per_shard=20)


def test_plain_shards(store: ActivationStore, tmp_path: Path) -> None:
    folder = export_safetensors(store, tmp_path / "plain", rows_per_shard=15)
    index = json.loads((folder / "activations.json").read_text())
    parts = [load_file(folder / shard["file"]) for shard in index["shards"]]
    assert [len(part["token"]) for part in parts] == [15, 15, 10] == [shard["rows"] for shard in index["shards"]]
    assert index["rows"] == len(store) == 40 and index["sites"] == {site.name: store.width(site.name) for site in SITES}
    for site in SITES:
        assert torch.equal(torch.cat([part[site.name] for part in parts]), store.rows(site.name))
    for name, values in store.facts().items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


def test_a_dataset_that_its_library_opens(store: ActivationStore, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    opened = datasets.load_from_disk(str(export_dataset(store, tmp_path / "rows"))).with_format("torch")
    assert opened.num_rows == 40 and opened.column_names == [
        "token",
        "position",
        "sequence",
        *(site.name for site in SITES),
    ]
    for site in SITES:
        assert torch.equal(opened[:][site.name], store.rows(site.name))
    assert torch.equal(opened[:]["token"], store.facts()["token"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "store"], "nothing is left beside it"


def test_mistakes_cost_nothing(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ActivationStoreError, match="is there already"):
        export_safetensors(store, tmp_path / "taken")
    with pytest.raises(ActivationStoreError, match="at least 1"):
        export_safetensors(store, tmp_path / "plain", rows_per_shard=0)
    store.shards.pop()
    with pytest.raises(ActivationStoreError, match="not complete"):
        export_safetensors(store, tmp_path / "plain")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ActivationStoreError, match="pip install datasets"):
        export_dataset(store, tmp_path / "rows")
    assert not (tmp_path / "plain").exists() and not (tmp_path / "rows").exists()
