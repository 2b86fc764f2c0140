"""The Elman network (Elman 1990), in heads: h_t = tanh(x + R h_{t−1} + b), or ReLU. hook_state[t] is h; there are no gates."""

from dataclasses import dataclass

from kernels.nonlinear_cells import Elman as ElmanCell
from models.mixers import register_mixer
from models.recurrent.rnn import HeadwiseRNN
from workbench.instrument.errors import suggestion

ACTIVATIONS = ("tanh", "relu")


@dataclass(frozen=True)
class ElmanConfig:
    """Args: n_heads, d_hidden: as for the LSTM. activation: `"tanh"` or `"relu"`."""

    n_heads: int = 1
    d_hidden: int | None = None
    activation: str = "tanh"
    kind: str = "elman"


@register_mixer(ElmanConfig)
class Elman(HeadwiseRNN):
    """The Elman network of one layer. [batch, pos, d_model] -> same."""

    kind = "elman"

    def __init__(self, config: ElmanConfig, d_model: int, switches: dict[str, bool]) -> None:
        if config.activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {config.activation!r}.{suggestion(config.activation, ACTIVATIONS)} Known: tanh, relu."
            )
        super().__init__(ElmanCell(config.activation), config.n_heads, config.d_hidden, d_model)
