"""Long contexts: which queries need far keys, where in a prompt attention falls, what rotary positions favour, and reading parts apart.

    found = adaptive_heads(model, tokens)                  could this head have answered from its first and its last keys alone?
    profile = segment_attention(model, tokens, spans)      attention to passages by their place in the prompt
    waveform(64, distances, base=10_000)                   what a rotary base favours at each distance
    parallel_entropy(model, tokens, chunks)                entropy of the last rows, when chunks were read together and when apart

**Adaptive heads** (Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification, 2025, arXiv 2502.09647). A query is
local if the first `sinks` keys and the last `recent` keys have at least `threshold` of its weight. To know this one must look at all keys;
the criterion replaces those between by a normal law of mean μ and covariance Σ:  log Σ_j exp(s q·k_j) ≈ log N + s q·μ + ½ s² qᵀΣq.
Exact for normal keys in the limit of many; too small where single keys stand out, which is what retrieval is. Constants are ours.

**Profiles** (Attention Basin, 2025, arXiv 2508.05128): weight on a passage per token, by place; in a basin the first and the last passage
get more than those between. **Waveforms** (Fortify the Shortest Stave in Attention, 2023, arXiv 2312.04455): Σ_i cos(m θ_i) at distance
m; troughs of one base can be peaks of another. **Entropy** (Attention Entropy is a Key Factor, 2024, arXiv 2412.16545): of queries that see
all chunks, when chunks do not see each other; here every token keeps its position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_statistics import label_features
from probes.sinks import best_heads, plain, stacked
from probes.statistics import Layer, attention_statistics
from workbench.instrument.errors import RefusedByPattern
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.pieces import by_position
from workbench.instrument.selection import Select
from workbench.lab.catalogue import implements

Span = tuple[int, int]


# ---- adaptive heads --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptiveHeads:
    """Result of `adaptive_heads`; arrays are [layer, head, sequence, query], queries those with keys in between.

    Args:
        exact: share of the weight on the first and last keys. predicted: the same by the criterion. queries: their positions.
        layers: layer numbers. threshold: share from which a query counts as local.
    """

    exact: NDArray[np.float64]
    predicted: NDArray[np.float64]
    queries: tuple[int, ...]
    layers: tuple[int, ...]
    threshold: float

    @property
    def scores(self) -> NDArray[np.float64]:
        """Share of queries that are truly local, [layer, head]."""
        return (self.exact >= self.threshold).mean((2, 3))

    @property
    def by_sequence(self) -> NDArray[np.float64]:
        """The scores of every sequence, [sequence, layer, head]."""
        return (self.exact >= self.threshold).mean(3).transpose(2, 0, 1)

    def best(self, n: int = 5) -> list[tuple[Layer, int, float]]:
        """The n heads of largest score as (layer, head, score)."""
        return best_heads(self.scores, self.layers, n)

    @property
    def predicted_scores(self) -> NDArray[np.float64]:
        """Share of queries that the criterion calls local, [layer, head]."""
        return (self.predicted >= self.threshold).mean((2, 3))

    @property
    def missed(self) -> float:
        """Share of the queries that need far keys which the criterion calls local; nan if none needs them."""
        far = self.exact < self.threshold
        return float((self.predicted >= self.threshold)[far].mean()) if far.any() else float("nan")

    @property
    def wasted(self) -> float:
        """Share of the local queries which the criterion does not call local; nan if none is."""
        local = self.exact >= self.threshold
        return float((self.predicted < self.threshold)[local].mean()) if local.any() else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, nan as None."""
        return {
            "layers": list(self.layers),
            "scores": plain(self.scores),
            "predicted_scores": plain(self.predicted_scores),
            "missed": plain(np.array(self.missed)),
            "wasted": plain(np.array(self.wasted)),
            "threshold": self.threshold,
            "queries": len(self.queries),
        }


