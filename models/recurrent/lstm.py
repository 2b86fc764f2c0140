"""The LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), in heads.

i, f, o = σ(x + r),  g = tanh(x + r),  c_t = f c_{t−1} + i g,  h_t = o tanh(c_t)
hook_{input,forget,output,candidate}_gate[t], hook_h[t], hook_c[t]
"""

from dataclasses import dataclass

from kernels.nonlinear_cells import LSTM as LSTMCell
from models.mixers import register_mixer
from models.recurrent.rnn import HeadwiseRNN


@dataclass(frozen=True)
class LSTMConfig:
    """Args: n_heads: blocks of the recurrent weights (1: the textbook LSTM). d_hidden: units of all heads (None: d_model)."""

    n_heads: int = 1
    d_hidden: int | None = None
    kind: str = "lstm"


@register_mixer(LSTMConfig)
class LSTM(HeadwiseRNN):
    """The LSTM of one layer. [batch, pos, d_model] -> same."""

    kind = "lstm"

    def __init__(self, config: LSTMConfig, d_model: int, switches: dict[str, bool]) -> None:
        super().__init__(LSTMCell(), config.n_heads, config.d_hidden, d_model)
