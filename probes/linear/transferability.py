"""How well activations will serve a classifier, without training one: LogME, H-score, nearest neighbours.

LogME (You et al. 2021)     log evidence per example of a Bayesian linear model of the one-hot labels, its two precisions maximised
H-score (Bao et al. 2019)   tr(Σ⁻¹ Σ_between): between-class variance in units of all variance; 0 … classes − 1
                            regularised (Ibrahim et al. 2022): Ledoit–Wolf shrinkage of Σ
neighbours                  leave-one-out accuracy of the k nearest neighbours

They rank the layers of one model on one labelled set; their units differ, and LogME has no zero.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.linear.examples import Examples
from workbench.lab.catalogue import implements

Array = NDArray[np.float64]


@implements("transformer-ranker", "probe", "logme")
def logme(examples: Examples, iterations: int = 100, tolerance: float = 1e-8) -> float:
    """LogME: per class, y ~ N(Fw, β⁻¹), w ~ N(0, α⁻¹), with α, β at the maximum of log p(y | F, α, β); the mean over classes, per example.

    The precisions are found by MacKay's fixed point, in the singular basis of F. Features are taken as they are, without centring.

    Raises:
        ValueError: fewer than two classes.
    """
    _require_classes(examples)
    features = np.asarray(examples.features, dtype=np.float64)
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    found = [
        log_evidence((examples.labels == label).astype(np.float64), u, s, features.shape[1], iterations, tolerance)[0]
        for label in examples.classes
    ]
    return float(np.mean(found)) / len(examples)


def log_evidence(
    y: Array, u: Array, s: Array, width: int, iterations: int = 100, tolerance: float = 1e-8
) -> tuple[float, float, float]:
    """max log p(y | F, α, β) in nats, with its α and β. F = u diag(s) vᵀ [example, width]; y [example].

    In the singular basis A = αI + βFᵀF is diagonal: γ = Σ βσ²/(α + βσ²) parameters are determined by the data,
    α = γ/‖m‖², β = (n − γ)/‖Fm − y‖².
    """
    n = len(y)
    projected = u.T @ y
    outside = max(float(y @ y - projected @ projected), 0.0)
    alpha, beta = 1.0, 1.0
    for _ in range(iterations):
        denominator = alpha + beta * s**2
        gamma = float((beta * s**2 / denominator).sum())
        mean = beta * s * projected / denominator
        residual = float(np.square(projected - s * mean).sum()) + outside
        before = alpha, beta
        alpha, beta = gamma / max(float(mean @ mean), 1e-300), (n - gamma) / max(residual, 1e-300)
        if abs(np.log(alpha / before[0])) + abs(np.log(beta / before[1])) < tolerance:
            break
    denominator = alpha + beta * s**2
    mean = beta * s * projected / denominator
    residual = float(np.square(projected - s * mean).sum()) + outside
    log_det = float(np.log(denominator).sum()) + (width - len(s)) * np.log(alpha)
    evidence = (
        n / 2 * np.log(beta) + width / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        - beta / 2 * residual - alpha / 2 * float(mean @ mean) - log_det / 2
    )  # fmt: skip
    return float(evidence), alpha, beta


@implements("transformer-ranker", "probe", "h_score")
def h_score(examples: Examples, *, regularised: bool = True) -> float:
    """tr(Σ⁻¹ Σ_between), Σ_between the covariance of class means. `regularised`: Σ shrunk by Ledoit–Wolf, Σ_between by the same factor.

    Raises:
        ValueError: fewer than two classes.
    """
    _require_classes(examples)
    features = np.asarray(examples.features, dtype=np.float64)
    features = features - features.mean(0)
    means = np.empty_like(features)
    for label in examples.classes:
        means[examples.labels == label] = features[examples.labels == label].mean(0)
    between = means.T @ means / len(features)
    if not regularised:
        return float(np.trace(np.linalg.pinv(features.T @ features / len(features), hermitian=True) @ between))
    from sklearn.covariance import ledoit_wolf

    covariance, shrinkage = ledoit_wolf(features, assume_centered=True)
    return float((1 - shrinkage) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


@implements("transformer-ranker", "probe", "neighbour_accuracy")
def neighbour_accuracy(examples: Examples, k: int = 3, metric: str = "euclidean") -> float:
    """Leave-one-out accuracy of a vote of the k nearest other examples.

    Raises:
        ValueError: fewer than two classes, or not more than k examples.
    """
    _require_classes(examples)
    if not 1 <= k < len(examples):
        raise ValueError(f"k is {k}; expected 1 to {len(examples) - 1} for {len(examples)} examples.")
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, metric=metric).fit(examples.features)
    near = index.kneighbors(return_distance=False)  # without an argument an example is not its own neighbour
    numbers = np.unique(examples.labels, return_inverse=True)[1]
    votes = np.zeros((len(numbers), len(examples.classes)))
    np.add.at(votes, (np.arange(len(numbers))[:, None], numbers[near]), 1)
    return float((votes.argmax(1) == numbers).mean())


def transferability(examples: Examples) -> dict[str, Any]:
    """All three."""
    return {"logme": logme(examples), "h_score": h_score(examples), "neighbours": neighbour_accuracy(examples)}


def _require_classes(examples: Examples) -> None:
    if len(examples.classes) < 2:
        raise ValueError(f"All labels are {examples.classes[0]!r}. Expected at least two classes.")
