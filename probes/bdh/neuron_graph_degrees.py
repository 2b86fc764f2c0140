"""Degree tails: is "heavy-tailed" a power law? Maximum likelihood, Kolmogorov–Smirnov, and a test against the log-normal.

After Clauset, Shalizi and Newman (2009): degrees k ≥ xmin as a discrete power law p(k) = k^(−α) / ζ(α, xmin), α by maximum likelihood, xmin
where the distance D between fitted and observed distribution is least; then Vuong's likelihood-ratio test against a log-normal on the
same tail. R > 0 favours the power law, R < 0 the log-normal, and a large p says that the degrees cannot tell. A straight line in a
log-log plot is no evidence. Fits are those of the `powerlaw` package, by exact numerical maximisation; its log-normal of whole numbers
gives k the probability of (k − ½, k + ½], cut off below xmin.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.bdh.neuron_graph import NeuronGraph
from workbench.lab.catalogue import implements

EXPONENTS = (1.01, 20.0)
"""Where α is looked for. The package's own limit of 3 would cut off steeper tails."""
UNDECIDED = 0.1
"""From this p on, the two distributions count as indistinguishable."""


@dataclass(frozen=True)
class DegreeTail:
    """A power-law fit to degrees above 0.

    Args:
        alpha, alpha_sd: exponent and its standard error. xmin: where the tail begins. ks: distance D of the fit on the tail.
        n_tail, n_positive, n_zero: neurons in the tail, with edges, and without.
        mu, sigma: of the log-normal on the same tail, in log degrees. ks_log_normal: its distance D.
        log_likelihood_ratio: Vuong's normalised R against the log-normal. p: two-sided.
        ccdf: (degree k, share of neurons with edges that have at least k) for every degree that occurs, [degree, 2].
    """

    alpha: float
    alpha_sd: float
    xmin: int
    ks: float
    n_tail: int
    n_positive: int
    n_zero: int
    mu: float
    sigma: float
    ks_log_normal: float
    log_likelihood_ratio: float
    p: float
    ccdf: NDArray[np.float64]

    @property
    def verdict(self) -> str:
        """`"power law"`, `"log-normal"`, or `"undecided"` where p is at least 0.1."""
        if not self.p < UNDECIDED:
            return "undecided"
        return "power law" if self.log_likelihood_ratio > 0 else "log-normal"

    @property
    def fitted(self) -> NDArray[np.float64]:
        """(k, share by the power law, share by the log-normal) from xmin to the largest degree, beside `ccdf`: [degree, 3]."""
        degrees = np.arange(self.xmin, int(self.ccdf[-1, 0]) + 1)
        share = self.n_tail / self.n_positive
        laws = power_law_ccdf(degrees, self.alpha, self.xmin), log_normal_ccdf(degrees, self.mu, self.sigma, self.xmin)
        return np.column_stack([degrees, *(share * law for law in laws)])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "ccdf"} | {
            "ccdf": self.ccdf.tolist(),
            "verdict": self.verdict,
        }

    def __repr__(self) -> str:
        return (
            f"DegreeTail(α {self.alpha:.2f} ± {self.alpha_sd:.2f} from degree {self.xmin} on, D {self.ks:.3f}, {self.n_tail} of "
            f"{self.n_positive} neurons with edges; log-normal D {self.ks_log_normal:.3f}, R {self.log_likelihood_ratio:.2f}, "
            f"p {self.p:.2g}: {self.verdict})"
        )


def degree_ccdf(degrees: NDArray[np.int64]) -> NDArray[np.float64]:
    """(k, share of positive degrees that are at least k) for every k that occurs, [degree, 2]."""
    values, counts = np.unique(degrees[degrees > 0], return_counts=True)
    return np.column_stack([values, counts[::-1].cumsum()[::-1] / max(1, counts.sum())])


def power_law_ccdf(degrees: Any, alpha: float, xmin: int) -> NDArray[np.float64]:
    """P(degree ≥ k) of the discrete power law from xmin on, for each k."""
    from scipy.special import zeta

    return np.asarray(zeta(alpha, degrees) / zeta(alpha, xmin))