def adaptive_heads(
    model: Any,
    tokens: Any,
    *,
    sinks: int = 4,
    recent: int = 16,
    threshold: float = 0.9,
    last: int = 32,
    reference: Any = None,
) -> AdaptiveHeads:
    """Whether queries of softmax heads are local, exactly and by the second-moment criterion.

    Args:
        tokens: [batch, pos] of one length, or text. sinks, recent: how many first and last keys count as local, the own among the last.
        threshold: see `AdaptiveHeads`. last: only so many last queries. reference: tokens whose keys give μ and Σ (None: the same).

    Raises:
        ValueError: a text too short to have keys in between. RefusedByPattern: a layer that is no plain softmax over the past.
    """
    tokens = model.to_tokens(tokens)
    if sinks < 0 or recent < 1 or not 0 < threshold < 1:
        raise ValueError(
            f"Expected sinks ≥ 0, recent ≥ 1 and 0 < threshold < 1, got {sinks}, {recent} and {threshold}."
        )
    if tokens.shape[1] <= sinks + recent:
        raise ValueError(
            f"The text has {tokens.shape[1]} tokens, all of them among the first {sinks} or the last {recent}. Expected a longer one."
        )
    queries = list(range(max(sinks + recent, tokens.shape[1] - last), tokens.shape[1]))
    given = _queries_and_keys(model, tokens)
    others = given if reference is None else _queries_and_keys(model, model.to_tokens(reference))
    exact, predicted = [], []
    for (q, k, scale), (_, far, _) in zip(given, others, strict=True):
        q = q[:, :, queries]
        at = torch.tensor(queries, device=q.device)[:, None]
        position = torch.arange(k.shape[2], device=q.device)
        local = (position < sinks) | (position > at - recent)
        scores = (scale * q @ k.mT).masked_fill(position > at, -torch.inf)
        near = scores.masked_fill(~local, -torch.inf).logsumexp(-1)
        exact.append((near - scores.logsumexp(-1)).exp())
        between = torch.tensor([query + 1 - sinks - recent for query in queries], device=q.device)
        bulk = gaussian_log_mass(q, far[:, :, sinks:], scale) + between.log()
        predicted.append(torch.sigmoid(near - bulk))
    arrays = [torch.stack([x.transpose(0, 1) for x in values]).cpu().double().numpy() for values in (exact, predicted)]
    return AdaptiveHeads(arrays[0], arrays[1], tuple(queries), tuple(range(len(given))), threshold)


def gaussian_log_mass(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """log E exp(scale · q·k) for normal k with the mean and covariance of `keys`: scale q·μ + ½ scale² qᵀΣq.

    q [batch, head, query, d], keys [batch, head, key, d]; μ and Σ are those of all keys of a head, over batch too. [batch, head, query].
    """
    flat = keys.transpose(0, 1).flatten(1, 2).double()  # [head, batch · key, d]
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    covariance = centred.mT @ centred / flat.shape[1]
    q = q.double()
    return scale * torch.einsum("bhqd,hd->bhq", q, mean) + scale**2 / 2 * torch.einsum(
        "bhqd,hde,bhqe->bhq", q, covariance, q
    )


def _queries_and_keys(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """Of each layer queries and keys as they meet, [batch, head, pos, d], and the scale of their product."""
    points = []
    for layer, mixer in enumerate(model.mixers):
        record = mixer.describe()
        if (
            record["form"] != "softmax"
            or record["alibi_slopes"] is not None
            or record["window"] is not None
            or record["strict"]
        ):
            raise RefusedByPattern(
                f"Layer {layer} is {record['kind']!r} and no plain softmax of q·k over all of the past, so keys in between have no "
                "normal approximation here. Expected softmax attention without window and distance bias."
            )
        points.append((mixer.factor_points["query"], mixer.factor_points["key"], record))
    if getattr(model, "loops", 1) > 1:
        raise RefusedByPattern("Depth shares its weights here. Expected a model without loops.")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=[point.name for q, k, _ in points for point in (q, k)])
    found = []
    for query, key, record in points:
        q, k = (heads_first(cache[point.name], point).double() for point in (query, key))
        found.append((q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), record["scale"]))
    return found


