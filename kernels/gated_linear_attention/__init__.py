"""Gated linear attention: the matrix state S_t = diag(exp(log_decay_t)) S_{t-1} + write_t k_t v_t^T and its read-out.

One recurrence serves linear attention and BDH (no decay), RetNet (constant decay), Mamba-2 and mLSTM (scalar decay) and
GLA (vector decay). Vocabulary: the *decay* multiplies the state before a token writes; the *write* is the token's own
weight; *strict* reading sees only what earlier tokens wrote; the *state after token t* has token t read and written.

- `gated_linear_attention`: outputs and final state in three equal forms; the state can be read and edited on the way.
- `effective_pattern`, `values_probe`: the exact token-to-source weights, in closed form and by one-hot values.
- `trace_entries`, `states_at`, `state_norms`: the state over time without positions x state memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.derivatives import needs_gradient, takes_plain_kernel
from kernels.devices import has_kernel as _has_kernel
from kernels.stops import OnState, run_in_pieces

from .arguments import (
    check_decay,
    check_key,
    check_mode,
    check_query,
    check_run,
    check_state,
    check_value,
    check_write,
)
from .chunked import chunked, default_chunk_size
from .norms import state_norms
from .parallel import parallel
from .pattern import effective_pattern, values_probe
from .reference import recurrent
from .trace import states_at, trace_entries

__all__ = [
    "effective_pattern",
    "gated_linear_attention",
    "state_norms",
    "states_at",
    "trace_entries",
    "values_probe",
]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    strict: bool = False,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs S_t = diag(exp(log_decay_t)) S_{t-1} + write_t k_t v_t^T and reads o_t from it.

    Inclusive (strict=False): o_t = scale * q_t^T S_t. Strict: o_t = scale * q_t^T diag(exp(log_decay_t)) S_{t-1}, what
    earlier tokens wrote, decayed up to token t. Both are o_i = sum_j alpha_ij v_j with
    alpha_ij = scale * write_j * sum_d q_id k_jd exp(G_id - G_jd), over j <= i or j < i, plus the initial state's share.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]
    v : [batch, head or 1, pos, state_v]; one head is shared by all without being copied for each
    log_decay : natural log of the decay per token, finite and <= 0 (values are not checked). None: no decay; [head]:
        constant; [batch, head, pos]: one factor per token; [batch, head, pos, state_k]: one per token and state row.
        To forget everything use a large negative number such as -1e4, not -inf
    write : None (1 everywhere) or [batch, head, pos], the weight of each token's write
    initial_state : None (zeros) or [batch, head, state_k, state_v]
    chunk_size : tokens per chunk of mode "chunked". None takes the size measured best and, on CUDA tensors without
        stops, vector decay or a gradient to keep, the Triton kernel; a number always takes the torch form
    mode : "chunked" (fast), "recurrent" (token by token), "parallel" (the quadratic form); equal up to rounding
    stops : strictly increasing positions at which the state is handed to `on_state`
    on_state : called as on_state(position, state [batch, head, state_k, state_v]) once that token is read and written.
        Returns None to leave the state alone, or the state to go on with, so an edit changes later positions only.
        The tensor it receives is never changed afterwards

    Returns (output [batch, head, pos, state_v] in the type of q, final state [batch, head, state_k, state_v]).
    State and decays are float32 for 16-bit inputs, also under autocast; otherwise everything is in the type of q. With
    pos = 0 the output is empty and the state unchanged. Gradients flow to every tensor, edited states included.

    Raises ValueError naming the argument, the expected shape, type or range, and what was given.
    Source of the forms: see `reference` and `chunked`.
    """
    check_key(k)
    check_query(q, k)
    check_value(v, k)
    check_decay(log_decay, k)
    check_write(write, k)
    check_mode(mode)
    batch, head, pos, _ = q.shape
    state_v = v.shape[3]
    state, ends = check_run(k, state_v, initial_state, chunk_size, stops, on_state)
    if pos == 0:
        return q.new_zeros(batch, head, 0, state_v), state
    size = chunk_size or default_chunk_size(q.device, needs_gradient(q, k, v, log_decay, write, state))
    with torch.autocast(q.device.type, enabled=False):
        if not ends and mode == "chunked" and chunk_size is None and _kernel_applies(q, log_decay, k, v, write, state):
            from .triton import forward

            return forward(q, k, v, log_decay, write, scale, strict, state)
        if not ends:
            output, state = _run(q, k, v, log_decay, write, scale, strict, state, size, mode)
            return output.to(q.dtype), state

        def run(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
            piece = slice(start, stop)
            decay = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, :, piece]
            weight = None if write is None else write[:, :, piece]
            return _run(q[:, :, piece], k[:, :, piece], v[:, :, piece], decay, weight, scale, strict, state, size, mode)

        outputs, state = run_in_pieces(
            run, pos, ends, state, on_state, lambda name, edited: check_state(name, edited, k, state_v)
        )
        return torch.cat(outputs, 2).to(q.dtype), state


def _kernel_applies(q: Tensor, log_decay: Tensor | None, *others: Tensor | None) -> bool:
    """Whether the Triton kernel may stand in for the torch form. Triton is imported only here, on a device that runs it."""
    if not _has_kernel(q.device) or not takes_plain_kernel(q, log_decay, *others):
        return False
    from .triton import supports

    return supports(q, log_decay)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    state: Tensor,
    chunk_size: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    if mode == "recurrent" or (mode == "chunked" and q.shape[2] == 1):
        return recurrent(q, k, v, log_decay, write, scale, strict, state)
    if mode == "parallel":
        return parallel(q, k, v, log_decay, write, scale, strict, state)
    return chunked(q, k, v, log_decay, write, scale, strict, state, chunk_size)
