"""Depth that every token chooses: Universal Transformer with adaptive computation time, and PonderNet-like exits (PALBERT).

Universal Transformer (Dehghani et al. 2018) with ACT (Graves 2016): all blocks repeat; positions and the number of the step are added
before each; behind step n a token halts with probability p_n = σ(w·h_n + b). It stops at the first step where the sum reaches
`threshold`, or at the last one; that step gets what is missing to 1, and

    output = Σ_n weight_n h_n.   A token that has stopped keeps its state, which others still read.

PALBERT (Balagansky & Gavrilov 2022), after PonderNet (Banino et al. 2021): λ_n = σ(MLP([h_n ; h_{n−1}] + e_n)), the weight of step n is
λ_n Π_{m<n}(1 − λ_m), the last step gets the rest. The output is the average of states over exits, or (`exit="quantile"`) the state of the
first step at which the weights so far exceed `quantile`. Every token exits by itself; the paper classifies whole texts with a
bidirectional model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.context import Context
from models.parts.positions import sinusoidal
from models.wiring import Notes, Wiring, register_wiring, repeated, several_times
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

EXITS = ("average", "quantile")


@dataclass(frozen=True)
class ACTConfig:
    """Args: steps: most passes through the blocks. threshold: 1 − ε, the sum at which a token stops. halt_bias: b at the beginning."""

    steps: int
    threshold: float = 0.99
    halt_bias: float = -1.0
    kind: str = "act"

    label = "Halting (ACT)"

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"at most {self.steps} steps"


@dataclass(frozen=True)
class PonderConfig:
    """Args: steps: passes through the blocks. exit: `"average"` or `"quantile"`. width: of the hidden layer of the exit network."""

    steps: int
    exit: str = "average"
    quantile: float = 0.5
    width: int = 32
    kind: str = "ponder"

    label = "Exits (PonderNet)"

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.steps} steps, {self.exit}"

    def __post_init__(self) -> None:
        if self.exit not in EXITS:
            raise ValueError(
                f"Unknown exit {self.exit!r}.{suggestion(self.exit, EXITS)} Expected one of {', '.join(EXITS)}."
            )


class Halting(Wiring):
    """Repeats all blocks; `hook_halt@n` [batch, pos] is the probability of stopping behind step n (not fired for the last, which stops
    all), `hook_step_weight@n` the weight of its state in the output."""

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__()
        if config.steps < 2:
            raise ValueError(f"steps is {config.steps}; expected at least 2, or there is nothing to choose.")
        self.config, self.n_layers, self.d_model = config, model.n_layers, model.d_model
        self.visits = repeated(model.n_layers, config.steps)
        self.hook_halt = several_times(HookPoint("halting", "batch pos"), config.steps - 1)
        self.hook_step_weight = several_times(HookPoint("step_weight", "batch pos"), config.steps)

    def begin(self, x: Tensor, context: Context) -> Notes:
        return {
            "before": x,
            "output": torch.zeros_like(x),
            "left": x.new_ones(x.shape[:2]),
            "positions": context.positions,
        }

    def probability(self, step: int, x: Tensor, notes: Notes) -> Tensor:
        """Of stopping behind this step, having reached it, [batch, pos]."""
        raise TypeError(f"{type(self).__name__} does not say when it stops")

    def weight(self, last: bool, halt: Tensor | None, notes: Notes) -> Tensor:
        """Of this step's state, [batch, pos]; updates `notes["left"]`, what is missing to 1."""
        raise TypeError(f"{type(self).__name__} does not say how it weighs")

    def leaving(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer < self.n_layers - 1:
            return x
        stopped = notes.get("stopped")
        if stopped is not None:
            x = torch.where(stopped[..., None], notes["before"], x)
        last = step == self.config.steps - 1
        halt = None if last else self.hook_halt(self.probability(step, x, notes))
        weight = self.hook_step_weight(self.weight(last, halt, notes))
        notes["output"] = notes["output"] + weight[..., None] * x
        notes["before"] = x
        return x

    def result(self, x: Tensor, notes: Notes) -> Tensor:
        output: Tensor = notes["output"]
        return output


@register_wiring(ACTConfig)
class ACT(Halting):
    """`hook_step_embed@n` is what is added before step n."""

    def __init__(self, config: ACTConfig, model: Any) -> None:
        super().__init__(config, model)
        self.halt = nn.Linear(model.d_model, 1)
        self.hook_step_embed = several_times(HookPoint("step_embed", "batch pos d_model"), config.steps)

    def initialise_own(self) -> None:
        """A token starts by wanting to go on."""
        nn.init.constant_(self.halt.bias, self.config.halt_bias)

    def entering(self, layer: int, step: int, x: Tensor, notes: Notes) -> Tensor:
        if layer:
            return x
        where = sinusoidal(notes["positions"].to(torch.get_default_dtype()), self.d_model)
        when = sinusoidal(torch.tensor(float(step), device=x.device), self.d_model)
        return x + self.hook_step_embed((where + when).to(x.dtype).expand_as(x))

    def probability(self, step: int, x: Tensor, notes: Notes) -> Tensor:
        return self.halt(x)[..., 0].sigmoid()

    def weight(self, last: bool, halt: Tensor | None, notes: Notes) -> Tensor:
        left, stopped = notes["left"], notes.get("stopped")
        if halt is None:
            return left
        enough = left - halt <= 1 - self.config.threshold
        weight = torch.where(enough, left, halt)
        if stopped is not None:
            weight = weight * ~stopped
        notes["left"] = left - weight
        notes["stopped"] = enough if stopped is None else enough | stopped
        return weight


@register_wiring(PonderConfig)
class Ponder(Halting):
    """`score` is the exit network, `step_embed` [step, 2 · d_model] its embedding of the step."""

    def __init__(self, config: PonderConfig, model: Any) -> None:
        super().__init__(config, model)
        self.step_embed = nn.Parameter(torch.empty(config.steps - 1, 2 * model.d_model))
        self.score = nn.Sequential(nn.Linear(2 * model.d_model, config.width), nn.Tanh(), nn.Linear(config.width, 1))

    def probability(self, step: int, x: Tensor, notes: Notes) -> Tensor:
        both = torch.cat([x, notes["before"]], dim=-1) + self.step_embed[step]
        chance: Tensor = self.score(both)[..., 0].sigmoid()
        return chance

    def weight(self, last: bool, halt: Tensor | None, notes: Notes) -> Tensor:
        left = notes["left"]
        weight = left if halt is None else left * halt
        notes["left"] = left - weight
        if self.config.exit == "average":
            return weight
        above = (1 - left <= self.config.quantile) & ((1 - left + weight > self.config.quantile) | last)
        return above.to(weight.dtype)


def ponder_cost(weights: list[Tensor]) -> Tensor:
    """ACT's cost of every token, steps taken + weight of the last one, [batch, pos], of its step weights [batch, pos] each.

    Raises:
        ValueError: no weights.
    """
    if not weights:
        raise ValueError(
            "ponder_cost got no step weights. Expected those of every step, hook 'wiring.hook_step_weight@n'."
        )
    each = torch.stack(weights)
    taken = (each > 0).sum(0)
    return taken + each.gather(0, (taken - 1).clamp(min=0)[None])[0]


def exit_divergence(weights: list[Tensor], rate: float) -> Tensor:
    """KL(exits ‖ geometric(rate), cut at the last step and normalised) of every token in nats, [batch, pos]: PonderNet's regulariser."""
    if not weights or not 0 < rate < 1:
        raise ValueError(f"{len(weights)} step weights, rate {rate}; expected some weights and a rate between 0 and 1.")
    each = torch.stack(weights)
    steps = torch.arange(len(weights), dtype=each.dtype, device=each.device)
    prior = (rate * (1 - rate) ** steps)[:, None, None]
    prior = prior / prior.sum()
    return (torch.xlogy(each, each) - each * prior.log()).sum(0)
