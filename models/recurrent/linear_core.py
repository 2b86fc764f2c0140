"""`LinearCore`: the hooked form of the gated linear attention kernel, shared by BDH, retention, Mamba-2, GLA and GateLoop.

    S_t = diag(exp(log_decay_t)) S_{t−1} + write_t k_t v_tᵀ  hook_state[t], after token t is read and written
    o_t = scale · q_tᵀ S_t   (strict: exp(log_decay_t) S_{t−1})
    α_ij = scale · Σ_d q_id k_jd exp(G_id − G_jd) write_j     hook_pattern: o = α v exactly; G = cumsum(log_decay)

Nothing of size query × key or position × state exists unless somebody watches it. An edited pattern changes the output by
(edited − true) v and leaves the state alone; an edited state changes every later output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.gated_linear_attention import effective_pattern, gated_linear_attention
from models.context import Context
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


class LinearCore(nn.Module):
    """Parameter-free. Tensors are [batch, head, pos, width]; `mode` is `"chunked"`, `"parallel"` or `"recurrent"`.

    Args:
        scale, strict: as in the equations above. chunk_size: tokens per chunk (None: the kernel's choice).
    """

    transparent_in_names = True  # its hook points are addressed as the mixer's own: blocks.0.mixer.hook_state

    def __init__(self, scale: float = 1.0, strict: bool = False, chunk_size: int | None = None) -> None:
        super().__init__()
        self.scale, self.strict, self.chunk_size = scale, strict, chunk_size
        self.mode = "chunked"
        causal = "strict" if strict else "inclusive"
        meta = PatternMeta(signed=True, rows_sum_to="free", effective=True, causal=causal)
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_state = HookPoint("state", "batch head state_k state_v", per_position=True)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        state: Tensor | None,
        log_decay: Tensor | None = None,
        write: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mix values and update the state. Padding neither writes nor lets time pass.

        Args:
            q, k: [batch, head, pos, state_k]. v: [batch, head or 1, pos, state_v]. log_decay: [head], [batch, head, pos] or, with a
                decay for every row of the state, [batch, head, pos, state_k].
            write: [batch, head, pos].
            state: from an earlier call, [batch, head, state_k, state_v].

        Returns:
            output [batch, head, pos, state_v] and the state after the last token.
        """
        length = q.shape[2]
        write, log_decay = without_padding(context, q, write, log_decay)
        stops: list[int] | None = None
        if self.hook_state.active:
            stops = self.hook_state.stops(context.offset, length)
        output, final = gated_linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            write=write,
            scale=self.scale,
            strict=self.strict,
            initial_state=state,
            chunk_size=self.chunk_size,
            mode=self.mode,
            stops=stops or None,
            on_state=(lambda t, s: self.hook_state.at(context.offset + t, s)) if stops else None,
        )
        options: dict[str, Any] = {"log_decay": log_decay, "write": write, "scale": self.scale, "strict": self.strict}
        return watched(self.hook_pattern, context, output, v, lambda: effective_pattern(q, k, **options)), final


def without_padding(
    context: Context, q: Tensor, write: Tensor | None, log_decay: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Write weights and decays for q [batch, head, pos, ...] with which padding neither writes nor lets time pass."""
    if context.mask is None:
        return write, log_decay
    real = context.mask[:, None, :].to(q.dtype)
    write = (real if write is None else write * real).expand(q.shape[:3])
    if log_decay is not None:
        each = log_decay[None, :, None] if log_decay.dim() == 1 else log_decay
        log_decay = each * (real[..., None] if each.dim() == 4 else real)
    return write, log_decay


def watched(
    point: HookPoint, context: Context, output: Tensor, values: Tensor, pattern: Callable[[], Tensor]
) -> Tensor:
    """The mixer's output once its pattern, computed only if somebody watches, was read or edited: plus (edited − true) · values."""
    if not point.active:
        return output
    refuse_continued(point, context)
    true = pattern()
    edited = point(true)
    if edited is true:
        return output
    return output + ((edited - true) @ values.to(true.dtype)).to(output.dtype)  # patterns of 16-bit inputs are float32


def refuse_continued(pattern: HookPoint, context: Context) -> None:
    """Raise `HookError` in a call that goes on from a state: the pattern's earlier columns do not exist."""
    if context.offset:
        raise HookError(
            f"{pattern.name!r} is watched in a call that continues a state. The state does not keep the {context.offset} "
            "earlier tokens apart, so their columns do not exist. Expected the whole sequence in one call (generate with "
            "use_state=False)."
        )


def grouped(x: Tensor, heads: int) -> Tensor:
    """Repeat groups over the heads that share them: [batch, group, pos, width] -> [batch, head, pos, width]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))


def initial_steps(count: int, smallest: float, largest: float) -> Tensor:
    """Biases whose softplus is log-uniform in [smallest, largest]: Mamba's initial step sizes. [count]."""
    low, high = torch.log(torch.tensor(smallest)), torch.log(torch.tensor(largest))
    return inverse_softplus(torch.exp(low + (high - low) * torch.rand(count)))


def linear_record(
    kind: str,
    core: Any,
    n_heads: int,
    n_key_heads: int,
    n_value_heads: int,
    state: tuple[int, int, int],
    form: str = "gated_linear",
    of_ones: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """The layer record (run manifest) of any mixer with a matrix state.

    state: (head, state_k, state_v). form: how runs store it. of_ones: {name: axes} of further states that hold the same sums with every
    value 1, as normalisers do: the factors tell them too.
    """
    axes = ("head", "state_k", "state_v")
    sizes = dict(zip(axes, state, strict=True))
    own = {"name": "state", "array": None, "axes": list(axes), "shape": list(state)}
    further = [
        {"name": name, "array": None, "values": "ones", "axes": list(kept), "shape": [sizes[axis] for axis in kept]}
        for name, kept in (of_ones or {}).items()
    ]
    return {
        "kind": kind,
        "form": form,
        "n_heads": n_heads,
        "n_key_heads": n_key_heads,
        "n_value_heads": n_value_heads,
        "scale": core.scale,
        "strict": core.strict,
        "alibi_slopes": None,
        "window": None,
        "pattern": core.hook_pattern.meta.as_dict(),
        "state": {"role": "state", "axes": list(axes), "shape": list(state)},
        **({"states": [own, *further]} if further else {}),
        "signals": [],
    }
