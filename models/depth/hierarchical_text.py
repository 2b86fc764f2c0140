"""HRM-Text (Sapient 2026): the two stacks of the Hierarchical Reasoning Model as a language model.

    z_L ← norm(low(z_L + z_H))        `steps` times
    z_H ← norm(high(z_H + z_L))       then once; both `cycles` times; the last z_H is unembedded

z_H starts as the embedding, which is not added again; z_L starts as one stored vector, zero at first. The norms have no weights; the one
behind the last slow run is the model's last norm. Gradients flow through all runs; the published training stops them in early fast runs.
Source: the code published with the weights (`hrm_text` of transformers 5).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import Context
from models.depth.hierarchical import Hierarchical
from models.wiring import Notes, register_wiring


@dataclass(frozen=True)
class HierarchicalTextConfig:
    """Args: low: blocks of the fast stack, the others are the slow one. cycles: runs of the slow stack. steps: fast runs in each."""

    low: int
    cycles: int = 2
    steps: int = 3
    kind: str = "hierarchical_text"

    label = "Two levels"

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.cycles} × ({self.steps} fast, 1 slow)"

    def __post_init__(self) -> None:
        if min(self.low, self.cycles, self.steps) < 1:
            raise ValueError(f"{self} has a part that never runs; expected at least 1 block, cycle and step.")


@register_wiring(HierarchicalTextConfig)
class HierarchicalText(Hierarchical):
    """`hook_low@k`, k = cycle · steps + step, and `hook_high@cycle` are what a run of a stack gives, before its norm."""

    def __init__(self, config: HierarchicalTextConfig, model: Any) -> None:
        super().__init__(config, model)
        self.eps = model.norm_eps

    def start(self, model: Any) -> None:
        self.register_buffer("start_low", torch.zeros(model.d_model))

    def begin(self, x: Tensor, context: Context) -> Notes:
        return {"low": self.start_low.to(x.dtype).expand_as(x), "high": x}

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        return notes["low"] + notes["high"] if layer in (0, self.config.low) else x

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer not in (self.config.low - 1, self.n_layers - 1):
            return x
        name, point = ("low", self.hook_low) if layer < self.config.low else ("high", self.hook_high)
        x = point(x)
        notes[name] = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return x
