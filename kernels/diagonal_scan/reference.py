"""The two recurrences, one token at a time: plain, and the oracle of every other form in this folder.

    diagonal    h_t = a_t * h_{t-1} + b_t                                    elementwise, real or complex
    selective   h_t = exp(delta_t A) * h_{t-1} + delta_t x_t B_t             per channel, A diagonal
                y_t = C_t . h_t + D * x_t

The selective scan is Mamba's: Gu and Dao 2023, arXiv 2312.00752, algorithm 2, as its code computes it, with the exact
exponential for the decay (zero-order hold) and the simple product delta B for the input (Euler).
"""

import torch
from torch import Tensor


def recurrent(decay: Tensor, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """decay [batch or 1, pos or 1, *channels or 1], inputs [batch, pos, *channels], state [batch, *channels], one type.

    Returns (states [batch, pos, *channels], state after the last token).
    """
    states = []
    decay = decay.expand(decay.shape[0], inputs.shape[1], *decay.shape[2:])
    for decay_t, input_t in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        state = torch.addcmul(input_t, decay_t, state)
        states.append(state)
    return torch.stack(states, 1), state


def selective_recurrent(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None, state: Tensor
) -> tuple[Tensor | None, Tensor]:
    """x, delta [batch, pos, channel]; A [channel, state]; B, C [batch, pos, state]; state [batch, channel, state].

    Returns (C_t . h_t [batch, pos, channel] or None without C, state after the last token).
    """
    outputs = []
    for t in range(x.shape[1]):
        decay = (delta[:, t, :, None] * A).exp()
        state = decay * state + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t, None]
        if C is not None:
            outputs.append((state @ C[:, t, :, None]).squeeze(-1))
    return (torch.stack(outputs, 1) if outputs else None), state
