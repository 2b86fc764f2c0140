"""The recurrence, one token at a time: slow, and the oracle of every other form in this folder.

    S_t = diag(exp(log_decay_t)) S_{t-1} + write_t k_t v_t^T
    o_t = scale * q_t^T S_t                                        (strict=False: a token reads its own write)
    o_t = scale * q_t^T diag(exp(log_decay_t)) S_{t-1}             (strict=True: it reads what earlier tokens wrote)

Linear attention: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-20. Constant decay: RetNet, Sun et al. 2023, arXiv
2307.08621, eq. 6. Scalar decay: Mamba-2, Dao and Gu 2024, arXiv 2405.21060. Vector decay: GLA, Yang et al. 2023, arXiv
2312.06635, eq. 3. Strict reading without decay: BDH, Kosowski et al. 2025, arXiv 2509.26507, appendix E.
"""

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """q, k [batch, head, pos, state_k]; v [batch, head or 1, pos, state_v]; state [batch, head, state_k, state_v].

    Returns (output [batch, head, pos, state_v] in the type of the state, state after the last token).
    """
    batch, head, pos, _ = q.shape
    q, k, v = q.to(state.dtype), k.to(state.dtype), v.to(state.dtype)
    decay = None
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay[None, :, None].expand(batch, head, pos)
        if log_decay.ndim == 3:
            log_decay = log_decay.unsqueeze(-1)  # one factor for every row of the state
        decay = log_decay.to(state.dtype).exp().unsqueeze(-1)  # [batch, head, pos, state_k or 1, 1]
    if write is not None:
        k = k * write.to(state.dtype).unsqueeze(-1)
    outputs = []
    for t in range(pos):
        written = k[:, :, t, :, None] * v[:, :, t, None, :]
        if decay is not None:
            state = state * decay[:, :, t]
        if strict:
            outputs.append(q[:, :, t, None, :] @ state)
        state = state + written
        if not strict:
            outputs.append(q[:, :, t, None, :] @ state)
    return scale * torch.cat(outputs, 2), state
