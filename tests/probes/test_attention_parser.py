"""The parser that reads attention: a planted head, the optimum of an independent solver, baselines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from probes.attention_parser import AttentionParser, attachment, fit_attention_parser, right_neighbours
from workbench.lab.stimuli import Sentence


def sentence(heads: list[int], parts: str | None = None) -> Sentence:
    words = tuple("abcdefgh"[: len(heads)])
    upos = tuple("PUNCT" if part == "." else "X" for part in (parts or "x" * len(heads)))
    spans = tuple((i, i + 1) for i in range(len(words)))
    return Sentence("s", "d", "".join(words), words, words, upos, upos, tuple(heads), words, spans)


def planted(number: int, seed: int = 0, noise: float = 0.3) -> tuple[list[np.ndarray], list[Sentence]]:
    """Random trees; head 1.0 reads the governor of a word (the special tokens for roots), all others noise."""
    rng = np.random.default_rng(seed)
    maps, sentences = [], []
    for _ in range(number):
        count = int(rng.integers(3, 7))
        heads = [int(rng.choice([-1, *(other for other in range(count) if other != word)])) for word in range(count)]
        reads = rng.random((2, 2, count + 1, count + 1)).astype(np.float32)
        reads[1, 0] = noise * reads[1, 0]
        for word, head in enumerate(heads):
            reads[1, 0, word + 1, head + 1] += 1
        maps.append(reads)
        sentences.append(sentence(heads))
    return maps, sentences


def test_the_planted_head_is_learned() -> None:
    maps, sentences = planted(40)
    parser = fit_attention_parser(maps, sentences, passes=20)
    others = planted(20, seed=1)
    assert parser.attachment(*others).mean() > 0.99
    assert parser.weights[0, 1, 0] > 5 * np.abs(np.delete(parser.weights.ravel(), 2)).max()
    assert parser.losses[-1] < parser.losses[0]


def test_it_ends_at_the_optimum_of_an_independent_solver() -> None:
    """−log p(head) written out for each word, minimised by BFGS in float64 from another start."""
    maps, sentences = planted(10, seed=2, noise=2.0)

    def loss(flat: np.ndarray) -> float:
        w, u = flat.reshape(2, 2, 2)
        total, count = 0.0, 0
        for reads, one in zip(maps, sentences, strict=True):
            for word, head in enumerate(one.heads):
                scores = {
                    i: float((w * reads[:, :, word + 1, i]).sum() + (u * reads[:, :, i, word + 1]).sum())
                    for i in range(len(one.heads) + 1)
                    if i != word + 1
                }
                total += np.log(sum(np.exp(value) for value in scores.values())) - scores[head + 1]
                count += 1
        return total / count + 1e-2 / 2 * float((flat**2).sum())

    best = minimize(loss, np.full(8, 0.5), method="BFGS")
    parser = fit_attention_parser(maps, sentences, passes=200, batch=10, penalty=1e-2, learning_rate=0.2)
    assert loss(parser.weights.ravel().astype(float)) == pytest.approx(best.fun, abs=1e-4)
    assert np.abs(parser.weights.ravel() - best.x).max() < 0.05


def test_scores_by_hand_and_baselines() -> None:
    reads = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    parser = AttentionParser(np.array([[[2.0]], [[1.0]]], dtype=np.float32), ())
    assert parser.scores(reads).tolist() == [[2 * 3 + 1, -np.inf, 2 * 5 + 7], [2 * 6 + 2, 2 * 7 + 5, -np.inf]]
    assert parser.parse(reads).tolist() == [1, 0]
    one = sentence([1, 2, -1, 2], "xxx.")
    assert right_neighbours(one) == [1, 2, 3, -1] and attachment(right_neighbours(one), one) == pytest.approx(2 / 3)
    assert np.isnan(attachment([0], sentence([-1], ".")))


def test_mistakes_are_named() -> None:
    maps, sentences = planted(3)
    with pytest.raises(ValueError, match="one map per sentence"):
        fit_attention_parser(maps, sentences[:2])
    with pytest.raises(ValueError, match=r"Map 0 is for .* words, its sentence has 2"):
        fit_attention_parser(maps[:1], [sentence([1, -1])])
