"""Concept synapses: planted truths, decoys, null data, and oracles for every statistic."""

import csv
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh import concepts_search as searching
from probes.bdh.capture import Synapse, centred
from probes.bdh.concepts import find_concept_synapses, find_in_recording
from probes.bdh.concepts_causal import causal_check, marked_positions, matched_synapses, strength_and_reading
from probes.bdh.concepts_recording import STATISTICS, Recording, record_sentences
from probes.bdh.concepts_results import ConceptSynapses
from probes.bdh.concepts_rivals import Task, linear_probe
from probes.bdh.concepts_search import SearchSpace, search
from probes.bdh.concepts_statistics import (
    adjusted,
    auc,
    benjamini_hochberg,
    bootstrap_weights,
    mann_whitney,
    partial_basis,
    partial_directions,
    shuffled_labels,
    split_half,
    u_to_p,
    u_to_rank_biserial,
    weighted_auc,
)
from probes.bdh.concepts_transfer import concept_transfer, transfer_in_recording
from probes.bdh.synapses import trace_synapses
from probes.progress import MeasurementCancelled
from tests.probes.bdh_naive import EXACT, Naive, naive, tiny_model

HEADS, NEURONS = 2, 6
SPACE = SearchSpace(((0, 1),), (0, 1), (0, 1))


# Statistics ------------------------------------------------------------------------------------------------------------


def test_the_paper_s_own_test_recomputed() -> None:
    """U = 2368, 50 against 50 sentences: the p-value is as published, the rank-biserial correlation is .894, not .86."""
    assert u_to_rank_biserial(2368, 50, 50) == pytest.approx(0.8944)
    assert u_to_p(2368, 50, 50) == pytest.approx(6.4e-15, rel=0.01)
    assert u_to_p(2368, 50, 50, "two-sided") == pytest.approx(2 * u_to_p(2368, 50, 50))
    with pytest.raises(ValueError, match=r"0\.\.2500"):
        u_to_rank_biserial(2501, 50, 50)
    with pytest.raises(ValueError, match="Did you mean 'greater'"):
        u_to_p(2368, 50, 50, "greate")


def counted_u(values: np.ndarray, labels: np.ndarray) -> float:
    return sum((a > b) + (a == b) / 2 for a in values[labels] for b in values[~labels])


def test_rank_statistics_count_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(23) < 9
    values = rng.integers(0, 6, (23, 4)).astype(float)  # with ties
    u, p = mann_whitney(values, labels)
    expected = [counted_u(column, labels) for column in values.T]
    assert u.tolist() == expected
    assert auc(values, labels) == pytest.approx(np.array(expected) / (9 * 14))
    assert ((p > 0) & (p < 1)).all()
    assert mann_whitney(np.ones((23, 1)), labels)[1].tolist() == [1.0]
    # resamples: weights of 1 are the sample itself, whole-number weights are repeated sentences
    weights = rng.integers(0, 3, (5, 23)).astype(float)
    drawn = weighted_auc(values[:, 0], labels, np.concatenate([np.ones((1, 23)), weights]))
    assert drawn[0] == pytest.approx(auc(values[:, :1], labels)[0])
    for found, row in zip(drawn[1:], weights.astype(int), strict=True):
        assert found == pytest.approx(auc(np.repeat(values[:, :1], row, 0), np.repeat(labels, row))[0])


def test_small_samples_have_exact_p_values() -> None:
    """5 against 5 without overlap: one of the 252 orders."""
    values = np.arange(10.0)[:, None]
    assert mann_whitney(values, np.arange(10) >= 5)[1][0] == pytest.approx(1 / 252)


def test_benjamini_hochberg_by_its_definition() -> None:
    p = np.random.default_rng(1).random(20) ** 3
    order = np.sort(p)
    expected = [min(order[rank] * 20 / (rank + 1) for rank in range(int((order < value).sum()), 20)) for value in p]
    assert benjamini_hochberg(p) == pytest.approx(np.minimum(expected, 1))
    assert len(benjamini_hochberg(np.array([]))) == 0


