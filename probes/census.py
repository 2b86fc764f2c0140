"""The head census: what every head of a model reads, corrected for chance, with an interval and against a random twin.

    found = head_census(model)                    on the induction task with varied periods
    found = head_census(model, tokens)            on texts of your own
    found.label(1, 2)                             "induction", or "" if nothing stands out
    found.table()                                 one row per head

Scores are those of `probes.heads` (previous, own, first and next token, duplicates, induction, n-grams, delimiters, nearest embedding)
and, besides:

* `broad`: entropy of a row over the entropy of reading everything that it sees alike, 1 for a head that spreads evenly;
* `offset`: the distance k ≥ 2 at which the mean weight most exceeds chance, and by how much.

Each score has a bootstrap interval over sequences. `null` is the same score of a model of the same configuration with random weights
(another seed), the largest over its heads: a label is given only where the interval's low end is above it. The label is a description of
where a head looks on these texts, not of what it is for; for that, take it away (`probes.retrieval`, `Ablate`).

Heads are also clustered by the Jensen–Shannon distance of what they read (Clark et al. 2019), averaged over rows: `clusters`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.heads import MORE_PROBES, PROBES, HeadScores, head_scores
from probes.sinks import plain, stacked
from probes.statistics import Layer
from workbench.instrument.errors import RefusedByPattern, suggestion
from workbench.instrument.patterns import Pattern
from workbench.lab.tasks import TaskBatch, make_task

DEFAULT = ("previous_token", "current_token", "first_token", "duplicate_token", "induction")
OTHER = ("broad", "offset")
LEAST = {"broad": 0.9}  # below which a score gives no label even if it is above the null
LEAST_SCORE = 0.2
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Census:
    """Result of `head_census`; arrays are [layer, head] in the order of `layers`.

    Args:
        scores, low, high: by probe, the score and its bootstrap interval. null: by probe, the largest score of a random twin's heads
            (nan without a twin). offset: [layer, head], the distance that the score `offset` is about. left_out: probes without an
            answer on these texts, and why.
        distance: root of the mean Jensen–Shannon divergence between heads, [head, head] in the order of `heads`,
            from 0 to 1 (base 2).
        clusters: cluster number of each of `heads`. layers: layer numbers, or (layer, step). settings: how it was measured.
        twin: the random twin's scores, [layer, head] by probe; empty without one.
    """

    scores: dict[str, NDArray[np.float64]]
    low: dict[str, NDArray[np.float64]]
    high: dict[str, NDArray[np.float64]]
    null: dict[str, float]
    offset: NDArray[np.int64]
    left_out: dict[str, str]
    distance: NDArray[np.float64]
    clusters: NDArray[np.int64]
    heads: tuple[tuple[Layer, int], ...]
    layers: tuple[Layer, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    twin: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)

    def label(self, layer: Layer, head: int) -> str:
        """The probe with the largest score among those that stand out (interval above the null and score above a floor); "" if none."""
        row = self.layers.index(layer)
        standing = [
            (float(values[row, head]), name)
            for name, values in self.scores.items()
            if values[row, head] > LEAST.get(name, LEAST_SCORE)
            and not self.low[name][row, head] <= max(self.null.get(name, np.nan), 0.0)
        ]
        specific = [found for found in standing if found[1] != "broad"] or standing
        if not specific:
            return ""
        name = max(specific)[1]
        return f"offset {self.offset[row, head]}" if name == "offset" else name

    def table(self) -> list[dict[str, Any]]:
        """One row per head: layer, head, label, cluster and every score."""
        return [
            {
                "layer": layer,
                "head": head,
                "label": self.label(layer, head),
                "cluster": int(self.clusters[number]),
                **{name: float(values[self.layers.index(layer), head]) for name, values in self.scores.items()},
            }
            for number, (layer, head) in enumerate(self.heads)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, nan as None."""
        arrays = {name: getattr(self, name) for name in ("scores", "low", "high")}
        return {
            **{name: {probe: plain(values) for probe, values in by.items()} for name, by in arrays.items()},
            "null": {name: value if np.isfinite(value) else None for name, value in self.null.items()},
            "offset": self.offset.tolist(),
            "left_out": self.left_out,
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "heads": [[list(layer) if isinstance(layer, tuple) else layer, head] for layer, head in self.heads],
            "labels": [self.label(layer, head) for layer, head in self.heads],
            "clusters": self.clusters.tolist(),
            "settings": self.settings,
        }


