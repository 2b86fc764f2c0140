"""Heads that point along dependency relations and to antecedents, and a parser that sees nothing but attention (sections 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from case_studies.harness.context import Context
from case_studies.harness.evidence import NotRun, Sample
from probes.attention_parser import attachment, fit_attention_parser, right_neighbours
from probes.census import random_twin
from probes.syntax_heads import (
    ALL,
    HeadAnswers,
    PointingHead,
    ask_heads,
    coreference_questions,
    dependency_questions,
    nearest_choice,
    pointing_heads,
    same_word_choice,
)
from probes.word_attention import WordMap, word_attention
from workbench.lab.coreference import Passage, load_coreference
from workbench.lab.corpora import MissingData
from workbench.lab.stimuli import Sentence, load_treebank

# relations of Universal Dependencies; the paper's Stanford Dependencies turn prepositions the other way round
RELATIONS = ("det", "obj", "case", "nsubj", "amod", "nmod:poss", "aux:pass", "cop", "aux", "nmod")
KINDS = ("pronoun", "proper", "nominal")
LENGTHS = (4, 40)  # words of a sentence


def treebank(split: str, number: int) -> list[Sentence]:
    """The first `number` sentences of a split that are neither very short nor very long."""
    shortest, longest = LENGTHS
    return [one for one in load_treebank(split) if shortest <= len(one.words) <= longest][:number]


def relations(context: Context, model: Any) -> dict[str, Any]:
    """For every relation the head chosen on the development part and scored on the test part, with its baselines and a random twin's."""
    parts = [treebank(split, context.settings["sentences"]) for split in ("dev", "test")]

    def asked(subject: Any, share: float, words: str) -> list[HeadAnswers]:
        found = []
        for number, part in enumerate(parts):
            tell = lambda fraction, message, at=share + number / 4: context.progress(at + fraction / 4, words)  # noqa: E731
            texts = [sentence.written for sentence in part]
            found.append(ask_heads(subject, texts, dependency_questions(part), progress=tell, cancel=context.cancel))
        return found

    answers = asked(model, 0.0, "relations")
    labels = [ALL, *(label for label in RELATIONS if all(has(one, label) for one in answers))]
    ours = pointing_heads(answers[0], answers[1], labels)
    untrained = asked(random_twin(model), 0.5, "relations, random twin")
    twins = pointing_heads(untrained[0], untrained[1], labels, permutations=0)
    results: dict[str, Any] = {"relations": [with_twin(a, b) for a, b in zip(ours, twins, strict=True)]}
    for found in ours:
        results[f"gain_{found.label.replace(':', '_')}"] = gain(found)
    results["all_accuracy"] = Sample(ours[0].by_text[:, 0].tolist(), over="sentences")
    margins = [a.accuracy - max(a.permuted, b.accuracy) for a, b in zip(ours[1:], twins[1:], strict=True)]
    results["over_nulls"] = Sample(margins, over="relations") if margins else NotRun("no relation occurs often enough")
    return results


def has(answers: HeadAnswers, label: str) -> bool:
    return any(question.label == label for question in answers.questions)


def gain(found: PointingHead) -> Sample:
    """Accuracy of the head less that of the fixed offset in every text that asks."""
    return Sample((found.by_text[:, 0] - found.by_text[:, 1]).tolist(), over="texts")


def with_twin(found: PointingHead, twin: PointingHead) -> dict[str, Any]:
    record = found.to_json()
    return record | {"twin": twin.accuracy, "head_name": f"{found.layer}.{found.head} {found.direction}"}


def coreference(context: Context, model: Any) -> dict[str, Any]:
    """Share of mentions whose antecedent a head points at, against the nearest mention and the nearest one of the same word."""
    names = ("coreference_gain", "coreference_over_word")
    try:
        parts = [load_coreference(split)[: context.settings["coreference_passages"]] for split in ("dev", "test")]
    except MissingData as missing:
        return {name: NotRun(str(missing)) for name in names} | {"coreference": []}
    subjects = {"ours": model, "twin": random_twin(model)}
    answers = {name: asked_passages(context, subject, parts) for name, subject in subjects.items()}
    labels = [ALL, *(kind for kind in KINDS if all(has(one, kind) for one in answers["ours"]))]
    ours = pointing_heads(answers["ours"][0], answers["ours"][1], labels)
    twins = pointing_heads(answers["twin"][0], answers["twin"][1], labels, permutations=0)
    questions = answers["ours"][1].questions
    nearest = np.array([nearest_choice(q) in q.right for q in questions], float)
    words = [passage.words for passage in parts[1]]
    same_word = np.array([same_word_choice(q, words[q.text]) in q.right for q in questions], float)
    records = []
    for found, twin in zip(ours, twins, strict=True):
        rows = answers["ours"][1].rows(found.label)
        baselines = {"nearest": float(nearest[rows].mean()), "same_word": float(same_word[rows].mean())}
        records.append(with_twin(found, twin) | baselines)
    best = ours[0]
    right = answers["ours"][1].right[:, best.layer, best.head, ("to", "from").index(best.direction)].astype(float)
    texts = np.array([question.text for question in questions])

    def by_text(difference: np.ndarray) -> Sample:
        return Sample([float(difference[texts == text].mean()) for text in np.unique(texts)], over="passages")

    return {
        "coreference_gain": by_text(right - nearest),
        "coreference_over_word": by_text(right - same_word),
        "coreference": records,
    }


def asked_passages(context: Context, model: Any, parts: Sequence[Sequence[Passage]]) -> list[HeadAnswers]:
    tell = lambda fraction, message: context.progress(fraction / 2, "coreference")  # noqa: E731
    return [
        ask_heads(model, [p.words for p in part], coreference_questions(part), progress=tell, cancel=context.cancel)
        for part in parts
    ]


def parsers(context: Context, model: Any) -> dict[str, Any]:
    """Attachment on test sentences, fitted on development sentences: of the model, of a random twin, and of the right neighbour."""
    number = context.settings["parser_sentences"]
    train, test = treebank("dev", number), treebank("test", number)
    scores = {}
    for at, (name, subject) in enumerate({"ours": model, "twin": random_twin(model)}.items()):
        context.progress(at / 2, f"parser of {name}")
        parser = fit_attention_parser(maps(context, subject, train), train, cancel=context.cancel)
        scores[name] = parser.attachment(maps(context, subject, test), test)
        if name == "ours":
            weights = parser.weights
    neighbour = np.array([attachment(right_neighbours(sentence), sentence) for sentence in test])
    judged = np.isfinite(neighbour)
    return {
        "parser": Sample(scores["ours"][judged].tolist(), over="sentences"),
        "parser_over_neighbour": Sample((scores["ours"] - neighbour)[judged].tolist(), over="sentences"),
        "parser_over_twin": Sample((scores["ours"] - scores["twin"])[judged].tolist(), over="sentences"),
        "parser_scores": {
            "attention": float(np.nanmean(scores["ours"])),
            "right neighbour": float(np.nanmean(neighbour)),
            "random twin": float(np.nanmean(scores["twin"])),
        },
        "parser_weights": weights,
    }


def maps(context: Context, model: Any, sentences: Sequence[Sentence]) -> list[WordMap]:
    """The word maps of sentences, in their order."""
    found: dict[int, WordMap] = dict(word_attention(model, [one.written for one in sentences], cancel=context.cancel))
    return [found[number] for number in range(len(sentences))]
