"""Log-linear attention: linear attention or the delta rule with one state per level of a Fenwick tree over the past.

Level 0 is the token itself, level 1 the token before it, level m the up to 2^(m-1) tokens before those: log2(T) + 1 states. Each
token weighs the levels it reads, so its pattern is that of the ordinary rule times one weight per level,

    alpha_ij = alpha_ij of the rule · weight_i^(level(i, j)),   level(i, j) = number of binary digits of (i xor j)

exactly. Vocabulary as in `kernels.gated_linear_attention` and `kernels.delta_rule`; the *weights* are lambda of the paper (Guo et
al. 2025, arXiv 2506.04761).

- `log_linear_attention`: outputs and final level states in three equal forms; the states can be read and edited on the way.
- `effective_pattern`: the exact token-to-source weights. `level`, `n_levels_for`: the levels themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import (
    check_decay,
    check_key,
    check_like,
    check_mode,
    check_positive_integer,
    check_query,
    check_stops,
    check_tensor,
    check_token_weight,
    check_value,
    check_write,
    compute_dtype,
    shape_of,
)
from kernels.position_groups import check_places, positions_of, run_in_groups, starts
from kernels.stops import OnState, run_in_pieces

from .chunked import CHUNK, chunked, level_pattern
from .levels import level, n_levels_for
from .reference import recurrent
from .rule import Rule

__all__ = ["effective_pattern", "level", "log_linear_attention", "n_levels_for"]


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    start: int | Tensor = 0,
    real: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Runs the rule once per level and reads o_t = scale * sum_m weights_t^m q_t^T S_t^m.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]
    v : [batch, head or 1, pos, state_v]
    weights : [batch, head, pos, level], how much each token reads of each level; with fewer levels than the text needs,
        all tokens beyond the last level count as the last
    log_decay : None, [head], [batch, head, pos] or [batch, head, pos, state_k]; natural log per token, finite, <= 0
    write, beta : at most one, [batch, head, pos]. beta: the delta rule; else linear attention with this write
    start : tokens read before this call, a number or [batch]; levels depend on the position itself
    real : None, or [batch, pos]: False at padding, which neither writes nor lets time pass; its output means nothing
    initial_state : None (zeros) or [batch, head, level, state_k, state_v], the levels as token start - 1 sees them
    chunk_size : of mode "chunked", rounded up to a power of two; None takes 64
    mode : "chunked" (fast), "recurrent" (token by token), "parallel" (the quadratic form); equal up to rounding
    stops, on_state : as in `gated_linear_attention`, with the state of `initial_state`'s shape
    need_state : without it the final state is not computed, and None is returned in its place

    Returns (output [batch, head, pos, state_v] in the type of q, final state [batch, head, level, state_k, state_v]).
    Raises ValueError naming the argument that does not fit.
    """
    rule, values = _rule(q, k, v, weights, log_decay, write, beta, scale, real)
    check_mode(mode)
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    start, real = check_places(start, real, k)
    batch, head, pos, state_k = k.shape
    shape = (batch, head, weights.shape[3], state_k, v.shape[3])
    dtype = compute_dtype(q.dtype)
    if initial_state is not None:
        _check_state("initial_state", initial_state, shape, dtype, k)
    if stops is None and on_state is not None:
        raise ValueError("on_state: given without stops, so it would never be called; pass the positions to stop at")
    ends = [] if stops is None else check_stops(stops, on_state, pos)
    state = k.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state
    if pos == 0:
        return q.new_zeros(batch, head, 0, v.shape[3]), state
    fresh = initial_state is None
    chunk = 1 << (max(1, chunk_size or CHUNK) - 1).bit_length()
    read, level_weights = q.to(dtype), weights.to(dtype)

    def run(begin: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        here = slice(begin, stop)
        mask = None if real is None else real[:, here]
        first = _first(start, real, begin, batch, k.device)
        part = rule.part(begin, stop)
        tensors = (read[:, :, here], values[:, :, here], level_weights[:, :, here])
        if mode == "recurrent" or (mode == "chunked" and stop - begin == 1):
            return recurrent(*tensors, part, state, positions_of(first, mask, k[:, :, here]), mask)
        carried = not (fresh and begin == 0)
        needed = need_state or stop < pos or bool(ends)

        def aligned(group: Sequence[Tensor | None], state: Tensor, start: int) -> tuple[Tensor, Tensor]:
            q, v, weights, k, decay, write, beta = group
            assert q is not None and k is not None and v is not None and weights is not None
            if not q.shape[2]:
                return torch.zeros_like(v), state
            size = chunk if mode == "chunked" else 1 << (start + q.shape[2]).bit_length()
            of = state if carried else None
            output, after = chunked(q, v, weights, Rule(k, decay, write, beta, scale), of, start, size, needed)
            return output, state if after is None else after

        return run_in_groups(aligned, (*tensors, part.k, part.log_decay, part.write, part.beta), state, first, mask)

    with torch.autocast(q.device.type, enabled=False):
        outputs, state = run_in_pieces(
            run, pos, ends, state, on_state, lambda name, edited: _check_state(name, edited, shape, dtype, k)
        )
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return output.to(q.dtype), state if need_state else None


def effective_pattern(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    real: Tensor | None = None,
) -> Tensor:
    """Exact weights alpha [batch, head, query, key] with output = alpha @ v, for a run from an empty state.

    Arguments as in `log_linear_attention`. Returns float32 for 16-bit inputs, else the type of q.
    """
    rule, _ = _rule(q, k, k, weights, log_decay, write, beta, scale, real)
    with torch.autocast(q.device.type, enabled=False):
        dtype = compute_dtype(q.dtype)
        return level_pattern(rule.pattern(q.to(dtype)), weights.to(dtype), positions_of(0, real, k))


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    beta: Tensor | None,
    scale: float,
    real: Tensor | None,
) -> tuple[Rule, Tensor]:
    """The checked arguments in the type of the state, padding silenced, and the values of every head."""
    check_key(k)
    check_query(q, k)
    check_value(v, k)
    check_decay(log_decay, k)
    check_write(write, k)
    if beta is not None:
        check_token_weight("beta", beta, k)
        if write is not None:
            raise ValueError("write: given together with beta, which is the delta rule's write; leave one of them out")
    check_tensor("weights", weights, "batch, head, pos, level", 4)
    if weights.shape[:3] != k.shape[:3] or weights.shape[3] < 2:
        raise ValueError(f"weights: expected {list(k.shape[:3])} and at least 2 levels, got {shape_of(weights)}")
    check_like("weights", weights, "k", k, same_dtype=False)
    check_places(0, real, k)
    batch, head, pos, _ = k.shape
    dtype = compute_dtype(k.dtype)
    if log_decay is not None:
        log_decay = (log_decay[None, :, None] if log_decay.ndim == 1 else log_decay).to(dtype)
        log_decay = log_decay.expand(batch, head, pos) if log_decay.ndim == 3 else log_decay
    write, beta = (None if x is None else x.to(dtype) for x in (write, beta))
    if real is not None:
        silent = real[:, None].to(dtype)
        if log_decay is not None:
            log_decay = log_decay * (silent if log_decay.ndim == 3 else silent.unsqueeze(-1))
        if beta is not None:
            beta = beta * silent
        else:
            write = (silent if write is None else write * silent).expand(batch, head, pos)
    return Rule(k.to(dtype), log_decay, write, beta, scale), v.to(dtype).expand(batch, head, pos, v.shape[3])


def _first(start: int | Tensor, real: Tensor | None, begin: int, batch: int, device: torch.device) -> int | Tensor:
    """Tokens read before token `begin` of this call."""
    if real is None or begin == 0:
        return start + begin
    first = starts(start, batch, device) + real[:, :begin].sum(1)
    return int(first[0]) if bool((first == first[0]).all()) else first


def _check_state(name: str, state: object, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(state).__name__}")
    if tuple(state.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected [batch, head, level, state_k, state_v] = {list(shape)}, got {shape_of(state)}"
        )
    if state.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the type of states of these inputs, got {state.dtype}")
    check_like(name, state, "k", like, same_dtype=False)
