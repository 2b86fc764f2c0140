"""A memory that learns while it reads, one token at a time: slow, and compared in the tests with automatic differentiation.

    g_t = ∇_W loss(M(k_t; W°), v_t)                      W°: the weights before the running block of `every` tokens
    S_t = exp(log_momentum_t) S_{t-1} - step_t g_t       momentum: past surprise goes on writing
    A_t = exp(log_decay_t) A_{t-1} + S_t                 decay: forgetting
    W_t = link(A_t),   o_t = M(q_t; W_t)                 read with the own write

Without momentum S_t = -step_t g_t. Behrouz, Zhong and Mirrokni 2024, arXiv 2501.00663, section 3 (Titans); Behrouz et al. 2025, arXiv
2504.13173, section 5 (other losses and links).
"""

import torch
from torch import Tensor

from .rule import Carry, Rule, Signals, Tokens


def recurrent(tokens: Tokens, rule: Rule, carry: Carry, place: int) -> tuple[Tensor, Signals, Carry]:
    """place : position of the first token, which decides where blocks begin.

    Returns (output [batch, head, pos, state_v], signals, carry).
    """
    state, momentum, anchor = carry
    memory = rule.memory
    outputs, losses, surprises = [], [], []
    for t in range(tokens.k.shape[2]):
        if (place + t) % rule.every == 0:
            anchor = state
        here = tokens.part(t, t + 1)
        value, threshold = here.v, here.threshold
        inputs, errors, prediction = memory.write_factors(
            rule.link.weights(anchor, memory),
            here.k,
            lambda m, v=value, d=threshold: rule.loss.slope(m - v, d),  # type: ignore[misc]
        )
        gradient = memory.pack([x.mT @ e for x, e in zip(inputs, errors, strict=True)])
        written = -here.step.unsqueeze(-1) * gradient
        if momentum is not None:
            assert here.log_momentum is not None
            momentum = here.log_momentum.exp().unsqueeze(-1) * momentum + written
            written = momentum
        state = (state if here.log_decay is None else here.log_decay.exp().unsqueeze(-1) * state) + written
        outputs.append(memory.read(rule.link.weights(state, memory), here.q))
        losses.append(rule.loss.value(prediction - value, threshold))
        surprises.append(torch.linalg.matrix_norm(gradient).unsqueeze(-1))
    signals = Signals(torch.cat(losses, 2), torch.cat(surprises, 2))
    return torch.cat(outputs, 2), signals, Carry(state, momentum, anchor)
