"""How well a number per sentence separates two classes: rank statistics, adjustment, false discoveries, splits, shuffles, bootstrap.

U        number of (positive, negative) pairs in which the positive sentence has the larger number; ties count one half
AUC      U / (n₁ n₂), the chance that a positive sentence has the larger number
r        rank-biserial correlation 2U/(n₁ n₂) − 1 = 2 AUC − 1: 0 is chance, 1 is perfect
q        Benjamini–Hochberg adjusted p: among candidates with q ≤ α, at most a share α is expected to be false
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probes.intervals import Interval as Interval  # part of these statistics, kept where other probes find it too
from workbench.instrument.errors import suggestion

Array = NDArray[np.float64]
ALTERNATIVES = ("greater", "two-sided")


def check_alternative(alternative: str) -> None:
    """Raises ValueError with the nearest name."""
    if alternative not in ALTERNATIVES:
        raise ValueError(
            f"Unknown alternative {alternative!r}.{suggestion(alternative, ALTERNATIVES)} Expected one of {', '.join(ALTERNATIVES)}."
        )


def u_to_rank_biserial(u: float, n_positive: int, n_negative: int) -> float:
    """r = 2U/(n₁ n₂) − 1. Raises ValueError for a U outside 0 … n₁ n₂."""
    _check_u(u, n_positive, n_negative)
    return 2 * u / (n_positive * n_negative) - 1


def u_to_p(u: float, n_positive: int, n_negative: int, alternative: str = "greater") -> float:
    """p of a Mann–Whitney U by the normal approximation without ties or continuity correction, as published p-values usually are."""
    from scipy.stats import norm

    _check_u(u, n_positive, n_negative)
    check_alternative(alternative)
    pairs = n_positive * n_negative
    z = (u - pairs / 2) / np.sqrt(pairs * (n_positive + n_negative + 1) / 12)
    return float(norm.sf(z) if alternative == "greater" else 2 * norm.sf(abs(z)))


def _check_u(u: float, n_positive: int, n_negative: int) -> None:
    if n_positive < 1 or n_negative < 1:
        raise ValueError(f"The classes have {n_positive} and {n_negative} members; expected at least 1 each.")
    if not 0 <= u <= n_positive * n_negative:
        raise ValueError(
            f"U is {u}; with {n_positive} and {n_negative} members it lies in 0..{n_positive * n_negative}."
        )


def mann_whitney(values: Array, labels: NDArray[np.bool_], alternative: str = "greater") -> tuple[Array, Array]:
    """U and p of each column of values [sentence, column]: scipy's test, exact for small samples without ties."""
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(values[labels], values[~labels], alternative=alternative, axis=0)
    # a column without any variation has p = nan in the normal approximation; it says nothing, so p = 1
    return np.asarray(test.statistic, float), np.nan_to_num(np.asarray(test.pvalue, float), nan=1.0)


def auc(values: Array, labels: NDArray[np.bool_]) -> Array:
    """AUC of each column of values [sentence, column]."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)
    n = int(labels.sum())
    return (ranks[labels].sum(0) - n * (n + 1) / 2) / (n * (len(labels) - n))


def benjamini_hochberg(p: Array) -> Array:
    """q of each p."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p)) if len(p) else np.asarray(p, float)


# Adjustment for covariates ---------------------------------------------------------------------------------------------


def partial_basis(covariates: Array) -> Array:
    """An orthonormal basis [sentence, column] of a constant and the covariates [sentence, covariate], those without variation dropped."""
    design = np.column_stack([np.ones(len(covariates)), covariates])
    u, s, _ = np.linalg.svd(design, full_matrices=False)
    return u[:, s > 1e-9 * s[0]]


def partial_directions(labels: NDArray[np.bool_], basis: Array) -> Array:
    """Unit vectors [assignment, sentence] of label assignments [assignment, sentence] with the basis projected out.

    Their products with a column that is projected likewise and has unit length are partial correlations of label and column given
    the covariates: monotone in the t of the analysis of covariance, and free of what the covariates alone explain.
    """
    signed = np.where(labels, 1.0, -1.0)
    left = signed - (signed @ basis) @ basis.T
    length = np.linalg.norm(left, axis=1, keepdims=True)
    if bool((length < 1e-6 * np.sqrt(labels.shape[1])).any()):
        raise ValueError(
            "The covariates (sentence length) determine the class completely, so nothing else can be tested. "
            "Expected classes that overlap in length; or pass adjust_length=False and read the result as 'concept or length'."
        )
    return left / length


