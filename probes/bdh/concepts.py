"""Concept synapses: which synapses tell sentences about something from other sentences, and is that more than chance, length or wording?

Kosowski et al. 2025 (section 6.3, figures 12 and 13) show two such synapses and one test (U = 2368 of 2500); how they were searched for
among n² is not said. Here the search is part of the result:

1. discovery    every synapse is compared on one part of the sentences; the best k become candidates
2. validation   the candidates are tested on the other part: Mann–Whitney U, AUC, rank-biserial r, Benjamini–Hochberg q over candidates
3. shuffles     both steps again with shuffled labels: what the best of so many synapses reaches by chance
4. rivals       the best single neuron, a linear probe, features of your own: chosen and scored on the same two parts
5. transfer     `concept_transfer`: found in one language or template, scored in another
6. cause        `causal_check`: what happens to the predictions when the synapses are taken out

Groups (templates, topics, languages) are never cut by the split. Sentence length is adjusted for: a synapse that follows length has no
effect left. A concept that always comes with one group cannot be told from that group by any statistic; the notes of a result say so.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.bdh.capture import Synapse, require_bdh
from probes.bdh.concepts_recording import Recording, check_statistic, record_sentences
from probes.bdh.concepts_results import Candidate, ConceptSynapses, Scored, Shuffles
from probes.bdh.concepts_rivals import Rival, Task, best_features, best_neuron, probes
from probes.bdh.concepts_search import Found, SearchSpace, search, synapse_values
from probes.bdh.concepts_statistics import (
    Interval,
    auc,
    benjamini_hochberg,
    bootstrap_weights,
    check_alternative,
    mann_whitney,
    shuffled_labels,
    split_half,
    u_to_rank_biserial,
    weighted_auc,
)
from probes.progress import Progress
from workbench.lab.catalogue import implements

SIGNIFICANT = 0.05
Array = NDArray[np.float64]


@implements(
    "bdh",
    "probe",
    "find_concept_synapses",
    note="adds validation, false-discovery control, shuffles and rivals to the search behind figures 12 and 13",
)
def find_concept_synapses(
    model: Any,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    positive_groups: Sequence[str] | None = None,
    negative_groups: Sequence[str] | None = None,
    statistic: str = "strength",
    layers: Sequence[tuple[int, int]] | None = None,
    source_heads: Sequence[int] | None = None,
    target_heads: Sequence[int] | None = None,
    k: int = 100,
    alternative: str = "greater",
    discovery_share: float = 0.5,
    discovery: Sequence[bool] | None = None,
    adjust_length: bool = True,
    n_shuffles: int = 20,
    n_bootstrap: int = 1000,
    rivals: bool = True,
    features: Mapping[str, Callable[[Sequence[Any]], Any]] | None = None,
    hooks: Sequence[Any] = (),
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: threading.Event | None = None,
) -> ConceptSynapses:
    """Search, validate and control the synapses that are stronger in `positive` sentences than in `negative` ones.

    Args:
        positive, negative: sentences, as text or token ids [pos]; at least two of each in either half.
        positive_groups, negative_groups: the template, topic or language of each sentence. Groups are never cut by the split, and
            shuffles and intervals treat them as units.
        statistic: `"strength"`, `"mean_strength"` or `"count"` (`probes.bdh.concepts_recording`).
        layers: (source, target) pairs; None for (l − 1, l), all of them. source_heads, target_heads: None for all, across heads.
        k: candidates that go on to validation.
        alternative: `"greater"` (stronger in positive sentences), or `"two-sided"`.
        discovery_share: share of the sentences in the discovery half. discovery: or the half itself, positive sentences first.
        adjust_length: take out what sentence length (and its logarithm) explains within the classes.
        n_shuffles: labellings in the control; its smallest p is 1 / (n_shuffles + 1). n_bootstrap: resamples of the intervals.
        rivals: False leaves out neurons and probes.
        features: functions of the list of all sentences (positive first) that return [sentence] or [sentence, feature]: a dictionary's
            features, say.
        hooks: interventions of the run. progress: called with (fraction, message). cancel: an event that ends the search.

    Raises TypeError for a model that is no BDH, ValueError for classes, groups or layers that leave nothing to test, MeasurementCancelled.
    """
    groups = joined_groups(positive, negative, positive_groups, negative_groups)
    report = Progress(progress, cancel)
    recording, space = record_for_search(
        model, [*positive, *negative], statistic, (layers, source_heads, target_heads), hooks, report.part(0, 0.2)
    )
    return find_in_recording(
        recording,
        len(positive),
        groups=groups,
        space=space,
        statistic=statistic,
        k=k,
        alternative=alternative,
        discovery_share=discovery_share,
        discovery=discovery,
        adjust_length=adjust_length,
        n_shuffles=n_shuffles,
        n_bootstrap=n_bootstrap,
        rivals=rivals,
        features=features,
        sentences=[*positive, *negative],
        seed=seed,
        progress=report.part(0.2, 1),
    )


def find_in_recording(
    recording: Recording,
    n_positive: int,
    *,
    space: SearchSpace,
    groups: Sequence[str] | None = None,
    statistic: str = "strength",
    k: int = 100,
    alternative: str = "greater",
    discovery_share: float = 0.5,
    discovery: Sequence[bool] | None = None,
    adjust_length: bool = True,
    n_shuffles: int = 20,
    n_bootstrap: int = 1000,
    rivals: bool = True,
    features: Mapping[str, Callable[[Sequence[Any]], Any]] | None = None,
    sentences: Sequence[Any] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ConceptSynapses:
    """`find_concept_synapses` on activity that is already recorded, its first `n_positive` sentences being the positive ones."""
    check_alternative(alternative)
    report = progress or Progress()
    rng = np.random.default_rng(seed)
    labels = np.arange(len(recording)) < n_positive
    task = make_task(recording, labels, groups, discovery, discovery_share, adjust_length, alternative, rng)
    shuffled = shuffled_labels(labels, task.discovery, groups, n_shuffles, rng)
    found = search(
        recording,
        space,
        np.concatenate([labels[None], shuffled]),
        task.covariates,
        np.flatnonzero(task.discovery),
        statistic=statistic,
        k=k,
        two_sided=task.two_sided,
        progress=report.part(0, 0.8),
    )
    # every labelling's candidates at once: many are the same
    pool = {synapse: None for result in found for synapse in result.synapses}
    place = {synapse: column for column, synapse in enumerate(pool)}
    report(0.8, f"validating {len(pool)} candidates")
    raw = synapse_values(recording, list(pool), statistic)
    columns = [raw[:, [place[synapse] for synapse in result.synapses]] for result in found]
    candidates, values = validate(columns[0], task, found[0], alternative)
    null = [
        _headline(validate(column, _relabelled(task, row), chance, alternative)[0])
        for row, chance, column in zip(shuffled, found[1:], columns[1:], strict=True)
    ]
    report(0.9, "fitting rivals")
    contest = []
    if candidates:
        contest = [Rival("best synapse", str(candidates[0].synapse), space.size(recording, statistic), values[:, 0])]
    if rivals:
        sources, targets = (sorted({pair[end] for pair in space.layers}) for end in (0, 1))
        contest += [best_neuron(recording, task, "y", sources), best_neuron(recording, task, "x", targets)]
        contest += probes(recording, task, sources, targets)
    contest += best_features(features or {}, sentences, task)
    weights = bootstrap_weights(
        labels[~task.discovery], _part(groups, ~task.discovery), n_bootstrap, np.random.default_rng([seed, 1])
    )
    report(1.0, "done")
    return ConceptSynapses(
        candidates=candidates,
        scores=tuple(score(rival, contest[0], task, alternative, weights) for rival in contest),
        shuffles=Shuffles.of(_headline(candidates), null),
        searched=space.size(recording, statistic),
        statistic=statistic,
        alternative=alternative,
        labels=labels,
        discovery=task.discovery,
        groups=None if groups is None else tuple(groups),
        values=values,
        notes=tuple(_notes(task, len(candidates), adjust_length)),
        settings={
            "k": k,
            "n_shuffles": n_shuffles,
            "n_bootstrap": n_bootstrap,
            "adjust_length": adjust_length,
            "seed": seed,
        },
    )


def make_task(
    recording: Recording,
    labels: NDArray[np.bool_],
    groups: Sequence[str] | None,
    discovery: Sequence[bool] | None,
    discovery_share: float,
    adjust_length: bool,
    alternative: str,
    rng: np.random.Generator,
) -> Task:
    """Labels, covariates and halves of one question. Raises ValueError where they leave nothing to test."""
    if groups is not None and len(groups) != len(labels):
        raise ValueError(f"There are {len(groups)} groups for {len(labels)} sentences; expected one for each.")
    if discovery is None:
        half = split_half(labels, groups, discovery_share, rng)
    else:
        half = np.asarray(discovery, bool)
        if half.shape != labels.shape:
            raise ValueError(
                f"discovery has shape {half.shape}; expected one truth value for each of {len(labels)} sentences."
            )
        if groups is not None:
            cut = set(np.asarray(groups)[half]) & set(np.asarray(groups)[~half])
            if cut:
                raise ValueError(f"Groups {sorted(cut)[:3]} are in both halves; expected whole groups in each.")
    for part, name in ((half, "discovery"), (~half, "validation")):
        counts = (int(labels[part].sum()), int((~labels[part]).sum()))
        if min(counts) < 2:
            raise ValueError(
                f"The {name} half has {counts[0]} positive and {counts[1]} negative sentences; expected at least 2 of each."
            )
    lengths = np.array(recording.lengths, float)
    covariates = np.column_stack([lengths, np.log(lengths)]) if adjust_length else np.zeros((len(labels), 0))
    spread = covariates[half].std(0)
    varied = spread > 1e-9 * np.abs(covariates[half]).mean(0) if adjust_length else np.zeros(0, bool)
    covariates = (covariates[:, varied] - covariates[half][:, varied].mean(0)) / spread[varied]
    return Task(labels, covariates, half, None if groups is None else tuple(groups), alternative == "two-sided")


def validate(raw: Array, task: Task, found: Found, alternative: str) -> tuple[tuple[Candidate, ...], Array]:
    """Score what was found on the validation sentences, from its statistic raw [sentence, candidate]; also gives that adjusted."""
    if not found.synapses:
        return (), raw
    values, held_out = task.adjust(raw), ~task.discovery
    labels = task.labels[held_out]
    u, p = mann_whitney(values[held_out], labels, alternative)
    n_positive, n_negative = int(labels.sum()), int((~labels).sum())
    plain, q = auc(raw[held_out], labels), benjamini_hochberg(p)
    return tuple(
        Candidate(
            synapse=synapse,
            effect=float(effect),
            u=float(u[i]),
            auc=float(u[i] / (n_positive * n_negative)),
            rank_biserial=u_to_rank_biserial(float(u[i]), n_positive, n_negative),
            p=float(p[i]),
            q=float(q[i]),
            auc_unadjusted=float(plain[i]),
        )
        for i, (synapse, effect) in enumerate(zip(found.synapses, found.effects, strict=True))
    ), values


def score(rival: Rival, best: Rival, task: Task, alternative: str, weights: Array) -> Scored:
    """A rival's AUC on the validation sentences, with bootstrap intervals of it and of what it is ahead of `best`."""
    held_out = ~task.discovery
    labels, values = task.labels[held_out], rival.values[held_out]
    u, p = mann_whitney(values[:, None], labels, alternative)
    area = float(u[0] / (labels.sum() * (~labels).sum()))
    draws, others = weighted_auc(values, labels, weights), weighted_auc(best.values[held_out], labels, weights)
    ahead = area - float(auc(best.values[held_out][:, None], labels)[0])
    return Scored(
        rival.name,
        rival.chosen,
        rival.searched,
        area,
        2 * area - 1,
        float(p[0]),
        Interval.of(draws),
        ahead,
        Interval.of(draws - others),
    )


