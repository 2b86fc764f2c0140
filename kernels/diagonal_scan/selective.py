"""Mamba's selective scan on the diagonal scan, segment of tokens by segment, and its states and entries over time.

    h_t = exp(delta_t A) * h_{t-1} + delta_t x_t B_t,    y_t = C_t . h_t + D * x_t

Decays and writes of [batch, pos, channel, state] exist for one segment of tokens at a time. Inside, the state lies as
[state, channel], so that reading it is a product of matrices with long rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import (
    check_mode,
    check_positions,
    check_positive_integer,
    check_stops,
    compute_dtype,
)
from kernels.gated_linear_attention.decay import decayed_sum
from kernels.stops import OnState, run_in_pieces

from .arguments import check_scan_state, check_selective, check_skip
from .reference import selective_recurrent
from .scan import scan_segment, segment_length

MODES = ("chunked", "recurrent")


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs h_t = exp(delta_t A) * h_{t-1} + delta_t x_t B_t and reads y_t = C_t . h_t + D * x_t, per channel.

    Parameters
    ----------
    x : [batch, pos, channel]
    delta : [batch, pos, channel], step sizes after the softplus, >= 0 (values are not checked)
    A : [channel, state], real and < 0 (values are not checked): -exp(A_log) in Mamba
    B, C : [batch, pos, state]
    D : None or [channel], the skip
    initial_state : None (zeros) or [batch, channel, state]
    chunk_size : tokens whose decays and writes exist at once; None takes the number measured best for the size
    mode : "chunked" (fast) or "recurrent" (token by token); equal up to rounding
    stops : strictly increasing positions at which the state is handed to `on_state`
    on_state : called as on_state(position, state [batch, channel, state]) once that token is read and written. Returns
        None to leave the state alone, or the state to go on with, so an edit changes later positions only. The tensor
        it receives is never changed afterwards

    Returns (y [batch, pos, channel] in the type of x, final state [batch, channel, state]). The state is float32 for
    16-bit x, also under autocast, else of the type of x. Gradients flow to every tensor, edited states included.
    Raises ValueError naming the argument, what was expected and what was given. Source: see `reference`.
    """
    check_selective(x, delta, A, B=B, C=C)
    check_skip(D, delta)
    check_mode(mode, MODES)
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    pos, dtype = x.shape[1], compute_dtype(x.dtype)
    state = _initial(x, A, initial_state)
    if stops is None and on_state is not None:
        raise ValueError("on_state: given without stops, so it would never be called; pass the positions to stop at")
    ends = [] if stops is None else check_stops(stops, on_state, pos)
    if pos == 0:
        return torch.zeros_like(x), state
    size = chunk_size or default_chunk_size(state)

    def run(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        x_piece, delta_piece, B_piece, C_piece = (tensor[:, start:stop].to(dtype) for tensor in (x, delta, B, C))
        if mode == "recurrent":
            output, state = selective_recurrent(x_piece, delta_piece, A.to(dtype), B_piece, C_piece, state)
        else:
            output, state = _chunked(x_piece, delta_piece, A.to(dtype), B_piece, C_piece, state, size)
        assert output is not None
        return output, state

    with torch.autocast(x.device.type, enabled=False):
        outputs, state = run_in_pieces(
            run, pos, ends, state, on_state, lambda name, edited: _check_state(name, edited, x, A)
        )
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if D is not None:
            output = torch.addcmul(output, x.to(dtype), D.to(dtype))
        return output.to(x.dtype), state


def default_chunk_size(state: Tensor) -> int:
    """Measured on a CPU with 512 channels of 16: 32 tokens are best, 128 half as fast; the size of the chunk decides."""
    return min(256, segment_length(state.numel(), state.device))


def selective_states_at(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    positions: Sequence[int] | Tensor,
    initial_state: Tensor | None = None,
) -> Tensor:
    """States after the tokens at `positions`, storing only those. Arguments as in `selective_scan`.

    positions may come in any order and repeat. Returns [batch, position, channel, state] in the order asked; float32
    for 16-bit x, else the type of x. Raises ValueError naming the argument that does not fit.
    """
    check_selective(x, delta, A, B=B)
    asked = check_positions("positions", positions, x.shape[1])
    state = _initial(x, A, initial_state)
    if not asked:
        return state.unsqueeze(1)[:, :0]
    kept: dict[int, Tensor] = {}
    start = 0
    for position in sorted(set(asked)):
        x_piece, delta_piece, B_piece = (tensor[:, start : position + 1].to(state.dtype) for tensor in (x, delta, B))
        size = default_chunk_size(state)
        _, state = _chunked(x_piece, delta_piece, A.to(state.dtype), B_piece, None, state, size)
        kept[position] = state
        start = position + 1
    return torch.stack([kept[position] for position in asked], 1)


def selective_entries(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    entries: Sequence[Sequence[int]] | Tensor,
    initial_state: Tensor | None = None,
) -> Tensor:
    """Exact values of chosen state entries after every token, in time and memory proportional to pos * entries.

    entries : list of (channel, state index), or an integer tensor [entry, 2]. Other arguments as in `selective_scan`.
    Returns [batch, pos, entry]; float32 for 16-bit x, else the type of x. Raises ValueError naming the argument that
    does not fit.
    """
    check_selective(x, delta, A, B=B)
    state = _initial(x, A, initial_state)
    pairs = _check_entries(entries, tuple(A.shape))
    if not pairs or not x.shape[1]:
        return x.new_zeros(x.shape[0], x.shape[1], len(pairs), dtype=state.dtype)
    channels, states = torch.tensor(pairs, dtype=torch.long, device=x.device).unbind(1)
    step = delta[:, :, channels].to(state.dtype)
    written = step * x[:, :, channels].to(state.dtype) * B[:, :, states].to(state.dtype)
    decay = (step * A[channels, states].to(state.dtype)).exp()
    return decayed_sum(written, decay, state[:, channels, states])


def _chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor | None, Tensor]:
    """Same arguments and results as `reference.selective_recurrent`."""
    rows = A.mT.contiguous()  # [state, channel]
    state = state.mT
    outputs = []
    # Split, not sliced chunk by chunk: the gradient of each slice would be a tensor as long as the whole run.
    steps, scaled_inputs = delta.split(chunk_size, 1), (delta * x).split(chunk_size, 1)
    keys = B.split(chunk_size, 1)
    queries = [None] * len(keys) if C is None else C.split(chunk_size, 1)
    for step, scaled, key, query in zip(steps, scaled_inputs, keys, queries, strict=True):
        decay = (step.unsqueeze(2) * rows).exp()  # [batch, pos, state, channel]
        states, state = scan_segment(decay, key.unsqueeze(3) * scaled.unsqueeze(2), state)
        if query is not None:
            outputs.append((query.unsqueeze(2) @ states).squeeze(2))
    return (torch.cat(outputs, 1) if outputs else None), state.mT


def _check_entries(entries: Sequence[Sequence[int]] | Tensor, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    raw = entries.tolist() if isinstance(entries, Tensor) else list(entries)
    checked = []
    for entry in raw:
        if not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"entries: expected pairs (channel, state index), got {entry!r}")
        for index, size, axis in zip(entry, sizes, ("channel", "state"), strict=True):
            if int(index) != index or not 0 <= index < size:
                raise ValueError(f"entries: {axis} index {index} of {tuple(entry)} is outside 0 … {size - 1}")
        checked.append(tuple(int(index) for index in entry))
    return checked


def _initial(x: Tensor, A: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return x.new_zeros(x.shape[0], *A.shape, dtype=compute_dtype(x.dtype))
    _check_state("initial_state", initial_state, x, A)
    return initial_state


def _check_state(name: str, state: object, x: Tensor, A: Tensor) -> None:
    shape = (x.shape[0], *A.shape)
    check_scan_state(name, state, shape, "batch, channel, state", compute_dtype(x.dtype), x)
