"""What the theory says the layer must learn (Zhang, Frei and Bartlett 2023, theorems 4.1, 4.2 and 4.5).

Inputs x ~ N(0, Λ) with Λ = diag(variances), tasks w ~ N(0, I), y = w·x without noise. The minimum is
ŷ = x_queryᵀ A (1/M Σ y_i x_i) with A = Γ⁻¹ and Γ = (1 + 1/N) Λ + (tr Λ / N) I: N examples in training, M in the prompt at
hand. Risks here are E(ŷ − y)², twice the paper's loss.
"""

from __future__ import annotations

import numpy as np


def gamma(variances: np.ndarray, examples: int) -> np.ndarray:
    """The diagonal of Γ [d]."""
    return (1 + 1 / examples) * variances + variances.sum() / examples


def optimal_update(variances: np.ndarray, examples: int) -> np.ndarray:
    """The diagonal of A = Γ⁻¹ [d]."""
    return 1 / gamma(variances, examples)


def update_risk(update: np.ndarray, variances: np.ndarray, examples: int) -> float:
    """E(ŷ − y)² of any A [d, d] on prompts of this covariance and length.

    With C = 1/M Σ x xᵀ: E tr Λ(I − AC)(I − AC)ᵀ = tr Λ − 2 tr ΛAΛ + tr ΛA E[C²] Aᵀ, and E[C²] = ΛΓ for M examples.
    """
    covariance = np.diag(variances)
    second = np.diag(variances * gamma(variances, examples))
    cross = np.trace(covariance @ update @ covariance)
    return float(variances.sum() - 2 * cross + np.trace(covariance @ update @ second @ update.T))


def optimal_risk(variances: np.ndarray, examples: int) -> float:
    """The smallest risk of the layer: tr Λ − tr Λ²Γ⁻¹."""
    return float(variances.sum() - (variances**2 / gamma(variances, examples)).sum())


def final_value_weight(variances: np.ndarray, examples: int) -> float:
    """The last entry of W_PV after gradient flow from the paper's start: tr(Γ⁻²)^¼."""
    return float((gamma(variances, examples) ** -2).sum() ** 0.25)


def random_covariance_update(d: int, examples: int) -> float:
    """The multiple of I that A becomes when every prompt draws variances ~ Exp(1): E[λ²] / E[λ²Γ].

    Moments of Exp(1): E λ² = 2, E λ³ = 6. As N grows it tends to 1/3, so that even endless prompts are underestimated
    threefold.
    """
    expected = (1 + 1 / examples) * 6 + (6 + (d - 1) * 2) / examples
    return 2 / expected
