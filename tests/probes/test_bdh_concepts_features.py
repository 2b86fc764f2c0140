"""Dictionary features beside concept synapses: sentence by sentence, planted, and from a stored dictionary."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.bdh.model import BDH
from probes.bdh.concepts import find_concept_synapses
from probes.bdh.concepts_features import dictionary_features, stored_features
from probes.features import FeatureTraining, Standard, TopK, build_dictionary, load_dictionary
from probes.features.dictionaries import Dictionary
from probes.features.study import find_features
from tests.probes.bdh_naive import tiny_model
from workbench.lab.activation_store import ActivationStoreError, Site
from workbench.lab.checkpoints import CheckpointError

POINT = "blocks.1.hook_resid_pre"
TEXT = b"the cat sat on the mat, and the dog sat on the log; then the cat and the dog ran. " * 12


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


def random_sentences(count: int, seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(6, 11, size=(1, rng.integers(8, 20)))) for _ in range(count)]


def random_dictionary(d_in: int, n_features: int = 6) -> Dictionary:
    dictionary = build_dictionary(Standard(n_features, seed=3), d_in)
    with torch.no_grad():
        dictionary.b_enc.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    return dictionary


@pytest.mark.parametrize(
    "site", [Site(POINT), Site("blocks.2.hook_y"), Site("blocks.1.hook_y", head=1)], ids=lambda s: s.name
)
def test_codes_are_means_over_each_sentence_alone(model: BDH, site: Site) -> None:
    sentences = random_sentences(7, 0)
    alone = []
    for tokens in sentences:
        _, cache = model.run_with_cache(tokens, names=[site.point])
        activity = cache[site.point][0]  # [pos, d_model] or [head, pos, neuron]
        if activity.ndim == 3:
            activity = activity.transpose(0, 1) if site.head is None else activity[site.head]
        alone.append(activity.flatten(1)[1:])
    dictionary = random_dictionary(alone[0].shape[1])
    with torch.no_grad():
        expected = np.stack([dictionary.encode(rows).mean(0).numpy() for rows in alone])
    found = dictionary_features(model, dictionary, site, batch_size=3)(sentences)
    assert found.shape == (7, 6) and expected.std() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_feature_that_knows_the_class_is_the_rival(model: BDH) -> None:
    """One encoder row points from one class's mean to the other's; the others are random."""
    positive, negative = random_sentences(24, 1), random_sentences(24, 2)
    for tokens in positive:
        tokens[:, 2::3] = 5
    together = [*positive, *negative]
    identity = build_dictionary(Standard(model.config.d_model), model.config.d_model)
    with torch.no_grad():
        means = [model.run_with_cache(t, names=[POINT])[1][POINT][0, 1:].mean(0) for t in together]
        difference = torch.stack(means[:24]).mean(0) - torch.stack(means[24:]).mean(0)
        identity.W_enc[4] = 5 * difference
        identity.b_enc += 2.0  # far from where a ReLU cuts off
    codes = dictionary_features(model, identity, POINT)
    found = find_concept_synapses(
        model, positive, negative, layers=[(0, 1)], k=3, n_shuffles=0, n_bootstrap=50, features={"a dictionary": codes}
    )
    rival = found.scores[-1]
    assert (rival.name, rival.chosen, rival.searched) == ("a dictionary", "feature 4", model.config.d_model)
    assert rival.auc > 0.9


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = models.build("bdh"), tmp_path_factory.mktemp("features")
    quick = FeatureTraining(steps=10, batch_size=64, warmup=2, report_every=10)
    find_features(
        model, Site("blocks.1.hook_y", head=1), TEXT, TopK(24, k=3), folder, training=quick, context=32, n_features=2
    )
    return model, folder


def test_a_stored_dictionary_is_read_where_it_was_trained(stored: tuple[Any, Path]) -> None:
    model, folder = stored
    sentences = ["the cat sat", "a dog and a log", "then it ran"]
    ((name, function),) = stored_features(model, folder).items()
    assert name == "dictionary feature, blocks.1.hook_y:1"
    expected = dictionary_features(model, load_dictionary(folder / "dictionary"), Site("blocks.1.hook_y", 1))(sentences)
    np.testing.assert_array_equal(function(sentences), expected)
    assert (expected > 0).any()


def test_mistakes_are_named(stored: tuple[Any, Path], model: BDH, tmp_path: Path) -> None:
    _, folder = stored
    with pytest.raises(CheckpointError, match="features"):
        stored_features(model, tmp_path)
    with pytest.raises(ValueError, match="was trained on"):
        stored_features(models.load("gpt-english"), folder)
    sentences: Sequence[Tensor] = random_sentences(2, 0)
    with pytest.raises(ValueError, match="the dictionary reads 3"):
        dictionary_features(model, random_dictionary(3), POINT)(sentences)
    with pytest.raises(ActivationStoreError, match=r"heads 0\.\.1"):
        dictionary_features(model, random_dictionary(6), Site("blocks.1.hook_y", 2))(sentences)
    (tmp_path / "features.json").write_text(json.dumps({"model": stored[0].name, "site": POINT}))
    with pytest.raises(CheckpointError):
        stored_features(stored[0], tmp_path)
