"""The gated delta rule: a matrix state that, before each write, forgets and takes back what the key already recalls.

    S <- diag(exp(log_decay_t)) S_{t-1};    S_t = S + beta_t k_t (v_t - S^T k_t)^T;    o_t = scale * S_t^T q_t

One recurrence serves DeltaNet (no decay), Gated DeltaNet and Qwen3-Next (scalar decay) and Kimi Delta Attention (vector
decay). Vocabulary: *beta* is the write strength (1 replaces what the key recalls, 0 writes nothing); the *pseudo-value*
u_t = beta_t (v_t - S^T k_t) is what is really written; the *state after token t* has token t read and written.

- `delta_rule`, `delta_rule_and_pseudo_values`: outputs and final state in two equal forms; the state can be read and
  edited on the way.
- `effective_pattern`, `values_probe`: the exact token-to-source weights, in closed form and by one-hot values.
- `pseudo_values`, `trace_entries`, `states_at`, `state_norms`: writes and state over time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import (
    check_decay,
    check_key,
    check_mode,
    check_query,
    check_run,
    check_state,
    check_token_weight,
    check_value,
)
from kernels.derivatives import takes_plain_kernel
from kernels.devices import has_kernel as _has_kernel
from kernels.gated_linear_attention import values_probe
from kernels.stops import OnState, run_in_pieces

from .chunked import chunked, default_chunk_size
from .pattern import PatternFactors, effective_pattern
from .reference import recurrent
from .trace import MODES, pseudo_values, state_norms, states_at, trace_entries

__all__ = [
    "PatternFactors",
    "delta_rule",
    "delta_rule_and_pseudo_values",
    "effective_pattern",
    "pseudo_values",
    "state_norms",
    "states_at",
    "trace_entries",
    "values_probe",
]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t.

    The state keeps its size only if beta_t |k_t|^2 <= 2; models normalise their keys, this function does not.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]
    v : [batch, head or 1, pos, state_v]; one head is shared by all
    beta : [batch, head, pos], the write strength
    log_decay : natural log of the decay per token, finite and <= 0 (values are not checked). None: no decay; [head]:
        constant; [batch, head, pos]: one factor per token; [batch, head, pos, state_k]: one per token and state row.
        To forget everything use a large negative number such as -1e4, not -inf
    initial_state : None (zeros) or [batch, head, state_k, state_v]
    chunk_size : tokens per chunk of mode "chunked". None takes the size measured best and, on CUDA tensors without
        stops, vector decay or a gradient to keep, the Triton kernels; a number always takes the torch form
    mode : "chunked" (fast) or "recurrent" (token by token); equal up to rounding
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
    output, _, state = delta_rule_and_pseudo_values(
        q,
        k,
        v,
        beta,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        chunk_size=chunk_size,
        mode=mode,
        stops=stops,
        on_state=on_state,
    )
    return output, state


def delta_rule_and_pseudo_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `delta_rule`, with what every token really wrote; both forms compute it anyway.

    Returns (output, pseudo-values [batch, head, pos, state_v] in the type of the state, final state).
    """
    check_key(k)
    check_query(q, k)
    check_value(v, k)
    check_token_weight("beta", beta, k)
    check_decay(log_decay, k)
    check_mode(mode, MODES)
    batch, head, pos, _ = q.shape
    state_v = v.shape[3]
    state, ends = check_run(k, state_v, initial_state, chunk_size, stops, on_state)
    if pos == 0:
        return q.new_zeros(batch, head, 0, state_v), state.new_zeros(batch, head, 0, state_v), state
    kernel_may = not ends and mode == "chunked" and chunk_size is None
    if kernel_may and _kernel_applies(q, log_decay, k, v, beta, state):
        from .triton import forward

        with torch.autocast(q.device.type, enabled=False):
            return forward(q, k, v, beta, log_decay, scale, state)
    size = chunk_size or default_chunk_size(q.device)
    written: list[Tensor] = []

    def run(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        q_piece, k_piece, v_piece, beta_piece = (x[:, :, start:stop] for x in (q, k, v, beta))
        g = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, :, start:stop]
        if mode == "recurrent" or stop - start == 1:
            output, pseudo, state = recurrent(q_piece, k_piece, v_piece, beta_piece, g, scale, state)
        else:
            output, pseudo, state = chunked(q_piece, k_piece, v_piece, beta_piece, g, scale, state, size)
        assert output is not None
        written.append(pseudo)
        return output, state

    with torch.autocast(q.device.type, enabled=False):
        outputs, state = run_in_pieces(
            run, pos, ends, state, on_state, lambda name, edited: check_state(name, edited, k, state_v)
        )
        if len(outputs) == 1:
            return outputs[0].to(q.dtype), written[0], state
        return torch.cat(outputs, 2).to(q.dtype), torch.cat(written, 2), state


def _kernel_applies(q: Tensor, log_decay: Tensor | None, *others: Tensor | None) -> bool:
    """Whether the Triton kernels may stand in for the torch form. Triton is imported only here, on a device that runs it."""
    if not _has_kernel(q.device) or not takes_plain_kernel(q, log_decay, *others):
        return False
    from .triton import supports

    return supports(q, log_decay)
