"""The entries of a neuron × neuron matrix that is given by its factors, read one block of rows at a time: largest entries, histogram.

At n = 32,768 a head pair has 67 million entries and the whole matrix a thousand million; a block holds two million of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.instrument.errors import suggestion

BLOCK = 2**21
"""Numbers per block: 8 MB in float32."""
MOST_EDGES = 2**25
SIGNS = ("positive", "negative", "both")


def check_sign(sign: str) -> None:
    """Raises ValueError with the nearest name."""
    if sign not in SIGNS:
        raise ValueError(f"Unknown sign {sign!r}.{suggestion(sign, SIGNS)} Expected one of {', '.join(SIGNS)}.")


@dataclass(frozen=True)
class Product:
    """The matrix left @ right, [source, target]; with two parts, the length √(part₁² + part₂²) of each entry.

    Args:
        left: [part, source, inner]. right: [part, inner, target]. columns: the neuron that each target column stands for [target].
        left_out: `"nothing"`, `"self"` (entries of a neuron with itself) or `"half"` (those and the lower half of a symmetric matrix).
        one_signed: no entry can be negative, and `inner` are tokens.
    """

    left: Tensor
    right: Tensor
    columns: Tensor
    left_out: str = "nothing"
    one_signed: bool = False

    @classmethod
    def of(cls, left: Tensor, right: Tensor, left_out: str) -> "Product":
        """From [source, inner] and [inner, target]."""
        return cls(left[None], right[None], torch.arange(right.shape[1]), left_out)

    @property
    def shape(self) -> tuple[int, int]:
        """(sources, targets)."""
        return int(self.left.shape[1]), int(self.right.shape[2])

    def gaussian(self, seed: int) -> "Product":
        """Independent normal factors of the same shapes: a random matrix of the same rank."""
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in (self.left, self.right))
        return Product(left, right, self.columns, self.left_out)

    def shuffled(self, seed: int) -> "Product":
        """The same activity with the tokens of the left in another order: every neuron as active, coincidence only by chance."""
        order = torch.randperm(self.left.shape[2], generator=torch.Generator().manual_seed(seed))
        return replace(self, left=self.left[:, :, order])

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(rows [row], values [row, target], kept [row, target]): kept is False where an entry is left out."""
        sources, targets = self.shape
        for rows in torch.arange(sources).split(max(1, BLOCK // targets)):
            parts = self.left[:, rows] @ self.right
            values = torch.hypot(parts[0], parts[1]) if len(parts) == 2 else parts[0]
            if self.left_out == "self":
                kept = rows[:, None] != self.columns
            elif self.left_out == "half":
                kept = rows[:, None] < self.columns
            else:
                kept = torch.ones_like(values, dtype=torch.bool)
            yield rows, values, kept


@dataclass(frozen=True)
class Edges:
    """Entries of a matrix, largest first: neurons source, target [edge] and signed weight [edge]."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.weight)


def largest(product: Product, m: int, sign: str = "positive") -> Edges:
    """The m largest entries (most negative; largest in size). Ties: the earlier source, then the earlier target.

    Raises ValueError where fewer than m entries have the sign.
    """
    check_sign(sign)
    if m < 1:
        raise ValueError(f"The number of edges is {m}; expected at least 1.")
    running = _Running(product, sign)
    for rows, values, kept in product.blocks():
        running.add(rows, values, kept)
        if len(running.size) > 2 * m:
            running.keep(m)
    if len(running.size) < m:
        kind = {"positive": "positive", "negative": "negative", "both": "non-zero"}[sign]
        raise ValueError(f"{m} edges were asked for, but only {len(running.size)} entries are {kind}.")
    running.keep(m)
    return running.edges()


def above(product: Product, threshold: float, sign: str = "positive") -> Edges:
    """All entries beyond a threshold ≥ 0, largest first. Raises ValueError for more than 2²⁵ of them."""
    check_sign(sign)
    if threshold < 0:
        raise ValueError(f"The threshold is {threshold}; expected at least 0.")
    running = _Running(product, sign, threshold)
    for rows, values, kept in product.blocks():
        running.add(rows, values, kept)
        if len(running.size) > MOST_EDGES:
            raise ValueError(f"More than {MOST_EDGES:,} entries exceed {threshold:.4g}. Expected a higher threshold.")
    running.keep(len(running.size))
    return running.edges()


class _Running:
    """Entries whose size exceeds `floor`, in row order until `keep` sorts them."""

    def __init__(self, product: Product, sign: str, floor: float = 0.0) -> None:
        self.sign, self.floor, self.columns = sign, floor, product.columns
        self.size = product.left.new_empty(0)
        self.weight = product.left.new_empty(0)
        self.rows = self.targets = torch.empty(0, dtype=torch.long)

    def add(self, rows: Tensor, values: Tensor, kept: Tensor) -> None:
        size = {"positive": values, "negative": -values, "both": values.abs()}[self.sign]
        row, column = ((size > self.floor) & kept).nonzero(as_tuple=True)
        self.size = torch.cat([self.size, size[row, column]])
        self.weight = torch.cat([self.weight, values[row, column]])
        self.rows = torch.cat([self.rows, rows[row]])
        self.targets = torch.cat([self.targets, self.columns[column]])

    def keep(self, m: int) -> None:
        order = self.size.argsort(descending=True, stable=True)[:m]
        self.size, self.weight = self.size[order], self.weight[order]
        self.rows, self.targets = self.rows[order], self.targets[order]
        if 0 < m <= len(order):
            self.floor = max(self.floor, float(self.size[-1]))

    def edges(self) -> Edges:
        return Edges(self.rows.numpy(), self.targets.numpy(), self.weight.double().numpy())


# Distribution of all entries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightDistribution:
    """Histogram f of all entries and its decomposition (Kosowski et al. 2025, figure 9a).

    Args:
        centres: [bin], symmetric about 0. counts: f [bin]. symmetric: min(f(x), f(−x)) [bin], read as noise.
        size, mean, sd, skewness, excess_kurtosis: of all entries. sigma_q: standard deviation of the symmetric part.
    """

    centres: NDArray[np.float64]
    counts: NDArray[np.int64]
    symmetric: NDArray[np.int64]
    size: int
    mean: float
    sd: float
    skewness: float
    excess_kurtosis: float
    sigma_q: float

    @property
    def skew_part(self) -> NDArray[np.int64]:
        """f − symmetric part [bin]: what one sign has and the other lacks."""
        return self.counts - self.symmetric

    def tails(self, multiple: float) -> tuple[int, int]:
        """Entries (above multiple · σ_Q, below −multiple · σ_Q), to the resolution of a bin."""
        beyond = self.centres > multiple * self.sigma_q
        return int(self.counts[beyond].sum()), int(self.counts[beyond[::-1]].sum())

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {name: getattr(self, name).tolist() for name in ("centres", "counts", "symmetric")} | {
            name: getattr(self, name) for name in ("size", "mean", "sd", "skewness", "excess_kurtosis", "sigma_q")
        }

    def __repr__(self) -> str:
        right, left = self.tails(4)
        return (
            f"WeightDistribution({self.size:,} entries, mean {self.mean:.3g}, sd {self.sd:.3g}, skewness {self.skewness:.2f}, "
            f"excess kurtosis {self.excess_kurtosis:.2f}, σ_Q {self.sigma_q:.3g}; beyond 4 σ_Q: {right} right, {left} left)"
        )


def distribution(product: Product, bins: int = 1000) -> WeightDistribution:
    """Moments and histogram (`bins` on either side of 0) in two passes. Raises ValueError for a matrix without any variation."""
    if bins < 10:
        raise ValueError(f"bins is {bins}; expected at least 10 on either side of 0.")
    size, largest_size, sums = 0, 0.0, np.zeros(4)
    for _, values, kept in product.blocks():
        entries = values[kept].double()
        size += len(entries)
        largest_size = max(largest_size, float(entries.abs().max())) if len(entries) else largest_size
        sums += [float(entries.pow(power).sum()) for power in (1, 2, 3, 4)]
    mean, second, third, fourth = sums / max(1, size)
    variance = second - mean**2
    if not variance > 0:
        raise ValueError("All entries of the matrix are equal, so it has no distribution to speak of.")
    edges = np.linspace(-largest_size, largest_size, 2 * bins + 1)
    counts = np.zeros(2 * bins, np.int64)
    for _, values, kept in product.blocks():
        counts += np.histogram(values[kept].double().clamp(-largest_size, largest_size).numpy(), edges)[0]
    centres = (edges[1:] + edges[:-1]) / 2
    symmetric = np.minimum(counts, counts[::-1])
    noise = float(np.sqrt((symmetric * centres**2).sum() / symmetric.sum())) if symmetric.any() else 0.0
    return WeightDistribution(
        centres,
        counts,
        symmetric,
        size,
        float(mean),
        float(np.sqrt(variance)),
        float((third - 3 * mean * second + 2 * mean**3) / variance**1.5),
        float((fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2 - 3),
        noise,
    )
