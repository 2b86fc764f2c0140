"""The state over time, read exactly without building positions x state.

    S_t = sum_{j <= t} exp(G_t - G_j) write_j k_j v_j^T + exp(G_t) S_initial

A single entry over time is a decayed sum of products k_j[i] v_j[j']; a state at a chosen position is one matrix product
per stretch between chosen positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import (
    check_decay,
    check_key,
    check_positions,
    check_state,
    check_value,
    check_write,
    compute_dtype,
)
from .decay import cumulative, decayed_sum


def _check(
    k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor | None, initial_state: Tensor | None
) -> torch.dtype:
    check_key(k)
    check_value(v, k)
    check_decay(log_decay, k)
    check_write(write, k)
    if initial_state is not None:
        check_state("initial_state", initial_state, k, v.shape[3])
    return compute_dtype(k.dtype)


def _check_entries(entries: Sequence[Sequence[int]] | Tensor, sizes: tuple[int, int, int]) -> list[tuple[int, ...]]:
    raw = entries.tolist() if isinstance(entries, Tensor) else list(entries)
    checked = []
    for entry in raw:
        if not isinstance(entry, Sequence) or len(entry) != 3:
            raise ValueError(f"entries: expected triples (head, state_k index, state_v index), got {entry!r}")
        for index, size, axis in zip(entry, sizes, ("head", "state_k", "state_v"), strict=True):
            if int(index) != index or not 0 <= index < size:
                raise ValueError(f"entries: {axis} index {index} of {tuple(entry)} is outside 0 … {size - 1}")
        checked.append(tuple(int(index) for index in entry))
    return checked


def trace_entries(
    k: Tensor,
    v: Tensor,
    entries: Sequence[Sequence[int]] | Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Exact values of chosen state entries after every token, in time and memory proportional to pos * entries.

    Parameters
    ----------
    k : [batch, head, pos, state_k]
    v : [batch, head or 1, pos, state_v]
    entries : list of (head, state_k index, state_v index), or an integer tensor [entry, 3]
    log_decay, write, initial_state : as in `gated_linear_attention`

    Returns [batch, pos, entry] with value S_t[head, i, j]; float32 for 16-bit inputs, else the type of k.
    Raises ValueError naming the argument that does not fit.
    """
    dtype = _check(k, v, log_decay, write, initial_state)
    batch, head, pos, state_k = k.shape
    triples = _check_entries(entries, (head, state_k, v.shape[3]))
    if not triples or not pos:
        return k.new_zeros(batch, pos, len(triples), dtype=dtype)
    heads, rows, columns = torch.tensor(triples, dtype=torch.long, device=k.device).unbind(1)
    value_heads = heads if v.shape[1] > 1 else torch.zeros_like(heads)
    # [entry, batch, pos]: indexing from the head axis outwards reads whole rows of positions, three times faster.
    written = k[:, heads, :, rows].to(dtype) * v[:, value_heads, :, columns].to(dtype)
    if write is not None:
        written = written * write[:, heads].to(dtype).transpose(0, 1)
    initial = None if initial_state is None else initial_state[:, heads, rows, columns]
    if log_decay is None:
        trace = written.cumsum(2).permute(1, 2, 0)
        return trace if initial is None else trace + initial.unsqueeze(1)
    if log_decay.ndim == 1:
        decay = log_decay[heads].to(dtype).exp()
    elif log_decay.ndim == 3:
        decay = log_decay.transpose(1, 2).to(dtype).exp()[:, :, heads]
    else:
        decay = log_decay[:, heads, :, rows].permute(1, 2, 0).to(dtype).exp()
    return decayed_sum(written.permute(1, 2, 0), decay, initial)


def states_at(
    k: Tensor,
    v: Tensor,
    positions: Sequence[int] | Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States after the tokens at `positions`, storing only those. Arguments as in `trace_entries`.

    positions may come in any order and repeat. Returns [batch, position, head, state_k, state_v] in the order asked.
    Raises ValueError naming the argument that does not fit.
    """
    dtype = _check(k, v, log_decay, write, initial_state)
    batch, head, pos, state_k = k.shape
    asked = check_positions("positions", positions, pos)
    state = initial_state
    if state is None:
        state = k.new_zeros(batch, head, state_k, v.shape[3], dtype=dtype)
    states: dict[int, Tensor] = {}
    start = 0
    for position in sorted(set(asked)):
        state = advance(k, v, log_decay, write, state, start, position + 1)
        states[position] = state
        start = position + 1
    if not asked:
        return k.new_zeros(batch, 0, head, state_k, v.shape[3], dtype=dtype)
    return torch.stack([states[position] for position in asked], 1)


def advance(
    k: Tensor, v: Tensor, log_decay: Tensor | None, write: Tensor | None, state: Tensor, start: int, stop: int
) -> Tensor:
    """The state after tokens start … stop - 1, as one matrix product weighted by the decay to the last of them."""
    dtype = state.dtype
    k, v = k[:, :, start:stop].to(dtype), v[:, :, start:stop].to(dtype)
    if write is not None:
        v = v * write[:, :, start:stop].to(dtype).unsqueeze(-1)
    if log_decay is None:
        return state + k.mT @ v
    if log_decay.ndim == 1:
        g = cumulative(log_decay[None, :, None].expand(1, k.shape[1], stop - start), 2)
    else:
        g = cumulative(log_decay[:, :, start:stop], 2)
    to_end = (g[:, :, -1:] - g).to(dtype).exp()
    total = g[:, :, -1].to(dtype).exp()
    if log_decay.ndim == 4:
        return state * total.unsqueeze(-1) + (k * to_end).mT @ v
    return state * total[..., None, None] + k.mT @ (v * to_end.unsqueeze(-1))
