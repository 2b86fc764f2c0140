"""Concept synapses: a search over two sets of sentences with its controls, transfer, causal check and traces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.measure.common import (
    FormError,
    checked_choice,
    checked_model,
    checked_number,
    checked_text,
    model_record,
    part_of,
)
from app.measure.synapses import address_of
from app.services import LARGEST_PROMPT, Services
from workbench.lab.jobs import Job

KIND = "bdh-concepts"
STATISTICS = {
    "strength": "√(|C| / T) at the end",
    "mean_strength": "its mean over the sentence",
    "count": "√(Σ y x / T) at the end",
}
OWN = "own"
NO_DICTIONARY = "none"
FEWEST, MOST_SENTENCES, LONGEST = 8, 400, 600
CANDIDATES, RESAMPLES, TRACED = 50, 500, 12
LEAST_TO_TRANSFER = 4
"""Sentences of each class that a group needs."""


def concept_names() -> list[str]:
    """The labelled concepts of the `concepts` corpus."""
    from workbench.lab.concept_words import CONCEPTS

    return list(CONCEPTS)


def dictionaries(services: Services) -> list[tuple[str, str]]:
    """Dictionaries of features that can be rivals, as (value, words): folders in the runs root that `workbench features` left."""
    found = [(NO_DICTIONARY, "none")]
    for path in sorted(services.store.root.glob("*/features.json")):
        try:
            about = json.loads(path.read_text())
            words = f"{path.parent.name}: {about['site']} of {about['model']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not path.parent.name.startswith("."):
            found.append((path.parent.name, words))
    return found


def start_finding(
    services: Services,
    name: Any,
    concept: Any,
    positive: Any,
    negative: Any,
    sentences: Any,
    statistic: Any,
    layer: Any,
    head: Any,
    shuffles: Any,
    draws: Any,
    dictionary: Any = NO_DICTIONARY,
) -> Job:
    """Queue a search for synapses that are stronger in one set of sentences than in another.

    `concept`: "own", with the two texts (one sentence a line, `group | sentence` where it has a group), or a labelled concept, of which
    `sentences` are drawn. `layer`, `head`: of the target; "" for all. `shuffles`: labellings in the control. `draws`: matched synapses in
    the causal check, 0 for none. `dictionary`: one of `dictionaries`, whose best feature is one more rival, or a Path that the caller
    answers for (a page gives words, never a Path). FormError, in words for the reader, for a bad form.
    """
    chosen = checked_choice(concept, "the concept", [OWN, *concept_names()])
    if chosen == OWN:
        sets = sentences_of(positive, "positive sentences"), sentences_of(negative, "negative sentences")
    else:
        sets = _labelled(chosen, checked_number(sentences, "the number of sentences", FEWEST, MOST_SENTENCES))
    target = None if layer in (None, "") else checked_number(layer, "the target layer", 1, 255)
    settings = {
        "model": checked_model(services, name), "concept": chosen,
        "positive": [text for _, text in sets[0]], "negative": [text for _, text in sets[1]],
        "groups": [[group for group, _ in each] for each in sets],
        "search": {
            "statistic": checked_choice(statistic, "the statistic", list(STATISTICS)),
            "layers": None if target is None else [[target - 1, target]],
            "target_heads": None if head in (None, "") else [checked_number(head, "the target head", 0, 255)], "k": CANDIDATES,
            "n_shuffles": checked_number(shuffles, "shuffles", 0, 200), "n_bootstrap": RESAMPLES,
        },
        "draws": checked_number(draws, "draws of the causal check", 0, 200),
        "dictionary": str(dictionary.resolve()) if isinstance(dictionary, Path) else checked_choice(
            dictionary or NO_DICTIONARY, "the dictionary", [value for value, _ in dictionaries(services)]
        ),
    }  # fmt: skip
    title = f"Concept synapses: {'own sentences' if chosen == OWN else chosen}, {settings['model']}"
    return services.jobs.submit(title, _measure, key=f"{KIND}:{settings}", services=services, settings=settings)


def sentences_of(text: Any, what: str, fewest: int = FEWEST) -> list[tuple[str, str]]:
    """(group, sentence) of each line; the group is "" without one."""
    checked_text(text, what, LARGEST_PROMPT)
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        group, bar, sentence = line.partition("|")
        found.append((group.strip(), sentence.strip()) if bar else ("", line))
    if not fewest <= len(found) <= MOST_SENTENCES:
        raise FormError(f"There are {len(found)} {what}; expected {fewest} to {MOST_SENTENCES}, one a line.")
    for _, sentence in found:
        if not 2 <= len(sentence.encode()) <= LONGEST:
            raise FormError(
                f"The sentence {sentence[:40]!r} has {len(sentence.encode())} tokens; expected 2 to {LONGEST}."
            )
    return found


def _labelled(concept: str, number: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences about a concept, and as many about the others in turn; languages take turns and are the groups."""
    from workbench.lab.concept_corpus import sentences
    from workbench.lab.concept_words import LANGUAGES

    others = [each for each in concept_names() if each != concept]
    wanted = [concept] * number, [others[turn // len(LANGUAGES) % len(others)] for turn in range(number)]
    sets = []
    for seed, about in enumerate(wanted):
        drawn = {
            pair: sentences(language=pair[0], concept=pair[1], seed=seed)
            for pair in itertools.product(LANGUAGES, set(about))
        }
        languages = itertools.cycle(LANGUAGES)
        sets.append(
            [(language, next(drawn[language, each]).text) for language, each in zip(languages, about, strict=False)]
        )
    return sets[0], sets[1]


def _measure(job: Job, services: Services, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    from probes import bdh

    model = services.models.load(settings["model"])
    positive, negative, search = settings["positive"], settings["negative"], settings["search"]
    chosen = settings["dictionary"]
    features = bdh.stored_features(model, services.store.root / chosen) if chosen != NO_DICTIONARY else None
    found = bdh.find_concept_synapses(
        model, positive, negative, **search, features=features, progress=part_of(job, 0.02, 0.6)
    )
    transfer, no_transfer = None, "There are no groups to transfer between."
    if _can_transfer(settings["groups"]):
        try:
            arguments = {key: search[key] for key in ("statistic", "layers", "target_heads", "k")}
            groups = {"positive_groups": settings["groups"][0], "negative_groups": settings["groups"][1]}
            transfer = bdh.concept_transfer(
                model, positive, negative, **groups, **arguments, progress=part_of(job, 0.6, 0.8)
            ).to_json()
        except ValueError as error:
            no_transfer = str(error)
    held_out = [text for text, seen in zip(positive, found.discovery[: len(positive)], strict=True) if not seen]
    causal, no_causal = None, "The causal check was not asked for."
    if settings["draws"] and found.synapses:
        try:
            check = bdh.causal_check(
                model,
                found.synapses[:1],
                held_out,
                n_matched=settings["draws"],
                n_bootstrap=RESAMPLES,
                progress=part_of(job, 0.8, 0.95),
            )
            causal = check.to_json()
        except ValueError as error:
            no_causal = str(error)
    job.progress(0.95, "traces of the first candidate")
    shown, traces = _traces(bdh, model, found, positive, negative)
    addresses = np.array([address_of(synapse) for synapse in found.synapses], np.int32).reshape(-1, 6)
    with services.store.create(KIND, job.title, model=model_record(model)) as run:
        run.add_array("rank_biserial", np.array([each.rank_biserial for each in found.candidates]), axes=("synapse",))
        run.add_array("addresses", addresses, axes=("synapse", "part"))
        run.add_array("traces", traces, axes=("sentence", "pos"))
        run.set(settings=settings, results={
            **{key: value for key, value in found.to_json().items() if key in ("scores", "shuffles", "searched", "statistic", "notes")},
            "rows": found.rows(), "transfer": transfer, "no_transfer": no_transfer, "causal": causal, "no_causal": no_causal,
            "traced": shown,
        })  # fmt: skip
    return run.id


def _can_transfer(groups: Sequence[Sequence[str]]) -> bool:
    names = set(groups[0]) | set(groups[1])
    return (
        len(names) > 1
        and "" not in names
        and all(min(g.count(name) for g in groups) >= LEAST_TO_TRANSFER for name in names)
    )


def _traces(
    bdh: Any, model: Any, found: Any, positive: Sequence[str], negative: Sequence[str]
) -> tuple[list[list[Any]], Any]:
    """Strength of the first candidate over held-out sentences: ([class, sentence] each, [sentence, pos] with nan behind the end)."""
    import numpy as np

    seen = found.discovery.tolist()
    shown: list[list[Any]] = []
    for label, texts, offset in (("positive", positive, 0), ("negative", negative, len(positive))):
        shown += [[label, text] for index, text in enumerate(texts) if not seen[offset + index]][: TRACED // 2]
    lines = (
        []
        if not found.synapses
        else [bdh.trace_synapses(model, text, found.synapses[0]).strength[0, :, 0].numpy() for _, text in shown]
    )
    traces = np.full((len(lines), max(map(len, lines), default=0)), np.nan)
    for row, line in zip(traces, lines, strict=True):
        row[: len(line)] = line
    return shown, traces
