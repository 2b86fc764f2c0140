"""Every probe's scores in one form, so that maps, lists and curves need not know the probes.

    tables = score_tables(results["census"])
    tables["induction"].values           [layer, head], with `low` and `high` around it and what chance gives
    tables["induction"].stands_out(twin_tables["induction"])

A head stands out where the low end of its interval is above what chance gives *and* above the best head of the random twin, as for the
labels of the census, which ask for a least score besides. Where there is no interval (one sequence only), no head stands out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.census import Census
from probes.heads import HeadScores
from probes.long_context import AdaptiveHeads, SegmentAttention
from probes.retrieval import RetrievalScores
from probes.sinks import SinkReport

Array = NDArray[np.float64]
RESAMPLES = 1000
SINK_SCORES = ("first_mass", "sink_rate", "sink_mass")


@dataclass(frozen=True)
class ScoreTable:
    """One score of every head, [layer, head], nan where a layer has fewer heads or cannot show it.

    Args:
        low, high: bootstrap interval over sequences (or runs), nan where there is none. chance: what a head without the habit scores,
            [layer], nan where that is not known in closed form.
    """

    values: Array
    low: Array
    high: Array
    chance: Array

    def null(self, twin: "ScoreTable | None") -> float:
        """The best score among the twin's heads; nan without a twin."""
        return float("nan") if twin is None or np.isnan(twin.values).all() else float(np.nanmax(twin.values))

    def stands_out(self, twin: "ScoreTable | None" = None) -> NDArray[np.bool_]:
        """Heads whose interval lies above chance and above the twin's best head, [layer, head]."""
        floor = np.fmax(self.chance, self.null(twin))[:, None]
        return np.asarray(self.low > np.where(np.isnan(floor), 0.0, floor))


def score_tables(result: Any, *, level: float = 0.95, seed: int = 0) -> dict[str, ScoreTable]:
    """The tables of a probe's result by score: empty for one that gave no answer. Census intervals are its own."""
    if isinstance(result, HeadScores):
        return {
            name: _table(values, *result.interval(name, level, seed=seed), 0.0)
            for name, values in result.scores.items()
        }
    if isinstance(result, Census):
        chance = {"broad": float("nan")}
        return {
            name: _table(values, result.low[name], result.high[name], chance.get(name, 0.0))
            for name, values in result.scores.items()
        }
    if isinstance(result, SinkReport):
        found = {}
        for name in SINK_SCORES:
            values = getattr(result, name)
            low, high = _ends(result.by_sequence.get(name), values, level, seed)
            found[name] = _table(values, low, high, result.first_chance if name == "first_mass" else float("nan"))
        return found
    if isinstance(result, RetrievalScores):
        counted = result.by_run[result.counted]
        random_read = float(
            np.mean([1 / length for length, kept in zip(result.lengths, result.counted, strict=True) if kept])
        )
        return {"score": _table(result.scores, *_ends(counted, result.scores, level, seed), random_read)}
    if isinstance(result, (AdaptiveHeads, SegmentAttention)):
        return {"score": _table(result.scores, *_ends(result.by_sequence, result.scores, level, seed), float("nan"))}
    return {}


def twin_tables(result: Any) -> dict[str, ScoreTable]:
    """The tables of the random twin that a census was compared with; empty without one."""
    if not isinstance(result, Census):
        return {}
    empty = {name: np.full_like(values, np.nan) for name, values in result.twin.items()}
    return {name: _table(values, empty[name], empty[name], float("nan")) for name, values in result.twin.items()}


def layer_labels(result: Any) -> list[str]:
    """What the rows of a result's tables are called: `3`, or `3·1` where depth shares weights."""
    layers = getattr(result, "layers", ())
    return ["·".join(map(str, layer)) if isinstance(layer, tuple) else str(layer) for layer in layers]


def _table(values: Array, low: Array, high: Array, chance: float | Array) -> ScoreTable:
    return ScoreTable(values, low, high, np.broadcast_to(np.asarray(chance, dtype=np.float64), values.shape[:1]).copy())


def _ends(cases: Array | None, values: Array, level: float, seed: int) -> tuple[Array, Array]:
    """Percentile interval of the mean of cases [case, layer, head]; nan with fewer than two."""
    if cases is None or len(cases) < 2:
        return np.full_like(values, np.nan), np.full_like(values, np.nan)
    count = len(cases)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    means = np.einsum("rc,clh->rlh", drawn, cases)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return low, high