def log_normal_ccdf(degrees: Any, mu: float, sigma: float, xmin: int) -> NDArray[np.float64]:
    """P(degree ≥ k) of the discrete log-normal from xmin on, for each k; by logarithms, since xmin may lie far in its tail."""
    from scipy.stats import norm

    tail = norm.logsf((np.log(np.asarray(degrees) - 0.5) - mu) / sigma)
    return np.asarray(np.exp(tail - norm.logsf((np.log(xmin - 0.5) - mu) / sigma)))


def distance(tail: NDArray[np.int64], mu: float, sigma: float, xmin: int) -> float:
    """Kolmogorov–Smirnov distance of degrees [neuron] from the log-normal; the package's own is that of a continuous one."""
    values, counts = np.unique(tail, return_counts=True)
    fitted = 1 - log_normal_ccdf(values + 1, mu, sigma, xmin)
    return float(np.abs(counts.cumsum() / len(tail) - fitted).max())


def fit_degree_tail(degrees: Any, xmin: int | None = None) -> DegreeTail:
    """Fit the tail of degrees [neuron]; `xmin` fixes where it begins.

    Raises ValueError for degrees that are no counts, or with fewer than three different values in the tail: nothing can be fitted.
    """
    import powerlaw

    degrees = np.asarray(degrees)
    if degrees.ndim != 1 or (degrees < 0).any() or not np.array_equal(degrees, np.round(degrees)):
        raise ValueError(f"degrees has shape {degrees.shape}; expected whole numbers from 0, one per neuron.")
    positive = degrees[degrees > 0].astype(int)
    distinct = np.unique(positive if xmin is None else positive[positive >= xmin])
    if len(distinct) < 3:
        raise ValueError(f"The tail has {len(distinct)} different degrees; expected at least 3. Use more edges.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trial values of xmin; what was settled on is in the result
        fit = powerlaw.Fit(
            positive,
            discrete=True,
            xmin=xmin,
            estimate_discrete=False,
            parameter_ranges={"alpha": EXPONENTS},
            verbose=False,
        )
        ratio, p = fit.distribution_compare("power_law", "lognormal", normalized_ratio=True)
        other = fit.lognormal
    law = fit.power_law
    alpha, begins = float(law.alpha), int(law.xmin)
    n_tail = int((positive >= begins).sum())
    return DegreeTail(
        alpha=alpha,
        alpha_sd=standard_error(alpha, begins, n_tail),
        xmin=begins,
        ks=float(law.D),
        n_tail=n_tail,
        n_positive=len(positive),
        n_zero=len(degrees) - len(positive),
        mu=float(other.mu),
        sigma=float(other.sigma),
        ks_log_normal=distance(positive[positive >= begins], float(other.mu), float(other.sigma), begins),
        log_likelihood_ratio=float(ratio),
        p=float(p),
        ccdf=degree_ccdf(degrees),
    )


def standard_error(alpha: float, xmin: int, n: int) -> float:
    """Of the discrete maximum-likelihood exponent: 1 / √(n · d² ln ζ(α, xmin) / dα²), the inverse root of the Fisher information."""
    from scipy.special import zeta

    h = 1e-4 * alpha
    logs = [np.log(zeta(alpha + step, xmin)) for step in (-h, 0, h)]
    return float(1 / np.sqrt(n * (logs[0] - 2 * logs[1] + logs[2]) / h**2))


@implements("bdh", "probe", "degree_tails", note="the paper shows histograms; this fits and tests them")
def degree_tails(graph: NeuronGraph, xmin: int | None = None) -> dict[str, DegreeTail]:
    """Fits by direction: `"in"` (degrees of targets) and `"out"` (of sources); `"all"` for an undirected graph."""
    if not graph.directed:
        return {"all": fit_degree_tail(graph.in_degrees(), xmin)}
    targets = np.unique(graph.product.columns.numpy())  # of rotary pairs only the even neuron can be a target
    return {"in": fit_degree_tail(graph.in_degrees()[targets], xmin), "out": fit_degree_tail(graph.out_degrees(), xmin)}
