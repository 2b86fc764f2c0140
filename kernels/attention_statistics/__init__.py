"""Statistics of attention patterns of any length, exactly, in memory that grows with the text and not with its square.

    found = attention_statistics(q, k)                      softmax attention, from queries and keys
    found = gated_linear_statistics(q, k, log_decay=g)      effective patterns of linear attention, from their factors
    found = delta_rule_statistics(q, k, beta, log_decay=g)  effective patterns of the delta rule, likewise
    found = pattern_statistics(pattern)                     a pattern that exists, or a function that gives tiles of one

Each returns `AttentionStatistics`: entropy, largest weight, weight on the first, the own and the previous token, distance read, weight on
any features of the keys; what every key receives; the profile over distances; a pooled picture.

- `accumulate` is the one pass that all share; `tiles` the sources of cells; `reference` the materialised equations.
- `alibi_bias`, `t5_bias`: additive biases as one number per head and distance.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.arguments import (
    check_decay,
    check_key,
    check_positive_integer,
    check_query,
    check_tensor,
    check_token_weight,
    check_write,
    shape_of,
)
from kernels.devices import has_kernel

from .accumulate import accumulate
from .arguments import check_features, check_mask, check_names, check_segments
from .bias import alibi_bias, t5_bias
from .delta_tiles import DeltaTiles
from .result import STATISTICS, WEIGHTS, AttentionStatistics
from .tiles import FunctionTiles, GatedLinearTiles, SoftmaxTiles
from .visibility import CAUSAL, Visibility

__all__ = [
    "STATISTICS",
    "WEIGHTS",
    "AttentionStatistics",
    "alibi_bias",
    "attention_statistics",
    "delta_rule_statistics",
    "gated_linear_statistics",
    "label_features",
    "pattern_statistics",
    "t5_bias",
]


def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: str = "inclusive",
    window: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    bias: Callable[[int, int, slice, slice], Tensor] | None = None,
    statistics: Sequence[str] = STATISTICS,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    cells_per_strip: int | None = None,
) -> AttentionStatistics:
    """Statistics of softmax(softcap(scale q kᵀ) + bias) over what each query may read.

    Parameters
    ----------
    q : [batch, head, query, d]; k : [batch, kv_head, key, d], where kv_head divides head and query ≤ key: the queries are the last tokens
    scale : factor of q·k (None: d^-½)
    causal : "inclusive" (a token reads itself and the past), "strict", or "none"
    window : how many tokens back a token may read, itself included (None: all); without causality in both directions
    mask : True at real tokens, [batch, key]. segments : a number per token, [batch, key]; a token reads its own segment only
    softcap : c of c · tanh(s / c), before the bias
    alibi_slopes : [head]. distance_bias : [head, distance], at distances query − key = 0 … key − 1 (without causality 1 − query … key − 1),
        see `alibi_bias` and `t5_bias`. bias : bias(item, head, queries, keys) for
        slices, [query, key] or broadcastable
    statistics : which, from `STATISTICS`. features : [batch or 1, key, feature]. top_k : largest weights of each row.
    map_size : bins a side. cells_per_strip : numbers in the working array (memory and speed, not results)

    Sums are in float32 for 16-bit inputs, else in the type of q. No gradients. Raises ValueError naming the argument that does not fit.
    """
    check_tensor("q", q, "batch, head, query, d", 4)
    check_tensor("k", k, "batch, kv_head, key, d", 4)
    batch, heads, queries, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width or k.dtype != q.dtype or heads % max(k.shape[1], 1):
        raise ValueError(
            f"k: expected [batch={batch}, a divisor of {heads} heads, key, d={width}] in {q.dtype} to match q {shape_of(q)}, "
            f"got {shape_of(k)} in {k.dtype}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    see = _visibility(batch, queries, k.shape[2], causal, window, mask, segments, q.device)
    if alibi_slopes is not None:
        if distance_bias is not None:
            raise ValueError("alibi_slopes: given together with distance_bias; add alibi_bias(slopes, distances) to it")
        distance_bias = alibi_bias(alibi_slopes, see.distances)
    if distance_bias is not None and distance_bias.shape != (heads, len(see.distances)):
        raise ValueError(
            f"distance_bias: expected [head={heads}, distance={len(see.distances)}] for the distances {see.distances.start} … "
            f"{see.distances.stop - 1}, got {shape_of(distance_bias)}"
        )
    factor = width**-0.5 if scale is None else scale
    source = SoftmaxTiles(q, k, factor, softcap, distance_bias, see.distances, bias)
    return _run(source, see, statistics, "softmax", features, top_k, map_size, cells_per_strip)


def gated_linear_statistics(
    q: Tensor,
    k: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    strict: bool = False,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    weights: str = "share",
    statistics: Sequence[str] | None = None,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    cells_per_strip: int | None = None,
) -> AttentionStatistics:
    """Statistics of the effective pattern α of gated linear attention, from the factors of `effective_pattern`.

    α is signed and its rows sum to nothing in particular, so `weights` says what is counted: `"share"`, |α| divided by the row's sum of |α|
    (a distribution); `"absolute"`, |α|; `"signed"`, α. The last two have no entropy and no log normaliser. Everything else as in
    `attention_statistics`.
    """
    check_key(k)
    check_query(q, k)
    check_decay(log_decay, k)
    check_write(write, k)
    causal = "strict" if strict else "inclusive"
    see = _visibility(q.shape[0], q.shape[2], k.shape[2], causal, None, mask, segments, q.device)
    source = GatedLinearTiles(q, k, log_decay, write, scale, strict)
    return _run(source, see, _allowed(statistics, weights), weights, features, top_k, map_size, cells_per_strip)


def delta_rule_statistics(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: str = "share",
    statistics: Sequence[str] | None = None,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    cells_per_strip: int | None = None,
) -> AttentionStatistics:
    """Statistics of the effective pattern of the gated delta rule, from the factors of `kernels.delta_rule.effective_pattern`.

    Padding must neither write nor decay: beta and log_decay are 0 there. Everything else as in `gated_linear_statistics`.
    """
    check_key(k)
    check_query(q, k)
    check_token_weight("beta", beta, k)
    check_decay(log_decay, k)
    see = _visibility(q.shape[0], q.shape[2], k.shape[2], "inclusive", None, mask, None, q.device)
    source = DeltaTiles(q, k, beta, log_decay, scale)
    return _run(source, see, _allowed(statistics, weights), weights, features, top_k, map_size, cells_per_strip)


def pattern_statistics(
    pattern: Tensor | Callable[[int, int, slice, slice], Tensor],
    shape: Sequence[int] | None = None,
    *,
    causal: str = "inclusive",
    window: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    weights: str = "share",
    statistics: Sequence[str] | None = None,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
    cells_per_strip: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AttentionStatistics:
    """Statistics of a pattern [batch, head, query, key], or of a function that gives its tiles.

    As a function, pattern(item, head, queries, keys) returns the cells of two slices, [query, key], in any type and on any device; `shape`
    is then (batch, head, query, key), and `dtype` and `device` say where sums are kept. Everything else as in `gated_linear_statistics`.
    """
    if isinstance(pattern, Tensor):
        check_tensor("pattern", pattern, "batch, head, query, key", 4)
        values, shape, device = pattern, pattern.shape, pattern.device
        dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
        pattern = lambda item, head, rows, keys: values[item, head, rows, keys]  # noqa: E731
    elif shape is None or len(shape) != 4:
        raise ValueError(
            f"shape: expected (batch, head, query, key) of the pattern that the function gives, got {shape}"
        )
    batch, heads, queries, keys = shape
    device = torch.device(device)
    see = _visibility(batch, queries, keys, causal, window, mask, segments, device)
    source = FunctionTiles(pattern, batch, heads, dtype, device)
    return _run(source, see, _allowed(statistics, weights), weights, features, top_k, map_size, cells_per_strip)


def label_features(labels: Tensor, n_labels: int | None = None) -> Tensor:
    """Labels of keys as features: the weight on each label's keys. labels [batch or 1, key], −1 for none; float [batch or 1, key, label].

    One label per chosen column gives the weight on each column.
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(f"labels: expected whole numbers [batch or 1, key], got {shape_of(labels)} in {labels.dtype}")
    count = int(labels.max()) + 1 if n_labels is None else n_labels
    if int(labels.max()) >= count:
        raise ValueError(f"labels: {int(labels.max())} is outside 0 … {count - 1} (n_labels = {count})")
    return (labels[..., None] == torch.arange(count, device=labels.device)).to(torch.float32)


