"""LogME against the marginal likelihood itself, H-score against canonical correlations, neighbours against a loop, CKA against kernels."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from probes.linear import Examples, cka, cka_matrix, h_score, logme, neighbour_accuracy
from probes.linear.transferability import log_evidence, transferability


def data(n: int = 40, width: int = 6, signal: float = 1.0, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    return Examples(rng.normal(size=(n, width)) + signal * np.eye(3, width)[labels], labels)


def marginal(y, features, alpha, beta) -> float:  # type: ignore[no-untyped-def]
    covariance = np.eye(len(y)) / beta + features @ features.T / alpha
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


def test_log_evidence_is_the_gaussian_marginal_likelihood_at_its_maximum() -> None:
    examples = data()
    u, s, _ = np.linalg.svd(examples.features, full_matrices=False)
    for label in range(3):
        y = (examples.labels == label).astype(float)
        found, alpha, beta = log_evidence(y, u, s, 6)
        assert np.isclose(found, marginal(y, examples.features, alpha, beta), rtol=1e-9)
        best = minimize(lambda p, y=y: -marginal(y, examples.features, *np.exp(p)), [0.0, 0.0], method="Nelder-Mead")
        assert np.isclose(found, -best.fun, atol=1e-4)


def test_log_evidence_of_more_features_than_examples() -> None:
    examples = data(n=20, width=50, signal=0.3)
    u, s, _ = np.linalg.svd(examples.features, full_matrices=False)
    y = (examples.labels == 0).astype(float)
    found, alpha, beta = log_evidence(y, u, s, 50, iterations=30)
    assert np.isclose(found, marginal(y, examples.features, alpha, beta), rtol=1e-8)


def test_h_score_is_the_sum_of_squared_canonical_correlations() -> None:
    examples = data(n=200)
    x = examples.features - examples.features.mean(0)
    z = np.eye(3)[examples.labels]
    z = z - z.mean(0)
    qx, qz = np.linalg.qr(x)[0], np.linalg.qr(z[:, :2])[0]
    correlations = np.linalg.svd(qx.T @ qz, compute_uv=False)
    assert np.isclose(h_score(examples, regularised=False), np.square(correlations).sum())
    perfect = Examples(np.eye(3)[examples.labels], examples.labels)
    assert np.isclose(h_score(perfect, regularised=False), 2.0), "classes − 1 where classes are points"
    assert h_score(data(n=30, width=25, signal=0)) < 0.5 < h_score(data(n=30, width=25, signal=0), regularised=False)


def test_neighbours_are_those_of_a_loop() -> None:
    examples = data(n=50)
    right = 0
    for i in range(50):
        distance = np.linalg.norm(examples.features - examples.features[i], axis=1)
        distance[i] = np.inf
        votes = np.bincount(examples.labels[np.argsort(distance)[:3]], minlength=3)
        right += votes.argmax() == examples.labels[i]
    assert neighbour_accuracy(examples, 3) == right / 50
    with pytest.raises(ValueError, match="k is 50"):
        neighbour_accuracy(examples, 50)


def test_all_rank_a_planted_signal_first_and_ignore_the_order_of_examples() -> None:
    strong, weak, none = (transferability(data(n=150, signal=s)) for s in (4.0, 1.0, 0.0))
    for name in strong:
        assert strong[name] > weak[name] > none[name], name
    examples = data(n=60)
    turned = examples[np.random.default_rng(1).permutation(60)]
    assert all(np.isclose(transferability(examples)[name], transferability(turned)[name]) for name in strong)
    with pytest.raises(ValueError, match="at least two classes"):
        logme(examples.with_labels(np.zeros(60)))


# --------------------------------------------------------------------------------------------------------------- CKA


def hsic_by_definition(k, m):  # type: ignore[no-untyped-def]
    """Song et al. 2012, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    third = 2 / (n - 2) * one @ k @ m @ one
    return (np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - third) / (n * (n - 3))


@pytest.mark.parametrize("shape", [(30, 5, 7), (12, 40, 3)])
def test_cka_is_its_kernel_form(shape) -> None:  # type: ignore[no-untyped-def]
    n, a, b = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, a))
    y = x[:, :3] @ rng.normal(size=(3, b)) + rng.normal(size=(n, b))
    centre = np.eye(n) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert np.isclose(cka(x, y, unbiased=False), np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))
    expected = hsic_by_definition(k, m) / np.sqrt(hsic_by_definition(k, k) * hsic_by_definition(m, m))
    assert np.isclose(cka(x, y), expected)


def test_cka_ignores_rotation_scale_and_shift_but_not_shear() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    for unbiased in (True, False):
        assert np.isclose(cka(x, 3 * x @ turn + 5, unbiased=unbiased), 1.0)
        assert cka(x, x * np.array([30.0, *[1.0] * 7]), unbiased=unbiased) < 0.7


def test_unrelated_wide_activations_are_not_alike() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 200)), rng.normal(size=(40, 200))
    assert cka(x, y, unbiased=False) > 0.7, "the bias that the unbiased estimator removes"
    assert abs(cka(x, y)) < 0.1
    rows, columns, found = cka_matrix({"x": x, "y": y})
    assert rows == columns == ["x", "y"] and np.allclose(np.diag(found), 1) and np.allclose(found, found.T)
    with pytest.raises(ValueError, match="do not vary"):
        cka(np.ones((9, 2)), x[:9])
    with pytest.raises(ValueError, match="same examples"):
        cka(x[:5], y[:6])
