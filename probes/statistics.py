"""Statistics of a model's attention at any length: entropy, sinks, distances, what tokens receive, without one pattern being formed.

    found = attention_statistics(model, text)
    found[0].entropy                     [batch, head, pos], in nats
    found[2].mean("first")               mean weight on the first token, [batch, head]
    found[1].received                    [batch, head, pos]

Queries and keys (for linear mixers decays and writes as well) are taken by hooks as the model reads, and summed up in strips of rows by
`kernels.attention_statistics`; the memory grows with the text, not with its square. Layers whose pattern is not determined by such factors
are refused, unless their patterns may be formed whole.

A softmax pattern is a distribution. The effective pattern of a linear mixer is signed; there `weights` says what is counted: `"share"`
(|α| divided by its row's sum, a distribution), `"absolute"` (|α|, as `Pattern.received` counts) or `"signed"`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import kernels.attention_statistics as kernel
from kernels.attention_statistics import AttentionStatistics
from workbench.instrument.errors import RefusedByPattern
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.patterns import PatternMeta
from workbench.instrument.pieces import whole_call
from workbench.instrument.selection import Select

Layer = int | tuple[int, int]  # (layer, step) where weights are shared over depth
LINEAR = ("query", "key", "log_decay", "write")
NEEDED = {"softmax": ("query", "key"), "gated_linear": LINEAR, "delta": LINEAR}


def attention_statistics(
    model: Any,
    tokens: Any,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    statistics: Sequence[str] | None = None,
    *,
    mask: Tensor | None = None,
    weights: str = "share",
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    whole_patterns: bool = False,
    hooks: Sequence[Any] = (),
) -> dict[Layer, AttentionStatistics]:
    """Statistics of the (effective) patterns of every layer, or some.

    Args:
        model: a hooked model with `mixers`. tokens: [batch, pos], or text. layers, heads: only these; negative layers count from the last.
        statistics: names from `kernels.attention_statistics.STATISTICS` (None: all that the pattern has). mask: True at real tokens.
        weights: of signed patterns, see the module's docstring. features: [batch or 1, pos, feature], of which each row's weighted sum is
            wanted, e.g. `label_features`. top_k: so many largest weights of each row. map_size: bins a side of the map.
        whole_patterns: form the patterns of layers that no factors determine, one layer at a time, instead of refusing them.
        hooks: interventions or functions that are in place during the run.

    Returns:
        `{layer: AttentionStatistics}`; keys are `(layer, step)` where depth shares weights. Rows of padding are nan.

    Raises:
        RefusedByPattern: a layer has no pattern, or one whose columns are not tokens, or that no factors determine.
        ValueError: an unknown statistic, layer or head.
    """
    tokens = model.to_tokens(tokens)
    chosen = _chosen(layers, model.n_layers, "Layer", "this model has layers")
    readers = {layer: _reader(model, layer, whole_patterns) for layer in chosen}
    options = {"statistics": statistics, "features": features, "top_k": top_k, "map_size": map_size}
    found: dict[Layer, AttentionStatistics] = {}
    repeats = {layer: (layer, 1) in getattr(model, "visits", ()) for layer in chosen}

    def receive(layer: int, factors: dict[str, Tensor]) -> None:
        step = sum(1 for key in found if (key if isinstance(key, int) else key[0]) == layer)
        key = (layer, step) if repeats[layer] else layer
        found[key] = readers[layer].read(factors, mask, weights, heads, options)

    collecting = [item for layer in chosen for item in _collecting(layer, readers[layer].points, receive)]
    padding: dict[str, Any] = {} if mask is None else {"mask": mask}
    if getattr(model, "loops", 1) == 1:
        padding["stop_at_layer"] = max(chosen) + 1
    with torch.no_grad():
        model.run_with_hooks(tokens, hooks=[*hooks, *collecting], **padding)
    return found


class _Factors:
    """Reads the statistics of one layer from its factors."""

    def __init__(self, mixer: Any, record: dict[str, Any]) -> None:
        self.record = record
        self.distribution = PatternMeta(**record["pattern"]).is_distribution
        needed = NEEDED[record["form"]]
        self.points = {name: point for name, point in mixer.factor_points.items() if name in needed}
        self.constant = {name: value for name, value in mixer.constant_factors().items() if name in needed}

    def read(
        self, factors: dict[str, Tensor], mask: Tensor | None, weights: str, heads: Any, options: dict[str, Any]
    ) -> AttentionStatistics:
        record, n_heads = self.record, self.record["n_heads"]
        factors = {name: heads_first(value, self.points[name]) for name, value in factors.items()} | self.constant
        own = _chosen(heads, n_heads, "Head", f"layer {record['layer']} has heads")
        for name, value in factors.items():
            axis = 0 if value.ndim == 1 else 1
            groups = value.shape[axis]
            if (
                len(own) < n_heads or name != "key" or record["form"] != "softmax"
            ):  # else keys may stay in the groups that heads share
                factors[name] = value.index_select(
                    axis, torch.tensor([h * groups // n_heads for h in own], device=value.device)
                )
        q, k = factors["query"], factors["key"]
        if record["form"] == "softmax":
            slopes = record["alibi_slopes"]
            return kernel.attention_statistics(
                q,
                k,
                scale=record["scale"],
                window=record["window"],
                causal="strict" if record["strict"] else "inclusive",
                mask=mask,
                alibi_slopes=None if slopes is None else torch.tensor(slopes, device=q.device)[list(own)],
                **{**options, "statistics": options["statistics"] or kernel.STATISTICS},
            )
        decay, write = factors.get("log_decay"), factors.get("write")
        if mask is not None and decay is not None:  # no time passes at padding
            real = mask[:, None].to(decay)
            decay = (decay[None, :, None] if decay.ndim == 1 else decay) * (real if decay.ndim < 4 else real[..., None])
        options = {**options, "mask": mask, "weights": "share" if self.distribution else weights}
        if record["form"] == "delta":
            beta = (
                factors["write"] if mask is None else factors["write"] * mask[:, None].to(q)
            )  # padding writes nothing
            return kernel.delta_rule_statistics(q, k, beta, log_decay=decay, scale=record["scale"], **options)
        return kernel.gated_linear_statistics(
            q, k, log_decay=decay, write=write, scale=record["scale"], strict=record["strict"], **options
        )


class _Whole:
    """Reads the statistics of one layer from its whole pattern."""

    def __init__(self, point: HookPoint) -> None:
        self.points = {"pattern": point}

    def read(
        self, factors: dict[str, Tensor], mask: Tensor | None, weights: str, heads: Any, options: dict[str, Any]
    ) -> AttentionStatistics:
        pattern, meta = factors["pattern"], self.points["pattern"].meta
        own = _chosen(heads, pattern.shape[1], "Head", f"{self.points['pattern'].name} has heads")
        if len(own) < pattern.shape[1]:
            pattern = pattern[:, list(own)]
        kind = "share" if meta is not None and meta.is_distribution else weights
        causal = "inclusive" if meta is None else meta.causal
        return kernel.pattern_statistics(pattern, causal=causal, mask=mask, weights=kind, **options)


def _reader(model: Any, layer: int, whole_patterns: bool) -> _Factors | _Whole:
    mixer = model.mixers[layer]
    record = {"layer": layer, **mixer.describe()}
    if record["form"] in NEEDED:
        return _Factors(mixer, record)
    what = f"Layer {layer} is {record['kind']!r}"
    if record["form"] is None or not any(
        p.role == "pattern" and p.layer_index == layer for p in model.hook_points.points.values()
    ):
        raise RefusedByPattern(f"{what}, which has no pattern over tokens. Expected `layers` without it.")
    (point,) = {s.point for _, found in model.hook_points.resolve(Select(role="pattern", layer=layer)) for s in found}
    if point.meta is not None and point.meta.columns != "token":
        raise RefusedByPattern(
            f"{what}: the columns of its pattern are {point.meta.columns}s, and these statistics are about tokens."
        )
    if not whole_patterns:
        raise RefusedByPattern(
            f"{what} (form {record['form']!r}): its pattern is not determined by queries, keys and decays, so it cannot be read in strips. "
            "Possible is whole_patterns=True, which forms it, tokens × tokens numbers per head."
        )
    return _Whole(point)


def _collecting(layer: int, points: dict[str, HookPoint], receive: Any) -> list[tuple[str, Any]]:
    """Hooks that call receive(layer, factors) whenever all factors of the layer have come, and then forget them."""
    waiting: dict[str, Tensor] = {}

    def collect(name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> None:
            waiting[name] = value
            if len(waiting) == len(points):
                factors = dict(waiting)
                waiting.clear()
                receive(layer, factors)

        return whole_call(keep)

    return [(point.name, collect(name)) for name, point in points.items()]


def _chosen(wanted: int | Sequence[int] | None, count: int, what: str, there_are: str) -> list[int]:
    if wanted is None:
        return list(range(count))
    found = [wanted] if isinstance(wanted, int) else list(wanted)
    for one in found:
        if not -count <= one < count:
            raise ValueError(f"{what} {one} is out of range: {there_are} 0..{count - 1}.")
    if not found:
        raise ValueError(f"The list of {what.lower()}s is empty. Expected at least one, or None for all.")
    return [one % count for one in found]


__all__ = ["AttentionStatistics", "Layer", "attention_statistics"]
