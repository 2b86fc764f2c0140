"""Pointing heads: planted maps with one right head and decoys, choice and score on different texts, baselines with known values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import models
from probes import syntax_heads
from probes.syntax_heads import (
    HeadAnswers,
    WordQuestion,
    answers,
    ask_heads,
    best_offset,
    coreference_questions,
    dependency_questions,
    nearest_choice,
    pointing_heads,
    same_word_choice,
)
from workbench.lab.coreference import Mention, Passage
from workbench.lab.stimuli import read_conllu

SENTENCE = """# sent_id = s
# text = She was seen.
1\tShe\tshe\tPRON\tPRP\t_\t3\tnsubj:pass\t_\t_
2\twas\tbe\tAUX\tVBD\t_\t3\taux:pass\t_\t_
3\tseen\tsee\tVERB\tVBN\t_\t0\troot\t_\tSpaceAfter=No
4\t.\t.\tPUNCT\t.\t_\t3\tpunct\t_\t_

"""


def test_questions_of_a_sentence() -> None:
    sentences = read_conllu(SENTENCE)
    assert sentences[0].written == ("She", " was", " seen", ".")
    assert dependency_questions(sentences) == [
        WordQuestion(0, 0, (2,), "nsubj:pass"),
        WordQuestion(0, 1, (2,), "aux:pass"),
    ]
    assert len(dependency_questions(sentences, punctuation=True)) == 3


def test_questions_of_a_passage() -> None:
    mentions = (
        Mention(0, 2, 1, "a", "nominal"),
        Mention(3, 4, 3, "b", "proper"),
        Mention(5, 6, 5, "a", "pronoun"),
        Mention(7, 8, 7, "c", "nominal"),
    )
    (question,) = coreference_questions([Passage("d", ("the", " Dog", " saw", " Max", ",", " dog"), mentions)])
    assert question == WordQuestion(0, 5, (1,), "pronoun", (1, 3))
    assert nearest_choice(question) == 3
    assert same_word_choice(question, ("the", " Dog", " saw", " Max", ",", " dog")) == 1
    assert same_word_choice(question, ("a", "b", "c", "d", "e", "f")) == -1


def planted(sentences: int, seed: int) -> tuple[list[WordQuestion], np.ndarray]:
    """Questions at random distances, and what six heads answer [question, layer, head, direction]: 1.2 reads the right word, 0.1 is read
    from it in four of five cases, 0.0 always answers the next word, all others at random.
    """
    rng = np.random.default_rng(seed)
    questions, guesses = [], []
    for text in range(sentences):
        for word in range(8):
            right = int(rng.choice([other for other in range(8) if other != word]))
            questions.append(WordQuestion(text, word, (right,), "even" if word % 2 == 0 else "odd"))
            guess = rng.integers(8, size=(2, 3, 2))
            guess[1, 2, 0] = right
            guess[0, 1, 1] = right if rng.random() < 0.8 else (right + 1) % 8
            guess[0, 0] = min(word + 1, 7)
            guesses.append(guess)
    return questions, np.array(guesses, dtype=np.int16)


def test_the_planted_head_is_found_and_scored() -> None:
    dev, test = (HeadAnswers(tuple(q), g) for q, g in (planted(30, 0), planted(40, 1)))
    for found in pointing_heads(dev, test, ("all", "odd")):
        assert (found.layer, found.head, found.direction) == (1, 2, "to") and found.accuracy == 1.0
        assert found.interval.low == found.interval.high == 1.0 and found.count in (320, 160)
        assert abs(found.permuted - 1 / 7) < 0.1 and found.gain == pytest.approx(1 - found.offset_accuracy)
        assert found.by_text.shape == (40, 2) and "by_text" not in found.to_json()
    shares = test.right.mean(0)
    assert shares[1, 2, 0] == 1.0 and abs(shares[0, 1, 1] - 0.8) < 0.07 and np.sort(shares.ravel())[-3] < 0.25


def test_head_and_offset_are_chosen_elsewhere() -> None:
    """A head that is perfect on the scored questions alone is not chosen."""
    dev, test = planted(30, 0), planted(30, 1)
    dev[1][:, 1, 2, 0] = -1
    found = pointing_heads(HeadAnswers(tuple(dev[0]), dev[1]), HeadAnswers(tuple(test[0]), test[1]))[0]
    assert (found.layer, found.head, found.direction) == (0, 1, "from") and found.accuracy < 0.9


def test_permuted_answers_stay_in_their_text() -> None:
    questions, guesses = planted(12, 2)
    asked = HeadAnswers(tuple(questions), guesses)
    other = asked.permuted(3)
    for text in range(12):
        before, after = (sorted(q.right for q in each.questions if q.text == text) for each in (asked, other))
        assert before == after
    assert other.right[:, 1, 2, 0].mean() < 0.4


def test_offsets() -> None:
    questions = [WordQuestion(0, word, (word - 2,), "x") for word in range(2, 9)] + [WordQuestion(0, 0, (1,), "x")]
    assert best_offset(questions) == -2


def test_a_head_answers_with_what_it_reads_most() -> None:
    reads = np.zeros((1, 1, 5, 5), dtype=np.float32)  # words 0 … 3, row and column 0 are special tokens
    reads[0, 0, 2] = [0.9, 0.2, 0.5, 0.1, 0.3]  # word 1 reads [CLS] most, then itself, then word 3
    reads[0, 0, 1, 2] = 0.4  # word 0 reads word 1
    assert answers(reads, WordQuestion(0, 1, (0,), "x"))[0, 0].tolist() == [3, 0]
    assert answers(reads, WordQuestion(0, 1, (0,), "x", among=(0, 2)))[0, 0].tolist() == [0, 0]
    assert answers(reads, WordQuestion(0, 3, (0,), "x"))[0, 0].tolist() == [-1, 1], "word 3 reads nothing"
    assert answers(reads, WordQuestion(0, 1, (0,), "x", among=()))[0, 0].tolist() == [-1, -1]


def test_order_of_the_texts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build("bert", seed=1)
    texts = [("one", " two", " three"), (" a", " longer", " text", " here"), ("b", " c", " d")]
    questions = [WordQuestion(text, word, (0,), "x") for text in (2, 0, 1) for word in (1, 2)]
    one: Any = ask_heads(model, texts, questions, batch_size=1)
    all_at_once = ask_heads(model, texts, questions)
    assert np.array_equal(one.guesses, all_at_once.guesses) and one.guesses.shape == (6, 3, 4, 2)
    only = ask_heads(model, texts, questions[:2])
    assert np.array_equal(only.guesses, one.guesses[:2])
    assert syntax_heads.DIRECTIONS == ("to", "from")


def test_mistakes_are_named() -> None:
    questions, guesses = planted(3, 0)
    asked = HeadAnswers(tuple(questions), guesses)
    with pytest.raises(ValueError, match=r"No question is labelled 'evn'. Did you mean 'even'"):
        pointing_heads(asked, asked, ["evn"])
    with pytest.raises(ValueError, match="no questions"):
        ask_heads(models.build("bert"), [("a",)], [])
    with pytest.raises(ValueError, match="names no choices"):
        nearest_choice(questions[0])
