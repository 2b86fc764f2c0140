"""Attention sinks: tokens that take weight whatever they say. Four definitions, anywhere in the text, and what they cost.

    report = find_sinks(model, tokens)
    report.first_mass            (a) mean weight on the first token over the rows after it, [layer, head]
    report.sink_rate             (b) share of sequences in which the first token receives more than ε, itself included, [layer, head]
    report.sinks                 (c) tokens that receive more than a threshold, wherever they are: [Sink(layer, head, …)]
    report.value_ratio           (d) length of the value at the sinks over the median length, [layer, head]: far below 1 for a sink
                                     that is read and adds nothing
    report.residual_ratio        (d) norm of the residual stream at a sink over the median, [layer]: a massive activation

(a) Xiao et al. 2023 (StreamingLLM), with queries i ≥ 1 as usual. (b) Gu et al. 2024: α_k = Σ_{i≥k} A_ik / (number of such i) > ε per
sample, then the mean; the query k itself counts, so the first token gets at least its own 1. (c) Yu et al. 2024 (ACT): Σ_i A_ij / (number
of queries that see j) > `threshold` (their code: 0.1), or > α / N with `alpha` (their paper's form). (d) Gu et al. 2024 on values, Sun et
al. 2024 on massive activations.

A token near the end is seen by few rows, of which its own is one; those seen by fewer than `min_readers` are not judged in (c).
For signed patterns a weight is |α| divided by its row's sum. Everything is measured in strips: no pattern is formed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_statistics import AttentionStatistics
from probes.statistics import Layer, attention_statistics
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.pieces import by_position
from workbench.instrument.selection import Select

EPSILON, THRESHOLD = 0.3, 0.1  # of the definitions (b) and (c), as published


@dataclass(frozen=True)
class Sink:
    """One token that one head reads far above its share. `received`: mean weight over the rows that can see it."""

    layer: Layer
    head: int
    sequence: int
    position: int
    received: float


@dataclass(frozen=True)
class SinkReport:
    """Result of `find_sinks`; arrays are [layer, head] in the order of `layers`, nan where a layer has fewer heads.

    Args:
        first_mass, sink_rate: definitions (a) and (b). sinks: definition (c), strongest first. sink_mass: weight on a head's own sinks,
            mean over rows. value_ratio: mean over a head's sinks (nan without one). residual_ratio: [layer], the largest at any sink.
        curve: thresholds, and for each the share of heads with at least one sink and the mean weight on their sinks.
        settings: epsilon, threshold, alpha, min_readers. by_sequence: first_mass, sink_rate and sink_mass of each sequence,
            [sequence, layer, head]. first_chance: first_mass of a head that reads everything that it sees alike, [layer].
    """

    layers: tuple[Layer, ...]
    first_mass: NDArray[np.float64]
    sink_rate: NDArray[np.float64]
    sinks: tuple[Sink, ...]
    sink_mass: NDArray[np.float64]
    value_ratio: NDArray[np.float64]
    residual_ratio: NDArray[np.float64]
    curve: dict[str, list[float]]
    settings: dict[str, Any] = field(default_factory=dict)
    by_sequence: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    first_chance: NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def model_sink_rate(self) -> float:
        """(b) averaged over layers and heads, the number that papers print."""
        return float(np.nanmean(self.sink_rate))

    def positions(self, sequence: int = 0) -> dict[int, int]:
        """Sink positions of a sequence and how many heads use each."""
        found: dict[int, int] = {}
        for sink in self.sinks:
            if sink.sequence == sequence:
                found[sink.position] = found.get(sink.position, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, nan as None."""
        arrays = ("first_mass", "sink_rate", "sink_mass", "value_ratio", "residual_ratio")
        return {
            "layers": [list(layer) if isinstance(layer, tuple) else layer for layer in self.layers],
            **{name: plain(getattr(self, name)) for name in arrays},
            "model_sink_rate": self.model_sink_rate,
            "sinks": [asdict(sink) for sink in self.sinks],
            "curve": self.curve,
            "settings": self.settings,
        }


