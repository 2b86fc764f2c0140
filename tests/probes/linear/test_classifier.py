"""Probing classifiers, splits, control tasks, code length and bootstrap on activations in which the answer was planted."""

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from probes.intervals import mean_interval
from probes.linear import Examples, ProbeSettings, control_labels, fit_probe, online_code, probe
from workbench.lab.activation_store import harvest


def planted(n: int = 600, types: int = 40, width: int = 60, signal: float = 3.0, seed: int = 0) -> Examples:
    """The label stands along one direction; the word type, unrelated to it, in `types` other coordinates."""
    rng = np.random.default_rng(seed)
    labels, words = rng.integers(0, 3, n), rng.integers(0, types, n)
    x = 0.5 * rng.normal(size=(n, width))
    x[:, 0] += signal * (labels - 1)
    x[np.arange(n), 5 + words] += 5.0
    return Examples(x, np.array(["a", "b", "c"])[labels], rng.integers(0, 20, n), words)


def test_a_planted_label_is_read_and_noise_is_not() -> None:
    train, test = planted().split("document")
    found = probe(train, test)
    assert found.accuracy > 0.95 and found.accuracy in found.interval
    with pytest.raises(ValueError, match="at least two classes"):
        probe(train.with_labels(["a"] * len(train)), test, control=False)
    shuffled = train.with_labels(np.random.default_rng(2).permutation(train.labels))
    assert probe(shuffled, test, control=False).accuracy < 0.5


def test_selectivity_tells_a_readable_fact_from_a_probe_that_memorises() -> None:
    """With word types in the activations the control task can be memorised; without them, its accuracy is chance."""
    train, test = planted(1500).split("document")
    memorises = probe(train, test)
    assert memorises.control > 0.9 and memorises.selectivity < 0.1
    blind_train, blind_test = (Examples(e.features[:, :1], e.labels, e.documents, e.types) for e in (train, test))
    blind = probe(blind_train, blind_test)
    assert blind.accuracy > 0.95 and blind.control < 0.6 and blind.selectivity > 0.35
    limited = probe(train, test, ProbeSettings(components=1))
    assert limited.accuracy > 0.95 and limited.selectivity > memorises.selectivity + 0.3, (
        "less capacity, more selectivity"
    )


def test_control_labels_belong_to_types_and_follow_the_marginal() -> None:
    types = np.repeat(np.arange(4000), 2)
    labels = np.where(np.arange(8000) % 10 == 0, "rare", "common")
    control = control_labels(types, labels, seed=3)
    assert (control[::2] == control[1::2]).all()
    assert abs((control[::2] == "rare").mean() - 0.1) < 0.02
    assert (control == control_labels(types, labels, seed=3)).all()
    assert (control != control_labels(types, labels, seed=4)).any()


def test_splits_keep_documents_and_types_whole() -> None:
    examples = planted()
    for by, fields in (("document", ["documents"]), ("type", ["types"]), ("document and type", ["documents", "types"])):
        train, test = examples.split(by, seed=5)
        for name in fields:
            assert not set(getattr(train, name)) & set(getattr(test, name)), (by, name)
    train, test = examples.split("random", 0.25)
    assert len(test) == 150 and len(train) == 450
    with pytest.raises(ValueError, match="Did you mean 'document'"):
        examples.split("documents")
    with pytest.raises(ValueError, match="needs the type of each"):
        Examples(examples.features, examples.labels).split("type")


def test_a_split_by_type_shows_what_is_only_memorised_of_words() -> None:
    """A label that is a function of the type alone: perfect on documents, chance on unseen types; selectivity is refused there."""
    examples = planted(1500, signal=0.0)
    memorable = examples.with_labels(control_labels(examples.types, ["a", "b"], seed=1))
    assert probe(*memorable.split("document"), control=False).accuracy > 0.85
    train, test = memorable.split("type", seed=2)
    assert probe(train, test, control=False).accuracy < 0.75
    with pytest.raises(ValueError, match="split by type"):
        probe(train, test)


def test_baselines_are_counted_by_hand() -> None:
    x = np.arange(8.0)[:, None]
    train = Examples(x, list("aaabbbaa"), types=list("uuuvvvww"))
    test = Examples(x[:4], list("abba"), types=list("uvzw"))
    found = probe(train, test, control=False)
    assert found.majority == 0.5 and found.by_type == 0.75  # z is unseen and gets "a"
    assert np.isnan(found.selectivity) and found.to_json()["selectivity"] is None


