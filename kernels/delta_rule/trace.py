"""The state over time, read exactly through the pseudo-values.

Once u_t = beta_t (v_t - S^T k_t) is known, the delta rule is gated linear attention that writes u instead of v:
S_t = diag(exp(log_decay_t)) S_{t-1} + k_t u_t^T. Entries, states and norms over time are therefore those of
`kernels.gated_linear_attention` with u as values. The functions here find u first, which costs most of a forward run;
where `delta_rule_and_pseudo_values` has just returned it, give it to those functions directly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import gated_linear_attention as linear
from kernels.arguments import (
    check_decay,
    check_key,
    check_mode,
    check_positions,
    check_positive_integer,
    check_state,
    check_token_weight,
    check_value,
    compute_dtype,
)

from .chunked import chunked, default_chunk_size
from .reference import recurrent

MODES = ("chunked", "recurrent")


def pseudo_values(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "chunked",
) -> Tensor:
    """What each token really writes: u_t = beta_t (v_t - S^T k_t), S the state decayed to token t. Its norm is the
    surprise of token t.

    Parameters
    ----------
    k : [batch, head, pos, state_k]
    v : [batch, head or 1, pos, state_v]
    beta : [batch, head, pos]
    log_decay, initial_state, chunk_size, mode : as in `delta_rule`

    Returns [batch, head, pos, state_v]; float32 for 16-bit inputs, else the type of k. Raises ValueError naming the
    argument that does not fit.
    """
    check_key(k)
    check_value(v, k)
    check_token_weight("beta", beta, k)
    check_decay(log_decay, k)
    check_mode(mode, MODES)
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    batch, head, pos, state_k = k.shape
    state = initial_state
    if state is None:
        state = k.new_zeros(batch, head, state_k, v.shape[3], dtype=compute_dtype(k.dtype))
    else:
        check_state("initial_state", state, k, v.shape[3])
    if pos == 0:
        return k.new_zeros(batch, head, 0, v.shape[3], dtype=state.dtype)
    with torch.autocast(k.device.type, enabled=False):
        if mode == "recurrent" or pos == 1:
            return recurrent(None, k, v, beta, log_decay, 1.0, state)[1]
        return chunked(None, k, v, beta, log_decay, 1.0, state, chunk_size or default_chunk_size(k.device))[1]


def trace_entries(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    entries: Sequence[Sequence[int]] | Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Exact values of chosen state entries after every token. Arguments as in `pseudo_values`.

    entries : list of (head, state_k index, state_v index), or an integer tensor [entry, 3].
    Returns [batch, pos, entry]; float32 for 16-bit inputs, else the type of k. Raises ValueError naming the argument
    that does not fit.
    """
    written = pseudo_values(k, v, beta, log_decay=log_decay, initial_state=initial_state)
    keys = k.to(written.dtype)
    return linear.trace_entries(keys, written, entries, log_decay=log_decay, initial_state=initial_state)


def states_at(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    positions: Sequence[int] | Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States after the tokens at `positions`, storing only those. Arguments as in `pseudo_values`.

    positions may come in any order and repeat. Returns [batch, position, head, state_k, state_v] in the order asked.
    Raises ValueError naming the argument that does not fit.
    """
    check_key(k)
    asked = check_positions("positions", positions, k.shape[2])
    written = pseudo_values(k, v, beta, log_decay=log_decay, initial_state=initial_state)
    keys = k.to(written.dtype)
    return linear.states_at(keys, written, asked, log_decay=log_decay, initial_state=initial_state)


def state_norms(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Frobenius norm of the state after every token, [batch, head, pos]. Arguments as in `pseudo_values`.

    Accuracy in float32 as in `gated_linear_attention.state_norms`: a norm is known to about 1e-3 of the largest one
    before it in the same chunk.
    """
    written = pseudo_values(k, v, beta, log_decay=log_decay, initial_state=initial_state)
    return linear.state_norms(k.to(written.dtype), written, log_decay=log_decay, initial_state=initial_state)