def find_sinks(
    model: Any,
    tokens: Any,
    *,
    mask: Tensor | None = None,
    epsilon: float = EPSILON,
    threshold: float = THRESHOLD,
    alpha: float | None = None,
    min_readers: int = 8,
    whole_patterns: bool = False,
) -> SinkReport:
    """Sinks of every head by all four definitions; see the module's docstring.

    Args:
        model, tokens, mask, whole_patterns: as for `probes.statistics.attention_statistics`. epsilon: of (b). threshold: of (c).
        alpha: use α / N instead of `threshold`, N the number of real tokens. min_readers: rows that must see a token in (c).

    Raises:
        ValueError: a text of fewer than two tokens, a threshold outside 0 … 1. RefusedByPattern: as `attention_statistics`.
    """
    tokens = model.to_tokens(tokens)
    if tokens.shape[1] < 2:
        raise ValueError("A sink needs somebody to read it. Expected at least two tokens.")
    for name, value in (("epsilon", epsilon), ("threshold", threshold)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")
    found = attention_statistics(
        model, tokens, statistics=["first", "received"], mask=mask, whole_patterns=whole_patterns
    )
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    norms = _value_norms(model, tokens, mask)
    residual = _residual_norms(model, tokens, mask)
    limit = threshold if alpha is None else alpha / real.sum(1).float().mean().item()
    return sink_report(
        found, real, norms, residual, epsilon=epsilon, threshold=limit, alpha=alpha, min_readers=min_readers
    )


def sink_report(
    statistics: dict[Layer, AttentionStatistics],
    real: Tensor,
    value_norms: dict[Layer, Tensor] | None = None,
    residual_norms: dict[Layer, Tensor] | None = None,
    *,
    epsilon: float = EPSILON,
    threshold: float = THRESHOLD,
    alpha: float | None = None,
    min_readers: int = 8,
) -> SinkReport:
    """The report from statistics with `first` and `received`.

    real [batch, pos]: False at padding. Per layer, value_norms [batch, head, pos] and residual_norms [batch, pos].
    """
    thresholds = [round(0.02 * step, 2) for step in range(1, 46)]
    rows: dict[str, list[Tensor]] = {name: [] for name in ("first_mass", "sink_rate", "sink_mass", "value_ratio")}
    each: dict[str, list[Tensor]] = {
        name: [] for name in ("first_mass", "sink_rate", "sink_mass")
    }  # [sequence, head] per layer
    chance: list[float] = []
    sinks: list[Sink] = []
    residual_ratio: list[float] = []
    heads_with, mass_of = torch.zeros(len(thresholds)), torch.zeros(len(thresholds))
    n_heads = 0
    first = real.to(torch.int8).argmax(1)
    for layer, found in statistics.items():
        on_first, received = found.need("first").double(), found.need("received").double()
        heads = received.shape[1]
        after = torch.arange(real.shape[1], device=real.device) > first[:, None]
        read_later = torch.where(after[:, None], on_first, torch.nan)
        rows["first_mass"].append(read_later.nanmean((0, 2)))
        each["first_mass"].append(read_later.nanmean(2))
        chance.append(_evenly_on_first(found, real, first))
        at_first = received.gather(2, first[:, None, None].expand(-1, heads, 1))[..., 0]
        each["sink_rate"].append((at_first > epsilon).double())
        rows["sink_rate"].append(each["sink_rate"][-1].mean(0))
        judged = (real & (found.readers >= min_readers))[:, None]
        total = torch.where(judged, received * found.readers[:, None], 0.0) / real.sum(1)[:, None, None]
        is_sink = judged & (received > threshold)
        each["sink_mass"].append((total * is_sink).sum(-1))
        rows["sink_mass"].append(each["sink_mass"][-1].mean(0))
        for number, value in enumerate(thresholds):
            over = judged & (received > value)
            heads_with[number] += float(over.any(-1).double().mean(0).sum())
            mass_of[number] += float((total * over).sum(-1).mean(0).sum())
        n_heads += heads
        for sequence, head, position in is_sink.nonzero().tolist():
            sinks.append(Sink(layer, head, sequence, position, float(received[sequence, head, position])))
        rows["value_ratio"].append(_ratio(value_norms, layer, is_sink, real))
        over_all = _ratio(residual_norms, layer, is_sink.any(1, keepdim=True), real, largest=True)
        residual_ratio.append(float(over_all[0]))
    curve = {
        "threshold": thresholds,
        "share_of_heads": (heads_with / max(n_heads, 1)).tolist(),
        "mass": (mass_of / max(n_heads, 1)).tolist(),
    }
    return SinkReport(
        tuple(statistics),
        sinks=tuple(sorted(sinks, key=lambda sink: -sink.received)),
        residual_ratio=np.array(residual_ratio),
        curve=curve,
        settings={"epsilon": epsilon, "threshold": threshold, "alpha": alpha, "min_readers": min_readers},
        by_sequence={
            name: np.stack([stacked(list(layer)) for layer in zip(*layers, strict=True)])
            for name, layers in each.items()
        },
        first_chance=np.array(chance),
        **{name: stacked(values) for name, values in rows.items()},
    )


def _evenly_on_first(found: AttentionStatistics, real: Tensor, first: Tensor) -> float:
    """Mean weight on the first token, over the rows after it, of a head that reads everything that it sees alike.

    Tokens before the first are padding; a row that no longer sees it (a window) counts as 0, one that cannot as nothing.
    """
    total, rows = 0.0, 0
    for sequence, start in enumerate(first.tolist()):
        count = int(real[sequence].sum())
        seers = int(found.readers[sequence, start])
        if found.first_distance < 0:  # every row sees every token
            shares = [1 / count] * (count - 1)
        else:
            own = int(found.first_distance == 0 and bool(found.pairs[sequence, 0] > 0))  # does a row see its own token?
            shares = [1 / (row + own) for row in range(1, seers + 1 - own)]
        total, rows = total + sum(shares), rows + count - 1
    return total / rows if rows else float("nan")


def _ratio(
    norms: dict[Layer, Tensor] | None, layer: Layer, chosen: Tensor, real: Tensor, largest: bool = False
) -> Tensor:
    """Norm at the chosen tokens over the median norm of the sequence, per head: mean (or largest), nan without a token. [head]."""
    heads = chosen.shape[1]
    if norms is None or layer not in norms:
        return torch.full((heads,), torch.nan, dtype=torch.float64)
    values = norms[layer].double()
    values = (values[:, None] if values.ndim == 2 else values).expand(-1, heads, -1)
    median = torch.where(real[:, None], values, torch.nan).nanmedian(-1, keepdim=True).values
    ratio = torch.where(chosen, values / median, torch.nan)
    if largest:
        best = torch.where(chosen, values / median, -torch.inf).amax((0, 2))
        return torch.where(best > -torch.inf, best, torch.nan)
    return ratio.nanmean((0, 2))


def _value_norms(model: Any, tokens: Tensor, mask: Tensor | None) -> dict[Layer, Tensor]:
    """‖v‖ per layer, [batch, head, pos]; layers whose mixer names no value are left out."""
    named = {layer: mixer.factor_points.get("value") for layer, mixer in enumerate(model.mixers)}
    points = {layer: point for layer, point in named.items() if point is not None}
    if not points:
        return {}
    padding = {} if mask is None else {"mask": mask}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=[point.name for point in points.values()], **padding)
    found: dict[Layer, Tensor] = {}
    for address in cache:
        key = cache.depth(address)
        layer = key if isinstance(key, int) else key[0]
        norms = heads_first(cache[address], points[layer]).norm(dim=-1)
        heads = model.mixers[layer].describe()["n_heads"]
        if heads % norms.shape[1] == 0 and norms.shape[2] == tokens.shape[1]:
            found[key] = norms.repeat_interleave(heads // norms.shape[1], 1)
    return found


def _residual_norms(model: Any, tokens: Tensor, mask: Tensor | None) -> dict[Layer, Tensor]:
    """Norm of the residual stream before each layer, [batch, pos]."""
    if "resid" not in model.hook_points.roles:
        return {}
    padding = {} if mask is None else {"mask": mask}
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names=Select(role="resid"), **padding)
    return {cache.depth(address): value.norm(dim=-1) for address, value in cache.items() if value.ndim == 3}


