"""The effective pattern of the selective scan: one exact token-to-source map per channel.

    alpha_c,ij = delta_jc sum_n C_in B_jn exp(A_cn (G_ic - G_jc)) + D_c [i = j],   G = cumsum(delta),   j <= i

so that y[:, :, c] = alpha_c @ x[:, :, c] for a run that starts from an empty state. It is the pattern of gated linear
attention with queries C, keys B, vector decay delta A_c and write delta_c, one channel taking the place of one head
(Ali, Zimerman and Wolf 2024, arXiv 2403.01590, write it as hidden attention). Channels are handled a few at a time:
neither channel x state x query x key nor, with weights, channel x query x key exists at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import check_like, check_positions, check_tensor, compute_dtype
from kernels.gated_linear_attention.pattern import pattern_rows

from .arguments import check_selective, check_skip

# Numbers of the pattern computed at once, a few times as many on the way.
AT_ONCE = 1 << 22


def selective_pattern(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    channels: Sequence[int] | Tensor | None = None,
    queries: Sequence[int] | Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Exact weights alpha of `selective_scan`, from each channel of a token to the same channel of earlier ones.

    Parameters
    ----------
    delta : [batch, pos, channel]
    A : [channel, state]
    B, C : [batch, pos, state]
    D : None or [channel]; without it the pattern lacks the skip
    channels : the channels wanted, in any order; None for all of them
    queries : positions of the rows wanted, in any order; None for all of them
    weights : None, or one weight per channel wanted: returns the weighted sum over channels alone

    Returns [batch, channel, query, key], or with weights [batch, query, key]; float32 for 16-bit B, else the type of B.
    Raises ValueError naming the argument that does not fit.
    """
    check_selective(None, delta, A, B=B, C=C)
    check_skip(D, delta)
    batch, pos, channel = delta.shape
    picked = list(range(channel))
    if channels is not None:
        picked = check_positions("channels", channels, channel, "channel", "channel")
    rows = list(range(pos)) if queries is None else check_positions("queries", queries, pos)
    dtype = compute_dtype(B.dtype)
    if weights is not None:
        check_tensor("weights", weights, "channel", 1)
        if weights.shape[0] != len(picked):
            raise ValueError(f"weights: expected one for each of the {len(picked)} channels, got {weights.shape[0]}")
        check_like("weights", weights, "delta", delta, same_dtype=False)
    if not picked or not rows:
        shape = (batch, len(rows), pos) if weights is not None else (batch, len(picked), len(rows), pos)
        return delta.new_zeros(shape, dtype=dtype)
    at_once = max(1, AT_ONCE // (batch * pos * (A.shape[1] if weights is not None else len(rows))))
    blocks = []
    total = delta.new_zeros(batch, len(rows), pos, dtype=dtype)
    with torch.autocast(delta.device.type, enabled=False):
        for start in range(0, len(picked), at_once):
            index = torch.tensor(picked[start : start + at_once], dtype=torch.long, device=delta.device)
            part = (delta[:, :, index], A[index], B, C, None if D is None else D[index], rows)
            if weights is None:
                blocks.append(_channels(*part))
            else:
                total = total + _sum_of_channels(*part, weights[start : start + at_once])
    return total if weights is not None else torch.cat(blocks, 1)


def _channels(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, rows: list[int]) -> Tensor:
    dtype = compute_dtype(B.dtype)
    step = delta.mT.to(dtype)  # [batch, channel, pos]
    log_decay = step.unsqueeze(-1) * A[:, None].to(dtype)
    queries, keys = (x.unsqueeze(1).expand(-1, step.shape[1], -1, -1) for x in (C.to(dtype), B.to(dtype)))
    alpha = pattern_rows(queries, keys, log_decay, step, 1.0, False, rows)
    return alpha if D is None else alpha + D.to(dtype)[:, None, None] * _diagonal(rows, delta)


def _sum_of_channels(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, rows: list[int], weights: Tensor
) -> Tensor:
    """Weighted sum over the channels, [batch, query, key]: the pattern of one head whose key channels are all pairs (channel, state)."""
    dtype = compute_dtype(B.dtype)
    step, weights = delta.to(dtype), weights.to(dtype)
    log_decay = step.unsqueeze(-1) * A.to(dtype)  # [batch, pos, channel, state]
    keys = (step * weights).unsqueeze(-1) * B.to(dtype).unsqueeze(2)
    queries = C.to(dtype).unsqueeze(2).expand_as(keys)
    queries, keys, log_decay = (x.flatten(2).unsqueeze(1) for x in (queries, keys, log_decay))
    alpha = pattern_rows(queries, keys, log_decay, None, 1.0, False, rows).squeeze(1)
    return alpha if D is None else alpha + (weights * D.to(dtype)).sum() * _diagonal(rows, delta)


def _diagonal(rows: list[int], delta: Tensor) -> Tensor:
    """True where the key is the query itself, [query, key]."""
    place = torch.tensor(rows, dtype=torch.long, device=delta.device).unsqueeze(-1)
    return place == torch.arange(delta.shape[1], device=delta.device)
