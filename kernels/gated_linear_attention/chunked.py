"""The recurrence in chunks: inside a chunk a small masked matrix product, between chunks the carried state.

With G the cumulative log decay counted from the chunk's start, S the state before the chunk and C its last position,

    o_i = exp(G_i) q_i^T S + sum_{j <= i} (q_i . k_j) exp(G_i - G_j) write_j v_j          (j < i when strict)
    S'  = exp(G_C) S + sum_j exp(G_C - G_j) write_j k_j v_j^T

which is the chunkwise form of Mamba-2 (arXiv 2405.21060, section 6) and of GLA (arXiv 2312.06635, section 4.2).
Chunks are handled side by side while their states are small, otherwise one by one.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kernels.derivatives import needs_gradient

from .decay import between, cumulative, lower_triangle

# Chunks are computed side by side while their states hold at most this many numbers: measured up to twice as fast for
# states of 4 x 64 x 64. When fewer than eight fit, one by one in place is faster. GPUs get more, as launches cost more.
SIDE_BY_SIDE = {"cpu": 1 << 19, "cuda": 1 << 26}


def default_chunk_size(device: torch.device, differentiable: bool) -> int:
    """Measured on a CPU, states from 4 x 64 x 64 to 8192 x 256 numbers, lengths 512 to 4096.

    Without a gradient 32 is up to 20 % faster than 64; a backward pass, which keeps every chunk's state, is up to 30 %
    slower at 32. GPUs get 64: their matrix units want the larger tiles.
    """
    return 32 if device.type == "cpu" and not differentiable else 64


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `reference.recurrent`."""
    head, pos = q.shape[1:3]
    dtype = state.dtype
    differentiable = needs_gradient(q, k, v, log_decay, write, state)
    outputs = []
    at_once = SIDE_BY_SIDE.get(q.device.type, SIDE_BY_SIDE["cpu"]) // max(1, state.numel())
    if at_once < 8:
        at_once = 1
    counts = _segments(pos, chunk_size, at_once)
    lengths = [count * chunk_size for count in counts]
    lengths[-1] = pos - sum(lengths[:-1])

    # Split, not sliced segment by segment: the gradient of each slice would be a tensor as long as the whole run.
    def parts(x: Tensor) -> Iterator[Tensor]:
        for piece, count in zip(x.split(lengths, 2), counts, strict=True):
            yield piece.to(dtype).unflatten(2, (count, -1))  # [batch, head, chunk, pos, width]

    per_token = log_decay is not None and log_decay.ndim > 1
    none: list[Tensor | None] = [None] * len(counts)
    decays: Iterable[Tensor | None] = parts(log_decay) if log_decay is not None and per_token else none
    writes: Iterable[Tensor | None] = none if write is None else parts(write)
    for number, (q_part, k_part, values, weights, decay) in enumerate(
        zip(parts(q), parts(k), parts(v), writes, decays, strict=True)
    ):
        # A state made here and seen by nobody else is updated in place, which saves a pass over BDH's 8192 x 256
        # numbers. The first one may belong to the caller, and a gradient needs every one of them.
        overwrite = number > 0 and not differentiable
        if weights is not None:
            values = values * weights.unsqueeze(-1)
        if decay is not None and decay.ndim == 5:
            output, state = _vector_segment(q_part, k_part, values, decay, strict, state, overwrite)
        else:
            if log_decay is not None and not per_token:
                decay = log_decay.to(dtype)[None, :, None, None].expand(1, head, 1, q_part.shape[3])
            output, state = _scalar_segment(q_part, k_part, values, decay, strict, state, overwrite)
        outputs.append(output.flatten(2, 3))
    output = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return (output if scale == 1.0 else output * scale), state