def calibrate(pattern: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """Attention with its sinks turned down: their weights times β, what is freed given to the other tokens in proportion (ACT).

    Rows keep their sums, unread tokens stay unread, and β = 1 changes nothing; a row that reads sinks only is left alone.
    pattern: [..., query, key]; sinks: True at sink columns, [..., key].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number from 0 to 1, got {beta!r}")
    on_sinks = (pattern * sinks.unsqueeze(-2)).sum(-1, keepdim=True)
    on_others = (pattern * ~sinks.unsqueeze(-2)).sum(-1, keepdim=True)
    grow = 1 + (1 - beta) * on_sinks / on_others.clamp(min=torch.finfo(pattern.dtype).tiny)
    changed = torch.where(sinks.unsqueeze(-2), beta * pattern, grow * pattern)
    return torch.where(on_others > 0, changed, pattern)


def calibration_curve(
    model: Any,
    tokens: Tensor,
    sinks: Sequence[Sink],
    betas: Sequence[float] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0),
    *,
    keep_first: bool = True,
) -> dict[str, list[float]]:
    """Loss (nats per token) with the given sinks turned down to each β, in the heads that have them. Softmax patterns.

    keep_first: leave the first token alone, as the published method does.
    """
    batch, length = tokens.shape
    chosen: dict[int, Tensor] = {}
    for sink in sinks:
        if keep_first and sink.position == 0:
            continue
        if isinstance(sink.layer, tuple):
            raise ValueError(
                "Depth shares its weights here; a curve per layer is not defined. Expected a model without loops."
            )
        heads = model.mixers[sink.layer].describe()["n_heads"]
        where = chosen.setdefault(sink.layer, torch.zeros(batch, heads, length, dtype=torch.bool, device=tokens.device))
        where[sink.sequence, sink.head, sink.position] = True
    if not chosen:
        raise ValueError(
            "No sink to turn down" + (" besides the first token (keep_first=True)." if keep_first else ".")
        )

    def turning_down(where: Tensor, beta: float) -> Any:
        return by_position(lambda pattern, hook: calibrate(pattern, where, beta))

    losses = []
    for beta in betas:
        hooks = [(Select(role="pattern", layer=layer), turning_down(where, beta)) for layer, where in chosen.items()]
        with torch.no_grad():
            losses.append(float(model.run_with_hooks(tokens, hooks=hooks, return_type="loss")))
    return {"beta": list(betas), "loss": losses}


def stacked(layers: list[Tensor]) -> NDArray[np.float64]:
    """[layer, head], nan where a layer has fewer heads than the widest."""
    result = np.full((len(layers), max(len(row) for row in layers)), np.nan)
    for number, row in enumerate(layers):
        result[number, : len(row)] = row.cpu().double().numpy()
    return result


def best_heads(scores: NDArray[np.float64], layers: Sequence[Layer], n: int) -> list[tuple[Layer, int, float]]:
    """The n heads of largest score as (layer, head, score), heads without one left out. scores [layer, head]."""
    order = np.argsort(-scores, axis=None, kind="stable")  # nan comes last
    places = [divmod(int(at), scores.shape[1]) for at in order]
    found = [(layers[row], head, float(scores[row, head])) for row, head in places]
    return [place for place in found if not np.isnan(place[2])][:n]


def plain(values: NDArray[np.float64]) -> Any:
    """Nested lists, with None for what is not a finite number (JSON has no nan)."""
    if values.ndim == 0:
        return float(values) if np.isfinite(values) else None
    return [plain(row) for row in values]
