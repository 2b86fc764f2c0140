"""Decay from one token to a later one, computed so that no intermediate value overflows.

With g_s the natural log of the decay applied at token s, the decay from j to i >= j is exp(sum of g_s over j < s <= i).
It is always formed as exp of a masked difference, never as exp(G_i) * exp(-G_j), which overflows float32 once the sum
passes 88. Cumulative sums are kept in float64: they grow with the length, while the differences that matter stay small.
"""

import torch
from torch import Tensor


def cumulative(log_decay: Tensor, dim: int) -> Tensor:
    """Inclusive cumulative sum along `dim`, in float64 where the device has it."""
    accurate = log_decay.dtype if log_decay.device.type == "mps" else torch.float64
    return log_decay.to(accurate).cumsum(dim)


def lower_triangle(rows: int, columns: int, strict: bool, device: torch.device) -> Tensor:
    """[query, key] boolean: which keys each query may read."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def between(later: Tensor, earlier: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(later_i - earlier_j) where visible, else 0. later [..., query], earlier [..., key] -> [..., query, key]."""
    difference = (later.unsqueeze(-1) - earlier.unsqueeze(-2)).to(dtype)
    return difference.masked_fill_(~visible, -torch.inf).exp_()  # in place on what was just made: nobody else holds it


def decayed_sum(x: Tensor, decay: Tensor, initial: Tensor | None = None) -> Tensor:
    """y_t = decay_t * y_{t-1} + x_t along the second axis.

    x [batch, pos, channel]; decay, factors in [0, 1], broadcastable to x; initial [batch, channel] is y before the
    first token. Tokens are summed inside blocks of eight, all blocks at once; the block ends are the same problem,
    eight times shorter. Only products of factors <= 1 are formed, so nothing can overflow.
    """
    batch, pos, channel = x.shape
    decay = decay.expand(batch, pos, channel)
    width = 8 if pos > 16 else pos
    n_blocks = -(-pos // width)
    padding = n_blocks * width - pos
    if padding:
        x = torch.cat([x, x.new_zeros(batch, padding, channel)], 1)
        decay = torch.cat([decay, decay.new_ones(batch, padding, channel)], 1)
    sums: list[Tensor] = []
    products: list[Tensor] = []
    for x_step, decay_step in zip(
        x.reshape(batch, n_blocks, width, channel).unbind(2),
        decay.reshape(batch, n_blocks, width, channel).unbind(2),
        strict=True,
    ):
        sums.append(torch.addcmul(x_step, decay_step, sums[-1]) if sums else x_step)
        products.append(decay_step * products[-1] if products else decay_step)
    before = x.new_zeros(batch, 1, channel) if initial is None else initial.unsqueeze(1)
    if n_blocks > 1:
        ends = decayed_sum(sums[-1], products[-1], initial)
        before = torch.cat([before, ends[:, :-1]], 1)
    y = torch.stack([torch.addcmul(part, product, before) for part, product in zip(sums, products, strict=True)], 2)
    return y.reshape(batch, n_blocks * width, channel)[:, :pos]
