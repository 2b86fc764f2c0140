"""What the architecture files share: registering a composition of the `LanguageModel`, and sizes for tests."""

from typing import Any

from models.architecture_record import Architecture, register_architecture
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig

GELU = MLPConfig(d_mlp=40)
GLU = MLPConfig(d_mlp=40, activation="silu", gated=True, bias=False)


def tiny(mixer: Any, mlp: Any, **changes: Any) -> LanguageModelConfig:
    """Small enough for exhaustive tests, large enough that no axis is 1 or equal to another."""
    return LanguageModelConfig(n_layers=3, d_model=24, vocab_size=256, n_ctx=64, mixer=mixer, mlp=mlp, **changes)


def language_model(**record: Any) -> Architecture:
    """Register an architecture that is a configuration of `LanguageModel`; takes the other fields of `Architecture`."""
    return register_architecture(Architecture(config=LanguageModelConfig, module=LanguageModel, **record))