def record_for_search(
    model: Any,
    sentences: Sequence[Any],
    statistic: str,
    where: tuple[Any, Any, Any],
    hooks: Sequence[Any],
    report: Progress,
) -> tuple[Recording, SearchSpace]:
    """The sentences' activity in the layers that a search needs, and the search space itself; `where` is (layers, source, target heads)."""
    model = require_bdh(model)
    check_statistic(statistic)
    space = search_space(model, *where)
    sources, targets = zip(*space.layers, strict=True)
    recording = record_sentences(
        model, sentences, source_layers=list(sources), target_layers=list(targets), hooks=hooks, progress=report
    )
    return recording, space


def search_space(
    model: Any,
    layers: Sequence[tuple[int, int]] | None,
    source_heads: Sequence[int] | None,
    target_heads: Sequence[int] | None,
) -> SearchSpace:
    """Checked layers and heads. Raises ValueError for those that the model does not have, or for none."""
    if layers is None:
        pairs = [(layer - 1, layer) for layer in range(1, model.n_layers)]
    else:
        pairs = [(int(source), int(target)) for source, target in layers]
    if not pairs:
        raise ValueError(
            "layers is empty, which searches nothing. Expected (source, target) pairs, or a model of two layers."
        )
    for source, target in pairs:
        Synapse((0, 0), (0, 0), target, source).check(model)
    heads = []
    for name, chosen in (("source_heads", source_heads), ("target_heads", target_heads)):
        wanted = tuple(range(model.config.n_heads)) if chosen is None else tuple(chosen)
        wrong = [head for head in wanted if not 0 <= head < model.config.n_heads]
        if wrong or not wanted:
            raise ValueError(f"{name} is {list(wanted)}; expected some of 0..{model.config.n_heads - 1}.")
        heads.append(wanted)
    return SearchSpace(tuple(pairs), heads[0], heads[1])


