"""The command line on published checkpoints: `workbench models PATH` before loading, `workbench trace PATH`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.pretrained.reference import CASES, Case, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint over bytes, which needs no tokenizer file."""
    path = tmp_path_factory.mktemp("published") / "small"
    known = CASES["llama"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


def test_what_a_checkpoint_is_before_it_is_opened(workbench: Callable, folder: Path) -> None:
    record = json.loads(workbench("models", str(folder), "--json").out)
    assert record["model_type"] == record["architecture"] == "llama" and record["licence"] == "mit"
    assert record["stored_dtypes"] == ["F64"] and record["place"] == "folder" and record["download_bytes"] == 0
    assert record["load_bytes"] == 4 * record["parameters"] and record["file_bytes"] == 8 * record["parameters"]
    assert "llama" in workbench("models", str(folder)).out


def test_trace_takes_a_folder(workbench: Callable, folder: Path, tmp_path: Path) -> None:
    record = json.loads(workbench("trace", str(folder), "a cat", "--out", str(tmp_path), "--json").out)
    assert record["tokens"] == 5 and record["layers"] == 3 and record["model"] == "small"
