"""DenseFormer (Pagliardini et al. 2024): what a block reads is a learned average of the outputs of all blocks before.

    Y_i = Σ_k α_ik X_k,   X_0 = embedding,  X_i = block_i(Y_{i−1})      k ≤ i, k ≡ i modulo `dilation`; after every `period`-th block

At the beginning α_ii = 1 and the rest is 0, which is an ordinary stack. `hook_weights` holds α_i for every token, so that one edge between
layers can be cut or patched by itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.context import Context
from models.wiring import Notes, Wiring, register_wiring, repeated
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class DenseFormerConfig:
    """Args: dilation: only every dilation-th earlier output is averaged. period: blocks between two averages."""

    dilation: int = 1
    period: int = 1
    kind: str = "denseformer"

    label, words = "DenseFormer", "averages of all outputs"  # what a diagram says of it

    def __post_init__(self) -> None:
        if self.dilation < 1 or self.period < 1:
            raise ValueError(f"dilation is {self.dilation}, period {self.period}; expected at least 1 each.")


class Average(nn.Module):
    """Σ_k α_k X_k. `alpha` [source], the last source is the newest."""

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(sources))
        self.hook_weights = HookPoint("depth_weights", "batch pos source")
        self.hook_average = HookPoint("depth_average", "batch pos d_model")

    def initialise_own(self) -> None:
        """The newest source alone."""
        with torch.no_grad():
            self.alpha.zero_()[-1] = 1.0

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """Outputs [batch, pos, d_model] each, oldest first."""
        weights = self.hook_weights(self.alpha.expand(*outputs[0].shape[:2], -1))
        return self.hook_average(torch.einsum("kbpd,bpk->bpd", torch.stack(outputs), weights))


@register_wiring(DenseFormerConfig)
class DenseFormer(Wiring):
    """`after.{layer}` is the average behind a block."""

    stream_is_all = False

    def __init__(self, config: DenseFormerConfig, model: Any) -> None:
        super().__init__()
        self.config, self.visits = config, repeated(model.n_layers, 1)
        averaged = [layer for layer in range(model.n_layers) if (layer + 1) % config.period == 0]
        self.after = nn.ModuleDict({str(layer): Average((layer + 1) // config.dilation + 1) for layer in averaged})

    def begin(self, x: Tensor, context: Context) -> Notes:
        return {"outputs": [x]}

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        outputs: list[Tensor] = notes["outputs"]
        outputs.append(x)
        if str(layer) not in self.after:
            return x
        averaged: Tensor = self.after[str(layer)](outputs[(layer + 1) % self.config.dilation :: self.config.dilation])
        return averaged