def head_census(
    model: Any,
    batch: TaskBatch | Tensor | None = None,
    probes: Sequence[str] = DEFAULT,
    *,
    mask: Tensor | None = None,
    twin: Any = None,
    delimiters: Sequence[int] = (),
    clusters: int = 4,
    level: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> Census:
    """Score, label and cluster every head that has a pattern over tokens.

    Args:
        model: a hooked model. batch: a task's batch or token ids [batch, pos]; None: 16 sequences of the induction task.
        probes: names from `probes.heads` (`PROBES`, `MORE_PROBES`). A probe that these texts cannot answer is left out and named.
        mask: True at real tokens. twin: a model of the same shape with random weights for the null; None: none, see `random_twin`.
        delimiters: token ids for `delimiter`. clusters: how many. level: of the bootstrap intervals. seed: of the bootstrap.
        progress: called as (fraction, message).

    Raises:
        ValueError: an unknown probe, or no probe that these texts can answer.
    """
    for probe in probes:
        if probe not in (*PROBES, *MORE_PROBES):
            known = (*PROBES, *MORE_PROBES)
            raise ValueError(f"Unknown probe {probe!r}.{suggestion(probe, known)} Known: {', '.join(known)}.")
    if batch is None:
        size = min(model.vocab_size, 128)
        length = min(96, model.n_ctx or 96)
        batch = make_task("induction", vocab_size=size, length=length, seed=seed).batch(16, split="validation")
    say = progress or (lambda fraction, message: None)
    found: dict[str, HeadScores] = {}
    left_out: dict[str, str] = {}
    untrained: dict[str, NDArray[np.float64]] = {}
    options: dict[str, Any] = {"mask": mask, "delimiters": delimiters}
    for number, probe in enumerate(probes):
        say(0.6 * number / len(probes), probe.replace("_", " "))
        try:
            found[probe] = head_scores(model, batch, probe, **options)
            if twin is not None:
                untrained[probe] = head_scores(twin, batch, probe, **options)[probe]
        except RefusedByPattern:
            raise
        except ValueError as error:
            left_out[probe] = str(error)
    if not found:
        raise ValueError("None of the probes has an answer on these texts. " + " ".join(left_out.values()))
    intervals = {probe: scores.interval(probe, level, seed=seed) for probe, scores in found.items()}
    scores = {probe: result[probe] for probe, result in found.items()}
    low, high = ({probe: pair[side] for probe, pair in intervals.items()} for side in (0, 1))
    tokens: Tensor = model.to_tokens(batch.tokens if isinstance(batch, TaskBatch) else batch)
    say(0.65, "broad heads, offsets and clusters")
    shape = _shape_scores(model, tokens, mask, level, seed)
    for name in OTHER:
        scores[name], low[name], high[name] = shape[name]
    if twin is not None:
        say(0.9, "random twin")
        theirs = _shape_scores(twin, tokens, mask, level, seed)
        untrained |= {name: theirs[name][0] for name in OTHER}
    null = {name: _highest(values) for name, values in untrained.items() if name != "broad"}
    layers = next(iter(found.values())).layers
    heads = tuple(
        (layer, h)
        for row, layer in enumerate(layers)
        for h in np.flatnonzero(~np.isnan(shape["broad"][0][row])).tolist()
    )
    return Census(
        scores,
        low,
        high,
        null,
        shape["distances"],
        left_out,
        shape["between"],
        cluster(shape["between"], clusters),
        heads,
        layers,
        {"sequences": len(tokens), "tokens": tokens.shape[1], "level": level, "twin": twin is not None, "seed": seed},
        untrained,
    )


def random_twin(model: Any, seed: int = 1) -> Any:
    """A model of the same architecture, configuration and tokenizer with random weights of another seed."""
    import models

    if model.config is None or model.architecture == "unknown":
        raise ValueError(
            f"{model.name} does not say how it was built, so no twin can be. Expected a model of `models.build` or `models.load`."
        )
    twin = models.build(model.architecture, config=model.config, seed=seed)
    twin.tokenizer = model.tokenizer
    return twin


def cluster(distance: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Clusters of heads by average linkage, numbered from 1 in order of first appearance. distance [head, head]."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(distance) < 2:
        return np.ones(len(distance), dtype=np.int64)
    labels = fcluster(linkage(squareform(distance, checks=False), "average"), count, "maxclust")
    order = {label: number + 1 for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()])


def jensen_shannon(p: Tensor) -> Tensor:
    """Mean Jensen–Shannon divergence in bits between heads over rows that read something: [batch, head, query, key] -> [head, head]."""
    heads = p.shape[1]
    own = -torch.special.xlogy(p, p).sum(-1)  # [batch, head, query]
    reads = (p.sum(-1) > 0).all(1)  # [batch, query]
    found = p.new_zeros(heads, heads)
    for first in range(heads):
        middle = (p[:, first : first + 1] + p) / 2
        mixed = -torch.special.xlogy(middle, middle).sum(-1)
        divergence = mixed - (own[:, first : first + 1] + own) / 2
        found[first] = (divergence * reads[:, None]).sum((0, 2)) / reads.sum() / np.log(2)
    return found.clamp(min=0)


def _shape_scores(model: Any, tokens: Tensor, mask: Tensor | None, level: float, seed: int) -> dict[str, Any]:
    """`broad` and `offset` with intervals, the distances of `offset`, and the distance between all heads."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    padding = {} if mask is None else {"mask": mask}
    with torch.no_grad():
        patterns: dict[Layer, Pattern] = model.patterns(tokens, **padding)
    broad, offset, every = [], [], []
    distances: list[Tensor] = []
    length = int(real.sum(1).max())  # of real tokens, so that padding adds no distances
    for pattern in patterns.values():
        both = real[:, :, None] & real[:, None, :]
        visible = both if pattern.meta.causal == "none" else both.tril(-1 if pattern.meta.causal == "strict" else 0)
        p = pattern.values.double().abs() * visible[:, None]
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        choices = visible.sum(-1).double()
        rows = (choices > 1)[:, None]
        most = choices.clamp(min=2).log()[:, None]
        evenly = -torch.special.xlogy(p, p).sum(-1) / most
        broad.append((evenly * rows).sum(-1) / rows.sum(-1).clamp(min=1))  # [batch, head]
        uniform = visible.double() / choices.clamp(min=1)[..., None]
        excess, counts = [], []
        for d in range(2, max(3, length // 2)):
            there = visible.diagonal(-d, -2, -1)
            gain = (p - uniform[:, None]).diagonal(-d, -2, -1) * there[:, None]
            excess.append(gain.sum(-1))
            counts.append(there.sum(-1).double())
        sums, seen = (
            torch.stack(excess, -1),
            torch.stack(counts, -1)[:, None],
        )  # [batch, head, distance], [batch, 1, distance]
        overall = sums.sum(0) / seen.sum(0).clamp(min=1)
        best = overall.argmax(-1)  # chosen on all sequences; the interval is of this distance
        offset.append((sums / seen.clamp(min=1)).gather(-1, best.expand(len(sums), -1)[..., None])[..., 0])
        distances.append(best + 2)
        every.append(p)
    result: dict[str, Any] = {}
    for name, values in (("broad", broad), ("offset", offset)):
        result[name] = _bootstrapped([value.numpy() for value in values], level, seed)
    result["distances"] = stacked([d.double() for d in distances])
    result["distances"] = np.nan_to_num(result["distances"], nan=-1).astype(np.int64)
    result["between"] = jensen_shannon(torch.cat(every, 1)).sqrt().numpy()
    return result


def _bootstrapped(
    layers: list[NDArray[np.float64]], level: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean over sequences and its percentile interval; layers [sequence, head] each -> [layer, head] thrice."""
    sequences = len(layers[0])
    drawn = np.random.default_rng(seed).multinomial(sequences, np.full(sequences, 1 / sequences), 1000) / sequences
    tail = 100 * (1 - level) / 2
    means, lows, highs = [], [], []
    for values in layers:
        means.append(torch.from_numpy(values.mean(0)))
        low, high = np.percentile(drawn @ values, [tail, 100 - tail], axis=0)
        lows.append(torch.from_numpy(low))
        highs.append(torch.from_numpy(high))
    return stacked(means), stacked(lows), stacked(highs)


def _highest(scores: NDArray[np.float64]) -> float:
    return float("nan") if np.isnan(scores).all() else float(np.nanmax(scores))
