"""`workbench export`: a store in, plain shards or a dataset out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from workbench.lab.activation_store import harvest


def test_both_forms(workbench: Callable, tmp_path: Path) -> None:
    tokens = torch.randint(0, 256, (3, 6), generator=torch.Generator().manual_seed(0))
    site = "blocks.0.hook_resid_post"
    store = harvest(models.build("gpt2"), tokens, [site], tmp_path / "store")
    shown = workbench("export", str(tmp_path / "store"), str(tmp_path / "plain"), "--json")
    assert shown.code == 0 and shown.json["rows"] == len(store) == 15 and shown.json["sites"] == [site]
    assert torch.equal(load_file(tmp_path / "plain" / "activations-00000-of-00001.safetensors")[site], store.rows(site))
    datasets = pytest.importorskip("datasets")
    shown = workbench("export", str(tmp_path / "store"), str(tmp_path / "rows"), "--form", "dataset")
    assert shown.code == 0 and datasets.load_from_disk(str(tmp_path / "rows")).num_rows == 15


def test_mistakes(workbench: Callable, tmp_path: Path) -> None:
    assert "is no folder" in workbench("export", str(tmp_path / "none"), str(tmp_path / "x")).err
    (tmp_path / "empty").mkdir()
    shown = workbench("export", str(tmp_path / "empty"), str(tmp_path / "x"))
    assert shown.code == 1 and "is no activation store" in shown.err
    shown = workbench("export", str(tmp_path / "empty"), str(tmp_path / "x"), "--form", "datasett")
    assert shown.code == 2 and "dataset" in shown.err
