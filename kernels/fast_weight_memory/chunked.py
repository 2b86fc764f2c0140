"""A memory that learns while it reads, block by block: the gradients of a block are taken at once, and never stored as matrices.

All gradients of a block are taken at the state before it, and the gradient of one token and layer is an outer product
x_iᵀ e_i. With D_ts the decay from s to t and E_si the momentum left at s of what token i wrote, the state after token t is

    A_t = b_t A_0 + m_t S_0 - Σ_{i <= t} c_ti x_iᵀ e_i,     c_ti = step_i Σ_{i <= s <= t} D_ts E_si

so the product of a row r_t with it is b_t r_t A_0 + m_t r_t S_0 - Σ_i c_ti (r_t · x_i) e_i: linear attention over the block, layer by
layer. With a link other than the identity the weights themselves are needed, and the block's states are formed.
Blocks as in arXiv 2501.00663, section 3.2; the outer-product form is that of test-time training, Sun et al. 2024, arXiv 2407.04620.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gated_linear_attention.decay import between, cumulative, lower_triangle

from .rule import Carry, Rule, Signals, Tokens


class Coefficients(NamedTuple):
    """How much of what a state after each token holds: of the writes [batch, head, pos, write], of A_0 and of S_0 [batch, head, pos]."""

    writes: Tensor
    first: Tensor
    momentum: Tensor | None


def chunked(tokens: Tokens, rule: Rule, carry: Carry, place: int) -> tuple[Tensor, Signals, Carry]:
    """As `reference.recurrent`."""
    pos = tokens.k.shape[2]
    parts = []
    start = 0
    while start < pos:
        stop = min(pos, start + rule.every - (place + start) % rule.every)
        if (place + start) % rule.every == 0:
            carry = carry._replace(anchor=carry.state)
        output, signals, carry = _block(tokens.part(start, stop), rule, carry)
        parts.append((output, *signals))
        start = stop
    output, loss, surprise = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return output, Signals(loss, surprise), carry


def _block(tokens: Tokens, rule: Rule, carry: Carry) -> tuple[Tensor, Signals, Carry]:
    """Tokens that share their anchor."""
    memory, link = rule.memory, rule.link
    inputs, errors, prediction = memory.write_factors(
        link.weights(carry.anchor, memory), tokens.k, lambda m: rule.loss.slope(m - tokens.v, tokens.threshold)
    )
    into_state, into_momentum = coefficients(tokens)
    firsts = memory.unpack(carry.state)
    momenta = [] if carry.momentum is None else memory.unpack(carry.momentum)

    def product(layer: int):  # type: ignore[no-untyped-def]
        def apply(r: Tensor) -> Tensor:
            result = into_state.first.unsqueeze(-1) * (r @ firsts[layer])
            if into_state.momentum is not None:
                result = result + into_state.momentum.unsqueeze(-1) * (r @ momenta[layer])
            return result - ((r @ inputs[layer].mT) * into_state.writes) @ errors[layer]

        return apply

    def formed(of: Coefficients, first: Tensor, momentum: Tensor | None, last: bool) -> Tensor:
        """The packed states after every token of the block, or after the last one."""
        place = slice(-1, None) if last else slice(None)
        writes = of.writes[:, :, place]
        gradients = memory.pack(
            [torch.einsum("bhti,bhik,bhiv->bhtkv", writes, x, e) for x, e in zip(inputs, errors, strict=True)]
        )
        result = of.first[:, :, place, None, None] * first.unsqueeze(2) - gradients
        if of.momentum is not None and momentum is not None:
            result = result + of.momentum[:, :, place, None, None] * momentum.unsqueeze(2)
        return result

    if link.trivial:
        output = memory.run(tokens.q, [product(layer) for layer in range(memory.depth)])
        state = formed(into_state, carry.state, carry.momentum, last=True)[:, :, 0]
    else:
        states = formed(into_state, carry.state, carry.momentum, last=False)
        output = memory.read(link.weights(states, memory), tokens.q.unsqueeze(3)).squeeze(3)
        state = states[:, :, -1]
    momentum = None
    if into_momentum is not None:
        assert carry.momentum is not None
        momentum = formed(into_momentum, carry.momentum, None, last=True)[:, :, 0]
    squares = sum(x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True))
    assert isinstance(squares, Tensor)
    signals = Signals(rule.loss.value(prediction - tokens.v, tokens.threshold), squares.sqrt())
    return output, signals, Carry(state, momentum, carry.anchor)


def coefficients(tokens: Tokens) -> tuple[Coefficients, Coefficients | None]:
    """Those of the states and, with momentum, those of the momenta, for tokens that share their anchor."""
    step = tokens.step
    visible = lower_triangle(step.shape[2], step.shape[2], False, step.device)
    decay = _running(tokens.log_decay, step)
    kept = between(decay, decay, visible, step.dtype)
    first = decay.to(step.dtype).exp()
    if tokens.log_momentum is None:
        return Coefficients(kept * step.unsqueeze(-2), first, None), None
    faded = _running(tokens.log_momentum, step)
    left = between(faded, faded, visible, step.dtype)
    of_first = faded.to(step.dtype).exp()
    in_state = Coefficients((kept @ left) * step.unsqueeze(-2), first, (kept @ of_first.unsqueeze(-1)).squeeze(-1))
    return in_state, Coefficients(left * step.unsqueeze(-2), of_first, None)


def _running(log_factor: Tensor | None, like: Tensor) -> Tensor:
    return cumulative(torch.zeros_like(like) if log_factor is None else log_factor, 2)
