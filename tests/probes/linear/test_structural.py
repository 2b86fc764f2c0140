"""The structural probe on trees that were planted in the activations, and its scores on trees whose answer is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from probes.linear import TreeSentence, fit_structural_probe, score_distances, tree_distances
from probes.linear.structural import linear_baseline


def random_heads(rng, n: int) -> list[int]:  # type: ignore[no-untyped-def]
    """A random tree over words in random order."""
    order = rng.permutation(n).tolist()
    heads = [-1] * n
    for place in range(1, n):
        heads[order[place]] = order[int(rng.integers(0, place))]
    return heads


def planted(count: int, seed: int = 0, noise: float = 3.0) -> list[TreeSentence]:
    """Each edge is a coordinate, each word the indicator of its path from the root: squared distance is tree distance. Then other
    coordinates full of noise, and a rotation of all."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(24, 24)))[0]
    sentences = []
    for _ in range(count):
        n = int(rng.integers(5, 12))
        heads = random_heads(rng, n)
        paths = np.zeros((n, 24))
        for word in range(n):
            node = word
            while heads[node] >= 0:
                paths[word, node] = 1
                node = heads[node]
        paths[:, 12:] = noise * rng.normal(size=(n, 12))
        sentences.append(TreeSentence(paths @ turn, tree_distances(heads), np.ones(n, dtype=bool)))
    return sentences


def test_tree_distances_of_a_small_tree() -> None:
    assert tree_distances([1, -1, 1, 2]).tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]
    for wrong in ([1, 0], [-1, -1], [-1, 5], [1, 2, 0, -1]):
        with pytest.raises(ValueError, match="no tree"):
            tree_distances(wrong)


def test_a_planted_tree_is_found_and_noise_is_not() -> None:
    train, test = planted(150), planted(40, seed=1)
    probe = fit_structural_probe(train, rank=24, epochs=20, learning_rate=2e-2)
    found = probe.score(test)
    assert found.uuas > 0.85 and found.dspr > 0.8 and found.uuas in found.uuas_interval
    assert probe.losses[-1] < 0.5 * probe.losses[0]
    rng = np.random.default_rng(5)
    shuffled = [TreeSentence(s.vectors, tree_distances(random_heads(rng, len(s.vectors))), s.counted) for s in train]
    decoy = fit_structural_probe(shuffled, rank=24, epochs=8, learning_rate=2e-2).score(test)
    assert decoy.uuas < 0.5 and decoy.dspr < 0.4


def test_rank_limits_what_can_be_found() -> None:
    """Twelve edge coordinates do not fit in two dimensions."""
    train, test = planted(100, noise=0.0), planted(30, seed=1, noise=0.0)
    wide, narrow = (fit_structural_probe(train, rank, epochs=10, learning_rate=2e-2).score(test) for rank in (24, 2))
    assert wide.uuas > narrow.uuas + 0.1
    assert fit_structural_probe(train[:2], rank=99, epochs=1).projection.shape == (24, 24)
    with pytest.raises(ValueError, match="rank is 0"):
        fit_structural_probe(train, 0)


def test_scores_of_the_true_distances_and_of_word_order() -> None:
    sentences = planted(20)
    perfect = score_distances([s.distances for s in sentences], sentences)
    assert perfect.uuas == 1.0 and np.isclose(perfect.dspr, 1.0)
    chain = TreeSentence(np.zeros((6, 2)), tree_distances([-1, 0, 1, 2, 3, 4]), np.ones(6, dtype=bool))
    assert linear_baseline([chain]).uuas == 1.0
    assert linear_baseline(sentences).uuas < 0.5


def test_spearman_is_scipys_and_punctuation_is_left_out() -> None:
    rng = np.random.default_rng(0)
    sentence = planted(1)[0]
    n = len(sentence.distances)
    guess = rng.random((n, n))
    guess += guess.T
    np.fill_diagonal(guess, 0)
    expected = np.mean([spearmanr(guess[i], sentence.distances[i]).statistic for i in range(n)])
    assert np.isclose(score_distances([guess], [sentence]).dspr, expected)
    # words 0 - 1 - 2 and a full stop on 1, which a wrong distance puts nearest to everything
    heads = tree_distances([1, -1, 1, 1])
    wrong = heads.copy()
    wrong[3], wrong[:, 3] = 0.01, 0.01
    counted = np.array([True, True, True, False])
    vectors = np.zeros((4, 2))
    assert score_distances([wrong], [TreeSentence(vectors, heads, counted)]).uuas == 1.0
    assert score_distances([wrong], [TreeSentence(vectors, heads, np.ones(4, dtype=bool))]).uuas < 1.0
