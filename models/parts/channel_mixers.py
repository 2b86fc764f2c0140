"""Channel mixers: what happens to each token on its own between sequence mixers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class MLPConfig:
    """Args: d_mlp: hidden width. activation: one of ACTIVATIONS. gated: GLU (Shazeer 2020): activation(gate) · linear. bias: add biases."""

    d_mlp: int
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True


class MLP(nn.Module):
    """`out(activation(in(x)))`, or `out(activation(gate(x)) · in(x))` if gated. Axes batch pos d_model."""

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {config.activation!r}.{suggestion(config.activation, ACTIVATIONS)} Known: {', '.join(ACTIVATIONS)}."
            )
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.inward = nn.Linear(d_model, config.d_mlp, bias=config.bias)
        self.gate = nn.Linear(d_model, config.d_mlp, bias=False) if config.gated else None
        self.outward = nn.Linear(config.d_mlp, d_model, bias=config.bias)
        self.hook_pre = HookPoint("mlp_pre", "batch pos d_mlp")
        self.hook_post = HookPoint("mlp_post", "batch pos d_mlp")
        if config.gated:
            self.hook_pre_linear = HookPoint("mlp_pre_linear", "batch pos d_mlp")

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, pos, d_model] -> [batch, pos, d_model]."""
        if self.gate is None:
            hidden = self.activation(self.hook_pre(self.inward(x)))
        else:  # TransformerLens's names: hook_pre goes through the activation, hook_pre_linear multiplies it
            hidden = self.activation(self.hook_pre(self.gate(x))) * self.hook_pre_linear(self.inward(x))
        return self.outward(self.hook_post(hidden))

    @property
    def W_in(self) -> Tensor:
        """[d_model, d_mlp]."""
        return self.inward.weight.T

    @property
    def b_in(self) -> Tensor:
        """[d_mlp]."""
        return (
            self.inward.bias
            if self.inward.bias is not None
            else torch.zeros(self.config.d_mlp, device=self.inward.weight.device)
        )

    @property
    def W_out(self) -> Tensor:
        """[d_mlp, d_model]."""
        return self.outward.weight.T

    @property
    def b_out(self) -> Tensor:
        """[d_model]."""
        weight = self.outward.weight
        return self.outward.bias if self.outward.bias is not None else weight.new_zeros(weight.shape[0])