def test_partial_effects_are_the_analysis_of_covariance() -> None:
    """The partial correlation r gives the t of the class in a regression with covariates: t = r √(df / (1 − r²))."""
    rng = np.random.default_rng(2)
    labels, covariates = np.arange(30) < 13, rng.normal(size=(30, 2))
    values = rng.normal(size=30) + labels * 0.8 + covariates @ [1.0, -2.0]
    basis = partial_basis(covariates)
    direction = partial_directions(labels[None], basis)
    r = searching.effects(
        torch.from_numpy(values[:, None].copy()), torch.from_numpy(basis), torch.from_numpy(direction)
    )
    design = np.column_stack([np.ones(30), labels, covariates])
    slopes, rest, _, _ = np.linalg.lstsq(design, values, rcond=None)
    error = np.sqrt(rest[0] / 26 * np.linalg.inv(design.T @ design)[1, 1])
    assert float(r) * np.sqrt(26 / (1 - float(r) ** 2)) == pytest.approx(slopes[1] / error)
    clean = adjusted((labels * 3.0 + covariates @ [1.0, -2.0])[:, None], labels, covariates, np.arange(30) % 2 == 0)
    assert clean[:, 0] == pytest.approx(labels * 3.0)  # the class effect stays, the covariates go
    with pytest.raises(ValueError, match="determine the class"):
        partial_directions(labels[None], partial_basis(labels[:, None].astype(float)))


def test_splits_never_cut_a_group_and_balance_the_classes() -> None:
    labels = np.arange(40) < 20
    groups = [f"g{number % 7}" for number in range(40)]
    for seed in range(20):
        half = split_half(labels, groups, 0.5, np.random.default_rng(seed))
        assert not {g for g, h in zip(groups, half, strict=True) if h} & {
            g for g, h in zip(groups, half, strict=True) if not h
        }
        assert abs(labels[half].sum() - 10) <= 4 and abs((~labels[half]).sum() - 10) <= 4
    plain = split_half(labels, None, 0.25, np.random.default_rng(0))
    assert labels[plain].sum() == 5 and plain.sum() == 10
    nested = ["p"] * 20 + ["n1"] * 10 + ["n2"] * 10
    with pytest.raises(ValueError, match="at least two with each class"):
        split_half(labels, nested, 0.5, np.random.default_rng(0))


def test_shuffles_move_what_is_exchangeable() -> None:
    labels, half = np.arange(24) < 12, np.arange(24) % 2 == 0
    free = shuffled_labels(labels, half, None, 200, np.random.default_rng(0))
    assert (free[:, half].sum(1) == 6).all() and (free[:, ~half].sum(1) == 6).all()
    assert free.mean(0) == pytest.approx(np.full(24, 0.5), abs=0.15)
    pure = [f"{'p' if label else 'n'}{number // 2 % 3}{number % 2}" for number, label in enumerate(labels)]
    moved = shuffled_labels(labels, half, pure, 50, np.random.default_rng(0))
    for group in set(pure):
        members = np.array(pure) == group
        assert (moved[:, members].all(1) | ~moved[:, members].any(1)).all()
    assert len(np.unique(moved, axis=0)) > 20
    mixed = [f"m{number % 4}" for number in range(24)]
    within = shuffled_labels(labels, half, mixed, 50, np.random.default_rng(0))
    for group in set(mixed):
        members = np.array(mixed) == group
        assert (within[:, members].sum(1) == labels[members].sum()).all()
    weights = bootstrap_weights(labels, pure, 30, np.random.default_rng(0))
    for group in set(pure):
        assert (weights[:, np.array(pure) == group] == weights[:, np.array(pure) == group][:, :1]).all()


# Recording and search --------------------------------------------------------------------------------------------------


