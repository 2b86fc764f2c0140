"""The gated delta rule in chunks: one triangular solve per chunk replaces the token-by-token comparison.

With G the cumulative log decay counted from the chunk's start, S the state before the chunk, C its last position and
D_ij = exp(G_i - G_j), the pseudo-values u of a chunk obey

    u_i + beta_i sum_{j < i} (k_i . k_j) D_ij u_j = beta_i (v_i - (exp(G_i) k_i)^T S)

so with the unit triangular I + L, L_ij = beta_i (k_i . k_j) D_ij below the diagonal,

    u   = U - W S,     U = (I + L)^-1 diag(beta) V,     W = (I + L)^-1 diag(beta) exp(G) K
    o_i = exp(G_i) q_i^T S + sum_{j <= i} (q_i . k_j) D_ij u_j
    S'  = exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j^T

U and W need no state, so they are solved for many chunks at once; only the last step of u and S' walk from chunk to
chunk. This is the WY form of arXiv 2406.06484 (section 3.2) and arXiv 2412.06464 (section 3.3). With one decay per
state row D_ij moves into the dot products.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kernels.gated_linear_attention.decay import between, cumulative, lower_triangle

# Chunks prepared at once hold at most this many numbers, which bounds the memory of long runs.
PREPARED = {"cpu": 1 << 20, "cuda": 1 << 27}


def default_chunk_size(device: torch.device) -> int:
    """Measured on a CPU, 4 x 1024 tokens of 64 x 64 and 16 x 1024 of 128 x 128, forward and with gradients: 16 and 32 are
    equal, 64 is up to 20 % slower. GPUs get 64: their matrix units want the larger tiles.
    """
    return 32 if device.type == "cpu" else 64


def chunked(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    chunk_size: int,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Same arguments and results as `reference.recurrent`."""
    batch, head, pos, state_k = k.shape
    state_v, dtype = v.shape[3], state.dtype
    per_chunk = batch * head * chunk_size * (4 * state_k + 3 * state_v + 3 * chunk_size)
    at_once = max(1, PREPARED.get(k.device.type, PREPARED["cpu"]) // per_chunk)
    # As many chunks together as are prepared at once, the remaining whole chunks, and the ragged rest.
    whole, rest = divmod(pos, chunk_size)
    n_chunks = [at_once] * (whole // at_once) + ([whole % at_once] if whole % at_once else [])
    lengths = [n * chunk_size for n in n_chunks] + ([rest] if rest else [])
    n_chunks += [1] if rest else []

    def parts(x: Tensor) -> Iterator[Tensor]:
        """[row, chunk, pos, …] segment by segment, row = batch * head."""
        x = x.expand(batch, head, *x.shape[2:])
        # Split, not sliced one by one: the gradient of each slice would be a tensor as long as the whole run.
        for part, n, length in zip(x.split(lengths, 2), n_chunks, lengths, strict=True):
            yield part.to(dtype).reshape(batch * head, n, length // n, *x.shape[3:])

    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None, :, None].expand(batch, head, pos)
    nothing: list[None] = [None] * len(lengths)
    queries: Iterable[Tensor | None] = nothing if q is None else parts(q)
    decays: Iterable[Tensor | None] = nothing if log_decay is None else parts(log_decay)
    state = state.reshape(batch * head, state_k, state_v)
    outputs: list[Tensor] = []
    pseudo_values: list[Tensor] = []
    segments = zip(queries, parts(k), parts(v), parts(beta), decays, lengths, strict=True)
    for queries_part, keys, values, weights, decay, length in segments:
        output, pseudo, state = _segment(queries_part, keys, values, weights, decay, state)
        if output is not None:
            outputs.append(output.reshape(batch, head, length, state_v))
        pseudo_values.append(pseudo.reshape(batch, head, length, state_v))
    read = scale * torch.cat(outputs, 2) if outputs else None
    return read, torch.cat(pseudo_values, 2), state.view(batch, head, state_k, state_v)


def _segment(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """A run of equal chunks. q, k [row, chunk, pos, state_k]; v [row, chunk, pos, state_v]; beta [row, chunk, pos];
    log_decay None, [row, chunk, pos] or [row, chunk, pos, state_k]; state [row, state_k, state_v], row = batch * head.

    Returns (unscaled output or None, pseudo-values [row, chunk, pos, state_v], state after the last chunk).
    """
    length, state_v = k.shape[2], v.shape[3]
    if log_decay is not None and log_decay.ndim == 4:
        scores, recall, q_carried, k_carried, k_to_end, total = _vector_products(q, k, log_decay)
    else:
        scores, recall, q_carried, k_carried, k_to_end, total = _scalar_products(q, k, log_decay)
    weight = beta.unsqueeze(-1)
    # Solved transposed, X^T (I + L)^T = R^T: LAPACK counts by columns, so rows as they lie need no copy.
    right_side = torch.cat([v * weight, k_carried * weight], -1)
    solved = torch.linalg.solve_triangular(
        (recall * weight).mT, right_side.mT, upper=True, left=False, unitriangular=True
    ).mT
    own, readers = solved.split([state_v, k.shape[3]], -1)
    if q_carried is not None:  # what the keys erase and what the queries read: one product with the state
        readers = torch.cat([readers, q_carried], 2)
    pseudo_values = []
    reads = []
    # The views of all chunks are taken at once: inside the loop they would cost as much as the products.
    for own_chunk, reader, keys, kept in zip(
        own.unbind(1), readers.unbind(1), k_to_end.mT.unbind(1), total.unbind(1), strict=True
    ):
        read = reader @ state
        pseudo_value = own_chunk - read[:, :length]
        state = torch.baddbmm(state * kept, keys, pseudo_value)
        pseudo_values.append(pseudo_value)
        reads.append(read[:, length:])
    pseudo = torch.stack(pseudo_values, 1)
    output = None if scores is None else torch.stack(reads, 1) + scores @ pseudo
    return output, pseudo, state


Products = tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def _scalar_products(q: Tensor | None, k: Tensor, log_decay: Tensor | None) -> Products:
    """(scores, recall, queries and keys decayed from the chunk's start, keys decayed to its end, total decay).

    scores_ij = q_i . k_j D_ij for j <= i; recall_ij = k_i . k_j D_ij, of which only j < i is used.
    """
    visible = lower_triangle(k.shape[2], k.shape[2], False, k.device)
    recall = k @ k.mT
    scores = None if q is None else q @ k.mT
    if log_decay is None:
        scores = None if scores is None else scores.masked_fill(~visible, 0.0)
        return scores, recall, q, k, k, k.new_ones(1, k.shape[1], 1, 1)
    g = cumulative(log_decay, -1)
    weight = between(g, g, visible, k.dtype)
    from_start = g.to(k.dtype).exp().unsqueeze(-1)
    to_end = (g[..., -1:] - g).to(k.dtype).exp().unsqueeze(-1)
    q_carried = None if q is None else q * from_start
    scores = None if scores is None else scores * weight
    return scores, recall * weight, q_carried, k * from_start, k * to_end, from_start[..., -1:, :]


def _vector_products(q: Tensor | None, k: Tensor, log_decay: Tensor) -> Products:
    """As `_scalar_products`, with D_ij inside the dot products: sum_d q_id k_jd exp(G_id - G_jd).

    Blocks of 1, 2, 4, … tokens are joined in pairs: the right block's rows carry the decay from the block's start, the
    left block's keys the decay to the block's end, so the weights across the joint are a plain matrix product of
    factors <= 1, safe for any decay. At last rows and keys carry the decay of the whole chunk.
    """
    length = k.shape[2]
    width = 1 << (length - 1).bit_length()
    rows = k.unsqueeze(2) if q is None else torch.stack([k, q], 2)  # [row, chunk, set, pos, state_k]
    keys, total = k.unsqueeze(2), log_decay.exp().unsqueeze(2)
    if width != length:  # a token that decays nothing, reads nothing and writes nothing
        rows, keys = (torch.nn.functional.pad(x, (0, 0, 0, width - length)) for x in (rows, keys))
        total = torch.nn.functional.pad(total, (0, 0, 0, width - length), value=1.0)
    blocks = (rows * keys).sum(-1)[..., None, None]  # [row, chunk, set, block, query, key]
    rows = (rows * total).unsqueeze(4)  # [row, chunk, set, block, pos, state_k]
    keys, total = keys.unsqueeze(4), total.unsqueeze(4)
    for _ in range(width.bit_length() - 1):
        (left, right), (rows_left, rows_right) = _pairs(blocks), _pairs(rows)
        (keys_left, keys_right), (total_left, total_right) = _pairs(keys), _pairs(total)
        upper = torch.nn.functional.pad(left, (0, left.shape[-1]))
        blocks = torch.cat([upper, torch.cat([rows_right @ keys_left.mT, right], -1)], -2)
        rows = torch.cat([rows_left, rows_right * total_left], -2)
        keys = torch.cat([keys_left * total_right, keys_right], -2)
        total = total_left * total_right
    scores = None if q is None else blocks[:, :, 1, 0, :length, :length]
    q_carried = None if q is None else rows[:, :, 1, 0, :length]
    recall, k_carried = blocks[:, :, 0, 0, :length, :length], rows[:, :, 0, 0, :length]
    return scores, recall, q_carried, k_carried, keys[:, :, 0, 0, :length], total[:, :, 0, 0].mT


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """[row, chunk, set, block, …] -> the even blocks and the odd ones."""
    return x[:, :, :, 0::2], x[:, :, :, 1::2]
