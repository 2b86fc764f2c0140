"""Sentences about labelled concepts in English and French, as many as wanted: what a concept neuron or synapse can be tested on.

    next(sentences(concept="currency", language="fr"))      one sentence with its labels: LabelledSentence
    next(documents())                                       a paragraph of sentences that stay with one concept
    concept_text("train", 1_000_000)                        paragraphs as text; `load_corpus("concepts")` is 4 MB of it

Knowing the concept pays: later sentences of a paragraph stay with it, and many sentences end in something that follows from the word or
its concept ("the capital of Japan is Tokyo", "la loutre est un animal"). Sentences come from four splits that never share one:

    train          training templates with training words, except every tenth combination of the two
    combinations   those combinations: known templates, known words, never seen together
    templates      templates that no training sentence has, with training words
    words          training templates with words that occur in no training sentence, in neither language

Positions are byte positions, which are the token positions of the byte tokenizer. The same split and seed give the same sentences on
every Python version: the only source of chance is `random.Random.random`, whose sequence Python guarantees.
"""

import itertools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from workbench.instrument.errors import suggestion
from workbench.lab.concept_templates import FILLERS, TEMPLATES, Template
from workbench.lab.concept_words import (
    CONCEPTS,
    DECOYS,
    KINDS,
    LANGUAGES,
    WITHOUT_ARTICLE,
    WORDS,
    ConceptWord,
    Decoy,
    agreeing,
)

SPLITS = ("train", "combinations", "templates", "words")
_OWN_SHARE = 0.65  # of the sentences: from the concept's own families; the others are naming, translation and decoys
_SAME_WORD = 0.6  # chance that the next sentence of a paragraph speaks of the same word again
_SENTENCES = (1, 2, 2, 3, 3, 4)  # per paragraph, equally likely

_PART = re.compile(r"\{([^{}]*)\}|(\[)|(\])")
_SLOT = re.compile(r"(?P<name>[a-z]+)(?P<other>2?)(?:\.(?P<form>\w+)|@(?P<agrees>\w+)|\?(?P<endings>.+))?")
_T = TypeVar("_T")
_Main = ConceptWord | Decoy  # what a sentence is about


@dataclass(frozen=True)
class Occurrence:
    """Bytes `start:stop` of a text are the word `key` (its English form) of `concept` in `language`."""

    concept: str
    key: str
    language: str
    start: int
    stop: int


