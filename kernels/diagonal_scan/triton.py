"""The diagonal scan as one Triton kernel, real or complex, forwards or in reverse.

A program owns a few channels of one sequence, keeps their state in registers and walks over the chunks of tokens. Inside
a chunk the affine maps h -> a h + b of all tokens are composed by a parallel scan (Blelloch 1990, *Prefix sums and their
applications*, section 1.4.1); each composed map is then applied to the state before the chunk. Nothing is added
atomically: two runs give the same bits.

Every load is widened to float32 before any arithmetic; products and the state are float32. The factors of one chunk are
multiplied with each other, so growth is safe as long as the product of CHUNK factors fits into float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
BLOCK = 32


@triton.jit
def compose(factor, offset, later_factor, later_offset):
    return later_factor * factor, later_factor * offset + later_offset


@triton.jit
def compose_complex(
    factor, factor_imag, offset, offset_imag, later_factor, later_factor_imag, later_offset, later_offset_imag
):
    return (
        later_factor * factor - later_factor_imag * factor_imag,
        later_factor * factor_imag + later_factor_imag * factor,
        later_factor * offset - later_factor_imag * offset_imag + later_offset,
        later_factor * offset_imag + later_factor_imag * offset + later_offset_imag,
    )


@triton.jit
def scan_walk(
    decay_pointer,
    inputs_pointer,
    state_pointer,
    states_pointer,
    final_pointer,
    decay_batch,
    decay_pos,
    decay_channel,
    inputs_batch,
    inputs_pos,
    inputs_channel,
    pos,
    channel,
    LOG: tl.constexpr,
    COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (batch * channel tiles). The names ending in an axis are strides, in real numbers.

    state and final [batch, channel], states [batch, pos, channel], all contiguous. Of a complex number the real part
    lies first and the imaginary part next to it.
    """
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    tiles = tl.cdiv(channel, BLOCK)
    batch_index = (tl.program_id(0) // tiles).to(tl.int64)
    columns = ((tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column_exists = columns < channel
    token = tl.arange(0, CHUNK)
    is_last = token[:, None] == CHUNK - 1
    decay_pointer += batch_index * decay_batch + columns[None, :] * decay_channel
    inputs_pointer += batch_index * inputs_batch + columns[None, :] * inputs_channel
    states_pointer += (batch_index * pos * channel + columns[None, :]) * PARTS
    state_offset = (batch_index * channel + columns) * PARTS
    state = tl.load(state_pointer + state_offset, mask=column_exists, other=0.0)
    if COMPLEX:
        state_imag = tl.load(state_pointer + state_offset + 1, mask=column_exists, other=0.0)

    for start in range(0, pos, CHUNK):
        step = (start + token).to(tl.int64)[:, None]
        exists = (step < pos) & column_exists[None, :]
        at = pos - 1 - step if REVERSE else step
        # Tokens behind the end neither decay nor write, so the last row of the chunk holds the state at the true end.
        factor = tl.load(decay_pointer + at * decay_pos, mask=exists, other=0.0 if LOG else 1.0).to(tl.float32)
        offset = tl.load(inputs_pointer + at * inputs_pos, mask=exists, other=0.0).to(tl.float32)
        target = states_pointer + at * channel * PARTS
        if COMPLEX:
            factor_imag = tl.load(decay_pointer + at * decay_pos + 1, mask=exists, other=0.0)
            offset_imag = tl.load(inputs_pointer + at * inputs_pos + 1, mask=exists, other=0.0)
            if LOG:
                magnitude = tl.exp(factor)
                factor, factor_imag = magnitude * tl.cos(factor_imag), magnitude * tl.sin(factor_imag)
            factor, factor_imag, offset, offset_imag = tl.associative_scan(
                (factor, factor_imag, offset, offset_imag), 0, compose_complex
            )
            states = factor * state[None, :] - factor_imag * state_imag[None, :] + offset
            states_imag = factor * state_imag[None, :] + factor_imag * state[None, :] + offset_imag
            tl.store(target, states, mask=exists)
            tl.store(target + 1, states_imag, mask=exists)
            state_imag = tl.sum(tl.where(is_last, states_imag, 0.0), axis=0)
        else:
            if LOG:
                factor = tl.exp(factor)
            factor, offset = tl.associative_scan((factor, offset), 0, compose)
            states = factor * state[None, :] + offset
            tl.store(target, states.to(states_pointer.dtype.element_ty), mask=exists)
        state = tl.sum(tl.where(is_last, states, 0.0), axis=0)

    tl.store(final_pointer + state_offset, state, mask=column_exists)
    if COMPLEX:
        tl.store(final_pointer + state_offset + 1, state_imag, mask=column_exists)


def supports(state_dtype: torch.dtype) -> bool:
    """Whether the kernel carries states of this type; double precision takes the torch form."""
    return state_dtype in (torch.float32, torch.complex64)


def forward(
    decay: Tensor, inputs: Tensor, state: Tensor, decay_is_log: bool, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """decay [batch or 1, pos or 1, *channels or 1], inputs [batch, pos, *channels] with pos >= 1, state [batch, *channels].

    The state is float32 or complex64; the returned states are of `dtype`. No gradient. On CUDA tensors, or on CPU
    tensors when Triton interprets (TRITON_INTERPRET=1 before it is imported).
    """
    shape = inputs.shape
    batch, pos = shape[:2]
    channel = state[0].numel()
    # A conjugate or negative view is a mark on the tensor that the kernel, which reads memory, would not see.
    decay, inputs, state = (x.resolve_conj().resolve_neg() for x in (decay, inputs, state))
    if state.is_complex():
        decay, inputs = decay.to(state.dtype), inputs.to(state.dtype)
    inputs = inputs.reshape(batch, pos, channel)
    # Batch and positions of a constant decay are never repeated in memory.
    decay = decay.expand(*decay.shape[:2], *shape[2:]).reshape(*decay.shape[:2], channel).expand(batch, pos, channel)
    states = torch.empty(batch, pos, channel, dtype=dtype, device=inputs.device)
    state = state.reshape(batch, channel).contiguous()
    final = torch.empty_like(state)
    given = [decay, inputs, state, states, final]
    if state.is_complex():
        given = [torch.view_as_real(x) for x in given]
    block = min(BLOCK, triton.next_power_of_2(channel))
    scan_walk[(batch * triton.cdiv(channel, block),)](
        *given,
        *given[0].stride()[:3],
        *given[1].stride()[:3],
        pos,
        channel,
        LOG=decay_is_log,
        COMPLEX=state.is_complex(),
        REVERSE=reverse,
        CHUNK=CHUNK,
        BLOCK=block,
        num_warps=4,
    )
    return states.view(shape), final.view(batch, *shape[2:])
