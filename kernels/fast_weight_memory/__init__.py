"""Fast-weight memories: a small network per head that learns each token's key-value pair by gradient descent while it reads.

One rule serves the memories of Titans (l2 loss, momentum, decay) and of Miras (Moneta, Yaad, Memora: other losses and other retention).
With one matrix, the l2 loss, no momentum and blocks of one token it is the gated delta rule with other names (`as_delta_rule`).
Vocabulary: *keys* and *values* are what is learned, *queries* what is asked; the *step* is the step size, its *decay* the forgetting; the
*surprise* of a token is the norm of its gradient; the *state after token t* has token t learned.

- `fast_weight_memory`: outputs, per-token signals and what is carried on, in two equal forms; states can be read and edited on the way.
- `Memory`, `Loss`, `Link`: the three choices. `Carry`: what is handed from token to token.
- `values_pattern`: the exact token-to-source weights of a linear memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.arguments import (
    check_key,
    check_mode,
    check_positive_integer,
    check_query,
    check_stops,
    check_token_weight,
    check_value,
    compute_dtype,
    shape_of,
)
from kernels.position_groups import check_places, run_in_groups, starts
from kernels.stops import run_in_pieces

from .chunked import chunked
from .links import Link
from .losses import Loss
from .memory import Memory
from .reference import recurrent
from .rule import Carry, Rule, Signals, Tokens

__all__ = ["Carry", "Link", "Loss", "Memory", "Signals", "as_delta_rule", "fast_weight_memory", "values_pattern"]

MODES = ("chunked", "recurrent")
OnCarry = Callable[[int, Carry], Carry | None]


def fast_weight_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    memory: Memory,
    initial: Carry | Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    threshold: Tensor | None = None,
    loss: Loss | None = None,
    link: Link | None = None,
    every: int = 16,
    start: int | Tensor = 0,
    real: Tensor | None = None,
    mode: str = "chunked",
    stops: Sequence[int] | None = None,
    on_carry: OnCarry | None = None,
) -> tuple[Tensor, Signals, Carry]:
    """Runs the memory over the tokens; equations in `reference`.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]; v : [batch, head or 1, pos, state_v]
    step : [batch, head, pos], the step size of each token's gradient step (with the l2 loss ½|e|²: of e kᵀ)
    memory : its architecture
    initial : what an earlier call returned; or the packed weights [batch, head, row, column] to begin with; None: zeros, which a memory
        of depth > 1 cannot leave (every gradient is zero there)
    log_decay, log_momentum : None or [batch, head, pos]; natural logs of the factors, finite and <= 0
    loss, link : None for the l2 loss, and for weights that are what is accumulated
    threshold : [batch, head, pos], where the loss needs it
    every : tokens per block. The gradients of a block are taken at the state before it: this is part of the model, not of its speed
    start, real : as in `log_linear_attention`; blocks begin where a sequence's own position is a multiple of `every`
    mode : "chunked" (block by block) or "recurrent" (token by token); equal up to rounding
    stops : strictly increasing positions at which the carry is handed to `on_carry`
    on_carry : called as on_carry(position, Carry) once that token is learned; returns None, or the Carry to go on with

    Returns (output [batch, head, pos, state_v] in the type of q, Signals, Carry). States are float32 for 16-bit inputs.
    Raises ValueError naming the argument that does not fit.
    """
    loss, link = loss or Loss(), link or Link()
    _check(q, k, v, step, memory, log_decay, log_momentum, threshold, loss)
    check_mode(mode, MODES)
    check_positive_integer("every", every)
    start, real = check_places(start, real, k)
    batch, head, pos, _ = k.shape
    dtype = compute_dtype(q.dtype)
    momentum = log_momentum is not None
    carry = _initial(initial, (batch, head, *memory.shape), dtype, momentum, k)
    if stops is None and on_carry is not None:
        raise ValueError("on_carry: given without stops, so it would never be called; pass the positions to stop at")
    ends = [] if stops is None else check_stops(stops, on_carry, pos)
    rule = Rule(memory, loss, link, every)
    if pos == 0:
        empty = q.new_zeros(batch, head, 0, dtype=dtype)
        return q.new_zeros(batch, head, 0, memory.state_v), Signals(empty, empty), carry
    given = (q, k, v.expand(batch, head, pos, v.shape[3]), step, log_decay, log_momentum, threshold)
    tokens = Tokens(*(None if x is None else x.to(dtype) for x in given))  # type: ignore[arg-type]
    form = chunked if mode == "chunked" else recurrent

    def group(parts: Sequence[Tensor | None], state: Tensor, place: int) -> tuple[Tensor, Tensor]:
        if not parts[0].shape[2]:  # type: ignore[union-attr]
            return torch.cat([torch.zeros_like(parts[2]), torch.zeros_like(parts[2][..., :2])], -1), state  # type: ignore[arg-type, index]
        output, signals, after = form(Tokens(*parts), rule, _apart(state, momentum), place)  # type: ignore[arg-type]
        return torch.cat([output, torch.stack(signals, -1)], -1), _together(after)

    def run(begin: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        mask = None if real is None else real[:, begin:stop]
        first = start + begin
        if real is not None and begin:
            first = starts(start, batch, k.device) + real[:, :begin].sum(1)
        return run_in_groups(group, tokens.part(begin, stop).listed(), state, first, mask)

    def hand_out(position: int, state: Tensor) -> Tensor | None:
        assert on_carry is not None
        edited = on_carry(position, _apart(state, momentum))
        if edited is None:
            return None
        for name, value in edited._asdict().items():
            if value is not None:
                _check_packed(f"on_carry at position {position}: {name}", value, (batch, head, *memory.shape), dtype)
        return _together(edited)

    with torch.autocast(q.device.type, enabled=False):
        outputs, state = run_in_pieces(
            run, pos, ends, _together(carry), hand_out if ends else None, lambda name, x: None
        )
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    output, losses, surprise = joined[..., :-2], joined[..., -2], joined[..., -1]
    return output.to(q.dtype), Signals(losses, surprise), _apart(state, momentum)


def values_pattern(q: Tensor, k: Tensor, step: Tensor, **options: object) -> Tensor:
    """Exact weights alpha [batch, head, query, key] with output = alpha @ v, for a memory of one matrix that begins empty.

    The l2 loss makes every write linear in the values, so running the memory with one-hot values reads its weights off. Arguments as in
    `fast_weight_memory`; float32 for 16-bit inputs.
    """
    check_key(k)
    pos, dtype = k.shape[2], compute_dtype(k.dtype)
    one_hot = torch.eye(pos, dtype=dtype, device=k.device).expand(k.shape[0], 1, pos, pos)
    memory = Memory(k.shape[3], pos)
    return fast_weight_memory(q.to(dtype), k.to(dtype), one_hot, step, memory, **options)[0]  # type: ignore[arg-type]


def as_delta_rule(v: Tensor, step: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Values and beta with which `delta_rule`, given the same keys and log_decay, runs the memory of one matrix exactly.

    For the l2 loss, no momentum and blocks of one token: M_t = a M - step k (kᵀM - v)ᵀ with a = exp(log_decay) is the gated delta rule
    with beta = step / a and values a v. Not defined where a = 0. Test-time regression (arXiv 2501.12352) states the map.
    """
    factor = log_decay.exp()
    return factor.unsqueeze(-1) * v, step / factor


