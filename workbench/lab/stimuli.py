"""Linguistic stimuli and annotated sentences as small typed records, for probes and case studies.

    load_treebank("dev")            English Web Treebank: words, parts of speech, dependency heads      Sentence
    load_blimp("wh_island")         BLiMP: a grammatical and an ungrammatical sentence                  MinimalPair
    load_prompt_pairs("ioi")        clean and corrupted prompts with their answers                      PromptPair
    load_syntaxgym("mvrr")          garden-path suites, region by region                                GardenPathItem
    load_noun_lists("random", 5)    lists of nouns of the verbatim-memory study                         list of words

All of them read files found by `workbench.lab.corpora.find_data`, and raise its MissingData if there are none.
Characters and words count from 0; `spans` are half-open character ranges, so `text[start:end]` is the thing itself.
"""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workbench.instrument.errors import suggestion
from workbench.lab.corpora import find_data

Span = tuple[int, int]


@dataclass(frozen=True)
class Sentence:
    """One parsed sentence (Universal Dependencies). Tuples are indexed by word, from 0."""

    id: str
    document: str
    text: str
    words: tuple[str, ...]  # syntactic words: "don't" is "do", "n't"
    lemmas: tuple[str, ...]
    upos: tuple[str, ...]  # universal part of speech
    xpos: tuple[str, ...]  # Penn Treebank part of speech
    heads: tuple[int, ...]  # index of the governing word, −1 for the root
    relations: tuple[str, ...]  # dependency relation to the head
    spans: tuple[Span, ...]  # where the word stands in `text`; words of one fused form may share its span

    @property
    def written(self) -> tuple[str, ...]:
        """The words, each with the blank before it if there is one in the text, for tokenizers that tell " cat" from "cat"."""
        found, end = [], 0
        for word, (start, stop) in zip(self.words, self.spans, strict=True):
            apart = start >= end and self.text[end:start].isspace()
            found.append(" " + word if apart else word)
            end = stop
        return tuple(found)


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences of which the first is grammatical. `prefix` is what they share before the deciding word."""

    paradigm: str
    field: str
    phenomenon: str
    id: str
    good: str
    bad: str
    prefix: str


@dataclass(frozen=True)
class PromptPair:
    """A clean prompt and a corrupted one of the same form.

    `answer` continues the clean prompt and `wrong` is the other name of an indirect-object prompt. For greater-than
    `answer` is the first year's last two digits and `wrong` is None: later years are right, all others wrong.
    """

    task: str
    clean: str
    corrupted: str
    answer: str
    wrong: str | None


@dataclass(frozen=True)
class GardenPathItem:
    """One item of a suite: for each condition, its regions in order (an absent region is an empty string)."""

    suite: str
    number: int
    region_names: tuple[str, ...]
    conditions: dict[str, tuple[str, ...]]
    prediction: str  # formula over (region number from 1; condition), as published

    def sentence(self, condition: str) -> str:
        """The sentence of a condition: regions joined by single spaces, punctuation attached to what it follows."""
        return self._joined(condition)[0]

    def spans(self, condition: str) -> tuple[Span, ...]:
        """Where each region stands in `sentence(condition)`; an absent region has start == end."""
        return self._joined(condition)[1]

    def _joined(self, condition: str) -> tuple[str, tuple[Span, ...]]:
        if condition not in self.conditions:
            known = ", ".join(self.conditions)
            near = suggestion(condition, self.conditions)
            raise ValueError(f"suite {self.suite!r} has no condition {condition!r}: expected one of {known}.{near}")
        text, spans = "", []
        for region in self.conditions[condition]:
            if text and region and region[0].isalnum():
                text += " "
            spans.append((len(text), len(text) + len(region)))
            text += region
        return text, tuple(spans)


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


def load_treebank(split: str = "dev", folder: str | Path | None = None) -> list[Sentence]:
    """The English Web Treebank's sentences of `split` "dev" (2001, to fit on) or "test" (2077, to score on).

    Enhanced empty nodes (ids such as 8.1) are left out; CC BY-SA 4.0, UniversalDependencies/UD_English-EWT.
    """
    _one_of("treebank split", split, ("dev", "test"))
    return read_conllu(find_data(f"en_ewt-ud-{split}.conllu", folder).read_text("utf-8"))


def read_conllu(text: str) -> list[Sentence]:
    """The sentences of a CoNLL-U text. Raises ValueError for a line that is no CoNLL-U, with its number."""
    sentences: list[Sentence] = []
    document = ""
    notes: dict[str, str] = {}
    rows: list[list[str]] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(" = ")
            notes[key.strip()] = value
            document = notes.pop("newdoc id", document)
        elif line.strip():
            row = line.split("\t")
            if len(row) != 10:
                raise ValueError(f"line {number} is no CoNLL-U: expected 10 tab-separated fields, got {len(row)}")
            rows.append(row)
        elif rows:
            sentences.append(_sentence(notes, document, rows))
            notes, rows = {}, []
    return sentences


def load_blimp(paradigm: str, folder: str | Path | None = None) -> list[MinimalPair]:
    """The 1000 minimal pairs of a BLiMP paradigm (Warstadt et al. 2020; CC BY 4.0). `blimp_paradigms()` lists them."""
    path = _named_file("BLiMP paradigm", paradigm, "blimp", "jsonl", folder)
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        MinimalPair(
            record["UID"], record["field"], record["linguistics_term"], record["pairID"],
            record["sentence_good"], record["sentence_bad"], record["one_prefix_prefix"],
        )
        for record in records
    ]  # fmt: skip


def blimp_paradigms(folder: str | Path | None = None) -> list[str]:
    """Names of the BLiMP paradigms that are here."""
    return sorted(path.stem for path in find_data("blimp", folder).glob("*.jsonl"))


def load_prompt_pairs(task: str, folder: str | Path | None = None) -> list[PromptPair]:
    """Clean and corrupted prompts of `task` "ioi" or "greater_than" (from hannamw/EAP-IG).

    The corrupted prompt of indirect-object identification replaces the repeated name by a third one; that of
    greater-than sets the first year to 01. Answers are text, so that any tokenizer can be used.
    """
    _one_of("prompt-pair task", task, ("ioi", "greater_than"))
    file = {"ioi": "pairs/ioi_llama.csv", "greater_than": "pairs/greater_than_data.csv"}[task]
    with open(find_data(file, folder), encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    pairs = []
    for row in rows:
        if task == "ioi":
            # the file gives answers as token ids of one tokenizer; the names themselves stand in the prompt
            names = re.search(r"([A-Z]\w+) and ([A-Z]\w+)", row["clean"])
            assert names is not None
            answer, subject = sorted(names.groups(), key=lambda name: len(re.findall(rf"\b{name}\b", row["clean"])))
            pairs.append(PromptPair(task, row["clean"], row["corrupted"], " " + answer, " " + subject))
        else:
            pairs.append(PromptPair(task, row["clean"], row["corrupted"], row["label"].zfill(2), None))
    return pairs


def load_syntaxgym(suite: str, folder: str | Path | None = None) -> list[GardenPathItem]:
    """The items of a garden-path suite: "npz_ambig", "npz_obj" or "mvrr" (cpllab/syntactic-generalization; MIT)."""
    content = json.loads(_named_file("SyntaxGym suite", suite, "syntaxgym", "json", folder).read_text("utf-8"))
    numbers = sorted(content["region_meta"], key=int)
    items = []
    for item in content["items"]:
        conditions = {
            condition["condition_name"]: tuple(region["content"].strip() for region in condition["regions"])
            for condition in item["conditions"]
        }
        names = tuple(content["region_meta"][number] for number in numbers)
        formula = content["predictions"][0]["formula"]
        items.append(GardenPathItem(suite, item["item_number"], names, conditions, formula))
    return items


def load_noun_lists(kind: str, size: int, folder: str | Path | None = None) -> list[tuple[str, ...]]:
    """The 230 noun lists of one kind and size of the verbatim-memory study (Armeni et al. 2022; CC BY 4.0).

    `kind` "random" (unrelated nouns) or "categorized" (nouns of one category); `size` 3, 5, 7 or 10 nouns.
    """
    _one_of("kind of noun list", kind, ("random", "categorized"))
    if size not in (3, 5, 7, 10):
        raise ValueError(f"no noun lists of size {size}: expected 3, 5, 7 or 10")
    content = json.loads(find_data(f"verbatim/{kind}_lists.json", folder).read_text("utf-8"))
    return [tuple(nouns) for nouns in content[f"n{size}"]]


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def _one_of(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}.{suggestion(str(name), known)}")


def _named_file(what: str, name: str, subfolder: str, extension: str, folder: str | Path | None) -> Path:
    files = {path.stem: path for path in sorted(find_data(subfolder, folder).glob(f"*.{extension}"))}
    _one_of(what, name, files)
    return files[name]


def _sentence(notes: dict[str, str], document: str, rows: list[list[str]]) -> Sentence:
    text = notes["text"]
    words = [row for row in rows if row[0].isdigit()]
    fused: dict[int, tuple[int, str]] = {}  # number of the first word -> (number of the last, the fused form)
    for row in rows:
        if "-" in row[0]:
            first_number, last_number = row[0].split("-")
            fused[int(first_number)] = (int(last_number), row[1])
    spans: list[Span] = []
    position = 0
    while len(spans) < len(words):
        first = len(spans) + 1
        last, form = fused.get(first, (first, words[first - 1][1]))
        start = text.index(form, position)
        position = start + len(form)
        parts = [row[1] for row in words[first - 1 : last]]
        if "".join(parts) != form:  # "wanna" is "want" and "to": neither stands in the text
            spans.extend([(start, position)] * len(parts))
            continue
        for part in parts:
            spans.append((start, start + len(part)))
            start += len(part)
    forms, lemmas, upos, xpos = (tuple(row[column] for row in words) for column in (1, 2, 3, 4))
    heads = tuple(int(row[6]) - 1 for row in words)
    relations = tuple(row[7] for row in words)
    return Sentence(notes["sent_id"], document, text, forms, lemmas, upos, xpos, heads, relations, tuple(spans))
