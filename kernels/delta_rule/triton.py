"""The chunked form as two Triton kernels, for no decay, a constant decay per head, or one factor per token.

`solve_chunks` does what needs no state, a program per chunk: the scores of the queries, and the inverse of the chunk's
triangular system by elimination, column after column in float32. (The product (I - L)(I + L^2)(I + L^4)…, matrix
products alone, would not do: its factors grow like binomial coefficients where keys repeat. For one key repeated in 16
tokens its relative error is 2e-4, in 32 tokens 15; that of elimination 1e-7.)

`walk_chunks` owns all rows and a few columns of one head's state, keeps them in registers and walks over the chunks.
With T = (I + L)^-1 diag(beta), in the letters of `chunked`,

    u = T (V - exp(G) K S),   o = exp(G) Q S + scores u,   S' = exp(G_C) S + (exp(G_C - G) K)^T u

Rows cannot be cut into tiles as in gated linear attention, because what a key recalls is a sum over all of them. No
atomics: two runs give the same bits.

Precision as in `kernels.gated_linear_attention.triton`: everything is widened to float32; products are three tf32
passes for float32 inputs, and one for 16-bit inputs, whose state is carried in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_linear_attention.triton import chunk_decays

# A program holds all rows of the state; more than this many do not fit into its registers.
LARGEST_STATE_K = 256
SOLVE_WARPS = 4


@triton.jit
def solve_chunks(
    q_pointer,
    k_pointer,
    beta_pointer,
    log_decay_pointer,
    inverse_pointer,
    scores_pointer,
    q_batch,
    q_head,
    q_pos,
    k_batch,
    k_head,
    k_pos,
    beta_batch,
    beta_head,
    beta_pos,
    decay_batch,
    decay_head,
    decay_pos,
    head,
    pos,
    state_k,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * head * chunks). The names ending in an axis are strides, in numbers.

    inverse and scores [batch * head, chunk, CHUNK, CHUNK] float32: (I + L)^-1 diag(beta), and q_i . k_j D_ij for j <= i.
    """
    n_chunks = tl.cdiv(pos, CHUNK)
    flat_index = (tl.program_id(0) // n_chunks).to(tl.int64)
    batch_index = flat_index // head
    head_index = flat_index % head
    q_pointer += batch_index * q_batch + head_index * q_head
    k_pointer += batch_index * k_batch + head_index * k_head
    beta_pointer += batch_index * beta_batch + head_index * beta_head
    log_decay_pointer += batch_index * decay_batch + head_index * decay_head
    token = tl.arange(0, CHUNK)
    at = ((tl.program_id(0) % n_chunks) * CHUNK + token).to(tl.int64)
    exists = at < pos

    recall = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, state_k, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        mask = exists[:, None] & (rows < state_k)[None, :]
        q = tl.load(q_pointer + at[:, None] * q_pos + rows[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_pointer + at[:, None] * k_pos + rows[None, :], mask=mask, other=0.0).to(tl.float32)
        recall += tl.dot(k, tl.trans(k), input_precision=PRECISION)
        scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
    visible = token[:, None] >= token[None, :]
    if DECAY:
        weights, _, _, _ = chunk_decays(log_decay_pointer, at, decay_pos, exists, visible)
        recall *= weights
        scores *= weights
    else:
        scores = tl.where(visible, scores, 0.0)
    # Tokens behind the end have no key and write nothing.
    beta = tl.load(beta_pointer + at * beta_pos, mask=exists, other=0.0).to(tl.float32)
    system = tl.where(token[:, None] > token[None, :], recall * beta[:, None], 0.0)
    inverse = tl.where(token[:, None] == token[None, :], 1.0, 0.0)
    for column in range(CHUNK - 1):
        below = tl.sum(tl.where(token[None, :] == column, system, 0.0), axis=1)
        pivot = tl.sum(tl.where(token[:, None] == column, inverse, 0.0), axis=0)
        inverse -= below[:, None] * pivot[None, :]
    target = tl.program_id(0).to(tl.int64) * CHUNK * CHUNK + token[:, None] * CHUNK + token[None, :]
    tl.store(inverse_pointer + target, inverse * beta[None, :])
    tl.store(scores_pointer + target, scores)


@triton.jit
def walk_chunks(
    q_pointer,
    k_pointer,
    v_pointer,
    log_decay_pointer,
    inverse_pointer,
    scores_pointer,
    state_pointer,
    output_pointer,
    pseudo_value_pointer,
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
    head,
    pos,
    state_k,
    state_v,
    scale,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * head, column tiles). The names ending in an axis are strides, in numbers.

    inverse and scores as `solve_chunks` leaves them; state and final [batch * head, state_k, state_v] and pseudo-values
    [batch * head, pos, state_v] float32; output of the latter shape in the type of q.
    """
    flat_index = tl.program_id(0).to(tl.int64)
    batch_index = flat_index // head
    head_index = flat_index % head
    token = tl.arange(0, CHUNK)
    # Row tiles are the batch axis of the products with the state, so that every warp holds a tile of its own.
    rows = tl.arange(0, ROW_TILES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_exists = rows < state_k
    column_exists = columns < state_v
    q_pointer += batch_index * q_batch + head_index * q_head
    k_pointer += batch_index * k_batch + head_index * k_head
    v_pointer += batch_index * v_batch + head_index * v_head
    log_decay_pointer += batch_index * decay_batch + head_index * decay_head
    square = token[:, None] * CHUNK + token[None, :]
    inverse_pointer += flat_index * tl.cdiv(pos, CHUNK) * CHUNK * CHUNK + square
    scores_pointer += flat_index * tl.cdiv(pos, CHUNK) * CHUNK * CHUNK + square
    state_offset = flat_index * state_k * state_v + rows[:, :, None] * state_v + columns[None, None, :]
    tile_exists = row_exists[:, :, None] & column_exists[None, None, :]
    state = tl.load(state_pointer + state_offset, mask=tile_exists, other=0.0)

    for start in range(0, pos, CHUNK):
        at = (start + token).to(tl.int64)
        exists = at < pos
        key_mask = exists[None, :, None] & row_exists[:, None, :]
        value_mask = exists[:, None] & column_exists[None, :]
        k_at = k_pointer + at[None, :, None] * k_pos + rows[:, None, :]
        k = tl.load(k_at, mask=key_mask, other=0.0).to(tl.float32)
        v = tl.load(v_pointer + at[:, None] * v_pos + columns[None, :], mask=value_mask, other=0.0).to(tl.float32)
        recalled = tl.sum(tl.dot(k, state, input_precision=PRECISION), axis=0)
        if DECAY:
            visible = token[:, None] >= token[None, :]
            _, from_start, to_end, total = chunk_decays(log_decay_pointer, at, decay_pos, exists, visible)
            recalled *= from_start[:, None]
        inverse = tl.load(inverse_pointer + start * CHUNK)
        pseudo_value = tl.dot(inverse, v - recalled, input_precision=PRECISION)
        target = (flat_index * pos + at[:, None]) * state_v + columns[None, :]
        tl.store(pseudo_value_pointer + target, pseudo_value, mask=value_mask)
        q_at = q_pointer + at[None, :, None] * q_pos + rows[:, None, :]
        q = tl.load(q_at, mask=key_mask, other=0.0).to(tl.float32)
        output = tl.sum(tl.dot(q, state, input_precision=PRECISION), axis=0)
        if DECAY:
            output *= from_start[:, None]
        output += tl.dot(tl.load(scores_pointer + start * CHUNK), pseudo_value, input_precision=PRECISION)
        tl.store(output_pointer + target, (output * scale).to(output_pointer.dtype.element_ty), mask=value_mask)
        if DECAY:
            pseudo_value *= to_end[:, None]
            state *= total
        written = tl.broadcast_to(pseudo_value[None, :, :], ROW_TILES, CHUNK, BLOCK_V)
        state += tl.dot(tl.permute(k, 0, 2, 1), written, input_precision=PRECISION)
    tl.store(final_pointer + state_offset, state, mask=tile_exists)


def launch_options(dtype: torch.dtype, state_k: int, state_v: int) -> dict[str, Any]:
    """Tile sizes and precision of the products for inputs of `dtype`; warps and stages of `walk_chunks`.

    A warp per tile of rows; chunks and columns are the largest whose compiled code (sm_80, sm_90) keeps everything in
    registers, for every width up to `LARGEST_STATE_K`.
    """
    rows = max(16, triton.next_power_of_2(state_k))
    block = min(32, max(16, rows // 2))
    chunk, columns, precision = (16, 16, "tf32x3") if dtype == torch.float32 else (32, 32, "tf32")
    return {
        "CHUNK": chunk,
        "ROW_TILES": rows // block,
        "BLOCK_K": block,
        "BLOCK_V": min(columns, max(16, triton.next_power_of_2(state_v))),
        "PRECISION": precision,
        "num_warps": rows // block,
        "num_stages": 1,
    }


def supports(q: Tensor, log_decay: Tensor | None) -> bool:
    """Whether the kernels have the type, the width and the kind of decay; otherwise the torch form runs."""
    scalar = log_decay is None or log_decay.ndim < 4
    return scalar and q.dtype in (torch.float32, torch.float16, torch.bfloat16) and q.shape[3] <= LARGEST_STATE_K


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as `reference.recurrent`, without a gradient; the output is in the type of q.

    On CUDA tensors, or on CPU tensors when Triton interprets (TRITON_INTERPRET=1 before it is imported).
    """
    batch, head, pos, state_k = q.shape
    state_v = v.shape[3]
    q, k, v, beta, state = (x.resolve_neg() for x in (q, k, v, beta, state))  # a mark that memory does not show
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    v = v.expand(batch, head, pos, state_v)
    if log_decay is None:
        g = beta  # never read; a tensor that exists stands in for the pointer
    else:
        g = log_decay.resolve_neg()
        g = g[None, :, None].expand(batch, head, pos) if g.ndim == 1 else g
    state = state.contiguous()
    options = launch_options(q.dtype, state_k, state_v)
    launch = {name: options[name] for name in ("CHUNK", "BLOCK_K", "PRECISION", "num_stages")}
    chunks = triton.cdiv(pos, options["CHUNK"])
    inverse = torch.empty(batch * head, chunks, options["CHUNK"], options["CHUNK"], device=q.device)
    scores = torch.empty_like(inverse)
    solve_chunks[(batch * head * chunks,)](
        q,
        k,
        beta,
        g,
        inverse,
        scores,
        *q.stride()[:3],
        *k.stride()[:3],
        *beta.stride(),
        *g.stride(),
        head,
        pos,
        state_k,
        DECAY=log_decay is not None,
        num_warps=SOLVE_WARPS,
        **launch,
    )
    output = torch.empty(batch, head, pos, state_v, dtype=q.dtype, device=q.device)
    pseudo_value = torch.empty(batch, head, pos, state_v, device=q.device)
    final = torch.empty_like(state)
    walk_chunks[(batch * head, triton.cdiv(state_v, options["BLOCK_V"]))](
        q,
        k,
        v,
        g,
        inverse,
        scores,
        state,
        output,
        pseudo_value,
        final,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *g.stride(),
        head,
        pos,
        state_k,
        state_v,
        scale,
        DECAY=log_decay is not None,
        ROW_TILES=options["ROW_TILES"],
        BLOCK_V=options["BLOCK_V"],
        num_warps=options["num_warps"],
        **launch,
    )
    return output, pseudo_value, final
