"""The effective pattern in closed form: which earlier tokens an output is made of, exactly.

    alpha_ij = scale * write_j * sum_d q_id k_jd exp(G_id - G_jd),  G = cumsum(log_decay),  j <= i (j < i when strict)

so that output = alpha @ v for a run that starts from an empty state. The mixer is linear in v, hence the pattern is
exact and not a Jacobian; it is signed and its rows sum to nothing in particular.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arguments import (
    check_decay,
    check_key,
    check_positions,
    check_query,
    check_write,
    compute_dtype,
)
from .decay import between, cumulative


def effective_pattern(
    q: Tensor,
    k: Tensor,
    *,
    log_decay: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    strict: bool = False,
    queries: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Exact weights alpha [batch, head, query, key] with output = alpha @ v, up to the share of an initial state.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]
    log_decay : None, [head], [batch, head, pos] or [batch, head, pos, state_k]; natural log per token, finite, <= 0
    write : None or [batch, head, pos]
    scale, strict : as in `gated_linear_attention`
    queries : positions of the rows wanted, in any order; None for all of them

    Returns float32 for 16-bit inputs, else the type of q. Raises ValueError naming the argument that does not fit.
    """
    check_key(k)
    check_query(q, k)
    check_decay(log_decay, k)
    check_write(write, k)
    pos = k.shape[2]
    rows = list(range(pos)) if queries is None else check_positions("queries", queries, pos)
    return pattern_rows(q, k, log_decay, write, scale, strict, rows)


def pattern_rows(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    queries: list[int],
) -> Tensor:
    """`effective_pattern` without the checks."""
    dtype = compute_dtype(q.dtype)
    _, head, pos, _ = k.shape
    if not queries or not pos:
        return q.new_zeros(q.shape[0], head, len(queries), pos, dtype=dtype)
    rows = torch.tensor(queries, dtype=torch.long, device=q.device)
    if len(queries) != pos or queries != list(range(pos)):
        q = q[:, :, rows]
    q, k = q.to(dtype), k.to(dtype)
    visible = _visible(rows, 0, pos, strict)
    if log_decay is None:
        alpha = (q @ k.mT).masked_fill(~visible, 0.0)
    elif log_decay.ndim == 4:
        alpha = _vector_rows(q, k, log_decay, rows, strict)
    else:
        g = log_decay if log_decay.ndim == 3 else log_decay[None, :, None].expand(1, head, pos)
        g = cumulative(g, -1)
        alpha = (q @ k.mT) * between(g[:, :, rows], g, visible, dtype)
    if write is not None:
        alpha = alpha * write.to(dtype).unsqueeze(-2)
    return alpha if scale == 1.0 else alpha * scale


def _visible(rows: Tensor, start: int, stop: int, strict: bool) -> Tensor:
    keys = torch.arange(start, stop, device=rows.device)
    return keys < rows[:, None] if strict else keys <= rows[:, None]


def _vector_rows(q: Tensor, k: Tensor, log_decay: Tensor, rows: Tensor, strict: bool) -> Tensor:
    """q [batch, head, query, state_k] -> [batch, head, query, key], block of keys by block of keys.

    For rows behind a block both factors exp(G_i - G_end) and exp(G_end - G_j) are <= 1, so their product is safe. For
    rows inside it the difference of each pair and channel is formed before the exponential.
    """
    pos = k.shape[2]
    width = max(16, int(pos**0.5))
    g = cumulative(log_decay, 2)
    g_rows = g[:, :, rows]
    blocks = []
    for start in range(0, pos, width):
        stop = min(start + width, pos)
        g_keys, keys = g[:, :, start:stop], k[:, :, start:stop]
        g_end = g_keys[:, :, -1:]
        # Rows inside or before the block would give positive exponents here; they are replaced below.
        carried = (g_rows - g_end).clamp(max=0.0).to(q.dtype).exp() * q
        block = carried @ (keys * (g_end - g_keys).to(q.dtype).exp()).mT
        visible = _visible(rows, start, stop, strict)
        inside = ((rows >= start) & (rows < stop)).nonzero().squeeze(-1)
        block = block.masked_fill(~visible, 0.0)
        if inside.numel():
            difference = g_rows[:, :, inside, None] - g_keys[:, :, None]  # [batch, head, row, key, state_k]
            weight = difference.masked_fill(~visible[inside, :, None], -torch.inf).to(q.dtype).exp()
            exact = torch.einsum("bhid,bhjd,bhijd->bhij", q[:, :, inside], keys, weight)
            block = block.index_copy(2, inside, exact)
        blocks.append(block)
    return torch.cat(blocks, -1)


def values_probe(core: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, **options: object) -> Tensor:
    """The pattern read off a core by running it with one-hot values: output = alpha @ identity.

    Works for any core that is linear in v, and is the oracle of the closed form. core(q, k, v, **options) must return
    (output, final state) and accept v [batch, 1, pos, pos] shared over heads.
    """
    check_key(k)
    pos = k.shape[2]
    one_hot = torch.eye(pos, dtype=k.dtype, device=k.device).expand(k.shape[0], 1, pos, pos)
    return core(q, k, one_hot, **options)[0]
