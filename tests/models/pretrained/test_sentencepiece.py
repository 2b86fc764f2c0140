"""Tokenizers that come as a SentencePiece file alone, as mT5's does: against the library that trained them, and what is said without it."""

import io
import json
import sys
from pathlib import Path

import pytest

from models.pretrained.tokenizer import CONVERTERS, tokenizer_of
from tests.test_packaging import PROJECT
from workbench.lab.checkpoints import CheckpointError

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")
TEXT = "the keeper lit the lamp"


@pytest.fixture(scope="module")
def trained() -> bytes:
    """31 pieces of a few sentences, with T5's ids for padding, end and unknown."""
    words = ["ship", "boat", "man", "gull", "light", "storm", "wind"] * 20
    rows = (f"the keeper lit the lamp and the {word} went out to sea again" for word in words)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows, model_writer=out, vocab_size=31, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def folder_with(where: Path, file: bytes, named: str | None) -> Path:
    (where / "spiece.model").write_bytes(file)
    (where / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    if named is not None:
        (where / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "extra_ids": 0}))
    return where


@pytest.mark.parametrize("named", ["T5Tokenizer", "MT5Tokenizer", "MT5TokenizerFast"])
def test_it_reads_as_the_library_reads(tmp_path: Path, trained: bytes, named: str) -> None:
    """Ids, pieces and text, whichever class the checkpoint names (transformers 5 has T5's only)."""
    ours = tokenizer_of(folder_with(tmp_path, trained, named), 500)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained)
    assert ours is not None and len(set(theirs.encode(TEXT))) > 8
    for text in (TEXT, "a gull went out", "lamplight"):
        ids = ours.encode(text)
        assert ids == [*theirs.encode(text), 1], "and the end token, as T5 was trained"
        assert ours.token_strings(ids)[:-1] == [piece.replace("▁", " ") for piece in theirs.encode(text, out_type=str)]
        assert ours.decode(ids[:-1]).strip() == text


@pytest.mark.parametrize("lacking", [("sentencepiece",), ("google.protobuf",), ("sentencepiece", "google.protobuf")])
def test_without_the_packages_the_command_is_said(
    tmp_path: Path, trained: bytes, lacking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, trained, "T5Tokenizer")
    made = "sentencepiece_model_pb2"  # made with protobuf when it was first needed
    monkeypatch.delitem(sys.modules, f"sentencepiece.{made}", raising=False)
    monkeypatch.delattr(sentencepiece, made, raising=False)
    for module in lacking:
        for name in [known for known in sys.modules if known == module or known.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(CheckpointError) as raised:
        tokenizer_of(folder, 500)
    message = str(raised.value)
    names = " and ".join(CONVERTERS[module] for module in lacking)
    assert (
        f"a SentencePiece file (spiece.model), and {names} {'is' if len(lacking) == 1 else 'are'} not installed"
        in message
    )
    assert "pip install sentencepiece protobuf" in message and "tokenizer=False" in message
    assert "'.[sentencepiece]'" in message and set(CONVERTERS.values()) == {
        line.split(">=")[0] for line in PROJECT["project"]["optional-dependencies"]["sentencepiece"]
    }