# ---- profiles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentAttention:
    """Result of `segment_attention`. weights_by_sequence: of each segment, mean over reading rows, [sequence, layer, head, segment].

    lengths: tokens of each segment. layers: layer numbers, or (layer, step).
    """

    weights_by_sequence: NDArray[np.float64]
    lengths: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of each segment, mean over sequences, [layer, head, segment]."""
        return self.weights_by_sequence.mean(0)

    @property
    def density(self) -> NDArray[np.float64]:
        """Weight per token of the segment, [layer, head, segment]."""
        return self.weights / np.array(self.lengths)

    @property
    def profile(self) -> NDArray[np.float64]:
        """Density averaged over heads and layers, [segment]."""
        return np.nanmean(self.density, (0, 1))

    @property
    def scores(self) -> NDArray[np.float64]:
        """Depth of the basin, [layer, head]: the smaller of both ends less the mean between, over the mean of all; above 0 for a basin."""
        return _depth(self.density)

    @property
    def by_sequence(self) -> NDArray[np.float64]:
        """Depth in every sequence, [sequence, layer, head]. Its mean is not the depth of the mean, as the smaller end may change."""
        return _depth(self.weights_by_sequence / np.array(self.lengths))

    def best(self, n: int = 5) -> list[tuple[Layer, int, float]]:
        """The n heads of deepest basin as (layer, head, depth)."""
        return best_heads(self.scores, self.layers, n)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, nan as None."""
        return {
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            "weights": [plain(heads) for heads in self.weights],
            "profile": plain(self.profile),
            "basin": plain(self.scores),
            "lengths": list(self.lengths),
        }


