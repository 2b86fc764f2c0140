"""Online code length: how many bits the labels cost somebody who has the activations (Voita & Titov 2020, equation 3).

    L_online = t_1 log2 K + Σ_i −log2 p_i(y_{t_i+1 … t_{i+1}} | x)        p_i fitted on the first t_i examples

The first block is sent with the uniform code; each next one with a probe fitted on all before it. Accuracy asks how well a probe does
once it has seen everything, code length also how soon: a fact that takes many examples to extract costs more.
compression = n log2 K / L_online; 1 means that the activations tell nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import Any

import numpy as np

from probes.linear.classifier import fit_probe
from probes.linear.examples import Examples
from probes.progress import Progress

SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)  # of the paper


@dataclass(frozen=True)
class OnlineCode:
    """Code lengths in bits.

    Args:
        block_ends: number of examples sent after each block. bits: of each block. uniform: of all labels by the uniform code.
    """

    block_ends: tuple[int, ...]
    bits: tuple[float, ...]
    uniform: float

    @property
    def total(self) -> float:
        """L_online."""
        return float(sum(self.bits))

    @property
    def compression(self) -> float:
        """uniform / online."""
        return self.uniform / self.total

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "block_ends": list(self.block_ends), "bits": list(self.bits), "uniform": self.uniform, "total": self.total,
            "compression": self.compression,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"OnlineCode({self.total:.0f} of {self.uniform:.0f} bits, compression {self.compression:.2f})"


def online_code(
    examples: Examples,
    probe: Any = "linear",
    *,
    shares: Sequence[float] = SHARES,
    n_classes: int | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> OnlineCode:
    """The online code length of all labels.

    Documents are sent in random order, each whole, so that what comes next is always new; without documents, examples.

    Args:
        probe: as for `fit_probe`; it must give probabilities. shares: where blocks end, as shares of the examples, ascending to 1.
        n_classes: K of the uniform code (None: the classes that occur).

    Raises:
        ValueError: shares that do not ascend to 1, fewer than two classes, a probe without `predict_proba`.
        MeasurementCancelled: `cancel` was set.
    """
    shares = tuple(shares)
    if not shares or shares[-1] != 1 or list(shares) != sorted(set(shares)) or shares[0] <= 0:
        raise ValueError(f"shares are {shares}; expected numbers that ascend to 1.")
    classes = examples.classes
    n_classes = n_classes or len(classes)
    if n_classes < 2 or n_classes < len(classes):
        raise ValueError(
            f"n_classes is {n_classes} and {len(classes)} labels occur. Expected at least two classes, and all that occur."
        )
    examples = _shuffled(examples, seed)
    n = len(examples)
    # a block in which only one class has been seen leaves nothing to fit, so such blocks join the first
    several = int(np.argmax(examples.labels != examples.labels[0])) + 1
    ends = sorted({max(several, round(share * n)) for share in shares})
    bits = [ends[0] * np.log2(n_classes)]
    for number, (start, stop) in enumerate(pairwise(ends)):
        Progress(progress, cancel)((number + 1) / len(ends), f"{start} of {n} examples")
        estimator = fit_probe(examples[:start], probe)
        bits.append(_cost(estimator, examples[start:stop], start, n_classes))
    return OnlineCode(tuple(ends), tuple(float(b) for b in bits), n * float(np.log2(n_classes)))


def _shuffled(examples: Examples, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    if examples.documents is None:
        return examples[rng.permutation(len(examples))]
    names, number = np.unique(examples.documents, return_inverse=True)
    return examples[np.argsort(rng.permutation(len(names))[number], kind="stable")]


def _cost(estimator: Any, block: Examples, seen: int, n_classes: int) -> float:
    """Bits of a block's labels. While a class has not been seen, every class gets one imagined example, so that it can be sent at all."""
    if not hasattr(estimator, "predict_proba"):
        raise ValueError(
            f"{estimator!r} gives no probabilities, which a code is made of. Expected a probe with predict_proba."
        )
    known = np.asarray(estimator.classes_)
    p = estimator.predict_proba(block.features)
    column = np.searchsorted(known, block.labels).clip(max=len(known) - 1)
    has = known[column] == block.labels
    right = np.where(has, p[np.arange(len(block)), column], 0.0)
    if len(known) < n_classes:
        right = (seen * right + 1) / (seen + n_classes)
    return float(-np.log2(right.clip(min=np.finfo(float).tiny)).sum())
