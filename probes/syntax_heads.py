"""Heads that point: does some head, from a word, read the word that a linguist would connect with it? (Clark et al. 2019, section 4)

    dev, test = (dependency_questions(load_treebank(split)) for split in ("dev", "test"))
    asked = ask_heads(model, [s.written for s in …], dev), ask_heads(model, …, test)
    for found in pointing_heads(*asked, labels=["det", "obj"]):
        print(found)                det: 2.5 reads it, 0.78 [0.76, 0.80] of 1834; fixed offset +1 0.56; permuted 0.21

A question is a word and the words that would be right answers. A head answers with the word that it reads most from there (`"to"`), or
with the word that reads there most (`"from"`), the word itself and special tokens left out. Head and direction are chosen on one set of
texts and scored on another; the paper chooses and scores on the same, which flatters the best of many heads.

Baselines: the best fixed offset, chosen in the same way; the largest score that any head has on the scored texts when right answers are
permuted within each text; and, by asking it the same questions, a twin with random weights.
"""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.intervals import Interval, mean_interval
from probes.progress import Report
from probes.word_attention import WordMap, word_attention
from workbench.instrument.errors import suggestion
from workbench.lab.coreference import Passage
from workbench.lab.stimuli import Sentence

DIRECTIONS = ("to", "from")
ALL = "all"  # the label of every question together
REACH = 4  # words that a fixed offset may be away


@dataclass(frozen=True)
class WordQuestion:
    """Which word belongs to word `word` of text `text`? `right`: the answers. `among`: the choices (None: every other word)."""

    text: int
    word: int
    right: tuple[int, ...]
    label: str
    among: tuple[int, ...] | None = None


@dataclass(frozen=True)
class HeadAnswers:
    """Result of `ask_heads`. guesses: the word that each head answers with, −1 where it reads none, [question, layer, head, direction]."""

    questions: tuple[WordQuestion, ...]
    guesses: NDArray[np.int16]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is right, [question, layer, head, direction]."""
        widest = max(len(question.right) for question in self.questions)
        right = np.full((len(self.questions), widest), -2)
        for row, question in enumerate(self.questions):
            right[row, : len(question.right)] = question.right
        return (self.guesses[..., None] == right[:, None, None, None]).any(-1)

    def rows(self, label: str) -> NDArray[np.int64]:
        """Numbers of the questions with a label. ValueError if there are none."""
        found = np.array([row for row, question in enumerate(self.questions) if label in (ALL, question.label)], int)
        if not len(found):
            known = sorted({question.label for question in self.questions})
            raise ValueError(
                f"No question is labelled {label!r}.{suggestion(label, known)} Labels: {', '.join(known)}."
            )
        return found

    def permuted(self, seed: int = 0) -> "HeadAnswers":
        """The same answers to questions whose right answers were exchanged within each text."""
        rng = np.random.default_rng(seed)
        of_text: dict[int, list[int]] = {}
        for row, question in enumerate(self.questions):
            of_text.setdefault(question.text, []).append(row)
        questions = list(self.questions)
        for rows in of_text.values():
            for row, other in zip(rows, rng.permutation(rows), strict=True):
                questions[row] = replace(questions[row], right=self.questions[other].right)
        return replace(self, questions=tuple(questions))


@dataclass(frozen=True)
class PointingHead:
    """The head that points best at the answers of one label: chosen on one set of questions, scored on another.

    Args:
        layer, head, direction: the choice. accuracy, interval: on the scored questions, bootstrap over texts. chosen_accuracy: on those of
            the choice. count: scored questions. offset, offset_accuracy: of the best fixed offset. gain: accuracy less that of the offset,
            with its interval. permuted: the largest accuracy of any head and direction on permuted answers, mean over permutations.
        by_text: accuracy and that of the offset in every text that asks, [text, 2].
    """

    label: str
    layer: int
    head: int
    direction: str
    accuracy: float
    interval: Interval
    chosen_accuracy: float
    count: int
    offset: int
    offset_accuracy: float
    gain: float
    gain_interval: Interval
    permuted: float
    by_text: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `by_text` is left out."""
        return {name: value for name, value in asdict(self).items() if name != "by_text"}

    def __str__(self) -> str:
        verb = "reads it" if self.direction == "to" else "is read from it"
        return (
            f"{self.label}: {self.layer}.{self.head} {verb}, {self.accuracy:.2f} {self.interval} of {self.count}; "
            f"fixed offset {self.offset:+d} {self.offset_accuracy:.2f}; permuted {self.permuted:.2f}"
        )


def dependency_questions(sentences: Sequence[Sentence], punctuation: bool = False) -> list[WordQuestion]:
    """One question per word: its head. Roots have none; punctuation is left out as usual. Subtypes (`aux:pass`) are labels of their own."""
    return [
        WordQuestion(number, word, (head,), sentence.relations[word])
        for number, sentence in enumerate(sentences)
        for word, head in enumerate(sentence.heads)
        if head >= 0 and (punctuation or sentence.upos[word] != "PUNCT")
    ]


