"""`MemoryCore`: the hooked form of the fast-weight kernel, a memory whose state are the weights of a small network (Titans, Miras).

    g_t = ∇ loss(M(k_t; W°), v_t)         hook_loss, hook_surprise = |g_t|: how unexpected the token was (report only)
    S_t = e^{log_momentum_t} S_{t−1} − step_t g_t                           hook_momentum[t]
    A_t = e^{log_decay_t} A_{t−1} + S_t,  W_t = link(A_t)                   hook_state[t]: the weights (with a link, what is accumulated)
    o_t = M(q_t; W_t)

W° are the weights before the running block of `every` tokens: part of the model, not of its speed. A memory of one matrix with the
squared loss is linear in its values: its pattern is exact, o = α v, and editable. Any other has no weights of that kind; its pattern is the
Jacobian norm ‖∂o_i/∂v_j‖, computed on demand and report only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fast_weight_memory import Carry, Link, Loss, Memory, Signals, fast_weight_memory, values_pattern
from models.context import Context
from models.recurrent.linear_core import refuse_continued, watched
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

AT_ONCE = 1 << 22  # numbers of the gradients of one row of the Jacobian computed at once


class MemoryCore(nn.Module):
    """Parameter-free. Tensors are [batch, head, pos, width]. `mode` is `"chunked"`, `"recurrent"` or `"parallel"` (as chunked: a memory
    that learns step by step has no quadratic form)."""

    transparent_in_names = True

    def __init__(self, memory: Memory, loss: Loss, link: Link, every: int) -> None:
        super().__init__()
        self.memory, self.loss, self.link, self.every = memory, loss, link, every
        self.linear = memory.linear and loss.kind == "l2" and link.trivial
        self.mode = "chunked"
        if self.linear:
            meta = PatternMeta(signed=True, rows_sum_to="free", effective=True)
        else:
            meta = PatternMeta(rows_sum_to="free", exact=False, effective=True, kind="jacobian")
        self.hook_pattern = HookPoint(
            "pattern", "batch head query key", meta=meta, editable=self.linear, on_demand=not self.linear
        )
        self.state_axes = ("state_k", "state_v") if memory.hidden is None else ("weight", "hidden_neuron")
        self.hook_state = HookPoint("state", " ".join(("batch head", *self.state_axes)), per_position=True)
        self.hook_loss = HookPoint("memory_loss", "batch head pos", editable=False, on_demand=True)
        self.hook_surprise = HookPoint("surprise", "batch head pos", editable=False, on_demand=True)

    def declare_momentum(self) -> None:
        """Called by a mixer whose memory has momentum: the hook point of that state."""
        self.hook_momentum = HookPoint("state", " ".join(("batch head", *self.state_axes)), per_position=True)

    def forward(
        self, tokens: dict[str, Tensor | None], context: Context, initial: Carry | Tensor
    ) -> tuple[Tensor, Carry]:
        """Learn and read. Padding neither writes nor lets time pass.

        Args:
            tokens: q, k, v [batch, head, pos, width]; step, log_decay, log_momentum, threshold [batch, head, pos] or None.
            initial: what an earlier call handed on, or the weights to begin with, [batch, head, state_k, state_v].
        """
        output, signals, carry = self.learn(tokens, context, initial, self.stops(context, tokens["k"].shape[2]))  # type: ignore[union-attr]
        self.hook_loss(signals.loss)
        self.hook_surprise(signals.surprise)
        return self.watched(output, tokens, context, initial), carry

    def learn(
        self, tokens: dict[str, Tensor | None], context: Context, initial: Carry | Tensor, stops: Sequence[int]
    ) -> tuple[Tensor, Signals, Carry]:
        """The memory alone, with states handed out at `stops`, positions within this call; for mixers that run in pieces."""
        options = self._options(tokens, context)
        q, k, v, step = self._required(tokens)
        return fast_weight_memory(
            q,
            k,
            v,
            step,
            self.memory,
            initial,
            **options,
            stops=list(stops) or None,
            on_carry=(lambda t, c: self._at(context.offset + t, c)) if stops else None,
        )

    @staticmethod
    def _required(tokens: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, step = (tokens[name] for name in ("q", "k", "v", "step"))
        assert q is not None and k is not None and v is not None and step is not None
        return q, k, v, step

    def _options(self, tokens: dict[str, Tensor | None], context: Context) -> dict[str, Any]:
        return {
            **{name: tokens[name] for name in ("log_decay", "log_momentum", "threshold")},
            "loss": self.loss,
            "link": self.link,
            "every": self.every,
            "real": context.mask,
            "start": context.read_before,
            "mode": "recurrent" if self.mode == "recurrent" else "chunked",
        }

    def stops(self, context: Context, length: int) -> list[int]:
        """Where somebody watches the state or the momentum, positions within this call."""
        found: set[int] = set()
        for name in ("hook_state", "hook_momentum"):
            point = getattr(self, name, None)
            if point is not None and point.active:
                found.update(point.stops(context.offset, length))
        return sorted(found)

    def _at(self, position: int, carry: Carry) -> Carry:
        """Fire the points that are watched at this position."""
        for name, field in (("hook_state", "state"), ("hook_momentum", "momentum")):
            point = getattr(self, name, None)
            value = getattr(carry, field)
            if point is not None and point.active and value is not None:
                carry = carry._replace(**{field: point.at(position, value)})
        return carry

    def watched(
        self, output: Tensor, tokens: dict[str, Tensor | None], context: Context, initial: Carry | Tensor
    ) -> Tensor:
        """The output once the pattern was read or, of a linear memory, edited."""
        options = self._options(tokens, context)
        q, k, v, step = self._required(tokens)
        if self.linear:
            rule = {name: options[name] for name in ("log_decay", "log_momentum", "every", "real", "start", "mode")}
            return watched(self.hook_pattern, context, output, v, lambda: values_pattern(q, k, step, **rule))
        if self.hook_pattern.active:
            refuse_continued(self.hook_pattern, context)
            self.hook_pattern(self._jacobian(q, k, v, step, initial, options))
        return output

    def _jacobian(
        self, q: Tensor, k: Tensor, v: Tensor, step: Tensor, initial: Carry | Tensor, options: dict[str, Any]
    ) -> Tensor:
        """‖∂o_i/∂v_j‖ (Frobenius) [batch, head, query, key], queries, keys and step sizes held as they are."""

        def own(x: Any) -> Any:
            return x.detach().clone() if isinstance(x, Tensor) else x

        with torch.inference_mode(False), torch.enable_grad():
            held = {name: own(x) for name, x in options.items()}
            start = Carry(*(own(x) for x in initial)) if isinstance(initial, Carry) else own(initial)
            values = own(v).to(own(step).dtype).requires_grad_()
            out, _, _ = fast_weight_memory(
                own(q).to(values.dtype), own(k).to(values.dtype), values, own(step), self.memory, start, **held
            )
            width, rows = out.shape[3], []
            one_hot = torch.eye(width, dtype=out.dtype, device=out.device)[:, None, None].expand(-1, *out.shape[:2], -1)
            at_once = max(1, AT_ONCE // values.numel())
            for i in range(out.shape[2]):
                # sequences and heads do not mix, so one gradient serves them all
                squares = torch.zeros(out.shape[:3], dtype=out.dtype, device=out.device)
                for ask in one_hot.split(at_once):
                    (part,) = torch.autograd.grad(out[:, :, i], values, ask, retain_graph=True, is_grads_batched=True)
                    squares += part.square().sum((0, -1))
                rows.append(squares.sqrt())
        return torch.stack(rows, 2)

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals, for the mixer's `signal_points`."""
        return {
            "surprise": (self.hook_surprise, "norm of the gradient that the token wrote with", None),
            "memory_loss": (self.hook_loss, "loss of the memory on the token before it was learned", None),
        }
