"""The chunked form as one Triton kernel, for no decay, a constant decay per head, or one factor per token.

A program owns a tile of one head's state, [BLOCK_K, BLOCK_V], keeps it in registers and walks over the chunks; what a
tile adds to the output does not depend on the other tiles, so wide states (BDH: 8192 rows) are cut into tiles of rows
whose outputs are summed afterwards, in a fixed order. No atomics: two runs give the same bits.

Every load is widened to float32 before any arithmetic. Matrix products of 16-bit inputs run in tf32, which holds
float16 and bfloat16 numbers exactly; what is not one of them (the state when it is read, scores, decayed values) is
rounded to 11 bits for the product, while the state itself is carried in float32. Products of float32 inputs take three
tf32 passes, which keep float32's accuracy to about 1e-6.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The outputs of all row tiles of one launch; longer runs go in several launches, which hand the state on.
PARTIAL_OUTPUT_BYTES = 256 << 20


@triton.jit
def chunk_decays(log_decay_pointer, at, decay_pos, exists, visible):
    """Decays of the chunk of tokens `at`: from token to token where visible, else 0; from the chunk's start through each
    token; from each token to the chunk's end; of the whole chunk.
    """
    # Tokens behind the end decay nothing, so the whole sum reaches to the true end of the run.
    g = tl.load(log_decay_pointer + at * decay_pos, mask=exists, other=0.0).to(tl.float64)
    total = tl.sum(g, axis=0)
    g = tl.cumsum(g, axis=0)
    # As two float32 numbers: close values of g differ exactly in `high`, and `low` adds what rounding lost.
    high = g.to(tl.float32)
    low = (g - high.to(tl.float64)).to(tl.float32)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    weights = tl.exp(tl.where(visible, between, float("-inf")))
    return weights, tl.exp(high), tl.exp((total - g).to(tl.float32)), tl.exp(total.to(tl.float32))


@triton.jit
def chunk_walk(
    q_pointer,
    k_pointer,
    v_pointer,
    log_decay_pointer,
    write_pointer,
    state_pointer,
    output_pointer,
    final_pointer,
    q_batch,
    q_head,
    q_pos,
    k_batch,
    k_head,
    k_pos,
    v_batch,
    v_head,
    v_pos,
    decay_batch,
    decay_head,
    decay_pos,
    write_batch,
    write_head,
    write_pos,
    output_tile,
    head,
    pos,
    state_k,
    state_v,
    scale,
    DECAY: tl.constexpr,
    WRITE: tl.constexpr,
    STRICT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * head, row tiles, column tiles). The names ending in an axis are strides, in numbers.

    state and final [batch * head, state_k, state_v] float32; output [row tile, batch * head, pos, state_v].
    """
    batch_index = (tl.program_id(0) // head).to(tl.int64)
    head_index = (tl.program_id(0) % head).to(tl.int64)
    flat_index = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, CHUNK)
    rows = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_exists = rows < state_k
    column_exists = columns < state_v
    q_pointer += batch_index * q_batch + head_index * q_head
    k_pointer += batch_index * k_batch + head_index * k_head
    v_pointer += batch_index * v_batch + head_index * v_head
    log_decay_pointer += batch_index * decay_batch + head_index * decay_head
    write_pointer += batch_index * write_batch + head_index * write_head
    output_pointer += tl.program_id(1).to(tl.int64) * output_tile + flat_index * pos * state_v
    state_offset = flat_index * state_k * state_v + rows[:, None] * state_v + columns[None, :]
    tile_exists = row_exists[:, None] & column_exists[None, :]
    state = tl.load(state_pointer + state_offset, mask=tile_exists, other=0.0)
    visible = token[:, None] > token[None, :] if STRICT else token[:, None] >= token[None, :]

    for start in range(0, pos, CHUNK):
        at = (start + token).to(tl.int64)
        exists = at < pos
        key_mask = exists[:, None] & row_exists[None, :]
        value_mask = exists[:, None] & column_exists[None, :]
        q = tl.load(q_pointer + at[:, None] * q_pos + rows[None, :], mask=key_mask, other=0.0).to(tl.float32)
        k = tl.load(k_pointer + at[:, None] * k_pos + rows[None, :], mask=key_mask, other=0.0).to(tl.float32)
        v = tl.load(v_pointer + at[:, None] * v_pos + columns[None, :], mask=value_mask, other=0.0).to(tl.float32)
        if WRITE:
            v *= tl.load(write_pointer + at * write_pos, mask=exists, other=0.0).to(tl.float32)[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        read = tl.dot(q, state, input_precision=PRECISION)
        if DECAY:
            weights, from_start, to_end, total = chunk_decays(log_decay_pointer, at, decay_pos, exists, visible)
            output = read * from_start[:, None] + tl.dot(scores * weights, v, input_precision=PRECISION)
            v *= to_end[:, None]
            state *= total
        else:
            output = read + tl.dot(tl.where(visible, scores, 0.0), v, input_precision=PRECISION)
        state += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        target = output_pointer + at[:, None] * state_v + columns[None, :]
        tl.store(target, (output * scale).to(output_pointer.dtype.element_ty), mask=value_mask)
    tl.store(final_pointer + state_offset, state, mask=tile_exists)


def launch_options(dtype: torch.dtype, state_k: int, state_v: int) -> dict[str, Any]:
    """Tile sizes, precision of the products, warps and stages for inputs of `dtype`.

    The largest tiles whose compiled code (sm_80, sm_90) keeps everything in registers; a product needs 16 a side.
    """

    def block(width: int, largest: int) -> int:
        return min(largest, max(16, triton.next_power_of_2(width)))

    if dtype == torch.float32:
        rows, chunk, launch = 32, 16, {"PRECISION": "tf32x3", "num_warps": 4, "num_stages": 1}
    else:
        rows, chunk, launch = 64, 32, {"PRECISION": "tf32", "num_warps": 8, "num_stages": 2}
    return {"CHUNK": chunk, "BLOCK_K": block(state_k, rows), "BLOCK_V": block(state_v, 64), **launch}


def supports(q: Tensor, log_decay: Tensor | None) -> bool:
    """Whether the kernel has the type and the kind of decay; float64 and vector decays take the torch form."""
    scalar = log_decay is None or log_decay.ndim < 4
    return scalar and q.dtype in (torch.float32, torch.float16, torch.bfloat16)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `reference.recurrent`, without a gradient; the output is in the type of q.

    On CUDA tensors, or on CPU tensors when Triton interprets (TRITON_INTERPRET=1 before it is imported).
    """
    batch, head, pos, state_k = q.shape
    state_v = v.shape[3]
    options = launch_options(q.dtype, state_k, state_v)
    row_tiles = triton.cdiv(state_k, options["BLOCK_K"])
    column_tiles = triton.cdiv(state_v, options["BLOCK_V"])
    q, k, v, state = (x.resolve_neg() for x in (q, k, v, state))  # a mark on the tensor that memory does not show
    log_decay, write = (None if x is None else x.resolve_neg() for x in (log_decay, write))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    v = v.expand(batch, head, pos, state_v)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None, :, None].expand(batch, head, pos)
    state = state.contiguous()
    token_bytes = row_tiles * batch * head * state_v * 4
    at_once = pos if row_tiles == 1 else max(options["CHUNK"], PARTIAL_OUTPUT_BYTES // token_bytes)
    outputs = []
    for start in range(0, pos, at_once):
        stop = min(start + at_once, pos)
        q_part, k_part, v_part = q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]
        # Where there is no decay or write the kernel never reads; a tensor that exists stands in for the pointer.
        g = q_part if log_decay is None else log_decay[:, :, start:stop]
        weight = q_part if write is None else write[:, :, start:stop]
        dtype = q.dtype if row_tiles == 1 else torch.float32
        output = torch.empty(row_tiles, batch, head, stop - start, state_v, dtype=dtype, device=q.device)
        final = torch.empty_like(state)
        chunk_walk[(batch * head, row_tiles, column_tiles)](
            q_part,
            k_part,
            v_part,
            g,
            weight,
            state,
            output,
            final,
            *q_part.stride()[:3],
            *k_part.stride()[:3],
            *v_part.stride()[:3],
            *g.stride()[:3],
            *weight.stride()[:3],
            output.stride(0),
            head,
            stop - start,
            state_k,
            state_v,
            scale,
            DECAY=log_decay is not None,
            WRITE=write is not None,
            STRICT=strict,
            **options,
        )
        outputs.append(output[0] if row_tiles == 1 else output.sum(0).to(q.dtype))
        state = final
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), state