def coreference_questions(passages: Sequence[Passage]) -> list[WordQuestion]:
    """One question per mention that has an antecedent in its passage: the head word of one. Choices: head words of all earlier mentions.

    Labels are the kinds of the mention: `pronoun`, `proper`, `nominal`.
    """
    found = []
    for number, passage in enumerate(passages):
        for later, mention in enumerate(passage.mentions):
            earlier = [m for m in passage.mentions[:later] if m.head < mention.head]
            right = tuple(dict.fromkeys(m.head for m in earlier if m.entity == mention.entity))
            if right:
                among = tuple(dict.fromkeys(m.head for m in earlier))
                found.append(WordQuestion(number, mention.head, right, mention.kind, among))
    return found


def ask_heads(
    model: Any,
    texts: Sequence[Sequence[str]],
    questions: Sequence[WordQuestion],
    *,
    batch_size: int = 16,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> HeadAnswers:
    """What every head of a model answers; arguments and errors as for `word_attention`. ValueError for no questions."""
    if not questions:
        raise ValueError("There are no questions. Expected at least one.")
    of_text: dict[int, list[int]] = {}
    for row, question in enumerate(questions):
        of_text.setdefault(question.text, []).append(row)
    asked = sorted(of_text)
    guesses: NDArray[np.int16] | None = None
    read = word_attention(model, [texts[n] for n in asked], batch_size=batch_size, progress=progress, cancel=cancel)
    for at, reads in read:
        if guesses is None:
            guesses = np.full((len(questions), *reads.shape[:2], len(DIRECTIONS)), -1, dtype=np.int16)
        for row in of_text[asked[at]]:
            guesses[row] = answers(reads, questions[row])
    assert guesses is not None
    return HeadAnswers(tuple(questions), guesses)


def answers(reads: WordMap, question: WordQuestion) -> NDArray[np.int16]:
    """The word that each head answers with, [layer, head, direction]. reads [layer, head, 1 + word, 1 + word]."""
    word = question.word
    choices = range(reads.shape[-1] - 1) if question.among is None else question.among
    among = np.array([choice for choice in choices if choice != word], int)
    found = np.full((*reads.shape[:2], len(DIRECTIONS)), -1, dtype=np.int16)
    if len(among):
        for direction, weights in enumerate((reads[:, :, 1 + word, 1 + among], reads[:, :, 1 + among, 1 + word])):
            found[..., direction] = np.where(weights.max(-1) > 0, among[weights.argmax(-1)], -1)
    return found


def best_offset(questions: Sequence[WordQuestion], reach: int = REACH) -> int:
    """The distance, up to `reach` words either way, at which most right answers are."""
    distances = [distance for distance in range(-reach, reach + 1) if distance]
    hits = [sum(question.word + distance in question.right for question in questions) for distance in distances]
    return distances[int(np.argmax(hits))]


def nearest_choice(question: WordQuestion) -> int:
    """The choice nearest to the word; for coreference, the nearest earlier mention. ValueError for a question without choices."""
    if not question.among:
        raise ValueError("This question names no choices, so none is nearest. Expected one with `among`.")
    return min(question.among, key=lambda choice: abs(choice - question.word))


def same_word_choice(question: WordQuestion, words: Sequence[str]) -> int:
    """The nearest choice that is the same word, in whatever case; −1 if none is. words: of the question's text."""
    wanted = words[question.word].strip().lower()
    same = [choice for choice in question.among or () if words[choice].strip().lower() == wanted]
    return min(same, key=lambda choice: abs(choice - question.word), default=-1)


def pointing_heads(
    chosen_on: HeadAnswers,
    scored_on: HeadAnswers,
    labels: Sequence[str] = (ALL,),
    *,
    permutations: int = 5,
    seed: int = 0,
) -> list[PointingHead]:
    """For each label the head and direction with most right answers in `chosen_on`, scored in `scored_on`, with the baselines.

    Raises:
        ValueError: a label that one of the two has no question of.
    """
    right_then, right_now = chosen_on.right, scored_on.right
    shuffled = [scored_on.permuted(seed + number).right for number in range(permutations)]
    found = []
    for label in labels:
        then, now = chosen_on.rows(label), scored_on.rows(label)
        shares = right_then[then].mean(0)
        layer, head, direction = (int(i) for i in np.unravel_index(shares.argmax(), shares.shape))
        offset = best_offset([chosen_on.questions[row] for row in then])
        asked = [scored_on.questions[row] for row in now]
        ours = right_now[now, layer, head, direction].astype(float)
        theirs = np.array([question.word + offset in question.right for question in asked], float)
        texts = np.array([question.text for question in asked])
        by_text = np.array([(ours[texts == text].mean(), theirs[texts == text].mean()) for text in np.unique(texts)])
        by_chance = [right[now].mean(0).max() for right in shuffled]
        found.append(
            PointingHead(
                label=label,
                layer=layer,
                head=head,
                direction=DIRECTIONS[direction],
                accuracy=float(ours.mean()),
                interval=mean_interval(ours, texts, seed=seed),
                chosen_accuracy=float(shares.max()),
                count=len(now),
                offset=offset,
                offset_accuracy=float(theirs.mean()),
                gain=float((ours - theirs).mean()),
                gain_interval=mean_interval(ours - theirs, texts, seed=seed),
                permuted=float(np.mean(by_chance)) if by_chance else float("nan"),
                by_text=by_text,
            )
        )
    return found
