"""The GRU (Cho et al. 2014), in the form of cuDNN and torch and in heads.

r, u = σ(x + R h),  n = tanh(x + r (R h + b)),  h_t = u h_{t−1} + (1 − u) n
hook_{reset,update,candidate}_gate[t], hook_state[t] (which is h)
"""

from dataclasses import dataclass

from kernels.nonlinear_cells import GRU as GRUCell
from models.mixers import register_mixer
from models.recurrent.rnn import HeadwiseRNN


@dataclass(frozen=True)
class GRUConfig:
    """Args: n_heads: blocks of the recurrent weights (1: the textbook GRU). d_hidden: units of all heads (None: d_model)."""

    n_heads: int = 1
    d_hidden: int | None = None
    kind: str = "gru"


@register_mixer(GRUConfig)
class GRU(HeadwiseRNN):
    """The GRU of one layer. [batch, pos, d_model] -> same."""

    kind = "gru"

    def __init__(self, config: GRUConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(GRUCell(), config.n_heads, config.d_hidden, d_model)