def _together(carry: Carry) -> Tensor:
    return torch.stack([x for x in carry if x is not None], 2)


def _apart(state: Tensor, momentum: bool) -> Carry:
    parts = state.unbind(2)
    return Carry(*parts) if momentum else Carry(parts[0], None, parts[1])


def _initial(
    initial: Carry | Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, momentum: bool, like: Tensor
) -> Carry:
    nothing = like.new_zeros(shape, dtype=dtype)
    if initial is None:
        return Carry(nothing, nothing if momentum else None, nothing)
    if isinstance(initial, Carry):
        if (initial.momentum is None) == momentum:
            raise ValueError(
                f"initial: expected a carry {'with' if momentum else 'without'} momentum, as log_momentum says; got the other"
            )
        for name, value in initial._asdict().items():
            if value is not None:
                _check_packed(f"initial.{name}", value, shape, dtype)
        return initial
    _check_packed("initial", initial, shape, dtype)
    return Carry(initial, nothing if momentum else None, initial)


def _check_packed(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected [batch, head, row, column] = {list(shape)}, got {shape_of(value)}")
    if value.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the type of states of these inputs, got {value.dtype}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    memory: Memory,
    log_decay: Tensor | None,
    log_momentum: Tensor | None,
    threshold: Tensor | None,
    loss: Loss,
) -> None:
    check_key(k)
    check_query(q, k)
    check_value(v, k)
    check_token_weight("step", step, k)
    for name, factor in (("log_decay", log_decay), ("log_momentum", log_momentum), ("threshold", threshold)):
        if factor is not None:
            check_token_weight(name, factor, k)
    if (k.shape[3], v.shape[3]) != (memory.state_k, memory.state_v):
        raise ValueError(
            f"memory: expected widths (state_k, state_v) = {(k.shape[3], v.shape[3])} of k and v, got "
            f"{(memory.state_k, memory.state_v)}"
        )
    if loss.needs_threshold != (threshold is not None):
        needed = "is needed by" if loss.needs_threshold else "has no meaning for"
        raise ValueError(f"threshold: {needed} the loss {loss.kind!r}")