def _allowed(statistics: Sequence[str] | None, weights: str) -> Sequence[str]:
    """All that such weights have, or those asked for. ValueError where rows must be distributions and are not."""
    check_names("weights", [weights], WEIGHTS)
    need = ("entropy", "log_normaliser")
    if statistics is None:
        return [name for name in STATISTICS if weights == "share" or name not in need]
    for name in need:
        if name in statistics and weights != "share":
            raise ValueError(
                f"statistics: {name} needs rows that are distributions, and {weights} weights are none; expected weights='share' "
                f"or statistics without {name}"
            )
    return statistics


def _visibility(
    batch: int,
    queries: int,
    keys: int,
    causal: str,
    window: int | None,
    mask: Tensor | None,
    segments: Tensor | None,
    device: torch.device,
) -> Visibility:
    check_names("causal", [causal], CAUSAL)
    if queries > keys or queries < 1:
        raise ValueError(f"q: expected between 1 and {keys} queries, as many as keys at most, got {queries}")
    if window is not None:
        check_positive_integer("window", window)
    check_mask(mask, batch, keys)
    check_segments(segments, batch, keys)
    real = None if mask is None or bool(mask.all()) else mask.to(device, torch.bool)
    return Visibility(queries, keys, causal, window, real, None if segments is None else segments.to(device))


def _run(
    source: SoftmaxTiles | GatedLinearTiles | DeltaTiles | FunctionTiles,
    see: Visibility,
    statistics: Sequence[str],
    weights: str,
    features: Tensor | None,
    top_k: int,
    map_size: int,
    cells_per_strip: int | None,
) -> AttentionStatistics:
    check_names("statistics", statistics, STATISTICS)
    check_features(features, source.batch, see.keys)
    check_positive_integer("map_size", map_size)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k: expected 0 or a positive number, got {top_k!r}")
    if cells_per_strip is not None:
        check_positive_integer("cells_per_strip", cells_per_strip)
    top_k = min(top_k, see.keys)
    if features is not None:
        features = features.to(source.device)
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        ready: dict[str, Tensor] = {}
        if isinstance(source, SoftmaxTiles) and has_kernel(source.device):
            from .triton import SUPPORTED, forward, supports

            if supports(source) and SUPPORTED & set(statistics):
                ready = forward(source, see, SUPPORTED & set(statistics))
                statistics = [name for name in statistics if name not in SUPPORTED]
        return accumulate(
            source,
            see,
            statistics,
            weights=weights,
            features=features,
            top_k=top_k,
            map_size=map_size,
            cells_per_strip=cells_per_strip,
            ready=ready,
        )
