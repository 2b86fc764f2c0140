"""xLSTM (Beck et al. 2024), xLSTM-7B's layers (Beck et al. 2025) and the sizes of Bio-xLSTM (Schmidinger et al. 2024)."""

import math
from collections.abc import Collection
from typing import Any

from models.architectures.shared import GLU, language_model, tiny
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.recurrent.mlstm import MLSTMConfig
from models.recurrent.mlstm_block import MLSTMBlockConfig
from models.recurrent.slstm import SLSTMConfig


def xlstm(
    n_layers: int,
    d_model: int,
    slstm_at: Collection[int],
    vocab_size: int = 256,
    mlstm: MLSTMBlockConfig | None = None,
    slstm: SLSTMConfig | None = None,
    **changes: Any,
) -> LanguageModelConfig:
    """xLSTM[a:b]: sLSTM blocks (with a GELU-gated MLP of width 1.3 d_model, in steps of 64) at some layers, mLSTM blocks elsewhere."""
    behind = MLPConfig(64 * math.ceil(1.3 * d_model / 64), "gelu", gated=True, bias=False)
    at = [layer in slstm_at for layer in range(n_layers)]
    mixers = tuple((slstm or SLSTMConfig()) if here else (mlstm or MLSTMBlockConfig()) for here in at)
    mlps = tuple(behind if here else None for here in at)
    return LanguageModelConfig(n_layers, d_model, vocab_size, None, mixers, mlps, **changes)


ONE_WAY = (
    "An xLSTM here reads left to right. Reading both ways, or a strand together with its reverse complement, lets what a layer holds at "
    "token t depend on later tokens, so there would be no state after token t to read, edit or go on from. Expected this model with both "
    "strands (or both directions) as texts of their own, or one that reads both ways and has no state: 'bert', 't5-encoder'."
)
SMALL = MLSTMBlockConfig(n_heads=3, multiple_of=1)
language_model(
    name="xlstm",
    title="xLSTM",
    paper=None,
    family="recurrent",
    presets={
        "tiny": tiny((SMALL, SLSTMConfig(3, recurrent_bound=0.3), SMALL), (None, GLU, None)),
        "demo": xlstm(4, 128, {1}),
        "7:1": xlstm(8, 256, {1}),
    },
    description="Matrix memories with exponential writes and a normaliser (mLSTM), and a cell with feedback (sLSTM) at some layers.",
    shows=("pattern", "state", "decay", "write"),
)
language_model(
    name="mlstm",
    title="xLSTM-7B layers",
    paper=None,
    family="linear-attention",
    presets={
        "tiny": tiny(
            MLSTMConfig(n_heads=3, input_bias=2.0, norm_eps=1e-3),
            GLU,
            norm="rms",
            norm_eps=1e-6,
            logit_softcap=30.0,
            init_std=0.1,
        ),
        "demo": LanguageModelConfig(
            4,
            128,
            256,
            None,
            MLSTMConfig(4),
            MLPConfig(384, "silu", True, False),
            norm="rms",
            norm_eps=1e-6,
            logit_softcap=30.0,
        ),
    },
    description="mLSTM between plain projections with an output gate and an MLP behind it: exact pattern, editable memory and normaliser.",
    shows=("pattern", "state", "decay", "write"),
)
language_model(
    name="bio-xlstm",
    title="Bio-xLSTM (causal)",
    paper="bio-xlstm",
    family="recurrent",
    presets={
        "tiny": tiny((MLSTMBlockConfig(n_heads=3, multiple_of=1, rope="inner"), SMALL, SMALL), None),
        "dna-mlstm": xlstm(4, 128, (), 12, MLSTMBlockConfig(rope="head")),
        "dna-slstm": xlstm(4, 128, range(4), 12),
        "prot": xlstm(16, 1024, (), 38, MLSTMBlockConfig(rope="inner")),
        "chem": xlstm(9, 512, (), 37, MLSTMBlockConfig(n_heads=8)),
    },
    description="The published sizes for DNA, proteins and molecules, with rotated queries and keys where the code has them.",
    shows=("pattern", "state", "decay", "write"),
    fidelity="reconstructed",
    notes=(
        "Left to right only: the masked, bidirectional and reverse-complement modes of DNA-xLSTM, its sinusoidal embedding, and "
        "positions within each protein are not here."
    ),
    refused=dict.fromkeys(
        ("bidirectional", "causal", "rc_equivariant", "reverse_complement", "rcps", "rc_conjoin"), ONE_WAY
    ),
)
