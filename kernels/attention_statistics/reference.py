"""The slow equations: whole patterns, and every statistic by a plain sum over them.

`softmax_pattern` and `statistics_of` are what the streaming forms are tested against, in float64, and what a program would do that
materialises the pattern.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .result import AttentionStatistics
from .strips import bin_edges
from .visibility import Visibility


def visible_cells(see: Visibility, batch: int) -> Tensor:
    """True where a query may read a key: [batch, query, key]. Rows of padding read nothing."""
    query = torch.arange(see.first, see.keys)[:, None]
    key = torch.arange(see.keys)[None, :]
    visible = {"inclusive": key <= query, "strict": key < query, "none": key < see.keys}[see.causal]
    visible = visible.expand(see.queries, see.keys)
    if see.window is not None:
        visible = visible & ((query - key).abs() < see.window)
    visible = visible.expand(batch, -1, -1)
    if see.real is not None:
        visible = visible & see.real[:, None, :].cpu() & see.real[:, see.first :, None].cpu()
    if see.segments is not None:
        visible = visible & (see.segments[:, see.first :, None] == see.segments[:, None, :]).cpu()
    return visible


def softmax_pattern(
    q: Tensor,
    k: Tensor,
    see: Visibility,
    *,
    scale: float,
    softcap: float | None = None,
    distance_bias: Tensor | None = None,
    bias: Callable[[int, int, slice, slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in the type of q: pattern [batch, head, query, key] (0 where nothing is read) and log normaliser."""
    batch, heads, queries, _ = q.shape
    scores = scale * (q @ k.repeat_interleave(heads // k.shape[1], 1).mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if distance_bias is not None:
        distance = torch.arange(see.first, see.keys)[:, None] - torch.arange(see.keys)[None, :]
        there = (distance - see.distances.start).clamp(min=0)
        scores = scores + distance_bias.to(scores)[:, there]
    if bias is not None:
        everything = (slice(0, queries), slice(0, see.keys))
        for item in range(batch):
            for head in range(heads):
                scores[item, head] += bias(item, head, *everything)
    scores = scores.masked_fill(~visible_cells(see, batch)[:, None].to(scores.device), float("-inf"))
    pattern = scores.softmax(-1)
    return torch.nan_to_num(pattern, nan=0.0), scores.logsumexp(-1)


def statistics_of(
    pattern: Tensor,
    see: Visibility,
    *,
    weights: str = "softmax",
    log_normaliser: Tensor | None = None,
    features: Tensor | None = None,
    top_k: int = 0,
    map_size: int = 96,
) -> AttentionStatistics:
    """Every statistic of a pattern [batch, head, query, key], in its type, with as many temporaries of its size as it takes."""
    batch, heads, queries, keys = pattern.shape
    visible = visible_cells(see, batch).to(pattern.device)
    pattern = pattern * visible[:, None]
    if weights == "share":
        log_normaliser = pattern.abs().sum(-1).log()
        pattern = pattern.abs() / pattern.abs().sum(-1, keepdim=True)
        pattern = torch.nan_to_num(pattern, nan=0.0)
    elif weights == "absolute":
        pattern = pattern.abs()
    distributions = weights in ("softmax", "share")
    some = (pattern != 0).any(-1)

    def row(values: Tensor) -> Tensor:
        return torch.where(some, values, torch.nan)

    position = torch.arange(see.first, see.keys, device=pattern.device)
    key = torch.arange(keys, device=pattern.device)
    distance = (position[:, None] - key).to(pattern.dtype)
    readers, pairs = visible.sum(1).double(), _by_distance(visible[:, None].double(), see)[:, 0]
    largest_at = pattern.abs().argmax(-1)
    rows = torch.ones(batch, queries, dtype=torch.bool) if see.real is None else see.real[:, see.first :]
    first = torch.tensor([see.first_key(item) for item in range(batch)], device=pattern.device)
    before = torch.where(position > 0, pattern.diagonal(see.first - 1, -2, -1), 0.0) if see.first else None
    if before is None:
        before = torch.cat([pattern.new_zeros(batch, heads, 1), pattern.diagonal(-1, -2, -1)], -1)[..., :queries]
    received = pattern.sum(-2) / readers[:, None]
    largest_received = pattern.gather(-2, pattern.abs().argmax(-2, keepdim=True)).squeeze(-2)
    profile = _by_distance(pattern, see) / pairs[:, None]
    top = pattern.abs().topk(min(top_k, keys), -1).indices if top_k else None
    top_weights = None if top is None else pattern.gather(-1, top)
    return AttentionStatistics(
        weights,
        rows,
        readers,
        pairs,
        see.distances.start,
        log_normaliser=row(log_normaliser) if distributions and log_normaliser is not None else None,
        entropy=row(torch.special.entr(pattern).sum(-1)) if distributions else None,
        largest=row(pattern.gather(-1, largest_at[..., None])[..., 0]),
        largest_at=torch.where(some, largest_at, -1),
        first=row(pattern.gather(-1, first[:, None, None, None].expand(-1, heads, queries, 1))[..., 0]),
        self_weight=row(pattern.diagonal(see.first, -2, -1)),
        previous=row(before),
        distance=row((pattern * distance.abs()).sum(-1)),
        distance_squared=row((pattern * distance**2).sum(-1)),
        features=None
        if features is None
        else torch.where(some[..., None], pattern @ features[:, None].to(pattern), torch.nan),
        received=torch.where(readers[:, None] > 0, received, torch.nan).to(pattern.dtype),
        received_largest=largest_received,
        profile=torch.where(pairs[:, None] > 0, profile, torch.nan).to(pattern.dtype),
        map=_pooled(pattern, map_size),
        top_weights=top_weights,
        top_keys=None if top is None or top_weights is None else torch.where(top_weights != 0, top, -1),
    )


def _by_distance(pattern: Tensor, see: Visibility) -> Tensor:
    """Sum of each diagonal: [batch, head, distance]."""
    sums = [pattern.diagonal(see.first - distance, -2, -1).sum(-1) for distance in see.distances]
    return torch.stack(sums, -1)


def _pooled(pattern: Tensor, size: int) -> Tensor:
    """The entry of largest magnitude of every bin, [batch, head, query_bin, key_bin]."""
    rows, columns = bin_edges(pattern.shape[-2], size), bin_edges(pattern.shape[-1], size)
    high = low = pattern
    for axis, edges in ((-2, rows), (-1, columns)):
        parts = list(pairwise(edges))
        high = torch.cat([high.narrow(axis, a, b - a).amax(axis, keepdim=True) for a, b in parts], axis)
        low = torch.cat([low.narrow(axis, a, b - a).amin(axis, keepdim=True) for a, b in parts], axis)
    return torch.where(high >= -low, high, low)