def joined_groups(
    positive: Sequence[Any],
    negative: Sequence[Any],
    positive_groups: Sequence[str] | None,
    negative_groups: Sequence[str] | None,
) -> list[str] | None:
    """One group per sentence, positive ones first. Raises ValueError where only one class has groups, or their number is wrong."""
    for name, sentences in (("positive", positive), ("negative", negative)):
        if isinstance(sentences, str):
            raise TypeError(f"{name} is one string; expected a list of sentences.")
        if not len(sentences):
            raise ValueError(f"{name} is empty; expected sentences.")
    if positive_groups is None and negative_groups is None:
        return None
    out: list[str] = []
    for name, sentences, groups in (("positive", positive, positive_groups), ("negative", negative, negative_groups)):
        if groups is None or len(groups) != len(sentences):
            given = "none" if groups is None else str(len(groups))
            raise ValueError(
                f"{name}_groups: {given} given for {len(sentences)} sentences; expected one group for each."
            )
        out += [str(group) for group in groups]
    return out


def _relabelled(task: Task, labels: NDArray[np.bool_]) -> Task:
    return Task(labels, task.covariates, task.discovery, task.groups, task.two_sided)


def _headline(candidates: Sequence[Candidate]) -> tuple[float, float, int]:
    """r of the discovery's first choice, the largest r of all candidates, and how many candidates have q ≤ 0.05."""
    if not candidates:
        return 0.0, 0.0, 0
    r = np.array([candidate.rank_biserial for candidate in candidates])
    return float(r[0]), float(r.max()), sum(candidate.q <= SIGNIFICANT for candidate in candidates)


def _part(groups: Sequence[str] | None, chosen: NDArray[np.bool_]) -> list[str] | None:
    return None if groups is None else [group for group, keep in zip(groups, chosen, strict=True) if keep]


def _notes(task: Task, found: int, adjust_length: bool) -> list[str]:
    """What a reader has to know before believing the numbers."""
    notes = []
    if not found:
        notes.append("No synapse had any effect on the discovery sentences.")
    if task.groups is not None:
        held_out = _part(task.groups, ~task.discovery) or []
        pure = all(
            len({bool(label) for label, name in zip(task.labels, task.groups, strict=True) if name == group}) == 1
            for group in set(task.groups)
        )
        notes.append(
            f"Validation has {len(set(held_out))} groups. "
            "U, p and q count sentences as independent; the shuffles and intervals count groups."
        )
        if pure:
            notes.append(
                "Every group has one class only: class and group can be told apart only because several groups share a class."
            )
    if not adjust_length and task.labels.any():
        notes.append("Sentence length was not adjusted for.")
    return notes
