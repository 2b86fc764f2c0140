"""Log-linear attention, one token at a time: slow, and the oracle of every other form in this folder.

    S^m <- the buckets as token t sees them (levels.py), S^0 <- 0
    S^m <- A_t S^m for every level,  S^0 <- S^0 + what token t writes
    o_t  = scale * sum_m weight_t^m q_t^T S_t^m

with A_t = diag(exp(log_decay_t)), times (I - beta_t k_t k_t^T) for the delta rule. Guo et al. 2025, arXiv 2506.04761,
section 3.2 (Mamba-2) and 3.3 (Gated DeltaNet).
"""

import torch
from torch import Tensor

from .levels import regrouped
from .rule import Rule


def recurrent(
    q: Tensor, v: Tensor, weights: Tensor, rule: Rule, state: Tensor, places: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [batch, head, pos, state_k]; v [batch, head, pos, state_v]; weights [batch, head, pos, level]; state [batch,
    head, level, state_k, state_v]; places [batch, pos], the position of every token; real [batch, pos] or None.

    Returns (output [batch, head, pos, state_v], state after the last token).
    """
    outputs = []
    for t in range(q.shape[2]):
        k = rule.k[:, :, t, None, :, None]  # [batch, head, 1, state_k, 1]
        value = v[:, :, t, None, None, :]
        new = regrouped(state, places[:, t] - 1, places[:, t])
        if rule.log_decay is not None:
            decay = rule.log_decay[:, :, t].exp()
            new = new * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])[:, :, None]
        written = k * value
        if rule.beta is not None:
            beta = rule.beta[:, :, t, None, None, None]
            new = new - beta * k * (k * new).sum(3, keepdim=True)
            written = beta * written
        elif rule.write is not None:
            written = rule.write[:, :, t, None, None, None] * written
        new = torch.cat([new[:, :, :1] + written, new[:, :, 1:]], 2)
        state = new if real is None else torch.where(real[:, t, None, None, None, None], new, state)
        read = torch.einsum("bhk,bhlkv->bhlv", q[:, :, t], state)
        outputs.append(rule.scale * torch.einsum("bhl,bhlv->bhv", weights[:, :, t], read))
    return torch.stack(outputs, 2), state