def _depth(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., segment] -> [...]."""
    ends = np.minimum(density[..., 0], density[..., -1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((ends - density[..., 1:-1].mean(-1)) / density.mean(-1))


def segment_attention(
    model: Any, tokens: Any, spans: Sequence[Span] | int, *, rows: int = 1, whole_patterns: bool = False
) -> SegmentAttention:
    """How much the last `rows` rows read each segment of a prompt.

    Args:
        tokens: [batch, pos] of one length, or text. spans: first token and token after the last of each segment, the same for all prompts;
            or a number of equally long segments of all that comes before the reading rows. whole_patterns: as for `attention_statistics`.

    Raises:
        ValueError: fewer than three segments, some outside the prompt or overlapping. RefusedByPattern: as `attention_statistics`.
    """
    tokens = model.to_tokens(tokens)
    length = tokens.shape[1]
    if isinstance(spans, int):
        edges = np.linspace(0, length - rows, spans + 1).round().astype(int).tolist()
        spans = list(pairwise(edges))
    labels = torch.full((length,), -1, dtype=torch.long)
    for number, (start, stop) in enumerate(spans):
        if not 0 <= start < stop <= length or (labels[start:stop] >= 0).any():
            raise ValueError(
                f"Segment {number} is {start} … {stop} of a prompt of {length} tokens. Expected segments inside it that do not overlap."
            )
        labels[start:stop] = number
    if len(spans) < 3:
        raise ValueError(f"A profile needs at least three segments, got {len(spans)}.")
    features = label_features(labels[None].to(tokens.device), len(spans))
    found = attention_statistics(model, tokens, statistics=["first"], features=features, whole_patterns=whole_patterns)
    means = [
        statistics.need("features")[:, :, -rows:].mean(2) for statistics in found.values()
    ]  # [sequence, head, segment]
    weights = np.stack(
        [
            [stacked([mean[row, :, number] for mean in means]) for number in range(len(spans))]
            for row in range(len(tokens))
        ]
    )
    return SegmentAttention(np.moveaxis(weights, 1, -1), tuple(stop - start for start, stop in spans), tuple(found))


# ---- waveforms -------------------------------------------------------------------------------------------------------


def waveform(d_head: int, distances: Sequence[int] | NDArray[np.int64], base: float = 10_000.0) -> NDArray[np.float64]:
    """Mean of cos(m θ_i) over the d_head / 2 frequencies θ_i = base^(−2i / d_head) of rotary positions, [distance]; 1 at distance 0.

    It is the score of a query with a key equal to it, entries alike, relative to distance 0.
    """
    if d_head < 2 or d_head % 2 or base <= 1:
        raise ValueError(f"Expected an even d_head and a base above 1, got {d_head} and {base}.")
    frequency = base ** (-np.arange(0, d_head, 2) / d_head)
    return np.cos(np.asarray(distances, dtype=float)[:, None] * frequency).mean(1)


def complementary_bases(
    d_head: int, candidates: Sequence[float], count: int, distances: Sequence[int] | NDArray[np.int64]
) -> list[float]:
    """Bases chosen one after the other so that the lowest point of their upper envelope over the distances rises most.

    Raises ValueError for more bases than there are candidates.
    """
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count: expected 1 to {len(candidates)} (the candidates), got {count}.")
    waves = {base: waveform(d_head, distances, base) for base in candidates}
    chosen: list[float] = []
    envelope = np.full(len(distances), -np.inf)
    for _ in range(count):
        left = [base for base in candidates if base not in chosen]
        chosen.append(max(left, key=lambda base: np.maximum(envelope, waves[base]).min()))
        envelope = np.maximum(envelope, waves[chosen[-1]])
    return chosen


# ---- reading parts apart ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParallelEntropy:
    """Result of `parallel_entropy`: mean entropy in nats of the rows behind the chunks, [layer, head]; read together, and apart."""

    together: NDArray[np.float64]
    apart: NDArray[np.float64]

    @property
    def rise(self) -> float:
        """Mean over heads and layers of apart less together."""
        return float(np.nanmean(self.apart - self.together))


@torch.no_grad()
def parallel_entropy(model: Any, tokens: Any, chunks: Sequence[Span], *, prefix: int = 0) -> ParallelEntropy:
    """Entropy of the rows behind the last chunk, when chunks see each other and when they do not. Softmax attention.

    Args:
        tokens: [batch, pos] of one length, or text. chunks: first token and token after the last of each. prefix: so many first tokens are
            seen by all chunks (a shared sink).

    Raises:
        ValueError: chunks that overlap, leave the prompt, or leave no rows behind them. RefusedByPattern: patterns that are no softmax.
    """
    tokens = model.to_tokens(tokens)
    length = tokens.shape[1]
    owner = torch.full((length,), -1)
    for number, (start, stop) in enumerate(chunks):
        if not prefix <= start < stop < length or (owner[start:stop] >= 0).any():
            raise ValueError(
                f"Chunk {number} is {start} … {stop} of {length} tokens. Expected chunks that do not overlap, behind the prefix, and "
                "rows behind the last."
            )
        owner[start:stop] = number
    if not chunks or "scores" not in model.hook_points.roles:
        raise RefusedByPattern("Expected at least one chunk, and softmax attention, whose scores can be masked.")
    behind = max(stop for _, stop in chunks)
    hidden = (owner[:, None] != owner) & (owner[:, None] >= 0) & (owner >= 0)

    @by_position
    def hide(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(hidden.to(scores.device), -torch.inf)

    def entropy(hooks: Sequence[Any]) -> NDArray[np.float64]:
        patterns = model.patterns(tokens, hooks=hooks)
        for pattern in patterns.values():
            if not pattern.meta.is_distribution:
                raise RefusedByPattern(f"{pattern.name} is no distribution, so its rows have no entropy.")
        return stacked([pattern.entropy()[:, :, behind:].mean((0, 2)) for pattern in patterns.values()])

    return ParallelEntropy(entropy([]), entropy([(Select(role="scores"), hide)]))


implements(
    "adaptive-longctx-heads", "probe", "adaptive_heads", note="the criterion and its errors; no sparse execution"
)
implements("attention-basin", "probe", "segment_attention")
implements("attention-buckets", "probe", "complementary_bases", note="greedy, by the lowest point of the envelope")
implements("attention-entropy", "probe", "parallel_entropy", note="tokens keep their positions")
