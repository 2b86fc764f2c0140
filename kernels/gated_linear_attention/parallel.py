"""The quadratic form: the whole pattern times the values, plus what the initial state contributes."""

from torch import Tensor

from .decay import cumulative
from .pattern import pattern_rows
from .trace import advance


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    scale: float,
    strict: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `reference.recurrent`; memory grows with pos squared."""
    pos, dtype = q.shape[2], state.dtype
    alpha = pattern_rows(q, k, log_decay, write, scale, strict, list(range(pos)))
    carried = q.to(dtype)
    if log_decay is not None:
        g = log_decay if log_decay.ndim > 1 else log_decay[None, :, None].expand(1, q.shape[1], pos)
        from_start = cumulative(g, 2).to(dtype).exp()
        carried = carried * (from_start if log_decay.ndim == 4 else from_start.unsqueeze(-1))
    output = alpha @ v.to(dtype) + scale * (carried @ state)
    return output, advance(k, v, log_decay, write, state, 0, pos)
