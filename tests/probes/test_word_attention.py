"""Weights between words: sums to and means from pieces, special tokens apart; padding and order change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from probes.progress import MeasurementCancelled
from probes.word_attention import encoded_apart, word_attention

TEXTS = [("ab", " c", " def"), ("x",), (" long", " er", " one", "!")]


class Pieces:
    """A tokenizer with special tokens 1 … 2 around every text; one token per character."""

    def encode_plain(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode(self, text: str) -> list[int]:
        return [1, *self.encode_plain(text), 2]


@pytest.fixture(scope="module")
def encoder() -> Any:
    model = models.build("bert", seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.tokenizer = Pieces()
    return model


def by_hand(pattern: Tensor, words: tuple[str, ...]) -> np.ndarray:
    """The definition, cell by cell: pattern [layer, head, query, key] of one text."""
    pieces, at = [[0, pattern.shape[-1] - 1]], 1
    for word in words:
        pieces.append(list(range(at, at + len(word))))
        at += len(word)
    found = np.zeros((*pattern.shape[:2], len(pieces), len(pieces)))
    for i, rows in enumerate(pieces):
        for j, columns in enumerate(pieces):
            found[:, :, i, j] = np.mean([sum(pattern[:, :, r, c] for c in columns).numpy() for r in rows], axis=0)
    return found


def test_against_the_definition(encoder: Any) -> None:
    found = dict(word_attention(encoder, TEXTS, batch_size=2))
    assert sorted(found) == [0, 1, 2]
    for number, words in enumerate(TEXTS):
        tokens = torch.tensor([Pieces().encode("".join(words))])
        with torch.no_grad():
            pattern = torch.stack([p.values[0].double() for p in encoder.patterns(tokens).values()])
        assert np.abs(found[number] - by_hand(pattern, words)).max() < 1e-5
        assert np.abs(found[number].sum(-1) - 1).max() < 1e-5


def test_models_without_special_tokens_and_signed_patterns() -> None:
    """Bytes have no special tokens, so that nobody reads what is no word; |α| is divided by its row's sum."""
    for name in ("gpt", "retnet", "bdh"):
        ((_, reads),) = word_attention(models.build(name), [(" one", " two")])
        assert reads.shape[-2:] == (3, 3) and (reads >= 0).all() and np.abs(reads[:, :, :, 0]).max() == 0
        assert np.abs(reads[:, :, 1, 2]).max() == 0, "a causal model does not read on"
        sums = reads[:, :, 2].sum(-1)
        assert np.abs(sums - 1).max() < 1e-5


def test_what_belongs_to_the_text() -> None:
    assert encoded_apart(Pieces(), "a") == ([1], [97], [2])
    assert encoded_apart(models.build("gpt").tokenizer, "a") == ([], [97], [])


def test_mistakes_are_named(encoder: Any) -> None:
    with pytest.raises(ValueError, match="at least one word in each"):
        next(word_attention(encoder, [("a",), ()]))
    with pytest.raises(ValueError, match="Text 1 has 102 tokens; this model reads at most 64"):
        next(word_attention(encoder, [("a",), ("b" * 100,)]))
    import threading

    stop = threading.Event()
    stop.set()
    with pytest.raises(MeasurementCancelled):
        next(word_attention(encoder, TEXTS, cancel=stop))
