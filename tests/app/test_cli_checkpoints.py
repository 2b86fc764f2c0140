"""The command line on published checkpoints: `workbench models PATH` before loading, `workbench trace PATH`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from tests.models.pretrained.reference import CASES, Case, write
from tests.models.pretrained.test_encoder_decoders import CASES as ENCODER_DECODERS
from tests.models.pretrained.test_encoders import CASES as ENCODERS
from workbench.lab.runs import RunStore


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


def test_trace_of_an_encoder(workbench: Callable, tmp_path: Path) -> None:
    """It predicts no next token, so its run has patterns, without surprisal."""
    known = ENCODERS["bert"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), tmp_path / "encoder")
    record = json.loads(
        workbench("trace", str(tmp_path / "encoder"), "a cat", "--out", str(tmp_path / "runs"), "--json").out
    )
    run = RunStore(tmp_path / "runs").open(record["id"])
    assert not run.has("loss") and not run.has("next.ids") and run.layers[0]["pattern"]["causal"] is False
    pattern = run.array("layer.0.pattern")
    assert pattern.shape[1:] == (5, 5) and abs(pattern.sum(-1) - 1).max() < 1e-5 and pattern[:, 0, 1:].min() > 0


def test_trace_of_an_encoder_decoder(workbench: Callable, folder: Path, tmp_path: Path) -> None:
    """It reads a source besides the text, which begins with the token that begins every text."""
    known = ENCODER_DECODERS["t5"]
    write(Case(known.model, {**known.settings, "vocab_size": 256}), tmp_path / "t5")
    where = ("--out", str(tmp_path / "runs"), "--json")
    record = json.loads(workbench("trace", str(tmp_path / "t5"), "a cat", "--source", "eine Katze", *where).out)
    run = RunStore(tmp_path / "runs").open(record["id"])
    model = models.load(tmp_path / "t5")
    ids = torch.cat([model.start_tokens(1), model.to_tokens("a cat")], dim=1)
    expected = -model(ids, facts={"source": "eine Katze"}).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert run.array("tokens").tolist() == ids[0].tolist()
    assert abs(torch.from_numpy(run.array("loss")[1:].copy()) - expected).max() < 1e-4
    assert "--source" in workbench("trace", str(tmp_path / "t5"), "a cat", *where).err
    assert "no encoder" in workbench("trace", str(folder), "a cat", "--source", "x", *where).err
