"""Where features fire: the strongest occurrences, one per document, and samples from every part of a feature's range.

Only looking at the strongest occurrences flatters a feature: most of its mass lies lower. So contexts are also drawn from equal parts of
its range of values ("quantiles" of the largest), at random among the occurrences there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from probes.features.dictionaries import Dictionary
from probes.features.interventions import checked_features
from probes.progress import Progress
from workbench.lab.activation_store import ActivationStore


@dataclass(frozen=True)
class Context:
    """One occurrence: the feature's value, where, and the tokens around it (`focus` is the index of the position among them)."""

    value: float
    sequence: int
    position: int
    tokens: list[int]
    values: list[float]  # of the feature at each of the tokens; nan where the store has no row
    focus: int


@dataclass(frozen=True)
class FeatureContexts:
    """Of one feature. `bands` holds samples from `len(bands)` equal parts of 0 … largest, lowest first; empty parts stay empty."""

    feature: int
    density: float  # share of rows on which it fires
    largest: float
    top: list[Context]
    bands: list[list[Context]]


def feature_contexts(
    store: ActivationStore,
    site: str,
    dictionary: Dictionary,
    tokens: Tensor,
    features: Sequence[int],
    *,
    top: int = 10,
    bands: int = 4,
    per_band: int = 3,
    before: int = 20,
    after: int = 10,
    seed: int = 0,
    batch_size: int = 8192,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> list[FeatureContexts]:
    """Contexts of some features, in two passes over a store.

    Args:
        tokens: the sequences that the store was harvested from, int64 [sequence, pos]. features: which.
        top: strongest occurrences, at most one per sequence. bands, per_band: samples of the parts of the range.
        before, after: tokens shown around an occurrence.

    Raises:
        ValueError: a feature that does not exist, or tokens of another text than the store's.
    """
    chosen = checked_features(dictionary, features)
    stored = (store.manifest["sequences"], store.manifest["length"])
    if tokens.shape != stored:
        raise ValueError(
            f"tokens are {list(tokens.shape)}, the store was harvested from {list(stored)} [sequence, pos]"
        )
    values = _codes(store, site, dictionary, chosen, batch_size, progress, cancel)  # [row, chosen]
    facts = store.facts()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for column, feature in enumerate(chosen):
        own = values[:, column]
        rows = own.nonzero()[:, 0]
        largest = float(own.max()) if len(own) else 0.0

        def context(row: int, own: Tensor = own) -> Context:
            return _context(row, own, facts, tokens, before, after)

        band_of = (own[rows] / max(largest, 1e-30) * bands).long().clamp_max(bands - 1)
        samples = []
        for band in range(bands):
            inside = rows[band_of == band]
            picked = inside[torch.randperm(len(inside), generator=generator)[:per_band]]
            samples.append([context(row) for row in picked.tolist()])
        strongest = [context(row) for row in _one_per_sequence(own, rows, facts["sequence"], top)]
        found.append(FeatureContexts(feature, len(rows) / max(len(own), 1), largest, strongest, samples))
    return found


@torch.no_grad()
def _codes(
    store: ActivationStore, site: str, dictionary: Dictionary, chosen: list[int], batch_size: int,
    progress: Callable[[float, str], None] | None, cancel: Event | None,
) -> Tensor:  # fmt: skip
    pieces, tell = [], Progress(progress, cancel)
    for start in range(0, len(store), batch_size):
        tell(start / len(store), f"{start:,} of {len(store):,} rows")
        stop = min(start + batch_size, len(store))
        pieces.append(dictionary.encode(store.rows(site, start, stop))[:, chosen])
    return torch.cat(pieces)


def _one_per_sequence(own: Tensor, rows: Tensor, sequence: Tensor, count: int) -> list[int]:
    """The strongest rows, the strongest of each sequence only; ties in reading order."""
    seen: set[int] = set()
    best: list[int] = []
    for row in rows[own[rows].argsort(descending=True, stable=True)].tolist():
        if int(sequence[row]) not in seen:
            seen.add(int(sequence[row]))
            best.append(row)
            if len(best) == count:
                break
    return best


def _context(row: int, own: Tensor, facts: dict[str, Tensor], tokens: Tensor, before: int, after: int) -> Context:
    sequence, position = int(facts["sequence"][row]), int(facts["position"][row])
    start, stop = max(0, position - before), min(tokens.shape[1], position + after + 1)
    first = int((facts["sequence"] < sequence).sum())
    last = int((facts["sequence"] <= sequence).sum())
    at = {int(p): float(own[first + i]) for i, p in enumerate(facts["position"][first:last].tolist())}
    shown = [at.get(p, float("nan")) for p in range(start, stop)]
    return Context(float(own[row]), sequence, position, tokens[sequence, start:stop].tolist(), shown, position - start)
