"""`NeuralMemory`: projections, gates and first weights around a memory that learns while it reads; shared by Titans and Miras.

    q, k, v = SiLU(conv(W x));   q, k <- q/|q|, k/|k| per head
    step = σ(W_θ x + b)·max_step,  e^{log_decay} = 1 − σ(W_α x + b),  e^{log_momentum} = σ(W_η x + b),  threshold = √d softplus(W_δ x + b)
    z_t = M(q_t; W_t)                                                        memory_core.py

One number per token and head for each gate. The first weights of an MLP are learned; a matrix begins empty, so that its pattern is the
whole output. The convolution smears tokens before they are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fast_weight_memory import Carry, Link, Loss, Memory
from models.context import Context
from models.parts.short_convolution import causal_convolution
from models.recurrent.linear_core import linear_record
from models.recurrent.memory_core import MemoryCore
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class MemoryConfig:
    """Args:
    n_heads: heads, each with a memory of its own. depth: weight matrices of a memory. expansion: hidden width over d_head (depth > 1).
    output: `"plain"`, `"residual"` or `"norm_residual"`; None takes plain for a matrix, else norm_residual, x + LN(MLP(x)), whose
    gradients cannot explode. activation: between the matrices, `"gelu"` or `"silu"`.
    momentum: whether past gradients go on writing. every: tokens whose gradients are taken at the same weights.
    loss, loss_power, link, link_power, total: see `kernels.fast_weight_memory`. d_conv: taps of the causal convolution.
    """

    n_heads: int
    depth: int = 2
    expansion: int = 2
    output: str | None = None
    activation: str = "gelu"
    momentum: bool = True
    every: int = 16
    max_step: float | None = None
    loss: str = "l2"
    loss_power: float = 3.0
    link: str = "identity"
    link_power: float = 4.0
    total: float = 1.0
    d_conv: int = 4

    def rule(self, d_head: int) -> tuple[Memory, Loss, Link]:
        """Its three choices, for heads of this width."""
        hidden = self.expansion * d_head if self.depth > 1 else None
        output = self.output or ("plain" if self.depth == 1 else "norm_residual")
        memory = Memory(d_head, d_head, self.depth, hidden, self.activation, output)
        return memory, Loss(self.loss, self.loss_power), Link(self.link, self.link_power, self.total)


Watch = Callable[[HookPoint, Tensor], Tensor]


def fire(point: HookPoint, x: Tensor) -> Tensor:
    """The hook point itself: the ordinary `watch`."""
    return point(x)


class NeuralMemory(nn.Module):
    """x [batch, pos, d_model] -> z [batch, pos, head, d_head] and the slots to carry on.

    reports_only: for a mixer that runs it in pieces and fires its points afterwards: they cannot be edited.
    """

    transparent_in_names = True

    def __init__(self, config: MemoryConfig, d_model: int, reports_only: bool = False) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(f"d_model ({d_model}) must be a multiple of n_heads ({config.n_heads}).")
        self.config, self.n_heads, self.d_head = config, config.n_heads, d_model // config.n_heads
        memory, loss, link = config.rule(self.d_head)
        self.core = MemoryCore(memory, loss, link, config.every)
        self.slots = ("state", "momentum", "anchor", "conv") if config.momentum else ("state", "anchor", "conv")
        self.input = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = nn.Parameter(torch.empty(3 * d_model, config.d_conv))
        self.conv._own_init = True  # type: ignore[attr-defined]
        self.step = nn.Linear(d_model, config.n_heads)
        self.decay = nn.Linear(d_model, config.n_heads, bias=False)
        self.decay_bias = nn.Parameter(
            torch.full((config.n_heads,), -4.0)
        )  # no linear map's, which would begin at zero
        self.momentum = nn.Linear(d_model, config.n_heads) if config.momentum else None
        self.threshold: nn.Linear | None = None
        if loss.needs_threshold:
            self.threshold = nn.Linear(d_model, config.n_heads, bias=False)
            self.threshold_bias = nn.Parameter(
                torch.ones(config.n_heads)
            )  # 1.3 √d_head, a little more than an untrained error
        self.first: nn.Parameter | None = None
        if not self.core.linear:
            self.first = nn.Parameter(torch.empty(config.n_heads, *memory.shape))
            self.first._own_init = True  # type: ignore[attr-defined]
        how: dict[str, Any] = {"editable": False, "on_demand": True} if reports_only else {}
        self.hook_conv = HookPoint("conv", "batch pos channel", **how)
        self.hook_q = HookPoint("query", "batch pos head d_key", **how)
        self.hook_k = HookPoint("key", "batch pos head d_key", **how)
        self.hook_unit_q = HookPoint("unit_query", "batch pos head d_key", **how)
        self.hook_unit_k = HookPoint("unit_key", "batch pos head d_key", **how)
        self.hook_v = HookPoint("value", "batch pos head d_head", **how)
        self.hook_write = HookPoint("write", "batch pos head", **how)
        self.hook_log_decay = HookPoint("decay", "batch pos head", **how)
        if config.momentum:
            self.hook_log_momentum = HookPoint("momentum_decay", "batch pos head", **how)
            self.core.declare_momentum()
        if self.threshold is not None:
            self.hook_threshold = HookPoint("threshold", "batch pos head", **how)
        self.hook_z = HookPoint("z", "batch pos head d_head")

    def initialise_own(self) -> None:
        """Memories begin as a network of unit gain (behind a softmax: with logits of unit variance) and forget about 2 % per token."""
        with torch.no_grad():
            bound = self.config.d_conv**-0.5
            self.conv.uniform_(-bound, bound)
            if self.first is not None:
                layers = self.core.memory.unpack(torch.randn_like(self.first))
                gains = [1.0 if self.config.link == "softmax" else w.shape[-2] ** -0.5 for w in layers]
                self.first.copy_(self.core.memory.pack([w * gain for w, gain in zip(layers, gains, strict=True)]))

    def forward(
        self, x: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Learn and read every token."""
        window = None if carried is None else carried["conv"]
        tokens, window = self.project(x, context, window)
        z, carry = self.core(tokens, context, self.initial(x, carried))
        z = self.hook_z(z.transpose(1, 2))
        return z, self.carried(carry, window) if context.keep_state else {}

    def carried(self, carry: Carry, window: Tensor) -> dict[str, Tensor]:
        """The slots to carry on."""
        return {**{name: value for name, value in carry._asdict().items() if value is not None}, "conv": window}

    def project(
        self, x: Tensor, context: Context, window: Tensor | None, watch: Watch = fire
    ) -> tuple[dict[str, Tensor | None], Tensor]:
        """What the tokens bring to the core, heads first, and the last inputs of the convolution.

        watch(point, x) is asked for every hook point and returns what to go on with.
        """
        shape = (self.n_heads, self.d_head)
        mixed, window = causal_convolution(self.input(x), self.conv, None, context, window)
        q, k, v = watch(self.hook_conv, F.silu(mixed)).chunk(3, dim=-1)
        q = watch(self.hook_q, q.unflatten(-1, shape))
        k = watch(self.hook_k, k.unflatten(-1, shape))
        tokens: dict[str, Tensor | None] = {
            "q": watch(self.hook_unit_q, F.normalize(q, dim=-1, eps=1e-6)),
            "k": watch(self.hook_unit_k, F.normalize(k, dim=-1, eps=1e-6)),
            "v": watch(self.hook_v, v.unflatten(-1, shape)),
            **self._gates(x, watch),
        }
        return {name: None if part is None else part.transpose(1, 2) for name, part in tokens.items()}, window

    def _gates(self, x: Tensor, watch: Watch) -> dict[str, Tensor | None]:
        """Step, log decay, log momentum and threshold [batch, pos, head], in float32 at least."""
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        largest = self.config.max_step or 1.0 / self.config.every
        gates: dict[str, Tensor | None] = {
            "step": watch(self.hook_write, largest * torch.sigmoid(self.step(x).to(precise))),
            "log_decay": watch(self.hook_log_decay, F.logsigmoid(-(self.decay(x) + self.decay_bias).to(precise))),
            "log_momentum": None,
            "threshold": None,
        }
        if self.momentum is not None:
            gates["log_momentum"] = watch(self.hook_log_momentum, F.logsigmoid(self.momentum(x).to(precise)))
        if self.threshold is not None:
            threshold = F.softplus((self.threshold(x) + self.threshold_bias).to(precise))
            gates["threshold"] = watch(self.hook_threshold, self.d_head**0.5 * threshold)
        return gates

    def initial(self, x: Tensor, carried: dict[str, Tensor] | None) -> Carry | Tensor:
        """What the memory goes on with: an earlier call's, or the first weights, [batch, head, state_k, state_v]."""
        if carried is not None:
            return Carry(carried["state"], carried.get("momentum"), carried["anchor"])
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        first = self.first if self.first is not None else x.new_zeros(self.n_heads, *self.core.memory.shape)
        return first.to(precise).expand(x.shape[0], -1, -1, -1)

    def recall(self, state: Tensor, keys: Tensor) -> Tensor:
        """What the memory answers: states [..., state_k, state_v] and keys [..., n, d_key] -> [..., n, d_head]."""
        return self.core.memory.read(self.core.link.weights(state, self.core.memory), keys)

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """What the tokens bring to the memory."""
        return {
            "query": self.hook_unit_q,
            "key": self.hook_unit_k,
            "value": self.hook_v,
            "log_decay": self.hook_log_decay,
            "write": self.hook_write,
        }

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals that a run keeps."""
        return self.core.signals

    def describe(self, kind: str) -> dict[str, Any]:
        """The layer record of a run manifest."""
        heads = self.n_heads
        record = linear_record(kind, _Plain(self.core), heads, heads, heads, (heads, *self.core.memory.shape))
        return {**record, "form": "dense", "state": {**record["state"], "axes": ["head", *self.core.state_axes]}}


class _Plain:
    """What `linear_record` asks of a core."""

    scale, strict = 1.0, False

    def __init__(self, core: MemoryCore) -> None:
        self.hook_pattern = core.hook_pattern


class ShowsItsMemory:
    """What a mixer around a `NeuralMemory` (its `memory`) tells about itself: pattern, state, signals and record are the memory's."""

    memory: NeuralMemory

    def recall(self, state: Tensor, keys: Tensor) -> Tensor:
        """What the memory in `state` answers to keys; see `NeuralMemory.recall`."""
        return self.memory.recall(state, keys)

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """Those of the memory."""
        return self.memory.factor_points

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Those of the memory."""
        return self.memory.signal_points

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return self.memory.describe("titans")
