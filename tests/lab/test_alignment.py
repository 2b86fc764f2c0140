"""Aligned tokens: closed cases, a brute-force cut at common boundaries, and the offsets of a real tokenizer."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from workbench.lab.alignment import Alignment, TokenText, align, matching_bytes, token_spans
from workbench.lab.tokenizers import ByteTokenizer

TEXT = "The naïve café—it isn’t\nopen 日本 today 🙂, is it?"


def of_bytes(text: str) -> TokenText:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    return TokenText(text, ids, tokenizer.token_strings(ids), tokenizer.name)


def of_pieces(pieces: list[str], name: str = "pieces", text: str | None = None) -> TokenText:
    return TokenText("".join(pieces) if text is None else text, [hash(p) % 999 for p in pieces], pieces, name)


def cuts(pieces: list[str]) -> set[int]:
    return {0, *np.cumsum([len(piece.encode()) for piece in pieces]).tolist()}


def random_pieces(text: str, draw: random.Random) -> list[str]:
    places = sorted(draw.sample(range(1, len(text)), draw.randrange(1, len(text))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def check(found: Alignment, first: int, second: int) -> None:
    """Every token of both lies in exactly one part, in order, and no part is empty."""
    for side, count in ((0, first), (1, second)):
        ranges = found.tokens(side)
        assert [t for start, stop in ranges.tolist() for t in range(start, stop)] == list(range(count))
    assert (found.sizes.sum(axis=1) > 0).all()


@pytest.mark.parametrize("seed", range(30))
def test_parts_end_exactly_where_both_have_a_boundary(seed: int) -> None:
    draw = random.Random(seed)
    one, other = random_pieces(TEXT, draw), random_pieces(TEXT, draw)
    found = align(of_pieces(one, "one"), of_pieces(other, "other"))
    check(found, len(one), len(other))
    assert found.aligned.all()
    for side, pieces in enumerate((one, other)):
        ends = np.cumsum([len(piece.encode()) for piece in pieces])
        assert set(ends[found.tokens(side)[:, 1] - 1].tolist()) | {0} == cuts(one) & cuts(other)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_against_pieces(seed: int) -> None:
    """Every piece is one part: bytes have all boundaries."""
    pieces = random_pieces(TEXT, random.Random(seed))
    found = align(of_bytes(TEXT), of_pieces(pieces))
    assert found.sizes.tolist() == [[len(piece.encode()), 1] for piece in pieces]


def test_the_same_tokens_are_identical() -> None:
    found = align(of_bytes(TEXT), of_bytes(TEXT))
    assert found.identical and found.in_words() == f"All {len(TEXT.encode())} tokens align one to one."


def test_a_changed_word_leaves_the_rest_aligned() -> None:
    one, other = "The old cat sat down.", "The old dogs sat down."
    found = align(of_bytes(one), of_bytes(other))
    check(found, len(one), len(other))
    left = [one[a:b] for a, b, c, d in found.parts.tolist() if c == d]
    new = [other[c:d] for a, b, c, d in found.parts.tolist() if a == b]
    assert "".join(left) == "cat" and "".join(new) == "dogs"
    same = [(one[a:b], other[c:d]) for a, b, c, d in found.parts[found.aligned].tolist()]
    assert all(a == b for a, b in same) and "".join(a for a, _ in same) == "The old  sat down."
    assert "without a counterpart: 3 of 21 tokens of A, 4 of 22 of B" in found.in_words()


@pytest.mark.parametrize("one,other", [("abc def", "abc def ghi jkl"), ("x", "y"), ("one two", "zero one two")])
def test_texts_of_two_lengths(one: str, other: str) -> None:
    found = align(of_bytes(one), of_bytes(other))
    check(found, len(one), len(other))
    shared = one in other
    assert int(found.aligned.sum()) == (len(one) if shared else 0)


def test_special_tokens() -> None:
    """Equal ones align where the tokenizer is the same; an unknown word takes what lies between its neighbours; capitals do not matter."""
    text = "The zyzzyva ran"
    one = of_pieces(["[CLS]", "the", "[UNK]", "ran", "[SEP]"], "wordpiece", text)
    assert token_spans(one) == [(0, 0), (0, 3), (3, 12), (12, 15), (15, 15)]
    other = of_pieces(["[CLS]", "the", "zy", "##zzyva", "ran", "[SEP]"], "wordpiece", text)
    assert token_spans(other) == [(0, 0), (0, 3), (4, 6), (6, 11), (12, 15), (15, 15)]
    same = align(one, other)
    assert same.parts.tolist() == [[0, 1, 0, 1], [1, 2, 1, 2], [2, 3, 2, 4], [3, 4, 4, 5], [4, 5, 5, 6]]
    elsewhere = align(one, TokenText(other.text, other.ids, other.labels, "another"))
    assert elsewhere.aligned.tolist() == [False, False, True, True, True, False, False]


def test_labels_of_byte_level_and_sentencepiece_vocabularies() -> None:
    """Pieces of a letter, in GPT-2's alphabet and as <0x..>, and the space that sentencepiece puts first."""
    text = "a 🙂 b"
    whole = of_pieces(["a", " ðŁĻ", "Ĥ", " b"], "byte-level", text)
    assert token_spans(whole) == [(0, 1), (1, 5), (5, 6), (6, 8)]
    pieces = of_pieces([" a", " ", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", " b"], "sentencepiece", text)
    assert token_spans(pieces) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 8)]


def test_spans_are_those_of_a_real_tokenizer() -> None:
    """A byte-level BPE trained here; its own offsets, in characters, are the oracle."""
    tokenizers = pytest.importorskip("tokenizers")
    from models.pretrained.tokenizer import PretrainedTokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = "The old café is open today\nand the naïve old man is at the open café. " * 2
    backend.train_from_iterator([text], trainer)
    tokenizer = PretrainedTokenizer(backend, "bpe", 300)
    ids = tokenizer.encode(text)
    spans = token_spans(TokenText(text, ids, tokenizer.token_strings(ids), "bpe"))
    offsets = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in backend.encode(text).offsets]
    assert len(set(ids)) > 10 and len(ids) < len(text) / 2 and spans == offsets


def test_matching_words_of_long_texts() -> None:
    draw = random.Random(0)
    words = [draw.choice(["alpha", "beta", "gamma", "delta", "eps"]) + str(draw.randrange(40)) for _ in range(3000)]
    changed = list(words)
    for place in range(50, 3000, 300):
        changed[place] = "changed"
    one, other = " ".join(words), " ".join(changed)
    blocks = matching_bytes(one, other)
    first, second = one.encode(), other.encode()
    assert all(first[i : i + n] == second[j : j + n] for i, j, n in blocks)
    assert sum(n for _, _, n in blocks) > 0.97 * len(first)
    assert all(a[0] + a[2] <= b[0] and a[1] + a[2] <= b[1] for a, b in pairwise(blocks))


def test_a_run_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="run x has no tokens to align: it is a lens run"):
        TokenText.of({"id": "x", "kind": "lens", "tokens": None})