def test_any_classifier_and_every_kind() -> None:
    train, test = planted().split("document")
    bent, bent_test = (Examples(e.features[:, :3], np.abs(e.features[:, 0]) > 1.5, e.documents) for e in (train, test))
    mlp = ProbeSettings("mlp", strength=1e-2, hidden=32, max_iter=1500)
    assert probe(bent, bent_test, mlp, control=False).accuracy > probe(bent, bent_test, control=False).accuracy + 0.1
    unfitted = LinearSVC()
    assert probe(train, test, unfitted).accuracy > 0.8 > probe(train, test, DummyClassifier()).accuracy
    assert not hasattr(unfitted, "coef_"), "a clone is fitted, not the caller's estimator"
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        fit_probe(train, "linaer")
    with pytest.raises(TypeError, match="Cannot probe with 3"):
        fit_probe(train, 3)


@pytest.mark.parametrize(
    "bad", [{"features": np.zeros(3)}, {"labels": [1]}, {"types": [1]}, {"features": np.full((2, 2), np.nan)}]
)
def test_wrong_examples_are_refused(bad) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        Examples(**({"features": np.zeros((2, 2)), "labels": [0, 1]} | bad))


def test_interval_of_groups_is_wider_and_covers() -> None:
    """Copies of one document add nothing: the interval is that of the documents. Coverage of the true mean is near its level."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    single = mean_interval(values, seed=1)
    copies = mean_interval(values.repeat(20), np.arange(30).repeat(20), seed=1)
    ignored = mean_interval(values.repeat(20), seed=1)
    assert np.allclose([single.low, single.high], [copies.low, copies.high])
    assert ignored.high - ignored.low < 0.4 * (copies.high - copies.low)
    covered = [0.0 in mean_interval(rng.normal(size=60), resamples=300, seed=s) for s in range(200)]
    assert 0.88 < np.mean(covered) < 0.99


# ------------------------------------------------------------------------------------------------------- code length


def test_code_length_of_a_known_code() -> None:
    """A probe that always says the training frequencies: every block's bits are those of its counts."""
    labels = np.array([0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    examples = Examples(np.zeros((16, 1)), labels, documents=np.zeros(16))  # one document: sent as it stands
    code = online_code(examples, DummyClassifier(strategy="prior"), shares=(0.25, 0.5, 1.0))
    expected = [4.0]
    for start, stop in ((4, 8), (8, 16)):
        p = np.bincount(labels[:start]) / start
        expected.append(-np.log2(p[labels[start:stop]]).sum())
    assert code.block_ends == (4, 8, 16) and np.allclose(code.bits, expected) and code.uniform == 16
    assert np.isclose(code.compression, 16 / sum(expected))


def test_a_class_that_was_not_seen_costs_a_finite_number_of_bits() -> None:
    labels = np.array([0, 1, 0, 1, 2, 2, 2, 2])
    code = online_code(
        Examples(np.zeros((8, 1)), labels, np.zeros(8)), DummyClassifier(strategy="prior"), shares=(0.5, 1.0)
    )
    assert np.isclose(code.bits[1], 4 * np.log2(7)), "one imagined example of each of 3 classes beside 4 seen ones"


def test_code_length_orders_facts_by_how_hard_they_are() -> None:
    plain, weak = (
        online_code(Examples(e.features[:, :3], e.labels)) for e in (planted(signal=6.0), planted(signal=1.0))
    )
    chance = planted(signal=0.0)
    nothing = online_code(chance, DummyClassifier(strategy="prior"))
    assert plain.compression > 4 > weak.compression > nothing.compression
    assert 0.9 < nothing.compression < 1.1
    with pytest.raises(ValueError, match="ascend to 1"):
        online_code(chance, shares=(0.5, 0.2, 1.0))
    with pytest.raises(ValueError, match="predict_proba"):
        online_code(chance, LinearSVC())


def test_examples_of_an_activation_store(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Rows, sequences and tokens of a store; the embedding gives the token away completely."""
    import models

    model = models.build("retnet")
    tokens = torch.randint(0, 6, (12, 10), generator=torch.Generator().manual_seed(0))
    store = harvest(model, tokens, ["hook_embed"], tmp_path / "store", dtype="float32")
    examples = Examples.from_store(store, "hook_embed", lambda facts: facts["token"])
    assert len(examples) == 12 * 9 and (examples.documents == np.arange(12).repeat(9)).all()
    train, test = examples.split("document")
    assert probe(train, test, KNeighborsClassifier(1), control=False).accuracy == 1.0
