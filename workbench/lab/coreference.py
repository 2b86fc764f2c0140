"""Passages with marked coreference, from treebanks that mark entities in their last column (the GUM corpus).

    load_coreference("dev")      passages of consecutive sentences of one document, with their mentions       Passage

GUM (Zeldes 2017; UniversalDependencies/UD_English-GUM, CC BY-NC-SA 4.0) is not among the data that the project's tests rely on: put
`en_gum-ud-dev.conllu` and `en_gum-ud-test.conllu` into a data folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.instrument.errors import suggestion
from workbench.lab.corpora import find_data
from workbench.lab.stimuli import Sentence, read_conllu

# "(12-person-new…" opens a mention of entity 12, "12)" closes one, "(12-person-new…)" is one of a single word;
# "(12[1/2]-…" is a part of a mention in pieces, which is left out
_MARK = re.compile(r"\((?P<opens>[^-()\[\]]+)(?P<piece>\[[^\]]*\])?-[^()]*(?P<whole>\)?)|(?P<closes>[^-()\[\]]+)\)")


@dataclass(frozen=True)
class Mention:
    """Words `start` … `stop` − 1 of a passage mean `entity`. head: the word that governs the others. kind: pronoun, proper or nominal."""

    start: int
    stop: int
    head: int
    entity: str
    kind: str


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of a document: words as written, each with the blank before it; mentions by their first word."""

    document: str
    words: tuple[str, ...]
    mentions: tuple[Mention, ...]


def load_coreference(split: str = "dev", max_words: int = 100, folder: str | Path | None = None) -> list[Passage]:
    """Passages of at most `max_words` words of GUM's `split`, "dev" or "test". MissingData if the file is not there."""
    if split not in ("dev", "test"):
        raise ValueError(f"unknown split {split!r}: expected 'dev' or 'test'.{suggestion(split, ('dev', 'test'))}")
    return read_coreference(find_data(f"en_gum-ud-{split}.conllu", folder).read_text("utf-8"), max_words)


def read_coreference(text: str, max_words: int = 100) -> list[Passage]:
    """The passages of a CoNLL-U text whose last column holds `Entity=`. A longer sentence is a passage by itself.

    Raises ValueError for a text that marks no entity, or closes one that was not opened.
    """
    sentences, marks = read_conllu(text), _marks(text)
    if not any(mark for sentence in marks for mark in sentence):
        raise ValueError("This text marks no entity (no 'Entity=' in the last column).")
    passages: list[Passage] = []
    start = 0
    while start < len(sentences):
        stop, count = start + 1, len(sentences[start].words)
        while (
            stop < len(sentences)
            and sentences[stop].document == sentences[start].document
            and count + len(sentences[stop].words) <= max_words
        ):
            count += len(sentences[stop].words)
            stop += 1
        passages.append(_passage(sentences[start:stop], marks[start:stop]))
        start = stop
    return passages


def _marks(text: str) -> list[list[str]]:
    """What the last column says of entities, by sentence and word."""
    found: list[list[str]] = []
    rows: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip() and not line.startswith("#"):
            number, *_, misc = line.split("\t")
            if number.isdigit():
                facts = dict(fact.split("=", 1) for fact in misc.strip().split("|") if "=" in fact)
                rows.append(facts.get("Entity", ""))
        elif not line.strip() and rows:
            found.append(rows)
            rows = []
    return found


def _passage(sentences: Sequence[Sentence], marks: Sequence[Sequence[str]]) -> Passage:
    words: list[str] = []
    mentions: list[Mention] = []
    for sentence, row in zip(sentences, marks, strict=True):
        first = len(words)
        opening, *others = sentence.written
        words += [" " + opening if words else opening, *others]
        for start, stop, entity in _spans(row, sentence.id):
            head = next(w for w in range(start, stop) if not start <= sentence.heads[w] < stop)
            kind = {"PRON": "pronoun", "DET": "pronoun", "PROPN": "proper"}.get(sentence.upos[head], "nominal")
            mentions.append(Mention(first + start, first + stop, first + head, entity, kind))
    ordered = sorted(mentions, key=lambda mention: (mention.start, mention.stop))
    return Passage(sentences[0].document, tuple(words), tuple(ordered))


def _spans(marks: Sequence[str], sentence: str) -> list[tuple[int, int, str]]:
    """First word, word after the last, and entity of every mention that is in one piece."""
    found: list[tuple[int, int, str]] = []
    opened: dict[str, list[int]] = {}
    pieces: set[str] = set()
    for word, mark in enumerate(marks):
        for part in _MARK.finditer(mark):
            if part["opens"] and part["piece"]:
                if not part["whole"]:
                    pieces.add(part["opens"] + part["piece"])
            elif part["opens"] and part["whole"]:
                found.append((word, word + 1, part["opens"]))
            elif part["opens"]:
                opened.setdefault(part["opens"], []).append(word)
            elif opened.get(part["closes"]):
                found.append((opened[part["closes"]].pop(), word + 1, part["closes"]))
            else:
                raise ValueError(
                    f"sentence {sentence}, word {word + 1}: entity {part['closes']!r} ends but never began"
                )
    return found
