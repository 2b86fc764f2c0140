"""LSTM, GRU and Elman networks in heads, each with an MLP behind it (FlashRNN, Pöppel et al. 2024)."""

from models.architectures.shared import GELU, GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.elman import ElmanConfig
from models.recurrent.gru import GRUConfig
from models.recurrent.lstm import LSTMConfig

language_model(
    name="lstm",
    title="LSTM in heads",
    paper="flashrnn",
    family="recurrent",
    presets={
        "tiny": tiny(LSTMConfig(n_heads=3), GLU, norm="rms"),
        "demo": LanguageModelConfig(
            4, 128, 256, None, LSTMConfig(n_heads=4), MLPConfig(352, "silu", True, False), norm="rms"
        ),
    },
    description="Four gates and a cell per unit, recurrent weights per head; every gate and both states can be read and edited.",
    shows=("pattern", "state", "gate"),
)
language_model(
    name="gru",
    title="GRU in heads",
    paper="flashrnn",
    family="recurrent",
    presets={
        "tiny": tiny(GRUConfig(n_heads=3), GELU),
        "demo": LanguageModelConfig(4, 128, 256, None, GRUConfig(n_heads=4), MLPConfig(512)),
    },
    description="Reset and update gates, one state per unit, recurrent weights per head.",
    shows=("pattern", "state", "gate"),
)
language_model(
    name="elman",
    title="Elman network in heads",
    paper="flashrnn",
    family="recurrent",
    presets={
        "tiny": tiny(ElmanConfig(n_heads=4, d_hidden=32), GELU),
        "demo": LanguageModelConfig(4, 128, 256, None, ElmanConfig(n_heads=4), MLPConfig(512)),
    },
    description="The plain recurrent network: one nonlinear state without gates.",
    shows=("pattern", "state"),
)
