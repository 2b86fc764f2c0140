"""The effective pattern of the gated delta rule in closed form, erasure included, and the factors it is made of.

    alpha = M (I + L)^-1 diag(beta)
    M_ij = scale (q_i . k_j) D_ij  for j <= i          match: what the query finds
    L_ij = beta_i (k_i . k_j) D_ij  for j < i          recall: what each write takes back from earlier ones
    D_ij = exp(G_i - G_j),  G = cumsum(log_decay)      inside the dot products when every state row has its own decay

so that output = alpha @ v for a run that starts from an empty state. The mixer is linear in v, hence the pattern is
exact; it is signed and its rows sum to nothing in particular. With one decay per token D is a similarity of L, and

    alpha = (match @ erase @ diag(write)) * D          match and erase of the same layer without decay

separates content and rewriting from forgetting (from arXiv 2412.06464, eq. 10, by writing D = diag(e^G) 1 diag(e^-G)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from kernels.arguments import (
    check_decay,
    check_key,
    check_positions,
    check_query,
    check_token_weight,
    compute_dtype,
)
from kernels.gated_linear_attention.decay import between, cumulative
from kernels.gated_linear_attention.pattern import pattern_rows


@dataclass(frozen=True)
class PatternFactors:
    """alpha = (match @ erase * write) * decay, up to rounding.

    match [batch, head, query, key]: scale * q_i . k_j for j <= i. erase [batch, head, key, key]: (I + L)^-1, how
    later writes change earlier ones. decay [batch, head, query, key]: D, 0 above the diagonal; None when there is no
    decay, or when every state row has its own, which then weights the products inside match and erase.
    write [batch, head, key]: beta.
    """

    match: Tensor
    erase: Tensor
    decay: Tensor | None
    write: Tensor

    def product(self) -> Tensor:
        """The pattern put together again, [batch, head, query, key]."""
        content = self.match @ self.erase * self.write.unsqueeze(-2)
        return content if self.decay is None else content * self.decay


@overload
def effective_pattern(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    queries: Sequence[int] | Tensor | None = None,
    factors: Literal[False] = False,
) -> Tensor: ...


@overload
def effective_pattern(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    queries: Sequence[int] | Tensor | None = None,
    factors: Literal[True],
) -> tuple[Tensor, PatternFactors]: ...


def effective_pattern(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    queries: Sequence[int] | Tensor | None = None,
    factors: bool = False,
) -> Tensor | tuple[Tensor, PatternFactors]:
    """Exact weights alpha [batch, head, query, key] with output = alpha @ v, up to the share of an initial state.

    Parameters
    ----------
    q, k : [batch, head, pos, state_k]
    beta : [batch, head, pos], the write strength
    log_decay : None, [head], [batch, head, pos] or [batch, head, pos, state_k]; natural log per token, finite, <= 0
    scale : as in `delta_rule`
    queries : positions of the rows wanted, in any order; None for all of them
    factors : return (alpha, PatternFactors) instead. alpha is always solved with the decay in place. The factors match
        and erase of a scalar decay are those without it: bounded for keys with beta |k|^2 <= 2, else they may grow
        with the length where alpha does not

    Returns float32 for 16-bit inputs, else the type of q. Raises ValueError naming the argument that does not fit.
    """
    check_key(k)
    check_query(q, k)
    check_token_weight("beta", beta, k)
    check_decay(log_decay, k)
    pos, dtype = k.shape[2], compute_dtype(k.dtype)
    rows = list(range(pos)) if queries is None else check_positions("queries", queries, pos)
    with torch.autocast(q.device.type, enabled=False):
        match = _products(q, k, log_decay, scale, False, rows)
        # Tokens behind the last row asked for cannot reach it.
        reach = max(rows, default=-1) + 1
        recall = _recall(k[:, :, :reach], beta[:, :, :reach], _first(log_decay, reach))
        seen = torch.linalg.solve_triangular(recall, match[..., :reach], upper=False, left=False, unitriangular=True)
        alpha = torch.nn.functional.pad(seen * beta[:, :, None, :reach].to(dtype), (0, pos - reach))
        if not factors:
            return alpha
        vector = log_decay is not None and log_decay.ndim == 4
        inside = log_decay if vector else None
        if not vector:
            match = _products(q, k, None, scale, False, rows)
        recall = _recall(k, beta, inside)
        identity = torch.eye(pos, dtype=dtype, device=k.device).expand_as(recall)
        erase = torch.linalg.solve_triangular(recall, identity, upper=False, unitriangular=True)
        decay = None if log_decay is None or vector else _decay_rows(log_decay, k, rows)
        return alpha, PatternFactors(match, erase, decay, beta.to(dtype))


def _first(log_decay: Tensor | None, stop: int) -> Tensor | None:
    return log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, :, :stop]


def _products(q: Tensor, k: Tensor, log_decay: Tensor | None, scale: float, strict: bool, rows: list[int]) -> Tensor:
    """scale (q_i . k_j) D_ij for the rows asked, [batch, head, query, key]; also when there is no key at all."""
    if not k.shape[2]:
        return q.new_zeros(*k.shape[:2], len(rows), 0, dtype=compute_dtype(q.dtype))
    return pattern_rows(q, k, log_decay, None, scale, strict, rows)


def _recall(k: Tensor, beta: Tensor, log_decay: Tensor | None) -> Tensor:
    """L [batch, head, key, key], strictly lower triangular."""
    products = _products(k, k, log_decay, 1.0, True, list(range(k.shape[2])))
    return products * beta.to(products.dtype).unsqueeze(-1)


def _decay_rows(log_decay: Tensor, k: Tensor, queries: list[int]) -> Tensor:
    batch, head, pos, _ = k.shape
    rows = torch.tensor(queries, dtype=torch.long, device=k.device)
    g = log_decay if log_decay.ndim == 3 else log_decay[None, :, None].expand(batch, head, pos)
    g = cumulative(g, -1)
    visible = torch.arange(pos, device=k.device) <= rows[:, None]
    return between(g[:, :, rows], g, visible, compute_dtype(k.dtype))
