"""The command line on published checkpoints: `workbench models PATH` before loading, `workbench trace PATH`."""

from __future__ import annotations

import json
import shutil
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


def test_pickles_are_converted_by_choice(workbench: Callable, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(folder, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    refused = workbench("trace", old, "a cat", "--out", tmp_path / "runs")
    assert refused.code == 1 and f"workbench models {old} --convert NEW_FOLDER" in " ".join(refused.err.split())
    done = workbench("models", old, "--convert", new)
    assert done.code == 0 and "llama" in done.out and "as safetensors" in done.err
    assert workbench("trace", new, "a cat", "--out", tmp_path / "runs").code == 0
    assert workbench("models", "--convert", new).code == 1


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


def test_masked_tokens_are_filled_in(workbench: Callable, tmp_path: Path) -> None:
    """A `[MASK]` in the text is the token of that name, and the run has what transformers would put there."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertForMaskedLM

    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "the", "cat", "sat", "on", "mat"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.add_special_tokens(words[:5])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    known, folder = ENCODERS["bert-masked"], tmp_path / "filler"
    write(Case(known.model, {**known.settings, "vocab_size": len(words)}), folder)
    backend.save(str(folder / "tokenizer.json"))
    text, where = "the cat [MASK] on [MASK] mat", ("--out", str(tmp_path / "runs"))
    record = workbench("trace", folder, text, *where, "--json").json
    ids = torch.tensor([[1, 5, 6, 3, 8, 3, 9, 2]])
    with torch.no_grad():
        expected = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.softmax(-1)[0]
    assert [fill["position"] for fill in record["masked"]] == [3, 5]
    for fill in record["masked"]:
        best = expected[fill["position"]].topk(5)
        assert fill["tokens"] == [words[i] for i in best.indices.tolist()]
        assert fill["probabilities"] == pytest.approx(best.values.tolist(), abs=1e-5)
    shown = workbench("trace", folder, text, *where).out
    assert "at 3" in shown and "at 5" in shown and record["masked"][0]["tokens"][0] in shown
    assert "masked" not in workbench("trace", folder, "the cat", *where, "--json").json
    assert "logits of masked tokens" in workbench("models", folder).out


def test_what_other_encoders_give_is_said(workbench: Callable, tmp_path: Path) -> None:
    for name, words in (("bert", "without a head"), ("distilbert-masked", "logits of masked tokens")):
        write(ENCODERS[name], tmp_path / name)
        assert words in " ".join(workbench("models", tmp_path / name).out.split())
    write(ENCODER_DECODERS["t5"], tmp_path / "t5")
    assert "a source besides the text" in " ".join(workbench("models", tmp_path / "t5").out.split())


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