@dataclass(frozen=True)
class LabelledSentence:
    """One sentence. `decoys` are look-alikes of concept words; `answer` is the byte range that follows from the concept or the word."""

    text: str
    language: str
    family: str
    template: str
    occurrences: tuple[Occurrence, ...]
    decoys: tuple[Occurrence, ...]
    answer: tuple[int, int] | None

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts of which a word occurs, in order of appearance, each once."""
        return tuple(dict.fromkeys(occurrence.concept for occurrence in self.occurrences))


@dataclass(frozen=True)
class Document:
    """A paragraph in one language: `text` is its sentences joined by spaces, `starts` the byte at which each begins."""

    sentences: tuple[LabelledSentence, ...]
    topic: str

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def starts(self) -> tuple[int, ...]:
        lengths = [len(sentence.text.encode()) + 1 for sentence in self.sentences]
        return tuple(itertools.accumulate(lengths[:-1], initial=0))


# ----------------------------------------------------------------------------------------------------------------------
# Public generators


def sentences(
    split: str = "train",
    seed: int = 0,
    language: str | None = None,
    concept: str | None = None,
    family: str | None = None,
) -> Iterator[LabelledSentence]:
    """Endless labelled sentences of a split; `language`, `concept` (what the sentence is about) and `family` narrow the choice.

    Raises ValueError naming the argument that has no such value, and for a choice that leaves no sentence.
    """
    families = tuple(dict.fromkeys(template.family for template in TEMPLATES))
    for name, value, known in (
        ("language", language, LANGUAGES),
        ("concept", concept, CONCEPTS),
        ("family", family, families),
    ):
        _check(name, value, known)
    choices = {
        (tongue, topic): pool
        for tongue in LANGUAGES
        for topic in CONCEPTS
        if language in (None, tongue)
        and concept in (None, topic)
        and (pool := _Pool(split, tongue, topic, family)).pairs
    }
    if not choices:
        raise ValueError(f"No sentence of split {split!r} is of family {family!r} and about {concept!r}.")
    return _sentences(list(choices.values()), random.Random(_seed(split, seed, "sentences")))


def documents(split: str = "train", seed: int = 0, language: str | None = None) -> Iterator[Document]:
    """Endless paragraphs of one to four sentences about one concept in one language, often about the same word."""
    _check("language", language, LANGUAGES)
    languages = LANGUAGES if language is None else (language,)
    pools = [_Pool(split, tongue, topic) for tongue in languages for topic in CONCEPTS]
    return _documents(pools, random.Random(_seed(split, seed, "documents")))


def concept_text(split: str, size: int, seed: int = 0) -> str:
    """Paragraphs of a split, one per line, until they have `size` bytes."""
    lines, length = [], 0
    for document in documents(split, seed):
        if length >= size:
            break
        lines.append(document.text + "\n")
        length += len(lines[-1].encode())
    return "".join(lines)


@cache
def concept_words(concept: str, split: str = "train") -> tuple[ConceptWord, ...]:
    """The words of a concept that occur in sentences of "train", or the held-out ones of "words"."""
    _check("concept", concept, CONCEPTS)
    _check("split", split, SPLITS)
    return tuple(word for word in WORDS[concept] if word.held_out == (split == "words"))


def _check(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ValueError(
            f"unknown {name} {value!r}: expected one of {', '.join(known)}.{suggestion(str(value), known)}"
        )


def _seed(split: str, seed: int, kind: str) -> int:
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 or more.")
    return seed << 32 | zlib.crc32(f"{split} {kind}".encode())


# ----------------------------------------------------------------------------------------------------------------------
# Which sentences a split has


class _Pool:
    """The combinations of template and main word that a split allows in one language for one concept."""

    def __init__(self, split: str, language: str, topic: str, family: str | None = None) -> None:
        _check("split", split, SPLITS)
        self.language, self.topic = language, topic
        self.pairs: list[tuple[Template, list[_Main]]] = []
        for template in TEMPLATES:
            if (
                template.language != language
                or template.concept not in (None, topic)
                or family not in (None, template.family)
            ):
                continue
            if template.held_out != (split == "templates"):
                continue
            if "{decoy" in template.text:
                words: list[_Main] = (
                    [] if split == "words" else [d for d in DECOYS[language] if _allowed(template, d.text, split)]
                )
            else:
                words = [word for word in concept_words(topic, split) if _allowed(template, word.key, split)]
            if words:
                self.pairs.append((template, words))

    def draw(
        self, rng: random.Random, word: ConceptWord | None = None, used: Sequence[str] = ()
    ) -> tuple[Template, _Main]:
        """A template, if possible none of the `used`, and its main word: `word` if it is given and allowed with a template drawn."""
        own = rng.random() < _OWN_SHARE
        fresh = [pair for pair in self.pairs if pair[0].name not in used] or self.pairs
        pairs = [pair for pair in fresh if (pair[0].concept is not None) == own] or fresh
        if word is not None:
            given: list[_Main] = [word]
            pairs = [(template, given) for template, words in pairs if word in words] or pairs
        template, words = _pick(rng, pairs)
        return template, _pick(rng, words)


def _allowed(template: Template, word: str, split: str) -> bool:
    """Every tenth combination, by a hash that no version of anything changes, is kept from training."""
    reserved = zlib.crc32(f"{template.name} {word}".encode()) % 10 == 0
    return split in ("templates", "words") or reserved == (split == "combinations")


def _sentences(pools: list[_Pool], rng: random.Random) -> Iterator[LabelledSentence]:
    while True:
        pool = _pick(rng, pools)
        yield _Writer(*pool.draw(rng), pool.topic, rng).sentence()


def _documents(pools: list[_Pool], rng: random.Random) -> Iterator[Document]:
    while True:
        pool = _pick(rng, pools)
        word: ConceptWord | None = None
        written: list[LabelledSentence] = []
        for _ in range(_pick(rng, _SENTENCES)):
            template, main = pool.draw(
                rng, word if rng.random() < _SAME_WORD else None, [sentence.template for sentence in written]
            )
            written.append(_Writer(template, main, pool.topic, rng).sentence())
            if isinstance(main, ConceptWord):
                word = main
        yield Document(tuple(written), pool.topic)


def _pick(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


# ----------------------------------------------------------------------------------------------------------------------
# Writing one sentence


class _Writer:
    """Writes one sentence: its text piece by piece, and where its words and its answer stand, in bytes."""

    def __init__(self, template: Template, main: _Main, topic: str, rng: random.Random) -> None:
        self.template, self.main, self.topic, self.rng = template, main, topic, rng
        self.chosen = {(main.concept, ""): main} if isinstance(main, ConceptWord) else {}
        self.pieces: list[str] = []
        self.length = 0
        self.occurrences: list[Occurrence] = []
        self.decoys: list[Occurrence] = []
        self.answer: list[int] = []

    def sentence(self) -> LabelledSentence:
        for literal, slot in _parsed(self.template):
            self.add(literal)
            if slot:
                self.fill(slot)
            elif slot is not None:
                self.answer.append(self.length)
        text = "".join(self.pieces)
        text = text[0].upper() + text[1:]  # as many bytes as before: no first letter of the vocabulary grows
        template, answer = self.template, (self.answer[0], self.answer[1]) if self.answer else None
        labels = tuple(self.occurrences), tuple(self.decoys), answer
        return LabelledSentence(text, template.language, template.family, template.name, *labels)

    def add(self, text: str) -> None:
        self.pieces.append(text)
        self.length += len(text.encode())

    def add_word(self, article: str, text: str, concept: str, key: str, language: str) -> Occurrence:
        self.add(article)
        start = self.length
        self.add(text)
        return Occurrence(concept, key, language, start, self.length)

    def fill(self, slot: dict[str, str]) -> None:
        """Write what one slot stands for."""
        language, name, form = self.template.language, slot["name"], slot["form"]
        if name in FILLERS[language]:
            self.add(_pick(self.rng, FILLERS[language][name]))
            return
        if isinstance(self.main, Decoy) and name == "decoy":
            text, article = self.main.text, _article(language, form, self.main.gender, self.main.text)
            self.decoys.append(self.add_word(article, text, self.main.imitates, text, language))
            return
        concept = self.topic if name == "topic" else name
        word = self.word(concept, slot["other"])
        if slot["endings"]:
            self.add(agreeing(slot["endings"], word.gender))
        elif form == "kind":
            self.add(KINDS[concept][LANGUAGES.index(language)])
        elif form != "plural" and f"{language}_{form}" in word.facts:
            self.add(agreeing(word.facts[f"{language}_{form}"], word.gender))
        elif form == "currency_plural":
            money = next(other for other in WORDS["currency"] if other.key == word.facts["currency"])
            self.occurrences.append(self.add_word("", money.form(language, True), "currency", money.key, language))
        else:
            if form[:2] in LANGUAGES and form[2:3] in ("", "_"):
                language, form = form[:2], form[3:]
            gender = self.word(slot["agrees"], "").gender if slot["agrees"] else "m"
            text = word.form(language, form == "plural", gender)
            if form == "generic" and concept not in WITHOUT_ARTICLE:
                form = "the"
            article = _article(language, form, word.gender, text)
            self.occurrences.append(self.add_word(article, text, concept, word.key, language))

    def word(self, concept: str, other: str) -> ConceptWord:
        """The word of a slot: as chosen before, else a training word that no other slot of the sentence has."""
        if (concept, other) not in self.chosen:
            free = [word for word in concept_words(concept) if word not in self.chosen.values()]
            self.chosen[concept, other] = _pick(self.rng, free)
        return self.chosen[concept, other]


@cache
def _parsed(template: Template) -> tuple[tuple[str, dict[str, str] | None], ...]:
    """The template as pairs of literal text and what comes after it: the parts of a slot, {} for a bracket, None at the end."""
    parts: list[tuple[str, dict[str, str] | None]] = []
    position = 0
    for found in _PART.finditer(template.text):
        slot = _SLOT.fullmatch(found[1] or "")
        if found[1] is not None and slot is None:
            raise ValueError(f"template {template.name}: {{{found[1]}}} is no slot")
        after = {} if slot is None else {name: value or "" for name, value in slot.groupdict().items()}
        parts.append((template.text[position : found.start()], after))
        position = found.end()
    return (*parts, (template.text[position:], None))


_FRENCH = {  # masculine, feminine, before a vowel
    "le": ("le ", "la ", "l'"),
    "un": ("un ", "une ", None),
    "du": ("du ", "de la ", "de l'"),
    "de": ("de ", "de ", "d'"),
    "au": ("au ", "à la ", "à l'"),
    "in": ("au ", "en ", "en "),
    "from": ("du ", "de ", "d'"),
}


def _article(language: str, form: str, gender: str, word: str) -> str:
    """What stands before a word in a form, with its space: "the ", "de l'". "" for the forms that are the word alone."""
    if form in ("", "generic", "plural"):
        return ""
    if language == "en":
        return {"the": "the ", "a": "an " if word[0] in "aeiou" else "a "}[form]
    masculine, feminine, elided = _FRENCH[form]
    if word[0].lower() in "aeiouéèêœ" and elided is not None:
        return elided
    return feminine if gender == "f" else masculine
