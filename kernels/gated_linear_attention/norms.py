"""Frobenius norms of the state after every token, from Gram matrices of each chunk instead of the states."""

import torch
from torch import Tensor

from .arguments import (
    check_decay,
    check_key,
    check_positive_integer,
    check_state,
    check_value,
    check_write,
    compute_dtype,
)
from .decay import between, cumulative, lower_triangle
from .trace import advance


def state_norms(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Frobenius norm of the state after every token, [batch, head, pos]. Arguments as in `trace_entries`.

    With D_tj the decay from j to t, p_t that from the chunk's start and write_j folded into v_j, the state is
    S_t = p_t S + sum_j D_tj k_j v_j^T, hence

        |S_t|^2 = p_t^2 |S|^2 + 2 p_t sum_j D_tj k_j^T S v_j + sum_jl D_tj D_tl (k_j . k_l)(v_j . v_l)

    In float32 the terms may cancel: after writes that undo each other, a norm is known to about 1e-3 of the largest one
    before it in the same chunk. Raises ValueError naming the argument that does not fit.
    """
    check_key(k)
    check_value(v, k)
    check_decay(log_decay, k)
    check_write(write, k)
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    batch, head, pos, state_k = k.shape
    dtype = compute_dtype(k.dtype)
    if initial_state is not None:
        check_state("initial_state", initial_state, k, v.shape[3])
        state = initial_state
    else:
        state = k.new_zeros(batch, head, state_k, v.shape[3], dtype=dtype)
    vector = log_decay is not None and log_decay.ndim == 4
    width = chunk_size or (16 if vector else 64)
    squares = [k.new_zeros(batch, head, 0, dtype=dtype)]
    for start in range(0, pos, width):
        stop = min(start + width, pos)
        keys, values = k[:, :, start:stop].to(dtype), v[:, :, start:stop].to(dtype)
        if write is not None:
            values = values * write[:, :, start:stop].to(dtype).unsqueeze(-1)
        read = keys * (values @ state.mT)  # [batch, head, pos, state_k]: k_j (S v_j), row by row of the state
        g = log_decay
        if log_decay is not None and log_decay.ndim == 1:
            g = log_decay[None, :, None].expand(1, head, stop - start)
        elif log_decay is not None:
            g = log_decay[:, :, start:stop]
        squares.append(_chunk(keys, values, read, g, state))
        state = advance(k, v, log_decay, write, state, start, stop)
    return torch.cat(squares, 2).clamp(min=0.0).sqrt()


def _chunk(k: Tensor, v: Tensor, read: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    length = k.shape[2]
    visible = lower_triangle(length, length, False, k.device)
    values_gram = v @ v.mT
    row_squares = state.square().sum(-1)  # [batch, head, state_k]
    if log_decay is not None and log_decay.ndim == 4:
        g = cumulative(log_decay, 2)
        from_start = g.to(k.dtype).exp()
        difference = (g.unsqueeze(3) - g.unsqueeze(2)).masked_fill(~visible.unsqueeze(-1), -torch.inf)
        weight = difference.to(k.dtype).exp()  # [batch, head, t, j, state_k]
        kept = (from_start.square() * row_squares.unsqueeze(2)).sum(-1)
        crossed = (from_start * (weight * read.unsqueeze(2)).sum(3)).sum(-1)
        decayed_keys = weight * k.unsqueeze(2)
        written = (decayed_keys * (values_gram.unsqueeze(2) @ decayed_keys)).sum((-2, -1))
        return kept + 2 * crossed + written
    gram = (k @ k.mT) * values_gram
    total = row_squares.sum(-1, keepdim=True)
    if log_decay is None:
        weight = visible.to(k.dtype)
        return total + 2 * read.sum(-1).cumsum(-1) + ((weight @ gram) * weight).sum(-1)
    g = cumulative(log_decay, 2)
    from_start = g.to(k.dtype).exp()
    weight = between(g, g, visible, k.dtype)
    crossed = (weight @ read.sum(-1, keepdim=True)).squeeze(-1)
    return from_start.square() * total + 2 * from_start * crossed + ((weight @ gram) * weight).sum(-1)
