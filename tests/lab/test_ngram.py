"""The vectorised n-gram model against the recursion of the textbook, written with dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from workbench.lab.ngram import NgramModel

TRAINING = b"the cat sat on the mat. the dog sat on the log. a cat and a dog met the cat on a mat."


def counts_of_length(data: bytes, length: int) -> Counter[bytes]:
    return Counter(data[start : start + length] for start in range(len(data) - length + 1))


def brute_force(data: bytes, context: bytes, byte: int, highest: bool = True) -> float:
    """Interpolated Kneser–Ney probability of one byte, by counting."""
    length = len(context) + 1
    if highest:  # noqa: SIM108 - two sentences, not one expression
        counts = counts_of_length(data, length)
    else:  # of how many different longer n-grams is this one the end?
        counts = Counter(ngram[1:] for ngram in counts_of_length(data, length + 1))
    frequency = Counter(counts.values())
    discount = frequency[1] / (frequency[1] + 2 * frequency[2]) if frequency[1] else 0.5
    lower = brute_force(data, context[1:], byte, highest=False) if context else 1 / 256
    after = {ngram: count for ngram, count in counts.items() if ngram[:-1] == context}
    total = sum(after.values())
    if not total:
        return lower
    own = after.get(context + bytes([byte]), 0)
    return max(own - discount, 0) / total + discount * len(after) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_equal_brute_force_counting(order: int) -> None:
    model = NgramModel(order).fit(TRAINING)
    text = b"the cap sat\xff on zz"
    losses = model.losses(text)
    for t in range(len(text)):
        context = text[max(0, t - order + 1) : t]
        assert losses[t] == pytest.approx(-math.log(brute_force(TRAINING, context, text[t])), rel=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"th", b" the", b"\xff", b"t\xff", b"\x00\x00"])
def test_probabilities_sum_to_one(context: bytes) -> None:
    for order in (1, 2, 3, 8):
        distribution = NgramModel(order).fit(TRAINING).distribution(context)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_a_distribution_agrees_with_the_losses() -> None:
    model = NgramModel(3).fit(TRAINING)
    for t, loss in enumerate(model.losses(b"a dog")):
        assert -np.log(model.distribution(b"a dog"[:t])[b"a dog"[t]]) == pytest.approx(loss, rel=1e-12)


def test_a_text_without_rare_ngrams_still_leaves_probability_for_unseen_bytes() -> None:
    model = NgramModel(2).fit(b"ab" * 50)
    assert model.distribution(b"a").sum() == pytest.approx(1, abs=1e-12)
    assert model.distribution(b"a")[ord("z")] > 0


def test_more_context_helps_on_text_and_nothing_beats_noise() -> None:
    text = TRAINING * 20
    assert NgramModel(3).fit(text).losses(TRAINING).mean() < NgramModel(1).fit(text).losses(TRAINING).mean() - 1
    noise = np.random.default_rng(0).integers(256, size=60_000, dtype=np.uint8).tobytes()
    for order in (1, 2, 3):
        assert NgramModel(order).fit(noise[:50_000]).losses(noise[50_000:]).mean() > math.log(256)


def test_short_and_empty_texts() -> None:
    model = NgramModel(3).fit(TRAINING)
    assert model.losses(b"").shape == (0,)
    assert model.losses(b"t").shape == (1,) and model.losses(b"th").shape == (2,)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="order must be 1 … 8, got 9"):
        NgramModel(9)
    with pytest.raises(ValueError, match="too few for an order of 3"):
        NgramModel(3).fit(b"ab")
    with pytest.raises(ValueError, match="fit the model before"):
        NgramModel(3).losses(b"abc")
    with pytest.raises(ValueError, match="fit the model before"):
        NgramModel(3).distribution(b"abc")
