"""The gated delta rule, one token at a time: slow, and the oracle of every other form in this folder.

    S   = diag(exp(log_decay_t)) S_{t-1}                    first forget,
    u_t = beta_t (v_t - S^T k_t)                            then compare with what the key recalls: the pseudo-value,
    S_t = S + k_t u_t^T                                     and write the difference,
    o_t = scale * S_t^T q_t                                 read with the own write.

DeltaNet (no decay): Yang et al. 2024, arXiv 2406.06484, eq. 4-6. Gated DeltaNet (one factor per token): Yang, Kautz and
Hatamizadeh 2024, arXiv 2412.06464, eq. 10. Kimi Delta Attention (one factor per state row): Kimi Team 2025, arXiv
2510.26692.
"""

import torch
from torch import Tensor


def recurrent(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, k [batch, head, pos, state_k]; v [batch, head or 1, pos, state_v]; beta [batch, head, pos]; state [batch,
    head, state_k, state_v]. Without q nothing is read.

    Returns (output [batch, head, pos, state_v] or None, pseudo-values of that shape, state after the last token), all
    in the type of the state.
    """
    batch, head, pos, _ = k.shape
    dtype = state.dtype
    k, v, beta = k.to(dtype), v.to(dtype), beta.to(dtype).unsqueeze(-1)
    q = None if q is None else q.to(dtype)
    decay = None
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay[None, :, None].expand(batch, head, pos)
        if log_decay.ndim == 3:
            log_decay = log_decay.unsqueeze(-1)  # one factor for every row of the state
        decay = log_decay.to(dtype).exp().unsqueeze(-1)  # [batch, head, pos, state_k or 1, 1]
    outputs = []
    pseudo_values = []
    for t in range(pos):
        if decay is not None:
            state = state * decay[:, :, t]
        recalled = k[:, :, t, None, :] @ state  # [batch, head, 1, state_v]
        pseudo_value = beta[:, :, t, None] * (v[:, :, t, None] - recalled)
        state = state + k[:, :, t, :, None] * pseudo_value
        pseudo_values.append(pseudo_value)
        if q is not None:
            outputs.append(q[:, :, t, None, :] @ state)
    output = None if q is None else scale * torch.cat(outputs, 2)
    return output, torch.cat(pseudo_values, 2), state
