"""Needles in natural text: where they lie, how long prompts are, and that a model's own tokenizer decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from probes.retrieval import retrieval_scores
from probes.text_needles import NEEDLES, text_needle_grid

HAY = "".join(f"Sentence number {number} says nothing. " for number in range(60))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("gpt", n_ctx=512)


def test_prompts_hold_the_needle_between_sentences(model: Any) -> None:
    runs = text_needle_grid(model, HAY, (300, 400), (0.0, 0.5, 1.0))
    assert len(runs) == 2 * 3 * len(NEEDLES)
    for run in runs:
        needle, question = NEEDLES[run.needle]
        text = bytes(run.tokens.tolist()).decode()
        assert len(run.tokens) == run.length and text.endswith(question) and text.count(needle) == 1
        assert text[run.start : run.stop] == needle
        assert run.depth in (0.0, 1.0) or text[run.start - 1] == ".", "a sentence ends before it"
        if run.depth == 0:
            assert run.start == 0
        if run.depth == 0.5:
            assert abs(run.start - (run.length - len(question)) / 2) < 80
        if run.depth == 1:
            assert run.stop == run.length - len(question)


def test_they_can_be_scored(model: Any) -> None:
    runs = text_needle_grid(model, HAY, (300,), (0.5,))[:1]
    assert retrieval_scores(model, runs, success=-1).scores.shape == (model.n_layers, 4)


class Marked:
    """Bytes with special tokens 1 and 2 around every text."""

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, text: str) -> list[int]:
        return [1, *self.encode_plain(text), 2]

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()


def test_special_tokens_stand_before_the_text_only() -> None:
    model: Any = models.build("gpt", n_ctx=512)
    model.tokenizer = Marked()
    (run,) = text_needle_grid(model, HAY, (300,), (0.0,), NEEDLES[:1])
    assert run.tokens[0] == 1 and not torch.isin(run.tokens, torch.tensor([2])).any() and run.start == 1
    assert bytes(run.answer.tolist()).decode() == NEEDLES[0][0]


def test_mistakes_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="already holds"):
        text_needle_grid(model, HAY + NEEDLES[0][0], (300,))
    with pytest.raises(ValueError, match="100 tokens do not hold needle 0"):
        text_needle_grid(model, HAY, (100,))
    with pytest.raises(ValueError, match="Expected a longer text"):
        text_needle_grid(model, HAY[:200], (450,))
    with pytest.raises(ValueError, match="depths"):
        text_needle_grid(model, HAY, (300,), (1.5,))
    with pytest.raises(ValueError, match="No needles"):
        text_needle_grid(model, HAY, (300,), needles=())
