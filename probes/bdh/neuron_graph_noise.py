"""What noise would do: a threshold that a chosen share of noise stays below, and how many edges noise alone has beyond one.

Noise is read off the matrix itself. Entries of the other sign, mirrored, are what random wiring does to both sides: this is the
symmetric part min(f(x), f(−x)) of Kosowski et al. 2025 (figure 9a) wherever the wanted side is the heavier one, and a cautious stand-in
where it is not. Strengths and counts have no other sign; there, noise is the same activity with its tokens shuffled.
"""

import math

from probes.bdh.neuron_graph_edges import MOST_EDGES, Product, check_sign, largest

OTHER = {"positive": "negative", "negative": "positive"}
SEED = 0
"""Of the order in which tokens are shuffled."""


def noise_of(product: Product, sign: str) -> tuple[Product, str]:
    """(matrix, sign) of the entries that count as noise. Raises ValueError where both signs are wanted, so that none is left."""
    check_sign(sign)
    if product.one_signed:
        return product.shuffled(SEED), "positive"
    if sign not in OTHER:
        raise ValueError(f"sign is {sign!r}: noise is told by the other sign. Expected positive or negative.")
    return product, OTHER[sign]


def noise_threshold(product: Product, quantile: float, sign: str = "positive") -> float:
    """The size that a share `quantile` of noise does not exceed, exactly: at most (1 − quantile) · (entries of noise) are beyond it.

    Raises ValueError for a quantile outside 0 … 1 or so low that more than 2²⁵ entries of noise are beyond it.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"noise_quantile is {quantile}; expected more than 0 and less than 1, such as 0.999.")
    noise, side = noise_of(product, sign)
    entries = sizes = 0
    for _, values, kept in noise.blocks():
        wanted = kept & ((values < 0) if side == "negative" else (values > 0))
        sizes += int(wanted.sum())
        entries += int(kept.sum()) if product.one_signed else int(wanted.sum())
    beyond = math.floor(round((1 - quantile) * entries, 6))
    if beyond > MOST_EDGES:
        raise ValueError(
            f"noise_quantile {quantile} leaves {beyond:,} entries of noise beyond it. Expected a higher one."
        )
    if beyond >= sizes:
        return 0.0
    return float(abs(largest(noise, beyond + 1, side).weight[-1]))


def noise_edges(product: Product, threshold: float, sign: str = "positive") -> int:
    """How many entries of noise are at least as large as `threshold`."""
    noise, side = noise_of(product, sign)
    found = 0
    for _, values, kept in noise.blocks():
        size = -values if side == "negative" else values
        found += int(((size >= threshold) & (size > 0) & kept).sum())
    return found
