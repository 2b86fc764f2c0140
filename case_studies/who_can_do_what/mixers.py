"""The mixers that are compared, each in a model of the same size.

Every model is two blocks of (norm, mixer, norm, gated MLP) at width 32 with two heads. The mixers need different numbers of weights, so the
width of the MLP makes up for it: it is the one for which the number of all weights comes nearest to `PARAMETERS`. Matrix memories hold
2 heads × 8 × 16 = 256 numbers per layer where the mixer lets us choose.

What departs from published initial values, because rows here have 25 to 33 tokens and not thousands: step sizes of Mamba and
Mamba-2 begin in [0.1, 1] instead of [0.001, 0.1], with |A| up to 2 in Mamba-2. All other weights begin at N(0, 1/d_model).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from models.attention.config import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.aaren import AarenConfig
from models.recurrent.delta import DeltaConfig
from models.recurrent.elman import ElmanConfig
from models.recurrent.gateloop import GateLoopConfig
from models.recurrent.gla import GLAConfig
from models.recurrent.gru import GRUConfig
from models.recurrent.lstm import LSTMConfig
from models.recurrent.mamba import MambaConfig
from models.recurrent.mamba2 import Mamba2Config
from models.recurrent.retention import RetentionConfig
from models.recurrent.slstm import SLSTMConfig
from workbench.instrument.errors import suggestion

LAYERS, WIDTH, HEADS, VOCAB = 2, 32, 2, 16
D_KEY, D_VALUE = 8, 16
PARAMETERS = 30_000

MIXERS: dict[str, Any] = {
    "softmax": AttentionConfig(n_heads=HEADS, position="rope"),
    "aaren": AarenConfig(HEADS),
    "retnet": RetentionConfig(HEADS, value_factor=1.0),
    "simple-gla": GLAConfig(HEADS, decay="scalar"),
    "gla": GLAConfig(HEADS),
    "gateloop": GateLoopConfig(HEADS, d_head=D_KEY),
    "mamba": MambaConfig(d_state=D_KEY, expand=1, n_heads=HEADS, dt_min=0.1, dt_max=1.0),
    "mamba2": Mamba2Config(d_state=D_KEY, d_head=D_VALUE, expand=1, dt_min=0.1, dt_max=1.0, a_max=2.0),
    "deltanet": DeltaConfig(HEADS, D_KEY, D_VALUE),
    "deltanet-negative": DeltaConfig(HEADS, D_KEY, D_VALUE, negative_eigenvalues=True),
    "gated-deltanet": DeltaConfig(HEADS, D_KEY, D_VALUE, decay="scalar"),
    "elman": ElmanConfig(1),
    "gru": GRUConfig(1),
    "lstm": LSTMConfig(1),
    "slstm": SLSTMConfig(HEADS, recurrent_bound=0.1),
}

# What the state of each does from token to token; the claims speak of these groups.
POSITIVE = ("aaren", "retnet", "simple-gla", "gla", "mamba", "mamba2", "deltanet", "gated-deltanet")
TURNING = ("gateloop", "deltanet-negative")  # complex, or below zero
NONLINEAR = ("elman", "gru", "lstm", "slstm")
CHOOSING = ("simple-gla", "gla", "mamba", "mamba2")  # positive decays that depend on the token


def build(mixer: str, seed: int) -> LanguageModel:
    """The model of one mixer. Raises ValueError for an unknown name."""
    if mixer not in MIXERS:
        raise ValueError(f"Unknown mixer {mixer!r}.{suggestion(mixer, MIXERS)} Expected one of {', '.join(MIXERS)}.")
    return _model(mixer, mlp_width(mixer), seed)


@cache
def mlp_width(mixer: str) -> int:
    """The width of the MLP that brings the model nearest to `PARAMETERS`."""
    narrow, wide = (parameters(_model(mixer, d_mlp, 0)) for d_mlp in (1, 2))
    return max(1, 1 + round((PARAMETERS - narrow) / (wide - narrow)))


def _model(mixer: str, d_mlp: int, seed: int) -> LanguageModel:
    mlp = MLPConfig(d_mlp, "silu", gated=True, bias=False)
    return LanguageModel(
        LanguageModelConfig(LAYERS, WIDTH, VOCAB, None, MIXERS[mixer], mlp, norm="rms", init_std=WIDTH**-0.5, seed=seed)
    )


def parameters(model: LanguageModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


def state_numbers(model: LanguageModel) -> int:
    """Numbers that one layer carries on after 33 tokens, convolution windows included; for softmax its keys and values, which grow."""
    _, state = model(torch.zeros(1, 33, dtype=torch.long), return_state=True)
    return sum(slot.numel() for slot in state.layers[0].values())
