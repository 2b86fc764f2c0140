"""Pre-loop-post (AlgoFormer, Gao et al. 2024, and the looped transformer, Yang et al. 2023): blocks that run once, blocks that repeat, and
blocks that run once.

    X = pre(embedding);   Z_0 = 0,  Z ← loop(Z + X)   `times` times;   post(Z)        inject "add" (the looped transformer's)
                          Z_0 = X,  Z ← loop(Z)                                        inject "none"

Whether AlgoFormer adds X again is not settled by what could be read of it. `window`: only the last loops carry gradients, as the looped
transformer trains.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.wiring import Notes, Wiring, register_wiring
from workbench.instrument.errors import suggestion

INJECTIONS = ("add", "none")


@dataclass(frozen=True)
class LoopedConfig:
    """Args: before, after: blocks that run once at either end. times: runs of the blocks between. inject: see above. window: see above."""

    times: int
    before: int = 0
    after: int = 0
    inject: str = "add"
    window: int | None = None
    kind: str = "looped"

    label = "Loop"

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.before} before, ×{self.times}, {self.after} after"

    def __post_init__(self) -> None:
        if self.inject not in INJECTIONS:
            raise ValueError(
                f"Unknown inject {self.inject!r}.{suggestion(self.inject, INJECTIONS)} Expected one of {', '.join(INJECTIONS)}."
            )
        if self.times < 1 or min(self.before, self.after) < 0 or (self.window is not None and self.window < 1):
            raise ValueError(
                f"{self} asks for less than nothing; expected times and window of at least 1, before and after of at least 0."
            )


@register_wiring(LoopedConfig)
class Looped(Wiring):
    """See the module docstring."""

    def __init__(self, config: LoopedConfig, model: Any) -> None:
        super().__init__()
        self.config, self.first, self.last = config, config.before, model.n_layers - config.after - 1
        if self.last < self.first:
            raise ValueError(
                f"{config.before} + {config.after} blocks run once; of {model.n_layers} layers none is left to repeat."
            )
        loop = range(self.first, self.last + 1)
        self.visits = (
            *((layer, 0) for layer in range(self.first)),
            *((layer, step) for step in range(config.times) for layer in loop),
            *((layer, 0) for layer in range(self.last + 1, model.n_layers)),
        )

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer != self.first or self.config.inject == "none":
            return x
        if step == 0:
            notes["injected"] = x
            return x
        again: Tensor = notes["injected"]
        return x + again

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        window = self.config.window
        truncated = layer == self.last and window is not None and step < self.config.times - window
        return x.detach() if truncated else x
