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
        self.pairs: list[tuple[Template, list[ConceptWord] | list[Decoy]]] = []
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
                words: list = (
                    [] if split == "words" else [d for d in DECOYS[language] if _allowed(template, d.text, split)]
                )
            else:
                words = [word for word in concept_words(topic, split) if _allowed(template, word.key, split)]
            if words:
                self.pairs.append((template, words))

    def draw(
        self, rng: random.Random, word: ConceptWord | None = None, used: Sequence[str] = ()
    ) -> tuple[Template, ConceptWord | Decoy]:
        """A template, if possible none of the `used`, and its main word: `word` if it is given and allowed with a template drawn."""
        own = rng.random() < _OWN_SHARE
        fresh = [pair for pair in self.pairs if pair[0].name not in used] or self.pairs
        pairs = [pair for pair in fresh if (pair[0].concept is not None) == own] or fresh
        if word is not None:
            pairs = [(template, [word]) for template, words in pairs if word in words] or pairs
        template, words = _pick(rng, pairs)
        return template, _pick(rng, words)


def _allowed(template: Template, word: str, split: str) -> bool:
    """Every tenth combination, by a hash that no version of anything changes, is kept from training."""
    reserved = zlib.crc32(f"{template.name} {word}".encode()) % 10 == 0
    return split in ("templates", "words") or reserved == (split == "combinations")


def _sentences(pools: list[_Pool], rng: random.Random) -> Iterator[LabelledSentence]:
    while True:
        pool = _pick(rng, pools)
        yield _written(*pool.draw(rng), pool.topic, rng)


def _documents(pools: list[_Pool], rng: random.Random) -> Iterator[Document]:
    while True:
        pool, word, written = _pick(rng, pools), None, []
        for _ in range(_pick(rng, _SENTENCES)):
            template, main = pool.draw(
                rng, word if rng.random() < _SAME_WORD else None, [sentence.template for sentence in written]
            )
            written.append(_written(template, main, pool.topic, rng))
            if isinstance(main, ConceptWord):
                word = main
        yield Document(tuple(written), pool.topic)


def _pick(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


# ----------------------------------------------------------------------------------------------------------------------
# Writing one sentence


class _Writer:
    """Collects the text of a sentence and where its parts stand, in bytes."""

    def __init__(self) -> None:
        self.text, self.occurrences, self.decoys, self.brackets = "", [], [], []  # type: ignore[var-annotated]

    @property
    def position(self) -> int:
        return len(self.text.encode())

    def add_word(self, text: str, concept: str, key: str, language: str, decoy: bool = False) -> None:
        start = self.position
        self.text += text
        occurrence = Occurrence(concept, key, language, start, self.position)
        (self.decoys if decoy else self.occurrences).append(occurrence)


def _written(template: Template, main: ConceptWord | Decoy, topic: str, rng: random.Random) -> LabelledSentence:
    writer, chosen = _Writer(), {}
    if isinstance(main, ConceptWord):
        chosen[main.concept, ""] = main
    position = 0
    for part in _PART.finditer(template.text):
        writer.text += template.text[position : part.start()]
        position = part.end()
        if part[1] is None:
            writer.brackets.append(writer.position)
        else:
            _fill(part[1], template, main, topic, chosen, writer, rng)
    writer.text += template.text[position:]
    text = writer.text[0].upper() + writer.text[1:]  # as many bytes as before: no letter of the vocabulary grows
    answer = (writer.brackets[0], writer.brackets[1]) if writer.brackets else None
    return LabelledSentence(
        text, template.language, template.family, template.name, tuple(writer.occurrences), tuple(writer.decoys), answer
    )


def _fill(
    content: str,
    template: Template,
    main: ConceptWord | Decoy,
    topic: str,
    chosen: dict[tuple[str, str], ConceptWord],
    writer: _Writer,
    rng: random.Random,
) -> None:
    """Write what one slot stands for."""
    slot = _SLOT.fullmatch(content)
    if slot is None:
        raise ValueError(f"template {template.name}: {{{content}}} is no slot")
    language, name, form = template.language, slot["name"], slot["form"] or ""
    if name in FILLERS[language]:
        writer.text += _pick(rng, FILLERS[language][name])
        return
    if isinstance(main, Decoy) and name == "decoy":
        writer.text += _article(language, form, main.gender, main.text)
        writer.add_word(main.text, main.imitates, main.text, language, decoy=True)
        return
    concept = topic if name == "topic" else name
    word = _word(concept, slot["other"], chosen, rng)
    if slot["endings"]:
        writer.text += agreeing(slot["endings"], word.gender)
    elif form == "kind":
        writer.text += KINDS[concept][LANGUAGES.index(language)]
    elif f"{language}_{form}" in word.facts and form != "plural":
        writer.text += agreeing(word.facts[f"{language}_{form}"], word.gender)
    elif form == "currency_plural":
        currency = next(other for other in WORDS["currency"] if other.key == word.facts["currency"])
        writer.add_word(currency.form(language, plural=True), "currency", currency.key, language)
    else:
        if form[:2] in LANGUAGES and form[2:3] in ("", "_"):
            language, form = form[:2], form[3:]
        gender = _word(slot["agrees"], "", chosen, rng).gender if slot["agrees"] else "m"
        text = word.form(language, form == "plural", gender)
        if form == "generic" and concept not in WITHOUT_ARTICLE:
            form = "the"
        writer.text += _article(language, form, word.gender, text)
        writer.add_word(text, concept, word.key, language)


def _word(concept: str, other: str, chosen: dict[tuple[str, str], ConceptWord], rng: random.Random) -> ConceptWord:
    """The word of a slot: as chosen before, else a training word that no other slot of the sentence has."""
    if (concept, other) not in chosen:
        taken = list(chosen.values())
        chosen[concept, other] = _pick(rng, [word for word in concept_words(concept) if word not in taken])
    return chosen[concept, other]


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
        return {"the": "the ", "a": "an " if word[0] in "aeiou" and not word.startswith("eu") else "a "}[form]
    masculine, feminine, elided = _FRENCH[form]
    if word[0].lower() in "aeiouéèêœ" and elided is not None:
        return elided
    return feminine if gender == "f" else masculine
