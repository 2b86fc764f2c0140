"""The diagonal scan h_t = a_t * h_{t-1} + b_t in the form that is fast for its size, and its states at chosen tokens.

Token by token, every step costs a few microseconds however small it is; in blocks of eight tokens, the steps are
fewer and the numbers are read more often. So wide states walk token by token and narrow ones in blocks. Doubling
(Hillis and Steele) and cumulative sums of logarithms are slower than either on a CPU, and the latter overflows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.arguments import check_mode, check_positions, check_stops
from kernels.derivatives import needs_gradient, takes_plain_kernel
from kernels.devices import has_kernel
from kernels.gated_linear_attention.decay import decayed_sum
from kernels.stops import OnState, run_in_pieces

from .arguments import check_scan, check_scan_state, output_dtype, scan_dtype
from .reference import recurrent

MODES = ("auto", "blocked", "recurrent")

# States of fewer real numbers than this go in blocks. Measured on a CPU: at 256 numbers blocks are 8 times faster, at
# 1024 2.5 times, at 4096 the step loop is twice as fast, and equal when a gradient is kept. A GPU step costs more.
NARROW = {"cpu": 2048, "cuda": 1 << 18}
# Numbers of one segment: exponentials and blocks of a longer run are made and dropped segment by segment.
SEGMENT = {"cpu": 1 << 18, "cuda": 1 << 24}


def diagonal_scan(
    decay: Tensor,
    inputs: Tensor,
    initial_state: Tensor | None = None,
    *,
    decay_is_log: bool = False,
    reverse: bool = False,
    mode: str = "auto",
    stops: Sequence[int] | None = None,
    on_state: OnState | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs h_t = a_t * h_{t-1} + b_t elementwise over the tokens, real or complex.

    Parameters
    ----------
    decay : a, of the shape of inputs with 1 for any axis along which it is constant, or [*channels]; any factor, and
        with decay_is_log its natural logarithm (of magnitude |a| = exp of the real part)
    inputs : b, [batch, pos, *channels] with any number of channel axes
    initial_state : None (zeros) or [batch, *channels], h before the first token
    decay_is_log : decay holds log a; it is exponentiated segment by segment
    reverse : run from the last token to the first, h_t = a_t * h_{t+1} + b_t; the initial state is then h behind the
        last token and the final state h at the first
    mode : "recurrent" (token by token), "blocked" (eight tokens at once), "auto" (the faster for the size and, on CUDA
        tensors without stops, double precision or a gradient to keep, the Triton kernel); equal up to rounding
    stops : strictly increasing positions at which the state is handed to `on_state`
    on_state : called as on_state(position, state [batch, *channels]) once that token is read, in the order of the run.
        Returns None to leave the state alone, or the state to go on with, so an edit changes only tokens that are run
        later. The tensor it receives is never changed afterwards

    Returns (states [batch, pos, *channels] before edits, final state [batch, *channels]). The state is at least
    float32, complex if decay or inputs are; the returned states of real 16-bit inputs are of their type.
    Raises ValueError naming the argument, what was expected and what was given.
    """
    decay, inputs = check_scan(decay, inputs)
    check_mode(mode, MODES)
    pos = inputs.shape[1]
    state = _initial(decay, inputs, initial_state)
    if stops is None and on_state is not None:
        raise ValueError("on_state: given without stops, so it would never be called; pass the positions to stop at")
    ends = [] if stops is None else check_stops(stops, on_state, pos)
    dtype = output_dtype(inputs, state.dtype)
    if pos == 0:
        return inputs.to(dtype), state
    if mode == "auto" and not ends and _kernel_applies(decay, inputs, state):
        from .triton import forward

        return forward(decay, inputs, state, decay_is_log, reverse, dtype)
    if reverse:
        decay, inputs, ends = decay.flip(1), inputs.flip(1), [pos - 1 - end for end in reversed(ends)]

    def run(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for decay_part, inputs_part in _segments(decay, inputs, start, stop, decay_is_log, state.dtype):
            states, state = scan_segment(decay_part, inputs_part, state, mode)
            parts.append(states.to(dtype))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), state

    def hand_out(position: int, state: Tensor) -> Tensor | None:
        assert on_state is not None
        place = pos - 1 - position if reverse else position
        edited = on_state(place, state)
        if edited is not None:
            _check_state(f"on_state at position {place}", edited, decay, inputs)
        return edited

    outputs, state = run_in_pieces(run, pos, ends, state, hand_out if ends else None, lambda name, edited: None)
    states = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return (states.flip(1) if reverse else states), state


