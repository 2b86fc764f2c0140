"""The mLSTM block of xLSTM (Beck et al. 2024, arXiv 2405.04517, appendix A.3, and the published code): memory inside a wide gated branch.

    x, z = W_up u;   c = SiLU(conv(x));   q, k = W_q c, W_k c;   v = W_v x         W_q, W_k, W_v in blocks of a few channels
    ĩ, f̃ = W_i [q, k, v], W_f [q, k, v];   h = mLSTM(q, k, v, ĩ, f̃)
    out = W_down( (LayerNorm_head(h) + s ⊙ c) ⊙ SiLU(z) )                          s: a learned skip

Bio-xLSTM (Schmidinger et al. 2024, arXiv 2411.04165) rotates queries and keys: `rope="head"` within each head, after the gates have read
them (DNA-xLSTM); `rope="inner"` over the whole inner width before the gates read them, so that heads differ in wavelengths (Prot-xLSTM).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.context import Context
from models.mixers import register_mixer
from models.parts.positions import rotate
from models.parts.short_convolution import causal_convolution
from models.recurrent.cells import block_diagonal
from models.recurrent.mlstm import HeadNorm, MLSTMCore
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

ROPE = ("head", "inner")


@dataclass(frozen=True)
class MLSTMBlockConfig:
    """Args:
    n_heads. expand: inner width over d_model, rounded up to a multiple of `multiple_of`. block: channels of one block of W_q, W_k, W_v.
    d_conv: taps of the convolution. rope: None, `"head"` or `"inner"`, with `rope_base`. eps: of the denominator.
    """

    n_heads: int = 4
    expand: float = 2.0
    multiple_of: int = 64
    block: int = 4
    d_conv: int = 4
    rope: str | None = None
    rope_base: float = 5e5
    norm_eps: float = 1e-5
    eps: float = 1e-6
    chunk_size: int | None = None
    kind: str = "mlstm_block"


@register_mixer(MLSTMBlockConfig)
class MLSTMBlock(nn.Module):
    """See the module docstring. [batch, pos, d_model] -> same."""

    slots = (*MLSTMCore.slots, "conv")

    def __init__(self, config: MLSTMBlockConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__()
        width = config.multiple_of * math.ceil(config.expand * d_model / config.multiple_of)
        for name, part in (("n_heads", config.n_heads), ("block", config.block)):
            if width % part:
                raise ValueError(f"The inner width {width} must be a multiple of {name} ({part}).")
        if config.rope is not None and config.rope not in ROPE:
            raise ValueError(f"Unknown rope {config.rope!r}.{suggestion(config.rope, ROPE)} Known: {', '.join(ROPE)}.")
        self.config, self.n_heads, self.width = config, config.n_heads, width
        self.d_head = width // config.n_heads
        self.up = nn.Linear(d_model, 2 * width, bias=False)
        self.conv = nn.Parameter(torch.empty(width, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        shape = (width // config.block, config.block, config.block)  # block, in, out
        self.query, self.key, self.value = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.input_gate = nn.Linear(3 * width, config.n_heads)
        self.forget_gate = nn.Linear(3 * width, config.n_heads)
        self.skip = nn.Parameter(torch.ones(width))
        self.output = nn.Linear(width, d_model, bias=False)
        for parameter in (self.conv, self.query, self.key, self.value):
            parameter._own_init = True  # type: ignore[attr-defined]
        self.core = MLSTMCore(self.d_head, config.eps, config.chunk_size)
        self.norm = HeadNorm(config.n_heads, self.d_head, config.norm_eps)
        self.hook_conv = HookPoint("conv", "batch pos channel")
        self.hook_skip = HookPoint("skip", "batch pos channel")
        self.hook_gate = HookPoint("gate", "batch pos channel")

    def initialise_own(self) -> None:
        """Published initial values: gates blind to the input, forget gates open from 3 to 6, input gates near exp(0)."""
        with torch.no_grad():
            bound = self.config.d_conv**-0.5
            self.conv.uniform_(-bound, bound)
            for parameter in (self.query, self.key, self.value):
                parameter.normal_(std=math.sqrt(2 / (5 * self.up.in_features)))
            self.input_gate.weight.zero_()
            self.input_gate.bias.normal_(std=0.1)
            self.forget_gate.weight.zero_()
            self.forget_gate.bias.copy_(torch.linspace(3.0, 6.0, self.n_heads))

    def forward(
        self, u: Tensor, context: Context, carried: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u [batch, pos, d_model]. Carries C, n, m (see `MLSTMCore`) and `conv`, the last inputs [batch, d_conv − 1, channel]."""
        x, z = self.up(u).chunk(2, dim=-1)
        window = None if carried is None else carried["conv"]
        c, window = causal_convolution(x, self.conv, self.conv_bias, context, window)
        c = self.hook_conv(F.silu(c))
        q, k, v = block_diagonal(c, self.query), block_diagonal(c, self.key), block_diagonal(x, self.value)
        if self.config.rope == "inner":
            q, k = self._rotated(q, context), self._rotated(k, context)
        read = torch.cat([q, k, v], -1)
        i, f = self.input_gate(read), self.forget_gate(read)
        q, k, v = (part.unflatten(-1, (self.n_heads, self.d_head)) for part in (q, k, v))
        if self.config.rope == "head":
            q, k = self._rotated(q, context), self._rotated(k, context)
        h, slots = self.core(q, k, v, i, f, context, carried)
        h = self.norm(h) + self.hook_skip(self.skip * c)
        return self.output(h * self.hook_gate(F.silu(z))), {**slots, "conv": window} if context.keep_state else {}

    def _rotated(self, x: Tensor, context: Context) -> Tensor:
        """Pairs (2m, 2m+1) of the last axis turned by position · base^(−2m/width)."""
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        exponent = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=precise) / x.shape[-1]
        angle = context.positions.to(precise)[..., None] * self.config.rope_base**-exponent
        angle = angle[:, :, None] if x.dim() == 4 else angle
        return rotate(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype), interleaved=True)

    @property
    def factor_points(self) -> dict[str, HookPoint]:
        """The hook points that determine pattern and state."""
        return self.core.factor_points

    @property
    def signal_points(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """Per-token signals of the memory and its output gate."""
        return {**self.core.signal_points, "gate_mean": (self.hook_gate, "mean output gate", None)}

    def constant_factors(self) -> dict[str, Tensor]:
        """None: every factor depends on the input."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return self.core.record("mlstm", self.n_heads, self.d_head, self.d_head)
