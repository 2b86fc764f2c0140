"""Hierarchical Reasoning Model (Wang et al. 2025): a slow and a fast stack of blocks that read each other's state.

    z_L ← low(z_L + z_H + x)        `steps` times
    z_H ← high(z_H + z_L)           then once; both `cycles` times; z_H is unembedded

x is the embedding; z_L and z_H start as fixed random vectors, the same for every token. The first `low` blocks of the model are the
fast stack, the others the slow one. `gradient="last"` is the paper's one-step gradient: nothing before the last run of either stack
carries a gradient, which attributions on such a model then do not see either. Of the paper, the halting head and the carry over several
forward passes are not here. The paper's blocks have RMS norms behind (`norm_placement="after"`), embed with √d_model and read in both
directions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.context import Context
from models.wiring import Notes, Wiring, register_wiring, several_times
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

GRADIENTS = ("full", "last")


@dataclass(frozen=True)
class HierarchicalConfig:
    """Args: low: blocks of the fast stack. cycles: runs of the slow stack. steps: runs of the fast stack in each. gradient: see above."""

    low: int
    cycles: int = 2
    steps: int = 2
    gradient: str = "full"
    kind: str = "hierarchical"

    label = "Two levels"

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.cycles} × ({self.steps} fast, 1 slow)"

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise ValueError(
                f"Unknown gradient {self.gradient!r}.{suggestion(self.gradient, GRADIENTS)} Expected one of {', '.join(GRADIENTS)}."
            )
        if min(self.low, self.cycles, self.steps) < 1:
            raise ValueError(f"{self} has a part that never runs; expected at least 1 block, cycle and step.")


@register_wiring(HierarchicalConfig)
class Hierarchical(Wiring):
    """`hook_low@k`, k = cycle · steps + step, and `hook_high@cycle` are the states behind every run of a stack."""

    start_low: Tensor
    start_high: Tensor

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__()
        self.config, self.n_layers = config, model.n_layers
        if config.low >= model.n_layers:
            raise ValueError(
                f"low is {config.low} of {model.n_layers} layers; expected at least one layer for the slow stack."
            )
        fast, slow = range(config.low), range(config.low, model.n_layers)
        visits: list[tuple[int, int]] = []
        for cycle in range(config.cycles):
            for step in range(config.steps):
                visits += [(layer, cycle * config.steps + step) for layer in fast]
            visits += [(layer, cycle) for layer in slow]
        self.visits = tuple(visits)
        self.start(model)
        self.hook_low = several_times(HookPoint("low_state", "batch pos d_model"), config.cycles * config.steps)
        self.hook_high = several_times(HookPoint("high_state", "batch pos d_model"), config.cycles)

    def start(self, model: Any) -> None:
        """Register the states before the first run, [d_model]."""
        generator = torch.Generator().manual_seed(model.seed)
        for name in ("low", "high"):
            self.register_buffer(f"start_{name}", torch.randn(model.d_model, generator=generator).clamp(-2, 2))

    def begin(self, x: Tensor, context: Context) -> Notes:
        return {"input": x, "low": self.start_low.expand_as(x), "high": self.start_high.expand_as(x)}

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer == 0:
            return notes["low"] + notes["high"] + notes["input"]
        return notes["high"] + notes["low"] if layer == self.config.low else x

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer not in (self.config.low - 1, self.n_layers - 1):
            return x
        name, point = ("low", self.hook_low) if layer < self.config.low else ("high", self.hook_high)
        if self.config.gradient == "last" and step < point.steps - 1:
            x = x.detach()
        notes[name] = x = point(x)
        return x