def sentences(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    return [torch.randint(0, 37, (length,), generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def recording(model: BDH) -> Recording:
    return record_sentences(model, sentences(12), source_layers=[0, 1], target_layers=[2], batch_size=5)


def every_synapse(step: int, source: int = 1) -> list[Synapse]:
    places = [(head, neuron) for head in range(HEADS) for neuron in range(NEURONS)]
    return [Synapse(i, j, 2, source) for i in places for j in places if j[1] % step == 0]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistics_are_those_of_the_traced_synapses(model: BDH, recording: Recording, statistic: str) -> None:
    """Sentence by sentence, although the recording was made in padded batches."""
    synapses = every_synapse(1 if statistic == "count" else 2)
    values = recording.of(synapses, statistic)
    for number, tokens in enumerate(sentences(12)):
        traced, length = trace_synapses(model, tokens, synapses), len(tokens) - 1
        expected = {
            "strength": traced.strength[0, -1] / length,
            "mean_strength": traced.strength[0, 1:].mean(0) / length,
            "count": traced.count[0, -1] / length,
        }[statistic]
        assert float((values[number] ** 2 - expected).abs().max()) < 1e-8


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("block", [40, 2**23], ids=["many blocks", "one block"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_streaming_search_is_the_dense_search(
    recording: Recording, statistic: str, block: int, two_sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "BLOCK", block)
    labels = np.stack([np.arange(12) < 6, np.arange(12) % 2 == 0])
    covariates = np.array(recording.lengths, float)[:, None]
    chosen = np.arange(12)[:10]
    space = SearchSpace(((0, 2), (1, 2)), (1,), (0, 1))
    found = search(recording, space, labels, covariates, chosen, statistic=statistic, k=7, two_sided=two_sided)
    synapses = [
        s for source in (0, 1) for s in every_synapse(1 if statistic == "count" else 2, source) if s.source[0] == 1
    ]
    values = recording.of(synapses, statistic).numpy()[chosen]
    for assignment, result in zip(labels, found, strict=True):
        design = np.column_stack([np.ones(10), covariates[chosen]])
        rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        label = assignment[chosen] * 2.0 - 1
        label = label - design @ np.linalg.lstsq(design, label, rcond=None)[0]
        with np.errstate(invalid="ignore"):
            r = np.nan_to_num(label @ rest / np.linalg.norm(rest, axis=0) / np.linalg.norm(label))
        r[np.linalg.norm(rest, axis=0) < 1e-9] = 0
        best = np.sort(np.abs(r) if two_sided else r)[::-1][:7]
        size = result.effects.abs() if two_sided else result.effects
        assert size.numpy() == pytest.approx(best[best > 0], abs=1e-6)
        for synapse, effect in zip(result.synapses, result.effects, strict=True):
            assert r[synapses.index(synapse)] == pytest.approx(float(effect), abs=1e-6)


# Planted truths --------------------------------------------------------------------------------------------------------

PLANTED, DECOY = Synapse((0, 2), (1, 4), 1), Synapse((1, 1), (0, 2), 1)
Meets = Callable[[int, int], float]
"""Of a sentence and its length, the share of a synapse's spikes that fall together."""


def planted(
    lengths: Sequence[int], meets: dict[Synapse, Meets], seed: int = 0, gain: Meets = lambda s, n: 1.0
) -> Recording:
    """Independent sparse activity. A planted pair fires equally often in every sentence, but only a share of its spikes together:
    a synapse can tell the sentences apart where neither of its neurons can. `gain` scales the decoy's source."""
    rng = np.random.default_rng(seed)
    y, x = [], []
    for number, length in enumerate(lengths):
        source = rng.exponential(size=(length, HEADS * NEURONS)) * (rng.random((length, HEADS * NEURONS)) < 0.3)
        target = rng.exponential(size=source.shape) * (rng.random(source.shape) < 0.3)
        for synapse, share in meets.items():
            spikes, together = max(2, length // 3), share(number, length)
            order = rng.permutation(length)
            i, j = (head * NEURONS + neuron for head, neuron in (synapse.source, synapse.target))
            source[:, i] = target[:, j] = target[:, j ^ 1] = 0
            same = round(together * spikes)
            source[order[:spikes], i] = rng.uniform(0.8, 1.2, spikes)
            target[np.concatenate([order[:same], order[spikes : 2 * spikes - same]]), j] = rng.uniform(0.8, 1.2, spikes)
            if synapse == DECOY:
                source[:, i] *= gain(number, length)
        y.append(torch.from_numpy(source))
        x.append(torch.from_numpy(target))
    frequencies = torch.tensor([0.5, 0.05, 0.005], dtype=torch.float64)
    angle = torch.arange(1, max(lengths) + 1, dtype=torch.float64)[:, None] * frequencies
    resid = {1: torch.from_numpy(rng.normal(size=(len(lengths), 5)))}
    return Recording({0: y}, {1: x}, HEADS, torch.stack([angle.cos(), angle.sin()]), resid)


def some_lengths(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(12, 30, count).tolist()


def among(found: ConceptSynapses, synapse: Synapse) -> list[int]:
    return [number for number, candidate in enumerate(found.candidates) if candidate.synapse == synapse]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_planted_synapse_is_found_and_beats_every_neuron(statistic: str) -> None:
    made = planted(some_lengths(120), {PLANTED: lambda s, n: 0.9 if s < 60 else 0.2})
    found = find_in_recording(made, 60, space=SPACE, statistic=statistic, k=10, n_shuffles=19, n_bootstrap=200)
    best = found.candidates[0]
    assert best.synapse == PLANTED
    assert best.q < 1e-4 and best.rank_biserial > 0.7
    assert max(candidate.auc for candidate in found.candidates[1:]) < best.auc - 0.1
    assert found.shuffles.p_first == 1 / 20
    scores = {scored.name: scored for scored in found.scores}
    assert scores["best synapse"].auc == best.auc and scores["best synapse"].ahead == 0
    for name in ("best neuron y", "best neuron x", "linear probe, residual stream", "linear probe, neurons"):
        assert scores[name].auc < 0.75 and scores[name].ahead_interval.high < 0, name
    assert found.searched == 12 * (12 if statistic == "count" else 6)


def test_with_no_information_but_the_neuron_the_neuron_wins_or_draws() -> None:
    made = planted(some_lengths(80), {})
    for number in range(40):
        made.x[1][number][:, 3] += 1.0
    found = find_in_recording(made, 40, space=SPACE, k=5, n_shuffles=0, n_bootstrap=100)
    scores = {scored.name: scored for scored in found.scores}
    assert scores["best neuron x"].chosen == "x1[0·3]" and scores["best neuron x"].auc > 0.95
    assert scores["linear probe, neurons"].auc > 0.8
    assert np.isnan(found.shuffles.p_first) and found.to_json()["shuffles"]["p"] == [None, None, None]


def test_a_synapse_of_the_discovery_sentences_alone_is_no_concept() -> None:
    discovery = np.arange(80) % 2 == 0
    made = planted(some_lengths(80), {DECOY: lambda s, n: 0.9 if s < 40 and discovery[s] else 0.2})
    found = find_in_recording(made, 40, space=SPACE, k=5, discovery=discovery.tolist(), n_shuffles=19, rivals=False)
    assert among(found, DECOY) == [0] and found.candidates[0].effect > 0.8
    assert found.candidates[0].p > 0.05 and not found.significant()
    assert found.shuffles.p_first > 0.1


def test_a_synapse_that_follows_length_is_no_concept() -> None:
    """Positive sentences are longer; the decoy's strength per token grows with length in both classes."""
    rng = np.random.default_rng(5)
    lengths = [*rng.integers(18, 36, 60).tolist(), *rng.integers(10, 26, 60).tolist()]
    meets: dict[Synapse, Meets] = {DECOY: lambda s, n: 1.0, PLANTED: lambda s, n: 0.9 if s < 60 else 0.2}
    made = planted(lengths, meets, gain=lambda s, n: n / 20)
    settings = {"space": SPACE, "k": 72, "n_shuffles": 0, "rivals": False}
    fooled = find_in_recording(made, 60, adjust_length=False, **settings)  # type: ignore[arg-type]
    careful = find_in_recording(made, 60, **settings)  # type: ignore[arg-type]
    assert fooled.candidates[among(fooled, DECOY)[0]].q < 1e-3
    assert careful.candidates[0].synapse == PLANTED and careful.candidates[0].q < 1e-3
    left = among(careful, DECOY)
    assert not left or careful.candidates[left[0]].p > 0.05
    assert "not adjusted" in " ".join(fooled.notes)


def test_a_synapse_that_follows_a_template_is_no_concept() -> None:
    """Four templates per class; the decoy answers to the wording of two positive ones. Cutting templates in two is fooled."""
    groups = [f"{'p' if s < 60 else 'n'}{s % 4}" for s in range(120)]
    made = planted(some_lengths(120), {DECOY: lambda s, n: 0.9 if groups[s] in ("p0", "p2") else 0.2})
    whole = [group[1] in "02" for group in groups]  # both of its templates in the discovery half
    careful = find_in_recording(made, 60, space=SPACE, groups=groups, discovery=whole, k=5, n_shuffles=20, rivals=False)
    assert among(careful, DECOY) == [0] and careful.candidates[0].p > 0.05
    fooled = find_in_recording(made, 60, space=SPACE, k=5, n_shuffles=0, rivals=False)
    assert among(fooled, DECOY) == [0] and fooled.candidates[0].q < 0.05
    assert any("groups" in note for note in careful.notes) and any("one class only" in note for note in careful.notes)
    with pytest.raises(ValueError, match="in both halves"):
        find_in_recording(made, 60, space=SPACE, groups=groups, discovery=[s % 3 == 0 for s in range(120)])


def test_two_sided_finds_what_is_weaker_too() -> None:
    made = planted(some_lengths(100), {PLANTED: lambda s, n: 0.1 if s < 50 else 0.9})
    both = find_in_recording(made, 50, space=SPACE, k=3, alternative="two-sided", n_shuffles=0, rivals=False)
    assert both.candidates[0].synapse == PLANTED and both.candidates[0].rank_biserial < -0.6
    assert both.candidates[0].effect < 0 and both.candidates[0].q < 1e-4
    one = find_in_recording(made, 50, space=SPACE, k=3, n_shuffles=0, rivals=False)
    assert not among(one, PLANTED)


def test_on_null_data_the_control_is_uniform_and_q_holds() -> None:
    """50 data sets without any truth: p of the shuffles is uniform, and about 5 % at most have a candidate with q ≤ 0.05."""
    p, discoveries = [], 0
    for seed in range(50):
        made = planted(some_lengths(24, seed), {}, seed=seed)
        found = find_in_recording(made, 12, space=SPACE, k=10, n_shuffles=9, n_bootstrap=1, rivals=False, seed=seed)
        p.append(found.shuffles.p_first)
        discoveries += bool(found.significant())
    counts = np.bincount(np.round(np.array(p) * 10).astype(int), minlength=11)[1:]
    assert 0.38 < np.mean(p) < 0.72  # 0.55 for ranks of one among ten, ± 4 standard errors
    assert counts.max() <= 15  # 5 expected each
    assert discoveries <= 8  # 2.5 expected


def test_features_of_the_user_are_chosen_on_discovery_and_scored_on_the_rest() -> None:
    made = planted(some_lengths(60), {PLANTED: lambda s, n: 0.9 if s < 30 else 0.2})
    words = [f"sentence {s}" for s in range(60)]

    def dictionary(given: Sequence[object]) -> np.ndarray:
        assert list(given) == words
        values = np.random.default_rng(0).normal(size=(60, 8))
        values[:30, 5] += 3
        return values

    found = find_in_recording(
        made, 30, space=SPACE, k=3, n_shuffles=0, features={"dictionary": dictionary}, sentences=words
    )
    scored = found.scores[-1]
    assert (scored.name, scored.chosen, scored.searched) == ("dictionary", "feature 5", 8) and scored.auc > 0.9
    with pytest.raises(ValueError, match=r"returned shape \(3,\)"):
        find_in_recording(made, 30, space=SPACE, n_shuffles=0, features={"f": lambda s: [1, 2, 3]}, sentences=words)


def test_the_probe_in_the_sentences_span_is_the_probe_on_all_features() -> None:
    """200 features, 30 sentences: the same decision values as a fit in the full space with the penalty that was chosen."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels, half = np.arange(60) < 30, np.arange(60) % 2 == 0
    features = rng.normal(size=(60, 200)) + labels[:, None] * (np.arange(200) < 20)
    found = linear_probe("probe", features, Task(labels, np.zeros((60, 0)), half, None))
    scaled = (features - features[half].mean(0)) / features[half].std(0)
    full = LogisticRegression(C=float(found.chosen.split("= ")[1]), max_iter=5000, tol=1e-8).fit(
        scaled[half], labels[half]
    )
    assert found.values == pytest.approx(full.decision_function(scaled), abs=1e-2)
    assert found.searched == 200 and auc(found.values[~half, None], labels[~half])[0] > 0.9


def test_transfer_tells_a_shared_synapse_from_a_local_one() -> None:
    """PLANTED carries the concept in both languages, DECOY (more strongly) in the first only."""
    groups = ["en" if s % 2 else "fr" for s in range(120)]
    made = planted(
        some_lengths(120),
        {
            PLANTED: lambda s, n: 0.9 if s < 60 else 0.2,
            DECOY: lambda s, n: 1.0 if s < 60 and groups[s] == "en" else 0.0,
        },
    )
    found = transfer_in_recording(made, 60, groups, space=SPACE, k=5)
    assert found.groups == ("en", "fr") and found.synapses == (DECOY, PLANTED)
    best = found.aucs["best synapse"]
    assert best[0, 0] > 0.9 and best[0, 1] < 0.7 and best[1, 0] > 0.8 and best[1, 1] > 0.8
    assert found.mean_across("best synapse") == pytest.approx((best[0, 1] + best[1, 0]) / 2)
    assert json.dumps(found.to_json()) and "en" in repr(found) and "<table>" in found._repr_html_()
    with pytest.raises(ValueError, match="one group"):
        transfer_in_recording(made, 60, ["en"] * 120, space=SPACE)


# Through a model -------------------------------------------------------------------------------------------------------


def two_classes(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Positive sentences hold token 5 several times, negative ones never."""
    positive, negative = sentences(count, seed), sentences(count, seed + 1)
    for tokens in [*positive, *negative]:
        tokens[tokens == 5] = 6
    for tokens in positive:
        tokens[1::2] = 5
    return positive, negative


def test_a_token_s_synapses_are_found_in_a_model_and_the_result_travels(model: BDH, tmp_path: Path) -> None:
    positive, negative = two_classes(24)
    seen: list[float] = []
    found = find_concept_synapses(
        model, positive, negative, k=8, n_shuffles=5, progress=lambda f, message: seen.append(f)
    )
    assert found.candidates[0].q < 0.01 and found.candidates[0].auc > 0.9
    assert seen == sorted(seen) and seen[-1] == 1
    assert found.synapses[0].target_layer in (1, 2) and found.searched == 2 * 12 * 6
    stored = json.loads(found.save(tmp_path / "found.json").read_text())
    assert stored["candidates"][0]["synapse"] == str(found.synapses[0]) and stored["settings"]["k"] == 8
    with found.save(tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) and float(rows[0]["q"]) == found.candidates[0].q
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.csv", "found.json"]
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        found.save(tmp_path / "found.txt")
    assert "best synapse" in repr(found) and "Candidates" in found._repr_html_()
    again = find_concept_synapses(model, positive, negative, k=8, n_shuffles=5)
    assert again.to_json() == found.to_json()
    across = concept_transfer(
        model, positive, negative, positive_groups=["a", "b"] * 12, negative_groups=["a", "b"] * 12, k=3
    )
    assert across.mean_across("best synapse") > 0.8


def test_a_search_can_be_cancelled(model: BDH) -> None:
    positive, negative = two_classes(6)
    event, seen = threading.Event(), []

    def stop(fraction: float, message: str) -> None:
        seen.append(message)
        if "searching" in message:
            event.set()

    with pytest.raises(MeasurementCancelled, match="Cancelled while"):
        find_concept_synapses(model, positive, negative, progress=stop, cancel=event)
    assert "searching" in seen[-1]


# Cause -----------------------------------------------------------------------------------------------------------------


def without(model: BDH, synapse: Synapse, since: int = -1, until: int = 10**6) -> Callable[..., Tensor]:
    """A write of the naive run that leaves out what a synapse would add."""
    (a, i), (b, j) = synapse.source, synapse.target

    def write(layer: int, t: int, value: Tensor, run: Naive) -> Tensor:
        if layer == synapse.target_layer and since < t <= until:
            value = value.clone()
            size = (
                run.scale[layer, t][synapse.source_layer]
                * run.y[synapse.source_layer, t][a, i]
                * run.key[layer, t][b, j]
            )
            value[b, j] -= size * centred(model.weights.E[a, i]).detach()
        return value

    return write


def log_prob(model: BDH, tokens: Tensor, marked: Sequence[int], **edits: object) -> float:
    logits = naive(model, tokens, **edits).logits  # type: ignore[arg-type]
    return float(np.mean([float(logits[p - 1].log_softmax(-1)[tokens[p]]) for p in marked]))


def test_muting_has_the_effect_of_leaving_the_writes_out(model: BDH) -> None:
    texts = sentences(6, seed=4)
    activity = record_sentences(model, texts, source_layers=[0], target_layers=[1])
    places = [Synapse((a, i), (b, j), 1) for a in range(2) for i in range(6) for b in range(2) for j in range(6)]
    read = strength_and_reading(activity, places)[:, 1]
    strongest = places[int(read.argmax())]
    marked = [list(range(2, len(tokens))) for tokens in texts]
    found = causal_check(model, [strongest], texts, marked=marked, n_matched=3, n_bootstrap=50, batch_size=4)
    for tokens, positions, effect in zip(texts, marked, found.effects, strict=True):
        changed = log_prob(model, tokens, positions, on_write=without(model, strongest))
        assert effect == pytest.approx(changed - log_prob(model, tokens, positions), abs=EXACT)
    assert np.abs(found.effects).max() > 1e-4
    once = causal_check(
        model, [strongest], texts, marked=[[4] if len(t) > 4 else [] for t in texts], how="ablate", n_matched=1
    )
    kept = [tokens for tokens in texts if len(tokens) > 4]
    assert len(once.effects) == len(kept) == once.matched_effects.shape[1]
    for tokens, effect in zip(kept, once.effects, strict=True):
        taken = log_prob_after(model, tokens, strongest, after=2, at=4)
        assert effect == pytest.approx(taken - log_prob(model, tokens, [4]), abs=EXACT)


def log_prob_after(model: BDH, tokens: Tensor, synapse: Synapse, after: int, at: int) -> float:
    """log p of token `at` where the synapse's writes up to `after` are subtracted from the state once it is read and written."""
    (a, i), (b, j) = synapse.source, synapse.target
    plain = naive(model, tokens)
    layer = synapse.target_layer
    size = sum(
        float(
            plain.scale[layer, t][synapse.source_layer]
            * plain.y[synapse.source_layer, t][a, i]
            * plain.key[layer, t][b, j]
        )
        for t in range(after + 1)
    )

    def edit(number: int, t: int, state: Tensor) -> Tensor:
        if number == layer and t == after:
            state = state.clone()
            state[b, j] -= size * centred(model.weights.E[a, i]).detach()
        return state

    return log_prob(model, tokens, [at], after=edit)


def test_a_synapse_without_an_encoder_row_is_correlated_but_no_cause() -> None:
    """The decoy's neuron fires and its synapses grow like any other, but what it writes is a constant that the norm removes."""
    model = tiny_model()
    with torch.no_grad():
        model.weights.E[0, 2] = 0.3
    texts = sentences(10, seed=6)
    activity = record_sentences(model, texts, source_layers=[0], target_layers=[1])
    of_decoy = [Synapse((0, 2), (b, j), 1) for b in range(2) for j in range(6)]
    others = [Synapse((0, i), (b, j), 1) for i in (0, 1, 3, 4, 5) for b in range(2) for j in range(6)]
    strongest = [group[int(strength_and_reading(activity, group).prod(1).argmax())] for group in (of_decoy, others)]
    decoy, real = (causal_check(model, [s], texts, n_matched=5, n_bootstrap=300, seed=2) for s in strongest)
    assert strength_and_reading(activity, strongest[:1]).min() > 0
    assert np.abs(decoy.effects).max() < 1e-12 and decoy.p == 1
    assert abs(real.mean) > 1e-4 and np.abs(real.effects).min() >= 0
    assert decoy.mean in decoy.interval or abs(decoy.mean) < 1e-12
    assert json.dumps(real.to_json()) and "matched draws" in repr(real) and "nats" in real._repr_html_()


def test_controls_are_like_what_they_control(model: BDH) -> None:
    texts = sentences(8, seed=3)
    chosen = [Synapse((0, 1), (1, 2), 1), Synapse((1, 3), (0, 4), 2)]
    activity = record_sentences(model, texts, source_layers=[0, 1], target_layers=[1, 2])
    if not (strength_and_reading(activity, chosen) > 0).all():
        pytest.fail("choose synapses that are used in these sentences")
    draws, ratio = matched_synapses(model, chosen, texts, 4, 1000, np.random.default_rng(0))
    assert len(draws) == 4
    for draw in draws:
        for control, synapse in zip(draw, chosen, strict=True):
            assert (control.source_layer, control.target_layer) == (synapse.source_layer, synapse.target_layer)
            assert (control.source[0], control.target[0]) == (synapse.source[0], synapse.target[0])
            assert control not in chosen
    assert len({draw[0] for draw in draws}) == 4
    own = strength_and_reading(activity, chosen)
    ratios = np.concatenate([strength_and_reading(activity, list(draw)) / own for draw in draws])
    assert ratio == pytest.approx(tuple(np.median(ratios, 0)))
    # strength is what the traces show
    traced = [trace_synapses(model, t, chosen).strength[0, -1].numpy() / (len(t) - 1) for t in texts]
    assert own[:, 0] == pytest.approx(np.mean(traced, 0), abs=1e-9)
    with pytest.raises(ValueError, match="expected at least n_matched"):
        matched_synapses(model, chosen, texts, 400, 1000, np.random.default_rng(0))


def test_words_are_marked_where_they_stand() -> None:
    model = tiny_model(vocab_size=256)
    texts = ["a cat and a cat", "the dog", "no animal"]
    found = marked_positions(model, texts, ["cat", "dog"])
    assert found == [[2, 3, 4, 12, 13, 14], [4, 5, 6], []]
    with pytest.raises(ValueError, match="None of the words"):
        marked_positions(model, texts, ["bird"])


MISTAKES: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"positive": "one string"}, TypeError, "one string"),
    ({"positive": []}, ValueError, "positive is empty"),
    ({"positive": [torch.tensor([1, 2, 3])]}, ValueError, "positive sentences; at least 2 are needed"),
    ({"positive": [torch.tensor([1])] * 4}, ValueError, "at least two tokens"),
    ({"statistic": "strenght"}, ValueError, "Did you mean 'strength'"),
    ({"alternative": "less"}, ValueError, "Unknown alternative"),
    ({"layers": [(1, 1)]}, ValueError, "lower layer"),
    ({"layers": [(0, 5)]}, ValueError, "target_layer"),
    ({"layers": []}, ValueError, "layers is empty"),
    ({"target_heads": [2]}, ValueError, "target_heads"),
    ({"source_heads": []}, ValueError, "source_heads"),
    ({"positive_groups": ["a"] * 6}, ValueError, "negative_groups: none given"),
    ({"positive_groups": ["a"], "negative_groups": ["a"]}, ValueError, "positive_groups: 1 given for 6"),
    ({"discovery": [True] * 3}, ValueError, "one truth value for each of 12"),
    ({"discovery": [True] * 12}, ValueError, "validation half has 0"),
    ({"discovery_share": 1.5}, ValueError, "between 0 and 1"),
    ({"k": 0}, ValueError, "k is 0"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_named(model: BDH, number: int) -> None:
    changes, kind, message = MISTAKES[number]
    positive, negative = two_classes(6)
    arguments: dict[str, object] = {"positive": positive, "negative": negative, "n_shuffles": 0, "rivals": False}
    with pytest.raises(kind, match=message):
        find_concept_synapses(model, **{**arguments, **changes})  # type: ignore[arg-type]


CAUSAL_MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"synapses": []}, "synapses is empty"),
    ({"how": "mutes"}, "Did you mean 'mute'"),
    ({"marked": [[0]] * 3}, r"expected 1\.\."),
    ({"marked": [[1]] * 3, "how": "ablate"}, "from token 2 on"),
    ({"marked": [[]] * 3}, "No sentence has a marked position"),
    ({"marked": [[1]]}, "1 entries for 3 sentences"),
]


@pytest.mark.parametrize("number", range(len(CAUSAL_MISTAKES)))
def test_mistakes_of_the_causal_check_are_named(model: BDH, number: int) -> None:
    changes, message = CAUSAL_MISTAKES[number]
    arguments: dict[str, object] = {"synapses": [Synapse((0, 1), (1, 2), 1)], "sentences": sentences(3), "n_matched": 1}
    with pytest.raises(ValueError, match=message):
        causal_check(model, **{**arguments, **changes})  # type: ignore[arg-type]