def adjusted(values: Array, labels: NDArray[np.bool_], covariates: Array, fit: NDArray[np.bool_]) -> Array:
    """values [sentence, column] minus their within-class slope on covariates [sentence, covariate], estimated on the sentences `fit`.

    The class is part of the regression, so its own effect stays; only what the covariates explain within the classes is taken away.
    """
    design = np.column_stack([np.ones(fit.sum()), labels[fit].astype(float), covariates[fit]])
    slopes = np.linalg.lstsq(design, values[fit], rcond=1e-9)[0][2:]
    return values - covariates @ slopes


# Splits and shuffles ---------------------------------------------------------------------------------------------------


def split_half(
    labels: NDArray[np.bool_], groups: Sequence[str] | None, share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """True for the discovery sentences: about `share` of each class, and never a part of a group.

    Raises ValueError where groups leave one half without one of the classes.
    """
    if not 0 < share < 1:
        raise ValueError(f"discovery_share is {share}; expected a number between 0 and 1.")
    if groups is None:
        chosen = np.zeros(len(labels), bool)
        for value in (False, True):
            members = rng.permutation(np.flatnonzero(labels == value))
            chosen[members[: round(share * len(members))]] = True
        _check_halves(labels, chosen, "Expected more sentences")
        return chosen
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.stack([np.bincount(number[labels == v], minlength=len(names)) for v in (False, True)], 1)
    best, best_miss = np.zeros(len(names), bool), np.inf
    for _ in range(500):  # random halves of the groups; the one that divides both classes most evenly
        order = rng.permutation(len(names))
        sums = counts[order].cumsum(0) / counts.sum(0)
        miss = np.abs(sums - share).max(1)
        cut = int(miss.argmin())
        if miss[cut] < best_miss - 1e-12:
            best_miss = float(miss[cut])
            best = np.isin(np.arange(len(names)), order[: cut + 1])
    chosen = best[number]
    _check_halves(labels, chosen, f"There are {len(names)} groups; expected at least two with each class")
    return chosen


def _check_halves(labels: NDArray[np.bool_], chosen: NDArray[np.bool_], hint: str) -> None:
    for half, name in ((chosen, "discovery"), (~chosen, "validation")):
        for value, kind in ((True, "positive"), (False, "negative")):
            count = int((labels[half] == value).sum())
            if count < 2:
                raise ValueError(f"The {name} half has {count} {kind} sentences; at least 2 are needed. {hint}.")


def shuffled_labels(
    labels: NDArray[np.bool_],
    discovery: NDArray[np.bool_],
    groups: Sequence[str] | None,
    n: int,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """n assignments [assignment, sentence] that could have been, were class and sentence unrelated; each half keeps its own labels.

    Without groups labels move freely within a half. With groups they move within each group that has both classes, and between whole
    groups where a group has one class only: sentences of one template are not independent, and shuffling them as if they were would
    make chance look smaller than it is.
    """
    out = np.tile(labels, (n, 1))
    units: list[list[NDArray[np.int64]]] = []  # of each set: index arrays whose labels are exchanged
    for half in (discovery, ~discovery):
        members = np.flatnonzero(half)
        if groups is None:
            units.append([np.array([m]) for m in members])
            continue
        names = np.asarray(groups)[members]
        pure = []
        for name in np.unique(names):
            group = members[names == name]
            if labels[group].all() or not labels[group].any():
                pure.append(group)
            else:
                units.append([np.array([m]) for m in group])
        units.append(pure)
    for row in out:
        for exchange in units:
            for unit, value in zip(exchange, rng.permutation([labels[unit[0]] for unit in exchange]), strict=True):
                row[unit] = value
    return out


# Intervals -------------------------------------------------------------------------------------------------------------


def bootstrap_weights(
    labels: NDArray[np.bool_], groups: Sequence[str] | None, n: int, rng: np.random.Generator
) -> Array:
    """How often each sentence is drawn in each of n resamples, [resample, sentence]: sentences within classes, or whole groups."""
    if groups is None:
        weights = np.zeros((n, len(labels)))
        for value in (False, True):
            members = np.flatnonzero(labels == value)
            weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n)
        return weights
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n).astype(float)[:, number]


def weighted_auc(values: Array, labels: NDArray[np.bool_], weights: Array) -> Array:
    """AUC of one column [sentence] under each row of weights [resample, sentence]; nan where a resample lacks a class."""
    wins = np.sign(values[labels][:, None] - values[~labels][None]) / 2 + 0.5
    positive, negative = weights[:, labels], weights[:, ~labels]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((positive @ wins) * negative).sum(1) / (positive.sum(1) * negative.sum(1))