def _segments(pos: int, chunk_size: int, at_once: int) -> list[int]:
    """Chunks handled side by side in each segment; a last, shorter chunk is a segment of its own."""
    whole, rest = divmod(pos, chunk_size)
    counts = [at_once] * (whole // at_once)
    counts += [whole % at_once] if whole % at_once else []
    return counts + ([1] if rest else [])


def _scalar_segment(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, strict: bool, state: Tensor, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """One segment of equal chunks, with one decay per token at most.

    q, k [batch, head, chunk, pos, state_k]; v [batch, head or 1, chunk, pos, state_v]; log_decay [batch or 1, head,
    chunk or 1, pos]. overwrite: `state` may be changed in place. Returns (output [batch, head, chunk, pos, state_v],
    state after the last chunk).
    """
    visible = lower_triangle(q.shape[3], q.shape[3], strict, q.device)
    scores = q @ k.mT
    if log_decay is None:
        output = scores.masked_fill_(~visible, 0.0) @ v
        read, state = _walk(state, q, k, v, None, overwrite)
        return output + read, state
    g = cumulative(log_decay, -1)
    output = (scores * between(g, g, visible, state.dtype)) @ v
    to_end = (g[..., -1:] - g).to(state.dtype).exp().unsqueeze(-1)
    from_start = g.to(state.dtype).exp().unsqueeze(-1)
    read, state = _walk(state, q, k, v * to_end, from_start[..., -1:, :], overwrite)
    # The decay of a row multiplies the read value, which is narrower than the query where it matters (BDH, Mamba-2).
    return torch.addcmul(output, from_start, read), state


def _walk(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """Carries the state over the chunks of a segment and reads it for every chunk before the chunk writes.

    q, k, v as above, v or k already decayed to the end of its chunk; total [batch, head, chunk, state_k or 1, 1], the
    decay over each whole chunk. Returns (read q^T S [batch, head, chunk, pos, state_v], state after the last chunk).
    """
    batch, head, n_chunks, pos, state_k = k.shape
    if n_chunks == 1:
        read = q @ state.unsqueeze(2)
        flat_k = k.reshape(batch * head, pos, state_k)
        flat_v = v.expand(batch, head, 1, pos, -1).reshape(batch * head, pos, -1)
        flat_state = state.reshape(batch * head, state_k, -1)
        if total is not None:
            decay = total.expand(batch, -1, -1, -1, -1).reshape(batch * head, -1, 1)
            flat_state = flat_state.mul_(decay) if overwrite else flat_state * decay
        add = flat_state.baddbmm_ if overwrite else flat_state.baddbmm
        return read, add(flat_k.mT, flat_v).view(state.shape)
    written = k.mT @ v
    before = []
    for chunk in range(n_chunks):
        before.append(state)
        if total is None:
            state = state + written[:, :, chunk]
        else:
            state = torch.addcmul(written[:, :, chunk], state, total[:, :, min(chunk, total.shape[2] - 1)])
    return q @ torch.stack(before, 2), state


def _vector_segment(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, strict: bool, state: Tensor, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """As `_scalar_segment`, with log_decay [batch, head, chunk, pos, state_k].

    The weight of the pair j < i is a product of decays over j < s <= i. Blocks of 1, 2, 4, … tokens are joined in
    pairs: the right block's queries carry the decay from the block's start, the left block's keys the decay to the
    block's end, so the weight across the joint is a plain matrix product of factors <= 1, safe for any decay. At last
    the queries carry the decay from the chunk's start and the keys that to its end, as the carried state needs them.
    """
    length = q.shape[3]
    width = 1 << (length - 1).bit_length()
    decay = log_decay.exp()
    if width != length:  # a token that decays nothing, reads nothing and writes nothing
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, width - length)) for x in (q, k, v))
        decay = torch.nn.functional.pad(decay, (0, 0, 0, width - length), value=1.0)
    lead = q.shape[:3]
    scores = q.new_zeros(*lead, width, width)
    if not strict:
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    # Without a gradient both are scaled in place: copying them at every level would cost as much as all the rest.
    in_place = not needs_gradient(q, k, decay)
    q, k, total = q * decay, (k.clone() if in_place else k), decay
    size = 1
    while size < width:
        pairs = width // (2 * size)
        total_left, total_right = total.reshape(*lead, pairs, 2, 1, -1).unbind(4)
        q_left, q_right = q.view(*lead, pairs, 2, size, -1).unbind(4)
        k_left, k_right = k.view(*lead, pairs, 2, size, -1).unbind(4)
        blocks = scores.view(*lead, pairs, 2, size, pairs, 2, size)[:, :, :, :, 1, :, :, 0, :]
        blocks.diagonal(dim1=3, dim2=5).copy_((q_right @ k_left.mT).movedim(3, -1))
        if in_place:
            q_right.mul_(total_left)
            k_left.mul_(total_right)
        else:
            q = torch.stack([q_left, q_right * total_left], 4).view_as(q)
            k = torch.stack([k_left * total_right, k_right], 4).view_as(k)
        total = total_left * total_right
        size *= 2
    output = scores @ v
    read, state = _walk(state, q, k, v, total.reshape(*lead, -1, 1), overwrite)
    return (output + read)[..., :length, :], state
