"""Channel mixers: what happens to each token on its own between sequence mixers.

A further one is a file in this package: a frozen configuration with a unique `kind`, and a module under
`@register_channel_mixer(TheConfig)`. It is found by being there (`models.parts.experts` is one).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.discovery import import_all
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

BLOOM_CONSTANT = (
    0.79788456  # √(2/π) to eight digits, as Megatron-DeepSpeed's fused GELU has it, with which BLOOM was trained
)


def bloom_gelu(x: Tensor) -> Tensor:
    """GELU's tanh approximation with the constant of BLOOM's code (`bloom_gelu_forward` in transformers)."""
    return 0.5 * x * (1 + torch.tanh(BLOOM_CONSTANT * x * (1 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_bloom": bloom_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


_MODULES: dict[type, Any] = {}
M = TypeVar("M")


def register_channel_mixer(config: type) -> Callable[[type[M]], type[M]]:
    """Class decorator: the module that is built from configurations of this class."""

    def register(module: type[M]) -> type[M]:
        _MODULES[config] = module
        return module

    return register


def channel_mixer_configs() -> dict[str, type]:
    """Configuration classes by their `kind`; that of the MLP, which saved configurations do not name, is `mlp`."""
    import_all("models.parts")
    return {getattr(config, "kind", "mlp"): config for config in _MODULES}


def build_channel_mixer(config: Any, d_model: int) -> Any:
    """The module for a configuration; raises `TypeError` naming the known ones."""
    if type(config) not in _MODULES:
        known = channel_mixer_configs().values()
        raise TypeError(
            f"{type(config).__name__} is no channel mixer configuration. Known: {', '.join(c.__name__ for c in known)}."
        )
    return _MODULES[type(config)](config, d_model)


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """One of ACTIVATIONS; raises `ValueError` with the nearest name."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"Unknown activation {name!r}.{suggestion(name, ACTIVATIONS)} Known: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class MLPConfig:
    """Args: d_mlp: hidden width. activation: one of ACTIVATIONS. gated: GLU (Shazeer 2020): activation(gate) · linear. bias: add biases
    to the maps in and out. gate_bias: and to a gated one's gate."""

    d_mlp: int
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    gate_bias: bool = False

    label = "MLP"  # what a diagram calls it

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{'gated ' if self.gated else ''}{self.activation.split('_')[0]} {self.d_mlp}"


@register_channel_mixer(MLPConfig)
class MLP(nn.Module):
    """`out(activation(in(x)))`, or `out(activation(gate(x)) · in(x))` if gated. Axes batch pos d_model."""

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        if config.gate_bias and not config.gated:
            raise ValueError("gate_bias: an MLP that is not gated has no gate. Expected gated=True, or no gate_bias.")
        self.config = config
        self.activation = activation_function(config.activation)
        self.inward = nn.Linear(d_model, config.d_mlp, bias=config.bias)
        self.gate = nn.Linear(d_model, config.d_mlp, bias=config.gate_bias) if config.gated else None
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