def scan_states_at(
    decay: Tensor,
    inputs: Tensor,
    positions: Sequence[int] | Tensor,
    initial_state: Tensor | None = None,
    *,
    decay_is_log: bool = False,
    reverse: bool = False,
) -> Tensor:
    """States h at the tokens `positions`, storing one segment and those asked for. Arguments as in `diagonal_scan`.

    positions may come in any order and repeat. Returns [batch, position, *channels] in the order asked and in the type
    of the state. Raises ValueError naming the argument that does not fit.
    """
    decay, inputs = check_scan(decay, inputs)
    pos = inputs.shape[1]
    asked = check_positions("positions", positions, pos)
    state = _initial(decay, inputs, initial_state)
    if not asked:
        return state.unsqueeze(1)[:, :0]
    if reverse:
        decay, inputs, asked = decay.flip(1), inputs.flip(1), [pos - 1 - position for position in asked]
    kept: dict[int, Tensor] = {}
    start = 0
    for position in sorted(set(asked)):
        for decay_part, inputs_part in _segments(decay, inputs, start, position + 1, decay_is_log, state.dtype):
            _, state = scan_segment(decay_part, inputs_part, state)
        kept[position] = state
        start = position + 1
    return torch.stack([kept[position] for position in asked], 1)


def scan_segment(decay: Tensor, inputs: Tensor, state: Tensor, mode: str = "auto") -> tuple[Tensor, Tensor]:
    """`reference.recurrent`, in the faster form. decay [batch or 1, pos or 1, *channels or 1], all of one type."""
    numbers = state.numel() * (2 if state.is_complex() else 1)
    narrow = NARROW.get(state.device.type, NARROW["cpu"]) * (2 if needs_gradient(decay, inputs, state) else 1)
    if mode == "recurrent" or inputs.shape[1] == 1 or (mode == "auto" and numbers >= narrow):
        return recurrent(decay, inputs, state)
    batch, pos = inputs.shape[:2]
    decay = decay.expand_as(inputs)
    states = decayed_sum(inputs.reshape(batch, pos, -1), decay.reshape(batch, pos, -1), state.reshape(batch, -1))
    states = states.reshape(inputs.shape)
    return states, states[:, -1].clone()  # a view of the last state would keep all the others alive


def segment_length(numbers: int, device: torch.device) -> int:
    """Tokens of one segment when each token holds this many numbers."""
    return max(8, SEGMENT.get(device.type, SEGMENT["cpu"]) // max(1, numbers))


def _kernel_applies(decay: Tensor, inputs: Tensor, state: Tensor) -> bool:
    """Whether the Triton kernel may stand in for the torch form. Triton is imported only here, on a device that runs it."""
    if not has_kernel(state.device) or not takes_plain_kernel(decay, inputs, state):
        return False
    from .triton import supports

    return supports(state.dtype)


def _segments(
    decay: Tensor, inputs: Tensor, start: int, stop: int, decay_is_log: bool, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """(decay, inputs) of tokens start … stop - 1 in the type of the state, one segment after the other."""
    length = segment_length(inputs[:, 0].numel(), inputs.device)
    # Split, not sliced one by one: the gradient of each slice would be a tensor as long as the whole run.
    inputs_parts = inputs[:, start:stop].split(length, 1)
    constant = decay.shape[1] == 1
    decay_parts = [decay] * len(inputs_parts) if constant else decay[:, start:stop].split(length, 1)
    for decay_part, inputs_part in zip(decay_parts, inputs_parts, strict=True):
        factor = decay_part.to(dtype)
        yield (factor.exp() if decay_is_log else factor), inputs_part.to(dtype)


def _initial(decay: Tensor, inputs: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return inputs.new_zeros(inputs.shape[0], *inputs.shape[2:], dtype=scan_dtype(decay, inputs))
    _check_state("initial_state", initial_state, decay, inputs)
    return initial_state


def _check_state(name: str, state: object, decay: Tensor, inputs: Tensor) -> None:
    shape = (inputs.shape[0], *inputs.shape[2:])
    check_scan_state(name, state, shape, "batch, *channels", scan_dtype(decay, inputs), inputs)
