"""Centred kernel alignment (Kornblith et al. 2019): how alike two sets of activations of the same examples are, up to rotation and scale.

    CKA(X, Y) = HSIC(XXᵀ, YYᵀ) / √(HSIC(XXᵀ, XXᵀ) HSIC(YYᵀ, YYᵀ))

The biased estimator of HSIC calls wide unrelated activations alike where there are few examples; `unbiased=True` (Song et al. 2012) is 0
there on average, and may be slightly negative.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cka(x: Any, y: Any, *, unbiased: bool = True) -> float:
    """Linear CKA of activations x [example, width] and y [example, other width] of the same examples.

    Raises:
        ValueError: other numbers of examples, too few of them, activations that do not vary.
    """
    x, y = _centred(x), _centred(y)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} examples and y {len(y)}. Expected activations of the same examples.")
    if len(x) < (4 if unbiased else 2):
        raise ValueError(f"{len(x)} examples are too few. Expected at least {4 if unbiased else 2}.")
    xx, yy, xy = _hsic(x, x, unbiased), _hsic(y, y, unbiased), _hsic(x, y, unbiased)
    if xx <= 0 or yy <= 0:
        raise ValueError(f"The activations of {'x' if xx <= 0 else 'y'} do not vary, so there is nothing to align.")
    return float(xy / np.sqrt(xx * yy))


def cka_matrix(
    first: Mapping[str, Any], second: Mapping[str, Any] | None = None, *, unbiased: bool = True
) -> tuple[list[str], list[str], Array]:
    """CKA of every site of `first` with every site of `second` (None: of `first` itself): row names, column names, [row, column]."""
    second = first if second is None else second
    found = [[cka(x, y, unbiased=unbiased) for y in second.values()] for x in first.values()]
    return list(first), list(second), np.asarray(found)


def _centred(x: Any) -> Array:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"Activations have shape {x.shape}; expected [example, width].")
    return x - x.mean(0)


def _hsic(x: Array, y: Array, unbiased: bool) -> float:
    """HSIC of linear kernels of centred x and y, up to a factor that cancels in CKA."""
    if not unbiased:
        # ‖XᵀY‖² equals tr(XXᵀYYᵀ) and needs width × width instead of example × example numbers
        small = x.shape[1] * y.shape[1] <= len(x) ** 2
        return float(np.square(x.T @ y).sum() if small else ((x @ x.T) * (y @ y.T)).sum())
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return float(total / (n * (n - 3)))
